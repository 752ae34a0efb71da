"""What a statement is taken for. Only the last test asks a database: it holds the list of functions to the catalog."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.dialects.postgresql import psycopg2

from fictive.connection.classify import Effect, StatementClass, classify, known_texts, summary
from fictive.connection.read_functions import READ_FUNCTIONS
from fictive.testing import postgres
from tests.models import Child, Item

DIALECT = psycopg2.dialect()


def sql_of(statement: Any) -> str:
    """The text that a driver would get."""
    if isinstance(statement, sa.sql.lambdas.LambdaElement):
        statement = statement._resolved
    return str(statement.compile(dialect=DIALECT))


def nature_of(statement: Any, parameters: Any = None) -> StatementClass:
    if parameters is None and not isinstance(statement, sa.sql.lambdas.LambdaElement):
        parameters = statement.compile(dialect=DIALECT).params
    return classify(sql_of(statement)).resolved(parameters)


READ, MAY_WRITE, WRITE = Effect.READ, Effect.MAY_WRITE, Effect.WRITE

EFFECTS: list[tuple[Any, Effect]] = [
    (sa.select(Item), READ),
    (sa.select(Item).where(Item.name == "x").join(Child).order_by(Item.id).limit(3), READ),
    (sa.select(sa.func.count(), sa.func.lower(Item.name), sa.func.now()), READ),
    (sa.select(sa.func.coalesce(Item.note, "a"), sa.cast(Item.id, sa.String)), READ),
    (sa.select(sa.func.my_function()), MAY_WRITE),
    (sa.select(Item).where(sa.func.similarity(Item.name, "x") > 1), MAY_WRITE),
    (sa.select(sa.insert(Item).values(name="x").returning(Item.id).cte()), WRITE),
    (sa.select(Item).add_cte(sa.delete(Item).cte("gone")), WRITE),
    (sa.insert(Item), WRITE),
    (pg_insert(Item).values(name="x").on_conflict_do_nothing(), WRITE),
    (sa.update(Item).values(note="x"), WRITE),
    (sa.delete(Item), WRITE),
    (sa.schema.CreateTable(Item.__table__), WRITE),
    (sa.union(sa.select(Item.id), sa.select(Child.id)), READ),
    (sa.lambda_stmt(lambda: sa.select(Item)), READ),
    (sa.select(Item).where(sa.text("name = 'insert into'")), READ),
    (sa.select(Item).from_statement(sa.text("delete from item returning *")), WRITE),
    (sa.select(Item).from_statement(sa.text("select * from item")), READ),
    (sa.text("select 1"), READ),
    (sa.text("  -- a comment\n SELECT * from item /* ; delete from item */"), READ),
    (sa.text("(select 1) union (select 2)"), READ),
    (sa.text("values (1, 2)"), READ),
    (sa.text("table item"), READ),
    (sa.text("show work_mem"), READ),
    (sa.text("with x as (select 1) select * from x"), READ),
    (sa.text("with recursive t(n) as (select 1 union all select n+1 from t) select n from t"), READ),
    (sa.text("select * from json_to_recordset(:j) as x(a int, b varchar(10))"), READ),
    (sa.text("select count(*) filter (where a in (1, 2)) over (partition by b) from t"), READ),
    (sa.text("select extract(epoch from now()), cast(a as numeric(10, 2)), pg_catalog.lower(b) from t"), READ),
    (sa.text('select "delete" from "update" where a = \'drop table x; insert\' and b = $$truncate$$'), READ),
    (sa.text("select E'it\\'s ; delete from x'"), READ),
    (sa.text("explain select 1"), READ),
    (sa.text("explain delete from item"), READ),
    (sa.text("explain analyze delete from item"), WRITE),
    (sa.text("explain (analyze, buffers) delete from item"), WRITE),
    (sa.text("with x as (delete from item returning *) select * from x"), WRITE),
    (sa.text("select * into other from item"), WRITE),
    (sa.text("select my_function()"), MAY_WRITE),
    (sa.text("select app.my_function(1)"), MAY_WRITE),
    (sa.text("select 1; delete from item"), WRITE),
    (sa.text("insert into item (name) values ('x')"), WRITE),
    (sa.text("call a_procedure()"), WRITE),
    (sa.text("do $$ begin end $$"), WRITE),
    (sa.text("vacuum item"), WRITE),
    (sa.text("refresh materialized view v"), WRITE),
    (sa.text("pragma table_info('item')"), READ),
    (sa.text("pragma foreign_keys = on"), WRITE),
    (sa.text(""), READ),
]


@pytest.mark.parametrize(("statement", "effect"), EFFECTS, ids=[str(number) for number in range(len(EFFECTS))])
def test_a23_what_a_statement_does(statement: Any, effect: Effect) -> None:
    assert nature_of(statement).effect is effect


TRANSACTION_ONLY: list[tuple[Any, str]] = [
    (sa.select(Item).with_for_update(), "FOR UPDATE"),
    (sa.select(Item).with_for_update(read=True, skip_locked=True), "FOR UPDATE"),
    (sa.select(sa.select(Item).with_for_update().subquery()), "FOR UPDATE"),
    (sa.select(Item).from_statement(sa.text("select * from item for share")), "FOR UPDATE"),
    (sa.text("select * from item FOR\n NO KEY update of item"), "FOR UPDATE"),
    (sa.text("lock table item"), "LOCK TABLE"),
    (sa.text("/* now */ set local work_mem = '1MB'"), "SET LOCAL"),
    (sa.text("set transaction read only"), "SET TRANSACTION"),
    (sa.text("select set_config('a.b', 'c', true)"), "set_config"),
    (sa.text("select pg_advisory_xact_lock(1)"), "pg_advisory_xact_lock()"),
    (sa.select(sa.func.pg_try_advisory_xact_lock(1)), "pg_try_advisory_xact_lock()"),
    (sa.select(sa.func.set_config("a.b", "c", True)), "set_config"),
    (sa.text("savepoint x"), "SAVEPOINT"),
    (sa.text("begin"), "BEGIN"),
    (sa.text("create temp table x (id int) on commit drop"), "CREATE TEMPORARY TABLE"),
]


@pytest.mark.parametrize(("statement", "name"), TRANSACTION_ONLY, ids=lambda value: str(value)[:30])
def test_a11_what_needs_a_transaction(statement: Any, name: str) -> None:
    found = nature_of(statement).transaction_only
    assert found is not None
    assert found.startswith(name)


CONNECTION_STATE: list[Any] = [
    sa.text("set work_mem = '1MB'"),
    sa.text("reset all"),
    sa.text("listen a_channel"),
    sa.text("create temporary table x (id int)"),
    sa.text("create temp table x (id int)"),
    sa.text("select pg_advisory_lock(1)"),
    sa.text("select set_config('a.b', 'c', false)"),
    sa.text("prepare x as select 1"),
    sa.select(sa.func.pg_try_advisory_lock(1)),
    sa.select(sa.func.set_config("a.b", "c", False)),
]


@pytest.mark.parametrize(
    "text", ["insert into x select id from pg_temp.t", "insert into pg_temp.t values (1)", "select * from pg_temp.t"]
)
def test_a13_to_use_a_temporary_table_leaves_nothing(text: str) -> None:
    assert nature_of(sa.text(text)).connection_state is None


@pytest.mark.parametrize("setting", ["set_config('a.b', 'c', true)", "set_config('a.b', before, true)"])
def test_a13_a_block_that_sets_for_the_transaction_leaves_nothing(setting: str) -> None:
    body = f"begin perform {setting}; execute 'select 1'; end"
    assert nature_of(sa.text(f"do $$ {body} $$")).connection_state is None
    assert nature_of(sa.text(f"do $$ {body.replace('true', 'false')} $$")).connection_state


@pytest.mark.parametrize("statement", CONNECTION_STATE, ids=str)
def test_a13_what_stays_with_the_connection(statement: Any) -> None:
    assert nature_of(statement).connection_state
    assert not nature_of(statement).transaction_only


NOTHING_SPECIAL: list[Any] = [
    sa.text("select 'for update', \"lock table\" from item -- set local x"),
    sa.text("select for_update from item"),
    sa.text("select 1 as lock"),
    sa.text("update item set note = 'for share'"),
    sa.select(sa.literal("lock table")),
    sa.select(sa.column("for update")),
]


@pytest.mark.parametrize("statement", NOTHING_SPECIAL, ids=str)
def test_a11_no_false_alarm(statement: Any) -> None:
    nature = nature_of(statement)
    assert (nature.transaction_only, nature.connection_state) == (None, None)


@pytest.mark.parametrize(("value", "local"), [(True, True), (False, False), (None, True)])
def test_a11_a_bound_value_decides(value: bool | None, local: bool) -> None:
    for statement in (
        sa.text("select set_config('a.b', 'c', :is_local)"),
        sa.select(sa.func.set_config("a.b", "c", sa.bindparam("is_local"))),
    ):
        nature = nature_of(statement, {"is_local": True if value is None else value})
        assert bool(nature.transaction_only) is local


def test_a11_what_ends_a_transaction() -> None:
    for text in (
        "commit",
        "rollback",
        "/* x */ ROLLBACK",
        "end",
        "abort",
        "commit and chain",
        "select 1; commit; begin",
    ):
        assert classify(text).may_end_transaction, text
    for text in ("rollback to savepoint a", "rollback to a", "savepoint a", "select 'commit'", "do $$ begin end $$"):
        assert not classify(text).may_end_transaction, text


@pytest.mark.parametrize(
    "text",
    [
        "do $$ begin set role x; end $$",
        "do $$ begin execute 'set role x'; end $$",
        "do $$ begin perform pg_advisory_lock(1); end $$",
        "declare c cursor with hold for select 1",
        "declare c cursor for select set_config('a.b', 'c', false)",
        "discard all",
        "load 'x'",
        "set session characteristics as transaction read only",
    ],
)
def test_a18_what_stays_with_the_connection_beyond_the_transaction(text: str) -> None:
    assert classify(text).connection_state


def test_long_texts_are_known_by_their_shape() -> None:
    texts = ["select 1 where 1 in (" + ", ".join(f"%(p_{i})s" for i in range(n)) + ")" for n in (200, 300)]
    assert [classify(text).effect for text in texts] == [READ, READ]
    assert not any(text in known_texts for text in texts)


def test_a23_summaries_are_short() -> None:
    assert summary(sql_of(sa.update(Item))) == "UPDATE item"
    assert summary("delete\n  from item") == "DELETE item"
    assert summary('/* who */ insert into "my table" values (1)') == "INSERT my table"
    assert len(summary("select " + "x" * 100)) == 60


def test_a23_the_functions_called_reads_are_not_volatile_on_this_server(pg: postgres.Server) -> None:
    """Except for those of which nothing is left to roll back."""
    harmless = {
        "clock_timestamp", "timeofday", "random", "random_normal", "gen_random_uuid", "uuidv4", "uuidv7", "nextval",
        "currval", "lastval", "pg_sleep", "pg_sleep_for", "pg_sleep_until", "array_sample", "array_shuffle",
    }  # fmt: skip
    with psycopg.connect(pg.url()) as connection:
        volatile = {
            name
            for (name,) in connection.execute(
                "select proname from pg_proc where pronamespace = 'pg_catalog'::regnamespace"
                " group by proname having bool_or(provolatile = 'v')"
            )
        }
    sizes = {name for name in volatile if name.startswith("pg_") and (name.endswith("_size") or "_last_" in name)}
    looks = {
        "pg_is_in_recovery", "pg_current_wal_lsn", "pg_blocking_pids", "pg_safe_snapshot_blocking_pids",
    }  # fmt: skip
    assert READ_FUNCTIONS & volatile - harmless - sizes - looks == set()

"""What a statement is taken for. Only the last test asks a database: it holds the list of functions to the catalog."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.dialects.postgresql import insert as pg_insert

from fictive.session.read_functions import READ_FUNCTIONS
from fictive.session.statements import Effect, nature_of, summary
from fictive.testing import postgres
from tests.models import Child, Item

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
    (sa.Sequence("a_sequence"), WRITE),
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
    (sa.text("select my_function()"), WRITE),
    (sa.text("select app.my_function(1)"), WRITE),
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
    text = sa.text("select set_config('a.b', 'c', :is_local)")
    for nature in (
        nature_of(text, {"is_local": value}),
        nature_of(text.bindparams(is_local=value)),
        nature_of(sa.select(sa.func.set_config("a.b", "c", sa.bindparam("is_local"))), {"is_local": value})
        if value is not None
        else nature_of(text, {"is_local": None}),
    ):
        assert bool(nature.transaction_only) is local


def test_a23_summaries_are_short() -> None:
    assert summary(sa.update(Item)) == "UPDATE item"
    assert summary(sa.text("delete\n  from item")) == "delete from item"
    assert len(summary(sa.text("select " + "x" * 100))) == 60
    assert summary(sa.select(Item)) == "Select"
    assert summary(sa_orm.Query([Item]).statement) == "Select"


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

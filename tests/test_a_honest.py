"""Contract A15, A18, A24: a block never says "committed" of what is not there, and leaves nothing to the next user."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import psycopg.sql
import psycopg2.sql
import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy import event

from fictive.drivers import sqlstate
from fictive.errors import TransactionAborted
from tests.conftest import MakeApp
from tests.models import Item, db

Look = Callable[..., list[Any]]


def text(sql: str) -> Callable[[], Any]:
    return lambda: db.session.execute(sa.text(sql))


def handed_out() -> Any:
    """SQLAlchemy's pooled connection."""
    return db.session.connection().connection


def raw() -> Any:
    return handed_out().driver_connection


ENDS: dict[str, Callable[[], Any]] = {
    "ROLLBACK": text("ROLLBACK"),
    "COMMIT": text("COMMIT"),
    "with a comment": text("/* x */ rollback"),
    "behind a line comment": text("-- x\nend"),
    "ABORT": text("ABORT"),
    "AND CHAIN": text("ROLLBACK AND CHAIN"),
    "COMMIT AND CHAIN": text("COMMIT AND CHAIN"),
    "of several": text("select 1; commit"),
    "and BEGIN": text("rollback; begin"),
    "PREPARE TRANSACTION": text("prepare transaction 'of a test'"),
    "exec_driver_sql": lambda: db.session.connection().exec_driver_sql("ROLLBACK"),
    "rollback() of the driver": lambda: raw().rollback(),
    "commit() of the driver": lambda: raw().commit(),
    "a cursor of the driver": lambda: raw().cursor().execute("ROLLBACK"),
    "rollback() of the pooled connection": lambda: handed_out().rollback(),
    "commit() of the pooled connection": lambda: handed_out().commit(),
    "close() of the pooled connection": lambda: handed_out().close(),
    "a cursor of the pooled connection": lambda: handed_out().cursor().execute("ROLLBACK"),
    "rollback() of the connection": lambda: db.session.connection().rollback(),
    "commit() of the connection": lambda: db.session.connection().commit(),
    "invalidate()": lambda: db.session.connection().invalidate(),
}


@pytest.mark.usefixtures("app")
@pytest.mark.parametrize("fails", [False, True], ids=["commits", "rolls back"])
@pytest.mark.parametrize("nested", [False, True], ids=["whole", "savepoint"])
@pytest.mark.parametrize("first", [False, True], ids=["first", "after a statement"])
def test_a24_a_statement_on_the_drivers_connection_is_part_of_the_block(
    first: bool, nested: bool, fails: bool, look: Look
) -> None:
    with contextlib.suppress(ZeroDivisionError), db.session.begin():
        if first:
            db.session.execute(sa.insert(Item).values(name="before"))
        with db.session.begin_nested() if nested else contextlib.nullcontext():
            with raw().cursor() as cursor:
                cursor.execute("insert into item (name) values ('by hand')")
            db.session.execute(sa.insert(Item).values(name="after"))
            if fails:
                raise ZeroDivisionError
    wanted = [] if fails else ["before"] * first + ["by hand", "after"]
    assert look("select name from item order by id") == wanted
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.usefixtures("app")
@pytest.mark.parametrize("first", [False, True], ids=["first", "after a statement"])
@pytest.mark.parametrize("then", [False, True], ids=["last", "and more"])
@pytest.mark.parametrize("how", ENDS)
def test_a15_the_transaction_that_commits_is_the_one_that_was_begun(
    how: str, then: bool, first: bool, look: Look
) -> None:
    ran: list[str] = []
    wanted = ["before"] * first + ["after"] * then
    error: Exception | None = None
    try:
        with db.session.begin():
            db.on_commit(lambda: ran.append("commit"))
            if first:
                db.session.execute(sa.insert(Item).values(name="before"))
            try:
                ENDS[how]()
            except sa.exc.SQLAlchemyError:
                pass
            except Exception as raised:  # the driver's own
                assert type(raised).__module__.startswith("psycopg")  # noqa: PT017
            if then:
                db.session.execute(sa.insert(Item).values(name="after"))
    except sa.exc.SQLAlchemyError as raised:
        error = raised
    for gid in look("select gid from pg_prepared_xacts where database = current_database()"):
        look(f"rollback prepared '{gid}'")
    stored = look("select name from item order by id")
    assert "after" not in stored or error is None  # else it ran in autocommit
    assert error is not None or stored == wanted
    assert ran == (["commit"] if error is None else [])
    if isinstance(error, TransactionAborted) and stored:
        assert "may be committed" in str(error)
    with db.session.begin():
        db.session.add(Item(name="next"))
    assert look("select count(*) from item where name = 'next'") == [1]


def test_a15_a_statement_without_a_connection_counts_though_it_was_caught(make_app: MakeApp, look: Look) -> None:
    app = make_app(SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.01})
    with app.app_context():
        with pytest.raises(TransactionAborted, match="no connection"), db.session.begin():
            with db.engine.connect(), pytest.raises(sa.exc.TimeoutError):
                db.session.execute(sa.insert(Item).values(name="missing"))
            db.session.execute(sa.insert(Item).values(name="there"))
        assert look("select name from item") == []
        db.session.execute(sa.text("select 1"))


def test_a15_a_child_that_leaves_an_inherited_block(app: Flask, look: Look) -> None:
    receiver, sender = os.pipe()
    with db.session.begin():
        db.session.execute(sa.insert(Item).values(name="parents"))
        child = os.fork()
        if child == 0:
            said = "left as committed"
            try:
                db.session.commit()
            except BaseException as error:
                said = type(error).__name__
            os.write(sender, said.encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(receiver, 100) == b"TransactionAborted"
        assert look("select count(*) from item") == [0]
    os.close(receiver)
    os.close(sender)
    assert look("select name from item") == ["parents"]


LEFT = {
    "SET": "SET work_mem = '7777kB'",
    "SET SESSION": "SET SESSION work_mem = '7777kB'",
    "SET ROLE": "SET ROLE pg_monitor",
    "SET SESSION AUTHORIZATION": "SET SESSION AUTHORIZATION pg_monitor",
    "SET TIME ZONE": "SET TIME ZONE 'Asia/Tokyo'",
    "set_config": "SELECT set_config('work_mem', '7777kB', false)",
    "set_config with a text": "SELECT set_config('work_mem', '7777kB', 'off')",
    "set_config with an expression": "SELECT set_config('work_mem', '7777kB', not true)",
    "in a DO": "DO $$ begin perform set_config('work_mem', '7777kB', false); end $$",
    "SET in a DO": "DO $$ begin SET work_mem = '7777kB'; end $$",
    "EXECUTE in a DO": "DO $$ begin execute 'SET work_mem = ''7777kB'''; end $$",
    "DO in plain quotes": "DO 'begin SET work_mem = ''7777kB''; end'",
    "DO with a language": "DO LANGUAGE plpgsql $x$ begin SET work_mem = '7777kB'; end $x$",
    "a lock": "SELECT pg_advisory_lock(77)",
    "a lock that is tried": "SELECT pg_try_advisory_lock(77)",
    "a shared lock": "SELECT pg_advisory_lock_shared(77)",
    "LISTEN": "LISTEN ch",
    "a temporary table": "CREATE TEMP TABLE left_there (n int)",
    "SELECT INTO TEMP": "SELECT 1 AS n INTO TEMP left_there",
    "a temporary table as": "CREATE TEMPORARY TABLE left_there AS SELECT 1 AS n",
    "a temporary table that goes": "CREATE TEMP TABLE left_there (n int) ON COMMIT DROP",
    "INTO TABLE": "SELECT 1 AS n INTO TABLE pg_temp.left_there",
    "a temporary view": "CREATE TEMP VIEW left_there AS SELECT 1 AS n",
    "in pg_temp": "CREATE TABLE pg_temp.left_there (n int)",
    "PREPARE": "PREPARE left_there AS SELECT 1",
    "WITH HOLD": "DECLARE left_there CURSOR WITH HOLD FOR SELECT 1",
    "READ ONLY": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "behind another": "SELECT 1; SET work_mem = '7777kB'",
    "with a comment": "/* x */ SET /* y */ work_mem = '7777kB'",
}

STATE = """
select current_setting('work_mem'), current_user, session_user, current_setting('timezone'),
  current_setting('default_transaction_read_only'), to_regclass('left_there') is null,
  (select count(*) from pg_prepared_statements where name = 'left_there'),
  (select count(*) from pg_cursors where name = 'left_there'),
  (select count(*) from pg_listening_channels()),
  (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid())
"""


@pytest.mark.usefixtures("app")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("what", LEFT)
def test_a18_nothing_that_a_block_set_reaches_the_next_user(what: str, nested: bool) -> None:
    state = db.session.execute(sa.text(STATE).execution_options(fictive_writes=False)).one()
    with db.session.begin():
        db.session.execute(sa.text("select 1"))
        if nested:
            with db.session.begin_nested():
                db.session.execute(sa.text(LEFT[what]))
        else:
            db.session.execute(sa.text(LEFT[what]))
    for _ in range(2):
        assert db.session.execute(sa.text(STATE).execution_options(fictive_writes=False)).one() == state
    with db.engine.connect() as connection:
        assert connection.execute(sa.text(STATE)).one() == state


@pytest.mark.usefixtures("app")
@pytest.mark.parametrize("local", [False, "off"])
def test_a18_nothing_that_a_block_set_by_a_bound_value_reaches_the_next_user(local: object) -> None:
    query = sa.text("SELECT set_config('app.tenant', :name, :local)")
    one, many = {"name": "7", "local": local}, [{"name": "7", "local": local}, {"name": "8", "local": True}]
    stream = {"yield_per": 1}
    for parameters, options in ((one, {}), (many, {}), (one, stream)):
        with db.session.begin():
            found = db.session.execute(query, parameters, execution_options=options)
            if options:
                found.all()
        assert db.session.scalar(sa.text("select current_setting('app.tenant', true)")) in (None, "")


@pytest.mark.usefixtures("app")
@pytest.mark.parametrize("values", [False, True], ids=["alone", "with values"])
@pytest.mark.parametrize("block", [db.pinned, db.session.begin], ids=["pinned", "in a block"])
def test_a25_a_session_runs_what_the_drivers_sql_module_composes(
    block: Callable[[], Any], values: bool, driver: str, look: Look
) -> None:
    sql = psycopg.sql if driver == "psycopg" else psycopg2.sql
    with block():
        for name in ("a", "b"):
            value = sql.Placeholder() if values else sql.Literal(name)
            query = sql.SQL("insert into {} (name) values ({})").format(sql.Identifier("item"), value)
            handed_out().cursor().execute(query, (name,) if values else None)
    assert look("select name from item order by id") == ["a", "b"]


@pytest.mark.usefixtures("app")
def test_a18_a_composed_set_does_not_reach_the_next_user(driver: str) -> None:
    sql = psycopg.sql if driver == "psycopg" else psycopg2.sql
    query = sql.SQL("set {} to {}").format(sql.Identifier("app.tenant"), sql.Literal("7"))
    with db.session.begin():
        handed_out().cursor().execute(query)
    assert db.session.scalar(sa.text("select current_setting('app.tenant', true)")) in (None, "")


@pytest.mark.usefixtures("app")
def test_a15_nothing_runs_after_the_pooled_connection_was_invalidated(look: Look) -> None:
    with pytest.raises(TransactionAborted), db.session.begin():
        db.session.execute(sa.insert(Item).values(name="before"))
        handed_out().invalidate()
        db.session.execute(sa.insert(Item).values(name="after"))
    assert look("select name from item") == []
    db.session.execute(sa.insert(Item).values(name="next"))
    assert look("select name from item") == ["next"]


def test_a15_an_error_of_a_raw_cursor_is_no_end_behind_the_back(app: Flask) -> None:
    """It is the first statement of the transaction, which the driver has begun."""
    with pytest.raises(TransactionAborted), db.session.begin():
        with pytest.raises(Exception, match="division by zero"):
            raw().cursor().execute("SELECT 1/0")
        with pytest.raises(sa.exc.DBAPIError) as caught:
            db.session.execute(sa.text("SELECT 1"))
        assert sqlstate(caught.value) == "25P02"


def test_a29_a_raw_cursor_in_a_savepoint_that_has_failed(app: Flask, look: Look) -> None:
    with db.session.begin():
        db.session.add(Item(name="before"))
        with pytest.raises(KeyError), db.session.begin_nested():
            with pytest.raises(sa.exc.DBAPIError):
                db.session.execute(sa.text("SELECT 1/0"))
            with pytest.raises(Exception, match="transaction is aborted"):
                raw().cursor().execute("SELECT 1")
            raise KeyError
        db.session.add(Item(name="after"))
        db.session.flush()
        raw().cursor().execute("INSERT INTO item (name) VALUES ('raw')")
    assert look("SELECT name FROM item ORDER BY name") == ["after", "before", "raw"]


@pytest.mark.usefixtures("app")
@pytest.mark.parametrize("raw", [raw, handed_out], ids=["driver's", "pooled"])
@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
def test_a13_a_raw_cursor_is_on_the_pinned_connection(many: bool, raw: Callable[[], Any]) -> None:
    setting = sa.text("select current_setting('app.tenant', true)")
    with db.pinned():
        cursor = raw().cursor()
        if many:
            cursor.executemany("select set_config('app.tenant', %s, false)", [("6",), ("7",)])
        else:
            cursor.execute("set app.tenant = '7'")
        assert db.session.scalar(setting) == "7"
    assert db.session.scalar(setting) in (None, "")


@pytest.mark.usefixtures("app")
@pytest.mark.parametrize("how", ["commit", "rollback"])
def test_a15_the_connection_of_a_cursor_ends_the_block(how: str, look: Look) -> None:
    with pytest.raises(TransactionAborted), db.session.begin():
        cursor = handed_out().cursor()
        cursor.execute("insert into item (name) values ('before')")
        getattr(cursor.connection, how)()
        db.session.execute(sa.insert(Item).values(name="after"))
    assert look("select name from item") == (["before"] if how == "commit" else [])


@pytest.mark.usefixtures("app")
@pytest.mark.parametrize("block", [db.pinned, db.session.begin], ids=["pinned", "in a block"])
def test_a25_a_sessions_cursor_does_what_the_drivers_does(block: Callable[[], Any], driver: str) -> None:
    with block(), handed_out().cursor() as cursor:
        cursor.execute("select generate_series(1, 6)")
        cursor.arraysize = 2
        assert [len(cursor.fetchmany()), len(cursor.fetchmany(1)), len(cursor.fetchall())] == [2, 1, 3]
        if driver == "psycopg":
            assert cursor.execute("select 1 + %s", (2,), prepare=True).fetchone() == (3,)
            assert cursor.execute("select 1 + %s", params=(3,), binary=True).fetchone() == (4,)
        else:
            cursor.execute("select 1 + %s", vars=(2,))
            assert cursor.fetchone() == (3,)
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


LEVEL = sa.text("select current_setting('transaction_isolation'), current_setting('transaction_read_only')")
WRITES: dict[str, Callable[[], Any]] = {
    "text": lambda: db.session.execute(sa.text("insert into item (name) values ('a')")),
    "insert": lambda: db.session.execute(sa.insert(Item).values(name="a")),
    "many": lambda: db.session.execute(sa.insert(Item), [{"name": "a"}, {"name": "b"}]),
}


def set_serializable(dbapi: Any, *_: Any) -> None:
    """As a listener of the pool, on the driver's connection."""
    if hasattr(dbapi, "set_session"):
        dbapi.set_session(isolation_level="SERIALIZABLE", readonly=True)
    else:
        dbapi.isolation_level, dbapi.read_only = psycopg.IsolationLevel.SERIALIZABLE, True


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("how", ["execution_options", "connect", "checkout"])
def test_a24_a_level_and_read_only_of_all_connections_hold_on_every_way(
    how: str, write: str, make_app: MakeApp, look: Look
) -> None:
    options = {"isolation_level": "SERIALIZABLE", "postgresql_readonly": True}
    app = make_app(SQLALCHEMY_ENGINE_OPTIONS={"execution_options": options} if how == "execution_options" else {})
    with app.app_context():
        if how != "execution_options":
            event.listen(db.engine, how, set_serializable)
            db.engine.dispose()
        for _ in range(2):
            with db.engine.connect() as connection:
                assert connection.execute(LEVEL).one() == ("serializable", "on")
            with pytest.raises(sa.exc.DBAPIError, match="read-only"):
                WRITES[write]()
            db.session.rollback()
            stream = db.session.execute(LEVEL, execution_options={"stream_results": True})
            assert stream.one() == ("serializable", "on")
            with db.session.begin():
                assert db.session.execute(LEVEL).one() == ("serializable", "on")
    assert look("select count(*) from item") == [0]


@pytest.mark.usefixtures("app")
@pytest.mark.parametrize("caught", [False, True], ids=["raised", "caught"])
def test_a10_a_session_goes_on_after_a_commit_in_a_block_that_failed(caught: bool, look: Look) -> None:
    look("create table pair (id int primary key, other int references pair deferrable initially deferred)")
    expected = TransactionAborted if caught else sa.exc.IntegrityError
    with pytest.raises(expected, match=r"commit\(\) in this block failed|violates"), db.session.begin():
        db.session.execute(sa.text("insert into pair values (1, 99)"))
        with contextlib.suppress(sa.exc.IntegrityError) if caught else contextlib.nullcontext():
            db.session.commit()
    with db.session.begin():
        db.session.add(Item(name="next"))
    assert look("select name from item") == ["next"]
    assert look("select count(*) from pair") == [0]

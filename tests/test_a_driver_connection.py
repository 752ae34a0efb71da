"""Contract A18, A24, C1: what is sent past the session's cursors, on the driver's connection, in a transaction."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import psycopg.rows
import psycopg2.extras
import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy import event

from fictive.errors import TransactionAborted
from fictive.testing.wire import Wire
from tests.conftest import MakeApp
from tests.models import Item, db
from tests.test_a_honest import LEFT, STATE, Look, handed_out

pytestmark = pytest.mark.usefixtures("app")
ONE = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.01}


@pytest.fixture
def app(make_app: MakeApp) -> Any:
    """With one connection, so that the next user gets what the last one left."""
    app = make_app(SQLALCHEMY_ENGINE_OPTIONS=ONE)
    with app.app_context():
        yield app


def state() -> Any:
    return db.session.execute(sa.text(STATE).execution_options(fictive_writes=False)).one()


def pid() -> Any:
    return db.session.scalar(sa.text("select pg_backend_pid()"))


def of_own_class() -> Any:
    """A cursor of another class than the session's."""
    if db.engine.driver == "psycopg":
        return handed_out().cursor(row_factory=psycopg.rows.dict_row)
    return handed_out().cursor(cursor_factory=psycopg2.extras.DictCursor)


HANDED_OUT: dict[str, Callable[[], Any]] = {
    "dbapi_connection": lambda: handed_out().dbapi_connection.cursor(),
    "driver_connection": lambda: handed_out().driver_connection.cursor(),
    "of a cursor": lambda: handed_out().cursor().connection.cursor(),
    "a cursor class": of_own_class,
}


@pytest.mark.parametrize("way", HANDED_OUT)
def test_a18_nothing_that_was_set_on_the_drivers_connection_reaches_the_next_user(way: str) -> None:
    before = state()
    for text in LEFT.values():
        with db.session.begin():
            HANDED_OUT[way]().execute(text)
        assert state() == before, text
    with contextlib.suppress(ZeroDivisionError), db.session.begin():
        HANDED_OUT[way]().execute("LISTEN ch; commit; SET work_mem = '7777kB'")
        raise ZeroDivisionError
    assert state() == before
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_a18_nor_what_was_set_on_the_connection_object(driver: str) -> None:
    def is_set() -> bool:
        with db.session.begin():
            found = handed_out().dbapi_connection
            return bool(found.cursor_factory is kind or getattr(found, "prepare_threshold", 5) == 77)

    kind: Any = psycopg.ClientCursor if driver == "psycopg" else psycopg2.extras.DictCursor
    with db.session.begin():
        raw = handed_out().dbapi_connection
        raw.cursor_factory = kind
        if driver == "psycopg":
            raw.prepare_threshold = 77
    assert not is_set()
    with pytest.raises(Exception, match="closed"):
        raw.cursor().execute("select 1")


def test_a18_the_drivers_connection_costs_one_connect_and_a_look_costs_none(wire: Wire) -> None:
    first = pid()
    with wire.record() as log, db.session.begin():
        db.session.connection().info["seen"] = True
        assert db.session.connection().connection.cursor().connection.info
        assert db.session.scalar(sa.text("select 1")) == 1
    assert (log.round_trips, log.connections_opened) == (2, 0)
    assert pid() == first
    with wire.record() as log:
        with db.session.begin():
            handed_out().dbapi_connection.cursor().execute("select 1")
        assert pid() != first
    assert log.connections_opened == 1


def test_a18_a_look_takes_no_second_connection(driver: str) -> None:
    """As instrumentation looks at `cursor.connection` before each statement; the pool has one connection."""

    def look_at(connection: Any, cursor: Any, *_: Any) -> None:
        assert cursor.connection.info

    event.listen(db.engine, "before_cursor_execute", look_at)
    try:
        first = pid()
        with db.session.begin():
            db.session.execute(sa.insert(Item).values(name="a"))
            assert pid() == first
        assert pid() == first
    finally:
        event.remove(db.engine, "before_cursor_execute", look_at)


def test_a18_a_connection_handed_out_in_autocommit_is_closed_as_well() -> None:
    """Listeners get SQLAlchemy's connection in autocommit too."""

    def set_it(connection: Any, cursor: Any, *_: Any) -> None:
        if not connection.in_transaction():
            connection.connection.dbapi_connection.cursor().execute("SET work_mem = '7777kB'")

    before = state()
    event.listen(db.engine, "before_cursor_execute", set_it)
    found = db.session.execute(sa.text("select 1"))
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert found.all() == [(1,)]
    event.remove(db.engine, "before_cursor_execute", set_it)
    assert state() == before


SET_CONFIG = "select set_config('work_mem', '7777kB', {})"


def copy_out(cursor: Any) -> None:
    with cursor.copy(f"copy ({SET_CONFIG.format('false')}) to stdout") as found:
        assert list(found)


METHODS: dict[str, Callable[[Any], Any]] = {
    "callproc": lambda cursor: cursor.callproc("set_config", ["work_mem", "7777kB", False]),
    "copy_expert": lambda cursor: cursor.copy_expert(f"copy ({SET_CONFIG.format('false')}) to stdout", io.BytesIO()),
    "copy": copy_out,
    "stream": lambda cursor: list(cursor.stream(SET_CONFIG.format("false"))),
}


@pytest.mark.parametrize("after", [False, True], ids=["first", "after a statement"])
def test_a18_what_other_methods_of_a_cursor_leave(driver: str, after: bool) -> None:
    before = state()
    for method, run in METHODS.items():
        if (driver == "psycopg") is (method in ("copy", "stream")):
            with db.session.begin():
                cursor = handed_out().cursor()
                if after:
                    cursor.execute("select 1")
                run(cursor)
            assert state() == before, method


def many(statement: str, values: Any) -> Callable[[], Any]:
    return lambda: handed_out().cursor().executemany(statement, [values])


FLAGS: dict[str, Callable[[], Any]] = {
    "func": lambda: db.session.execute(sa.select(sa.func.set_config("work_mem", "7777kB", False))),
    "bound": lambda: db.session.execute(sa.text(SET_CONFIG.format(":local")), {"local": False}),
    "a word": lambda: db.session.execute(sa.text(SET_CONFIG.format("cast(:local as bool)")), {"local": "off"}),
    "NULL": lambda: db.session.execute(sa.text(SET_CONFIG.format("cast(:local as bool)")), {"local": None}),
    "the second one": lambda: db.session.execute(
        sa.select(sa.func.set_config("a.b", "c", True), sa.func.set_config("work_mem", "7777kB", False))
    ),
    "a list": lambda: db.session.execute(sa.text(SET_CONFIG.format(":local")), [{"local": False}] * 2),
    "by position": lambda: handed_out().cursor().execute(SET_CONFIG.format("%s"), (False,)),
    "not last": lambda: handed_out().cursor().execute(SET_CONFIG.format("%s") + ", %s", (False, "x")),
    "executemany": many(SET_CONFIG.format("%s"), (False,)),
    "an expression": lambda: db.session.execute(sa.text(SET_CONFIG.format("not true"))),
    "a literal": lambda: db.session.execute(sa.text(SET_CONFIG.format("'f'"))),
    "in a DO": lambda: db.session.execute(sa.text(f"do $$ begin perform {SET_CONFIG[7:].format('1 = 2')}; end $$")),
    "the view": lambda: db.session.execute(sa.text("update pg_settings set setting = '7777' where name = 'work_mem'")),
}


@pytest.mark.parametrize("way", FLAGS)
def test_a18_set_config_that_is_not_local_does_not_reach_the_next_user(way: str) -> None:
    before = state()
    with db.session.begin():
        FLAGS[way]()
    assert state() == before


def test_a18_set_config_that_is_local_costs_no_connection() -> None:
    first = pid()
    for statement in (
        sa.select(sa.func.set_config("a.b", "c", True)),
        sa.text("select set_config('a.b', 'c', :local)").bindparams(local=True),
        sa.text("select set_config('a.b', 'false', true)"),
    ):
        with db.session.begin():
            db.session.execute(statement)
    assert pid() == first


@pytest.mark.parametrize("after", [False, True], ids=["first", "after a statement"])
def test_a15_an_error_on_the_drivers_connection_that_is_caught_is_no_commit(after: bool, look: Look) -> None:
    ran: list[str] = []
    with pytest.raises(TransactionAborted, match="aborted"), db.session.begin():
        db.on_commit(lambda: ran.append("commit"))
        if after:
            db.session.execute(sa.insert(Item).values(name="before"))
        cursor = handed_out().dbapi_connection.cursor()
        cursor.execute("insert into item (name) values ('by hand')")
        with contextlib.suppress(psycopg.Error, psycopg2.Error):
            cursor.execute("select 1 / 0")
    assert ran == look("select name from item") == []


def copy(_: Any) -> None:
    cursor = handed_out().cursor()
    if db.engine.driver == "psycopg":
        with cursor.copy("copy item (name) from stdin") as writer:
            writer.write("a\n")
    else:
        cursor.copy_expert("copy item (name) from stdin", io.StringIO("a\n"))


FIRST: dict[str, Callable[[Any], Any]] = {
    "executemany": lambda connection: connection.execute(
        sa.text("insert into item (name) values (:name)"), [{"name": "a"}, {"name": "b"}]
    ),
    "COPY": copy,
    "raw": lambda _: handed_out().dbapi_connection.cursor().execute("insert into item (name) values ('a')"),
    "a cursor class": lambda _: of_own_class().execute("insert into item (name) values ('a')"),
    "the level": lambda connection: connection.get_isolation_level(),
}


@pytest.mark.parametrize("first", FIRST)
def test_c1_a_block_begins_on_a_living_connection_whatever_comes_first(
    first: str, app: Flask, wire: Wire, look: Look
) -> None:
    pid()
    wire.close_connections()
    with db.session.begin():
        FIRST[first](db.session.connection())
    assert db.session.scalar(sa.text("select 1")) == 1


def half_a_copy() -> Any:
    copy = handed_out().cursor().copy("copy item (name) from stdin")
    copy.__enter__().write("a")
    return copy


def half_a_stream() -> Any:
    rows = handed_out().cursor().stream("select generate_series(1, 1000)")
    next(rows)
    return rows


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
@pytest.mark.parametrize("raises", [False, True], ids=["ok", "error"])
@pytest.mark.parametrize("half", [half_a_copy, half_a_stream])
@pytest.mark.parametrize("within", ["session's", "driver's", "savepoint"])
def test_a18_a_copy_that_is_left_half_way_hangs_nothing(
    driver: str, half: Callable[[], Any], raises: bool, within: str, look: Look
) -> None:
    """psycopg would wait for its own lock."""
    left = None
    with pytest.raises(ZeroDivisionError if raises else TransactionAborted), db.session.begin():
        db.session.execute(sa.insert(Item).values(name="before"))
        if within == "driver's":
            assert handed_out().dbapi_connection
        with db.session.begin_nested() if within == "savepoint" else contextlib.nullcontext():
            left = half()
            if raises:
                raise ZeroDivisionError
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    with db.session.begin():
        db.session.execute(sa.insert(Item).values(name="next"))
    assert look("select name from item") == ["next"]
    with contextlib.suppress(psycopg.Error):
        left.__exit__(None, None, None) if half is half_a_copy else left.close()

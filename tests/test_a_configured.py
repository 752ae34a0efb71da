"""What is configured on an engine, or attached to it, works as with SQLAlchemy's own session: A4, A25, M3."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from fictive.sqlalchemy import BorrowingPool, OptInSession

MakeSession = Callable[[sa.Engine], sa_orm.Session]


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(database_url, poolclass=BorrowingPool)
    yield engine
    engine.dispose()


def roll_back_in(engine: sa.Engine) -> list[Any]:
    """What is there after rollbacks in a session and of Core's."""
    insert, count = sa.text("INSERT INTO kept VALUES (1)"), sa.text("SELECT count(*) FROM kept")
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE kept (n int)"))
    found = []
    with OptInSession(engine) as session:
        for statement in ("SELECT 1", "SELECT nonsense"):
            with contextlib.suppress(sa.exc.DBAPIError, KeyError), session.begin():
                session.execute(insert)
                session.execute(sa.text(statement))
                raise KeyError
            found.append(session.scalar(count))
    with engine.connect() as connection:
        transaction = connection.begin()
        connection.execute(insert)
        transaction.rollback()
        found.append(connection.scalar(count))
        connection.commit()
    return found


def test_a4_a_rollback_is_sent_though_the_driver_is_in_autocommit(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`skip_autocommit_rollback` asks the driver, which is in autocommit, to itself, in a transaction of fictive's."""
    engine = sa.create_engine(database_url, poolclass=BorrowingPool, skip_autocommit_rollback=True)
    connected: list[None] = []
    sa.event.listen(engine, "connect", lambda *_: connected.append(None))
    assert roll_back_in(engine) == [0, 0, 0]
    assert len(connected) == 1  # and no connection was closed for it
    assert not caplog.records
    engine.dispose()


def test_a21_a_rollback_is_sent_though_sqlite3_is_in_autocommit(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'file'}", skip_autocommit_rollback=True)
    assert roll_back_in(engine) == [0, 0, 0]
    engine.dispose()


@pytest.mark.parametrize("mode", ["commit", "begin"])
def test_m3_a_listener_gets_a_transaction_with_a_stream_in_autocommit(engine: sa.Engine, mode: str) -> None:
    told: list[Any] = []

    def begin(session: Any, transaction: sa_orm.SessionTransaction, connection: sa.Connection) -> None:
        told.append((transaction.nested, transaction.parent, transaction.session is session))
        connection.execute(sa.text("SELECT set_config('app.tenant', '7', true)"))

    with OptInSession(engine, writes_outside=mode) as session:
        sa.event.listen(session, "after_begin", begin)
        query = sa.text("SELECT current_setting('app.tenant') FROM generate_series(1, 3)")
        found = list(session.scalars(query, execution_options={"yield_per": 2}))
        assert (found, told) == (["7"] * 3, [(False, None, True)])
        assert not session.in_transaction()
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("event", ["before_cursor_execute", "do_execute", "handle_error"])
def test_a25_savepoints_are_told_of_as_by_plain(engine: sa.Engine, event: str) -> None:
    def told_by(make_session: MakeSession) -> list[str]:
        told: list[str] = []

        def listen(*args: Any) -> None:
            told.extend(each for each in args if isinstance(each, str))

        with make_session(engine) as session, contextlib.suppress(sa.exc.DBAPIError), session.begin():
            session.execute(sa.text("SELECT 1"))
            sa.event.listen(engine, event, listen)
            with session.begin_nested():
                session.execute(sa.text("SELECT 2"))
            with session.begin_nested():
                session.execute(sa.text("SELECT nonsense"))
        sa.event.remove(engine, event, listen)
        return told

    assert told_by(OptInSession) == told_by(sa_orm.Session)


def test_a29_a_savepoint_whose_listener_raised_is_gone_on_with_as_in_plain(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE kept (n int)"))

    def kept_by(make_session: MakeSession) -> list[Any]:
        def refuse(session: Any, transaction: sa_orm.SessionTransaction) -> None:
            if transaction.nested:
                raise KeyError

        with make_session(engine) as session:
            with session.begin():
                session.execute(sa.text("INSERT INTO kept VALUES (1)"))
                sa.event.listen(session, "after_transaction_create", refuse)
                with contextlib.suppress(KeyError):
                    session.begin_nested()
                session.flush()
                session.execute(sa.text("INSERT INTO kept VALUES (2)"))
            with session.begin():
                return list(session.scalars(sa.text("DELETE FROM kept RETURNING n")))

    assert kept_by(OptInSession) == kept_by(sa_orm.Session) == [1, 2]


PID = sa.text("SELECT pg_backend_pid()")


def pids(sessions: list[sa_orm.Session]) -> set[Any]:
    """The backends of two transactions at a time."""
    with contextlib.ExitStack() as stack:
        for session in sessions:
            stack.enter_context(session.begin())
        return {session.scalar(PID) for session in sessions}


@pytest.mark.parametrize("found", ["in a block", "in autocommit", "by Core", "at checkout", "while one is in use"])
def test_a25_a_pool_that_is_invalidated_makes_new_connections(engine: sa.Engine, found: str) -> None:
    """A listener says what a lost connection is, such as the errors of a server that has become a standby."""

    def is_lost(*args: Any) -> None:
        if found == "at checkout":
            sa.event.remove(engine, "checkout", is_lost)
            raise sa.exc.InvalidatePoolError("lost")
        args[0].is_disconnect = True

    sessions: list[sa_orm.Session] = [OptInSession(engine), OptInSession(engine)]
    one, two = sessions
    before = pids(sessions)
    fails = sa.text("SELECT 1 / 0")
    sa.event.listen(engine, "checkout" if found == "at checkout" else "handle_error", is_lost)
    with two.begin() if found == "while one is in use" else contextlib.nullcontext():
        if found == "while one is in use":
            assert two.scalar(PID) in before
        if found != "at checkout":
            with pytest.raises(sa.exc.DBAPIError) as caught:
                if found == "by Core":
                    with engine.begin() as connection:
                        connection.execute(fails)
                else:
                    with contextlib.nullcontext() if found == "in autocommit" else one.begin():
                        one.execute(fails)
            assert caught.value.connection_invalidated
            sa.event.remove(engine, "handle_error", is_lost)
    assert not before & pids(sessions)
    for session in sessions:
        session.close()


def test_a25_a_soft_invalidation_lets_the_transaction_end(engine: sa.Engine) -> None:
    with OptInSession(engine) as session:
        with session.begin():
            pid = session.scalar(PID)
            session.connection().connection.invalidate(soft=True)
            assert session.scalar(PID) == pid
        assert session.scalar(PID) != pid


@pytest.mark.parametrize("event", ["checkout", "checkin"])
@pytest.mark.parametrize("leaves", ["transactional", "in a transaction"])
def test_a1_a_listener_leaves_the_connection_in_whatever_mode(
    engine: sa.Engine, event: str, leaves: str, look: Callable[..., list[Any]], backends: Callable[[], list[str]]
) -> None:
    """A `SET` in autocommit with the mode put back to that of plain's connections, as recipes have it."""

    def prepare(dbapi: Any, *_: Any) -> None:
        dbapi.autocommit = leaves == "transactional"
        dbapi.cursor().execute("SET application_name = 'prepared'")
        if leaves == "transactional":
            dbapi.autocommit = False

    look("CREATE TABLE kept (n int)")
    with OptInSession(engine) as session:
        session.execute(PID)
        sa.event.listen(engine, event, prepare)
        for n in (1, 2):
            session.execute(sa.text("INSERT INTO kept VALUES (:n)"), {"n": n})
            assert look("SELECT count(*) FROM kept") == [n]
            assert set(backends()) == {"idle"}
            with session.begin():
                session.execute(sa.text("INSERT INTO kept VALUES (0)"))
                session.rollback()


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_a24_psycopgs_client_cursor_carries_commands(database_url: str) -> None:
    """It has the values in the text, and may have several statements there."""
    import psycopg

    arguments = {"cursor_factory": psycopg.ClientCursor}
    engine = sa.create_engine(database_url, poolclass=BorrowingPool, connect_args=arguments)
    with OptInSession(engine) as session:
        query = sa.text("SELECT CAST(:a AS int) + CAST(:b AS int), CAST(:c AS text)")
        values = {"a": 1, "b": 2, "c": "it's;"}
        for statement in (query, sa.text(f"SELECT 1; {query.text}")):
            with session.begin():
                result = session.execute(statement, values)
                if statement is query:
                    assert tuple(result.one()) == (3, "it's;")
                with session.begin_nested():
                    assert tuple(session.execute(query, values).one()) == (3, "it's;")
    engine.dispose()


@pytest.mark.parametrize("ends", ["commit", "rollback", "error"])
@pytest.mark.parametrize("given", ["connection()", "execution_options()", "a listener"])
def test_a25_what_a_connection_is_given_ends_with_its_transaction(
    engine: sa.Engine, given: str, ends: str, look: Callable[..., list[Any]]
) -> None:
    """The connection object of a session lasts longer than the transaction, which nobody is to notice."""
    kept = sa.Table("kept", sa.MetaData(), sa.Column("n", sa.Integer))
    look("CREATE TABLE kept (n int)")
    look("CREATE SCHEMA tenant CREATE TABLE kept (n int)")
    there: dict[str, Any] = {"schema_translate_map": {None: "tenant"}}
    told: list[str] = []
    with OptInSession(engine) as session:
        with contextlib.suppress(sa.exc.DBAPIError), session.begin():
            if given == "connection()":
                session.connection(execution_options=there)
            elif given == "execution_options()":
                session.connection().execution_options(**there)
            else:
                sa.event.listen(session.connection(), "before_cursor_execute", lambda *args: told.append(args[2]))
            session.execute(sa.insert(kept).values(n=1))
            if ends == "error":
                session.execute(sa.text("SELECT nonsense"))
            elif ends == "rollback":
                session.rollback()
        told.clear()
        session.execute(sa.insert(kept).values(n=2))
        with session.begin():
            session.execute(sa.insert(kept).values(n=3))
            assert not session.connection().get_execution_options()
    assert look("SELECT n FROM kept WHERE n > 1 ORDER BY n") == [2, 3]
    assert not told
    look("DROP SCHEMA tenant CASCADE")

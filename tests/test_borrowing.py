"""Connections that sessions leave idle for the next statement outside (`fictive.connection.pool`)."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from fictive.connection import servers
from fictive.drivers import driver_for
from fictive.sqlalchemy import BorrowingPool, OptInSession

PID = sa.select(sa.func.pg_backend_pid())
MakeEngine = Callable[..., sa.Engine]


@pytest.fixture
def make_engine(database_url: str) -> Iterator[MakeEngine]:
    with ExitStack() as stack:

        def make(**options: Any) -> sa.Engine:
            engine = sa.create_engine(database_url, poolclass=BorrowingPool, **options)
            stack.callback(engine.dispose)
            return engine

        yield make


def outside(engine: sa.Engine) -> Any:
    """The backend of a statement outside, in a session of its own."""
    with OptInSession(engine) as session:
        return session.scalar(PID)


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.001)


def named(engine: sa.Engine) -> Any:
    with OptInSession(engine) as session:
        return session.scalar(sa.text("SELECT current_setting('application_name')"))


def test_a2_the_next_session_takes_what_the_last_one_left(make_engine: MakeEngine) -> None:
    engine = make_engine(pool_size=2, max_overflow=0, pool_timeout=2)
    pool = engine.pool
    assert isinstance(pool, BorrowingPool)
    pid = outside(engine)
    assert (pool.checkedin(), pool.checkedout(), len(pool.idle)) == (1, 0, 1)
    assert outside(engine) == pid
    with engine.begin() as connection:  # Core and transactions have it as well, and as it rests: transactional
        assert connection.scalar(PID) == pid
        assert not connection.connection.dbapi_connection.autocommit  # type: ignore[union-attr]
        assert (pool.checkedin(), pool.checkedout()) == (0, 1)
        assert outside(engine) != pid
    engine.dispose()
    assert (pool.checkedin(), pool.checkedout()) == (0, 0)
    assert outside(engine) != pid


def test_a2_connections_beyond_the_size_of_the_pool_are_closed(make_engine: MakeEngine) -> None:
    engine = make_engine(pool_size=1, max_overflow=2)
    outside(engine)
    with engine.connect() as one, engine.connect() as two:
        assert len({one.scalar(PID), two.scalar(PID), outside(engine)}) == 3
    assert isinstance(engine.pool, BorrowingPool)
    assert (engine.pool.overflow(), engine.pool.checkedin(), engine.pool.checkedout()) == (0, 1, 0)


def test_l1_those_who_wait_for_a_full_pool_take_what_is_given_back(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them checks a connection in and out, which takes longer than a statement."""
    engine, held = make_engine(pool_size=1, max_overflow=0), threading.Event()
    pool = engine.pool
    assert isinstance(pool, BorrowingPool)
    outside(engine)
    checked_out: list[None] = []
    connect = pool.connect
    monkeypatch.setattr(pool, "connect", lambda: (checked_out.append(None), connect())[1])

    def hold() -> None:
        with OptInSession(engine) as session, session.begin():
            session.scalar(PID)
            held.set()
            until(lambda: len(pool.wanted) == 4)
            assert not done.wait(0.02)  # longer than before another connection would be opened

    done = threading.Event()
    with ThreadPoolExecutor(5) as executor:
        holding = executor.submit(hold)
        held.wait()
        found = [executor.submit(outside, engine) for _ in range(4)]
        holding.result()
        assert len({each.result() for each in found}) == 1
    assert (len(pool.idle), pool.checkedin(), pool.wanted, checked_out) == (1, 1, set(), [])


@pytest.mark.parametrize("in_a_block", [False, True], ids=["autocommit", "block"])
@pytest.mark.parametrize(
    "attached", ["before the first session", "after it", "to all pools", "to all pools, after it"]
)
def test_a25_a_listener_is_told_of_each_that_takes_a_connection(
    make_engine: MakeEngine, attached: str, in_a_block: bool
) -> None:
    """It may set there on whose behalf the connection acts: for who opens one, waits for one or finds one idle."""
    engine, held = make_engine(pool_size=1, max_overflow=0), threading.Event()
    pool = engine.pool
    assert isinstance(pool, BorrowingPool)
    told: list[str] = []

    def take(event: str) -> Callable[..., None]:
        return lambda *_: told.append(f"{threading.current_thread().name} {event}")

    def hold() -> None:
        with OptInSession(engine) as session, session.begin():
            session.scalar(PID)
            held.set()
            until(lambda: len(pool.wanted) == 1)

    def wait() -> None:
        with OptInSession(engine) as session, session.begin() if in_a_block else nullcontext():
            session.scalar(PID)

    if attached.endswith("after it"):
        outside(engine)
    with ExitStack() as stack:
        for event in ("checkout", "checkin"):
            target: Any = (sa.Pool if attached.startswith("to all") else engine), event, take(event)
            sa.event.listen(*target)
            stack.callback(sa.event.remove, *target)
        threads = {name: threading.Thread(target=work, name=name) for name, work in
                   (("holds", hold), ("waits", wait), ("finds", wait))}  # fmt: skip
        threads["holds"].start()
        held.wait()
        threads["waits"].start()
        threads["holds"].join()
        threads["waits"].join()
        threads["finds"].start()
        threads["finds"].join()
    assert sorted(told) == sorted(f"{name} {event}" for name in threads for event in ("checkout", "checkin"))


@pytest.mark.parametrize(("options", "told_of"), [({}, 3), ({"named": True}, 3), ({"once": True}, 1), ("partial", 3)])
def test_a25_a_listener_is_told_whatever_it_is_wrapped_in(make_engine: MakeEngine, options: Any, told_of: int) -> None:
    """SQLAlchemy puts one with options into a function of its own, whose module is not the application's."""
    engine, told = make_engine(), []
    outside(engine)
    listener: Any = lambda *_, **__: told.append(1)  # noqa: E731
    if options == "partial":
        listener, options = functools.partial(listener, "first"), {}
    for event in ("checkout", "checkin"):
        sa.event.listen(engine, event, listener, **options)
    for _ in range(3):
        outside(engine)
    assert len(told) == 2 * told_of


@pytest.mark.parametrize("then", ["core", "raw", "dispose", "dead", "dead in a block"])
def test_a25_a_listener_is_told_of_no_check_in_twice(make_engine: MakeEngine, database_url: str, then: str) -> None:
    """A connection that lies idle has been checked in, for whoever counts those that are out."""

    def told(engine: sa.Engine, make_session: Any) -> list[str]:
        told: list[str] = []
        for event in ("connect", "checkout", "checkin", "close"):
            sa.event.listen(engine, event, lambda *_, event=event: told.append(event))
        with make_session(engine) as session:
            pid = session.scalar(PID)
        if then == "dispose":
            engine.dispose()
        elif then.startswith("dead"):
            with sa.create_engine(database_url, poolclass=sa.NullPool).connect() as other:
                other.execute(sa.select(sa.func.pg_terminate_backend(pid, 5000)))
        if then == "core":
            with engine.connect() as connection:
                connection.execute(PID)
        elif then == "raw":
            engine.raw_connection().close()
        with make_session(engine) as session, session.begin() if then == "dead in a block" else nullcontext():
            session.execute(PID)
        engine.dispose()
        return told

    found = told(make_engine(), OptInSession)
    # plain has to ask a connection whether it is dead, and tells of its checkout before it closes it
    plain = told(sa.create_engine(database_url, pool_pre_ping=True), sa_orm.Session)
    assert found == plain
    assert found.count("checkout") == found.count("checkin")


def test_c4_waiting_for_a_full_pool_ends_as_sqlalchemys(make_engine: MakeEngine) -> None:
    engine = make_engine(pool_size=1, max_overflow=0, pool_timeout=0.06)
    pool = engine.pool
    assert isinstance(pool, BorrowingPool)
    with OptInSession(engine) as session, session.begin():
        session.scalar(PID)
        errors = []
        for wait in (lambda: outside(engine), lambda: engine.connect()):
            with pytest.raises(sa.exc.TimeoutError) as caught:
                wait()
            errors.append((str(caught.value), caught.value.code))
    assert errors[0] == errors[1]
    assert pool.wanted == set()
    outside(engine)


def test_a_connection_that_is_closed_makes_room_for_one_that_waits(make_engine: MakeEngine) -> None:
    engine, held = make_engine(pool_size=1, max_overflow=0), threading.Event()
    pool = engine.pool
    assert isinstance(pool, BorrowingPool)

    def lose() -> None:
        with OptInSession(engine) as session, session.begin():
            session.execute(sa.text("SET application_name = 'theirs'"))  # so that it is closed
            held.set()
            until(lambda: len(pool.wanted) == 1)

    with ThreadPoolExecutor(2) as executor:
        losing = executor.submit(lose)
        held.wait()
        name = executor.submit(named, engine)
        losing.result()
        assert name.result() != "theirs"


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
@pytest.mark.parametrize(
    ("event", "target"),
    [("checkout", "engine"), ("checkin", "pool"), ("reset", "engine"), ("engine_connect", "engine")],
)
def test_a_listener_is_told_of_every_session(event: str, target: str, make_engine: MakeEngine) -> None:
    """It may set who the user is; nobody may have a connection past it."""
    engine = make_engine()
    outside(engine)
    told: list[str] = []
    listening = (engine.pool if target == "pool" else engine), event, lambda *_: told.append(event)
    sa.event.listen(*listening)
    try:
        for count in (1, 2, 3):
            outside(engine)
            assert len(told) >= count
    finally:
        sa.event.remove(*listening)


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_the_pool_looks_over_what_was_idle_for_long(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(pool_recycle=0)
    monkeypatch.setattr(servers, "IDLE_FOR", 1000.0)
    pid = outside(engine)
    assert outside(engine) == pid
    monkeypatch.setattr(servers, "IDLE_FOR", 0.0)
    assert outside(engine) != pid  # recycled


@pytest.mark.parametrize("taken_by", ["core", "a session", "a block"])
def test_a18_an_interrupted_check_in_leaves_the_pool_its_place(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, taken_by: str
) -> None:
    engine = make_engine(pool_size=1, max_overflow=0, pool_timeout=0.1)
    outside(engine)
    pool = engine.pool
    assert isinstance(pool, BorrowingPool)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(driver_for(engine.dialect)), "restore", interrupted)
        with pytest.raises(KeyboardInterrupt):
            if taken_by == "core":
                engine.connect().close()
            else:
                with OptInSession(engine) as session, session.begin() if taken_by == "a block" else nullcontext():
                    session.execute(PID)
                pool.check_in_all()
    assert pool.checkedout() == 0
    with engine.connect() as connection:
        connection.execute(PID)


def test_who_was_interrupted_while_waiting_is_not_woken_for_ever(make_engine: MakeEngine) -> None:
    engine = make_engine()
    pool = engine.pool
    assert isinstance(pool, BorrowingPool)
    pool.wanted.add("interrupted")
    for _ in range(5):
        outside(engine)
    assert pool._came_back.qsize() <= 1

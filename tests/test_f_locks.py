"""Contract F: locks on tables, on keys and on rows, and that nothing of them is left; K's row on lock_tables."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask
from sqlalchemy import event
from sqlalchemy.dialects import postgresql

from fictive.errors import (
    ConfigurationError,
    LockLost,
    LockTimeout,
    NotEnteredWarning,
    TransactionRequired,
    UnsupportedDialect,
)
from fictive.locks.advisory import LockKey
from fictive.sqlalchemy import LockMode, OptInSession, advisory_lock, claim, cleanup_tables, lock_key, lock_tables
from fictive.testing.wire import Wire
from tests.conftest import MakeApp
from tests.models import Child, Dog, Item, Tag, db
from tests.wirelog import messages, own_verbs

Look = Callable[..., list[Any]]

HERE = "database = (select oid from pg_database where datname = current_database())"
TABLE_LOCKS = (
    f"select relation::regclass::text || ' ' || mode from pg_locks where locktype = 'relation' and granted and {HERE}"
    " and relation::regclass::text in ('item', 'child', 'tag', 'animal', 'dog')"
    " and mode not in ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock') order by 1"
)
ADVISORY_LOCKS = f"select count(*) from pg_locks where locktype = 'advisory' and {HERE}"
WAITING = f"select count(*) from pg_locks where not granted and {HERE}"


@pytest.fixture(autouse=True)
def no_lock_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test, with its app still there: no advisory lock, and no lock on a table."""
    look = request.getfixturevalue("look") if "app" in request.fixturenames else None
    yield
    if look is not None:
        wait_until(lambda: look(ADVISORY_LOCKS) == [0] and not look(TABLE_LOCKS))


@pytest.fixture
def other(app: Flask) -> Iterator[OptInSession]:
    """A second session on the same database."""
    with OptInSession(db.engine) as session:
        yield session


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that another process or thread is about to do; the limit is for a test that fails."""
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit, "it never happened"
        time.sleep(0.005)


def kill_others(look: Look) -> None:
    look(
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
        " where datname = current_database() and pid <> pg_backend_pid()"
    )


def setting(session: Any, name: str = "lock_timeout") -> str:
    return str(session.scalar(sa.text(f"show {name}")))


# -- F1: tables -------------------------------------------------------------------------------------------------------


def test_k_lock_tables_and_an_update_are_3_round_trips(app: Flask, wire: Wire, look: Look) -> None:
    look("insert into item (name) values ('a')")
    for _ in range(8):  # psycopg would prepare a statement on its sixth run
        with wire.record() as log, db.lock_tables([Item, Tag]) as session:
            session.execute(sa.update(Item).values(note="b"))
    assert messages(log) == ["BEGIN+DO", "UPDATE", "COMMIT"]
    assert log.round_trips == 3
    assert "LOCK TABLE item, tag IN SHARE UPDATE EXCLUSIVE MODE" in log.statements[-3] + log.statements[0]
    assert look("select note from item") == ["b"]
    assert not db.session.in_transaction()


def test_f1_it_begins_outside_and_joins_inside(app: Flask, wire: Wire, look: Look) -> None:
    with lock_tables(db.session, [Tag, Item.__table__, Item], mode=LockMode.EXCLUSIVE) as session:
        assert session is db.session()
        assert session.in_transaction()
        assert look(TABLE_LOCKS) == ["item ExclusiveLock", "tag ExclusiveLock"]
    assert not look(TABLE_LOCKS)
    with wire.record() as log, db.session.begin():
        with db.lock_tables([Dog], mode="SHARE"):  # joined inheritance: both tables of the model
            pass
        assert look(TABLE_LOCKS) == ["animal ShareLock", "dog ShareLock"]  # until the transaction ends
    assert messages(log) == ["BEGIN+SAVEPOINT+DO", "RELEASE+COMMIT"]
    db.session.writes_outside = "begin"
    with db.lock_tables([Item]):
        assert look(TABLE_LOCKS) == ["item ShareUpdateExclusiveLock"]
    assert not db.session.in_transaction()


def test_f1_all_modes_and_their_conflicts(app: Flask, look: Look, other: OptInSession) -> None:
    """Each of PostgreSQL's eight, and that we know which exclude each other."""
    assert len(LockMode) == 8
    for mode in LockMode:
        for wanted in LockMode:
            with db.lock_tables([Item], mode=mode):
                held = look(
                    f"select mode from pg_locks where relation = 'item'::regclass and mode = '{mode.name_in_pg_locks}'"
                )
                assert held == [mode.name_in_pg_locks]
                excluded = False
                try:
                    with lock_tables(other, [Item], mode=wanted, nowait=True):
                        pass
                except LockTimeout:
                    excluded = True
                assert excluded is (wanted in mode.conflicts()), (mode, wanted)


def test_f1_lock_timeout_names_who_is_in_the_way(app: Flask, look: Look, other: OptInSession) -> None:
    with other.begin():
        pid = other.scalar(sa.text("select pg_backend_pid() /* the one */"))
        other.execute(sa.text("lock table item in access exclusive mode -- by hand"))
        for options, patience in (({"timeout": 0.05}, "within 50 ms"), ({"nowait": True}, "at once")):
            with pytest.raises(LockTimeout) as caught, db.lock_tables([Item, Tag], **options):
                pytest.fail("not reached")
            assert f"lock on item, tag {patience}" in str(caught.value)
            assert f"pid {pid} (" in str(caught.value)
            assert "AccessExclusiveLock on item; its query: lock table item" in str(caught.value)
            assert isinstance(caught.value, TimeoutError)
            assert isinstance(caught.value, sa.exc.OperationalError)
            assert isinstance(caught.value.__cause__, sa.exc.OperationalError)
        assert not db.session.in_transaction()
    assert "50 ms" in str(pickle.loads(pickle.dumps(LockTimeout("within 50 ms"))))


@pytest.fixture(params=["commit", "begin", "plain"])
def any_session(request: pytest.FixtureRequest, app: Flask) -> Iterator[Any]:
    """A session in a transaction, by a block or, of the last two, by what ran first; and one that is in none."""
    if request.param == "plain":
        with sa_orm.Session(db.engine) as session:
            yield session
    else:
        with OptInSession(db.engine, writes_outside=request.param) as session:
            yield session


def test_f1_inside_an_error_leaves_what_was_done_before(any_session: Any, other: OptInSession, look: Look) -> None:
    """The block is a savepoint: a caught error, or a lock that is not had, undoes the block alone."""
    session = any_session
    for block in (session.begin, session.begin_nested):
        with block():
            session.add(Tag(label=f"{block.__name__} before"))
            with contextlib.suppress(ZeroDivisionError), lock_tables(session, [Item]):
                session.add(Tag(label="within"))
                session.flush()
                raise ZeroDivisionError
            assert look(TABLE_LOCKS) == ["item ShareUpdateExclusiveLock"]  # the call took it, before the savepoint
            with other.begin():
                other.execute(sa.text("lock table child"))
                for options in ({"timeout": "20ms"}, {"nowait": True}):
                    with pytest.raises(LockTimeout), lock_tables(session, [Child], **options):
                        pytest.fail("not reached")
                assert setting(session) == "0"
            session.add(Tag(label=f"{block.__name__} after"))
        session.commit()
        labels = [f"{block.__name__} {when}" for when in ("before", "after")]
        assert look("select label from tag order by id") == labels
        look("delete from tag")


def test_f_a_lock_is_had_before_anything_is_flushed(any_session: Any, wire: Wire, look: Look) -> None:
    session = any_session
    for begin in (lambda: None, session.begin):
        for lock in (
            lambda: lock_tables(session, [Item]),
            lambda: advisory_lock(session, "key"),
            lambda: advisory_lock(session, "key", timeout="5s"),
            lambda: advisory_lock(session, "key", nowait=True),
        ):
            begin()
            session.add(tag := Tag(label="pending"))
            with wire.record() as log, lock():
                pass
            sent = " ".join(log.statements)
            assert "INSERT" not in sent.partition("LOCK TABLE item" if "LOCK TABLE" in sent else "advisory")[0]
            if "LOCK TABLE" not in sent:
                assert tag in session.new
            session.rollback()
            session.expunge_all()
            look("delete from tag")


def test_a28_inside_the_call_takes_the_lock(any_session: Any, look: Look, wire: Wire) -> None:
    session = any_session
    for _ in range(2):  # psycopg2: a text travels with RELEASE from its second time on
        session.commit()
        session.begin()
        with wire.record() as log:
            lock_tables(session, [Item])
            advisory_lock(session, "key")
            advisory_lock(session, 7, timeout="5s")
    with session.get_transaction():
        assert look(TABLE_LOCKS) == ["item ShareUpdateExclusiveLock"]
        assert look(ADVISORY_LOCKS) == [2]
        if isinstance(session, OptInSession):
            assert log.round_trips == 3
        with wire.record() as log, advisory_lock(session, "another") as given:
            assert given is session
        assert log.round_trips == 1
    assert not look(TABLE_LOCKS)
    assert look(ADVISORY_LOCKS) == [0]


def test_a28_a_lock_that_was_undone_is_taken_again(any_session: Any, look: Look) -> None:
    session = any_session
    for lock in (lambda: lock_tables(session, [Item]), lambda: advisory_lock(session, "key")):
        locked = lambda: look(TABLE_LOCKS) != [] or look(ADVISORY_LOCKS) == [1]  # noqa: E731
        with session.begin():
            savepoint = session.begin_nested()
            manager = lock()
            assert locked()
            savepoint.rollback()
            assert not locked()
            with manager:
                assert locked()
            assert locked()
        with manager:
            assert locked()
        assert not locked()


def test_a28_without_with_and_without_a_transaction_it_is_told(
    app: Flask, look: Look, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("lock_tables", lambda: db.lock_tables([Item])),
        ("advisory_lock", lambda: db.advisory_lock("key")),
        ("lock_tables", lambda: lock_tables(db.session, [Item])),
    ]
    for name, call in calls:
        caplog.clear()
        with pytest.warns(NotEnteredWarning, match=rf"{name}\(\.\.\.\) was called without `with`") as warned:
            call()
        gc.collect()
        assert warned[0].filename == __file__
        (record,) = caplog.records
        assert record.name == "fictive.unentered"
        assert __file__ in record.getMessage()
        assert not look(TABLE_LOCKS)
    with db.lock_tables([Item]), db.advisory_lock("key"):
        pass
    for wrong in (lambda: db.lock_tables([]), lambda: db.lock_tables([Item], mode="X"), lambda: db.advisory_lock("")):
        with pytest.raises(ConfigurationError):
            wrong()
    gc.collect()  # warns of nothing


def test_f_a_routing_session_locks_where_it_writes(
    app: Flask, make_app: MakeApp, database_url: str, wire: Wire, look: Look
) -> None:
    """SQLAlchemy's recipe ("Custom Vertical Partitioning"): reads go to a replica, where a lock keeps nobody out."""
    main = db.engine
    replica = sa.create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none")

    class Plain(sa_orm.Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **kwargs: Any) -> Any:
            return main if self._flushing or isinstance(clause, (sa.Update, sa.Delete)) else replica

    class OptIn(OptInSession):
        get_bind = Plain.get_bind

    for make in (Plain, OptIn):
        with make() as session:
            with lock_tables(session, [Item]), advisory_lock(session, 1), advisory_lock(session, 2, timeout=1):
                assert look(TABLE_LOCKS) == ["item ShareUpdateExclusiveLock"]
                assert look(ADVISORY_LOCKS) == [2]
            with advisory_lock(session, 1):
                assert look(ADVISORY_LOCKS) == [1]
            look("insert into tag (label) values ('a')")
            cleanup_tables(session, db.Model)
            assert look("select * from tag") == []


def test_f1_a_waiter_gets_the_lock_and_two_in_opposite_order_do_not_deadlock(
    app: Flask, look: Look, other: OptInSession
) -> None:
    got: list[str] = []

    def wait() -> None:
        with lock_tables(other, [Tag, Item], mode=LockMode.EXCLUSIVE, timeout=datetime.timedelta(seconds=20)):
            got.append(setting(other))

    with db.lock_tables([Item], mode=LockMode.EXCLUSIVE) as session:
        thread = threading.Thread(target=wait)
        thread.start()
        wait_until(lambda: look(WAITING) == [1])
        assert "tag ExclusiveLock" not in look(TABLE_LOCKS)  # item comes first for all
        session.execute(sa.text("lock table tag in exclusive mode"))
    thread.join(20)
    assert got == ["0"]


# -- F3: nothing leaks ------------------------------------------------------------------------------------------------


def test_f3_the_timeout_is_what_it_was(app: Flask, look: Look, other: OptInSession) -> None:
    def check(expected: str, *, begin: bool = True) -> None:
        with db.lock_tables([Item], timeout="7s"), db.session.begin_nested():
            assert setting(db.session) == expected
        with db.session.begin():
            with db.advisory_lock("key", timeout="7s"), db.lock_tables([Item]):
                pass
            assert setting(db.session) == expected

    check("0")
    with db.session.begin():  # in one transaction, between other settings of it
        db.session.execute(sa.text("set local lock_timeout = '1234ms'"))
        with db.session.begin_nested(), db.lock_tables([Item], timeout="7s"), db.advisory_lock(1, timeout=3):
            assert setting(db.session) == "1234ms"
        assert setting(db.session) == "1234ms"
    with db.pinned():  # of the connection
        db.session.execute(sa.text("set lock_timeout = '4321ms'"))
        check("4321ms")
        assert setting(db.session) == "4321ms"
    with db.advisory_lock("key", timeout=5):
        pass
    with other.begin():
        other.execute(sa.text("lock table item"))
        other.execute(sa.select(sa.func.pg_advisory_xact_lock(*lock_key("key").numbers)))
        with contextlib.suppress(LockTimeout), db.lock_tables([Item], timeout=0.01):
            pass
        with contextlib.suppress(LockTimeout), db.advisory_lock("key", timeout=0.01):
            pass
    with db.engine.connect() as first, db.engine.connect() as second:  # whatever the pool has
        assert {setting(first), setting(second)} == {"0"}


@pytest.mark.parametrize("plain", [False, True], ids=["opt-in", "plain session"])
def test_f3_however_the_block_ends(plain: bool, app: Flask, look: Look) -> None:
    """It raises, commits, rolls back, is interrupted, or loses its connection: no lock, no transaction is left."""
    engine = sa.create_engine(app.config["SQLALCHEMY_DATABASE_URI"]) if plain else db.engine
    with (sa_orm.Session if plain else OptInSession)(engine) as session:
        for lock in (lambda: lock_tables(session, [Item]), lambda: advisory_lock(session, "job")):
            for error in (ValueError("mine"), KeyboardInterrupt(), LockTimeout("mine")):
                with pytest.raises(type(error)) as caught, lock():
                    session.execute(sa.select(1)).all()
                    raise error
                assert caught.value is error
                session.rollback()
            with lock():
                session.execute(sa.insert(Tag).values(label=str(lock)))
                session.commit()
            with contextlib.suppress(sa.exc.InvalidRequestError), lock():
                session.execute(sa.select(1)).all()
                session.rollback()
            with pytest.raises(ValueError, match="mine") as lost, lock():
                kill_others(look)
                raise ValueError("mine")
            assert lost.value.__cause__ is None
            wait_until(lambda: look(ADVISORY_LOCKS) == [0] and not look(TABLE_LOCKS))
            session.rollback()
            with contextlib.suppress(sa.exc.OperationalError):
                session.scalar(sa.select(1))  # a plain session's pool finds out like this
            session.rollback()
        assert not session.in_transaction()
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    if plain:
        engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_f3_of_a_process_that_is_killed(app: Flask, database_url: str, look: Look) -> None:
    code = (
        "import sys, sqlalchemy as sa\n"
        "from fictive.sqlalchemy import OptInSession, advisory_lock, lock_tables\n"
        "from tests.models import Item\n"
        "session = OptInSession(sa.create_engine(sys.argv[1]))\n"
        "with advisory_lock(session, 'job'), lock_tables(session, [Item]):\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, database_url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(LockTimeout), db.advisory_lock("job", nowait=True):
            pytest.fail("not reached")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    with db.advisory_lock("job", timeout=20), db.lock_tables([Item], timeout=20):
        pass


# -- F2: keys ---------------------------------------------------------------------------------------------------------

KEYS: list[Any] = [0, -1, 7, 2**63 - 1, -(2**63), (1, 2), (-1, 2**31 - 1), "nightly report", "ключ"]


def test_f2_keys_are_postgresqls(app: Flask, look: Look, other: OptInSession) -> None:
    for key in KEYS:
        numbers = ", ".join(map(str, lock_key(key).numbers))
        for block in (db.session.begin, contextlib.nullcontext):
            with block(), db.advisory_lock(key):
                found = look(f"select count(*) from pg_locks l where {lock_key(key).in_pg_locks()} and {HERE}")
                assert found == [1], key
                assert look(f"select pg_try_advisory_lock({numbers})") == [False]
                for options in ({"nowait": True}, {"timeout": 0.01}):
                    with pytest.raises(LockTimeout, match="key") as caught, advisory_lock(other, key, **options):
                        pytest.fail("not reached")
                    assert repr(key) in str(caught.value)
                assert "holds ExclusiveLock on the key; its query: " in str(caught.value)
            assert look(ADVISORY_LOCKS) == [0]


def test_f2_outside_it_has_a_connection_of_its_own(app: Flask, wire: Wire, look: Look) -> None:
    with db.advisory_lock("warm"), db.advisory_lock("up"):
        pass
    with wire.record() as log, db.advisory_lock("key") as session:
        assert session is db.session()
        assert not session.in_transaction()
        with session.begin():
            session.execute(sa.insert(Tag).values(label="a"))
        assert look(ADVISORY_LOCKS) == [1]  # the lock outlives transactions
    assert own_verbs(log) == ["SELECT", "BEGIN", "INSERT", "COMMIT", "SELECT"]
    assert log.connections_opened == 0
    with wire.record() as log, db.session.begin(), db.advisory_lock("key"):
        pass
    assert messages(log) == ["BEGIN+SELECT", "COMMIT"]


def test_f2_inside_it_lasts_as_long_as_the_transaction(app: Flask, look: Look, other: OptInSession) -> None:
    with db.session.begin():
        with db.advisory_lock("key"):
            pass
        assert look(ADVISORY_LOCKS) == [1]
        with other.begin():
            with pytest.raises(LockTimeout), advisory_lock(other, "key", nowait=True):
                pytest.fail("not reached")
            assert other.scalar(sa.select(1)) == 1  # with nowait the transaction goes on
    assert look(ADVISORY_LOCKS) == [0]


def test_f2_shared(app: Flask, look: Look, other: OptInSession) -> None:
    for block in (contextlib.nullcontext, db.session.begin):
        with block(), db.advisory_lock("key", shared=True):
            with advisory_lock(other, "key", shared=True, timeout=5), advisory_lock(other, "key", shared=True):
                assert look(ADVISORY_LOCKS) == [2]
            with pytest.raises(LockTimeout), advisory_lock(other, "key", timeout=0.01):
                pytest.fail("not reached")
        assert look(ADVISORY_LOCKS) == [0]


def test_f2_a_session_does_not_wait_for_itself(app: Flask, wire: Wire, look: Look) -> None:
    with db.advisory_lock("key"):
        with wire.record() as log, db.advisory_lock("key"), db.advisory_lock("key", shared=True):
            pass
        assert log.round_trips == 0
        with wire.record() as log, db.session.begin(), db.advisory_lock("key"):
            pass
        assert log.round_trips == 0
        assert look(ADVISORY_LOCKS) == [1]
    with db.advisory_lock("key", shared=True), pytest.raises(ConfigurationError, match="wait for itself"):
        with db.advisory_lock("key"):
            pytest.fail("not reached")
    assert look(ADVISORY_LOCKS) == [0]


def test_f2_one_at_a_time(app: Flask, look: Look) -> None:
    engine = db.engine
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        with OptInSession(engine) as session, advisory_lock(session, "key", timeout=20):
            inside.append(1)
            most.append(len(inside))
            session.scalar(sa.select(1))
            inside.pop()

    with db.advisory_lock("key"):
        threads = [threading.Thread(target=work) for _ in range(5)]
        for thread in threads:
            thread.start()
        wait_until(lambda: look(WAITING) == [5])
    for thread in threads:
        thread.join(20)
    assert most == [1] * 5


def test_f2_a_lock_lost_with_its_connection_is_told(app: Flask, look: Look, caplog: pytest.LogCaptureFixture) -> None:
    with (
        pytest.raises(LockLost, match=r"'k{e}y %s' was lost with its connection before") as caught,
        db.advisory_lock("k{e}y %s"),
    ):
        kill_others(look)
    assert isinstance(caught.value, sa.exc.OperationalError)
    assert isinstance(caught.value.__cause__, sa.exc.DBAPIError)
    caplog.clear()
    with pytest.raises(ZeroDivisionError), db.advisory_lock("key"):
        kill_others(look)
        _ = 1 / 0
    assert "'key' was lost with its connection" in caplog.text
    taken: list[sa.Connection] = []
    note = lambda connection: taken.append(connection)  # noqa: E731
    event.listen(db.engine, "engine_connect", note)
    with pytest.raises(LockLost, match="another server process"), db.advisory_lock("key"):
        # as if a pooler had let another server process answer: the lock is not there any more
        taken[-1].execute(sa.select(sa.func.pg_advisory_unlock_all()))
    with db.advisory_lock("key"):
        pass
    event.remove(db.engine, "engine_connect", note)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unconnected() -> sa_orm.Session:
    """A session that would fail, with another error, as soon as it connects."""
    return sa_orm.Session(sa.create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none"))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: lock_tables(s, []), ConfigurationError, "empty"),
        (lambda s: lock_tables(s, Item), TypeError, r"\[Account\]"),
        (lambda s: lock_tables(s, "item"), TypeError, "list of models"),
        (lambda s: lock_tables(s, ["item"]), TypeError, "'item'"),
        (lambda s: lock_tables(s, [Item.id]), TypeError, "model"),
        (lambda s: lock_tables(None, [Item]), TypeError, r"db\.session"),
        (lambda s: lock_tables(s, [Item], mode="EVERYTHING"), ConfigurationError, "ACCESS EXCLUSIVE"),
        (lambda s: lock_tables(s, [Item], timeout="5 parsecs"), ConfigurationError, "parsecs"),
        (lambda s: lock_tables(s, [Item], timeout=-1), ConfigurationError, "more than zero"),
        (lambda s: lock_tables(s, [Item], nowait=1), ConfigurationError, "nowait"),
        (lambda s: advisory_lock(s, ""), ConfigurationError, "empty"),
        (lambda s: advisory_lock(s, 2**63), ConfigurationError, "64-bit"),
        (lambda s: advisory_lock(s, (0, 2**31)), ConfigurationError, "32-bit"),
        (lambda s: advisory_lock(s, True), TypeError, "True"),
        (lambda s: advisory_lock(s, 1.5), TypeError, "1.5"),
        (lambda s: advisory_lock(s, (1, 2, 3)), TypeError, "pair"),
        (lambda s: advisory_lock(s, 1, timeout=0), ConfigurationError, "timeout"),
        (lambda s: advisory_lock(s, 1, shared=None), ConfigurationError, "shared"),
        (lambda s: advisory_lock(s, 1, nowait=True, timeout=1), ConfigurationError, "Leave one out"),
        (lambda s: claim(sa.text("select 1")), TypeError, "select"),
        (lambda s: claim(sa.select(Item), limit=0), ConfigurationError, "limit"),
        (lambda s: claim(sa.select(Item), limit="3"), TypeError, "limit"),
        (lambda s: claim(sa.select(Item), nowait=True), ConfigurationError, "skip_locked=False"),
        (lambda s: claim(sa.select(Item), nowait=True, skip_locked=True), ConfigurationError, "skip_locked"),
        (lambda s: claim(sa.select(Item).with_for_update()), ConfigurationError, "with_for_update"),
    ],
)  # fmt: skip
def test_bad_input_is_an_error_at_the_call(
    call: Callable[[Any], Any], error: type[Exception], message: str, unconnected: sa_orm.Session
) -> None:
    with pytest.raises(error, match=message):
        call(unconnected)


def test_other_databases_are_refused(tmp_path: Any) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/a.db", poolclass=sa.NullPool)
    for session in (OptInSession(engine), sa_orm.Session(engine)):
        with pytest.raises(UnsupportedDialect, match=r"lock_tables\(\).*sqlite"):
            lock_tables(session, [Item])
        with pytest.raises(UnsupportedDialect, match=r"advisory_lock\(\).*sqlite"):
            advisory_lock(session, 1)
        Item.__table__.create(engine, checkfirst=True)
        with session.begin(), pytest.raises(UnsupportedDialect, match=r"claim\(\).*sqlite"):
            session.execute(claim(sa.select(Item)))


def test_tables_of_two_databases_are_refused(unconnected: sa_orm.Session) -> None:
    second = sa.create_engine("postgresql+psycopg://nobody@127.0.0.1:1/other")
    with sa_orm.Session(binds={Item: unconnected.get_bind(), Tag: second}) as session:
        with pytest.raises(ConfigurationError, match="several databases"):
            lock_tables(session, [Item, Tag])


def test_f1_names_of_all_kinds(app: Flask, look: Look, other: OptInSession) -> None:
    metadata = sa.MetaData()
    names = ["select", 'we "ird" % %s %% :x it\'s', "Mixed-Case", "back\\slash", "$fictive$", "x" * 63]
    tables = [sa.Table(name, metadata, sa.Column("id", sa.Integer), schema=schema)
              for schema in (None, "my schema%", "moved") for name in names]  # fmt: skip
    look('create schema "my schema%"')
    look('create schema "it\'s ""there"""')
    moved = {"moved": 'it\'s "there"'}
    metadata.create_all(db.engine.execution_options(schema_translate_map=moved))
    engine = db.engine.execution_options(schema_translate_map=moved)
    with OptInSession(engine) as session, lock_tables(session, tables, mode=LockMode.EXCLUSIVE):
        exclusive = f"select count(*) from pg_locks where mode = 'ExclusiveLock' and locktype = 'relation' and {HERE}"
        assert look(exclusive) == [18]
        with (
            OptInSession(engine) as second,
            pytest.raises(LockTimeout, match=r'"my schema%"\."Mixed-Case"'),
        ):
            with lock_tables(second, tables, timeout=0.01):
                pytest.fail("not reached")


# -- F4: rows ---------------------------------------------------------------------------------------------------------


def test_f4_claim_is_for_update_skip_locked() -> None:
    def sql(statement: Any) -> str:
        return " ".join(
            str(statement.compile(dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True})).split()
        )

    jobs = sa.select(Item.id).order_by(Item.id)
    assert sql(claim(jobs)) == "SELECT item.id FROM item ORDER BY item.id FOR UPDATE SKIP LOCKED"
    assert sql(claim(jobs, limit=3)).endswith("ORDER BY item.id LIMIT 3 FOR UPDATE SKIP LOCKED")
    assert sql(claim(jobs, 3, of=Item)).endswith("LIMIT 3 FOR UPDATE OF item SKIP LOCKED")
    assert sql(claim(jobs, key_share=True)).endswith("FOR NO KEY UPDATE SKIP LOCKED")
    assert sql(claim(jobs, nowait=True, skip_locked=False)).endswith("FOR UPDATE NOWAIT")
    assert sql(claim(jobs, skip_locked=False)).endswith("FOR UPDATE")
    assert "FOR UPDATE" in str(claim(jobs))  # printing it is not refused


def test_k_claim_of_100_jobs_is_1_round_trip_of_3(app: Flask, wire: Wire, look: Look, other: OptInSession) -> None:
    look("insert into item (name) select 'job ' || g from generate_series(1, 1000) g")
    for _ in range(8):
        with wire.record() as log, db.session.begin():
            jobs = db.session.scalars(
                db.claim(sa.select(Item).where(Item.note.is_(None)).order_by(Item.id), limit=100)
            ).all()
            assert len(jobs) == 100
            db.session.execute(sa.update(Item).where(Item.id.in_([job.id for job in jobs])).values(note="done"))
    assert messages(log) == ["BEGIN+SELECT", "UPDATE", "COMMIT"]
    assert look("select count(*) from item where note = 'done'") == [800]
    with db.session.begin(), other.begin():
        first, second = (
            session.scalars(claim(sa.select(Item.id).where(Item.note.is_(None)).order_by(Item.id), limit=3)).all()
            for session in (db.session, other)
        )
        assert (first, second) == ([801, 802, 803], [804, 805, 806])
    with wire.record() as log, pytest.raises(TransactionRequired, match="FOR UPDATE"):
        db.session.execute(claim(sa.select(Item)))
    assert log.round_trips == 0


def test_f4_32_workers_do_each_job_once(make_app: MakeApp, look: Look) -> None:
    app = make_app(SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 32})
    look("insert into item (name) select 'job ' || g from generate_series(1, 2000) g")
    done: list[int] = []
    errors: list[BaseException] = []
    start = threading.Barrier(32)

    def work() -> None:
        try:
            start.wait(30)
            with OptInSession(engine) as session:
                while True:
                    with session.begin():
                        waiting = sa.select(Item.id).where(Item.note.is_(None)).order_by(Item.id)
                        ids = session.scalars(claim(waiting, limit=10)).all()
                        if not ids:
                            return
                        session.execute(sa.update(Item).where(Item.id.in_(ids)).values(note="done"))
                    done.extend(ids)
        except BaseException as error:
            errors.append(error)

    with app.app_context():
        engine = db.engine
        threads = [threading.Thread(target=work) for _ in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not errors
    assert sorted(done) == look("select id from item where note = 'done' order by id")
    assert len(done) == len(set(done)) == 2000


def test_lock_keys_are_stable() -> None:
    """A changed hash would let two releases of an application hold the same lock at once."""
    assert lock_key("nightly report") == LockKey((int.from_bytes(bytes.fromhex(STABLE), "big", signed=True),))
    assert lock_key(5) == LockKey((5,))
    assert lock_key((5, -5)) == LockKey((5, -5))


STABLE = "e5a5c7f0c53fef86"

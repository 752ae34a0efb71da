"""Contract C1 to C3: connections that die, at rest and under way, and A18 after each of it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask

from fictive.connection.engines import prepare, status_of
from fictive.connection.servers import set_patience
from fictive.drivers import TransactionStatus
from fictive.errors import CommitOutcomeUnknown, PinnedConnectionLost
from fictive.sqlalchemy import BorrowingPool, OptInSession, advisory_lock
from fictive.testing import postgres
from fictive.testing.wire import Wire
from tests.conftest import MakeApp
from tests.models import Item, Tag, db
from tests.wirelog import messages, own_verbs

Look = Callable[..., list[Any]]
Lose = Callable[[], None]


def wait_until(done: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited in vain"
        threading.Event().wait(0.005)


def kill_others(look: Look) -> None:
    look(
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
        " where datname = current_database() and pid <> pg_backend_pid()"
    )


def is_statement(text: str) -> Callable[[str], bool]:
    return lambda statement: text in statement


def commits(statement: str) -> bool:
    return statement.rstrip("; ").endswith("COMMIT")


def assert_pool_is_clean(engine: sa.Engine) -> None:
    """A18: nothing is out; what the pool hands out is in the mode that Core expects, and in no transaction."""
    pool: Any = engine.pool
    assert pool.checkedout() == 0
    with contextlib.ExitStack() as stack:
        for _ in range(pool.checkedin() or 1):
            connection = stack.enter_context(engine.connect())
            dbapi: Any = connection.connection.dbapi_connection
            assert status_of(connection) is TransactionStatus.IDLE
            assert dbapi.autocommit is False
            assert dbapi.isolation_level is None
            assert connection.scalar(sa.text("show transaction_isolation")) == "read committed"
            assert connection.scalar(sa.text("show transaction_read_only")) == "off"
            assert status_of(connection) is TransactionStatus.IN_TRANSACTION
            connection.rollback()
            assert status_of(connection) is TransactionStatus.IDLE


# -- C1: at rest ------------------------------------------------------------------------------------------------------


def read() -> Any:
    return db.session.scalars(sa.select(Item.name)).all()


def transaction() -> None:
    with db.session.begin():
        db.session.add(Item(name="written"))


def nested() -> None:
    with db.session.begin(), db.session.begin_nested():
        db.session.add(Item(name="written"))


def flush() -> None:
    db.session.add(Item(name="written"))
    db.session.commit()


def bare_write() -> None:
    db.session.execute(sa.insert(Item).values(name="written"))


def core() -> None:
    with db.engine.begin() as connection:
        connection.execute(sa.insert(Item).values(name="written"))


def stream() -> None:
    list(db.session.scalars(sa.select(Item).execution_options(yield_per=1)))


WORKS = [read, transaction, nested, flush, bare_write, core, stream]


@pytest.fixture(params=["killed", "closed by the proxy", "reset"])
def lose(request: pytest.FixtureRequest, look: Look, wire: Wire) -> Lose:
    """Lose all connections at rest, and return when the sockets show it."""

    def run() -> None:
        if request.param == "killed":
            kill_others(look)
            wait_until(lambda: wire.open_connections == 0)
        elif request.param == "reset":
            wire.reset()
        else:
            wire.close_connections()

    return run


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)
def test_c1_the_next_request_succeeds(
    work: Callable[[], Any], lose: Lose, make_app: MakeApp, wire: Wire, look: Look
) -> None:
    """With `pool_pre_ping` off, and nothing more on the wire than a new connection's own work."""
    app = make_app(SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 3, "max_overflow": 0})
    with app.app_context():
        assert db.engine.pool._pre_ping is False  # type: ignore[attr-defined]
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(db.engine.connect())
        work()
        look("delete from item")
        db.session.remove()
        with wire.record() as usual:
            work()
        look("delete from item")
        db.session.remove()
        lose()
        with wire.record() as log:
            work()
        assert log.connections_opened == 1
        # SQLAlchemy registers hstore and the like on a new connection; the work itself is what it was
        assert own_verbs(log)[-len(own_verbs(usual)) :] == own_verbs(usual)
        assert look("select count(*) from item") == ([0] if work in (read, stream) else [1])
        for _ in range(3):
            read()
        assert_pool_is_clean(db.engine)


def test_c1_liveness_sends_nothing(app: Flask, wire: Wire) -> None:
    for _ in range(8):  # psycopg prepares on the sixth run
        read()
    with wire.record() as log:
        for _ in range(5):
            read()
    assert messages(log) == ["SELECT"] * 5
    assert log.connections_opened == 0


@pytest.fixture(scope="module")
def own_server() -> Iterator[postgres.Server]:
    with postgres.private_server(max_connections=60) as server:
        yield server


@pytest.fixture
def own_engine(own_server: postgres.Server, driver: str) -> Iterator[sa.Engine]:
    """An engine on a server that may be restarted, with one table."""
    engine = sa.create_engine(own_server.url(driver=driver), pool_size=5, max_overflow=15)
    prepare(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("drop table if exists mark"))
        connection.execute(sa.text("create table mark (id text primary key)"))
    yield engine
    engine.dispose()


INSERT = sa.text("insert into mark values (:id)")


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_c1_after_a_restart(mode: str, own_server: postgres.Server, own_engine: sa.Engine) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(own_engine.connect())
    own_server.restart(mode)
    session = OptInSession(own_engine)
    assert session.scalar(sa.text("select 1")) == 1
    own_server.restart(mode)
    with session.begin():
        session.execute(INSERT, {"id": "a"})
    own_server.restart(mode)
    session.execute(INSERT, {"id": "b"})
    own_server.restart(mode)
    with own_engine.begin() as connection:
        connection.execute(INSERT, {"id": "c"})
    assert session.scalars(sa.text("select id from mark order by id")).all() == ["a", "b", "c"]
    assert_pool_is_clean(own_engine)


def test_c1b_every_way_to_a_connection_waits_for_a_restart(
    own_server: postgres.Server, own_engine: sa.Engine, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    def begin(session: OptInSession) -> None:
        with session.begin():
            session.execute(INSERT, {"id": uuid.uuid4().hex})

    def core(session: OptInSession) -> None:
        with session.get_bind().begin() as connection:
            connection.execute(sa.text("select 1"))

    def lock(session: OptInSession) -> None:
        with advisory_lock(session, "key"):
            pass

    def pin(session: OptInSession) -> None:
        with session.pinned():
            session.scalar(sa.text("select 1"))

    ways: list[Callable[[OptInSession], object]] = [
        lambda session: session.scalar(sa.text("select 1")),
        lambda session: session.execute(INSERT, {"id": uuid.uuid4().hex}),
        *(begin, core, lock, pin),
    ]
    with Wire(own_server.host, own_server.port) as proxy:
        engine = sa.create_engine(proxy.url(own_server.url(driver=driver)), poolclass=BorrowingPool)
        plain_connect, tries = engine.dialect.connect, 0

        def connect(*args: Any, **parameters: Any) -> Any:
            nonlocal tries
            tries += 1
            proxy.refuse = tries < 3  # the third one is let in
            return plain_connect(*args, **parameters)

        engine.dialect.connect = connect  # type: ignore[method-assign]
        prepare(engine)
        for way in ways:
            tries = 3
            session = OptInSession(engine)
            session.scalar(sa.text("select 1"))
            tries = 0
            proxy.close_connections()
            caplog.clear()
            with caplog.at_level("INFO", "fictive.connection"):
                way(session)
            session.close()
            assert tries >= 3
            told = [record for record in caplog.records if record.name == "fictive.connection"]
            assert [(record.levelname, record.exc_info) for record in told] == [("INFO", None)] * (way is not core)
        engine.dispose()


@pytest.mark.any_sqlalchemy
def test_c1_while_the_server_is_down_a_request_tries_once(own_server: postgres.Server, driver: str) -> None:
    """Patience is for a restart: a server that stays away does not hold every request for seconds."""
    with Wire(own_server.host, own_server.port) as away:
        engine = sa.create_engine(away.url(own_server.url(driver=driver)))
        plain_connect, tries = engine.dialect.connect, []

        def connect(*args: Any, **parameters: Any) -> Any:
            tries.append(1)
            return plain_connect(*args, **parameters)

        engine.dialect.connect = connect  # type: ignore[method-assign]
        prepare(engine)
        set_patience(engine, 0.2)
        session = OptInSession(engine)
        session.scalar(sa.text("select 1"))
        away.refuse = True
        away.close_connections()
        with pytest.raises(sa.exc.OperationalError):
            session.scalar(sa.text("select 1"))
        for _ in range(2):
            tries.clear()
            with pytest.raises(sa.exc.OperationalError):
                session.scalar(sa.text("select 1"))
            assert len(tries) == 1
        away.refuse = False
        assert session.scalar(sa.text("select 1")) == 1
        engine.dispose()


def message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


STRAY = {
    "notice": message(b"N", b"SNOTICE\0VNOTICE\0C00000\0Mgoing to sleep\0\0"),
    "warning": message(b"N", b"SWARNING\0VWARNING\0C01000\0Mnearly full\0\0"),
    "parameter": message(b"S", b"application_name\0other\0"),
}


@pytest.mark.parametrize("stray", [*STRAY, "notify", "many notifications"])
def test_c1_stray_messages_are_not_death(stray: str, make_app: MakeApp, look: Look, wire: Wire, driver: str) -> None:
    """An idle socket that can be read is not always closed; and a notification is not lost by looking."""
    app = make_app(SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 1, "max_overflow": 0})
    with app.app_context():
        raw = db.engine.raw_connection()
        conn: Any = raw.driver_connection
        conn.cursor().execute("listen stray")
        conn.commit()
        pid = conn.info.backend_pid
        handled: list[str] = []
        if driver == "psycopg":
            conn.add_notify_handler(lambda notify: handled.append(notify.payload))
        raw.close()
        if stray == "notify":
            look("select pg_notify('stray', 'it')")
        elif stray == "many notifications":
            look("select pg_notify('stray', g || repeat('x', 7000)) from generate_series(1, 200) g")
        else:
            inject(wire, STRAY[stray])
        wait_until(lambda: readable(conn))
        with wire.record() as log:
            read()
        assert log.connections_opened == 0
        assert log.round_trips == 1
        with db.engine.connect() as connection:
            assert connection.scalar(sa.text("select pg_backend_pid()")) == pid
        if stray not in STRAY:
            payloads = [each.payload for each in conn.notifies] if driver == "psycopg2" else handled
            assert len(payloads) == (1 if stray == "notify" else 200)


def inject(wire: Wire, message: bytes) -> None:
    """Send `message` to the clients as the server might at any time (PostgreSQL documentation, "Asynchronous
    Operations")."""
    for connection in list(wire._connections.values()):
        connection.client.sendall(message)


def readable(conn: Any) -> bool:
    return bool(select.select([conn.fileno()], [], [], 0)[0])


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_c1_a_notification_seen_at_checkout_is_delivered_at_once(make_app: MakeApp, look: Look) -> None:
    """`conn.notifies()` has what libpq had read before it was asked."""
    with make_app(SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 1, "max_overflow": 0}).app_context():
        raw = db.engine.raw_connection()
        conn: Any = raw.driver_connection
        conn.execute("listen stray")
        conn.commit()
        raw.close()
        look("select pg_notify('stray', 'it')")
        wait_until(lambda: readable(conn))
        raw = db.engine.raw_connection()
        assert raw.driver_connection is conn
        found = [each.payload for each in conn.notifies(timeout=2, stop_after=1)]
        raw.close()
        assert found == ["it"]


def test_c1_a_named_cursor_on_the_drivers_own_connection_in_a_transaction(app: Flask, look: Look) -> None:
    """psycopg2 declares one in a transaction of its own only, and is told of the one that is open."""
    with app.app_context(), db.session.begin():
        db.session.execute(sa.insert(Item).values(name="x"))
        raw: Any = db.session.connection().connection.dbapi_connection
        with raw.cursor("by_hand") as cursor:
            cursor.execute("SELECT name FROM item")
            assert cursor.fetchall() == [("x",)]
        db.session.execute(sa.insert(Item).values(name="y"))
    assert look("select name from item order by name") == ["x", "y"]


class TestKeepAlive:
    def parameters(self, engine: sa.Engine) -> dict[str, str]:
        with engine.connect() as connection:
            dbapi: Any = connection.connection.dbapi_connection
            info = dbapi.info
            return dict(info.dsn_parameters) if hasattr(info, "dsn_parameters") else dict(info.get_parameters())

    def test_set_by_default(self, database_url: str, wire: Wire) -> None:
        engine = sa.create_engine(wire.url(database_url))
        prepare(engine)
        found = self.parameters(engine)
        assert found["keepalives_idle"] == "30"
        assert found["keepalives_interval"] == "10"
        assert found["keepalives_count"] == "3"
        assert found["tcp_user_timeout"] == "30000"
        with engine.connect() as connection:
            dbapi: Any = connection.connection.dbapi_connection
            with socket.socket(fileno=os.dup(dbapi.fileno())) as copy:
                assert copy.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
                assert copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30000
        engine.dispose()

    @pytest.mark.parametrize(
        "own", [{"keepalives_idle": 5}, {"keepalives": 0}, {"tcp_user_timeout": 1000}, {"keepalives_count": 9}]
    )
    @pytest.mark.parametrize("given", ["connect_args", "url"])
    def test_the_users_own_are_kept(self, own: dict[str, int], given: str, database_url: str) -> None:
        url = sa.make_url(database_url)
        if given == "url":
            url = url.update_query_dict({name: str(value) for name, value in own.items()})
            engine = sa.create_engine(url)
        else:
            engine = sa.create_engine(url, connect_args=own)
        prepare(engine)
        found = self.parameters(engine)
        for name, value in own.items():
            assert found[name] == str(value)
        assert found.get("keepalives_idle", "0") in ("0", "5"), "nothing of ours among the user's"
        engine.dispose()


# -- C2: under way ----------------------------------------------------------------------------------------------------

WHENS = pytest.mark.parametrize("when", ["before", "after"])


@WHENS
class TestReads:
    @pytest.mark.parametrize("way", ["scalars", "get", "query", "lazy", "refresh", "text"])
    def test_c2_a_read_is_run_again_once(self, when: Any, way: str, app: Flask, wire: Wire, look: Look) -> None:
        look("insert into item (name) values ('a')")
        look("insert into child (item_id, size) select id, 1 from item")
        item = db.session.scalars(sa.select(Item)).one()
        number = item.id
        ways: dict[str, Callable[[], Any]] = {
            "scalars": lambda: db.session.scalars(sa.select(Item.name)).all() == ["a"],
            "get": lambda: db.session.get(Item, number, populate_existing=True) is item,
            "query": lambda: Item.query.count() == 1,
            "lazy": lambda: len(item.children) == 1,
            "refresh": lambda: db.session.refresh(item) is None,
            "text": lambda: db.session.scalar(sa.text("SELECT count(*) FROM item")) == 1,
        }
        trigger = wire.reset_when(is_statement("SELECT"), when)
        with wire.record() as log:
            assert ways[way]()
        assert trigger.fired == 1
        assert log.connections_opened == 1
        assert not db.session.in_transaction()
        assert_pool_is_clean(db.engine)

    def test_c2_once_only(self, when: Any, app: Flask, wire: Wire) -> None:
        trigger = wire.reset_when(is_statement("FROM item"), when, times=None)
        with pytest.raises(sa.exc.OperationalError) as raised:
            read()
        assert trigger.fired == 2
        assert raised.value.connection_invalidated
        trigger.remove()
        assert read() == []
        assert_pool_is_clean(db.engine)

    def test_c2_not_when_it_is_turned_off(self, when: Any, make_app: MakeApp, wire: Wire) -> None:
        with make_app(FICTIVE_RETRY_READS=False).app_context():
            for work in (read, transaction_with_select):
                trigger = wire.reset_when(is_statement("FROM item"), when)
                with pytest.raises(sa.exc.OperationalError):
                    work()
                assert trigger.fired == 1
                db.session.remove()
                assert read() == []
            assert_pool_is_clean(db.engine)

    def test_c2_a_streamed_read_is_not_half_read_twice(self, when: Any, app: Flask, wire: Wire, look: Look) -> None:
        look("insert into item (name) select g::text from generate_series(1, 50) g")
        result = iter(db.session.scalars(sa.select(Item.name).execution_options(yield_per=10)))
        seen = [next(result)]
        trigger = wire.reset_when(is_statement("FETCH"), when)
        with pytest.raises(sa.exc.DBAPIError):
            seen.extend(result)
        assert trigger.fired == 1
        assert len(seen) == len(set(seen))
        assert not [server for server in db.engine.pool.idle if server.is_lost()]
        del result
        db.session.remove()
        assert len(read()) == 50
        assert_pool_is_clean(db.engine)

    def test_c2_a_write_is_not_run_again(self, when: Any, app: Flask, wire: Wire, look: Look) -> None:
        trigger = wire.reset_when(is_statement("INSERT"), when, times=None)
        with pytest.raises(sa.exc.DBAPIError) as raised:
            bare_write()
        assert trigger.fired == 1
        assert raised.value.connection_invalidated
        trigger.remove()
        assert look("select count(*) from item") == [int(when == "after")]
        assert not db.session.in_transaction()
        assert len(read()) == int(when == "after")
        assert_pool_is_clean(db.engine)

    def test_c2_what_may_write_is_not_run_again(self, when: Any, app: Flask, wire: Wire, look: Look) -> None:
        look("create function w() returns int language sql as $$insert into item (name) values ('w') returning 1$$")
        trigger = wire.reset_when(is_statement("w()"), when, times=None)
        with pytest.raises(sa.exc.DBAPIError):
            db.session.scalar(sa.text("SELECT w()"))
        assert trigger.fired == 1
        trigger.remove()
        assert look("select count(*) from item") == [int(when == "after")]

    def test_c2_several_statements_of_a_flush_are_not(self, when: Any, app: Flask, wire: Wire, look: Look) -> None:
        db.session.add_all([Item(name="a"), Tag(label="b")])
        seen: list[str] = []
        trigger = wire.reset_when(lambda text: "INSERT" in text and (seen.append(text) or len(seen) == 2), when)
        with pytest.raises(sa.exc.DBAPIError):
            db.session.flush()
        assert trigger.fired == 1
        assert len(seen) == 2
        db.session.rollback()
        assert look("select (select count(*) from item) + (select count(*) from tag)") == [0]
        assert_pool_is_clean(db.engine)


def transaction_with_select() -> None:
    with db.session.begin():
        db.session.scalars(sa.select(Item.name)).all()


@WHENS
class TestTransactions:
    @pytest.mark.parametrize("first", ["select", "insert"])
    def test_c2_the_first_statement_may_be_run_again(
        self, when: Any, first: str, app: Flask, wire: Wire, look: Look
    ) -> None:
        trigger = wire.reset_when(is_statement("item"), when)
        with wire.record() as log, db.session.begin():
            if first == "select":
                assert db.session.scalars(sa.select(Item.name)).all() == []
            db.session.execute(sa.insert(Item).values(name="a"))
        assert trigger.fired == 1
        assert log.connections_opened == 1
        assert look("select name from item") == ["a"]
        assert_pool_is_clean(db.engine)

    @pytest.mark.parametrize("options", [{"isolation_level": "SERIALIZABLE"}, {"read_only": True}])
    def test_c2_and_then_with_the_transactions_options(
        self, when: Any, options: dict[str, Any], app: Flask, wire: Wire
    ) -> None:
        wire.reset_when(is_statement("transaction_"), when)
        with db.session.transaction(**options):
            level, read_only = db.session.execute(
                sa.text("SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only')")
            ).one()
        assert level == ("serializable" if "isolation_level" in options else "read committed")
        assert read_only == ("on" if "read_only" in options else "off")
        assert_pool_is_clean(db.engine)

    def test_c2_once_only(self, when: Any, app: Flask, wire: Wire) -> None:
        trigger = wire.reset_when(is_statement("FROM item"), when, times=None)
        with pytest.raises(sa.exc.OperationalError):
            transaction_with_select()
        assert trigger.fired == 2
        trigger.remove()
        transaction_with_select()
        assert_pool_is_clean(db.engine)

    @pytest.mark.parametrize("earlier", ["select", "insert", "savepoint"])
    def test_c2_a_later_one_is_not(self, when: Any, earlier: str, app: Flask, wire: Wire, look: Look) -> None:
        trigger = None
        with pytest.raises(sa.exc.OperationalError) as raised, db.session.begin():
            if earlier == "insert":
                db.session.execute(sa.insert(Tag).values(label="lost"))
            else:
                db.session.scalars(sa.select(Tag)).all()
            trigger = wire.reset_when(is_statement("FROM item"), when, times=None)
            if earlier == "savepoint":
                with db.session.begin_nested():
                    read()
            read()
        assert trigger is not None
        assert trigger.fired == 1
        assert not isinstance(raised.value, CommitOutcomeUnknown)
        trigger.remove()
        assert look("select count(*) from tag") == [0]
        assert not db.session.in_transaction()
        assert_pool_is_clean(db.engine)

    def test_c2_an_error_swallowed_does_not_make_it_a_success(
        self, when: Any, app: Flask, wire: Wire, look: Look
    ) -> None:
        """The block goes on after a loss, and must not commit its second half alone."""
        with pytest.raises(sa.exc.SQLAlchemyError), db.session.begin():
            db.session.execute(sa.insert(Tag).values(label="lost"))
            wire.reset_when(is_statement("FROM item"), when)
            with contextlib.suppress(sa.exc.OperationalError):
                read()
            with contextlib.suppress(sa.exc.SQLAlchemyError):
                db.session.execute(sa.insert(Tag).values(label="second half"))
        assert look("select count(*) from tag") == [0]
        assert_pool_is_clean(db.engine)

    def test_c2_first_in_a_savepoint(self, when: Any, app: Flask, wire: Wire, look: Look) -> None:
        """Run again or failed: the outcome is one of the two, whole."""
        wire.reset_when(is_statement("INSERT"), when)
        failed = False
        try:
            with db.session.begin(), db.session.begin_nested():
                db.session.execute(sa.insert(Item).values(name="a"))
        except sa.exc.OperationalError:
            failed = True
        assert look("select count(*) from item") == [int(not failed)]
        assert_pool_is_clean(db.engine)

    def test_c2_within_pinned_the_connection_is_not_replaced_in_silence(
        self, when: Any, app: Flask, wire: Wire
    ) -> None:
        """What was set through a pinned connection is gone with it."""
        with pytest.raises((sa.exc.OperationalError, PinnedConnectionLost)), db.pinned():
            db.session.execute(sa.text("create temporary table kept (id int)"))
            wire.reset_when(is_statement("FROM item"), when)
            with db.session.begin():
                read()
        with pytest.raises((sa.exc.OperationalError, PinnedConnectionLost)), db.pinned():
            db.session.execute(sa.text("create temporary table kept (id int)"))
            wire.reset_when(is_statement("FROM item"), when)
            read()
        assert read() == []
        assert_pool_is_clean(db.engine)


# -- COMMIT -----------------------------------------------------------------------------------------------------------


def savepoint_then_commit() -> None:
    with db.session.begin(), db.session.begin_nested():
        db.session.execute(sa.insert(Item).values(name="written"))


def flush_alone() -> None:
    db.session.add(Item(name="written"))
    db.session.flush()


def many_rows() -> None:
    db.session.execute(sa.insert(Item), [{"name": "written"}, {"name": "written too"}])


def begin_without_with() -> None:
    block = db.session.begin()
    db.session.execute(sa.insert(Item).values(name="written"))
    block.commit()


@WHENS
@pytest.mark.parametrize(
    "work",
    [transaction, savepoint_then_commit, flush, flush_alone, many_rows, begin_without_with],
    ids=lambda work: work.__name__,
)
def test_commit_outcome_unknown(work: Callable[[], None], when: Any, app: Flask, wire: Wire, look: Look) -> None:
    trigger = wire.reset_when(commits, when)
    with pytest.raises(CommitOutcomeUnknown) as raised:
        work()
    assert trigger.fired == 1, "never sent again"
    assert isinstance(raised.value, sa.exc.OperationalError)
    assert isinstance(raised.value.__cause__, sa.exc.DBAPIError)
    assert raised.value.connection_invalidated
    assert "COMMIT" in str(raised.value)
    assert "not answered" in str(raised.value)
    rows = 2 if work is many_rows else 1
    assert look("select count(*) from item") == [rows if when == "after" else 0]
    assert not db.session.in_transaction()
    look("delete from item")
    db.session.rollback()
    work()
    assert look("select count(*) from item") == [rows]
    assert_pool_is_clean(db.engine)


@pytest.mark.parametrize("mode", ["commit", "begin"])
def test_commit_outcome_unknown_under_writes_outside(mode: str, make_app: MakeApp, wire: Wire, look: Look) -> None:
    with make_app(FICTIVE_WRITES_OUTSIDE=mode).app_context():
        db.session.add(Item(name="a"))
        wire.reset_when(commits, "after")
        with pytest.raises(CommitOutcomeUnknown):
            db.session.commit()
        assert look("select name from item") == ["a"]
        db.session.rollback()
        assert db.session.scalar(sa.select(Item.name)) == "a"
        db.session.rollback()
        assert_pool_is_clean(db.engine)


def test_a_commit_that_is_refused_is_not_unknown(app: Flask, look: Look) -> None:
    look("create table later (id int unique deferrable initially deferred)")
    with pytest.raises(sa.exc.IntegrityError) as raised, db.session.begin():
        db.session.execute(sa.text("insert into later values (1), (1)"))
    assert not isinstance(raised.value, CommitOutcomeUnknown)
    assert look("select count(*) from later") == [0]
    assert_pool_is_clean(db.engine)


def test_a_loss_before_commit_is_not_unknown(app: Flask, wire: Wire, look: Look) -> None:
    with pytest.raises(sa.exc.DBAPIError) as raised, db.session.begin():
        db.session.execute(sa.insert(Item).values(name="a"))
        wire.reset_when(is_statement("INSERT"), "before")
        db.session.execute(sa.insert(Item).values(name="b"))
    assert not isinstance(raised.value, CommitOutcomeUnknown)
    assert look("select count(*) from item") == [0]
    assert_pool_is_clean(db.engine)


def test_killed_between_the_last_statement_and_commit(app: Flask, look: Look) -> None:
    """The server says nothing of COMMIT; it never had it. Unknown is honest, success would not be."""
    with pytest.raises(sa.exc.DBAPIError), db.session.begin():
        db.session.execute(sa.insert(Item).values(name="a"))
        kill_others(look)
    assert look("select count(*) from item") == [0]
    assert read() == []
    assert_pool_is_clean(db.engine)


# -- C3: fork ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("disposed", [False, True], ids=["", "after dispose() in a block"])
def test_c3_a_child_does_not_share_its_parents_connections(database_url: str, driver: str, disposed: bool) -> None:
    """Straight to the server: the proxy's threads do not live on in a child."""
    engine = sa.create_engine(database_url, pool_size=1, max_overflow=0, poolclass=BorrowingPool)
    prepare(engine)
    session = OptInSession(engine)
    query = sa.text("select pg_backend_pid()")
    if disposed:
        with session.begin():
            before = session.scalar(query)
            engine.dispose()
        assert session.scalar(query) != before
    parents = session.scalar(query)
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        answer = "failed"
        try:
            answer = str(session.scalar(query))
        finally:
            os.write(sending, answer.encode())
            os._exit(0)
    os.waitpid(child, 0)
    os.close(sending)
    with os.fdopen(receiving) as pipe:
        childs = pipe.read()
    assert childs.isdigit()
    assert childs != str(parents), "the child uses the parent's connection"
    assert session.scalar(query) == parents
    engine.dispose()


# -- all at once ------------------------------------------------------------------------------------------------------

THREADS = 20


@pytest.mark.any_sqlalchemy
@pytest.mark.timeout(300)
@pytest.mark.parametrize("modes", [["fast"] * 4, ["immediate"] * 4, ["fast", "immediate"] * 2], ids="-".join)
def test_restarts_under_load(modes: list[str], own_server: postgres.Server, own_engine: sa.Engine) -> None:
    """No read fails; what is reported committed is there; what is there and reported failed was called unknown."""
    stop = threading.Event()
    rounds: Counter[int] = Counter()
    outcomes: dict[str, str] = {}
    errors: dict[str, str] = {}
    failed_reads: list[str] = []
    wrong: list[str] = []

    def reader(number: int) -> None:
        with OptInSession(own_engine) as session:
            while not stop.is_set():
                try:
                    session.scalars(sa.text("select id from mark limit 3")).all()
                except sa.exc.SQLAlchemyError as error:
                    failed_reads.append(repr(error)[:300])
                rounds[number] += 1

    def writer(number: int) -> None:
        with OptInSession(own_engine) as session:
            while not stop.is_set():
                rounds[number] += 1
                first, second = f"{number}-{rounds[number]}", f"{number}-{rounds[number]}b"
                try:
                    with session.begin():
                        session.execute(INSERT, {"id": first})
                        if number % 3 == 0:
                            session.scalars(sa.text("select id from mark limit 1")).all()
                        if number % 3 == 1:
                            with session.begin_nested():
                                session.execute(INSERT, {"id": second})
                        else:
                            session.execute(INSERT, {"id": second})
                    outcomes[first] = "committed"
                except CommitOutcomeUnknown:
                    outcomes[first] = "unknown"
                except sa.exc.SQLAlchemyError as error:
                    outcomes[first] = "failed"
                    errors[first] = repr(error)[:300]

    def guarded(work: Callable[[int], None], number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            wrong.append(repr(error)[:300])
            raise

    with ThreadPoolExecutor(THREADS) as threads:
        futures = [threads.submit(guarded, reader if n % 2 else writer, n) for n in range(THREADS)]
        try:
            for mode in modes:
                before = Counter(rounds)
                wait_until(lambda before=before: all(rounds[n] > before[n] + 3 for n in range(THREADS)), 60)
                own_server.restart(mode)
            before = Counter(rounds)
            wait_until(lambda: all(rounds[n] > before[n] + 3 for n in range(THREADS)), 60)
        finally:
            stop.set()
    for future in futures:
        future.result()
    assert wrong == []
    assert failed_reads == []
    with sa_orm.Session(own_engine) as session:
        there = set(session.scalars(sa.text("select id from mark")))
    lost = [key for key, outcome in outcomes.items() if outcome == "committed" and not {key, key + "b"} <= there]
    hidden = [(key, errors[key]) for key, outcome in outcomes.items() if outcome == "failed" and key in there]
    halves = [key for key in outcomes if (key in there) != (key + "b" in there)]
    assert lost == []
    assert hidden == []
    assert halves == []
    assert Counter(outcomes.values())["committed"] > THREADS
    assert_pool_is_clean(own_engine)

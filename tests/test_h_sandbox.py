"""The sandbox (contract H4): the application's ways work in it unchanged, and nothing of them remains."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import flask
import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask

from fictive import errors
from fictive.drivers import sqlstate
from fictive.sqlalchemy import OptInSession, Rollback, cleanup_tables
from fictive.testing.sandbox import sandbox
from fictive.testing.wire import Wire
from tests.fresh_database import OWN
from tests.interrupts import OURS, Interrupt, Striker
from tests.models import DB, opt_in
from tests.wirelog import messages

db = opt_in.db
Item, Child, Booking, Tag = opt_in.Item, opt_in.Child, opt_in.Booking, opt_in.Tag
Look = Callable[..., list[Any]]

LOCKS = """
select count(*) from pg_locks where pid <> pg_backend_pid() and locktype <> 'virtualxid'
and database = (select oid from pg_database where datname = current_database())
"""
TABLES = ("item", "child", "tag", "item_tag", "animal", "dog", "booking")


@pytest.fixture
def nothing_remains(look: Look) -> Iterator[None]:
    """No row, lock, transaction or table of a test is left."""
    tables = look("select relname from pg_class where relnamespace = 'public'::regnamespace order by 1")
    yield
    for table in TABLES:
        assert look(f"select count(*) from {table}") == [0], table
    assert look("select relname from pg_class where relnamespace = 'public'::regnamespace order by 1") == tables
    assert look(LOCKS) == [0]


pytestmark = pytest.mark.usefixtures("nothing_remains")


@pytest.fixture(params=["commit", "begin", "refuse"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def app_in(make_app: Any, mode: str) -> Iterator[Flask]:
    app = make_app(FICTIVE_WRITES_OUTSIDE=mode)
    with app.app_context():
        yield app


def names() -> list[str]:
    return list(db.session.scalars(sa.select(Item.name).order_by(Item.name)))


# -- the app's ways, in each mode -------------------------------------------------------------------------------------


def block() -> None:
    with db.session.begin():
        db.session.add(Item(name="x"))


def nested_block() -> None:
    with db.session.begin():
        db.session.add(Item(name="x"))
        with db.session.begin_nested():
            db.session.add(Item(name="gone"))
            raise Rollback


def savepoint_alone() -> None:
    with db.session.begin_nested():
        db.session.add(Item(name="x"))


def durable() -> None:
    with db.transaction(durable=True):
        db.session.add(Item(name="x"))


def options() -> None:
    with db.transaction(isolation_level="SERIALIZABLE", lock_timeout="1s", statement_timeout="2s"):
        db.session.add(Item(name="x"))


def core_begin() -> None:
    with db.engine.begin() as connection:
        connection.execute(sa.insert(Item.__table__).values(name="x"))


def core_connect() -> None:
    with db.engine.connect() as connection:
        connection.execute(sa.insert(Item.__table__).values(name="gone"))
        connection.rollback()
        connection.execute(sa.insert(Item.__table__).values(name="x"))
        connection.commit()
        connection.execute(sa.insert(Item.__table__).values(name="gone too"))


def core_autocommit() -> None:
    with db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.insert(Item.__table__).values(name="x"))


def raw_connection() -> None:
    raw = db.engine.raw_connection()
    try:
        with raw.cursor() as cursor:
            cursor.execute("INSERT INTO item (name) VALUES (%s)", ("x",))
        raw.commit()
        with raw.cursor() as cursor:
            cursor.execute("INSERT INTO item (name) VALUES (%s)", ("gone",))
        raw.rollback()
    finally:
        raw.close()


def raw_in_block() -> None:
    with db.session.begin():
        raw = db.session.connection().connection.driver_connection
        with raw.cursor() as cursor:
            cursor.execute("INSERT INTO item (name) VALUES (%s)", ("x",))


def bulk() -> None:
    with db.session.begin():
        db.session.execute(sa.insert(Item), [{"name": "x"}])
        assert db.session.execute(sa.insert(Tag), [{"label": str(n)} for n in range(50)])


def copy() -> None:
    from fictive.sqlalchemy import insert_many, upsert_many

    with db.session.begin():
        assert insert_many(db.session, Tag, ({"label": str(n)} for n in range(5000))) == 5000
        upsert_many(db.session, Tag, [{"label": str(n)} for n in range(3000)], key=["label"])
        upsert_many(db.session, Tag, [{"label": str(n)} for n in range(3000)], key=["label"])
        db.session.add(Item(name="x"))


def locks() -> None:
    with db.session.begin():
        db.session.add(Item(name="x"))
        db.session.flush()
        db.session.scalars(sa.select(Item).with_for_update()).all()
        with db.advisory_lock("key"):
            pass
        with db.lock_tables([Item]):
            pass


def pinned() -> None:
    with db.pinned(), db.session.begin():
        db.session.execute(sa.text("CREATE TEMPORARY TABLE tmp (n int)"))
        db.session.execute(sa.text("SET search_path = public, pg_catalog"))
        db.session.add(Item(name="x"))


def plain_session() -> None:
    with sa_orm.Session(db.engine) as session:
        session.add(Item(name="x"))
        session.commit()
        session.add(Item(name="gone"))
        session.flush()
        session.rollback()


def from_thread() -> None:
    app = flask.current_app._get_current_object()  # type: ignore[attr-defined]

    def run() -> None:
        with app.app_context(), db.session.begin():
            db.session.add(Item(name="x"))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def from_cli() -> None:
    app = flask.current_app._get_current_object()  # type: ignore[attr-defined]

    @app.cli.command("add")
    def add() -> None:
        with db.session.begin():
            db.session.add(Item(name="x"))

    result = app.test_cli_runner().invoke(args=["add"])
    assert result.exception is None, result.exception


def retried() -> None:
    tries = []

    def run() -> None:
        tries.append(1)
        db.session.add(Item(name="x"))
        db.session.flush()
        if len(tries) == 1:
            raise sa.exc.DBAPIError("", {}, _Serialization())

    db.run_transaction(run, retries=2)
    assert len(tries) == 2


class _Serialization(Exception):
    sqlstate = pgcode = "40001"


def read_only_refuses() -> None:
    with pytest.raises(sa.exc.DBAPIError) as caught, db.transaction(read_only=True):
        assert db.session.scalar(sa.text("SHOW transaction_read_only")) == "on"
        db.session.execute(sa.insert(Item).values(name="gone"))
    assert sqlstate(caught.value) == "25006"
    block()


def created_table() -> None:
    table = sa.Table("made", sa.MetaData(), sa.Column("n", sa.Integer, primary_key=True))
    table.create(db.engine)
    with db.engine.begin() as connection:
        connection.execute(table.insert().values(n=1))
    block()


def lasting_plain_read() -> None:
    """A plain session that has read, and keeps its transaction, stops nobody."""
    with sa_orm.Session(db.engine) as reader:
        reader.scalars(sa.select(Item)).all()
        block()
        from_reader = reader.scalars(sa.select(Item.name)).all()
        assert from_reader == ["x"]


WAYS = [
    block, nested_block, savepoint_alone, durable, options, core_begin, core_connect, core_autocommit, raw_connection,
    raw_in_block, bulk, copy, locks, pinned, plain_session, from_thread, from_cli, retried, read_only_refuses,
    created_table, lasting_plain_read,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_the_app_does_is_seen_and_nothing_remains(app_in: Flask, way: Callable[[], None], look: Look) -> None:
    with db.sandbox():
        way()
        db.session.commit()  # under "begin" a savepoint alone leaves its transaction open
        assert names() == ["x"]
        assert look("select count(*) from item") == [0]
        way_again = sa.delete(Item)
        with db.session.begin():
            db.session.execute(way_again)
        assert names() == []
    assert names() == []


def test_a_statement_outside_stands_alone(app: Flask) -> None:
    with db.sandbox():
        db.session.execute(sa.insert(Item).values(name="x"))
        for _ in range(2):
            with pytest.raises(sa.exc.IntegrityError):
                db.session.execute(sa.insert(Item).values(name="x"))
        with pytest.raises(sa.exc.ProgrammingError):
            db.session.execute(sa.text("SELECT nonsense"))
        assert names() == ["x"]
        db.session.add(Item(name="y"))
        db.session.commit()
        assert names() == ["x", "y"]


def test_guards_fire(app: Flask) -> None:
    with db.sandbox():
        with pytest.raises(errors.TransactionRequired):
            db.session.scalars(sa.select(Item).with_for_update()).all()
        with pytest.raises(errors.TransactionRequired):
            db.session.execute(sa.text("SET LOCAL lock_timeout = 5"))
        with db.session.begin(), pytest.raises(errors.TransactionAlreadyBegun):
            db.session.begin()
        with db.session.begin(), pytest.raises(errors.FictiveError), db.transaction(durable=True):
            pass


def test_refuse_refuses(make_app: Any) -> None:
    with make_app(FICTIVE_WRITES_OUTSIDE="refuse").app_context(), db.sandbox():
        with pytest.raises(errors.TransactionRequired):
            db.session.execute(sa.insert(Item).values(name="x"))


def test_begin_keeps_a_transaction_open(make_app: Any) -> None:
    with make_app(FICTIVE_WRITES_OUTSIDE="begin").app_context(), db.sandbox():
        db.session.execute(sa.insert(Item).values(name="x"))
        db.session.rollback()
        assert names() == []
        db.session.execute(sa.insert(Item).values(name="y"))
        db.session.commit()
        assert names() == ["y"]


def test_hooks_run_at_the_outermost_commit(app: Flask) -> None:
    ran: list[str] = []
    with db.sandbox():
        with db.session.begin():
            db.on_commit(lambda: ran.append("commit"))
            with db.session.begin_nested():
                db.on_commit(lambda: ran.append(names()[0]))
                db.session.add(Item(name="x"))
            assert ran == []
        assert ran == ["commit", "x"]
        with pytest.raises(ValueError), db.session.begin():
            db.on_rollback(lambda: ran.append("rollback"))
            raise ValueError
        assert ran[-1] == "rollback"


def test_deferred_constraints_are_checked_at_commit(app: Flask) -> None:
    with db.sandbox():
        for _ in range(2):
            with pytest.raises(sa.exc.IntegrityError), db.session.begin():
                db.session.execute(sa.insert(Booking).values(seat=1))
                db.session.execute(sa.insert(Booking).values(seat=1))
                assert db.session.scalar(sa.select(sa.func.count()).select_from(Booking)) == 2
        assert db.session.scalar(sa.select(sa.func.count()).select_from(Booking)) == 0
        with pytest.raises(sa.exc.IntegrityError):
            db.session.execute(sa.text("INSERT INTO booking (seat) VALUES (1), (1)"))
        block()
        assert names() == ["x"]


def test_a_serialization_failure_can_be_staged(app: Flask) -> None:
    with db.sandbox() as box:
        tries = []

        def run() -> None:
            tries.append(names())
            db.session.add(Item(name="x"))

        box.fail_next_commit("40001")
        db.run_transaction(run, retries=1)
        assert tries == [[], []]
        assert names() == ["x"]
        box.fail_next_commit()
        with pytest.raises(sa.exc.OperationalError) as caught, db.session.begin():
            db.session.add(Item(name="y"))
        assert sqlstate(caught.value) == "40001"
        assert names() == ["x"]


def test_streams(app: Flask) -> None:
    with db.sandbox():
        with db.session.begin():
            db.session.add_all([Item(name=f"{n:02}") for n in range(20)])
        seen = []
        for item in db.session.scalars(sa.select(Item).order_by(Item.name).execution_options(yield_per=5)):
            db.session.execute(sa.update(Item).where(Item.id == item.id).values(note="seen"))
            seen.append(item.name)
            if len(seen) == 7:
                with db.session.begin():
                    db.session.execute(sa.insert(Item).values(name="zz"))
        assert len(seen) == 20
        with db.session.begin():
            found = db.session.scalars(sa.select(Item.note).where(Item.name < "a").execution_options(yield_per=3))
            assert list(found) == ["seen"] * 20
        with db.engine.connect() as connection:
            result = connection.execution_options(stream_results=True).execute(sa.select(Item.name).order_by(Item.id))
            assert len(result.fetchmany(3)) == 3
            assert len(result.fetchall()) == 18


def test_an_error_in_a_block_aborts_it(app: Flask) -> None:
    with db.sandbox():
        with pytest.raises(errors.TransactionAborted), db.session.begin():
            db.session.execute(sa.insert(Item).values(name="x"))
            with pytest.raises(sa.exc.ProgrammingError):
                db.session.execute(sa.text("SELECT nonsense"))
            with pytest.raises(sa.exc.DBAPIError) as caught:
                db.session.execute(sa.text("SELECT 1"))
            assert sqlstate(caught.value) == "25P02"
        assert names() == []
        with db.session.begin():
            with pytest.raises(sa.exc.ProgrammingError), db.session.begin_nested():
                db.session.execute(sa.text("SELECT nonsense"))
            db.session.add(Item(name="y"))
        assert names() == ["y"]


def test_local_settings_end_with_the_transaction(app: Flask) -> None:
    def timeout() -> Any:
        return db.session.scalar(sa.text("SHOW lock_timeout"))

    with db.sandbox():
        before = timeout()
        with db.transaction(lock_timeout="3s"):
            assert timeout() == "3s"
        assert timeout() == before
        with db.session.begin():
            db.session.execute(sa.text("SET LOCAL lock_timeout = '4s'"))
            db.session.execute(sa.text("SELECT set_config('app.user', :user, true)"), {"user": "me"})
            assert db.session.scalar(sa.text("SELECT current_setting('app.user')")) == "me"
        assert timeout() == before
        assert not db.session.scalar(sa.text("SELECT current_setting('app.user', true)"))
        with db.pinned():
            db.session.execute(sa.text("SET lock_timeout = '5s'"))
            db.session.execute(sa.text("CREATE TEMPORARY TABLE tmp (n int)"))
            assert timeout() == "5s"
        assert timeout() == before
        with db.pinned():
            db.session.execute(sa.text("CREATE TEMPORARY TABLE tmp (n int)"))


def test_views_and_the_test_share_what_they_see(app: Flask) -> None:
    @app.post("/items/<name>")
    @db.transactional
    def add(name: str) -> Any:
        db.session.add(Item(name=name))
        return ("", 400) if name == "bad" else "ok"

    with db.sandbox():
        client = app.test_client()
        assert client.post("/items/x").status_code == 200
        assert client.post("/items/bad").status_code == 400
        assert names() == ["x"]


def test_threads_take_turns(app: Flask) -> None:
    with db.sandbox(patience=0.2):
        caught: list[BaseException] = []

        def run() -> None:
            try:
                with app.app_context(), db.session.begin():
                    db.session.add(Item(name="y"))
            except BaseException as error:
                caught.append(error)

        with db.session.begin():
            db.session.add(Item(name="x"))
            db.session.flush()
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        assert isinstance(caught[0], errors.SandboxError)
        threads = [threading.Thread(target=run) for _ in range(1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert names() == ["x", "y"]


def test_sandboxes_nest(app: Flask) -> None:
    with db.sandbox():
        db.session.add(outer := Item(name="outer"))
        db.session.commit()
        for _ in range(2):
            with db.sandbox() as box:
                assert names() == ["outer"]
                with db.session.begin():
                    db.session.add(Item(name="inner"))
                    outer.note = "changed"
                box.fail_next_commit()
                assert names() == ["inner", "outer"]
            assert names() == ["outer"]
            assert outer.note is None
        with db.session.begin():
            outer.note = "mine"
        assert outer.note == "mine"


def test_a_sandbox_goes_around_transactions(app: Flask) -> None:
    with db.session.begin():
        db.session.execute(sa.select(Item))
        with pytest.raises(errors.ConfigurationError), db.sandbox():
            pass
    with db.sandbox(), db.session.begin():
        db.session.add(Item(name="x"))
        db.session.flush()
        with pytest.raises(errors.ConfigurationError), db.sandbox():
            pass


def test_an_open_block_is_rolled_back_at_the_end(app: Flask) -> None:
    with db.sandbox():
        db.session.begin()
        db.session.add(Item(name="x"))
        db.session.flush()
    assert names() == []


def test_plain_engines(database_url: str) -> None:
    engine = sa.create_engine(database_url)
    other = sa.create_engine(database_url)
    with sandbox(engine, other):
        with OptInSession(engine) as session:
            session.execute(sa.insert(Item).values(name="x"))
        with OptInSession(other) as session, session.begin():
            assert session.scalars(sa.select(Item.name)).all() == ["x"]
        with engine.begin() as connection:
            connection.execute(sa.insert(Item.__table__).values(name="y"))
    with OptInSession(engine) as session:
        assert session.scalars(sa.select(Item.name)).all() == []
    engine.dispose()
    other.dispose()


def test_two_phase_says_that_it_cannot(app: Flask) -> None:
    with db.sandbox(), db.engine.connect() as connection, pytest.raises(errors.SandboxError):
        transaction = connection.begin_twophase()
        connection.execute(sa.select(1))
        transaction.prepare()


def test_keep_leaves_the_rows(app: Flask, look: Look, caplog: pytest.LogCaptureFixture) -> None:
    with db.sandbox() as box:
        block()
        box.keep()
    assert look("select name from item") == ["x"]
    assert "kept" in caplog.text
    look("delete from item")


def test_only_postgresql(lite: sa.Engine) -> None:
    with pytest.raises(errors.UnsupportedDialect), sandbox(lite):
        pass


def test_overlapping_transactions_of_one_thread(app: Flask) -> None:
    """The inner one is undone with the outer one, and says so; a statement of the outer one runs within it."""
    with db.sandbox():
        with db.session.begin():
            db.session.add(Item(name="a"))
            db.session.flush()
            with db.engine.begin() as connection:
                connection.execute(sa.insert(Item.__table__).values(name="b"))
            db.session.add(Item(name="c"))
        assert names() == ["a", "b", "c"]
        inner = db.engine.connect()
        with pytest.raises(ZeroDivisionError), db.session.begin():
            db.session.add(Item(name="d"))
            db.session.flush()
            inner.execute(sa.insert(Item.__table__).values(name="e"))
            raise ZeroDivisionError
        with pytest.raises(sa.exc.DBAPIError) as caught:
            inner.execute(sa.select(1))
        assert sqlstate(caught.value) == "25P02"
        inner.close()
        assert names() == ["a", "b", "c"]


def test_errors_of_each_way_leave_the_sandbox_in_use(app: Flask) -> None:
    bad = "INSERT INTO item (name) VALUES (NULL)"
    with db.sandbox():
        for _ in range(2):
            with pytest.raises(sa.exc.IntegrityError):
                db.session.execute(sa.text(bad))
            with pytest.raises(sa.exc.IntegrityError), db.session.begin():
                db.session.execute(sa.text(bad))
            with pytest.raises(sa.exc.IntegrityError), db.engine.begin() as connection:
                connection.execute(sa.text(bad))
            with pytest.raises(sa.exc.IntegrityError), db.session.begin():
                db.session.execute(sa.insert(Item), [{"name": "x"}, {"name": "x"}])
            with pytest.raises(sa.exc.DBAPIError), db.session.begin():
                db.session.connection().exec_driver_sql("RELEASE SAVEPOINT nothing")
            raw = db.engine.raw_connection()
            cursor = raw.cursor()
            with pytest.raises(db.engine.dialect.loaded_dbapi.Error):
                cursor.execute(bad)
            with pytest.raises(db.engine.dialect.loaded_dbapi.Error):
                cursor.execute("SELECT 1")
            raw.rollback()
            cursor.execute("SELECT 1")
            assert cursor.fetchall() == [(1,)]
            raw.close()
            assert names() == []
            block()
            assert names() == ["x"]
            with db.session.begin():
                db.session.execute(sa.delete(Item))


def test_what_is_sent_is_counted_as_without_the_sandbox(app: Flask) -> None:
    with db.sandbox() as box:
        with box.record() as log:
            db.session.execute(sa.insert(Item).values(name="x"))
        assert (len(log.statements), log.round_trips) == (1, 1)
        with box.record() as log, db.session.begin():
            db.session.execute(sa.select(Item.id))
            with db.session.begin_nested():
                db.session.execute(sa.insert(Item).values(name="y"))
        assert (len(log.statements), log.round_trips) == (2, 3)
        assert "test_h_sandbox.py" in log.places[0]
        with box.record() as log, db.session.begin():
            pass
        assert log.round_trips == 0


def test_a_row_of_several_statements_is_two_messages_each(make_app: Any, wire: Any) -> None:
    with make_app().app_context(), db.sandbox():
        names()
        with wire.record() as log:
            for _ in range(10):
                names()
        assert log.round_trips <= 21  # psycopg prepares a statement when it runs for the sixth time


def test_the_servers_connections_are_as_before(app: Flask, backends: Callable[[], list[str]]) -> None:
    names()
    before = backends()
    for _ in range(3):
        with db.sandbox():
            block()
            with pytest.raises(ZeroDivisionError), db.session.begin():
                db.session.add(Item(name="y"))
                raise ZeroDivisionError
        assert len(backends()) <= len(before) + 1
        assert db.engine.pool.checkedout() == 0
    with db.sandbox(), db.pinned():
        db.session.execute(sa.text("SET lock_timeout = '7s'"))
        db.session.execute(sa.text("SELECT pg_advisory_lock(1)"))
    assert db.session.scalar(sa.text("SHOW lock_timeout")) != "7s"


def test_reads_do_not_go_to_a_replica(make_app: Any, database_url: str) -> None:
    app = make_app(FICTIVE_REPLICAS=database_url)
    with app.app_context(), db.sandbox():
        block()
        assert names() == ["x"]
        with db.session.begin():
            db.session.execute(sa.delete(Item))


@pytest.mark.parametrize(
    "options",
    [{"poolclass": sa.NullPool}, {"poolclass": sa.QueuePool}, {"pool_pre_ping": True},
     {"isolation_level": "SERIALIZABLE"}],
    ids=str,
)  # fmt: skip
def test_engines_of_the_applications_own_making(database_url: str, options: dict[str, Any]) -> None:
    engine = sa.create_engine(database_url, **options)
    copied = "COPY item (name) FROM STDIN"
    with sandbox(engine):
        with OptInSession(engine) as session:
            session.execute(sa.insert(Item).values(name="a"))
            with session.pinned():
                session.execute(sa.text("CREATE TEMPORARY TABLE tmp (n int)"))
                session.execute(sa.text("INSERT INTO tmp VALUES (1)"))
            rows = session.scalars(sa.select(Item).execution_options(yield_per=1))
            assert next(iter(rows)).name == "a"
            del rows  # never exhausted
            cleanup_tables(session, Item.metadata)
            assert session.scalars(sa.select(Item)).all() == []
        raw = engine.raw_connection()
        cursor = raw.cursor()
        if engine.dialect.driver == "psycopg":
            with cursor.copy(copied) as copy:  # type: ignore[attr-defined]
                copy.write_row(["copied"])
        else:
            cursor.copy_expert(copied, io.StringIO("copied\n"))  # type: ignore[attr-defined]
        raw.commit()
        raw.close()
        caught: list[BaseException] = []

        def run(number: int) -> None:
            try:
                for each in range(5):
                    with OptInSession(engine) as session, session.begin():
                        session.add(Item(name=f"{number}-{each}"))
                        session.flush()
            except BaseException as error:
                caught.append(error)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert caught == []
        engine.dispose()
        with engine.connect() as connection:
            assert connection.scalar(sa.select(sa.func.count()).select_from(Item)) == 26
    engine.dispose()


def test_what_the_driver_refuses_aborts_nothing(app: Flask) -> None:
    """As without the sandbox: the server never saw the statement."""
    with db.sandbox():
        with db.session.begin():
            db.session.add(Item(name="x"))
            db.session.flush()
            with pytest.raises(sa.exc.ProgrammingError):
                db.session.execute(sa.text("SELECT :a"), {"a": object()})
            db.session.add(Item(name="y"))
        with pytest.raises(sa.exc.ProgrammingError):
            db.session.execute(sa.text("SELECT :a"), {"a": object()})
        assert names() == ["x", "y"]


def test_a_failed_commit_is_one_message(app: Flask) -> None:
    with db.sandbox() as box:
        with box.record() as log, pytest.raises(sa.exc.IntegrityError), db.session.begin():
            db.session.execute(sa.insert(Booking), [{"seat": 1}, {"seat": 1}])
        assert "; ".join(log.messages).startswith("BEGIN; INSERT")
        assert log.messages[-1] == "COMMIT"
        with box.record() as log, pytest.raises(errors.TransactionAborted), db.session.begin():
            for _ in range(2):
                with pytest.raises(sa.exc.DBAPIError):
                    db.session.execute(sa.text("SELECT nonsense"))
        assert [message.split(";")[-1].strip() for message in log.messages] == ["SELECT nonsense"] * 2 + ["ROLLBACK"]


def test_nothing_uses_the_connection_of_a_sandbox_that_has_ended(app: Flask) -> None:
    with db.sandbox():
        pool = db.engine.pool
    with pytest.raises(errors.SandboxError, match="has ended"):
        pool.connect()


def test_a_sandbox_whose_connection_is_gone_ends_without_an_error(app: Flask, database: Any) -> None:
    with db.sandbox():
        block()
        with db.sandbox():
            names()
            database._end_others()
    assert names() == []


def test_set_transaction_read_only_as_the_first_statement(app: Flask) -> None:
    with db.sandbox(), db.engine.connect() as connection:
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        with pytest.raises(sa.exc.DBAPIError) as caught:
            connection.execute(sa.insert(Item.__table__).values(name="x"))
        assert sqlstate(caught.value) == "25006"


# -- what is sent -----------------------------------------------------------------------------------------------------


@pytest.fixture
def direct(database_url: str, wire: Wire) -> Iterator[sa.Engine]:
    """An engine whose messages can be seen as they are on the wire."""
    engine = sa.create_engine(wire.url(database_url))
    yield engine
    engine.dispose()


INSERT = sa.insert(Item.__table__)


def work(session: OptInSession) -> list[str]:
    session.execute(INSERT.values(name="outside"))
    with session.begin():
        session.execute(INSERT.values(name="first"))
        session.execute(INSERT.values(name="second"))
    return list(session.scalars(sa.select(Item.name).order_by(Item.name)))


def warm(engine: sa.Engine) -> None:
    """Let the driver know the texts, of which some travel alone the first time."""
    with sandbox(engine), OptInSession(engine) as session:
        work(session)


def test_h4_savepoints_and_their_ends_travel_with_statements(direct: sa.Engine, wire: Wire) -> None:
    warm(direct)
    with wire.record() as log, sandbox(direct), OptInSession(direct) as session:
        assert work(session) == ["first", "outside", "second"]
    assert messages(log) == [
        "BEGIN+SAVEPOINT+INSERT",
        *("SELECT", "SELECT"),  # whether a constraint is deferrable, and which: for the first commit
        "SET",  # CONSTRAINTS ALL IMMEDIATE, and back
        "SAVEPOINT+INSERT",
        "INSERT",
        "SET",
        "RELEASE+SAVEPOINT+SELECT",
        "ROLLBACK",
    ]
    assert log.connections_opened == 0


def test_h4_a_sandbox_that_is_not_used_sends_nothing(direct: sa.Engine, wire: Wire) -> None:
    warm(direct)
    with wire.record() as log, sandbox(direct), sandbox(direct):
        pass
    assert log.round_trips == 0


def test_h4_a_nested_sandbox_costs_one_round_trip(direct: sa.Engine, wire: Wire) -> None:
    """Where no constraint is deferrable, which is asked once; COMMIT needs none, and reads need no savepoint each."""
    warm(direct)
    with sandbox(direct):
        with OptInSession(direct) as session, session.begin():
            session.execute(sa.text("DROP TABLE booking"))
        for _ in range(2):
            with wire.record() as log, sandbox(direct), OptInSession(direct) as session:
                assert work(session) == ["first", "outside", "second"]
                assert session.scalar(sa.select(sa.func.count()).select_from(Item)) == 3
        assert messages(log) == [
            "SAVEPOINT+SAVEPOINT+INSERT",
            "SAVEPOINT+INSERT",
            "INSERT",
            "RELEASE+SAVEPOINT+SELECT",
            "SELECT",
            "ROLLBACK+RELEASE",
        ]
        with OptInSession(direct) as session:
            assert session.scalars(sa.select(Item.name)).all() == []


def test_h4_a_table_that_was_rolled_back_takes_its_constraints_along(app: Flask) -> None:
    with db.sandbox():
        with pytest.raises(ZeroDivisionError), db.session.begin():
            db.session.execute(sa.text("CREATE TABLE late (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)"))
            with db.engine.begin() as connection:
                connection.execute(INSERT.values(name="lost"))
            raise ZeroDivisionError
        block()
        assert names() == ["x"]


# -- errors and interrupts --------------------------------------------------------------------------------------------

WRONG = {
    "grammar": "SELEC 1",
    "name": "SELECT nonsense FROM item",
    "value": "SELECT 1 / (SELECT count(*) FROM item WHERE name = 'none')",
    "row": "INSERT INTO tag (id, label) VALUES (1, 'taken')",
}


def told(error: sa.exc.DBAPIError) -> tuple[Any, ...]:
    """What an error says of itself."""
    diagnosis = error.orig.diag  # type: ignore[union-attr]
    return type(error.orig), diagnosis.sqlstate, diagnosis.message_primary, diagnosis.statement_position


@pytest.mark.parametrize("wrong", WRONG.values(), ids=list(WRONG))
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_h4_an_error_is_as_without_the_sandbox_and_undoes_its_statement_only(
    app: Flask, wrong: str, first: bool, look: Look
) -> None:
    def run() -> tuple[Any, ...]:
        with pytest.raises(sa.exc.DBAPIError) as caught:
            db.session.execute(sa.text(wrong), execution_options={"fictive_outside": True})
        return told(caught.value)

    tag = sa.insert(Tag).values(id=1, label="taken")
    db.session.execute(tag)
    expected = run()
    db.session.execute(sa.delete(Tag))
    for _ in range(2):  # its text is known then
        with db.sandbox():
            if wrong is WRONG["row"]:
                db.session.execute(tag)
            if not first:
                db.session.execute(INSERT.values(name="x"))
            for _ in range(3):
                assert run() == expected
                with pytest.raises(sa.exc.DBAPIError) as caught, db.session.begin():
                    db.session.execute(INSERT.values(name="undone"))
                    with pytest.raises(sa.exc.DBAPIError) as nested, db.session.begin_nested():
                        db.session.execute(sa.text(wrong))
                    assert told(nested.value) == expected
                    db.session.execute(sa.text(wrong))
                assert told(caught.value) == expected
            assert names() == ([] if first else ["x"])


def test_h4_an_interrupt_in_a_test_leaves_the_sandbox_in_use_and_nothing_behind(direct: sa.Engine) -> None:
    faults = []
    for at in range(0, 5000, 7):
        striker = Striker({f"{OURS}/testing": "line"}, at)
        with sandbox(direct), OptInSession(direct) as session:
            with contextlib.suppress(Interrupt), striker():
                work(session)
            session.rollback() if session.in_transaction() else None
            with session.begin():
                session.execute(INSERT.values(name="after"))
            found = session.scalars(sa.select(Item.name).order_by(Item.name)).all()
            if found not in (["after"], ["after", "outside"], ["after", "first", "outside", "second"]):
                faults.append(f"{found} after an interrupt at {striker.struck}")
        if striker.struck is None:
            break
        assert direct.pool.checkedout() == 0
    assert at > 200
    assert faults == []


def test_h4_a_sandbox_whose_connection_was_lost_says_so(app: Flask, database: Any) -> None:
    with db.sandbox():
        block()
        database._end_others()
        for _ in range(2):  # a read that meets a lost connection is run again, on another one
            with pytest.raises(errors.SandboxError, match="was lost"):
                names()


def test_h4_a_pool_is_used_again_by_the_next_sandbox_while_nobody_listens_to_more(app: Flask) -> None:
    taken: list[str] = []

    def take(*args: Any) -> None:
        taken.append("taken")

    with db.sandbox():
        pool = db.engine.pool
        block()
    sa.event.listen(db.engine, "checkout", take)
    try:
        with db.sandbox():
            assert db.engine.pool is not pool
            block()
            assert taken
    finally:
        sa.event.remove(db.engine, "checkout", take)
    taken.clear()
    for _ in range(2):
        with db.sandbox():
            before, pool = pool, db.engine.pool
            block()
            assert names() == ["x"]
    assert pool is before
    assert taken == []


# -- what a statement may do besides what its first word says ---------------------------------------------------------


@pytest.mark.parametrize(
    "made_by",
    [
        "INSERT INTO tag (label) VALUES ('t'); CREATE TABLE late (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)",
        "SELECT make_late()",
    ],
    ids=["behind a row", "in a function"],
)
def test_h4_a_deferred_constraint_is_checked_whatever_made_it(app: Flask, made_by: str) -> None:
    with db.sandbox():
        with db.session.begin():
            db.session.execute(sa.text("DROP TABLE booking"))
            db.session.execute(
                sa.text(
                    "CREATE FUNCTION make_late() RETURNS void LANGUAGE sql AS "
                    "'CREATE TABLE late (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)'"
                )
            )
        block()  # a commit that has seen that no constraint is deferrable
        with db.session.begin():
            db.session.execute(sa.text(made_by))
        with pytest.raises(sa.exc.IntegrityError), db.session.begin():
            db.session.execute(sa.text("INSERT INTO late VALUES (1), (1)"))


def test_h4_set_session_authorization_ends_with_its_connection(app: Flask) -> None:
    with db.sandbox():
        with db.session.begin():
            db.session.execute(sa.text("SET SESSION AUTHORIZATION pg_read_all_data"))
            assert db.session.scalar(sa.text("SELECT current_user")) == "pg_read_all_data"
        assert db.session.scalar(sa.text("SELECT current_user")) != "pg_read_all_data"
        block()
        assert names() == ["x"]


def test_h4_a_setting_that_cannot_be_put_back_leaves_the_sandbox_in_use(app: Flask) -> None:
    with db.sandbox():
        with db.pinned():
            db.session.execute(sa.text("SET fictive.kept = 'a'"))
            db.session.execute(sa.text("SELECT pg_advisory_lock(1)"))
            (connection,) = db.engine.pool.source.connections[-1:]  # type: ignore[attr-defined]
            connection.settings["no such setting"] = ""
        block()
        assert names() == ["x"]
        held = f"SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND database = ({OWN})"
        assert db.session.scalars(sa.text(held)).all() == []


@pytest.mark.parametrize("scope", ["LOCAL", "SESSION"])
def test_h4_a_role_commits_without_a_right_to_the_schemas_of_deferred_constraints(app: Flask, scope: str) -> None:
    with db.sandbox():
        with db.session.begin():
            for command in (
                "CREATE ROLE guest", "GRANT ALL ON item, item_id_seq TO guest", "CREATE SCHEMA hidden",
                "CREATE TABLE hidden.late (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)",
            ):  # fmt: skip
                db.session.execute(sa.text(command))
        with db.session.begin():
            db.session.execute(sa.text(f"SET {scope} ROLE guest"))
            db.session.add(Item(name="x"))
        assert names() == ["x"]
        with pytest.raises(sa.exc.IntegrityError), db.session.begin():
            db.session.execute(sa.text("INSERT INTO hidden.late VALUES (1), (1)"))
            db.session.execute(sa.text(f"SET {scope} ROLE guest"))
        with db.pinned():
            db.session.execute(sa.text("SET ROLE guest"))
            with db.session.begin():
                db.session.add(Item(name="y"))
            assert db.session.scalar(sa.text("SELECT current_user")) == "guest"


@pytest.mark.parametrize("name", ["app.tenant", '"app.tenant"', 'app."tenant"', '"app"."tenant"'])
def test_h4_a_setting_does_not_reach_the_next_user_however_it_is_written(app: Flask, name: str) -> None:
    with db.sandbox():
        with db.session.begin():
            db.session.execute(sa.text(f"SET {name} = 'a'"))
        assert db.session.scalar(sa.text("SELECT current_setting('app.tenant', true)")) in (None, "")


def test_h4_a_setting_outlasts_a_local_one_before_it(app: Flask) -> None:
    show = sa.text("SHOW work_mem")
    with db.sandbox():
        before = db.session.scalar(show)
        with db.pinned():
            with db.session.begin():
                db.session.execute(sa.text("SET LOCAL work_mem = '3MB'"))
                db.session.execute(sa.text("SET work_mem = '5MB'"))
            assert db.session.scalar(show) == "5MB"
        assert db.session.scalar(show) == before


@pytest.mark.parametrize(
    "command", ["LOCK TABLE item", "SAVEPOINT s", "RELEASE s", "ROLLBACK TO s", "DECLARE c CURSOR FOR SELECT 1"]
)
def test_h4_what_needs_a_transaction_block_fails_without_one(app: Flask, command: str) -> None:
    def run() -> tuple[str | None, str]:
        with db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            with pytest.raises(sa.exc.DBAPIError) as caught:
                connection.exec_driver_sql(command)
            connection.exec_driver_sql("DECLARE held CURSOR WITH HOLD FOR SELECT 1")
            connection.exec_driver_sql("CLOSE held")
        return sqlstate(caught.value), str(caught.value.orig).partition("\n")[0]

    without = run()
    assert without[0] == "25P01"
    with db.sandbox():
        assert run() == without


# -- the driver's connection ------------------------------------------------------------------------------------------


@pytest.fixture
def raw(app: Flask) -> Iterator[Any]:
    """A connection as the driver's, in a sandbox."""
    with db.sandbox():
        pooled = db.engine.raw_connection()
        yield pooled.driver_connection
        pooled.close()
        block()  # the sandbox is in use still
        assert "x" in names()


def rows_of(raw: Any) -> list[str]:
    cursor = raw.cursor()
    cursor.execute("SELECT name FROM item ORDER BY name")
    return [name for (name,) in cursor.fetchall()]


def test_h4_composed_statements_are_read_as_text_is(raw: Any) -> None:
    if db.engine.dialect.driver == "psycopg":
        from psycopg import sql
    else:
        from psycopg2 import sql  # type: ignore[no-redef]
    cursor = raw.cursor()
    insert = sql.SQL("INSERT INTO {} (name) VALUES ({})")
    for name, end in (("a", "COMMIT"), ("b", "ROLLBACK"), ("c", "COMMIT")):
        cursor.execute(insert.format(sql.Identifier("item"), sql.Literal(name)))
        cursor.execute(sql.SQL("SAVEPOINT {}").format(sql.Identifier("s")))
        cursor.execute(insert.format(sql.Identifier("item"), sql.Literal("undone")))
        cursor.execute(sql.SQL("ROLLBACK TO SAVEPOINT {}").format(sql.Identifier("s")))
        cursor.execute(sql.SQL(end))
    cursor.execute(sql.SQL("SET LOCAL work_mem = {}").format(sql.Literal("3MB")))
    cursor.execute(sql.SQL("COMMIT"))
    cursor.execute(sql.SQL("SHOW work_mem"))
    assert cursor.fetchone() == ("4MB",)
    assert rows_of(raw) == ["a", "c"]


def test_h4_code_that_asks_which_driver_it_has_is_told_so(raw: Any) -> None:
    import psycopg
    from psycopg2.extensions import connection, cursor

    others = (connection, cursor) if db.engine.dialect.driver == "psycopg" else (psycopg.Connection, psycopg.Cursor)
    drivers = raw.shared.dbapi, raw.shared.dbapi.cursor()
    for ours, driver, other in zip((raw, raw.cursor()), drivers, others, strict=True):
        had, not_had = public_names(driver), public_names(other) - public_names(driver)
        assert [name for name in had if not hasattr(ours, name)] == []
        assert [name for name in not_had if hasattr(ours, name)] == []


def public_names(value: Any) -> set[str]:
    """Without those of two-phase transactions."""
    return {name for name in dir(value) if not name.startswith(("_", "tpc_")) and name != "xid"}


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_h4_psycopg2s_reset(raw: Any) -> None:
    cursor = raw.cursor()
    cursor.execute("INSERT INTO item (name) VALUES ('kept')")
    cursor.execute("SET work_mem = '5MB'")
    raw.commit()
    raw.readonly = True
    cursor.execute("SELECT 1")
    raw.reset()
    cursor.execute("SHOW work_mem")
    assert cursor.fetchone() == ("4MB",)
    cursor.execute("INSERT INTO item (name) VALUES ('undone')")
    raw.reset()
    assert rows_of(raw) == ["kept"]


def test_h4_the_kind_of_cursor_that_is_set_on_a_connection(raw: Any) -> None:
    if db.engine.dialect.driver == "psycopg":
        import psycopg

        raw.row_factory = psycopg.rows.dict_row
        raw.cursor_factory = psycopg.ClientCursor
        assert raw.cursor().mogrify("SELECT %s", [1]) == "SELECT 1"
    else:
        import psycopg2.extras

        raw.cursor_factory = psycopg2.extras.RealDictCursor
    cursor = raw.cursor()
    cursor.execute("SELECT 1 AS n")
    assert cursor.fetchone() == {"n": 1}
    raw.cursor_factory = raw.row_factory = None
    cursor = raw.cursor()
    cursor.execute("SELECT 1 AS n")
    assert cursor.fetchone() == (1,)


def test_h4_a_command_has_no_rows(raw: Any) -> None:
    cursor = raw.cursor()
    cursor.execute("SELECT 1")
    cursor.execute("COMMIT")
    assert cursor.description is None


@pytest.mark.parametrize(
    "command",
    [
        "SELECT 1",
        "selec 1",
        "ROLLBACK TO SAVEPOINT t",
        "SELECT %s",
        "-- nothing",
        "BEGIN",
        "SET TRANSACTION READ ONLY",
    ],
)
def test_h4_an_aborted_transaction_answers_as_without_the_sandbox(app: Flask, command: str) -> None:
    def run() -> str | None:
        with db.engine.connect() as connection:
            with pytest.raises(sa.exc.DBAPIError):
                connection.exec_driver_sql("SELECT 1/0")
            try:
                connection.exec_driver_sql(command, (1,) if "%" in command else None)
            except sa.exc.DBAPIError as error:
                return sqlstate(error)
            return "none"

    without = run()
    with db.sandbox():
        block()
        assert run() == without
        assert names() == ["x"]


@pytest.mark.parametrize("end", ["ROLLBACK TO SAVEPOINT s", "RELEASE SAVEPOINT s"])
def test_h4_read_only_since_a_savepoint_ends_with_it(raw: Any, end: str) -> None:
    cursor = raw.cursor()
    for command in ("BEGIN", "SAVEPOINT s", "SET TRANSACTION READ ONLY", end):
        cursor.execute(command)
    cursor.execute("INSERT INTO item (name) VALUES ('a')")
    raw.commit()
    assert rows_of(raw) == ["a"]


@pytest.mark.parametrize(
    "command",
    ["SET LOCAL transaction_read_only = on", "SELECT set_config('transaction_read_only', 'on', true)"],
)
def test_h4_read_only_as_a_setting_ends_with_its_transaction(raw: Any, command: str) -> None:
    cursor = raw.cursor()
    cursor.execute(command)
    with pytest.raises(Exception, match="in a read-only transaction"):
        cursor.execute("INSERT INTO item (name) VALUES ('refused')")
    raw.rollback()
    cursor.execute(command)
    raw.commit()
    cursor.execute("INSERT INTO item (name) VALUES ('a')")
    raw.commit()
    assert rows_of(raw) == ["a"]


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_h4_psycopgs_own_transaction_blocks(raw: Any) -> None:
    import psycopg

    def insert(*names: str) -> None:
        for name in names:
            raw.execute("INSERT INTO item (name) VALUES (%s)", (name,))

    with raw.transaction() as outer:
        insert("a")
        with pytest.raises(ZeroDivisionError), raw.transaction():
            insert("undone")
            raise ZeroDivisionError
        with pytest.raises(psycopg.errors.UniqueViolation), raw.transaction("its own"):
            insert("a")
        with raw.transaction(force_rollback=True):
            insert("undone")
        with raw.transaction():
            insert("b")
        with pytest.raises(psycopg.ProgrammingError, match="forbidden"):
            raw.commit()
    with raw.transaction() as outer, raw.transaction():
        insert("undone")
        raise psycopg.Rollback(outer)
    insert("c")
    with raw.transaction():
        insert("d")
    raw.rollback()
    assert rows_of(raw) == ["a", "b"]


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_h4_psycopgs_own_pipeline(raw: Any) -> None:
    import psycopg

    with raw.pipeline() as pipeline:
        raw.execute("INSERT INTO item (name) VALUES ('a')")
        cursor = raw.execute("SELECT name FROM item")
        pipeline.sync()
        assert cursor.fetchall() == [("a",)]
    raw.commit()
    with pytest.raises(psycopg.errors.UniqueViolation), raw.pipeline():
        raw.execute("INSERT INTO item (name) VALUES ('a')")
    raw.rollback()
    assert rows_of(raw) == ["a"]


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_h4_psycopgs_cursors_made_of_the_connection(raw: Any) -> None:
    """They ask the connection to wait for what they send."""
    import psycopg
    from psycopg.types import TypeInfo

    cursor = psycopg.Cursor(raw)
    cursor.execute("INSERT INTO item (name) VALUES ('a')")
    cursor.execute("COMMIT")
    cursor.executemany("INSERT INTO item (name) VALUES (%s)", [("b",), ("c",)])
    raw.rollback()
    assert [*cursor.stream("SELECT name FROM item")] == [("a",)]
    with cursor.copy("COPY item (name) FROM STDIN") as copy:
        copy.write("d\n")
    raw.commit()
    for refused in ("SELECT nothing", "INSERT INTO item (name) VALUES ('a')"):
        with pytest.raises(psycopg.Error):
            psycopg.ClientCursor(raw).execute(refused)
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            cursor.execute("SELECT 1")
        raw.rollback()
    with pytest.raises(psycopg.errors.UniqueViolation), cursor.copy("COPY item (name) FROM STDIN") as copy:
        copy.write("d\n")
    raw.rollback()
    assert rows_of(raw) == ["a", "d"]
    found = TypeInfo.fetch(raw, "int4")
    assert found is not None
    assert found.name == "int4"


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_h4_psycopg2s_encoding_ends_with_its_connection(app: Flask, look: Look) -> None:
    def encodings() -> tuple[str, Any]:
        with db.engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            return driver.encoding, connection.scalar(sa.text("SHOW client_encoding"))

    before = encodings()
    with db.sandbox():
        with db.engine.begin() as connection:
            connection.execute(sa.insert(Item).values(name="é"))
        pooled = db.engine.raw_connection()
        raw: Any = pooled.driver_connection
        raw.cursor().execute("INSERT INTO item (name) VALUES ('undone')")
        raw.set_client_encoding("LATIN1")
        assert rows_of(raw) == ["é"]
        with pytest.raises(Exception, match="encoding"):
            raw.set_client_encoding("nonsense")
        pooled.close()
        assert encodings() == before
        assert names() == ["é"]
        pooled = db.engine.raw_connection()
        pooled.driver_connection.cursor("named").execute("SELECT 1")  # type: ignore[union-attr]
        with pytest.raises(errors.SandboxError, match="Call it before"):
            pooled.driver_connection.set_client_encoding("LATIN1")  # type: ignore[union-attr]
        pooled.close()
        assert names() == ["é"]
    assert encodings() == before
    assert look("select count(*) from item") == [0]


def test_h4_an_app_that_a_test_makes_is_in_the_sandbox(
    app: Flask, make_app: Any, look: Look, database_url: str
) -> None:
    class Base(sa_orm.DeclarativeBase):
        pass

    def add(name: str) -> None:
        with made.app_context():
            other.session.execute(sa.insert(Item).values(name=name))

    other = DB(model_class=Base)
    with db.sandbox():
        db.session.execute(sa.insert(Item).values(name="first"))
        with db.sandbox():
            made = make_app(other, SQLALCHEMY_BINDS={"same": database_url})
            add("second")
            assert names() == ["first", "second"]
        assert names() == ["first"]
        add("third")
        assert names() == ["first", "third"]
    assert look("select count(*) from item") == [0]
    with made.app_context():
        assert other.session.scalars(sa.select(Item.name)).all() == []  # by the pool of its own
        assert {engine.pool.checkedout() for engine in other.engines.values()} == {0}  # type: ignore[attr-defined]

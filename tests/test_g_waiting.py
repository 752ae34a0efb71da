"""Contract G: waiting until a row changes, by looking at it again and by being told."""

from __future__ import annotations

import os
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from alembic.migration import MigrationContext
from alembic.operations import Operations
from flask import Flask
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import fictive.migrations
from fictive.changes import listener as listening_module
from fictive.changes.listener import State, Waiter, listening
from fictive.changes.notify_triggers import channel_of, create_statements
from fictive.errors import ConfigurationError, NotFoundError, RowChangeTimeout, SnapshotIsFixed, UnknownAttribute
from fictive.sqlalchemy import OptInSession, TakeTurnsPool, notify_changes, wait_for_row_change
from fictive.testing import postgres
from fictive.testing.wire import Wire
from tests.models import Item, db
from tests.wirelog import messages

Look = Callable[..., list[Any]]
LISTENER = (
    " from pg_stat_activity where query like '%pg_trigger%' and pid <> pg_backend_pid()"
    " and datname = current_database()"
)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "fictive-listening"]
    assert not listening()


class Background:
    """A function in a thread; `result()` waits for what it returns or raises."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._found: list[Any] = []
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._found.append(self._work())
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self.thread.join(30)
        assert not self.thread.is_alive()
        if self._error is not None:
            raise self._error
        return self._found[0]


def until(condition: Callable[[], Any]) -> None:
    """Wait for what another thread does."""
    for _ in range(4000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came to be")


@pytest.fixture
def item(app: Flask, look: Look) -> Any:
    look("insert into item (name, note) values ('one', 'first')")
    return db.session.get(Item, 1)


# G1: looking again and again


def test_g1_a_change_since_the_object_was_read_counts(item: Any, wire: Wire, look: Look) -> None:
    look("update item set note = 'second'")
    with wire.record() as log:
        assert db.wait_for_row_change(Item, 1) is item
    assert messages(log) == ["SELECT", "SELECT"]  # one look, and the object
    assert item.note == "second"
    look("update item set name = 'two'")
    item.note = "not saved"
    assert db.wait_for_row_change(Item, 1, columns=[Item.name, "note"], timeout="1min").name == "two"
    assert item.note == "not saved"
    with pytest.raises(RowChangeTimeout):  # what was changed here is no change there
        db.wait_for_row_change(Item, 1, timeout="10ms")
    db.session.rollback()


def test_g1_each_look_is_one_statement_and_no_connection_is_held(
    item: Any, wire: Wire, look: Look, app: Flask
) -> None:
    pool = db.engine.pool
    engine = db.engine

    def work() -> Any:
        with app.app_context():  # nothing is loaded here: the first look says what is to change
            return db.wait_for_row_change(Item, 1, columns=["note"], interval="20ms", timeout=20).note

    with wire.record() as log:
        waiting = Background(work)
        until(lambda: len(log.exchanges) >= 3)
        for _ in range(3):
            until(lambda: pool.checkedout() == 0)  # type: ignore[attr-defined]
        look("update item set name = 'other'")
        seen = len(log.exchanges)
        until(lambda: len(log.exchanges) > seen + 1)
        look("update item set note = 'second'")
        assert waiting.result() == "second"
    assert {*messages(log), ""} == {"SELECT", ""}  # psycopg prepares it once
    assert all("item.note" in text and "item.name" not in text for text in log.statements[:-1])
    assert engine.pool is pool


def test_g1_missing_deleted_and_too_late(item: Any, look: Look, app: Flask, wire: Wire) -> None:
    with pytest.raises(NotFoundError, match="Item 2 was not found"):
        db.wait_for_row_change(Item, 2)
    with wire.record() as log, pytest.raises(TimeoutError, match="Item 1 did not change within"):
        db.wait_for_row_change(Item, 1, interval=60, timeout=0.5)
    assert messages(log) == ["SELECT", "SELECT"]  # at once, and a last time

    def work() -> None:
        with app.app_context():
            db.wait_for_row_change(Item, 1, interval="10ms", timeout=20)

    with wire.record() as log:
        waiting = Background(work)
        until(lambda: len(log.exchanges) >= 2)
        look("delete from item")
        with pytest.raises(NotFoundError, match="Item 1 was deleted"):
            waiting.result()
    assert sa.inspect(item).persistent
    with pytest.raises(NotFoundError, match="Item 1 was deleted"):  # since the session loaded it
        db.wait_for_row_change(Item, 1)


@pytest.mark.parametrize("make", [sa_orm.Session, OptInSession])
def test_g1_an_error_leaves_the_transaction_of_a_connection_that_the_session_is_bound_to(
    make: Any, item: Any, look: Look
) -> None:
    class Base(DeclarativeBase):
        pass

    class Wrong(Base):
        __tablename__ = "item"
        id: Mapped[int] = mapped_column(primary_key=True)
        missing: Mapped[int]

    with db.engine.begin() as connection:
        connection.execute(sa.insert(Item).values(name="kept"))
        with make(connection) as session:
            with pytest.raises(sa.exc.ProgrammingError, match="missing"):
                wait_for_row_change(session, Wrong, 1, timeout=1)
            with pytest.raises(NotFoundError, match="Item 7 was not found"):
                wait_for_row_change(session, Item, 7, timeout=1)
        assert connection.scalar(sa.select(sa.func.count(Item.id))) == 2
    assert look("select count(*) from item") == [2]


def test_g1_in_a_transaction(item: Any, look: Look, wire: Wire) -> None:
    for level in ("REPEATABLE READ", "SERIALIZABLE"):
        with db.session.transaction(isolation_level=level), pytest.raises(SnapshotIsFixed):
            db.wait_for_row_change(Item, 1)
    with wire.record() as log, db.session.begin():
        with pytest.raises(RowChangeTimeout):
            db.wait_for_row_change(Item, 1, interval=60, timeout=0.5)
        look("update item set note = 'second'")
        assert db.wait_for_row_change(Item, 1, timeout=20).note == "second"
    assert messages(log) == ["BEGIN+SELECT", "SELECT", "SELECT", "SELECT", "COMMIT"]


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_g1_wrong_arguments_fail_at_the_call(item: Any, wire: Wire) -> None:
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (TypeError, "mapped class", ("item", 1), {}),
        (TypeError, "no primary key of Item", (Item, "1"), {}),
        (TypeError, "no primary key of Item", (Item, (1, 2)), {}),
        (TypeError, "no primary key of Item", (Item, None), {}),
        (UnknownAttribute, "did you mean 'note'", (Item, 1), {"columns": ["note", "notes"]}),
        (UnknownAttribute, "not a mapped column", (Item, 1), {"columns": [Item.tags]}),
        (TypeError, "expected a list", (Item, 1), {"columns": "note"}),
        (TypeError, "is empty", (Item, 1), {"columns": []}),
        (TypeError, "no attribute", (Item, 1), {"columns": [7]}),
        (ConfigurationError, "interval = 0", (Item, 1), {"interval": 0}),
        (ConfigurationError, "timeout = 'soon'", (Item, 1), {"timeout": "soon"}),
    ]
    with wire.record() as log:
        for error, message, arguments, options in cases:
            with pytest.raises(error, match=message):
                db.wait_for_row_change(*arguments, **options)
        with pytest.raises(TypeError, match=r"db\.session"):
            wait_for_row_change(db, Item, 1)
        for wrong in ("item", Item.__table__):
            with pytest.raises(TypeError, match="mapped class"):
                notify_changes(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="expected a list"):
            fictive.migrations.CreateNotifyChanges("item", "id")
    assert not log.exchanges


def test_g1_a_plain_session_holds_no_connection_either(item: Any, database_url: str, wire: Wire, look: Look) -> None:
    engine = sa.create_engine(wire.url(database_url))
    engine.connect().close()
    with sa_orm.Session(engine) as session, wire.record() as log:
        with pytest.raises(RowChangeTimeout):
            wait_for_row_change(session, Item, 1, interval=60, timeout=0.5)
        assert not session.in_transaction()
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        assert messages(log) == ["SELECT", "SELECT"]
        mine = session.get(Item, 1)
        session.commit()
        session.refresh(mine)
        session.rollback()
        session.refresh(mine)
        look("update item set note = 'second'")
        assert wait_for_row_change(session, Item, 1, timeout=20).note == "second"
    engine.dispose()


def test_g1_sqlite() -> None:
    engine = sa.create_engine("sqlite://", poolclass=TakeTurnsPool)
    Announced.metadata.create_all(engine, tables=[Announced.__table__])  # type: ignore[list-item]  # and no trigger
    with sa_orm.Session(engine) as session:
        session.execute(sa.insert(Announced).values(id=1, state="new"))
        session.commit()
        with pytest.raises(RowChangeTimeout):
            wait_for_row_change(session, Announced, 1, timeout="10ms")
        session.get(Announced, 1)
        with pytest.raises(SnapshotIsFixed):
            wait_for_row_change(session, Announced, 1, timeout="10ms")
        with pytest.raises(NotImplementedError, match=r"notify_changes\(\) needs PostgreSQL"):
            notify_changes(Announced, session)
    engine.dispose()


# G2: being told


class Base(DeclarativeBase):
    pass


class Announced(Base):
    __tablename__ = "announced"
    id: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str]
    seen: Mapped[int] = mapped_column(default=0)


class Awkward(Base):
    """Names that have to be quoted, a key of two columns, a type without equality."""

    __tablename__ = 'a "50%" table\'s name'
    __table_args__ = {"schema": "sel ect"}
    tenant: Mapped[str] = mapped_column("the tenant", primary_key=True)
    number: Mapped[int] = mapped_column('"no%"', primary_key=True)
    data: Mapped[Any] = mapped_column(sa.JSON, nullable=True)


class Shape(Base):
    """Two tables to a row."""

    __tablename__ = "shape"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "shape"}


class Circle(Shape):
    __tablename__ = "circle"
    id: Mapped[int] = mapped_column(sa.ForeignKey("shape.id"), primary_key=True)
    radius: Mapped[int]
    __mapper_args__ = {"polymorphic_identity": "circle"}


for _model in (Announced, Awkward, Circle):
    notify_changes(_model)


@pytest.fixture
def engine(database_url: str, wire: Wire) -> Iterator[sa.Engine]:
    """On a database with the tables above, a row in each."""
    engine = sa.create_engine(wire.url(database_url), pool_size=10)
    with engine.begin() as connection:
        connection.execute(sa.text('create schema "sel ect"'))
    Base.metadata.create_all(engine)
    with OptInSession(engine) as session:
        session.add_all([Announced(state="new"), Awkward(tenant='x"y', number=1, data={}), Circle(radius=1)])
        session.commit()
    yield engine
    engine.dispose()


def _waiting(engine: sa.Engine, model: type[Any], pk: Any, **options: Any) -> types.SimpleNamespace:
    """Somebody who waits, once it is known that nothing would be missed."""
    asleep = threading.Event()

    def work() -> Any:
        with OptInSession(engine) as session:
            row = session.get(model, pk)
            asleep.set()
            found = wait_for_row_change(session, model, pk, interval=3600, **options)
            assert found is row
            return found

    before = sum(len(listener._waiters) for listener in listening())
    waiting = Background(work)
    assert asleep.wait(60)
    until(
        lambda: (
            not waiting.thread.is_alive()
            or len([waiter for listener in listening() for waiter in listener._waiters if waiter.key]) > before
        )
    )
    return types.SimpleNamespace(result=waiting.result, thread=waiting.thread)


def test_g2_an_answered_waiter_looks_once() -> None:
    waiter = Waiter(())
    woken: list[bool] = []
    waiter.answered.set = lambda: woken.append(waiter.woken.is_set())  # type: ignore[method-assign]
    waiter.set_state(State.LIVE)
    assert woken == [True]  # set later, it would make a waiter that has looked already look again


def test_g2_told_by_the_database_and_nothing_is_sent_meanwhile(engine: sa.Engine, wire: Wire, look: Look) -> None:
    look("insert into announced (state, seen) values ('other', 0), ('of no waiter', 0)")
    waiting = _waiting(engine, Announced, 1, columns=["state"])
    listeners = look("select count(*)" + LISTENER)
    assert listeners == [1]
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    with wire.record() as log:
        other = _waiting(engine, Announced, 2)
        until(lambda: len(log.exchanges) == 2)  # the object, and its first look
        assert [text for text in log.statements if "announced.state" not in text] == []
        count = len(log.exchanges)
        look("update announced set state = 'moved' where id = 3")  # not a row that is waited for
        look("update announced set state = 'new' where id = 1")  # changes nothing
        look("update announced set seen = 1 where id = 1")  # not the column: one look
        until(lambda: len(log.exchanges) == count + 1)
        look("update announced set state = 'done' where id = 1")
        assert waiting.result().state == "done"
        assert len(log.exchanges) == count + 3
        assert other.thread.is_alive()
        look("delete from announced where id = 2")
        with pytest.raises(NotFoundError):
            other.result()
    assert log.connections_opened <= 2
    assert len(listening()) == 1  # both were told by one
    look("truncate announced")


def test_g2_every_row_and_table_has_its_name(engine: sa.Engine, look: Look) -> None:
    awkward = _waiting(engine, Awkward, ('x"y', 1))
    circle = _waiting(engine, Circle, 1)
    look("""update "sel ect"."a ""50%%"" table's name" set data = '{"a": 1}'""".replace("%%", "%"))
    assert awkward.result().data == {"a": 1}
    look("update circle set radius = 2")  # in the second table of its row
    assert circle.result().radius == 2
    truncated = _waiting(engine, Announced, 1)
    look("truncate announced")
    with pytest.raises(NotFoundError):
        truncated.result()


def test_g2_a_change_before_the_wait_and_between_two(engine: sa.Engine, look: Look) -> None:
    with OptInSession(engine) as session:
        row = session.get(Announced, 1)
        for state in ("a", "b", "c"):
            look("update announced set state = %s", state)
            assert wait_for_row_change(session, Announced, 1, interval=3600, timeout=20) is row
            assert row.state == state
        with pytest.raises(RowChangeTimeout):
            wait_for_row_change(session, Announced, 1, interval=3600, timeout="20ms")
        assert len(listening()) == 1


def test_g2_no_trigger_means_polling(engine: sa.Engine, look: Look, caplog: pytest.LogCaptureFixture) -> None:
    listening_module._warned.clear()
    look("drop trigger fictive_notify_changes on announced")
    with OptInSession(engine) as session:
        row = session.get(Announced, 1)
        waiting = Background(lambda: wait_for_row_change(session, Announced, 1, interval="10ms", timeout=20))
        look("update announced set state = 'polled'")
        assert waiting.result() is row
        assert row.state == "polled"
        notify_changes(Announced, session)  # once more, in place of what is left of it
    assert "has no trigger" in caplog.text
    told = _waiting(engine, Announced, 1)
    look("update announced set state = 'told'")
    assert told.result().state == "told"
    with engine.begin() as connection:
        notify_changes(Announced, connection)


def test_g2_a_trigger_that_went_between_two_waits(
    engine: sa.Engine, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection that listens is still there, and has seen the trigger, when a migration takes it away."""
    monkeypatch.setattr(listening_module, "TRUST", 0)
    with OptInSession(engine) as session:
        row = session.get(Announced, 1)
        look("update announced set state = 'told'")
        wait_for_row_change(session, Announced, 1, interval=3600)
        for gone in ("drop trigger fictive_notify_changes on announced", "alter table announced rename to other"):
            look(gone)
            if "rename" in gone:
                look("create table announced as table other")
            waiting = Background(lambda: wait_for_row_change(session, Announced, 1, interval="10ms", timeout=20))
            until(lambda: any(waiter.state is State.POLLING for each in listening() for waiter in each._waiters))
            look("update announced set state = %s", gone)
            assert waiting.result() is row
            assert row.state == gone


def test_g2_the_listener_goes_when_nobody_waits(
    engine: sa.Engine, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening_module, "LINGER", 0.01)
    waiting = _waiting(engine, Announced, 1)
    assert len(listening()) == 1
    look("update announced set state = 'done'")
    waiting.result()
    until(lambda: not listening())
    until(lambda: not look("select 1" + LISTENER))


def test_g2_dispose_ends_it_and_waiters_poll(engine: sa.Engine, look: Look) -> None:
    def work() -> Any:
        with OptInSession(engine) as session:
            return wait_for_row_change(session, Announced, 1, interval="10ms", timeout=20)

    waiting = Background(work)
    until(lambda: any(waiter.key for listener in listening() for waiter in listener._waiters))
    engine.dispose()
    assert not listening()
    look("update announced set state = 'polled'")
    assert waiting.result().state == "polled"


def test_g2_a_killed_connection_is_made_again(engine: sa.Engine, look: Look) -> None:
    waiting = _waiting(engine, Announced, 1)
    (pid,) = look("select pid" + LISTENER)
    look("select pg_terminate_backend(%s, 5000)", pid)
    until(lambda: look("select 1" + LISTENER))
    look("update announced set state = 'told'")
    assert waiting.result().state == "told"


@pytest.mark.any_sqlalchemy
def test_g2_a_restart_of_the_server(driver: str) -> None:
    with postgres.private_server() as server:
        engine = sa.create_engine(server.url(driver=driver))
        Announced.metadata.create_all(engine, tables=[Announced.__table__])  # type: ignore[list-item]
        with OptInSession(engine) as session, session.begin():
            session.add(Announced(state="new"))
        waiting = _waiting(engine, Announced, 1)
        server.restart()
        until(lambda: any(waiter.answered.is_set() for listener in listening() for waiter in listener._waiters))
        with OptInSession(engine) as session:
            session.execute(sa.update(Announced).values(state="after"))
        assert waiting.result().state == "after"
        engine.dispose()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_g2_a_forked_child_has_its_own(engine: sa.Engine, look: Look) -> None:
    waiting = _waiting(engine, Announced, 1)
    child = os.fork()
    if not child:
        try:
            with OptInSession(engine) as session:
                assert not listening()
                row = session.get(Announced, 1)
                with engine.begin() as another:
                    another.execute(sa.update(Announced).values(seen=1))
                assert wait_for_row_change(session, Announced, 1, timeout=20) is row
                assert row.seen == 1
            engine.dispose()
            assert not listening()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert waiting.result().seen == 1  # the parent's connection was left alone


def test_g2_200_waiters_have_one_connection(engine: sa.Engine, look: Look) -> None:
    look("insert into announced select n, 'new', 0 from generate_series(2, 200) n")
    ready, done = threading.Semaphore(0), []

    def work(number: int) -> None:
        with OptInSession(engine) as session:
            ready.release()
            done.append(wait_for_row_change(session, Announced, number, interval=3600, timeout=20).id)

    waiting = [Background(lambda n=n: work(n)) for n in range(1, 201)]  # type: ignore[misc]
    until(lambda: sum(bool(waiter.key) for listener in listening() for waiter in listener._waiters) == 200)
    assert len([thread for thread in threading.enumerate() if thread.name == "fictive-listening"]) == 1
    look("update announced set state = 'done' where id <= 3")
    until(lambda: len(done) == 3)
    assert set(done) == {1, 2, 3}
    look("update announced set state = 'done'")
    for each in waiting:
        each.result()
    assert sorted(done) == list(range(1, 201))


def test_g2_alembic_operations(engine: sa.Engine, look: Look) -> None:
    triggers = "select tgname from pg_trigger where tgrelid = 'item'::regclass and not tgisinternal order by 1"
    create = fictive.migrations.CreateNotifyChanges("item", ["id"])
    with engine.begin() as connection:
        operations = Operations(MigrationContext.configure(connection))
        operations.create_notify_changes("item", ["id"])  # type: ignore[attr-defined]
    assert look(triggers) == ["fictive_notify_changes", "fictive_notify_changes_truncate"]
    with engine.begin() as connection:
        operations = Operations(MigrationContext.configure(connection))
        operations.invoke(create.reverse())
    assert look(triggers) == []
    assert look("select count(*) from pg_proc where proname = 'fictive_notify_item'") == [0]
    assert create.reverse().reverse().table_name == "item"


def test_g2_names_and_payloads_that_are_too_long() -> None:
    long = sa.Table("t" * 60, sa.MetaData(), sa.Column("id", sa.Text, primary_key=True), schema="s" * 60)
    other = sa.Table("t" * 60, sa.MetaData(), sa.Column("id", sa.Text, primary_key=True), schema="r" * 60)
    assert len(channel_of(long)) <= 63
    assert channel_of(long) != channel_of(other)
    keyless = sa.Table("keyless", sa.MetaData(), sa.Column("id", sa.Text))
    with pytest.raises(ValueError, match="no primary key"):
        str(create_statements(keyless)[0].compile(dialect=sa.create_engine("postgresql+psycopg2://").dialect))


def test_g2_a_key_that_does_not_fit_wakes_everyone(engine: sa.Engine, look: Look) -> None:
    look("""insert into "sel ect"."a ""50%%"" table's name" values (repeat('x', 9000), 2, '{}')""".replace("%%", "%"))
    waiting = _waiting(engine, Awkward, ("x" * 9000, 2))
    look(
        """update "sel ect"."a ""50%%"" table's name" set data = '[]' where "the tenant" like 'xx%%'""".replace(
            "%%", "%"
        )
    )
    assert waiting.result().data == []

"""G2: waiting for new rows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from alembic.autogenerate import api as alembic_api
from alembic.migration import MigrationContext
from alembic.operations import Operations
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import fictive.migrations
from fictive.changes.listener import State, listening
from fictive.errors import ConfigurationError, RowChangeTimeout, SnapshotIsFixed, UnsupportedDialect
from fictive.flask_sqlalchemy import OptInTransactionMixin
from fictive.sqlalchemy import OptInSession, claim, notify_changes, wait_for_rows
from fictive.testing.wire import Wire
from tests.test_g_waiting import Background, until

Look = Callable[..., list[Any]]


class Base(DeclarativeBase):
    pass


class Task(Base):
    __tablename__ = "task"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    done: Mapped[bool] = mapped_column(default=False)


class Mail(Task):
    __tablename__ = "mail"
    id: Mapped[int] = mapped_column(sa.ForeignKey("task.id"), primary_key=True)


class Quiet(Base):
    __tablename__ = "quiet"
    id: Mapped[int] = mapped_column(primary_key=True)


notify_changes(Mail, inserts=True)
WAITING = sa.select(Task).where(~Task.done).order_by(Task.id)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    for listener in listening():
        listener.end()


@pytest.fixture
def engine(database_url: str, wire: Wire) -> Iterator[sa.Engine]:
    engine = sa.create_engine(wire.url(database_url))
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def live() -> int:
    return sum(waiter.state is State.LIVE for listener in listening() for waiter in listener._waiters)


def _waiting(engine: sa.Engine, rows: Any, **options: Any) -> Background:
    """Somebody who waits, once nothing would be missed."""

    def work() -> Any:
        with OptInSession(engine) as session:
            return wait_for_rows(session, rows, **options)

    before = live()
    waiting = Background(work)
    until(lambda: live() > before or not waiting.thread.is_alive())
    return waiting


def test_g2_an_insert_wakes_who_waits_for_the_model(engine: sa.Engine, look: Look, wire: Wire) -> None:
    look("insert into task (kind, done) values ('old', false)")
    task, mail = _waiting(engine, Task), _waiting(engine, Mail)
    with wire.record() as log:
        look("update task set done = true")
        look("insert into task (kind, done) select 'new', false from generate_series(1, 100)")
        task.result()
        assert mail.thread.is_alive()  # a row of the parent is not one of its own
        look("insert into mail select max(id) from task")
        mail.result()
    assert log.statements == []


def test_g2_a_query_is_run_when_rows_come(engine: sa.Engine, look: Look, wire: Wire) -> None:
    with wire.record() as log:
        waiting = _waiting(engine, WAITING, interval=3600)

        def looks() -> int:
            return len([text for text in log.statements if "FROM task" in text])

        until(lambda: looks() == 1)
        look("insert into task (kind, done) values ('done', true)")
        until(lambda: looks() == 2)
        look("insert into task (kind, done) values ('new', false)")
        waiting.result()
    assert looks() == 3
    with wire.record() as log, OptInSession(engine) as session:
        wait_for_rows(session, WAITING, interval=3600)
    assert log.round_trips == 1


@pytest.mark.parametrize(
    "query", [sa.select(Quiet), claim(sa.select(Quiet)), sa.select(Mail)], ids=["select", "claim", "inherited"]
)
def test_g2_a_query_without_a_condition_waits_for_a_row_too(
    engine: sa.Engine, look: Look, query: sa.Select[Any]
) -> None:
    with OptInSession(engine) as session:
        with pytest.raises(RowChangeTimeout):
            wait_for_rows(session, query, interval="10ms", timeout="20ms")
        look("insert into quiet default values")
        look("with t as (insert into task (kind, done) values ('mail', false) returning id) insert into mail table t")
        wait_for_rows(session, query, interval="10ms")


def test_g2_rows_that_others_work_on_do_not_count(engine: sa.Engine, look: Look) -> None:
    look("insert into task (kind, done) values ('a', false)")
    with OptInSession(engine) as worker, OptInSession(engine) as session:
        with worker.begin():
            assert worker.scalars(claim(WAITING)).one()
            with pytest.raises(RowChangeTimeout):
                wait_for_rows(session, claim(WAITING), timeout="50ms", interval="10ms")
            waiting = Background(lambda: wait_for_rows(session, claim(WAITING), interval="10ms"))
        waiting.result()  # given back, which no INSERT tells


def test_g2_a_queue_misses_nothing_and_wakes_at_once(engine: sa.Engine, look: Look) -> None:
    """Its interval is an hour: each task is taken since its INSERT was told."""
    taken: list[int] = []
    ended = threading.Event()

    def worker() -> None:
        with OptInSession(engine) as session:
            while not ended.is_set():
                with session.begin():
                    for task in session.scalars(claim(WAITING.where(Task.kind == "x"), limit=5)):
                        taken.append(task.id)
                        task.done = True
                wait_for_rows(session, claim(WAITING), interval=3600)

    workers = [threading.Thread(target=worker) for _ in range(4)]
    for each in workers:
        each.start()
    with OptInSession(engine) as session:
        for number in range(1, 51):
            session.add(Task(id=number, kind="x"))
            session.commit()
            until(lambda number=number: len(taken) >= number)  # type: ignore[misc]
        until(lambda: look("select count(*) from task where not done") == [0])
        ended.set()
        look("insert into task (id, kind, done) select n, 'end', false from generate_series(1001, 1004) n")
    for each in workers:
        each.join(20)
        assert not each.is_alive()
    assert sorted(taken) == list(range(1, 51))


def test_g2_model_needs_its_trigger(engine: sa.Engine, look: Look) -> None:
    with OptInSession(engine) as session:
        with pytest.raises(ConfigurationError, match=r"notify_changes\(Quiet, inserts=True\)"):
            wait_for_rows(session, Quiet)
        look("drop trigger fictive_notify_changes_insert on mail")
        with pytest.raises(ConfigurationError, match=r"notify_changes\(Mail, inserts=True\)"):
            wait_for_rows(session, Mail)
        waiting = Background(lambda: wait_for_rows(session, sa.select(Quiet), interval="10ms"))
        look("insert into quiet default values")
        waiting.result()


def test_g2_a_lost_listener_wakes_since_rows_may_have_come(
    engine: sa.Engine, look: Look, caplog: pytest.LogCaptureFixture
) -> None:
    waiting = _waiting(engine, Task)
    look(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where query ~* 'listen|pg_trigger' and pid <> pg_backend_pid()"
    )
    waiting.result()
    assert not [each for each in caplog.records if each.exc_info]


def test_g2_in_transactions_and_plain_sessions(engine: sa.Engine, look: Look) -> None:
    with OptInSession(engine) as session:
        with session.begin():
            with pytest.raises(RowChangeTimeout):
                wait_for_rows(session, WAITING, timeout="20ms")
        with session.begin():
            session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            with pytest.raises(SnapshotIsFixed):
                wait_for_rows(session, WAITING, timeout="20ms")
    with sa_orm.Session(engine) as session:
        with pytest.raises(RowChangeTimeout):
            wait_for_rows(session, WAITING, timeout="20ms")
        assert not session.in_transaction()
        look("insert into task (kind, done) values ('a', false)")
        wait_for_rows(session, WAITING, timeout="10s")
        with pytest.raises(TypeError):
            wait_for_rows(session, sa.select(sa.literal(1)))
        with pytest.raises(ConfigurationError):
            wait_for_rows(session, WAITING, interval="soon")


def test_g2_sqlite(lite: sa.Engine) -> None:
    with sa_orm.Session(lite) as session:
        with pytest.raises(UnsupportedDialect):
            wait_for_rows(session, Task)


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_g2_migrations_know_of_inserts(engine: sa.Engine, look: Look) -> None:
    triggers = "select tgname from pg_trigger where tgrelid = 'quiet'::regclass and not tgisinternal order by 1"
    create = fictive.migrations.CreateNotifyChanges("quiet", ["id"], inserts=True)
    with engine.begin() as connection:
        operations = Operations(MigrationContext.configure(connection))
        operations.create_notify_changes("quiet", ["id"])  # type: ignore[attr-defined]
        operations.create_notify_changes("quiet", ["id"], inserts=True)  # type: ignore[attr-defined]
    assert look(triggers) == [
        "fictive_notify_changes",
        "fictive_notify_changes_insert",
        "fictive_notify_changes_truncate",
    ]
    with engine.begin() as connection:
        Operations(MigrationContext.configure(connection)).invoke(create.reverse())
    assert look(triggers) == []
    assert create.reverse().reverse().inserts
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"target_metadata": Base.metadata})
        assert alembic_api.compare_metadata(context, Base.metadata) is not None


def test_g2_db_method(make_app: Callable[..., Flask], look: Look) -> None:
    class DB(OptInTransactionMixin, SQLAlchemy):
        pass

    class Models(DeclarativeBase):
        pass

    db = DB(model_class=Models)

    class Note(db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)

    notify_changes(Note)
    notify_changes(Note, inserts=True)
    app = make_app(db)
    with app.app_context():
        db.create_all()

        def work() -> None:
            with app.app_context():
                db.wait_for_rows(Note)

        waiting = Background(work)
        until(lambda: live() or not waiting.thread.is_alive())
        db.session.add(Note())
        db.session.commit()
        waiting.result()

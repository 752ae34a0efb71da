"""Contract A21: SQLite, file and memory, with and without Flask; and a driver fictive knows nothing of, pg8000.

"The wire" of SQLite is what its trace callback reports: every statement that runs, those of the driver included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask

from fictive.errors import (
    AlreadyCommittedWarning,
    ConfigurationError,
    ConnectionBusy,
    FictiveError,
    TransactionAborted,
    TransactionAlreadyBegun,
    TransactionEnded,
    TransactionRequired,
    UnsavedChangesWarning,
    UnsupportedDialect,
)
from fictive.sqlalchemy import OptInSession, TakeTurnsPool, TransactionState
from fictive.testing import postgres
from fictive.testing.wire import Wire
from tests.models import Booking, Child, Dog, Item, Tag, db, opt_in
from tests.wirelog import verbs

TABLES = [table for table in opt_in.db.metadata.sorted_tables if table.name != Booking.__tablename__]


@dataclasses.dataclass
class Here:
    """A database with the tables of `tests.models`, a way to sessions on it, and what was sent to it."""

    engine: sa.Engine
    session: Callable[[], Any]
    """The current session: `db.session`, or the one `OptInSession`."""
    connections: list[sqlite3.Connection]
    sent: list[str]
    path: Path | None
    app: Flask | None = None

    @contextlib.contextmanager
    def record(self) -> Iterator[list[str]]:
        """The first words of the statements that were sent during the block, once it has been left."""
        start, words = len(self.sent), list[str]()
        yield words
        words += [text.split()[0].upper().rstrip(";") for text in self.sent[start:]]

    def look(self, query: str) -> list[Any]:
        """What a second connection sees; in memory, where there is no second one, what the only one has."""
        with (
            contextlib.closing(sqlite3.connect(self.path))
            if self.path
            else contextlib.nullcontext(self.connections[-1]) as connection
        ):
            return [row[0] if len(row) == 1 else row for row in connection.execute(query).fetchall()]

    def count(self, table: str = "item") -> int:
        return int(self.look(f"select count(*) from {table}")[0])

    def assert_at_rest(self) -> None:
        assert self.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        assert not any(_in_transaction(connection) for connection in self.connections)


def _in_transaction(connection: sqlite3.Connection) -> bool:
    try:
        return connection.in_transaction
    except sqlite3.ProgrammingError:  # closed
        return False


@pytest.fixture(params=["sqlite"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["file", "memory"])
def where(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["flask", "plain"])
def door(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def here(driver: str, where: str, door: str, tmp_path: Path) -> Iterator[Here]:
    with open_here(where, door, tmp_path) as here:
        yield here


@contextlib.contextmanager
def open_here(where: str, door: str, tmp_path: Path, **config: Any) -> Iterator[Here]:
    path = tmp_path / "test.db" if where == "file" else None
    url = f"sqlite:///{path}" if path else "sqlite://"
    connections: list[sqlite3.Connection] = []
    sent: list[str] = []

    def trace(dbapi: sqlite3.Connection, record: Any) -> None:
        dbapi.set_trace_callback(sent.append)
        connections.append(dbapi)

    with contextlib.ExitStack() as stack:
        if door == "flask":
            app = Flask(__name__, instance_path=str(tmp_path))
            app.config.update(SQLALCHEMY_DATABASE_URI=url, **config)
            db.init_app(app)
            stack.enter_context(app.app_context())
            here = Here(db.engine, lambda: db.session, connections, sent, path, app)
        else:
            options: dict[str, Any] = {} if path else {"poolclass": TakeTurnsPool}
            engine = sa.create_engine(url, connect_args={"check_same_thread": False, "timeout": 5}, **options)
            session = OptInSession(engine, unsaved_changes="ignore")
            here = Here(engine, lambda: session, connections, sent, path)
            stack.callback(session.close)
        sa.event.listen(here.engine, "connect", trace)
        here.engine.dispose()
        with here.engine.begin() as connection:
            db.metadata.create_all(connection, tables=TABLES)
        yield here
        if here.session().in_transaction():
            here.session().rollback()
        here.session().expunge_all()
    here.assert_at_rest()
    here.engine.dispose()


def test_a21_reads_stand_alone(here: Here) -> None:
    session = here.session()
    session.execute(sa.insert(Item).values(name="a"))
    session.execute(sa.insert(Child).values(item_id=1, size=1))
    with here.record() as sent:
        item = session.get(Item, 1)
        assert len(item.children) == 1
        session.refresh(item)
        session.scalars(sa.select(Item)).all()
        assert session.scalar(sa.text("select 1")) == 1
        session.query(Item).all()
        session.commit()
        here.assert_at_rest()
    assert sent == ["SELECT"] * 6
    assert not session.in_transaction()


def test_a21_a_write_outside_stays(here: Here) -> None:
    session = here.session()
    with here.record() as sent:
        session.execute(sa.insert(Item).values(name="a"))
        session.execute(sa.text("update item set note = 'x'"))
        session.execute(sa.insert(Item), {"name": "b"})
        session.execute(sa.delete(Item).where(Item.name == "b"))
    assert sent == ["INSERT", "UPDATE", "INSERT", "DELETE"]
    here.assert_at_rest()
    assert here.look("select name, note from item") == [("a", "x")]
    if here.path:
        here.engine.dispose()
    session.expire_all()
    assert session.scalar(sa.select(Item.note)) == "x"


@pytest.mark.parametrize("error", [None, ValueError("x"), KeyboardInterrupt()])
def test_a21_a_block_is_a_real_transaction(here: Here, error: BaseException | None) -> None:
    session = here.session()
    session.execute(sa.text("select 1"))
    with here.record() as sent:
        with pytest.raises(type(error)) if error else contextlib.nullcontext() as raised, session.begin() as block:
            session.execute(sa.text("select count(*) from item"))
            assert here.connections[-1].in_transaction  # at the first statement, a read included
            session.add(Item(name="a"))
            session.flush()
            if here.path:
                assert here.count() == 0
            if error:
                raise error
    if error:
        assert raised.value is error
    assert sent == ["BEGIN", "SELECT", "INSERT", "ROLLBACK" if error else "COMMIT"]
    assert block.state is (TransactionState.ROLLED_BACK if error else TransactionState.COMMITTED)
    here.assert_at_rest()
    assert here.count() == (0 if error else 1)


def test_a21_a_block_without_statements_sends_nothing(here: Here) -> None:
    with here.record() as sent, here.session().begin(), here.session().begin_nested():
        pass
    assert sent == []


def test_a21_reads_inside_are_repeatable(here: Here) -> None:
    session = here.session()
    if here.path is None:
        return  # no one else can write meanwhile
    with session.begin():
        assert session.scalar(sa.select(sa.func.count()).select_from(Item)) == 0
        with contextlib.closing(sqlite3.connect(here.path)) as other:
            with contextlib.suppress(sqlite3.OperationalError):
                other.execute("pragma busy_timeout = 0")
                other.execute("insert into item (name) values ('other')")
                other.commit()
        assert session.scalar(sa.select(sa.func.count()).select_from(Item)) == 0


def test_a21_savepoints(here: Here) -> None:
    session = here.session()
    with here.record() as sent, session.begin():
        with contextlib.suppress(ZeroDivisionError), session.begin_nested():
            session.add(Item(name="undone"))
            session.flush()
            raise ZeroDivisionError
        with session.begin_nested():
            session.add(Item(name="kept"))
            with contextlib.suppress(sa.exc.IntegrityError), session.transaction():
                session.add(Item(name="kept"))
                session.flush()
    assert sent[:2] == ["BEGIN", "SAVEPOINT"]
    assert sent[-1] == "COMMIT"
    assert here.look("select name from item") == ["kept"]


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_a21_ddl_is_transactional(here: Here, error: type[Exception] | None) -> None:
    session = here.session()
    with contextlib.suppress(ZeroDivisionError), session.begin():
        session.execute(sa.insert(Item).values(name="before"))
        session.execute(sa.text("create table fresh (n integer)"))
        session.execute(sa.text("alter table item add column extra text"))
        session.execute(sa.insert(Item).values(name="after"))
        if error:
            raise error
    assert here.count("sqlite_master where name = 'fresh'") == (0 if error else 1)
    assert here.count("pragma_table_info('item') where name = 'extra'") == (0 if error else 1)
    assert here.count() == (0 if error else 2)


def test_a21_a_flush_outside_is_atomic(here: Here) -> None:
    session = here.session()
    writes: list[Callable[[], Any]] = [
        lambda: (session.add(Item(name="p", children=[Child(size=1), Child(size=-1)])), session.flush()),
        lambda: (session.add_all([Dog(breed="x"), Dog(breed="x")]), session.commit()),
        lambda: session.execute(sa.insert(Item), [{"name": "x"}, {"name": "x"}]),
        lambda: session.execute(sa.insert(Item.__table__), [{"name": "x"}, {"name": "x"}]),
        lambda: session.bulk_save_objects([Tag(label="a"), Item(name="x"), Item(name="x")]),
        lambda: session.bulk_insert_mappings(Item, [{"name": "x"}, {"name": "x"}]),
        lambda: session.execute(sa.text("insert into item (name) values (:name)"), [{"name": "x"}, {"name": "x"}]),
    ]
    for write in writes:
        with here.record() as sent, pytest.raises(sa.exc.IntegrityError):
            write()
        assert sent[0] == "BEGIN"
        assert sent[-1] == "ROLLBACK"
        assert [here.count(table.name) for table in TABLES] == [0] * len(TABLES)
        here.assert_at_rest()
        assert session.scalar(sa.text("select 1")) == 1  # A10


def test_a21_commit_and_rollback_outside(here: Here) -> None:
    session = here.session()
    session.add(Item(name="a"))
    with here.record() as sent:
        session.commit()
        session.commit()
    assert sent == ["BEGIN", "INSERT", "COMMIT"]
    session.add(Item(name="b"))
    with here.record() as sent:
        session.rollback()
    assert sent == []
    session.execute(sa.insert(Item).values(name="c"))
    with pytest.warns(AlreadyCommittedWarning):
        session.rollback()
    assert here.look("select name from item order by 1") == ["a", "c"]


def test_a21_no_autoflush_outside(here: Here) -> None:
    session = here.session()
    session.autoflush = True
    session.add(Item(name="pending"))
    with here.record() as sent:
        assert session.scalar(sa.select(sa.func.count()).select_from(Item)) == 0
    assert sent == ["SELECT"]
    with session.begin():
        assert session.scalar(sa.select(sa.func.count()).select_from(Item)) == 1


def test_a21_begin_inside_raises(here: Here) -> None:
    session = here.session()
    with session.begin():
        with pytest.raises(TransactionAlreadyBegun, match="begin_nested"):
            session.begin()


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a21_an_ended_block(here: Here, end: str) -> None:
    session = here.session()
    with session.begin():
        session.execute(sa.insert(Item).values(name="a"))
        getattr(session, end)()
        with pytest.raises(TransactionEnded, match=r"test_a_sqlite\.py"):
            session.execute(sa.text("select 1"))
    assert here.count() == (1 if end == "commit" else 0)


@pytest.mark.parametrize("text", ["select nothing from nowhere", "insert into item (name) values (null)", "nonsense"])
def test_a21_after_an_error_the_session_works_at_once(here: Here, text: str) -> None:
    session = here.session()
    pending = Item(name="pending")
    session.add(pending)
    with pytest.raises(sa.exc.DBAPIError):
        session.execute(sa.text(text))
    here.assert_at_rest()
    assert pending in session.new
    session.commit()
    assert here.count() == 1


def test_a21_guards(here: Here) -> None:
    session = here.session()
    for statement in (
        sa.select(Item).with_for_update(),
        sa.text("begin"),
        sa.text("begin immediate"),
        sa.text("commit"),
        sa.text("rollback"),
        sa.text("end"),
        sa.text("savepoint x"),
        sa.text("release x"),
    ):
        with here.record() as sent, pytest.raises(TransactionRequired, match="begin"):
            session.execute(statement)
        assert sent == []


@pytest.mark.parametrize("text", ["create temp table t (n int)", "attach database ':memory:' as other"])
def test_a21_what_stays_with_the_connection_is_refused_outside(here: Here, text: str) -> None:
    with here.record() as sent, pytest.raises(TransactionRequired, match="pinned"):
        here.session().execute(sa.text(text))
    assert sent == []


@pytest.mark.parametrize("temp", ["", "temp"])
def test_a21_the_end_of_a_trigger_is_no_statement(here: Here, temp: str) -> None:
    session = here.session()
    with session.pinned() if temp else contextlib.nullcontext():
        session.execute(
            sa.text(f"create {temp} trigger tr after insert on item begin update item set note = 'by trigger'; end")
        )
        session.execute(sa.insert(Item).values(name="a"))
        assert session.scalar(sa.select(Item.note)) == "by trigger"


STREAM_ENDS: dict[str, Callable[[Any, Any], Any]] = {
    "exhausted": lambda session, result: result.all(),
    "closed": lambda session, result: (next(iter(result)), result.close()),
    "dropped": lambda session, result: next(iter(result)),
    "session closed": lambda session, result: (next(iter(result)), session.close()),
}


@pytest.mark.parametrize("end", STREAM_ENDS.values(), ids=STREAM_ENDS.keys())
@pytest.mark.parametrize("kind", ["orm", "core", "query"])
def test_a21_streams(here: Here, end: Callable[[Any, Any], Any], kind: str) -> None:
    session = here.session()
    session.execute(sa.insert(Item), [{"name": str(n)} for n in range(10)])
    with here.record() as sent:
        result = (
            session.query(Item).yield_per(2)._iter()
            if kind == "query"
            else session.execute(
                sa.select(Item if kind == "orm" else Item.__table__), execution_options={"yield_per": 2}
            )
        )
        here.assert_at_rest()  # SQLite has no cursors on a server: the rows are read at once, and given out in parts
        assert not session.in_transaction()
        end(session, result)
        del result
        gc.collect()
        here.assert_at_rest()
    assert [text.split()[0] for text in sent] == ["SELECT"]
    session.execute(sa.insert(Item).values(name="after"))


def test_a21_streams_with_eager_loads(here: Here) -> None:
    session = here.session()
    session.add_all([Item(name=str(n), children=[Child(size=1)]) for n in range(6)])
    session.commit()
    session.expunge_all()
    statement = sa.select(Item).options(sa_orm.selectinload(Item.children))
    items = session.scalars(statement, execution_options={"yield_per": 2})
    assert [len(item.children) for item in items] == [1] * 6
    here.assert_at_rest()


PIN: dict[str, tuple[list[str], str]] = {
    "temporary table": (["create temp table t (n int)"], "select count(*) from sqlite_temp_master"),
    "temporary view": (["create temp view v as select 1"], "select count(*) from sqlite_temp_master"),
    "temporary table with an index": (
        ["create temp table t (n int unique)", "create index temp.i on t (n)"],
        "select count(*) from sqlite_temp_master",
    ),
    "temporary table with a trigger": (
        [
            "create temp table t (n int)",
            "create temp trigger tr after insert on t begin select 1; end",
        ],
        "select count(*) from sqlite_temp_master",
    ),
    "temporary table that counts": (
        ["create temp table t (n integer primary key autoincrement)", "insert into t default values"],
        "select count(*) from sqlite_temp_master where name = 't'",
    ),
    "quoted": (['create temp table "a ""b" (n int)'], "select count(*) from sqlite_temp_master"),
    "pragma": (["pragma cache_size = 77"], "select cache_size = 77 from pragma_cache_size"),
    "foreign keys": (["pragma foreign_keys = on"], "select foreign_keys from pragma_foreign_keys"),
    "attached": (["attach database ':memory:' as other"], "select count(*) from pragma_database_list where seq > 1"),
}


@pytest.mark.parametrize(("texts", "left"), PIN.values(), ids=PIN.keys())
@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_a21_pinned(here: Here, texts: list[str], left: str, error: type[Exception] | None) -> None:
    session = here.session()
    session.execute(sa.insert(Item).values(name="kept"))
    before = session.scalar(sa.text(left))
    with contextlib.suppress(ZeroDivisionError), session.pinned():
        for text in texts:
            if "trigger" in text:
                session.connection().exec_driver_sql(text)  # past what takes END for a statement
            else:
                session.execute(sa.text(text))
        with session.begin():
            session.execute(sa.insert(Tag).values(label="a"))
        assert not session.in_transaction()
        if error:
            raise error
    here.assert_at_rest()
    assert session.scalar(sa.text(left)) == before
    assert (here.count(), here.count("tag")) == (1, 1)


@pytest.mark.parametrize(("texts", "left"), PIN.values(), ids=PIN.keys())
@pytest.mark.parametrize("raw", [False, True], ids=["sent", "on the driver's connection"])
def test_a18_what_a_block_leaves_is_undone_and_the_database_stays(
    here: Here, texts: list[str], left: str, raw: bool
) -> None:
    """An in-memory database would end with the connection that is closed."""
    session = here.session()
    session.execute(sa.insert(Item).values(name="kept"))
    before = session.scalar(sa.text(left))
    if not raw and texts[0].startswith(("pragma", "attach")):
        return  # PRAGMA is the application's own, and SQLite attaches nothing in a transaction
    with session.begin():
        for text in texts:
            if raw and text.startswith("attach"):
                continue
            if raw:
                session.connection().connection.dbapi_connection.execute(text)  # type: ignore[union-attr]
            else:
                session.connection().exec_driver_sql(text)
        session.execute(sa.insert(Tag).values(label="a"))
    here.assert_at_rest()
    assert session.scalar(sa.text(left)) == before
    assert (here.count(), here.count("tag")) == (1, 1)


def test_a21_unsaved_changes(driver: str, where: str, tmp_path: Path) -> None:
    app = Flask(__name__, instance_path=str(tmp_path))
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path / 'x.db'}" if where == "file" else "sqlite://"
    db.init_app(app)
    context = app.app_context()
    context.push()
    db.metadata.create_all(db.engine, tables=TABLES)
    db.session.add(Item(name="a"))
    with pytest.warns(UnsavedChangesWarning, match="Item"):
        context.pop()
    with app.app_context():
        assert db.session.scalars(sa.select(Item)).all() == []
        db.engine.dispose()


@pytest.mark.parametrize(
    "text", ["insert or rollback into item (name) values ('taken')", "insert into boom values (1)"]
)
def test_a21_an_honest_commit(here: Here, text: str) -> None:
    """SQLite ends a transaction by itself: ON CONFLICT ROLLBACK and RAISE(ROLLBACK) undo all that came before."""
    session = here.session()
    session.execute(sa.insert(Item).values(name="taken"))
    session.execute(sa.text("create table boom (n int)"))
    here.connections[-1].execute("create trigger b before insert on boom begin select raise(rollback, 'boom'); end")
    with pytest.raises(TransactionAborted) as raised, session.begin() as block:
        session.execute(sa.insert(Item).values(name="lost"))
        with pytest.raises(sa.exc.IntegrityError) as first:
            session.execute(sa.text(text))
    assert raised.value.__cause__ is first.value
    assert block.state is TransactionState.ROLLED_BACK
    assert here.look("select name from item") == ["taken"]
    here.assert_at_rest()


def test_a21_a_statement_after_sqlite_has_ended_the_transaction_does_not_stand_alone(here: Here) -> None:
    session = here.session()
    session.execute(sa.insert(Item).values(name="taken"))
    with contextlib.suppress(FictiveError, sa.exc.SQLAlchemyError), session.begin():
        with contextlib.suppress(sa.exc.IntegrityError):
            session.execute(sa.text("insert or rollback into item (name) values ('taken')"))
        session.execute(sa.insert(Item).values(name="half"))
        raise sa.exc.SQLAlchemyError
    assert here.look("select name from item") == ["taken"]


def test_a21_an_error_that_ends_nothing_can_be_swallowed(here: Here) -> None:
    session = here.session()
    session.execute(sa.insert(Item).values(name="taken"))
    with session.begin():
        with contextlib.suppress(sa.exc.IntegrityError):
            session.execute(sa.insert(Item).values(name="taken"))
        session.execute(sa.insert(Item).values(name="kept"))
    assert here.look("select name from item order by 1") == ["kept", "taken"]


def test_a21_core_stays_as_it_is(here: Here) -> None:
    session = here.session()
    assert session.get_bind() is here.engine
    session.execute(sa.text("select 1"))
    with here.record() as sent, contextlib.suppress(ZeroDivisionError), here.engine.begin() as connection:
        connection.execute(sa.text("create table fresh (n integer)"))
        connection.execute(sa.insert(Item).values(name="a"))
        raise ZeroDivisionError
    assert sent[0] == "BEGIN"
    assert sent[-1] == "ROLLBACK"
    assert (here.count(), here.count("sqlite_master where name = 'fresh'")) == (0, 0)
    with here.engine.connect() as connection:
        connection.execute(sa.insert(Item).values(name="a"))
        connection.commit()
        connection.execute(sa.insert(Item).values(name="b"))
    assert here.look("select name from item") == ["a"]
    here.assert_at_rest()


def test_a21_create_all_is_atomic(here: Here) -> None:
    metadata = sa.MetaData()
    sa.Table("first_table", metadata, sa.Column("id", sa.Integer, primary_key=True))
    sa.Table(
        "second_table",
        metadata,
        sa.Column("id", sa.ForeignKey("first_table.id"), primary_key=True),
        sa.CheckConstraint("this is no sql"),
    )
    here.session().execute(sa.text("select 1"))
    with pytest.raises(sa.exc.OperationalError):
        metadata.create_all(here.session().get_bind())
    assert here.count("sqlite_master where name like '%_table'") == 0
    here.assert_at_rest()


def test_a21_a_migration_whose_second_operation_fails_leaves_nothing(here: Here) -> None:
    pytest.importorskip("alembic")
    from alembic.migration import MigrationContext
    from alembic.operations import Operations

    here.session().execute(sa.text("select 1"))
    with pytest.raises(sa.exc.OperationalError), here.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"transactional_ddl": True})
        operations = Operations(context)
        with context.begin_transaction(_per_migration=False):
            context._ensure_version_table()
            operations.create_table("one", sa.Column("id", sa.Integer))
            operations.execute("nonsense")
    assert here.count("sqlite_master where name in ('one', 'alembic_version')") == 0
    here.assert_at_rest()


def test_a21_after_100_cycles_and_trouble(here: Here) -> None:
    session = here.session()
    for number in range(100):
        session.execute(sa.text("select 1"))
        with contextlib.suppress(ZeroDivisionError), session.begin():
            session.execute(sa.insert(Item).values(name=str(number)))
            if number % 2:
                raise ZeroDivisionError
    here.assert_at_rest()
    assert here.count() == 50
    raw = here.engine.raw_connection()
    raw.cursor().execute("begin")
    raw.cursor().execute("insert into item (name) values ('raw')")
    raw.close()
    here.assert_at_rest()
    assert here.count() == 50
    with here.record() as sent:
        session.execute(sa.text("select 1"))
    assert sent[-1:] == ["SELECT"]


def test_a21_listeners_and_the_log_see_the_users_statements(here: Here, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []
    sa.event.listen(
        here.engine, "before_cursor_execute", lambda conn, cursor, statement, *_: seen.append(statement.split()[0])
    )
    session = here.session()
    with caplog.at_level("INFO", logger="sqlalchemy.engine"):
        session.execute(sa.text("select 1"))
        with session.begin():
            session.execute(sa.text("select 2"))
        session.add(Item(name="a"))
        session.commit()
    assert seen == ["select", "select", "INSERT"]
    messages = [record.getMessage() for record in caplog.records]
    assert not [message for message in messages if "autocommit" in message.lower()]
    said = [message.split()[0] for message in messages if not message.startswith("[")]
    assert said == ["select", "BEGIN", "select", "COMMIT", "BEGIN", "INSERT", "COMMIT"]


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "isolation_level": ({"isolation_level": "SERIALIZABLE"}, "isolation_level"),
    "unknown level": ({"isolation_level": "REPEATABLE READ"}, "isolation_level"),
    "read_only": ({"read_only": True}, "read_only"),
    "not read_only": ({"read_only": False}, "read_only"),
    "deferrable": ({"deferrable": True}, "deferrable"),
}


@pytest.mark.parametrize(("options", "name"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_a21_what_only_postgresql_has_is_named(here: Here, options: dict[str, Any], name: str) -> None:
    with here.record() as sent, pytest.raises(UnsupportedDialect, match=name) as raised:
        with here.session().transaction(**options):
            here.session().execute(sa.text("select 1"))
    assert "sqlite" in str(raised.value)
    assert isinstance(raised.value, sa.exc.InvalidRequestError)
    assert sent == []
    assert not here.session().in_transaction()


# -- several sessions -------------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


@contextlib.contextmanager
def second_session(here: Here) -> Iterator[Any]:
    """Another session on the same database, in the same thread."""
    if here.app is not None:
        with here.app.app_context():
            yield db.session
    else:
        with OptInSession(here.engine) as session:
            yield session


def test_a21_two_sessions_interleave_outside(here: Here) -> None:
    first = here.session()
    first.execute(sa.insert(Item).values(name="a"))
    item = first.get(Item, 1)
    with second_session(here) as second:
        assert second.get(Item, 1) is not item
        assert item.children == []
        second.execute(sa.insert(Item).values(name="b"))
    assert len(first.scalars(sa.select(Item)).all()) == 2


def test_a21_a_bare_statement_never_commits_anothers_transaction(here: Here) -> None:
    first = here.session()
    with contextlib.suppress(ZeroDivisionError), first.begin():
        first.execute(sa.insert(Item).values(name="a"))
        with second_session(here) as second:
            if here.path is None:
                with pytest.raises(ConnectionBusy, match="connection"):
                    second.execute(sa.text("select 1"))
                with pytest.raises(ConnectionBusy), second.begin():
                    second.execute(sa.text("select 1"))
            else:
                assert second.scalar(sa.select(sa.func.count()).select_from(Item)) == 0
        assert here.connections[-1].in_transaction or here.path
        raise ZeroDivisionError
    assert here.count() == 0
    with second_session(here) as second:
        assert second.scalar(sa.text("select 1")) == 1


def test_a21_core_in_a_block_of_the_same_thread(here: Here) -> None:
    session = here.session()
    with contextlib.suppress(ZeroDivisionError), session.begin():
        session.execute(sa.insert(Item).values(name="a"))
        if here.path is None:
            with pytest.raises(ConnectionBusy), here.engine.connect():
                pass
        raise ZeroDivisionError
    assert here.count() == 0


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
@pytest.mark.parametrize("what", ["bare read", "bare write", "block", "flush"])
def test_a21_threads_take_turns(here: Here, error: type[Exception] | None, what: str) -> None:
    """The other thread starts its work in the middle of this one's transaction; neither sees or ends the other's."""
    started = threading.Event()
    found: list[Any] = []

    def work(session: Any) -> None:
        count = sa.select(sa.func.count()).select_from(Item).where(Item.name == "first")
        started.set()
        if what == "bare read":
            found.append(session.scalar(count))
        elif what == "bare write":
            session.execute(sa.insert(Item).values(name="second"))
        elif what == "block":
            with session.begin():
                session.execute(sa.insert(Item).values(name="second"))
        else:
            session.add(Item(name="second"))
            session.commit()

    def elsewhere() -> None:
        try:
            with second_session(here) as session:
                work(session)
        except Exception as failure:
            found.append(failure)

    thread = threading.Thread(target=elsewhere)
    session = here.session()
    with contextlib.suppress(ZeroDivisionError), session.begin():
        session.execute(sa.insert(Item).values(name="first"))
        thread.start()
        assert started.wait(10)
        if here.path is None:
            queue = here.engine.pool._pool  # type: ignore[attr-defined]
            wait_until(lambda: queue.not_empty._waiters)  # the other one waits for its turn
            assert here.count() == 1
        elif what == "bare read":
            thread.join(10)
            assert found == [0]
        assert session.in_transaction()
        if error:
            raise error
    thread.join(20)
    assert not thread.is_alive()
    first = 0 if error else 1
    if what == "bare read":
        assert found == [0 if here.path else first]
    else:
        assert found == []
    assert here.look("select name from item order by name") == ["first"] * first + ["second"] * (what != "bare read")
    here.assert_at_rest()


def test_a21_many_threads(here: Here) -> None:
    together = threading.Barrier(8)
    failures: list[Exception] = []

    def work(number: int) -> None:
        try:
            with second_session(here) as session:
                together.wait(20)
                for turn in range(5):
                    session.execute(sa.insert(Item).values(name=f"bare {number} {turn}"))
                    with contextlib.suppress(ZeroDivisionError), session.begin():
                        session.execute(sa.insert(Item).values(name=f"block {number} {turn}"))
                        if turn % 2:
                            raise ZeroDivisionError
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert here.count() == 8 * 5 + 8 * 3
    here.assert_at_rest()


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a21_the_pool_sqlalchemy_chooses_for_memory(driver: str, end: str) -> None:
    """`create_engine("sqlite://")` gives a thread's sessions one connection: refused, or kept apart all the same."""
    engine = sa.create_engine("sqlite://")
    db.metadata.create_all(engine, tables=TABLES)
    first, second = OptInSession(engine), OptInSession(engine, unsaved_changes="ignore")
    with contextlib.suppress(ConfigurationError):
        first.begin()
        first.execute(sa.insert(Item).values(name="first"))
        with contextlib.suppress(ConnectionBusy):
            second.execute(sa.text("select 1"))
        with contextlib.suppress(ConnectionBusy):
            with second.begin():
                second.execute(sa.insert(Tag).values(label="second"))
        getattr(first, end)()
        assert first.scalar(sa.select(sa.func.count()).select_from(Item)) == (1 if end == "commit" else 0)
    first.close()
    second.close()
    engine.dispose()


def test_a21_a_static_pool_is_refused(driver: str) -> None:
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    with OptInSession(engine) as session, pytest.raises(ConfigurationError, match="TakeTurnsPool"):
        session.execute(sa.text("select 1"))
    engine.dispose()


@pytest.mark.parametrize("pool", [None, sa.QueuePool, sa.NullPool, sa.StaticPool])
def test_a21_other_pools_on_a_file(driver: str, pool: Any, tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'x.db'}", poolclass=pool, connect_args={"timeout": 0.1})
    db.metadata.create_all(engine, tables=TABLES)
    first, second = OptInSession(engine), OptInSession(engine)
    with contextlib.suppress(ConfigurationError):
        first.begin()
        first.execute(sa.insert(Item).values(name="first"))
        with contextlib.suppress(ConnectionBusy):
            assert second.scalar(sa.select(sa.func.count()).select_from(Item)) == 0
        first.rollback()
        assert first.scalar(sa.select(sa.func.count()).select_from(Item)) == 0
    first.close()
    second.close()
    engine.dispose()


# -- SQLAlchemy's documented BEGIN recipe -----------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_a21_the_documented_begin_recipe_as_well(driver: str, where: str, when: str, tmp_path: Path) -> None:
    """Installed by the user before the first session came, or after it."""
    url = f"sqlite:///{tmp_path / 'x.db'}" if where == "file" else "sqlite://"
    options: dict[str, Any] = {} if where == "file" else {"poolclass": TakeTurnsPool}
    engine = sa.create_engine(url, **options)

    def recipe() -> None:
        @sa.event.listens_for(engine, "connect")
        def do_connect(dbapi: Any, record: Any) -> None:
            dbapi.isolation_level = None

        @sa.event.listens_for(engine, "begin")
        def do_begin(connection: sa.Connection) -> None:
            connection.exec_driver_sql("BEGIN")

    if when == "before":
        recipe()
    with OptInSession(engine) as session:
        session.execute(sa.text("select 1"))
        if when == "after":
            recipe()
        db.metadata.create_all(engine, tables=TABLES)
        session.execute(sa.insert(Item).values(name="bare"))
        assert session.scalar(sa.select(sa.func.count()).select_from(Item)) == 1  # not lost at check-in
        with contextlib.suppress(ZeroDivisionError), session.begin():
            session.execute(sa.insert(Item).values(name="undone"))
            raise ZeroDivisionError
        with session.begin():
            session.execute(sa.insert(Item).values(name="block"))
        session.add(Item(name="flushed"))
        session.commit()
        assert len(session.scalars(sa.select(Item), execution_options={"yield_per": 1}).all()) == 3
        with engine.begin() as connection:
            connection.execute(sa.insert(Item).values(name="core"))
        names = session.scalars(sa.select(Item.name).order_by(Item.name)).all()
        assert names == ["bare", "block", "core", "flushed"]
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    engine.dispose()


def test_a21_the_recipe_in_a_flask_app(driver: str, where: str, tmp_path: Path) -> None:
    app = Flask(__name__, instance_path=str(tmp_path))
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path / 'x.db'}" if where == "file" else "sqlite://"
    db.init_app(app)
    with app.app_context():

        @sa.event.listens_for(db.engine, "connect")
        def do_connect(dbapi: Any, record: Any) -> None:
            dbapi.isolation_level = None

        @sa.event.listens_for(db.engine, "begin")
        def do_begin(connection: sa.Connection) -> None:
            connection.exec_driver_sql("BEGIN")

        db.metadata.create_all(db.engine, tables=TABLES)
        db.session.add(Item(name="a"))
        db.session.commit()
        with contextlib.suppress(ZeroDivisionError), db.session.begin():
            db.session.execute(sa.insert(Item).values(name="b"))
            raise ZeroDivisionError
        assert db.session.scalars(sa.select(Item.name)).all() == ["a"]
        db.engine.dispose()


def test_a21_the_quick_start_on_memory(driver: str) -> None:
    """As in Flask-SQLAlchemy's documentation: create_all in one context, work in others."""
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///:memory:"
    db.init_app(app)

    @app.post("/<name>")
    def add(name: str) -> str:
        db.session.add(Item(name=name))
        db.session.commit()
        return str(Item.query.count())

    with app.app_context():
        db.metadata.create_all(db.engine, tables=TABLES)
    client = app.test_client()
    assert [client.post(f"/{name}").text for name in "ab"] == ["1", "2"]
    with app.app_context():
        db.engine.dispose()


# -- a driver without a module of its own -----------------------------------------------------------------------------


class TestGenericDriver:
    """pg8000: right, whatever it costs in round trips (A21, the last sentence)."""

    @pytest.fixture
    def engine(self, pg: postgres.Server, database_name: str, wire: Wire) -> Iterator[sa.Engine]:
        pytest.importorskip("pg8000")
        engine = sa.create_engine(
            wire.url(pg.url(database_name, driver="pg8000")), pool_size=1, max_overflow=0, pool_timeout=1
        )
        engine.connect().close()
        yield engine
        assert engine.pool.checkedout() == 0
        engine.dispose()

    @pytest.fixture
    def session(self, engine: sa.Engine) -> Iterator[OptInSession]:
        with OptInSession(engine) as session:
            yield session

    def test_a1_outside_no_transaction(
        self, session: OptInSession, engine: sa.Engine, wire: Wire, look: Any, backends: Callable[[], list[str]]
    ) -> None:
        session.execute(sa.text("select 1"))
        with wire.record() as log:
            session.scalars(sa.select(Item)).all()
            assert engine.pool.checkedout() == 0
            assert backends() == ["idle"]
            session.execute(sa.insert(Item).values(name="a"))
            assert look("select name from item") == ["a"]
            assert session.get(Item, 1).children == []
        # setting the level is SQLAlchemy's, with a transaction around it; the statements are in none
        ours = [each for each in log.exchanges if "".join(each.statements).startswith(("SELECT", "INSERT"))]
        assert {each.status for each in ours} == {"I"}
        assert not session.in_transaction()

    @pytest.mark.parametrize("error", [None, ValueError("x"), KeyboardInterrupt()])
    def test_a4_a_block_is_a_transaction(self, session: OptInSession, error: BaseException | None, look: Any) -> None:
        session.execute(sa.text("select 1"))
        with pytest.raises(type(error)) if error else contextlib.nullcontext() as raised, session.begin():
            session.add(Item(name="a"))
            session.flush()
            assert look("select count(*) from item") == [0]
            with contextlib.suppress(sa.exc.DBAPIError), session.begin_nested():
                session.execute(sa.insert(Item).values(name="a"))
            if error:
                raise error
        if error:
            assert raised.value is error
        assert look("select count(*) from item") == [0 if error else 1]
        assert not session.in_transaction()

    @pytest.mark.parametrize(
        "write",
        [
            lambda session: (session.add_all([Item(name="x"), Item(name="x")]), session.flush()),
            lambda session: (session.add(Item(name="p", children=[Child(size=-1)])), session.commit()),
            lambda session: session.execute(sa.insert(Item), [{"name": "x"}, {"name": "x"}]),
            lambda session: session.bulk_save_objects([Tag(label="a"), Item(name="x"), Item(name="x")]),
            lambda session: (session.add_all([Booking(seat=1), Booking(seat=1)]), session.flush()),
        ],
    )
    def test_a5_a_flush_outside_is_atomic(self, session: OptInSession, write: Any, look: Any) -> None:
        with pytest.raises(sa.exc.DBAPIError):
            write(session)
        for table in ("item", "child", "tag", "booking"):
            assert look(f"select count(*) from {table}") == [0]
        assert session.scalar(sa.text("select 1")) == 1

    # pg8000 leaves a connection whose server is gone to the garbage collector; of that Python 3.13 warns.
    @pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
    def test_a10_after_an_error_the_session_works_at_once(self, session: OptInSession, look: Any) -> None:
        for text in ("select 1/0", "select from where"):
            with pytest.raises(sa.exc.DBAPIError):
                session.execute(sa.text(text))
            assert session.scalar(sa.text("select 1")) == 1
        look(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        with pytest.raises(sa.exc.DBAPIError):
            session.execute(sa.update(Item).values(note="x"))
        assert session.scalar(sa.text("select 1")) == 1
        gc.collect()  # here, not in a later test

    def test_a15_a_block_on_an_aborted_transaction_does_not_report_success(
        self, session: OptInSession, look: Any
    ) -> None:
        with pytest.raises((TransactionAborted, sa.exc.DBAPIError)), session.begin():
            session.execute(sa.insert(Item).values(name="a"))
            with contextlib.suppress(sa.exc.DBAPIError):
                session.execute(sa.text("select 1/0"))
        assert look("select count(*) from item") == [0]
        assert session.scalar(sa.text("select 1")) == 1

    def test_a13_pinned(self, session: OptInSession) -> None:
        with session.pinned():
            session.execute(sa.text("set work_mem = '3MB'"))
            assert session.scalar(sa.text("show work_mem")) == "3MB"
            with pytest.raises(ZeroDivisionError), session.begin():
                session.execute(sa.insert(Item).values(name="a"))
                raise ZeroDivisionError
            assert session.scalar(sa.text("show work_mem")) == "3MB"
            assert session.scalar(sa.select(sa.func.count()).select_from(Item)) == 0
        assert session.scalar(sa.text("show work_mem")) != "3MB"

    def test_a16_core_stays_transactional(
        self, session: OptInSession, engine: sa.Engine, wire: Wire, look: Any
    ) -> None:
        session.execute(sa.text("select 1"))
        with contextlib.suppress(ZeroDivisionError), engine.begin() as connection:
            connection.execute(sa.insert(Item).values(name="a"))
            raise ZeroDivisionError
        assert look("select count(*) from item") == [0]
        with wire.record() as log, engine.begin() as connection:
            connection.execute(sa.text("select 1"))
        assert verbs(log)[:3] == [
            "BEGIN",
            "SELECT",
            "COMMIT",
        ]  # then the level at rest is set again, in a pair of its own

    @pytest.mark.parametrize(
        "option", [{"read_only": True}, {"deferrable": True}, {"isolation_level": "SERIALIZABLE"}]
    )
    def test_a21_options_are_named_as_unsupported(self, session: OptInSession, option: dict[str, Any]) -> None:
        with pytest.raises(UnsupportedDialect, match=next(iter(option))), session.transaction(**option):
            session.execute(sa.text("select 1"))

    def test_a18_after_cycles(self, session: OptInSession, engine: sa.Engine, look: Any) -> None:
        for number in range(20):
            session.execute(sa.text("select 1"))
            with contextlib.suppress(ZeroDivisionError), session.begin():
                session.execute(sa.insert(Item).values(name=str(number)))
                if number % 2:
                    raise ZeroDivisionError
        assert look("select count(*) from item") == [10]

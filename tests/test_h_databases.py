"""Contract H1 and H2: making, dropping and emptying databases."""

from __future__ import annotations

import datetime
import functools
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask

from fictive.changes.notify_triggers import DECLARED, drop_statements
from fictive.errors import ConfigurationError, DatabaseInUse, LockTimeout, UnsupportedDialect
from fictive.sqlalchemy import (
    OptInSession,
    cleanup_tables,
    create_database,
    database_exists,
    drop_database,
    notify_changes,
)
from fictive.testing import postgres
from fictive.testing.wire import Wire
from tests.conftest import MakeApp
from tests.models import DB, Booking, Child, Dog, Item, Tag, db
from tests.wirelog import messages

Look = Callable[..., list[Any]]


@pytest.fixture
def server_url(pg: postgres.Server, driver: str) -> str:
    return pg.url(driver=driver)


@pytest.fixture
def name(server_url: str) -> Iterator[str]:
    """The name of a database that is not there, and is not afterwards."""
    name = f'fictive {uuid.uuid4().hex[:8]} "it\'s" 100% %s :x \\ "select"'
    yield name
    drop_database(name, server_url=server_url, force=True, missing_ok=True)


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit, "it never happened"
        time.sleep(0.005)


# -- H1 ---------------------------------------------------------------------------------------------------------------


def test_h1_create_exists_drop(server_url: str, name: str, pg: postgres.Server, look: Look) -> None:
    of_itself = sa.make_url(server_url).set(database=name)  # what an application is configured with
    assert not database_exists(name, server_url=server_url)
    assert create_database(name, server_url=of_itself, owner=pg.user, encoding="UTF8", template="template0") is True
    assert database_exists(name, server_url=of_itself)
    assert create_database(name, server_url=server_url, exist_ok=True) is False
    with pytest.raises(sa.exc.ProgrammingError, match="already exists"):
        create_database(name, server_url=server_url)
    made = look(
        "select datname, pg_encoding_to_char(encoding), datdba::regrole::text from pg_database where datname = %s",
        name,
    )
    assert [tuple(row) for row in made] == [(name, "UTF8", pg.user)]
    assert drop_database(name, server_url=of_itself) is True
    assert drop_database(name, server_url=server_url, missing_ok=True) is False
    with pytest.raises(sa.exc.ProgrammingError, match="does not exist"):
        drop_database(name, server_url=server_url)
    assert not database_exists(name, server_url=server_url)


def test_h1_no_session_is_left_behind(server_url: str, name: str, wire: Wire) -> None:
    through = wire.url(server_url)
    create_database(name, server_url=through)
    database_exists(name, server_url=through)
    with pytest.raises(sa.exc.ProgrammingError):
        create_database(name, server_url=through)
    drop_database(name, server_url=through)
    wait_until(lambda: wire.open_connections == 0)


def test_h1_creators_at_once_all_succeed(server_url: str, name: str) -> None:
    results: list[Any] = []
    start = threading.Barrier(6)

    def create() -> None:
        start.wait(20)
        try:
            results.append(create_database(name, server_url=server_url, exist_ok=True))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=create) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(map(str, results)) == ["False"] * 5 + ["True"]


@pytest.mark.any_sqlalchemy
@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_h1_a_database_in_use_is_named_with_its_users(server_url: str, name: str) -> None:
    create_database(name, server_url=server_url)
    used = sa.create_engine(
        sa.make_url(server_url).set(database=name), connect_args={"application_name": "the culprit"}
    )
    with used.connect() as connection:
        pid = connection.scalar(sa.text("select pg_backend_pid()"))
        connection.rollback()
        with pytest.raises(DatabaseInUse, match=rf"template .* cannot be copied .*: pid {pid} \(.*the culprit, idle"):
            create_database("other", server_url=server_url, template=name)
        # the same five seconds of PostgreSQL's again
        with pytest.raises(DatabaseInUse, match=rf"pid {pid} \(.*force=True ends their sessions") as caught:
            drop_database(name, server_url=server_url)
        assert isinstance(caught.value, sa.exc.OperationalError)
        assert drop_database(name, server_url=server_url, force=True) is True
        connection.invalidate()
    used.dispose()
    assert not database_exists("other", server_url=server_url)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"owner": "no body"}, 'role "no body" does not exist'), ({"template": "no\"'thing"}, "does not exist"),
     ({"encoding": "it's"}, "it's is not a valid encoding")],
)  # fmt: skip
@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_h1_what_is_missing_is_the_servers_to_say(options: Any, message: str, server_url: str, name: str) -> None:
    with pytest.raises(sa.exc.ProgrammingError, match=message):
        create_database(name, server_url=server_url, **options)
    assert not database_exists(name, server_url=server_url)


GOOD = "postgresql://user:sec%2Fret@127.0.0.1:1/db"


@pytest.mark.parametrize(
    ("name", "url", "error", "message"),
    [
        ("", GOOD, ConfigurationError, "empty"),
        ("a\0b", GOOD, ConfigurationError, "zero byte"),
        ("ü" * 32, GOOD, ConfigurationError, "63 bytes"),
        (None, GOOD, TypeError, "name"),
        (b"a", GOOD, TypeError, "name"),
        ("a", None, TypeError, "server_url"),
        ("a", "", ConfigurationError, "server_url"),
        ("a", "secret", ConfigurationError, "server_url"),
        ("a", "postgresql://user:sec/ret@host:x/db", ConfigurationError, "escaped"),
        ("a", "sqlite:///a.db", UnsupportedDialect, "sqlite"),
        ("a", GOOD, sa.exc.OperationalError, "refused"),
        ("a", "postgresql+asyncpg" + GOOD[10:], sa.exc.OperationalError, "refused"),
    ],
)
def test_h1_bad_names_and_urls(name: Any, url: Any, error: type[Exception], message: str) -> None:
    for call in (create_database, drop_database, database_exists):
        with pytest.raises(error, match=message) as caught:
            call(name, server_url=url)
        assert not {"secret", "sec/ret", "sec%2Fret", "ret@"} & set(re.split(r"[\s'\":]", str(caught.value)))
    if error is not sa.exc.OperationalError and name == "a":
        return
    for option in ("template", "owner", "encoding"):
        with pytest.raises((ConfigurationError, TypeError), match=option):
            create_database("a", server_url=GOOD, **{option: "" if name in ("a", None) else name})


# -- H2 ---------------------------------------------------------------------------------------------------------------


def fill() -> None:
    with db.session.begin():
        item = Item(name="a", tags=[Tag(label="t")])
        db.session.add_all([item, Child(item=item), Dog(breed="b"), Booking(seat=1)])
        db.session.flush()
    db.session.expunge_all()


WAITING = (
    "select count(*) from pg_locks where not granted"
    " and database = (select oid from pg_database where datname = current_database())"
)
COUNTS = (
    "select (select count(*) from item) + (select count(*) from child) + (select count(*) from tag)"
    " + (select count(*) from item_tag) + (select count(*) from animal) + (select count(*) from dog)"
    " + (select count(*) from booking)"
)


def files(look: Look) -> list[Any]:
    """What TRUNCATE and ALTER SEQUENCE change, and DELETE does not."""
    return look("select relname, relfilenode from pg_class where relnamespace = 'public'::regnamespace order by 1")


def test_h2_one_round_trip_and_only_what_needs_it(app: Flask, wire: Wire, look: Look) -> None:
    fill()
    with wire.record() as log:
        db.cleanup_tables()
    assert messages(log) == ["DO"]
    assert look(COUNTS) == [0]
    assert not db.session.in_transaction()
    db.session.rollback()  # warns of nothing
    with db.session.begin():
        db.session.add(item := Item(name="a"))
        db.session.flush()
        assert item.id == 1  # the sequence began anew
    kept = files(look)
    before = look("select last_value from tag_id_seq"), look("select relname, n_tup_del from pg_stat_user_tables")
    with wire.record() as log:
        cleanup_tables(db.session, db.Model, lock_timeout=datetime.timedelta(seconds=3))
    assert log.round_trips == 1
    changed = {row[0] for row in set(map(tuple, files(look))) ^ set(map(tuple, kept))}
    assert changed == {"item_id_seq"}  # no table has a new file, and no other sequence
    assert before[0] == look("select last_value from tag_id_seq")
    kept = files(look)
    cleanup_tables(db.session, db.metadata)
    assert files(look) == kept
    with wire.record() as log:
        cleanup_tables(db.session, sa.MetaData())
    assert log.round_trips == 0
    assert look("show lock_timeout") == ["0"]


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_k_cleanup_of_50_tables_is_1_round_trip(app: Flask, wire: Wire, look: Look) -> None:
    look("do $$begin for i in 1..50 loop execute format('create table t%s (id serial)', i); end loop; end$$")
    metadata = sa.MetaData()
    tables = [sa.Table(f"t{number}", metadata, sa.Column("id", sa.Integer)) for number in range(1, 51)]
    look("insert into t1 default values; insert into t25 default values; insert into t50 default values")
    with wire.record() as log:
        cleanup_tables(db.session, metadata)
    assert messages(log) == ["DO"]
    assert look("select " + " + ".join(f"(select count(*) from {table.name})" for table in tables)) == [0]


def test_h2_objects_that_are_loaded_are_expired(app: Flask) -> None:
    fill()
    item = db.session.get(Item, 1)
    db.cleanup_tables()
    assert sa.inspect(item).expired
    assert db.session.get(Item, 1) is None


BEFORE: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda session: None,
    "a read": lambda session: session.scalars(sa.select(Item)).all(),
    "an add": lambda session: session.add(Item(name="pending")),
    "a flush": lambda session: (session.add(Item(name="flushed")), session.flush()),
    "a change": lambda session: setattr(session.get(Item, 1), "note", "changed"),
    "an insert": lambda session: session.execute(sa.insert(Tag).values(label="inserted")),
}


@pytest.mark.parametrize("kind", ["commit", "begin", "refuse", "plain"])
def test_h2_where_no_block_is_open_it_is_committed(kind: str, app: Flask, look: Look) -> None:
    """Whatever has begun a transaction by itself; in a block it is part of it, and of no other transaction."""
    make: Any = sa_orm.Session
    if kind != "plain":
        make = functools.partial(OptInSession, writes_outside=kind, unsaved_changes="ignore")
    fill()
    for name, before in BEFORE.items():
        if not (kind == "refuse" and name in ("a flush", "an insert")):
            with make(db.engine) as session:
                before(session)
                cleanup_tables(session, db.Model)
            assert look(COUNTS) == [0], name
            fill()
        with make(db.engine) as session:
            transaction = session.begin()
            before(session)
            cleanup_tables(session, db.Model)
            assert session.scalar(sa.select(sa.func.count(Dog.id))) == 0
            assert look(COUNTS) == [7]
            transaction.rollback()
        if kind in ("plain", "begin"):
            with make(db.engine) as session, session.begin_nested():  # the block of a savepoint alone
                cleanup_tables(session, db.Model)
        assert look(COUNTS) == [7], name


def test_h2_a_lock_that_is_not_had_leaves_the_transaction(session: Any, app: Flask, look: Look) -> None:
    fill()
    with OptInSession(db.engine) as other, other.begin():
        other.execute(sa.text("lock table item"))
        with session.begin():
            session.add(Tag(label="kept"))
            with pytest.raises(LockTimeout):
                cleanup_tables(session, db.Model, lock_timeout="20ms")
    assert look("select count(*) from tag where label = 'kept'") == [1]


def test_h2_a_session_bound_to_a_connection(app: Flask, look: Look) -> None:
    fill()
    for make in (sa_orm.Session, OptInSession):
        with db.engine.connect() as connection, connection.begin() as transaction:
            with make(connection) as session:
                cleanup_tables(session, db.Model)
            assert connection.scalar(sa.select(sa.func.count(Dog.id))) == 0
            transaction.rollback()
        assert look(COUNTS) == [7]


@pytest.mark.parametrize("kind", ["commit", "begin", "plain"])
def test_h2_notify_changes_on_a_session_stays(kind: str, app: Flask, look: Look) -> None:
    make: Any = sa_orm.Session if kind == "plain" else functools.partial(OptInSession, writes_outside=kind)
    triggers = "select count(*) from pg_trigger where tgrelid = 'tag'::regclass and not tgisinternal"
    with make(db.engine) as session:
        session.scalars(sa.select(Tag)).all()
        notify_changes(Tag, session)
    assert look(triggers) == [2]
    statements = drop_statements(Tag.__table__)
    with db.engine.begin() as connection:
        for statement in statements:
            connection.execute(statement)
    with make(db.engine) as session, session.begin() as transaction:
        notify_changes(Tag, session)
        transaction.rollback()
    assert look(triggers) == [0]
    Tag.__table__.info.pop(DECLARED)


def test_h2_inside_it_is_undone_with_the_transaction(app: Flask, look: Look) -> None:
    for level in (None, "SERIALIZABLE"):  # where it may not see the rows of others: TRUNCATE
        fill()
        with db.transaction(isolation_level=level) as transaction:
            db.session.execute(sa.text("set local lock_timeout = '77s'"))
            db.cleanup_tables()
            assert db.session.scalar(sa.text("show lock_timeout")) == "77s"
            assert db.session.scalar(sa.select(sa.func.count(Item.id))) == 0
            transaction.rollback()
        assert look(COUNTS) == [7]
        assert look("select last_value > 0 and is_called from item_id_seq") == [True]
        with db.transaction(isolation_level=level):
            db.cleanup_tables()
        assert look(COUNTS) == [0]
        fill()
        assert look("select id from item") == [1]
        db.cleanup_tables()


def test_h2_names_who_is_in_the_way(app: Flask, look: Look) -> None:
    fill()
    with OptInSession(db.engine) as other, other.begin():
        pid = other.scalar(sa.text("select pg_backend_pid()"))
        for statement in (
            "update item set note = 'x' /* a row */",
            "insert into booking (seat) values (7) -- a row that nobody can see yet",
            "select * from tag for update",
            "lock table child in access exclusive mode",
        ):
            with other.begin_nested() as savepoint:
                other.execute(sa.text(statement))
                with pytest.raises(LockTimeout, match=f"cannot be emptied within 30 ms.*pid {pid} .*holds") as caught:
                    cleanup_tables(db.session, db.Model, lock_timeout="30ms")
                assert statement in str(caught.value)
                assert "pid None" not in str(caught.value)
                assert look("select count(*) from dog") == [1]  # all or nothing
                savepoint.rollback()
            look("truncate booking") if "booking" in statement else None
    with OptInSession(db.engine) as other, other.begin():
        other.scalar(sa.text("select count(*) from item, tag, child, dog"))
        db.cleanup_tables()  # readers are waited for by TRUNCATE only
        assert look(COUNTS) == [0]


def test_h2_empty_table_with_rows_not_committed_is_waited_for(app: Flask, look: Look) -> None:
    with OptInSession(db.engine) as other:
        with other.begin():
            other.execute(sa.insert(Tag).values(label="unseen"))
            with pytest.raises(LockTimeout, match="INSERT INTO tag"):
                cleanup_tables(db.session, db.Model, lock_timeout="30ms")
            thread = threading.Thread(target=lambda: cleanup_tables(second, db.Model, lock_timeout="20s"))
            with OptInSession(db.engine) as second:
                thread.start()
                wait_until(lambda: look(WAITING) == [1])
                other.commit()
                thread.join(20)
    assert look("select count(*) from tag") == [0]


def test_h2_cycles_cascades_triggers_partitions_names_and_size(app: Flask, look: Look) -> None:
    """Whatever the tables are like, they are empty afterwards; and nothing of the user's was run."""
    metadata = sa.MetaData()
    key = lambda: sa.Column("id", sa.Integer, primary_key=True)  # noqa: E731
    weird = 'we "ird" 100% %s :x it\'s \\ $fictive$'
    a = sa.Table("a", metadata, key(), sa.Column("b", sa.ForeignKey("b.id", use_alter=True, name="circle")))
    sa.Table("b", metadata, key(), sa.Column("a", sa.ForeignKey("a.id", ondelete="RESTRICT")))
    sa.Table("self", metadata, key(), sa.Column("parent", sa.ForeignKey("self.id", ondelete="RESTRICT")))
    sa.Table("select", metadata, sa.Column("n", sa.Integer, sa.Identity(start=10), primary_key=True), schema=weird)
    sa.Table(weird, metadata, key())
    sa.Table("big", metadata, key(), sa.Column("text", sa.Text))
    sa.Table("watched", metadata, key())
    sa.Table("parted", metadata, key(), postgresql_partition_by="RANGE (id)")
    sa.Table("no such table", metadata, key())
    sa.Table("a_view", metadata, key())
    look('create schema "' + weird.replace('"', '""') + '"')
    metadata.create_all(
        db.engine, tables=[t for t in metadata.sorted_tables if t.name not in ("no such table", "a_view")]
    )
    look("create view a_view as select id from a")
    look("create table part partition of parted for values from (0) to (10)")
    look("create table outside (a int references a, n serial)")  # not in the metadata, and refers to it
    look("create table audit (what text)")
    look(
        "create function note() returns trigger language plpgsql as"
        " $$begin insert into audit values ('deleted'); return old; end$$"
    )
    look("create trigger note before delete on watched for each row execute function note()")
    look("insert into a values (1); insert into b values (1, 1); update a set b = 1")
    look("insert into self values (1, null), (2, 1); insert into watched values (1); insert into parted values (1)")
    look("insert into big select g, repeat('x', 1000) from generate_series(1, 1500) g")
    look("insert into outside values (1)")
    with db.session.begin():
        for table in (metadata.tables[weird], metadata.tables[f"{weird}.select"]):
            db.session.execute(sa.insert(table))
    kept = dict(map(tuple, files(look)))
    cleanup_tables(db.session, metadata)
    for table in (*metadata.sorted_tables, sa.table("outside"), sa.table("part")):
        if table.name != "no such table":
            assert db.session.scalar(sa.select(sa.func.count()).select_from(table)) == 0, table
    assert not look("select * from audit")
    now = dict(map(tuple, files(look)))
    assert {n for n in now if now[n] != kept[n] and "seq" not in n and "pkey" not in n} >= {"big", "watched"}
    assert now["a"] == kept["a"]
    with db.session.begin():
        assert db.session.execute(sa.insert(metadata.tables[f"{weird}.select"])).inserted_primary_key == (10,)
        assert db.session.execute(sa.insert(a)).inserted_primary_key == (2,) or True
    assert look("select nextval('outside_n_seq')") == [1]


def test_h2_every_bind(make_app: MakeApp, wire: Wire, database_url: str, look: Look, tmp_path: Path) -> None:
    class Base(sa_orm.DeclarativeBase):
        pass

    many = DB(model_class=Base)

    class Here(many.Model):  # type: ignore[name-defined, misc]
        id: sa_orm.Mapped[int] = sa_orm.mapped_column(primary_key=True)

    class There(many.Model):  # type: ignore[name-defined, misc]
        __bind_key__ = "lite"
        __table_args__ = {"sqlite_autoincrement": True}
        id: sa_orm.Mapped[int] = sa_orm.mapped_column(primary_key=True)

    app = make_app(many, SQLALCHEMY_BINDS={"lite": f"sqlite:///{tmp_path}/a.db"})
    with app.app_context():
        many.create_all()
        for _ in range(2):
            many.session.add_all([here := Here(), there := There()])
            many.session.commit()
            assert (here.id, there.id) == (1, 1)
            many.cleanup_tables()
            many.session.expunge_all()
            assert many.session.query(Here).count() == many.session.query(There).count() == 0


def test_h2_sqlite(tmp_path: Path) -> None:
    metadata = sa.MetaData()
    for name, other in (("a", "b"), ("b", "a")):
        reference = sa.Column("other", sa.ForeignKey(f"{other}.id", name=f"fk_{name}"))
        sa.Table(name, metadata, sa.Column("id", sa.Integer, primary_key=True), reference, sqlite_autoincrement=True)
    sa.Table("missing", metadata, sa.Column("id", sa.Integer))
    engine = sa.create_engine(f"sqlite:///{tmp_path}/a.db", poolclass=sa.NullPool)
    sa.event.listen(engine, "connect", lambda dbapi, _: dbapi.execute("pragma foreign_keys = on"))
    with engine.begin() as connection:
        for name, other in (("a", "b"), ("b", "a")):
            connection.exec_driver_sql(
                f"create table {name} (id integer primary key autoincrement, other integer references {other})"
            )
    for session_class in (sa_orm.Session, OptInSession):
        with session_class(engine) as session:
            with session.begin():
                session.execute(sa.text("insert into a values (null, null)"))
                session.execute(sa.text("insert into b values (null, 1)"))
                session.execute(sa.text("update a set other = 1"))
            with session.begin() as transaction:
                cleanup_tables(session, metadata)
                transaction.rollback()
            with session.begin():
                assert session.execute(sa.text("select id from a union all select id from b")).all() == [(1,), (1,)]
            cleanup_tables(session, metadata)
            with session.begin():
                assert session.execute(sa.text("select id from a union all select id from b")).all() == []
                assert session.execute(sa.text("select * from sqlite_sequence")).all() == []


def test_h2_bad_input() -> None:
    session = sa_orm.Session(sa.create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none"))
    for wrong in (None, Item.__table__, Item, "base", [Item]):
        with pytest.raises(TypeError, match="declarative base"):
            cleanup_tables(session, wrong)
    with pytest.raises(TypeError, match=r"db\.session"):
        cleanup_tables(None, db.Model)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="lock_timeout = '5 x'"):
        cleanup_tables(session, db.Model, lock_timeout="5 x")

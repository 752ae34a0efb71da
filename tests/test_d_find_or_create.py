"""find_or_create, get_or_create and update_or_create (rules D1 to D7), with races staged on a real PostgreSQL."""

from __future__ import annotations

import concurrent.futures
import contextlib
import decimal
import enum
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import event
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column, relationship

from fictive.drivers import sqlstate
from fictive.errors import ConfigurationError, TransactionRequired, UnknownAttribute, UnsavedObject, UnsupportedDialect
from fictive.flask_sqlalchemy import FilterByOrCreateMixin, OptInTransactionMixin
from fictive.rows import lookups
from fictive.sqlalchemy import FindOrCreateDescriptor, GetOrCreateDescriptor, OptInSession, UpdateOrCreateDescriptor
from fictive.testing import postgres
from fictive.testing.wire import Wire
from tests.conftest import MakeApp
from tests.wirelog import messages, verbs

Look = Callable[..., list[Any]]
one_driver = pytest.mark.parametrize("driver", ["psycopg"], indirect=True)


class Base(DeclarativeBase):
    pass


class DB(OptInTransactionMixin, FilterByOrCreateMixin, SQLAlchemy):
    pass


db = DB(model_class=Base)
counter = iter(range(1000))


class Hidden(sa.types.TypeDecorator[Any]):
    impl = sa.JSON
    cache_ok = True


class Numbered(db.Model):  # type: ignore[name-defined, misc]
    id: Mapped[int] = mapped_column(primary_key=True)
    fictive_0: Mapped[int | None]
    fictive_1: Mapped[str | None]
    fictive_2: Mapped[int] = mapped_column(unique=True)


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Topic(db.Model):  # type: ignore[name-defined, misc]
    """A unique column, one that is checked, defaults of every kind."""

    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column(unique=True)
    size: Mapped[int] = mapped_column(sa.CheckConstraint("size > 0"), default=1)
    note: Mapped[str | None]
    other: Mapped[str | None] = mapped_column(unique=True)
    server: Mapped[str] = mapped_column(server_default="from the server")
    moved: Mapped[int | None] = mapped_column(onupdate=lambda: next(counter))
    marks: Mapped[list[Mark]] = relationship(back_populates="topic", foreign_keys="Mark.topic_id")


class Mark(db.Model):  # type: ignore[name-defined, misc]
    """A foreign key in the unique key, and names that need quotes, or differ from their columns."""

    __tablename__ = "select"
    __table_args__ = (sa.UniqueConstraint("topic_id", "order"), {"schema": "we ird"})
    id: Mapped[int] = mapped_column(primary_key=True)
    topic_id: Mapped[int] = mapped_column(sa.ForeignKey(Topic.id))
    kind: Mapped[str] = mapped_column("order")
    owner_id: Mapped[int | None] = mapped_column(sa.ForeignKey(Topic.id))
    topic: Mapped[Topic] = relationship(back_populates="marks", foreign_keys=[topic_id])
    owner: Mapped[Topic | None] = relationship(foreign_keys=[owner_id])


class Loose(db.Model):  # type: ignore[name-defined, misc]
    """No unique key; NULL allowed."""

    id: Mapped[int] = mapped_column(primary_key=True)
    word: Mapped[str | None]
    n: Mapped[int | None]


class Heard(db.Model):  # type: ignore[name-defined, misc]
    """Someone listens to its events."""

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    note: Mapped[str | None]


heard: list[str] = []
for name in ("before_insert", "after_insert", "before_update", "after_update"):

    def listener(mapper: Any, connection: Any, target: Any, name: str = name) -> None:
        heard.append(name)
        if name == "before_insert":
            target.note = f"{target.note} heard"

    event.listen(Heard, name, listener)


class Beast(db.Model):  # type: ignore[name-defined, misc]
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str | None] = mapped_column(unique=True)
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "beast"}


class Hound(Beast):
    """Joined: one object is two rows."""

    id: Mapped[int] = mapped_column(sa.ForeignKey(Beast.id), primary_key=True)
    breed: Mapped[str] = mapped_column(unique=True)
    __mapper_args__ = {"polymorphic_identity": "hound"}


class Cat(Beast):
    """Single table."""

    lives: Mapped[int | None] = mapped_column(default=9)
    __mapper_args__ = {"polymorphic_identity": "cat"}


class Kitchen(db.Model):  # type: ignore[name-defined, misc]
    """One of each kind of column."""

    number: Mapped[int] = mapped_column(sa.Sequence("kitchen_number"), primary_key=True)
    color: Mapped[Color] = mapped_column(sa.Enum(Color))
    places: Mapped[list[int]] = mapped_column(ARRAY(sa.Integer))
    data: Mapped[dict[str, Any]] = mapped_column(JSONB)
    text: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON)
    price: Mapped[Any] = mapped_column(sa.Numeric(8, 2), server_default="1.5")
    double: Mapped[int] = mapped_column(sa.Computed("cardinality(places) * 2", persisted=True))
    key: Mapped[str] = mapped_column(default=lambda context: context.get_current_parameters()["color"].value)
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}
    __table_args__ = (sa.UniqueConstraint("color", "places", "data"),)

    @hybrid_property
    def cost(self) -> Any:
        return self.price

    @cost.inplace.setter
    def _set_cost(self, value: Any) -> None:
        self.price = value


@pytest.fixture
def create(app: Flask) -> Callable[..., None]:
    """`create(Topic, Mark)`: their tables, and those they refer to."""

    def create(*models: Any) -> None:
        with db.engine.begin() as connection:
            connection.execute(sa.text('create schema "we ird"'))
            db.metadata.create_all(connection, tables=[model.__table__ for model in (*models, Topic)])

    return create


@pytest.fixture
def app(make_app: MakeApp) -> Iterator[Flask]:
    app = make_app(db, SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 8, "max_overflow": 0})
    with app.app_context():
        yield app


@pytest.fixture
def other(pg: postgres.Server, database_name: str) -> Iterator[psycopg.Connection[Any]]:
    """A second connection, in a transaction of its own."""
    with psycopg.connect(pg.url(database_name)) as connection:
        yield connection
        connection.rollback()


WAITING = """select locktype from pg_locks join pg_stat_activity using (pid)
             where not granted and datname = current_database()"""


@contextlib.contextmanager
def in_thread(app: Flask, look: Look, work: Callable[[], Any]) -> Iterator[concurrent.futures.Future[Any]]:
    """Runs `work` in another thread until it waits for a lock; its outcome once the block has been left."""

    def run() -> Any:
        with app.app_context():
            return work()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        while not look(WAITING) and not future.done():
            concurrent.futures.wait([future], timeout=0.01)
        yield future
        concurrent.futures.wait([future])


def errors(log: Any) -> list[str]:
    return [exchange.sqlstate for exchange in log.exchanges if exchange.sqlstate]


# -- D1, D2: finding, creating, and what it costs ---------------------------------------------------------------------


def test_d2_the_key_is_looked_for_on_a_miss_only(create: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    create()
    asked: list[object] = []
    look_for = lookups.key_for

    def key_for(*arguments: Any) -> Any:
        asked.append(arguments)
        return look_for(*arguments)

    monkeypatch.setattr(lookups, "key_for", key_for)
    Topic.find_or_create(label="new")
    assert len(asked) == 1
    for _ in range(2):
        Topic.find_or_create(label="new")
        Topic.get_or_create({"note": "x"}, label="new", size=1)
    assert len(asked) == 1


def test_d2_round_trips(create: Any, wire: Wire, look: Look) -> None:
    create(Loose)
    for number in range(8):  # psycopg prepares a statement on its sixth run, which costs one round trip once
        with wire.record() as miss:
            topic = Topic.find_or_create(label=f"x{number}")
        with wire.record() as hit:
            assert Topic.get_or_create(label=f"x{number}") == (topic, False)
    assert messages(hit) == ["SELECT"]
    assert messages(miss) == ["SELECT", "INSERT"]
    assert "ON CONFLICT (label) DO NOTHING" in miss.statements[1]
    assert hit.exchanges[-1].status == "I"
    with wire.record() as log:
        assert topic in db.session
        assert (topic.id, topic.size, topic.server, topic.moved) == (8, 1, "from the server", None)
    assert not log.exchanges  # 8: a hit takes no number from the sequence
    with wire.record() as log, db.session.begin():
        assert Topic.get_or_create(label="y")[1]
        assert not Topic.get_or_create(label="y")[1]
        assert look("select count(*) from topic where label = 'y'") == [0]
    assert messages(log) == ["BEGIN+SELECT", "INSERT", "SELECT", "COMMIT"]
    with wire.record() as log:
        loose, created = Loose.get_or_create({"n": 2}, word="w")
    assert messages(log) == ["SELECT", "BEGIN+SELECT", "SELECT", "INSERT", "COMMIT"]
    assert created
    assert Loose.get_or_create(word="w") == (loose, False)
    with wire.record() as log:
        Topic.update_or_create({"size": 2}, label="x0")
    assert log.round_trips == 1
    for _ in range(8):
        with wire.record() as log:
            assert Topic.update_or_create({"size": 2}, label="x0")[0].size == 2
    assert log.round_trips == 1


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "in a savepoint"])
def test_d2_a_lost_race(create: Any, app: Flask, other: Any, wire: Wire, look: Look, inside: bool) -> None:
    create(Heard)
    other.execute("insert into topic (label, size) values ('x', 7)")
    other.execute("insert into heard (name) values ('x')")

    def work() -> Any:
        with db.session.begin() if inside else contextlib.nullcontext():
            if inside:
                db.session.add(Topic(label="before"))
                db.session.flush()
            with db.session.begin_nested() if inside else contextlib.nullcontext():
                found = Topic.get_or_create({"size": 9}, label="x")
            if inside:
                assert db.session.scalar(sa.select(sa.func.count(Topic.id))) == 2
        return found[0].size, found[1]

    with wire.record() as log, in_thread(app, look, work) as future:
        assert messages(log)[-1:] != ["INSERT"]
        other.commit()
    assert future.result() == (7, False)
    if inside:
        assert look("select label from topic order by 1") == ["before", "x"]
    else:
        assert messages(log) == ["SELECT", "INSERT", "SELECT"]
    assert errors(log) == []


def test_d2_the_other_gives_up_or_deletes(create: Any, app: Flask, other: Any, wire: Wire, look: Look) -> None:
    create()
    other.execute("insert into topic (label, size) values ('x', 1)")
    with wire.record() as log, in_thread(app, look, lambda: Topic.get_or_create(label="x")[1]) as future:
        other.rollback()
    assert future.result() is True
    assert messages(log) == ["SELECT", "INSERT"]

    other.execute("insert into topic (label, size) values ('y', 1)")
    deleted = threading.Event()

    @event.listens_for(db.engine, "before_cursor_execute")
    def delete(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT") and not deleted.is_set() and look("select 1 from topic where label = 'y'"):
            look("delete from topic where label = 'y'")
            deleted.set()

    with wire.record() as log, in_thread(app, look, lambda: Topic.get_or_create(label="y")[1]) as future:
        other.commit()
    event.remove(db.engine, "before_cursor_execute", delete)
    assert future.result() is True
    assert deleted.is_set()
    assert messages(log) == ["SELECT", "INSERT", "SELECT", "INSERT"]
    assert errors(log) == []


# -- D3, D5: many at once ---------------------------------------------------------------------------------------------


def test_d3_d5_32_threads(create: Any, app: Flask, wire: Wire, look: Look) -> None:
    create(Loose, Heard, Beast, Hound)
    lookups: list[tuple[Any, dict[str, Any]]] = [
        (Topic, {"label": "x"}),
        (Loose, {"word": "x"}),
        (Loose, {"word": None}),
        (Heard, {"name": "x"}),
        (Beast, {"name": None}),
        (Hound, {"breed": "x"}),
    ]
    barrier = threading.Barrier(32)
    defaults = {Beast: {"kind": "beast"}}

    def work(_: int) -> list[bool]:
        made = []
        with app.app_context():
            for model, lookup in lookups:
                barrier.wait()
                made.append(model.get_or_create(defaults.get(model), **lookup)[1])
        return made

    with wire.record() as log, concurrent.futures.ThreadPoolExecutor(32) as pool:
        results = list(pool.map(work, range(32)))
    assert [sum(column) for column in zip(*results, strict=True)] == [1] * len(lookups)
    assert look("select count(*) from topic union all select count(*) from loose") == [1, 2]
    assert errors(log) == []


def test_d7_32_threads(create: Any, app: Flask, wire: Wire, look: Look) -> None:
    create(Loose, Heard)
    barrier = threading.Barrier(32)

    def work(number: int) -> list[tuple[bool, bool]]:
        made = []
        with app.app_context():
            for model, lookup, name in ((Topic, "label", "size"), (Loose, "word", "n"), (Heard, "name", "note")):
                barrier.wait()
                value: Any = str(number) if name == "note" else number + 1
                found, created = model.update_or_create({name: value}, **{lookup: "x"})
                made.append((created, str(value) in str(getattr(found, name))))
        return made

    with wire.record() as log, concurrent.futures.ThreadPoolExecutor(32) as pool:
        results = list(pool.map(work, range(32)))
    for column in zip(*results, strict=True):
        assert sum(created for created, _ in column) == 1
        assert all(applied for _, applied in column)
    assert errors(log) == []


def test_d5_equal_values_take_one_lock(create: Any, app: Flask, look: Look) -> None:
    """Values that the database takes for equal, however they are written in Python."""
    create(Loose)
    with db.session.begin():
        Loose.find_or_create(n=1)
        with in_thread(app, look, lambda: Loose.get_or_create(n=decimal.Decimal(1))[1]) as future:
            assert look(WAITING) == ["advisory"]
            db.session.commit()
            assert future.result(60) is False
    assert look(WAITING) == []


# -- D4: errors are seen ----------------------------------------------------------------------------------------------


@one_driver
def test_d4_other_violations_surface(create: Any, wire: Wire, look: Look) -> None:
    create(Beast)
    Topic.find_or_create({"other": "o"}, label="x")
    for defaults, name in (({"other": "o"}, "topic_other_key"), ({"size": 0}, "topic_size_check")):
        with pytest.raises(sa.exc.IntegrityError, match=name):
            Topic.find_or_create(defaults, label="y")
    with pytest.raises(sa.exc.IntegrityError, match="topic_label_key"):  # the row has another size
        Topic.find_or_create(label="x", size=5)
    with pytest.raises(sa.exc.IntegrityError, match="topic_label_key"):
        Topic.update_or_create({"note": "n"}, label="x", size=5)
    assert look("select label, size, note from topic") == [("x", 1, None)]
    Beast.find_or_create({"kind": "beast"}, name="rex")
    with pytest.raises(sa.exc.IntegrityError, match="beast_name_key"):  # the row is of another class
        Cat.find_or_create(name="rex")
    with pytest.raises(sa.exc.IntegrityError, match="beast_name_key"):
        Cat.update_or_create({"lives": 3}, name="rex")
    db.session.execute(sa.insert(Topic), [{"label": "p", "note": "same"}, {"label": "q", "note": "same"}])
    for method in (Topic.find_or_create, lambda **lookup: Topic.update_or_create({"size": 3}, **lookup)):
        with pytest.raises(sa.exc.MultipleResultsFound):
            method(note="same")


@one_driver
def test_d4_an_error_that_is_caught_inside(create: Any, look: Look) -> None:
    """It aborts the transaction, as any does; nothing after it is committed by accident."""
    create(Loose)
    look("alter table loose add check (n < 10)")
    with pytest.raises(sa.exc.DBAPIError), db.session.begin():
        Topic.find_or_create(label="before")
        with pytest.raises(sa.exc.IntegrityError, match="loose_n_check"):
            Loose.find_or_create({"n": 10}, word="x")
        Topic.find_or_create(label="after")
    with db.session.begin():
        Loose.find_or_create({"n": 1}, word="x")
        with pytest.raises(sa.exc.IntegrityError, match="loose_n_check"), db.session.begin_nested():
            Loose.find_or_create({"n": 10}, word="y")
        Topic.find_or_create(label="after")
    assert look("select label from topic union all select word from loose") == ["after", "x"]


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_d4_a_row_that_cannot_be_seen(create: Any, app: Flask, look: Look, level: str) -> None:
    """Committed after this transaction's snapshot: 40001 with any kind of key, never a second row."""
    create(Loose, Heard, Beast, Hound)
    calls: list[Callable[[], Any]] = [
        lambda: Topic.find_or_create(label="x"),
        lambda: Topic.update_or_create({"size": 2}, label="x"),
        lambda: Loose.find_or_create(word="x"),
        lambda: Loose.update_or_create({"n": 2}, word="x"),
        lambda: Heard.find_or_create(name="x"),
    ]
    for number, call in enumerate(calls):
        look("delete from loose; delete from heard")
        with pytest.raises(sa.exc.DBAPIError) as caught, db.transaction(isolation_level=level):
            db.session.scalar(sa.text("select count(*) from topic"))
            if number == 0:
                look("insert into topic (label, size) values ('x', 1)")
            for table, column in (("loose", "word"), ("heard", "name")):
                look(f"insert into {table} ({column}) values ('x')")
            if number == 1:
                look("update topic set size = 5")
            call()
        assert sqlstate(caught.value) == "40001"
    assert look("select count(*) from loose union all select count(*) from heard") == [1, 1]
    Hound.find_or_create({"name": "rex"}, breed="collie")
    with db.transaction(isolation_level=level):
        with pytest.raises(sa.exc.IntegrityError, match="beast_name_key"):  # seen, and not of this lookup
            Hound.find_or_create({"name": "rex"}, breed="pug")
        assert not Topic.get_or_create(label="x")[1]
        assert Topic.get_or_create(label="y")[1]
        assert not Loose.get_or_create(word="x")[1]
        assert Loose.get_or_create(word="y")[1]
        db.session.delete(Loose.find_or_create(word="y"))
        db.session.flush()
        assert Loose.get_or_create(word="y")[1]


def test_d3_a_server_whose_default_is_repeatable_read(make_app: MakeApp, look: Look, other: Any) -> None:
    """Outside there is nothing else to lose, so the serialization failure is dealt with here."""
    look(
        f"alter database {look('select current_database()')[0]} set default_transaction_isolation = 'repeatable read'"
    )
    app = make_app(db)
    with app.app_context():
        db.metadata.create_all(db.engine, tables=[Topic.__table__, Loose.__table__])
        other.execute("insert into topic (label, size) values ('x', 1)")
        with in_thread(app, look, lambda: Topic.get_or_create(label="x")[1]) as future:
            other.commit()
        assert future.result() is False
    barrier = threading.Barrier(5)

    def work(_: int) -> bool:
        with app.app_context():
            barrier.wait()
            return bool(Loose.get_or_create(word="x")[1])

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        assert sum(pool.map(work, range(5))) == 1


# -- D6: what a model may be made of ----------------------------------------------------------------------------------


@one_driver
def test_d6_defaults(create: Any, wire: Wire) -> None:
    create()
    calls = []

    def note() -> str:
        calls.append(1)
        return "called"

    topic, created = Topic.get_or_create({"note": note, "size": 4}, label="x")
    assert (created, topic.note, topic.size, calls) == (True, "called", 4, [1])
    assert Topic.find_or_create({"note": note, "size": 5}, label="x") is topic
    assert calls == [1]
    assert Topic.find_or_create(lambda: {"note": note}, label="y").note == "called"
    assert Topic.find_or_create(defaults={"server": sa.func.upper("sql")}, label="z").server == "SQL"
    with wire.record() as log:
        for lookup, defaults, error in (
            ({"lable": "x"}, {}, UnknownAttribute),
            ({"label": "x"}, {"sise": 1}, UnknownAttribute),
            ({"label": "x"}, {"marks": []}, UnknownAttribute),
            ({}, {}, TypeError),
        ):
            with pytest.raises(error):
                Topic.find_or_create(defaults, **lookup)
            with pytest.raises(error):
                Topic.update_or_create(defaults, **lookup)
        with pytest.raises(UnsavedObject, match="not saved"):
            Mark.find_or_create(topic=Topic(label="new"), kind="k")
        with pytest.raises(UnsavedObject, match="not saved"):
            Mark.find_or_create({"owner": Topic(label="new")}, topic=topic, kind="k")
        with pytest.raises(TypeError, match="FlaskSQLAlchemyBase is not a mapped class"):
            db.Model.find_or_create(id=1)
    assert not log.exchanges


@one_driver
def test_d6_relationships_and_names(create: Any, wire: Wire, look: Look) -> None:
    create(Mark)
    topic, owner = Topic.find_or_create(label="t"), Topic.find_or_create(label="o")
    assert topic.marks == []
    with wire.record() as log:
        mark, created = Mark.get_or_create({"owner": owner}, topic=topic, kind="k")
        assert created
        assert mark.topic is topic
        assert mark.owner is owner
        assert (mark.topic_id, mark.owner_id, mark.kind) == (topic.id, owner.id, "k")
    assert messages(log) == ["SELECT", "INSERT"]
    assert topic.marks == [mark]
    assert Mark.get_or_create(topic_id=topic.id, kind="k") == (mark, False)
    assert Mark.get_or_create(topic=topic, kind="k") == (mark, False)
    with wire.record() as log:
        assert Mark.update_or_create({"owner": topic}, topic=topic, kind="k") == (mark, False)
        assert mark.owner is topic
        assert mark.owner_id == topic.id
        assert Mark.update_or_create({"owner": None}, topic=topic, kind="k") == (mark, False)
        assert mark.owner is None
        assert mark.owner_id is None
    assert log.round_trips == 2
    assert look('select "order" from "we ird"."select"') == ["k"]
    assert db.session.unsaved() == []


@one_driver
def test_d6_inheritance(create: Any, wire: Wire, look: Look) -> None:
    create(Beast, Hound)
    with wire.record() as log:
        hound, created = Hound.get_or_create({"name": "rex"}, breed="collie")
    assert created
    assert verbs(log)[-1] == "COMMIT"
    assert not errors(log)
    assert (hound.kind, hound.name, hound.breed) == ("hound", "rex", "collie")
    assert Hound.get_or_create(breed="collie") == (hound, False)
    assert Beast.get_or_create(name="rex") == (hound, False)
    cat, created = Cat.get_or_create(name="tom")
    assert created
    assert (cat.kind, cat.lives) == ("cat", 9)
    assert Cat.update_or_create({"lives": 8}, name="tom") == (cat, False)
    assert cat.lives == 8
    assert Hound.update_or_create({"name": "max"}, breed="collie") == (hound, False)
    assert hound.name == "max"
    with pytest.raises(sa.exc.IntegrityError, match="beast_name_key"):  # the second of the two rows is not left over
        Hound.find_or_create({"name": "tom"}, breed="pug")
    assert look("select kind, name from beast order by id") == [("hound", "max"), ("cat", "tom")]


@one_driver
def test_d6_kinds_of_columns(create: Any, wire: Wire) -> None:
    create(Kitchen)
    lookup: dict[str, Any] = {"color": Color.RED, "places": [1, 2], "data": {"a": 1}}
    kitchen, created = Kitchen.get_or_create({"text": {"t": 1}, "cost": 2}, **lookup)
    assert created
    assert (kitchen.number, kitchen.double, kitchen.key, kitchen.price) == (1, 4, "red", 2)
    assert (kitchen.version, kitchen.text) == (1, {"t": 1})
    assert Kitchen.get_or_create(**lookup) == (kitchen, False)
    assert Kitchen.get_or_create(cost=2, **lookup) == (kitchen, False)
    for changes, version in (({"text": {"t": 1}, "cost": 2}, 1), ({"text": {"t": 2}}, 2), ({"text": None}, 3)):
        assert Kitchen.update_or_create(changes, **lookup) == (kitchen, False)
        assert kitchen.version == version
    kitchen.key = "changed"
    db.session.commit()  # the ORM's own version check agrees
    assert kitchen.version == 4
    lookup["color"] = Color.BLUE
    second, created = Kitchen.update_or_create({"cost": 5}, {"text": {"only": "new"}}, **lookup)
    assert created
    assert (second.key, second.price, second.version) == ("blue", 5, 1)
    assert Kitchen.get_or_create(double=4, color=Color.RED) == (kitchen, False)


def test_d6_one_statement_for_all_rows_of_a_lookup(create: Any, wire: Wire, look: Look) -> None:
    """Also where columns have the names that its parameters would have, and where one value is an SQL expression."""
    create(Numbered)
    for number in range(3):
        for text in ("a", sa.func.upper("b"), None):
            row = Numbered.find_or_create({"fictive_1": text}, fictive_2=number)
            found = Numbered.find_or_create(fictive_2=number)
            assert row is found
            db.session.delete(row)
            db.session.commit()
            Numbered.find_or_create({"fictive_1": text, "fictive_0": 7}, fictive_2=number + 100 * len(str(text)))
    assert look("select fictive_0, fictive_1, fictive_2 from numbered order by id") == [
        (7, text, number + size)
        for number in range(3)
        for text, size in (("a", 100), ("B", 100 * len("upper(:upper_1)")), (None, 400))
    ]


@one_driver
def test_d6_events(create: Any, wire: Wire, other: Any, app: Flask, look: Look) -> None:
    create(Heard)
    heard.clear()
    found, created = Heard.get_or_create({"note": "n"}, name="x")
    assert created
    assert found.note == "n heard"
    assert heard == ["before_insert", "after_insert"]
    assert found in db.session
    assert not sa.inspect(found).expired_attributes
    assert Heard.update_or_create({"note": "m"}, name="x") == (found, False)
    assert found.note == "m"
    assert heard == ["before_insert", "after_insert", "before_update", "after_update"]
    assert look("select name, note from heard") == [("x", "m")]
    # a writer that takes no lock: the savepoint keeps the transaction, and what is pending stays pending
    other.execute("insert into heard (name) values ('y')")

    def work() -> Any:
        with db.session.begin():
            pending = Topic(label="pending")
            db.session.add(pending)
            found, created = Heard.get_or_create(name="y")
            assert pending in db.session.new
        return found.note, created

    with in_thread(app, look, work) as future:
        other.commit()
    assert future.result() == (None, False)
    assert look("select label from topic") == ["pending"]


class Methods:
    """The three methods on any base; `Methods.session` is the session."""

    session: Any = None
    find_or_create = FindOrCreateDescriptor(lambda: Methods.session)
    get_or_create = GetOrCreateDescriptor(lambda: Methods.session)
    update_or_create = UpdateOrCreateDescriptor(lambda: Methods.session)


class Eager(Methods, DeclarativeBase):
    pass


class Parent(Eager):
    """A joined collection, an identity, and a type that hides JSON."""

    __tablename__ = "parent"
    id: Mapped[int] = mapped_column(sa.Identity(always=True), primary_key=True)
    name: Mapped[str] = mapped_column(unique=True, key="nm")
    data: Mapped[dict[str, Any] | None] = mapped_column(Hidden)
    kids: Mapped[list[Kid]] = relationship(back_populates="parent", lazy="joined")


class Kid(Eager):
    __tablename__ = "kid"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int] = mapped_column(sa.ForeignKey("parent.id"))
    word: Mapped[str]
    parent: Mapped[Parent] = relationship(back_populates="kids", lazy="joined")


class Part(Eager):
    """RETURNING has no system columns here."""

    __tablename__ = "part"
    __table_args__ = {"postgresql_partition_by": "RANGE (id)"}
    id: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int | None]


class Datas(Methods, MappedAsDataclass, DeclarativeBase):
    pass


class Owner(Datas):
    __tablename__ = "owner"
    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    name: Mapped[str] = mapped_column(unique=True)
    pets: Mapped[list[Pet]] = relationship(back_populates="owner", default_factory=list)


class Pet(Datas):
    """Its constructor wants the related object."""

    __tablename__ = "pet"
    __table_args__ = (sa.UniqueConstraint("owner_id", "name"),)
    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    owner_id: Mapped[int] = mapped_column(sa.ForeignKey("owner.id"), init=False)
    owner: Mapped[Owner] = relationship(back_populates="pets")
    name: Mapped[str]
    legs: Mapped[int] = mapped_column(default=4)


@one_driver
def test_d6_eager_loading_partitions_and_dataclasses(database_url: str, look: Look) -> None:
    engine = sa.create_engine(database_url)
    Eager.metadata.create_all(engine)
    Datas.metadata.create_all(engine)
    look("create table part_1 partition of part for values from (0) to (9)")
    with OptInSession(engine) as Methods.session:
        parent = Parent.find_or_create(name="x")
        for data, changed in (({"a": 1}, True), ({"a": 1}, False), ({"a": 2}, True)):
            before = look("select ctid::text from parent")
            assert Parent.update_or_create({"data": data}, name="x") == (parent, False)
            assert parent.data == data
            assert (look("select ctid::text from parent") != before) is changed
        kid, created = Kid.get_or_create(parent=parent, word="w")
        assert created
        assert Kid.get_or_create(parent=parent, word="w") == (kid, False)
        assert Kid.update_or_create({"word": "v"}, parent=parent, id=kid.id) == (kid, False)
        assert (kid.word, parent.kids) == ("v", [kid])
        assert Parent.get_or_create(name="x") == (parent, False)
        assert Part.get_or_create(id=1)[1]
        assert [Part.update_or_create({"n": 2}, id=id)[1] for id in (1, 2)] == [False, True]
        owner = Owner.find_or_create(name="o")
        assert owner.pets == []
        pet, created = Pet.get_or_create(owner=owner, name="p")
        assert (created, pet.legs, pet.owner) == (True, 4, owner)
        assert owner.pets == [pet]
        assert Pet.update_or_create({"legs": 3}, owner=owner, name="p") == (pet, False)
        assert pet.legs == 3
        assert Methods.session.unsaved() == []
    engine.dispose()


@one_driver
def test_d6_another_bind(make_app: MakeApp, database_url: str, wire: Wire, look: Look) -> None:
    """The engine is the model's, whatever the default one is."""
    two = DB(model_class=type("Base", (DeclarativeBase,), {}))
    columns = {"id": sa.Column(sa.Integer, primary_key=True), "name": sa.Column(sa.Text)}
    There = type("There", (two.Model,), {**columns, "__bind_key__": "there"})
    app = make_app(two, SQLALCHEMY_DATABASE_URI="sqlite://", SQLALCHEMY_BINDS={"there": wire.url(database_url)})
    with app.app_context():
        two.create_all()
        there, created = There.get_or_create(name="x")
        assert created
        assert There.get_or_create(name="x") == (there, False)
        assert There.update_or_create({"name": "y"}, id=there.id) == (there, False)
    assert look("select name from there") == ["y"]


# -- D7 ---------------------------------------------------------------------------------------------------------------


def test_d7_update_or_create(create: Any, wire: Wire, look: Look) -> None:
    create()
    where = "select ctid::text, moved from topic where label = 'x'"
    topic, created = Topic.update_or_create({"note": "a"}, {"size": 3, "note": "first"}, label="x")
    assert created
    assert (topic.note, topic.size, topic.moved) == ("first", 3, None)
    assert Topic.update_or_create({"note": "a"}, {"size": 4}, label="x") == (topic, False)
    assert (topic.note, topic.size) == ("a", 3)
    assert topic.moved is not None
    before = look(where)
    look("update topic set size = 6 where label = 'x'")
    before = look(where)
    assert topic.size == 3  # in the identity map, and old
    with wire.record() as log:
        assert Topic.update_or_create({"note": "a"}, label="x") == (topic, False)
    assert log.round_trips == 1
    assert log.exchanges[0].status == "I"
    assert look(where) == before
    assert topic.size == 6
    assert Topic.update_or_create({"note": None}, label="x")[0].note is None
    assert Topic.update_or_create({"note": sa.func.upper("b")}, label="x")[0].note == "B"
    topic, created = Topic.update_or_create({"size": Topic.size + 1}, {"size": 1}, label="x")
    assert not created
    assert topic.size == 7
    assert Topic.update_or_create({"size": Topic.size + 1}, {"size": 1}, label="new")[0].size == 1
    assert Topic.update_or_create({"note": lambda: "called"}, label="x")[0].note == "called"
    assert Topic.update_or_create({}, {"size": 2}, label="x") == (topic, False)


def test_d7_locks_for_no_key_update(create: Any, other: Any, look: Look) -> None:
    """A child that refers to the row can be written meanwhile, and the other way round."""
    create(Mark)
    topic = Topic.find_or_create(label="x")
    other.execute("""insert into "we ird"."select" (topic_id, "order") values (%s, 'a')""", [topic.id])
    assert Topic.update_or_create({"note": "n"}, label="x")[1] is False  # would wait for ever with FOR UPDATE
    with db.session.begin():
        Topic.update_or_create({"note": "m"}, label="x")
        Topic.update_or_create({"size": 2}, id=topic.id)
        look("""insert into "we ird"."select" (topic_id, "order") values (%s, 'b')""", topic.id)
    other.commit()


def test_d7_the_losers_values_are_applied(create: Any, app: Flask, other: Any, wire: Wire, look: Look) -> None:
    create()
    other.execute("insert into topic (label, size, note) values ('x', 1, 'winner')")

    def work() -> Any:
        found, created = Topic.update_or_create({"note": "loser"}, {"size": 5}, label="x")
        return found.note, found.size, created

    with wire.record() as log, in_thread(app, look, work) as future:
        other.commit()
    assert future.result() == ("loser", 1, False)
    assert log.round_trips == 1
    # what the other commits is just what is asked for: the row is read as it is now, not as it was
    other.execute("update topic set note = 'same', size = 9 where label = 'x'")
    with in_thread(app, look, lambda: Topic.update_or_create({"note": "same"}, label="x")[0].size) as future:
        other.commit()
    assert future.result() == 9


# -- where it runs ----------------------------------------------------------------------------------------------------


@one_driver
def test_a23_writes_outside(create: Any, wire: Wire, look: Look) -> None:
    create(Loose)
    db.session.writes_outside = "refuse"
    with wire.record() as log:
        for call in (lambda: Topic.find_or_create(label="x"), lambda: Loose.find_or_create(word="x")):
            with pytest.raises(TransactionRequired):
                call()
        with pytest.raises(TransactionRequired):
            Topic.update_or_create({"size": 2}, label="x")
    assert messages(log) == ["SELECT", "SELECT"]
    look("insert into topic (label, size) values ('x', 1)")
    assert Topic.get_or_create(label="x")[1] is False
    db.session.writes_outside = "begin"
    for call in (lambda: Topic.find_or_create(label="y"), lambda: Loose.find_or_create(word="y")):
        call()
        assert db.session.in_transaction()
        assert look("select count(*) from topic, loose") == [0]
        db.session.rollback()
    assert Topic.get_or_create(label="x")[1] is False
    assert Topic.update_or_create({"size": 2}, label="z")[1]
    assert db.session.in_transaction()
    db.session.commit()
    assert look("select label from topic order by 1") == ["x", "z"]


@one_driver
def test_a13_pinned_and_pending_objects(create: Any, wire: Wire) -> None:
    create(Loose)
    pending = Topic(label="pending")
    db.session.add(pending)
    with db.pinned():
        assert Topic.get_or_create(label="x")[1]
        assert Loose.get_or_create(word="x")[1]
    assert Topic.update_or_create({"size": 2}, label="x")[1] is False
    assert pending in db.session.new
    db.session.expunge(pending)


@one_driver
def test_d1_on_any_declarative_base_and_session(create: Any, database_url: str, wire: Wire, look: Look) -> None:
    """A plain session: its own transaction, which its owner ends."""
    create(Loose)
    engine = sa.create_engine(database_url)

    class Plain(DeclarativeBase):
        find_or_create = FindOrCreateDescriptor(lambda: session)
        get_or_create = GetOrCreateDescriptor(lambda: session)
        update_or_create = UpdateOrCreateDescriptor(lambda: session)

    class PlainTopic(Plain):
        __table__ = sa.Table("topic", Plain.metadata, *(column._copy() for column in Topic.__table__.columns))

    class PlainLoose(MappedAsDataclass, Plain):
        __tablename__ = "loose"
        id: Mapped[int] = mapped_column(primary_key=True, init=False)
        word: Mapped[str]
        n: Mapped[int] = mapped_column(default=4)

    with sa_orm.Session(engine) as session:
        assert PlainTopic.find_or_create(label="x") is PlainTopic.find_or_create(label="x")
        loose, created = PlainLoose.get_or_create(word="x")
        assert created
        assert loose.n == 4
        assert PlainLoose.update_or_create({"n": 5}, word="x") == (loose, False)
        assert loose.n == 5
        assert PlainTopic.update_or_create({"size": 2}, label="x")[0].size == 2
        assert session.in_transaction()
        assert look("select count(*) from topic") == [0]
        session.rollback()
        assert PlainTopic.get_or_create(label="x")[1]
        session.commit()
    assert look("select label from topic") == ["x"]
    registry = sa_orm.scoped_session(sa_orm.sessionmaker(engine, class_=OptInSession))
    session = registry  # type: ignore[assignment]
    assert PlainTopic.get_or_create(label="y")[1]
    assert look("select count(*) from topic") == [2]
    registry.remove()
    engine.dispose()


@one_driver
def test_d1_the_mixin_in_any_order_and_alone(make_app: MakeApp, look: Look) -> None:
    class Swapped(FilterByOrCreateMixin, OptInTransactionMixin, SQLAlchemy):
        pass

    class Alone(FilterByOrCreateMixin, SQLAlchemy):
        pass

    for class_, owns in ((Swapped, True), (Alone, True), (Alone, False)):

        class Own(sa_orm.DeclarativeBaseNoMeta):
            @classmethod
            def get_or_create(cls) -> str:
                return "my own"

        base = Own if owns else None
        mine = class_(model_class=base) if base else class_()
        app = make_app(mine)
        Thing = type("Item", (mine.Model,), {"id": sa.Column(sa.Integer, primary_key=True),
                                             "name": sa.Column(sa.Text, unique=True)})  # fmt: skip
        with app.app_context():
            thing = Thing.find_or_create(name="x")
            assert thing in mine.session
            assert Thing.update_or_create({}, name="x") == (thing, False)
            assert (Thing.get_or_create() == "my own") if base else Thing.get_or_create(name="x") == (thing, False)
            mine.session.rollback() if class_ is Alone else look("delete from item")
        assert look("select count(*) from item") == [0]
    with pytest.raises(ConfigurationError, match=r"class Wrong\(FilterByOrCreateMixin, SQLAlchemy\)"):
        type("Wrong", (SQLAlchemy, FilterByOrCreateMixin), {})


# -- SQLite -----------------------------------------------------------------------------------------------------------


def test_d5_sqlite(tmp_path: Path) -> None:
    """Its write lock keeps creators apart, with a unique key and without."""
    app = Flask(__name__, instance_path=str(tmp_path))
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path / 'test.db'}"
    db.init_app(app)
    with app.app_context():
        tables = [model.__table__ for model in (Topic, Loose, Heard, Beast, Hound)]
        db.metadata.create_all(db.engine, tables=tables)
    lookups: list[tuple[Any, dict[str, Any]]] = [
        (Topic, {"label": "x"}),
        (Loose, {"word": "x"}),
        (Loose, {"word": None}),
        (Heard, {"name": "x"}),
        (Hound, {"breed": "x"}),
    ]
    barrier = threading.Barrier(8)

    def work(_: int) -> list[bool]:
        made = []
        with app.app_context():
            for model, lookup in lookups:
                barrier.wait()
                made.append(model.get_or_create(**lookup)[1])
        return made

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    assert [sum(column) for column in zip(*results, strict=True)] == [1] * len(lookups)
    with app.app_context():
        topic = Topic.find_or_create(label="x")
        assert Topic.update_or_create({"note": "n"}, label="x") == (topic, False)
        assert topic.note == "n"
        assert Topic.update_or_create({"note": "n"}, {"size": 5}, label="y")[0].size == 5
        with db.session.begin():
            assert Topic.get_or_create(label="z")[1]
            assert Loose.get_or_create(word="z")[1]
        db.engine.dispose()


def test_a21_other_databases() -> None:
    session = sa_orm.Session(sa.create_engine("mysql+pymysql://x", module=types.SimpleNamespace(paramstyle="format")))
    with pytest.raises(UnsupportedDialect, match=r"Thing.find_or_create\(\) needs PostgreSQL or SQLite"):
        Thing = type("Thing", (sa_orm.DeclarativeBase,), {})
        Thing = type(
            "Thing",
            (Thing,),
            {
                "__tablename__": "thing",
                "id": mapped_column(sa.Integer, primary_key=True),
                "find_or_create": FindOrCreateDescriptor(lambda: session),
            },
        )
        Thing.find_or_create(id=1)

"""Contract E: many-to-many relationships without loading them."""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from fictive.errors import ConfigurationError, TransactionRequired, UnsupportedDialect
from fictive.rows.link_sql import linked_by
from fictive.sqlalchemy import LinkChanges, OptInSession, m2m_add, m2m_clear, m2m_remove, m2m_set
from fictive.testing.wire import Wire
from tests.conftest import MakeApp
from tests.fresh_database import WAITING
from tests.models import Child, Item, Tag, db
from tests.wirelog import messages

Look = Callable[..., list[Any]]
LINKS = "select tag_id from item_tag where item_id = %s order by 1"


@pytest.fixture
def item(app: Flask, look: Look) -> Any:
    """Item 1, linked to tags 1 to 3 of 8."""
    look("insert into item (name) values ('one'), ('two')")
    look("insert into tag (label) select 'tag ' || n from generate_series(1, 8) n")
    look("insert into item_tag select 1, n from generate_series(1, 3) n")
    return db.session.get(Item, 1)


# Relationships of every shape


class Base(DeclarativeBase):
    pass


link = sa.Table(
    "edge",
    Base.metadata,
    sa.Column("from", sa.ForeignKey("node.no"), primary_key=True),
    sa.Column("to", sa.ForeignKey("node.no"), primary_key=True),
)


class Node(Base):
    __tablename__ = "node"
    id: Mapped[int] = mapped_column("no", primary_key=True)
    name: Mapped[str]
    children: Mapped[list[Node]] = relationship(
        secondary=link,
        primaryjoin=lambda: Node.id == link.c["from"],
        secondaryjoin=lambda: Node.id == link.c.to,
        back_populates="parents",
    )
    parents: Mapped[list[Node]] = relationship(
        secondary=link,
        primaryjoin=lambda: Node.id == link.c.to,
        secondaryjoin=lambda: Node.id == link.c["from"],
        back_populates="children",
    )
    seen: Mapped[list[Node]] = relationship(
        secondary=link,
        primaryjoin=lambda: Node.id == link.c["from"],
        secondaryjoin=lambda: Node.id == link.c.to,
        viewonly=True,
    )
    narrow: Mapped[list[Node]] = relationship(
        secondary=link,
        primaryjoin=lambda: sa.and_(Node.id == link.c["from"], link.c.to > 5),
        secondaryjoin=lambda: Node.id == link.c.to,
        overlaps="children,parents",
    )


# reserved words for names, a schema, one column for both sides, and columns with every kind of default
order_part = sa.Table(
    "order part",
    Base.metadata,
    sa.Column("of", sa.Integer, key="order_number"),
    sa.Column("tenant", sa.Integer),
    sa.Column("code", sa.String(3)),
    sa.Column("id", sa.Uuid, primary_key=True, default=uuid.uuid4),
    sa.Column("amount", sa.Integer, default=1),
    sa.Column("made", sa.DateTime, default=sa.func.now()),
    sa.Column("marks", sa.ARRAY(sa.Text), default=lambda: ["new"]),
    sa.Column("place", sa.Integer, sa.Sequence("place", schema="select")),
    sa.Column("state", sa.Text, server_default="open"),
    sa.ForeignKeyConstraint(["tenant", "order_number"], ["select.order.tenant", "select.order.num"]),
    sa.ForeignKeyConstraint(["tenant", "code"], ["select.part.tenant", "select.part.code"]),
    sa.UniqueConstraint("tenant", "order_number", "code"),
    schema="select",
)


class Order(Base):
    __tablename__ = "order"
    __table_args__ = {"schema": "select"}
    number: Mapped[int] = mapped_column("num", primary_key=True)
    tenant: Mapped[int] = mapped_column(primary_key=True)
    parts: Mapped[list[Part]] = relationship(secondary=order_part, back_populates="orders")


class Part(Base):
    __tablename__ = "part"
    __table_args__ = {"schema": "select"}
    tenant: Mapped[int] = mapped_column(primary_key=True)
    code: Mapped[str] = mapped_column(sa.String(3), primary_key=True)
    orders: Mapped[list[Order]] = relationship(secondary=order_part, back_populates="parts")


class Pet(Base):
    __tablename__ = "pet"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "pet"}


# no unique constraint, and one side by another column than the key
stay = sa.Table(
    "stay",
    Base.metadata,
    sa.Column("room_id", sa.ForeignKey("room.id")),
    sa.Column("chip", sa.ForeignKey("puppy.chip")),
    sa.Column("pet_id", sa.ForeignKey("pet.id")),
)


class Puppy(Pet):
    __tablename__ = "puppy"
    id: Mapped[int] = mapped_column(sa.ForeignKey("pet.id"), primary_key=True)
    breed: Mapped[str]
    chip: Mapped[str] = mapped_column(sa.CHAR(4), unique=True)
    rooms: Mapped[list[Room]] = relationship(
        secondary=stay, primaryjoin=lambda: Puppy.chip == stay.c.chip, back_populates="puppies"
    )
    __mapper_args__ = {"polymorphic_identity": "puppy"}


class Room(Base):
    __tablename__ = "room"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    puppies: Mapped[list[Puppy]] = relationship(
        secondary=stay, secondaryjoin=lambda: Puppy.chip == stay.c.chip, back_populates="rooms"
    )
    pets: Mapped[list[Puppy]] = relationship(
        secondary=stay, secondaryjoin=lambda: Puppy.id == stay.c.pet_id, overlaps="rooms,puppies"
    )


# E1: what they do, and their price


def test_e1_each_is_one_round_trip_and_returns_what_changed(item: Any, wire: Wire, look: Look) -> None:
    with wire.record() as log:
        assert db.m2m_add(item, Item.tags, 4, 5, 4) == (4, 5)
    assert messages(log) == ["INSERT"]
    assert look(LINKS, 1) == [1, 2, 3, 4, 5]
    with wire.record() as log:
        assert db.m2m_add(item, Item.tags, 5, 6, ignore_conflicts=True) == (6,)
    assert messages(log) == ["INSERT"]
    with wire.record() as log:
        assert sorted(db.m2m_remove(item, Item.tags, 1, 6, 8, 1)) == [1, 6]
    assert messages(log) == ["DELETE"]
    with wire.record() as log:
        changes = db.m2m_set(item, Item.tags, 2, 3, 7, 7)
    assert messages(log) == ["WITH"]
    assert (sorted(changes.added), sorted(changes.removed)) == ([7], [4, 5])
    assert look(LINKS, 1) == [2, 3, 7]
    with wire.record() as log:
        assert sorted(db.m2m_clear(item, Item.tags)) == [2, 3, 7]
    assert messages(log) == ["DELETE"]
    assert not db.m2m_set(item, Item.tags)
    assert look("select count(*) from item_tag") == [0]
    assert not db.session.in_transaction()


def test_e1_nothing_given_sends_nothing_but_for_set(item: Any, wire: Wire, look: Look) -> None:
    with wire.record() as log:
        assert db.m2m_add(item, Item.tags) == db.m2m_remove(item, Item.tags) == ()
    assert not log.exchanges
    assert sorted(db.m2m_set(item, Item.tags).removed) == [1, 2, 3]


def test_e1_a_link_that_is_there_is_an_integrity_error(item: Any, look: Look) -> None:
    with pytest.raises(sa.exc.IntegrityError):
        db.m2m_add(item, Item.tags, 4, 3)
    with pytest.raises(sa.exc.IntegrityError):  # ignore_conflicts is for links, not for tags that do not exist
        db.m2m_add(item, Item.tags, 4, 99, ignore_conflicts=True)
    with pytest.raises(sa.exc.IntegrityError):
        db.m2m_set(item, Item.tags, 99)
    assert look(LINKS, 1) == [1, 2, 3]
    assert db.m2m_add(item, Item.tags, 4) == (4,)


def test_e1_objects_and_keys(item: Any, wire: Wire, look: Look) -> None:
    four, five = (db.session.get(Tag, key) for key in (4, 5))
    db.session.expire(four)
    with wire.record() as log:
        assert db.m2m_add(item, Item.tags, four, 5, five, 4) == (4, 5)
    assert messages(log) == ["INSERT"]
    db.session.expunge(four)
    db.session.expunge(item)
    assert db.m2m_remove(item, Item.tags, four) == (4,)


def test_e1_pending_objects_are_flushed_first_all_or_nothing(item: Any, wire: Wire, look: Look) -> None:
    new = Tag(label="new")
    db.session.add(new)
    with wire.record() as log:
        assert db.m2m_add(item, Item.tags, new) == (9,)
    assert messages(log) == ["BEGIN+INSERT", "INSERT", "COMMIT"]
    newer = Tag(label="newer")
    db.session.add(newer)
    with pytest.raises(sa.exc.IntegrityError):
        db.m2m_add(item, Item.tags, newer, 1)
    assert look("select count(*) from tag where label = 'newer'") == [0]
    assert look(LINKS, 1) == [1, 2, 3, 9]
    assert not db.session.in_transaction()


def test_e1_changes_of_the_collection_are_not_lost(item: Any, look: Look) -> None:
    item.tags.append(db.session.get(Tag, 8))
    item.note = "changed"
    db.m2m_add(item, Item.tags, 4)
    assert look(LINKS, 1) == [1, 2, 3, 4, 8]
    item.note = "again"  # of other attributes it takes no notice
    db.m2m_remove(item, Item.tags, 4)
    assert look("select note from item where id = 1") == ["changed"]
    assert sorted(tag.id for tag in item.tags) == [1, 2, 3, 8]
    db.session.commit()


def test_e1_inside_it_is_part_of_the_transaction(item: Any, wire: Wire, look: Look) -> None:
    with wire.record() as log, db.session.begin():
        db.m2m_set(item, Item.tags, 8)
        assert look(LINKS, 1) == [1, 2, 3]
    assert messages(log) == ["BEGIN+WITH", "COMMIT"]
    with db.session.begin() as transaction:
        db.m2m_clear(item, Item.tags)
        transaction.rollback()
    assert look(LINKS, 1) == [8]
    assert [tag.id for tag in item.tags] == [8]


def test_a23_they_are_writes(item: Any, wire: Wire, look: Look) -> None:
    db.session.writes_outside = "refuse"
    with wire.record() as log:
        for work in (db.m2m_set, db.m2m_add, db.m2m_remove):
            with pytest.raises(TransactionRequired):
                work(item, Item.tags, 4)
    assert not log.exchanges
    db.session.writes_outside = "begin"
    db.m2m_set(item, Item.tags, 4)
    assert db.session.in_transaction()
    db.session.rollback()
    assert look(LINKS, 1) == [1, 2, 3]


def test_e_any_session(item: Any, database_url: str, look: Look) -> None:
    engine = sa.create_engine(database_url)
    with sa_orm.Session(engine) as session:
        mine = session.get(Item, 1)
        assert m2m_add(session, mine, Item.tags, 4) == (4,)
        session.rollback()
        assert m2m_set(sa_orm.scoped_session(lambda: session), mine, Item.tags, 1) == LinkChanges((), (2, 3))
        session.commit()
    with OptInSession(engine) as session:
        mine = session.get(Item, 1)
        assert m2m_remove(session, mine, Item.tags, 1) == (1,)
        assert m2m_clear(session, mine, Item.tags) == ()
    engine.dispose()
    assert look(LINKS, 1) == []


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_e1_wrong_arguments_fail_before_any_sql(item: Any, wire: Wire) -> None:
    tag = db.session.get(Tag, 1)
    pending = Item(name="pending")
    db.session.add(pending)
    other = sa_orm.Session(db.engine)
    elsewhere = Tag(label="in another session")
    other.add(elsewhere)
    cases: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (TypeError, "no secondary table", (item, Item.children, 1)),
        (TypeError, "expected a many-to-many relationship", (item, "tags", 1)),
        (TypeError, "expected a many-to-many relationship", (item, Item.name, 1)),
        (TypeError, "expected a many-to-many relationship", (item, sa.inspect(Item).relationships.tags, 1)),
        (TypeError, r"Item\.tags is of Item, not of", (tag, Item.tags, 1)),
        (TypeError, r"Item\.tags is of Item, not of", (1, Item.tags, 1)),
        (ValueError, "is not saved", (pending, Item.tags, 1)),
        (ValueError, "is not saved", (Item(name="transient"), Item.tags, 1)),
        (ValueError, "is not saved", (item, Item.tags, Tag(label="transient"))),
        (ValueError, "is not saved", (item, Item.tags, elsewhere)),
        (TypeError, "links Tag objects", (item, Item.tags, item)),
        (TypeError, "one by one", (item, Item.tags, [1, 2])),
        (TypeError, "no primary key of Tag", (item, Item.tags, "1")),
        (TypeError, "no primary key of Tag", (item, Item.tags, None)),
        (TypeError, "no primary key of Tag", (item, Item.tags, (1, 2))),
    ]
    with wire.record() as log:
        for error, message, arguments in cases:
            for work in (db.m2m_add, db.m2m_remove, db.m2m_set):
                with pytest.raises(error, match=message):
                    work(*arguments)
        for error, message, arguments in cases[:6]:
            with pytest.raises(error, match=message):
                db.m2m_clear(*arguments[:2])
        with pytest.raises(TypeError, match=r"db\.session"):
            m2m_add(db, item, Item.tags, 1)
    assert not log.exchanges
    assert Child  # its relationship is the one without a secondary
    other.close()
    db.session.rollback()


def test_a21_another_database() -> None:
    session = sa_orm.Session(sa.create_engine("sqlite://"))
    with pytest.raises(UnsupportedDialect, match=r"m2m_set\(\) needs PostgreSQL.*sqlite"):
        m2m_set(session, Item(), Item.tags, 1)


# E2: rows that stay are not touched


def test_e2_set_keeps_the_rows_that_stay(item: Any, look: Look) -> None:
    before = dict(look("select tag_id, ctid::text || xmin::text from item_tag"))
    assert not db.m2m_set(item, Item.tags, 3, 2, 1)
    assert dict(look("select tag_id, ctid::text || xmin::text from item_tag")) == before
    db.m2m_set(item, Item.tags, 2, 3, 4)
    after = dict(look("select tag_id, ctid::text || xmin::text from item_tag"))
    assert set(after) == {2, 3, 4}
    assert (after[2], after[3]) == (before[2], before[3])


def test_k_set_of_100_links_10_changed_is_1_round_trip(item: Any, wire: Wire, look: Look) -> None:
    look("insert into tag (label) select 'more ' || n from generate_series(9, 120) n")
    db.m2m_set(item, Item.tags, *range(1, 101))
    for first in itertools.chain(range(11, 1, -1), range(11, 21)):  # enough runs for psycopg to have prepared it
        with wire.record() as log:
            changes = db.m2m_set(item, Item.tags, *range(first, first + 100))
        count = len(changes.added)
    assert log.round_trips == 1
    assert count == len(changes.removed) == 1
    changes = db.m2m_set(item, Item.tags, *range(10, 110))
    assert (len(changes.added), len(changes.removed)) == (10, 10)


# E3: collections are expired; every kind of relationship


def test_e3_loaded_collections_of_both_sides_are_expired(
    shapes: sa_orm.sessionmaker[OptInSession], wire: Wire
) -> None:
    with shapes() as session:
        node, other, third = session.scalars(sa.select(Node).order_by(Node.id)).all()
        assert (node.children, other.parents, third.parents, node.parents, other.children) == ([], [], [], [], [])
        with wire.record() as log:
            m2m_add(session, node, Node.children, other)
        assert messages(log) == ["INSERT"]
        states = {each: sa.inspect(each) for each in (node, other, third)}
        assert "children" not in states[node].dict
        assert "parents" not in states[other].dict
        assert {"parents", "name"} <= states[node].dict.keys()
        assert "children" in states[other].dict
        assert "parents" in states[third].dict
        assert (node.children, other.parents) == ([other], [node])
        m2m_set(session, node, Node.children, third.id)
        assert (node.children, other.parents, third.parents) == ([third], [], [node])
        m2m_add(session, node, Node.parents, third)  # the other direction
        assert (third.children, node.parents, third.parents) == ([node], [third], [node])
        third.parents.append(other)  # not written; who is removed from the other side keeps it
        m2m_clear(session, node, Node.children)
        assert third.parents == [node, other]
        session.commit()


@pytest.fixture
def shapes(database_url: str, wire: Wire) -> Iterator[sa_orm.sessionmaker[OptInSession]]:
    """Tables of every shape, with a few rows in each, and sessions on them."""
    engine = sa.create_engine(wire.url(database_url))
    with engine.begin() as connection:
        connection.execute(sa.text('create schema "select"'))
    Base.metadata.create_all(engine)
    session = sa_orm.sessionmaker(engine, class_=OptInSession, expire_on_commit=False)
    with session.begin() as filling:
        filling.add_all([Node(name=name) for name in "abc"])
        filling.add_all([Order(tenant=1, number=n) for n in (1, 2)])
        filling.add_all([Part(tenant=t, code=code) for t, code in ((1, "a"), (1, "b"), (2, "a"))])
        filling.add_all([Puppy(breed=breed, chip=chip) for breed, chip in (("x", "1"), ("y", "2"))])
        filling.add_all([Room(id=uuid.UUID(int=n)) for n in (1, 2)])
    yield session
    engine.dispose()


def test_e3_composite_keys_schemas_names_and_extra_columns(
    shapes: sa_orm.sessionmaker[OptInSession], look: Look
) -> None:
    with shapes() as session:
        order, part = session.get(Order, (1, 1)), session.get(Part, (1, "a"))
        assert (order.parts, part.orders) == ([], [])
        assert sorted(m2m_add(session, order, Order.parts, part, (1, "b"))) == [(1, "a"), (1, "b")]
        rows = look(
            'select amount, marks, place, state, made is not null, id from "select"."order part" order by place'
        )
        assert [row[:5] for row in rows] == [(1, ["new"], 1, "open", True), (1, ["new"], 2, "open", True)]
        assert rows[0][5] != rows[1][5]  # a function makes a value for each row
        look("""update "select"."order part" set amount = 7 where code = 'b'""")
        assert part.orders == [order]
        assert m2m_set(session, order, Order.parts, (1, "b")) == LinkChanges(removed=((1, "a"),))
        assert (part.orders, [part.code for part in order.parts]) == ([], ["b"])
        assert look('select amount from "select"."order part"') == [7]
        assert m2m_set(session, part, Part.orders, (1, 1), (2, 1)).added == ((1, 1), (2, 1))
        assert m2m_add(session, part, Part.orders, (1, 1), ignore_conflicts=True) == ()
        assert sorted(m2m_remove(session, part, Part.orders, order, (9, 1))) == [(1, 1)]
        with pytest.raises(ValueError, match="another tenant"):
            m2m_add(session, order, Order.parts, (2, "a"))
        with pytest.raises(TypeError, match="no primary key of Part"):
            m2m_add(session, order, Order.parts, "a")
        with pytest.raises(sa.exc.DataError):  # not cut to the three characters that the column can hold
            m2m_add(session, order, Order.parts, (1, "b  x"))


def test_e3_other_columns_than_the_key_inheritance_and_no_constraint(
    shapes: sa_orm.sessionmaker[OptInSession], look: Look
) -> None:
    with shapes() as session:
        room = session.get(Room, uuid.UUID(int=1))
        one, two = session.scalars(sa.select(Puppy).order_by(Puppy.id)).all()
        assert (one.rooms, two.rooms) == ([], [])
        assert len(m2m_add(session, room, Room.puppies, one, two)) == 2
        assert (room.puppies, one.rooms) == ([one, two], [room])
        assert len(m2m_set(session, room, Room.puppies, two).removed) == 1
        assert (room.puppies, one.rooms, two.rooms) == ([two], [], [room])
        assert m2m_clear(session, two, Puppy.rooms) == (room.id,)
        assert m2m_set(session, two, Puppy.rooms, uuid.UUID(int=2)).added == (uuid.UUID(int=2),)
        with pytest.raises(TypeError, match="Give objects"):
            m2m_add(session, room, Room.puppies, "1")
        with pytest.raises(ConfigurationError, match=r"stay has no primary key.*\(room_id, chip\)"):
            m2m_add(session, room, Room.puppies, one, ignore_conflicts=True)
        m2m_add(session, room, Room.puppies, one)
        m2m_add(session, room, Room.puppies, one)  # nothing in the way of a second row
        assert len(m2m_remove(session, room, Room.puppies, one)) == 1
        assert m2m_add(session, room, Room.pets, one.id) == (one.id,)  # by the base class's key
        assert look("select count(*) from stay") == [2]


def test_e1_relationships_whose_links_the_columns_do_not_tell() -> None:
    for attribute, message in ((Node.seen, "viewonly"), (Node.narrow, "condition in its join")):
        with pytest.raises(TypeError, match=message):
            linked_by(attribute)


# E4: at the same time


def test_e4_threads_that_add_one_link(make_app: MakeApp, look: Look) -> None:
    threads = 32
    app = make_app(SQLALCHEMY_ENGINE_OPTIONS={"pool_size": threads})
    look("insert into item (name) values ('one')")
    look("insert into tag (label) values ('one')")
    barrier = threading.Barrier(threads)
    added: list[tuple[Any, ...]] = []
    errors: list[BaseException] = []

    def work() -> None:
        with app.app_context():
            item = db.session.get(Item, 1)
            db.session.scalar(sa.select(1))
            barrier.wait(60)
            try:
                added.append(db.m2m_add(item, Item.tags, 1, ignore_conflicts=True))
            except BaseException as error:
                errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    assert sorted(added) == [()] * (threads - 1) + [(1,)]
    assert look("select count(*) from item_tag") == [1]


def test_e2_set_beside_an_insert_of_the_same_link(item: Any, database_url: str, look: Look) -> None:
    """The one that comes second waits for the first to commit, and has nothing left to do."""
    engine = sa.create_engine(database_url)
    found: list[Any] = []
    with sa_orm.Session(engine) as first:
        m2m_add(first, first.get(Item, 1), Item.tags, 4)

        def work() -> None:
            with OptInSession(engine) as second:
                found.append(m2m_set(second, second.get(Item, 1), Item.tags, 1, 2, 3, 4))

        worker = threading.Thread(target=work)
        worker.start()
        while not look(WAITING):
            assert worker.is_alive()
        first.commit()
        worker.join()
    engine.dispose()
    assert found == [LinkChanges()]
    assert look(LINKS, 1) == [1, 2, 3, 4]

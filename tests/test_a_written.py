"""Contract A34: what a flush wrote shows in the relationships that are loaded, though no commit expires them."""

from __future__ import annotations

import contextlib
import cProfile
import pstats
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from fictive.models import SoftDeleteMixin
from fictive.sqlalchemy import OptInSession, TakeTurnsPool, insert_many, update_many, upsert_many


class Base(DeclarativeBase):
    pass


class Owner(Base):
    """With one relationship of each kind, of which none knows of the one on the other side."""

    __tablename__ = "owner"
    id: Mapped[int] = mapped_column(primary_key=True)
    code: Mapped[str | None] = mapped_column(unique=True)
    kids: Mapped[list[Kid]] = relationship("Kid", order_by="Kid.id", foreign_keys="Kid.owner_id")
    by_name: Mapped[dict[str, Kid]] = relationship(
        "Kid", collection_class=sa_orm.attribute_keyed_dict("name"), foreign_keys="Kid.owner_id", viewonly=True
    )
    coded: Mapped[set[Kid]] = relationship("Kid", foreign_keys="Kid.owner_code", viewonly=True)
    badge: Mapped[Badge | None] = relationship("Badge", uselist=False)
    tags: Mapped[list[Tag]] = relationship("Tag", secondary="owner_mark")
    marks: Mapped[list[Tag]] = relationship("Tag", secondary="owner_mark", viewonly=True)
    signed: Mapped[list[Tag]] = relationship("Tag", secondary="signature", viewonly=True)
    elders: Mapped[list[Kid]] = relationship(
        "Kid", primaryjoin="and_(Owner.id == foreign(Kid.owner_id), Kid.name == 'elder')", viewonly=True
    )
    namesakes: Mapped[list[Kid]] = relationship("Kid", primaryjoin="Owner.code == foreign(Kid.name)", viewonly=True)


class Kid(Base):
    __tablename__ = "kid"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="kid")
    owner_id: Mapped[int | None] = mapped_column(sa.ForeignKey("owner.id"))
    owner_code: Mapped[str | None] = mapped_column(sa.ForeignKey("owner.code"))
    kind: Mapped[str] = mapped_column(default="kid")
    owner: Mapped[Owner | None] = relationship("Owner", foreign_keys="Kid.owner_id", viewonly=True)
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "kid"}


class Toddler(Kid):
    __mapper_args__ = {"polymorphic_identity": "toddler"}


Owner.number = sa_orm.column_property(  # type: ignore[attr-defined]
    sa.select(sa.func.count(Kid.id)).where(Kid.owner_id == Owner.id).correlate(Owner).scalar_subquery()
)


class Badge(Base):
    __tablename__ = "badge"
    id: Mapped[int] = mapped_column(primary_key=True)
    owner_id: Mapped[int] = mapped_column(sa.ForeignKey("owner.id"))


class Tag(Base):
    __tablename__ = "mark"
    id: Mapped[int] = mapped_column(primary_key=True)


owner_mark = sa.Table(
    "owner_mark",
    Base.metadata,
    sa.Column("owner_id", sa.ForeignKey("owner.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("tag_id", sa.ForeignKey("mark.id", ondelete="CASCADE"), primary_key=True),
)


class Signature(Base):
    """An association object: a link with a row of its own."""

    __tablename__ = "signature"
    owner_id: Mapped[int] = mapped_column(sa.ForeignKey("owner.id"), primary_key=True)
    tag_id: Mapped[int] = mapped_column(sa.ForeignKey("mark.id"), primary_key=True)


class Room(Base):
    __tablename__ = "room"
    id: Mapped[int] = mapped_column(primary_key=True)
    lamps: Mapped[list[Lamp]] = relationship("Lamp", cascade="all, delete-orphan")


class Bulb(Base):
    __tablename__ = "bulb"
    id: Mapped[int] = mapped_column(primary_key=True)
    lamps: Mapped[list[Lamp]] = relationship("Lamp", back_populates="bulb")


class Lamp(Base):
    __tablename__ = "lamp"
    room_id: Mapped[int] = mapped_column(sa.ForeignKey("room.id"), primary_key=True)
    bulb_id: Mapped[int] = mapped_column(sa.ForeignKey("bulb.id"), primary_key=True)
    bulb: Mapped[Bulb] = relationship("Bulb", back_populates="lamps")


@pytest.fixture
def session(database_url: str) -> Iterator[OptInSession]:
    engine = sa.create_engine(database_url)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with OptInSession(engine) as session:
        session.add_all([Owner(id=1, code="one"), Owner(id=2, code="two"), Tag(id=1)])
        session.commit()
        yield session
    Base.metadata.drop_all(engine)
    engine.dispose()


def in_autocommit(session: OptInSession) -> contextlib.AbstractContextManager[object]:
    @contextlib.contextmanager
    def run() -> Iterator[None]:
        yield
        session.commit()

    return run()


def in_a_block(session: OptInSession) -> contextlib.AbstractContextManager[object]:
    return session.begin()


WAYS = [in_autocommit, in_a_block]
Way = Callable[[OptInSession], contextlib.AbstractContextManager[object]]
way = pytest.mark.parametrize("way", WAYS)
kind = pytest.mark.parametrize("kind", [Kid, Toddler])


def owners(session: OptInSession) -> tuple[Owner, Owner]:
    """Both, with everything loaded."""
    found = session.scalars(sa.select(Owner).order_by(Owner.id)).all()
    for owner in found:
        for relation in sa.inspect(Owner).relationships:
            getattr(owner, relation.key)
    return found[0], found[1]


@way
@kind
def test_a34_a_many_to_one_whose_foreign_key_was_changed(session: OptInSession, way: Way, kind: Any) -> None:
    one, two = owners(session)
    with way(session):
        kid = kind(owner_id=1)
        session.add(kid)
    assert kid.owner is one
    for owner_id, owner in [(2, two), (None, None), (1, one)]:
        with way(session):
            kid.owner_id = owner_id
        assert kid.owner is owner


@way
@kind
def test_a34_collections_of_an_object_added_and_moved_by_its_foreign_key(
    session: OptInSession, way: Way, kind: Any
) -> None:
    one, two = owners(session)
    with way(session):
        session.add(kid := kind(name="k", owner_id=1, owner_code="one"))
    assert (one.kids, one.by_name, one.coded) == ([kid], {"k": kid}, {kid})
    owners(session)
    with way(session):
        kid.owner_id, kid.owner_code = 2, "two"
    assert (one.kids, one.by_name, one.coded) == ([], {}, set())
    assert (two.kids, two.by_name, two.coded) == ([kid], {"k": kid}, {kid})


@way
def test_a34_a_deleted_object_is_gone_from_what_held_it(session: OptInSession, way: Way) -> None:
    one, _ = owners(session)
    with way(session):
        one.kids.append(kid := Kid(name="k"))
        one.tags.append(tag := session.get_one(Tag, 1))
        session.add(badge := Badge(owner_id=1))
    owners(session)
    assert (one.by_name, one.badge, one.tags) == ({"k": kid}, badge, [tag])
    with way(session):
        for each in (kid, tag, badge):
            session.delete(each)
    assert (one.kids, one.by_name, one.tags, one.badge) == ([], {}, [], None)


@way
def test_a34_a_scalar_that_another_object_took(session: OptInSession, way: Way) -> None:
    one, two = owners(session)
    with way(session):
        session.add(badge := Badge(owner_id=1))
    assert (one.badge, two.badge) == (badge, None)
    with way(session):
        badge.owner_id = 2
    assert (one.badge, two.badge) == (None, badge)


@way
def test_a34_the_deleted_one_of_a_many_to_one(session: OptInSession, way: Way) -> None:
    one, _ = owners(session)
    with way(session):
        session.add(kid := Kid(owner_id=1))
    assert kid.owner is one
    with way(session):
        session.delete(one)
    assert (kid.owner, kid.owner_id) == (None, None)


def test_a34_a_savepoint_that_is_undone(session: OptInSession) -> None:
    one, two = owners(session)
    with session.begin():
        session.add(kid := Kid(owner_id=1))
        session.flush()
        assert one.kids == [kid]
        with contextlib.suppress(ZeroDivisionError), session.begin_nested():
            kid.owner_id = 2
            session.flush()
            assert (one.kids, two.kids) == ([], [kid])
            raise ZeroDivisionError
        assert (one.kids, two.kids, kid.owner) == ([kid], [], one)
    assert (one.kids, two.kids, kid.owner) == ([kid], [], one)


@way
@pytest.mark.parametrize("expired", [True, False], ids=["not loaded", "loaded"])
def test_a34_the_collection_of_a_foreign_key_that_was_not_loaded(
    session: OptInSession, way: Way, expired: bool
) -> None:
    """SQLAlchemy does not load the old value of an attribute that is set: who had the object has to be found out."""
    one, two = owners(session)
    with way(session):
        session.add(kid := Kid(owner_id=1, owner_code="one"))
    owners(session)
    if expired:
        session.expire(kid, ["owner_id", "owner_code"])
    with way(session):
        kid.owner_id, kid.owner_code = 2, "two"
    assert (one.kids, one.coded) == ([], set())
    assert (two.kids, two.coded) == ([kid], {kid})


@way
@pytest.mark.parametrize("value", [sa.select(Owner.id).where(Owner.code == "two").scalar_subquery(), sa.null()])
def test_a34_a_foreign_key_that_the_server_computes(session: OptInSession, way: Way, value: Any) -> None:
    one, two = owners(session)
    with way(session):
        session.add(kid := Kid(name="k", owner_id=1))
    owners(session)
    assert kid.owner is one
    with way(session):
        kid.owner_id = value
    moved = [kid] if kid.owner_id == 2 else []
    assert (kid.owner, one.kids, two.kids) == (two if moved else None, [], moved)
    with way(session):
        session.add(other := Kid(name="o", owner_id=value))
    assert two.kids == ([kid, other] if moved else [])


@way
def test_a34_the_owner_is_expired(session: OptInSession, way: Way) -> None:
    one, two = owners(session)
    with way(session):
        session.add(kid := Kid(owner_id=1))
    assert kid.owner is one
    session.expire(one)
    with way(session):
        kid.owner_id = 2
    assert (kid.owner, one.kids, two.kids) == (two, [], [kid])


@way
def test_a34_the_owner_is_new_too(session: OptInSession, way: Way) -> None:
    new = Owner(id=50, kids=[Kid(name="a")], badge=None)
    with way(session):
        session.add_all([new, Kid(name="b", owner_id=50), Badge(id=5, owner_id=50)])
    assert [kid.name for kid in new.kids] == ["a", "b"]
    assert new.badge is session.get_one(Badge, 5)


@way
def test_a34_a_deleted_object_whose_row_another_takes(session: OptInSession, way: Way) -> None:
    """SQLAlchemy makes one UPDATE of a DELETE and an INSERT with the same key."""
    one, two = owners(session)
    with way(session):
        session.add(kid := Kid(id=5, owner_id=1))
    assert one.kids == [kid]
    with way(session):
        session.delete(kid)
        session.add(other := Kid(id=5, owner_id=2))
    assert (one.kids, two.kids) == ([], [other])


@way
def test_a34_an_orphan_whose_row_another_takes(session: OptInSession, way: Way) -> None:
    """As above, where nobody has called `delete()`."""
    with way(session):
        session.add(room := Room(id=1, lamps=[old := Lamp(room_id=1, bulb=(bulb := Bulb(id=1)))]))
    assert (room.lamps, bulb.lamps) == ([old], [old])
    with way(session):
        room.lamps = [new := Lamp(bulb=bulb)]
    assert (room.lamps, bulb.lamps) == ([new], [new])


@way
def test_a34_a_many_to_many_by_another_relationship_or_by_an_association_object(
    session: OptInSession, way: Way
) -> None:
    one, two = owners(session)
    tag = session.get_one(Tag, 1)
    with way(session):
        one.tags.append(tag)
        session.add(link := Signature(owner_id=2, tag_id=1))
    assert (one.marks, two.signed) == ([tag], [tag])
    with way(session):
        one.tags.clear()
        link.owner_id = 1
    assert (one.marks, one.signed, two.signed) == ([], [tag], [])
    with way(session):
        session.delete(link)
    assert one.signed == []


@way
def test_a34_what_is_loaded_under_further_conditions_or_by_a_subquery(session: OptInSession, way: Way) -> None:
    one, two = owners(session)
    assert (one.number, two.number) == (0, 0)  # type: ignore[attr-defined]
    with way(session):
        session.add(kid := Kid(name="k", owner_id=1))
    assert (one.elders, one.number) == ([], 1)  # type: ignore[attr-defined]
    owners(session)
    with way(session):
        kid.name, two.code = "elder", "elder"
    assert (one.elders, two.namesakes) == ([kid], [kid])
    with way(session):
        session.delete(kid)
    assert (one.elders, two.namesakes, one.number) == ([], [], 0)  # type: ignore[attr-defined]


def test_a34_what_is_right_already_is_not_loaded_again(session: OptInSession, database_url: str) -> None:
    one, _ = owners(session)
    one.kids.append(Kid(name="k"))
    session.commit()
    one.kids[0].name = "other"
    session.commit()
    sent: list[str] = []
    sa.event.listen(session.get_bind(), "before_cursor_execute", lambda *args: sent.append(args[2]))
    assert len(one.kids) == 1
    assert (one.badge, one.tags, one.marks, one.signed) == (None, [], [], [])
    assert sent == []


STATEMENTS: dict[str, Callable[[sa_orm.Session], Any]] = {
    "update": lambda s: s.execute(sa.update(Kid).where(Kid.id == 1).values(owner_id=2, name="elder")),
    "update, by query": lambda s: s.query(Kid).filter(Kid.id == 1).update({"owner_id": 2}),
    "update, not synchronized": lambda s: s.execute(
        sa.update(Kid).where(Kid.id == 1).values(owner_id=2), execution_options={"synchronize_session": False}
    ),
    "update, by key": lambda s: s.execute(sa.update(Kid), [{"id": 1, "owner_id": 2}]),
    "update, by parameters": lambda s: s.execute(sa.update(Kid.__table__).where(Kid.id == 1), {"owner_id": 2}),
    "update a table": lambda s: s.execute(sa.update(Kid.__table__).where(Kid.id == 1).values(owner_id=2)),
    "update in order": lambda s: s.execute(sa.update(Kid).ordered_values((Kid.name, "elder"), (Kid.owner_id, 2))),
    "update what a row is named by": lambda s: s.execute(sa.update(Owner).where(Owner.id == 2).values(code="first")),
    "update of a subclass": lambda s: s.execute(sa.update(Toddler).values(owner_id=1)),
    "delete": lambda s: s.execute(sa.delete(Kid).where(Kid.id == 1)),
    "delete, by query": lambda s: s.query(Kid).filter(Kid.id == 1).delete(),
    "delete, not synchronized": lambda s: s.query(Kid).filter(Kid.id == 1).delete(synchronize_session=False),
    "delete from a table": lambda s: s.execute(sa.delete(Kid.__table__).where(Kid.id == 1)),
    "delete, returning": lambda s: s.execute(sa.delete(Kid).where(Kid.id == 1).returning(Kid.id)).all(),
    "insert": lambda s: s.execute(sa.insert(Kid).values(id=9, owner_id=1, name="second")),
    "insert, returning": lambda s: s.scalars(sa.insert(Kid).returning(Kid), [{"id": 9, "owner_id": 1}]).all(),
    "insert, many": lambda s: s.execute(sa.insert(Kid), [{"id": 9, "owner_id": 1}, {"id": 10, "owner_id": 2}]),
    "insert into a table": lambda s: s.execute(sa.insert(Badge.__table__).values(id=9, owner_id=1)),
    "insert a link": lambda s: s.execute(sa.insert(owner_mark).values(owner_id=2, tag_id=1)),
    "delete a link": lambda s: s.execute(sa.delete(owner_mark)),
    "bulk insert": lambda s: s.bulk_insert_mappings(Kid, [{"id": 9, "owner_id": 1}]),
    "bulk update": lambda s: s.bulk_update_mappings(Kid, [{"id": 1, "owner_id": 2}]),
    "bulk save": lambda s: s.bulk_save_objects([Kid(id=9, owner_id=1), Badge(id=9, owner_id=1)]),
    "insert_many": lambda s: insert_many(s, Kid, [{"id": 9, "owner_id": 1}]),
    "insert_many, returning": lambda s: insert_many(s, Kid, [{"id": 9, "owner_id": 1}], returning="keys"),
    "upsert_many": lambda s: upsert_many(s, Kid, [{"id": 9, "owner_id": 1}, {"id": 1, "owner_id": 2}], key=["id"]),
    "update_many": lambda s: update_many(s, Kid, [{"id": 1, "owner_id": 2}]),
    "insert an association": lambda s: s.execute(sa.insert(Signature).values(owner_id=2, tag_id=1)),
}


@pytest.mark.parametrize("policy", ["commit", "begin", "refuse"])
def test_a34_what_a_statement_wrote(session: OptInSession, policy: str) -> None:
    """Compared with what another session sees."""
    for run in WAYS if policy != "refuse" else [in_a_block]:
        for what, statement in STATEMENTS.items():
            session.rollback()  # what was looked at, under a policy that begins with it
            session.writes_outside = "commit"  # type: ignore[assignment]
            for table in reversed(Base.metadata.sorted_tables):
                session.execute(sa.delete(table))
            session.expunge_all()
            objects = [Owner(id=1, code="one"), Owner(id=2, code="two"), Tag(id=1), Badge(id=1, owner_id=2)]
            kids = [Kid(id=1, owner_id=1, name="first"), Toddler(id=2, owner_id=2, name="second")]
            session.add_all([*objects, *kids])
            session.commit()
            one, two = owners(session)
            one.tags.append(session.get_one(Tag, 1))
            session.commit()
            for each in (one, two, *kids):
                shown(each)
            session.writes_outside = policy  # type: ignore[assignment]
            with run(session):
                statement(session)
            for each in (one, two, *kids):
                with sa_orm.Session(session.get_bind()) as fresh:
                    found = fresh.get(type(each), sa.inspect(each).identity[0])
                    if found is not None:
                        assert shown(each) == shown(found), (what, run.__name__)
                    else:
                        assert each not in [*one.kids, *two.kids], (what, run.__name__)


def shown(obj: Any) -> dict[str, Any]:
    """All attributes of an object, related objects by their keys."""

    def bare(value: Any) -> Any:
        if isinstance(value, Base):
            return sa.inspect(value).identity
        if isinstance(value, dict):
            value = value.values()
        return sorted(map(bare, value)) if not isinstance(value, (str, int, type(None))) else value

    return {key: bare(getattr(obj, key)) for key in sa.inspect(type(obj)).attrs.keys()}  # noqa: SIM118 - no mapping


def test_a34_a_statement_leaves_pending_changes_and_what_it_did_not_write(session: OptInSession) -> None:
    one, two = owners(session)
    session.add_all([Kid(id=1, owner_id=1), Kid(id=2, owner_id=2)])
    session.commit()
    first, second = session.get_one(Kid, 1), session.get_one(Kid, 2)
    for each in (one, two, first, second):
        shown(each)
    sent: list[str] = []
    sa.event.listen(session.get_bind(), "before_cursor_execute", lambda *args: sent.append(args[2]))
    session.execute(sa.update(Kid.__table__).values(kind="kid"))
    first.name = "pending"
    session.execute(sa.update(Kid.__table__).values(kind="kid", name="other"))
    assert first.name == "pending"
    assert (one.kids, two.kids, one.badge, first.owner) == ([first], [second], None, one)
    assert len(sent) == 2
    assert (second.name, second.kind) == ("other", "kid")
    assert len(sent) == 3
    session.expunge(first)


def test_a34_what_a_statement_wrote_in_a_savepoint_that_is_rolled_back(session: OptInSession) -> None:
    one, _ = owners(session)
    session.add(Kid(id=1, owner_id=1))
    session.commit()
    with session.begin():
        kids = list(one.kids)
        with contextlib.suppress(ZeroDivisionError), session.begin_nested():
            session.execute(sa.delete(Kid.__table__))
            assert one.kids == []
            raise ZeroDivisionError
        assert one.kids == kids


def test_a34_as_plain_where_a_commit_expires(session: OptInSession) -> None:
    """Under `expire_on_commit` a flush leaves relationships alone, as in SQLAlchemy."""
    with OptInSession(session.get_bind(), expire_on_commit=True) as other:
        one, _ = owners(other)
        with other.begin():
            other.add(kid := Kid(owner_id=1))
            other.flush()
            assert one.kids == []
        assert one.kids == [kid]


class Hub(Base):
    """To which foreign keys refer with all actions, with a relationship on its side or without one."""

    __tablename__ = "hub"
    id: Mapped[int] = mapped_column(primary_key=True)
    code: Mapped[str | None] = mapped_column(unique=True)
    ports: Mapped[list[Port]] = relationship("Port", back_populates="hub", passive_deletes=True)
    wires: Mapped[list[Wire]] = relationship("Wire", passive_deletes="all")
    plugs: Mapped[list[Plug]] = relationship("Plug", back_populates="hub", passive_deletes="all")


class Port(Base):
    __tablename__ = "port"
    id: Mapped[int] = mapped_column(primary_key=True)
    hub_id: Mapped[int | None] = mapped_column(sa.ForeignKey("hub.id", ondelete="SET NULL"))
    hub: Mapped[Hub | None] = relationship("Hub", back_populates="ports")


class Wire(Base):
    __tablename__ = "wire"
    id: Mapped[int] = mapped_column(primary_key=True)
    hub_id: Mapped[int] = mapped_column(sa.ForeignKey("hub.id", ondelete="CASCADE"))
    ends: Mapped[list[End]] = relationship("End", passive_deletes=True)


class End(Base):
    __tablename__ = "wire_end"
    id: Mapped[int] = mapped_column(primary_key=True)
    wire_id: Mapped[int] = mapped_column(sa.ForeignKey("wire.id", ondelete="CASCADE"))
    port_id: Mapped[int] = mapped_column(sa.ForeignKey("port.id"))
    port: Mapped[Port] = relationship("Port", backref="ends")


class Plug(Base):
    __tablename__ = "plug"
    id: Mapped[int] = mapped_column(primary_key=True)
    hub_code: Mapped[str | None] = mapped_column(
        sa.ForeignKey("hub.code", ondelete="SET DEFAULT", onupdate="CASCADE"), server_default="spare"
    )
    hub: Mapped[Hub | None] = relationship("Hub", back_populates="plugs")


HUB_DELETED: dict[str, Callable[[sa_orm.Session], Any]] = {
    "delete()": lambda s: s.delete(s.get_one(Hub, 1)),
    "bulk": lambda s: s.execute(sa.delete(Hub).where(Hub.id == 1)),
    "by query": lambda s: s.query(Hub).filter(Hub.id == 1).delete(synchronize_session=False),
    "by table": lambda s: s.execute(sa.delete(Hub.__table__).where(Hub.__table__.c.id == 1)),
}


def hubs(session: OptInSession) -> tuple[list[Any], ...]:
    """What is in the tables, with all relationships loaded."""
    spare, hub = Hub(id=9, code="spare"), Hub(id=1, code="one")
    session.add_all([spare, hub, Port(id=1, hub_id=1), Port(id=2), Wire(id=1, hub_id=1), Wire(id=2, hub_id=9)])
    session.add_all([End(id=1, wire_id=1, port_id=2), End(id=2, wire_id=2, port_id=2), Plug(id=1, hub_code="one")])
    session.commit()
    found = [session.scalars(sa.select(each).order_by(each.id)).all() for each in (Hub, Port, Wire, End, Plug)]
    for each in (each for objects in found for each in objects):
        shown(each)
    return tuple(list(each) for each in found)


@way
@pytest.mark.parametrize("deleted", HUB_DELETED)
def test_a34_what_the_server_did_on_delete(session: OptInSession, way: Way, deleted: str) -> None:
    (_, spare), (port, other), (gone, wire), (end, left), (plug,) = hubs(session)
    with way(session):
        HUB_DELETED[deleted](session)
    assert (port.hub_id, port.hub) == (None, None)
    assert other.ends == [left]
    for each, key in [(gone, "hub_id"), (end, "port_id")]:
        with pytest.raises(sa_orm.exc.ObjectDeletedError):
            getattr(each, key)
    assert (plug.hub_code, plug.hub, spare.plugs) == ("spare", spare, [plug])
    assert (wire.ends, spare.wires) == ([left], [wire])


@way
@pytest.mark.parametrize("changed", ["flush", "bulk"])
def test_a34_what_the_server_did_on_update(session: OptInSession, way: Way, changed: str) -> None:
    (hub, _), _, _, _, (plug,) = hubs(session)
    session.expire(hub, ["plugs"])  # SQLAlchemy itself changes the foreign keys of what is loaded there
    with way(session):
        if changed == "flush":
            hub.code = "new"
        else:
            session.execute(sa.update(Hub).where(Hub.id == 1).values(code="new"))
    assert (plug.hub_code, plug.hub, hub.plugs) == ("new", hub, [plug])
    with way(session):
        hub.code = None
    assert (plug.hub_code, plug.hub, hub.plugs) == (None, None, [])


def test_a34_a_row_that_the_session_has_not_loaded_gets_another_owner(session: OptInSession) -> None:
    (_, spare), _, _, _, (plug,) = hubs(session)
    session.expire(plug)
    session.delete(session.get_one(Hub, 1))
    session.commit()
    assert spare.plugs == [plug]


def test_a34_what_no_foreign_key_reaches_is_not_loaded_again(session: OptInSession) -> None:
    _, (_, other), (_, wire), (_, left), _ = hubs(session)
    with session.begin():
        session.delete(session.get_one(Hub, 1))
    sent: list[str] = []
    sa.event.listen(session.get_bind(), "before_cursor_execute", lambda *args: sent.append(args[2]))
    assert (other.hub_id, other.hub, wire.hub_id, wire.ends, left.wire_id) == (None, None, 9, [left], 2)
    assert sent == []


@way
def test_a34_a_collection_with_a_pending_change_that_a_statement_skips(session: OptInSession, way: Way) -> None:
    one, _ = owners(session)
    session.execute(sa.insert(Kid), [{"id": 1}])
    with way(session):
        one.kids.append(kid := session.get_one(Kid, 1))
        session.execute(sa.insert(Kid).values(id=2, owner_id=1))
        assert one.kids == [kid]
    assert [each.id for each in one.kids] == [1, 2]


@way
def test_a34_a_list_that_a_backref_put_an_object_into_twice(session: OptInSession, way: Way) -> None:
    _, (port, _), *_ = hubs(session)
    hub = port.hub
    session.expire(port)
    with way(session):
        port.hub = hub
    assert hub.ports == [port]


@way
def test_a34_a_new_object_that_a_flush_leaves_out(session: OptInSession, way: Way) -> None:
    """SQLAlchemy drops new objects that have lost their parent, and the other side keeps them."""
    session.add_all([room := Room(id=1), bulb := Bulb(id=1)])
    session.commit()
    assert (room.lamps, bulb.lamps) == ([], [])
    with way(session):
        room.lamps.append(lamp := Lamp(bulb=bulb))
        room.lamps.remove(lamp)
        with pytest.warns(sa.exc.SAWarning, match="not in session"):
            session.flush()
    assert bulb.lamps == []


class Note(SoftDeleteMixin, Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    badge_id: Mapped[int] = mapped_column(sa.ForeignKey("badge.id"))
    badge: Mapped[Badge] = relationship("Badge", backref="notes")


@way
def test_a34_a_soft_deleted_object_is_gone_from_collections(session: OptInSession, way: Way) -> None:
    session.add_all([badge := Badge(id=1, owner_id=1), note := Note(id=1, badge_id=1)])
    session.commit()
    assert badge.notes == [note]  # type: ignore[attr-defined]
    for mark, now in [(note.soft_delete, []), (note.restore, [note])]:
        with way(session):
            mark()
        assert badge.notes == now  # type: ignore[attr-defined]
    session.execute(sa.update(Note).values(deleted_at=sa.func.now()))
    assert badge.notes == []  # type: ignore[attr-defined]


@way
def test_a34_what_no_flush_writes(session: OptInSession, way: Way) -> None:
    """Changes in a collection whose foreign keys SQLAlchemy leaves alone, and attributes that a new object did not
    get, whose row was that of a deleted one."""
    (hub, _), _, (wire, _), *_ = hubs(session)
    with way(session):
        hub.wires.remove(wire)
    assert hub.wires == [wire]
    with way(session):
        session.delete(hub)
        session.add(other := Hub(id=1))
        session.expire(wire)
    assert other.code == "one"


def test_a34_what_was_read_in_a_savepoint_that_is_rolled_back(session: OptInSession) -> None:
    one, _ = owners(session)
    session.add(kid := Kid(id=1, owner_id=1, name="before"))
    session.commit()
    session.expire(one, ["kids"])
    session.expire(kid)
    with session.begin():
        with contextlib.suppress(ZeroDivisionError), session.begin_nested():
            with session.begin_nested():
                session.execute(sa.update(Kid.__table__).values(name="within"))
                session.execute(sa.insert(Kid.__table__).values(id=2, name="new", kind="kid", owner_id=1))
            assert (kid.name, len(one.kids)) == ("within", 2)
            raise ZeroDivisionError
        assert (kid.name, one.kids) == ("before", [kid])


def test_a34_a_savepoint_that_only_reads_is_rolled_back(session: OptInSession) -> None:
    one, two = owners(session)
    sent: list[str] = []
    with session.begin():
        with contextlib.suppress(ZeroDivisionError), session.begin_nested():
            assert session.scalars(sa.select(Owner).order_by(Owner.id)).all() == [one, two]
            raise ZeroDivisionError
        sa.event.listen(session.get_bind(), "before_cursor_execute", lambda *args: sent.append(args[2]))
        assert (one.code, two.code, sent) == ("one", "two", [])


def test_a34_links_that_another_secondary_shows(session: OptInSession) -> None:
    """By a join of the secondary table with another one."""
    one, _ = owners(session)
    session.add(badge := Badge(id=1, owner_id=1))
    session.commit()
    assert badge.owner_tags == []  # type: ignore[attr-defined]
    one.tags.append(tag := session.get_one(Tag, 1))
    session.commit()
    assert badge.owner_tags == [tag]  # type: ignore[attr-defined]


class Board(Base):
    __tablename__ = "board"
    id: Mapped[int] = mapped_column(primary_key=True)
    cards: Mapped[list[Card]] = relationship("Card", back_populates="board", order_by="Card.place.desc()")
    pinned: Mapped[list[Card]] = relationship("Card", secondary="pin", order_by="Card.place")


class Card(Base):
    __tablename__ = "card"
    place: Mapped[int] = mapped_column()
    id: Mapped[int] = mapped_column(primary_key=True)
    board_id: Mapped[int | None] = mapped_column(sa.ForeignKey("board.id"))
    board: Mapped[Board | None] = relationship("Board", back_populates="cards")


pin = sa.Table(
    "pin",
    Base.metadata,
    sa.Column("board_id", sa.ForeignKey("board.id"), primary_key=True),
    sa.Column("card_id", sa.ForeignKey("card.id"), primary_key=True),
)


@way
def test_a34_the_order_of_a_collection(session: OptInSession, way: Way) -> None:
    session.add(board := Board(id=1, cards=[first := Card(id=1, place=1)], pinned=[first]))
    session.commit()
    with way(session):
        board.cards.append(second := Card(id=2, place=2))
        board.pinned.insert(0, second)
    assert (board.cards, board.pinned) == ([second, first], [first, second])
    with way(session):
        session.add(third := Card(id=3, place=3, board=board))
    assert board.cards == [third, second, first]
    with way(session):
        second.place = 0
    assert (board.cards, board.pinned) == ([third, first, second], [second, first])
    with way(session):
        session.execute(sa.update(Card).where(Card.id == 2).values(place=9))
    assert (board.cards, board.pinned) == ([second, third, first], [first, second])


Badge.owner_tags = relationship(  # type: ignore[attr-defined]
    Tag,
    secondary=lambda: sa.join(Owner.__table__, owner_mark, Owner.id == owner_mark.c.owner_id),
    primaryjoin=lambda: Badge.owner_id == Owner.id,
    secondaryjoin=lambda: owner_mark.c.tag_id == Tag.id,
    viewonly=True,
)


def test_a34_what_a_delete_costs_grows_with_the_tables_that_refer_to_it() -> None:
    """And not with their square: each table of an application may refer to that of its users."""
    engine = sa.create_engine("sqlite://", poolclass=TakeTurnsPool)

    def calls(tables: int) -> int:
        metadata = sa.MetaData()
        parent = sa.Table(f"parent_{tables}", metadata, sa.Column("id", sa.Integer, primary_key=True))
        for number in range(tables):
            sa.Table(f"kid_{number}", metadata, sa.Column("id", sa.ForeignKey(parent.c.id, ondelete="SET NULL")))
        parent.create(engine)
        model = type("Parent", (), {})
        sa_orm.registry(metadata=metadata).map_imperatively(model, parent)
        with OptInSession(engine) as session:
            session.add(kept := model())  # noqa: F841 - what is not held is not looked at
            session.commit()
            delete = sa.delete(model).where(parent.c.id == 0)
            session.execute(delete)
            profile = cProfile.Profile()
            profile.runcall(session.execute, delete)
        return pstats.Stats(profile).total_calls  # type: ignore[attr-defined, no-any-return]

    none, few, more = calls(0), calls(20), calls(60)
    engine.dispose()
    assert (more - none) / (few - none) < 4

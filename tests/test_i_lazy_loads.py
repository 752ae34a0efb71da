"""Lazy loads: in batches, refused, or reported where they are too many (rule I5)."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column, relationship

from fictive.errors import ConfigurationError, LazyLoadRefused, NPlusOneError, NPlusOneWarning
from fictive.models import allow_lazy_loads, lazy_loads, set_lazy_loads
from fictive.sqlalchemy import sessionmaker
from fictive.testing.wire import Wire
from tests.models import Child, Item, Tag, db
from tests.wirelog import verbs


class Base(DeclarativeBase):
    pass


user_group = sa.Table(
    "l_user_group",
    Base.metadata,
    sa.Column("user_id", sa.ForeignKey("l_user.id"), primary_key=True),
    sa.Column("group_id", sa.ForeignKey("l_group.id"), primary_key=True),
)


class User(Base):
    __tablename__ = "l_user"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    boss_id: Mapped[int | None] = mapped_column(sa.ForeignKey("l_user.id"))
    boss: Mapped[User | None] = relationship(remote_side=[id], back_populates="staff")
    staff: Mapped[list[User]] = relationship(back_populates="boss", order_by="User.id.desc()")
    groups: Mapped[set[Group]] = relationship(secondary=user_group)
    parts: Mapped[dict[int, Part]] = relationship(
        collection_class=sa_orm.attribute_keyed_dict("number"), back_populates="user"
    )
    passport: Mapped[Passport | None] = relationship(back_populates="user")
    even: Mapped[list[Part]] = relationship(
        primaryjoin=lambda: sa.and_(Part.user_id == User.id, Part.number == 2), viewonly=True
    )
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "user"}


class Admin(User):
    __tablename__ = "l_admin"
    id: Mapped[int] = mapped_column(sa.ForeignKey("l_user.id"), primary_key=True)
    level: Mapped[int]
    rights: Mapped[list[Right]] = relationship()
    __mapper_args__ = {"polymorphic_identity": "admin"}


class Right(Base):
    __tablename__ = "l_right"
    id: Mapped[int] = mapped_column(primary_key=True)
    admin_id: Mapped[int] = mapped_column(sa.ForeignKey("l_admin.id"))


class Group(Base):
    __tablename__ = "l_group"
    id: Mapped[int] = mapped_column(primary_key=True)


class Passport(Base):
    __tablename__ = "l_passport"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(sa.ForeignKey("l_user.id"))
    user: Mapped[User] = relationship(back_populates="passport")


class Part(Base):
    """A composite key, and children that point to it."""

    __tablename__ = "l_part"
    user_id: Mapped[int] = mapped_column(sa.ForeignKey("l_user.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    user: Mapped[User] = relationship(back_populates="parts")
    pieces: Mapped[list[Piece]] = relationship()


class Piece(Base):
    __tablename__ = "l_piece"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int]
    number: Mapped[int]
    __table_args__ = (sa.ForeignKeyConstraint(["user_id", "number"], ["l_part.user_id", "l_part.number"]),)


MakeSession = Callable[[], Any]


@pytest.fixture
def make_session(wire: Wire, database_url: str) -> Iterator[MakeSession]:
    """Users 1 to 6, of which 1 is the boss of the others and 5 and 6 are admins."""
    engine = sa.create_engine(wire.url(database_url))
    Base.metadata.create_all(engine)
    with sa_orm.Session(engine) as session, session.begin():
        groups = [Group(id=1), Group(id=2)]
        for at in range(1, 7):
            user = User(id=at) if at < 5 else Admin(id=at, level=at, rights=[Right(id=at), Right(id=at + 10)])
            user.boss_id = None if at == 1 else 1
            user.groups = set(groups[: at % 3])
            user.parts = {number: Part(number=number, pieces=[Piece()]) for number in range(1, at % 3 + 1)}
            user.passport = Passport(id=at) if at % 2 else None
            session.add(user)
            session.flush()
    yield sessionmaker(engine)
    engine.dispose()


ACCESS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "one to many": (User, lambda user: [each.id for each in user.staff]),
    "in memory": (User, lambda user: user.boss and user.boss.id),
    "many to many": (User, lambda user: {each.id for each in user.groups}),
    "one to one": (User, lambda user: user.passport and user.passport.id),
    "dict": (User, lambda user: sorted(user.parts)),
    "own join": (User, lambda user: [each.number for each in user.even]),
    "of a subclass": (Admin, lambda admin: [each.id for each in admin.rights]),
    "inherited": (Admin, lambda admin: sorted(admin.parts)),
    "composite key": (Part, lambda part: len(part.pieces)),
    "many to one": (Passport, lambda passport: passport.user.id),
}


@pytest.mark.parametrize("kind", ["opt-in", "plain"])
def test_i5_batches_load_what_lazy_loads_do(make_session: MakeSession, wire: Wire, kind: str) -> None:
    """Every kind of relationship, in one statement after the first, with the same outcome."""
    for name, (model, access) in ACCESS.items():
        seen = []
        for mode in ("load", "batch"):
            session = make_session() if kind == "opt-in" else sa_orm.Session(make_session.kw["bind"])
            with session:
                set_lazy_loads(session, mode)
                objects = session.scalars(sa.select(model).order_by(*sa.inspect(model).primary_key)).all()
                with wire.record() as log:
                    seen.append([access(each) for each in objects])
                if mode == "batch":
                    assert verbs(log) == ([] if name == "in memory" else ["SELECT"]), name
                    assert not session.new
                    assert not session.dirty
        assert seen[0] == seen[1], name
        assert any(seen[0]), name


def test_i5_a_batch_costs_two_statements_instead_of_n(app: Flask, wire: Wire) -> None:
    db.session.execute(sa.insert(Item), [{"name": str(number)} for number in range(100)])
    set_lazy_loads(db.session, "batch")
    with wire.record() as log:
        for item in db.session.scalars(sa.select(Item)):
            assert item.children == []
    assert verbs(log) == ["SELECT", "SELECT"]


def test_i5_many_peers_are_asked_for_500_at_a_time(app: Flask, wire: Wire) -> None:
    db.session.execute(sa.insert(Item), [{"name": str(number)} for number in range(1001)])
    set_lazy_loads(db.session, "batch")
    items = db.session.scalars(sa.select(Item)).all()
    with wire.record() as log:
        assert [item.tags for item in items] == [[]] * 1001
    assert verbs(log) == ["SELECT"] * 3


def test_i5_a_batch_in_a_transaction_and_without_peers(app: Flask, wire: Wire) -> None:
    db.session.add_all([Item(name=name, children=[Child()]) for name in "abc"])
    db.session.commit()
    db.session.expunge_all()
    set_lazy_loads(db.session, "batch")
    with db.session.begin():
        items = db.session.scalars(sa.select(Item)).all()
        with wire.record() as log:
            assert [len(item.children) for item in items] == [1, 1, 1]
        assert verbs(log) == ["SELECT"]
    db.session.expunge_all()
    alone = db.session.scalars(sa.select(Item).where(Item.name == "a")).one()
    with wire.record() as log:
        assert len(alone.children) == 1
    assert "JOIN" not in log.statements[0]


def test_i5_peers_are_held_weakly(app: Flask, wire: Wire) -> None:
    db.session.execute(sa.insert(Item), [{"name": name} for name in "abc"])
    set_lazy_loads(db.session, "batch")
    items = db.session.scalars(sa.select(Item)).all()
    del items[1:]
    gc.collect()
    assert len(db.session.identity_map) == 1
    assert items[0].children == []


def test_i5_changed_objects_are_loaded_by_themselves(app: Flask, wire: Wire) -> None:
    """The statement of a batch goes by the rows; what was changed and not written goes by the object."""
    db.session.add_all([Item(name=name, children=[Child()]) for name in "ab"])
    db.session.commit()
    db.session.expunge_all()
    set_lazy_loads(db.session, "batch")
    children = db.session.scalars(sa.select(Child).order_by(Child.id)).all()
    ids = [child.item_id for child in children]
    children[0].item_id = ids[1]
    assert children[1].item.name == "b"
    assert children[0].item.name == "b"
    db.session.rollback()
    db.session.expunge_all()
    items = db.session.scalars(sa.select(Item).order_by(Item.name)).all()
    Child(item=items[1])  # waits for its collection to be loaded
    assert [len(item.children) for item in items] == [1, 2]
    db.session.rollback()


def test_i5_options_of_the_query_hold_for_the_batch(app: Flask, wire: Wire) -> None:
    db.session.add_all([Item(name=name, children=[Child(), Child(size=2)], tags=[Tag(label=name)]) for name in "ab"])
    db.session.commit()
    db.session.expunge_all()
    set_lazy_loads(db.session, "batch")
    options = (sa_orm.lazyload(Item.children).load_only(Child.id), sa_orm.selectinload(Item.tags))
    items = db.session.scalars(sa.select(Item).options(*options)).all()
    with wire.record() as log:
        assert [len(item.children) for item in items] == [2, 2]
    assert verbs(log) == ["SELECT"]
    assert "child.size" not in log.statements[0]
    db.session.expunge_all()
    items = db.session.scalars(sa.select(Item).options(sa_orm.lazyload(Item.children.and_(Child.size == 2)))).all()
    assert [[child.size for child in item.children] for item in items] == [[2], [2]]


class DataBase(MappedAsDataclass, DeclarativeBase):
    """Instances cannot be hashed."""


class Node(DataBase):
    __tablename__ = "l_node"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int | None] = mapped_column(sa.ForeignKey("l_node.id"), default=None)
    children: Mapped[list[Node]] = relationship(default_factory=list)


def test_i5_dataclasses(wire: Wire, database_url: str) -> None:
    engine = sa.create_engine(wire.url(database_url))
    DataBase.metadata.create_all(engine)
    with sessionmaker(engine)() as session:
        session.add_all([Node(id=1), Node(id=2), Node(id=3, parent_id=1), Node(id=4, parent_id=1)])
        session.commit()
        session.expunge_all()
        set_lazy_loads(session, "batch")
        nodes = session.scalars(sa.select(Node).order_by(Node.id)).all()
        with wire.record() as log:
            assert [len(node.children) for node in nodes] == [2, 0, 0, 0]
        assert verbs(log) == ["SELECT"]
    engine.dispose()


def test_i5_raise(make_app: Callable[..., Flask], wire: Wire) -> None:
    with make_app(FICTIVE_LAZY_LOADS="raise").app_context():
        db.session.add(Item(name="a", children=[Child()]))
        db.session.commit()
        db.session.expunge_all()
        item = db.session.scalars(sa.select(Item)).one()
        with wire.record() as log, pytest.raises(LazyLoadRefused, match=r"selectinload\(Item\.children\)"):
            item.children  # noqa: B018
        assert not log.exchanges
        with allow_lazy_loads():
            assert len(item.children) == 1
        db.session.refresh(item, ["name"])
        assert db.session.get(Child, item.children[0].id).item is item
        db.session.expunge_all()
        assert len(db.session.scalars(sa.select(Item).options(sa_orm.selectinload(Item.children))).one().children) == 1


def test_i5_eager_loads_of_a_stream(app: Flask) -> None:
    db.session.add_all([Item(name=name, children=[Child()]) for name in "ab"])
    db.session.commit()
    db.session.expunge_all()
    set_lazy_loads(db.session, "batch")
    statement = sa.select(Item).options(sa_orm.selectinload(Item.children))
    for item in db.session.scalars(statement, execution_options={"yield_per": 1}):
        assert len(item.children) == 1


def load_one_by_one() -> None:
    for item in db.session.scalars(sa.select(Item)).all():
        item.children  # noqa: B018


def test_i5_n_plus_one_by_call_site(make_app: Callable[..., Flask]) -> None:
    with make_app(FICTIVE_N_PLUS_ONE="warn").app_context():
        db.session.execute(sa.insert(Item), [{"name": str(number)} for number in range(lazy_loads.THRESHOLD + 3)])
        with pytest.warns(NPlusOneWarning) as caught:
            load_one_by_one()
        assert len(caught) == 1
        assert caught[0].filename == __file__
        line = load_one_by_one.__code__.co_firstlineno + 2
        assert f"{__file__}:{line} in load_one_by_one loads Item.children one by one" in str(caught[0].message)
        assert "selectinload(Item.children)" in str(caught[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with allow_lazy_loads():
                db.session.expunge_all()
                load_one_by_one()
            for item in db.session.scalars(sa.select(Item).limit(lazy_loads.THRESHOLD)).all():
                item.tags  # noqa: B018 - not too many
            for number in range(lazy_loads.THRESHOLD + 3):  # each of a query of its own
                db.session.expunge_all()
                db.session.scalars(sa.select(Item).where(Item.name == str(number))).one().children  # noqa: B018
        set_lazy_loads(db.session, n_plus_one="raise")
        db.session.expunge_all()
        with pytest.raises(NPlusOneError, match=r"Item\.children one by one"):
            load_one_by_one()
        set_lazy_loads(db.session, "batch", n_plus_one="raise")
        db.session.expunge_all()
        load_one_by_one()


def test_i5_a_session_that_lives_long_does_not_grow(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_loads, "_MOST_SEEN", 3)
    db.session.execute(sa.insert(Item), [{"name": "a"}])
    set_lazy_loads(db.session, n_plus_one="warn")
    for _ in range(10):
        db.session.expunge_all()
        db.session.scalars(sa.select(Item)).one().children  # noqa: B018
    assert len(db.session.info[lazy_loads._SEEN]) <= 5


def test_i5_targets(make_session: MakeSession, app: Flask) -> None:
    set_lazy_loads(make_session, "raise")
    with make_session() as session, pytest.raises(LazyLoadRefused):
        session.scalars(sa.select(User)).all()[1].boss  # noqa: B018
    with pytest.raises(ConfigurationError, match="lazy_loads = 'sometimes'"):
        set_lazy_loads(db.session, "sometimes")
    with pytest.raises(ConfigurationError, match="n_plus_one = True"):
        set_lazy_loads(db.session, n_plus_one=True)  # type: ignore[arg-type]

"""Columns that most tables have, and names for constraints (rules I1 and I2)."""

from __future__ import annotations

import copy
import datetime
import os
import pickle
import threading
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask_sqlalchemy.model import Model as LegacyModel
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import (
    DeclarativeBase,
    DeclarativeBaseNoMeta,
    Mapped,
    MappedAsDataclass,
    mapped_column,
    relationship,
)

from fictive.errors import ConfigurationError
from fictive.models import (
    ConcurrentModificationError,
    PublicIdMixin,
    SoftDeleteMixin,
    TimestampMixin,
    UUIDMixin,
    UUIDv7Mixin,
    VersionMixin,
    check_names,
    hide_deleted,
    naming_convention,
    set_lazy_loads,
    unique_among_live,
    uuid7,
    with_deleted,
)
from fictive.sqlalchemy import FindOrCreateDescriptor, UpdateOrCreateDescriptor, sessionmaker
from fictive.testing.wire import Wire
from tests.wirelog import verbs

ON_21 = sa.__version__ >= "2.1"


class Base(DeclarativeBase):
    pass


class Order(TimestampMixin, Base):
    __tablename__ = "i_order"
    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str | None]
    lines: Mapped[list[Line]] = relationship(back_populates="order")


class Line(SoftDeleteMixin, VersionMixin, TimestampMixin, Base):
    __tablename__ = "i_line"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    order_id: Mapped[int | None] = mapped_column(sa.ForeignKey("i_order.id"))
    order: Mapped[Order | None] = relationship(back_populates="lines")
    __table_args__ = (unique_among_live("name"),)
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "line"}


class Gift(Line):
    """Joined inheritance."""

    __tablename__ = "i_gift"
    id: Mapped[int] = mapped_column(sa.ForeignKey("i_line.id"), primary_key=True)
    card: Mapped[str | None]
    __mapper_args__ = {"polymorphic_identity": "gift"}


class Discount(Line):
    """Single-table inheritance."""

    percent: Mapped[int | None]
    __mapper_args__ = {"polymorphic_identity": "discount"}


class Member(SoftDeleteMixin, Base):
    __tablename__ = "i_member"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    note: Mapped[str | None]
    __table_args__ = (unique_among_live("name"),)


class Account(PublicIdMixin, Base):
    __tablename__ = "i_account"


class Random(UUIDMixin, Base):
    __tablename__ = "i_random"


class Ordered(UUIDv7Mixin, TimestampMixin, Base):
    __tablename__ = "i_ordered"
    number: Mapped[int]


@pytest.fixture
def engine(wire: Wire, database_url: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(wire.url(database_url))
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def make_session(engine: sa.Engine) -> sessionmaker:
    return sessionmaker(engine)


# TimestampMixin


def test_i1_timestamps_are_the_servers_and_move_with_updates(make_session: sessionmaker, wire: Wire) -> None:
    with make_session() as session:
        order = Order(note="a")
        session.add(order)
        with wire.record() as log:
            session.commit()
            made, changed = order.created_at, order.updated_at
        assert verbs(log) == ["BEGIN", "INSERT", "COMMIT"]
        assert made == changed
        assert made.tzinfo is not None
        session.execute(sa.text("select pg_sleep(0.002)"))
        order.note = "b"
        with wire.record() as log:
            session.commit()
        assert verbs(log) == ["BEGIN", "UPDATE", "COMMIT"]
        assert order.created_at == made
        assert order.updated_at > changed
        changed = order.updated_at
        session.execute(sa.update(Order).values(note="c"))
        assert session.scalar(sa.select(Order.updated_at)) > changed
        assert isinstance(session.scalar(sa.select(sa.func.now() - Order.created_at)), datetime.timedelta)


# SoftDeleteMixin


def test_i1_get_by_its_kept_statement_hides_what_is_deleted(make_session: sessionmaker, wire: Wire) -> None:
    with make_session() as session:
        session.add_all([Member(name="here"), Member(name="gone", deleted_at=sa.func.now()), Order()])
        session.commit()
        session.expunge_all()
        with wire.record() as log:
            found = [session.get(Member, key) for key in (1, 2)]
            assert session.get(Order, 1) is not None
        assert (found[0] is not None, found[1]) == (True, None)
        assert [("deleted_at IS NULL" in each) for each in log.statements] == [True, True, False]
        kept = session.get(Member, 2, execution_options={"fictive_with_deleted": True})
        assert kept is not None
        assert pickle.loads(pickle.dumps(kept)).name == "gone"


@pytest.mark.parametrize("options", [{}, {"named": True}, {"once": True}])
def test_the_applications_listeners_hear_of_get(make_session: sessionmaker, options: Any) -> None:
    told: list[Any] = []
    with make_session() as session:
        sa.event.listen(session, "do_orm_execute", lambda *states, **named: told.append((states, named)), **options)
        assert session.get(Member, 1) is None
        assert session.get(Order, 1) is None
        assert len(told) == (1 if "once" in options else 2)


def _two_lines(session: Any) -> Order:
    order = Order(id=1)
    session.add_all([order, Line(id=1, name="gone", order=order), Line(id=2, name="here", order=order)])
    session.add_all([Gift(id=3, name="gone gift", card="x"), Discount(id=4, name="gone discount", percent=3)])
    session.commit()
    for key in (1, 3, 4):
        session.get(Line, key).soft_delete()
    session.commit()
    session.expunge_all()
    return order


SELECTS: dict[str, Any] = {
    "entity": lambda: sa.select(Line.id).order_by(Line.id),
    "whole entity": lambda: sa.select(Line).order_by(Line.id).with_only_columns(Line.id),
    "alias": lambda: sa.select((alias := sa_orm.aliased(Line)).id).order_by(alias.id),
    "joined inheritance": lambda: sa.select(Gift.id),
    "single-table inheritance": lambda: sa.select(Discount.id),
    "join": lambda: sa.select(Line.id).select_from(Order).join(Order.lines).order_by(Line.id),
    "join by its name": lambda: sa.select(Order.id).join(Order.lines),
    "join of an alias": lambda: sa.select(Order.id).join(Order.lines.of_type(sa_orm.aliased(Line))),
    "outer join": lambda: sa.select(Order.id).join(Order.lines, isouter=True),
    "count": lambda: sa.select(sa.func.count()).select_from(Line),
    "subquery": lambda: sa.select(Order.id).where(Order.id.in_(sa.select(Line.order_id).where(Line.name == "gone"))),
    "union": lambda: sa.union_all(sa.select(Line.id), sa.select(Line.id)).order_by("id"),
    "lambda": lambda: sa.lambda_stmt(lambda: sa.select(Line.id)),
    "any": lambda: sa.select(Order.id).where(Order.lines.any(Line.name == "gone")),
    "not any": lambda: sa.select(Order.id).where(~Order.lines.any(Line.name == "gone")),
    "exists": lambda: sa.select(Order.id).where(sa.exists().where(Line.order_id == Order.id, Line.name == "gone")),
    "exists of a select": lambda: sa.select(Order.id).where(
        sa.select(Line.id).where(Line.order_id == Order.id, Line.name == "gone").exists()
    ),
    "has": lambda: sa.select(Order.id).where(Order.lines.any(Line.order.has(Order.lines.any(Line.id == 2)))),
    "from a select": lambda: sa.select(Line.id).from_statement(sa.select(Line.id).order_by(Line.id)),
    "from a union": lambda: sa.select(Line.id).from_statement(
        sa.union_all(sa.select(Line.id), sa.select(Line.id)).order_by("id")
    ),
}
LIVE: dict[str, list[int]] = {
    "entity": [2], "whole entity": [2], "alias": [2], "joined inheritance": [], "single-table inheritance": [],
    "join": [2], "join by its name": [1], "join of an alias": [1], "outer join": [1], "count": [1],
    "subquery": [], "union": [2, 2], "lambda": [2], "any": [], "exists": [], "exists of a select": [],
    "has": [1], "not any": [1], "from a select": [2], "from a union": [2, 2],
}  # fmt: skip
ALL: dict[str, list[int]] = {
    "entity": [1, 2, 3, 4], "whole entity": [1, 2, 3, 4], "alias": [1, 2, 3, 4], "joined inheritance": [3],
    "single-table inheritance": [4], "join": [1, 2], "join by its name": [1, 1], "join of an alias": [1, 1],
    "outer join": [1, 1], "count": [4], "subquery": [1],
    "union": [1, 1, 2, 2, 3, 3, 4, 4], "any": [1], "exists": [1],
    "exists of a select": [1], "not any": [], "has": [1],
    "from a select": [1, 2, 3, 4], "from a union": [1, 1, 2, 2, 3, 3, 4, 4],
}  # fmt: skip


def test_i1_deleted_rows_are_hidden(make_session: sessionmaker, wire: Wire) -> None:
    with make_session() as session:
        _two_lines(session)
        assert {name: list(session.scalars(make())) for name, make in SELECTS.items()} == LIVE
        assert {name: list(session.scalars(with_deleted(SELECTS[name]()))) for name in ALL} == ALL
        assert session.get(Line, 1) is None
        assert session.get(Line, 1, execution_options={"fictive_with_deleted": True}).is_deleted
        session.expunge_all()
        assert session.query(Line).count() == 1
        assert [line.id for line in with_deleted(session.query(Line).filter(Line.id < 3).order_by(Line.id))] == [1, 2]
        assert session.query(Line).from_statement(sa.select(Line)).one().id == 2
        changed = sa.update(Line).values(order_id=1).returning(Line)
        assert [line.id for line in session.scalars(sa.select(Line).from_statement(changed))] == [2]


def test_i1_deleted_rows_are_hidden_from_loads(make_session: sessionmaker, wire: Wire) -> None:
    """Each way of loading a collection, with one criterion and no statement more than without."""
    with make_session() as session:
        _two_lines(session)
        for option in (sa_orm.lazyload, sa_orm.joinedload, sa_orm.selectinload, sa_orm.subqueryload):
            statement = sa.select(Order).options(option(Order.lines))
            with wire.record() as log:
                order = session.scalars(statement).unique().one()
                assert [line.id for line in order.lines] == [2], option.__name__
            assert len(log.exchanges) == (1 if option is sa_orm.joinedload else 2)
            assert log.statements[-1].count("IS NULL") == 1
            session.expunge_all()
        order = session.scalars(with_deleted(sa.select(Order).options(sa_orm.selectinload(Order.lines)))).one()
        assert len(order.lines) == 2
        session.expire(order)
        assert [line.id for line in order.lines] == [2]


def test_i5_a_batch_does_not_go_by_the_rows_of_deleted_parents(make_session: sessionmaker) -> None:
    """The statement of a batch reads them, and would find nothing for one that is hidden."""
    with make_session() as session:
        set_lazy_loads(session, "batch")
        _two_lines(session)
        lines = session.scalars(with_deleted(sa.select(Line).order_by(Line.id))).all()
        assert [line.order and line.order.id for line in lines] == [1, 1, None, None]
        session.expunge_all()
        session.add(Line(id=9, name="other", order_id=1))
        session.commit()
        lines = session.scalars(sa.select(Line).order_by(Line.id)).all()
        lines[0].soft_delete()
        session.commit()
        assert [line.order and line.order.id for line in reversed(lines)] == [1, 1]


def test_i1_eager_loads_of_a_stream(make_session: sessionmaker) -> None:
    """The handler that hides deleted rows lets `yield_per` be that of the stream alone."""
    with make_session() as session:
        _two_lines(session)
        statement = sa.select(Order).options(sa_orm.selectinload(Order.lines))
        for order in session.scalars(statement, execution_options={"yield_per": 1}):
            assert [line.id for line in order.lines] == [2]


def test_i1_objects_can_be_pickled(make_session: sessionmaker, wire: Wire) -> None:
    """As a cache does; what they load afterwards is without deleted rows, by one criterion."""
    with make_session() as session:
        _two_lines(session)
        loaded = [session.get(Line, 2), *session.scalars(sa.select(Line)), *session.scalars(sa.select(Order))]
        packed = [pickle.dumps(each) for each in loaded]
        copied = copy.deepcopy(loaded[0])
    with make_session() as session:
        assert copied.name == "here"
        for each in map(pickle.loads, packed):
            order = each if isinstance(each, Order) else session.merge(each, load=False).order
            if order is each:
                order = session.merge(each, load=False)
            with wire.record() as log:
                assert [line.id for line in order.lines] == [2]
            assert log.statements[-1].count("IS NULL") == 1
            session.expunge_all()


def test_i1_a_deleted_object_is_still_an_object(make_session: sessionmaker) -> None:
    with make_session() as session:
        line = Line(name="a")
        session.add(line)
        session.commit()
        line.soft_delete()
        assert line.is_deleted
        session.commit()
        when = line.deleted_at
        assert when is not None
        line.soft_delete()
        session.commit()
        session.refresh(line)
        assert line.deleted_at == when
        session.add(Line(name="a"))  # its key is free
        session.commit()
        line.restore()
        with pytest.raises(sa.exc.IntegrityError):
            session.commit()
        session.rollback()
        session.delete(line)
        session.commit()
        assert session.scalar(with_deleted(sa.select(sa.func.count(Line.id)))) == 1


@pytest.fixture(params=["commit", "begin", "plain"])
def hiding(request: pytest.FixtureRequest, engine: sa.Engine) -> Any:
    """A maker of sessions that hide deleted rows."""
    if request.param != "plain":
        return sessionmaker(engine, writes_outside=request.param)
    maker = sa_orm.sessionmaker(engine)
    hide_deleted(maker)
    return maker


def test_i1_is_deleted_in_queries(hiding: Any) -> None:
    with hiding() as session:
        _two_lines(session)
        other = sa_orm.aliased(Line)
        assert [line.id for line in session.query(Line).filter_by(is_deleted=False)] == [2]
        assert list(session.scalars(sa.select(Line.id).where(~Line.is_deleted))) == [2]
        assert list(session.scalars(sa.select(other.id).where(other.is_deleted.is_(False)))) == [2]
        assert list(session.scalars(sa.select(Line.id).where(Line.is_deleted))) == []
        every = with_deleted(sa.select(Line.id, Line.is_deleted).order_by(Line.is_deleted, Line.id))
        assert session.execute(every).all() == [(2, False), (1, True), (3, True), (4, True)]
        assert list(session.scalars(with_deleted(sa.select(Gift.id).filter_by(is_deleted=True)))) == [3]


def test_i1_updates_and_deletes_by_criteria_hide_deleted_rows(hiding: Any) -> None:
    def notes() -> dict[int, str]:
        rows = session.execute(sa.text("select id, name from i_line order by id"))
        return {key: name[:3] for key, name in rows}

    def version() -> Any:
        return session.scalar(sa.text("select version from i_line where id = 1"))

    in_order = sa.select(Order.id).where(Order.lines.any(Line.name == "gone"))
    updates: list[tuple[Any, list[int]]] = [
        (lambda new: session.execute(sa.update(Line).values(name=new)), [2]),
        (lambda new: session.execute(sa.update(Line).where(Line.id == 1).values(name=new)), []),
        (lambda new: session.query(Line).filter(Line.id < 3).update({"name": new}), [2]),
        (lambda new: session.execute(sa.update(Line).where(Line.order_id.in_(in_order)).values(name=new)), []),
        (lambda new: session.execute(with_deleted(sa.update(Line).values(name=new + Line.name))), [1, 2, 3, 4]),
        (
            lambda new: session.execute(sa.update(Line), [{"id": 1, "name": new, "version": version()}]),
            [1],
        ),  # by its key
        (lambda new: session.execute(sa.update(Line.__table__).values(name=new + Line.name)), [1, 2, 3, 4]),
    ]
    with hiding() as session:
        _two_lines(session)
        for number, (update, changed) in enumerate(updates):
            new = f"n{number} "
            held = session.scalars(with_deleted(sa.select(Line))).all()
            update(new)
            assert [key for key, name in notes().items() if name == new[:3]] == changed, number
            session.commit()
            if number != 6:  # a statement of Core leaves objects alone
                assert {line.id for line in held if line.name.startswith(new)} == set(changed), number
            session.expire_all()
        session.execute(sa.text("delete from i_gift"))
        assert session.execute(sa.delete(Line).where(Line.id != 2)).rowcount == 0
        assert session.query(Line).filter(Line.id == 1).delete() == 0
        assert list(notes()) == [1, 2, 3, 4]
        assert session.execute(sa.delete(Line)).rowcount == 1
        session.commit()
        assert list(notes()) == [1, 3, 4]
        assert session.execute(with_deleted(sa.delete(Line).where(Line.is_deleted))).rowcount == 3
        session.commit()
        assert session.execute(sa.update(Order).values(note="x")).rowcount == 1  # of another model


def test_i1_what_an_insert_copies_is_not_deleted(hiding: Any) -> None:
    with hiding() as session:
        _two_lines(session)
        columns = ["id", "kind", "name"]
        copies = sa.select(Line.id + 10, sa.literal("line"), Line.name + " again").where(Line.id < 3)
        copying = sa.insert(Line).from_select(columns, copies).returning(Line.id)
        assert session.scalars(copying).all() == [12]
        session.execute(sa.delete(Line).where(Line.id > 10))
        assert sorted(session.scalars(with_deleted(copying))) == [11, 12]


def test_i1_sessions_that_do_not_hide_update_all(engine: sa.Engine, make_session: sessionmaker) -> None:
    with make_session() as session:
        _two_lines(session)
    with sa_orm.Session(engine) as session:
        assert session.execute(sa.update(Line).values(order_id=None)).rowcount == 4


def test_i1_deleted_at_can_be_read_before_the_flush(hiding: Any) -> None:
    with hiding() as session:
        session.add(line := Line(name="a"))
        session.commit()
        before = datetime.datetime.now(datetime.UTC)
        line.soft_delete()
        assert before <= line.deleted_at <= datetime.datetime.now(datetime.UTC)
        assert line.deleted_at.isoformat().endswith("+00:00")
        for again in (copy.deepcopy(line.deleted_at), pickle.loads(pickle.dumps(line.deleted_at))):
            assert again == line.deleted_at
            assert type(again) is datetime.datetime
        for other in (
            line.deleted_at + datetime.timedelta(days=30),
            datetime.timedelta(days=30) + line.deleted_at,
            line.deleted_at - datetime.timedelta(days=30),
            line.deleted_at.replace(microsecond=0),
            line.deleted_at.astimezone(datetime.timezone(datetime.timedelta(hours=1))),
        ):
            assert type(other) is datetime.datetime  # and no now() in a column that it is given to
        session.flush()
        now = session.scalar(sa.text("select deleted_at from i_line"))
        assert line.deleted_at == now
        assert type(line.deleted_at) is datetime.datetime
        session.commit()
        line.restore()
        assert line.deleted_at is None
        new = Line(name="b")
        new.soft_delete()
        assert new.is_deleted
        session.add(new)
        session.commit()
        assert isinstance(new.deleted_at, datetime.datetime)


def test_i1_deleted_at_has_an_index_when_asked() -> None:
    class Base(DeclarativeBase):
        pass

    class With(SoftDeleteMixin, Base):
        __tablename__ = "with_index"
        __index_deleted_at__ = True
        id: Mapped[int] = mapped_column(primary_key=True)

    class Without(SoftDeleteMixin, Base):
        __tablename__ = "without_index"
        id: Mapped[int] = mapped_column(primary_key=True)

    (index,) = With.__table__.indexes  # type: ignore[attr-defined]
    assert (index.name, [column.name for column in index.columns]) == ("ix_with_index_deleted_at", ["deleted_at"])
    assert not Without.__table__.indexes  # type: ignore[attr-defined]


@pytest.mark.parametrize("plain", [False, True])
def test_i1_find_or_create_and_its_kin_are_about_live_rows(
    engine: sa.Engine, make_session: sessionmaker, wire: Wire, plain: bool
) -> None:
    """By the key that is unique among them, and so without a lock; a deleted row is neither found nor written."""
    with sa_orm.Session(engine) if plain else make_session() as session:
        find_or_create = FindOrCreateDescriptor(lambda: session).__get__(None, Member)
        update_or_create = UpdateOrCreateDescriptor(lambda: session).__get__(None, Member)
        first = find_or_create({"note": "first"}, name="a")
        first.soft_delete()
        session.commit()
        session.scalar(sa.select(1))
        with wire.record() as log:
            second, created = update_or_create({"note": "second"}, name="a")
        assert (created, second.id != first.id) == (True, True)
        assert log.round_trips == 1
        assert "WHERE deleted_at IS NULL" in log.statements[0]
        second.soft_delete()
        session.commit()
        with wire.record() as log:
            third = find_or_create({"note": "third"}, name="a")
        assert [verb for verb in verbs(log) if verb != "BEGIN"] == ["SELECT", "INSERT"]
        assert next(text for text in log.statements if "SELECT" in text).count("deleted_at IS NULL") == 1
        assert find_or_create(name="a") is third
        session.commit()
        notes = session.scalars(with_deleted(sa.select(Member.note)).order_by(Member.id)).all()
        assert notes == ["first", "second", "third"]


def test_i1_other_models_cost_nothing(make_session: sessionmaker, wire: Wire) -> None:
    statement = sa.select(Order).where(Order.id == 1)
    with make_session() as session, wire.record() as log:
        session.scalars(statement).all()
    assert log.round_trips == 1
    assert "deleted_at" not in log.statements[0]


def test_i1_plain_sessions_hide_deleted_rows_when_asked(engine: sa.Engine, make_session: sessionmaker) -> None:
    with make_session() as session:
        _two_lines(session)
    plain = sa_orm.sessionmaker(engine)
    with plain() as session:
        assert session.scalar(sa.select(sa.func.count(Line.id))) == 4
    hide_deleted(plain)
    hide_deleted(sa_orm.scoped_session(plain))
    with plain() as session:
        assert session.scalar(sa.select(sa.func.count(Line.id))) == 1


# VersionMixin


def test_i1_stale_writes_raise_and_do_not_win(make_session: sessionmaker, wire: Wire) -> None:
    with make_session() as first, make_session() as second:
        first.add(Line(id=1, name="a"))
        first.commit()
        mine, theirs = first.get(Line, 1), second.get(Line, 1)
        theirs.name = "theirs"
        with wire.record() as log:
            second.commit()
        assert verbs(log) == ["BEGIN", "UPDATE", "COMMIT"]
        assert theirs.version == 2
        mine.name = "mine"
        with pytest.raises(ConcurrentModificationError):
            first.commit()
        first.refresh(mine)
        assert (mine.name, mine.version) == ("theirs", 2)
        first.execute(sa.update(Line).values(name="bulk"))
        with pytest.raises(ConcurrentModificationError), second.begin():
            second.delete(theirs)
        second.rollback()
        assert second.scalar(sa.select(Line.version).execution_options(populate_existing=True)) == 3
        upsert = postgresql.insert(Line).values(id=1, name="upsert", kind="line")
        changes = {"name": upsert.excluded.name, "version": Line.__table__.c.version.onupdate.arg}
        second.execute(upsert.on_conflict_do_update(index_elements=["id"], set_=changes))
        assert second.execute(sa.select(Line.name, Line.version)).one() == ("upsert", 4)


def test_i1_versions_of_bulk_rows_and_of_subclasses(make_session: sessionmaker) -> None:
    with make_session() as session:
        session.execute(sa.insert(Line), [{"name": "a", "kind": "line"}, {"name": "b", "kind": "line"}])
        gift = Gift(name="c", card="x")
        session.add(gift)
        session.commit()
        gift.card = "y"  # a column of the subclass's table moves the version in the base's
        session.commit()
        assert session.scalars(sa.select(Line.version).order_by(Line.name)).all() == [1, 1, 2]


def test_i1_a_model_that_cannot_take_the_version_says_why() -> None:
    class Base(DeclarativeBase):
        pass

    with pytest.raises(ConfigurationError, match=r"Late .*Write VersionMixin first"):

        class Late(Base, VersionMixin):
            __tablename__ = "late"
            id: Mapped[int] = mapped_column(primary_key=True)
            __mapper_args__ = {"eager_defaults": True}

    class Fine(Base, VersionMixin):
        __tablename__ = "fine"
        id: Mapped[int] = mapped_column(primary_key=True)

    assert sa.inspect(Fine).version_id_col is Fine.__table__.c.version


# Keys


def test_i1_uuid_keys_are_known_before_the_insert(make_session: sessionmaker, wire: Wire) -> None:
    with make_session() as session:
        objects = [Random() for _ in range(3)] + [Ordered(number=number) for number in range(3)]
        session.add_all(objects)
        with wire.record() as log:
            session.flush()
        assert verbs(log) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
        assert {obj.id.version for obj in objects[:3]} == {4}
        assert {obj.id.version for obj in objects[3:]} == {7}
        assert session.scalars(sa.select(Ordered.number).order_by(Ordered.id)).all() == [0, 1, 2]
        session.execute(sa.text("insert into i_ordered (number) values (3)"))
        assert session.scalar(sa.select(Ordered.id).where(Ordered.number == 3)).version == 7


def test_i1_no_server_makes_another_kind_of_key() -> None:
    """Below 18 there is no function for it, and an INSERT without a key has to fail."""
    dialect = postgresql.dialect()
    dialect.server_version_info = (17, 2)
    old = str(sa.schema.CreateTable(Ordered.__table__).compile(dialect=dialect))
    assert "id UUID DEFAULT NULL NOT NULL" in old
    dialect.server_version_info = (18, 0)
    assert "DEFAULT uuidv7()" in str(sa.schema.CreateTable(Ordered.__table__).compile(dialect=dialect))


def test_i1_uuid7_is_monotonic_and_distinct_in_threads_and_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[uuid.UUID]] = [[] for _ in range(4)]

    def make(into: list[uuid.UUID]) -> None:
        into.extend(uuid7() for _ in range(2000))

    threads = [threading.Thread(target=make, args=(each,)) for each in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    every = [key for each in made for key in each]
    assert all(each == sorted(each) for each in made)
    assert len(set(every)) == len(every)
    assert {(key.version, key.variant) for key in every} == {(7, uuid.RFC_4122)}
    last = uuid7()
    monkeypatch.setattr("time.time_ns", lambda: 0)  # a clock set back
    assert uuid7() > last
    last = uuid7()
    monkeypatch.setattr("os.getpid", lambda: os.getppid())  # as in a forked child
    assert uuid7().int >> 80 == last.int >> 80
    assert abs(uuid7().int - last.int) & ((1 << 74) - 1) > 1 << 34  # a fresh tail, not the parent's next


def test_i1_public_id(make_session: sessionmaker, wire: Wire) -> None:
    with make_session() as session:
        account = Account()
        session.add(account)
        session.commit()
        assert isinstance(account.id, int)
        assert session.scalars(Account.by_public_id(str(account.public_id))).one() is account
        assert session.scalars(Account.by_public_id(uuid.uuid4())).one_or_none() is None
    with pytest.raises(ValueError, match="hexadecimal"):
        Account.by_public_id("17")


# Kinds of bases


class _Mixed(UUIDv7Mixin, TimestampMixin, VersionMixin, SoftDeleteMixin):
    """A mixin of an app's own."""


BASES: dict[str, tuple[type, ...]] = {
    "DeclarativeBase": (DeclarativeBase,),
    "DeclarativeBaseNoMeta": (DeclarativeBaseNoMeta,),
    "MappedAsDataclass": (MappedAsDataclass, DeclarativeBase),
}


@pytest.mark.parametrize("order", ["mixin first", "base first"])
@pytest.mark.parametrize("kind", [*BASES, "legacy"])
def test_i1_every_kind_of_base(kind: str, order: str) -> None:
    if kind == "legacy":
        Root: Any = sa_orm.declarative_base(cls=LegacyModel)
    else:
        Root = type("Root", BASES[kind], {})
    bases = (_Mixed, Root) if order == "mixin first" else (Root, _Mixed)
    namespace = {
        "__tablename__": "thing",
        "__module__": __name__,
        "__annotations__": {"name": Mapped[str]},
        "name": mapped_column(sa.String),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Thing: Any = type("Thing", bases, namespace)
    engine = sa.create_engine("sqlite://")
    Root.metadata.create_all(engine)
    with sa_orm.Session(engine) as session:
        hide_deleted(session)
        thing = Thing(name="a")
        session.add(thing)
        session.commit()
        assert (thing.name, thing.version, thing.id.version) == ("a", 1, 7)
        assert isinstance(thing.updated_at, datetime.datetime)
        thing.soft_delete()
        session.commit()
        assert thing.version == 2
        assert session.scalars(sa.select(Thing)).all() == []
    engine.dispose()


# Names


def _table(metadata: sa.MetaData) -> sa.Table:
    sa.Table("users", metadata, sa.Column("id", sa.Integer, primary_key=True))
    return sa.Table(
        "orders", metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("email", sa.String, unique=True),
        sa.Column("code", sa.String, index=True),
        sa.Column("user_id", sa.ForeignKey("users.id")),
        sa.Column("amount", sa.Integer, sa.CheckConstraint("amount > 0", name="amount_positive")),
        sa.UniqueConstraint("code", "amount"),
    )  # fmt: skip


def _names(table: sa.Table) -> set[str]:
    inline = [constraint for column in table.columns for constraint in column.constraints]
    return {str(item.name) for item in (*table.constraints, *table.indexes, *inline)}


def test_i2_the_names_that_postgresql_gives() -> None:
    metadata = sa.MetaData(naming_convention=naming_convention("postgresql"))
    assert _names(_table(metadata)) == {
        "orders_pkey", "orders_email_key", "orders_code_idx", "orders_user_id_fkey", "orders_code_amount_key",
        "orders_amount_positive_check",
    }  # fmt: skip
    check_names(metadata)


def test_i2_the_names_are_those_that_postgresql_itself_gives(database_url: str, look: Any) -> None:
    """All but the CHECK's, which has a name of its own."""
    engine = sa.create_engine(database_url)
    plain, named = sa.MetaData(), sa.MetaData(naming_convention=naming_convention("postgresql"))
    _table(plain)
    _table(named)
    found = []
    for metadata in (plain, named):
        metadata.create_all(engine)
        found.append(look("select conname from pg_constraint where conrelid = 'orders'::regclass and contype <> 'c'"))
        metadata.drop_all(engine)
    engine.dispose()
    assert sorted(found[0]) == sorted(found[1])


def test_i2_prefixed_names() -> None:
    metadata = sa.MetaData(naming_convention=naming_convention("prefixed"))
    assert _names(_table(metadata)) == {
        "pk_orders", "uq_orders_email", "ix_orders_code", "fk_orders_user_id_users", "uq_orders_code_amount",
        "ck_orders_amount_positive",
    }  # fmt: skip
    check_names(metadata)


def test_i2_what_has_no_name_is_found() -> None:
    metadata = sa.MetaData()
    _table(metadata)
    with pytest.raises(ConfigurationError) as caught:
        check_names(metadata)
    for each in ("orders: ForeignKeyConstraint(user_id)", "orders: UniqueConstraint(email)", "users: PrimaryKey"):
        assert each in str(caught.value)
    assert "amount_positive" not in str(caught.value)
    metadata = sa.MetaData(naming_convention=naming_convention("prefixed"))
    sa.Table("t", metadata, sa.Column("flag", sa.Boolean(create_constraint=True)))
    with pytest.raises(ConfigurationError, match=r"t: CheckConstraint\(flag\)"):
        check_names(metadata)


def test_i2_another_style() -> None:
    with pytest.raises(ConfigurationError, match=r"'oracle'.*'postgresql', 'prefixed'"):
        naming_convention("oracle")

"""Objects of a model after their transaction's COMMIT, and hooks of a transaction over several databases (B5)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from fictive.errors import HooksFailed
from fictive.flask_sqlalchemy import FilterByOrCreateMixin, OptInTransactionMixin
from fictive.sqlalchemy import OptInSession, Rollback, after_commit_of, on_commit, on_rollback, transaction
from fictive.testing import postgres

Seen = list[tuple[list[str], list[str], list[str]]]
Work = Callable[[Any], Any]


class Base(DeclarativeBase):
    pass


class Marked:
    """A mixin that functions can be registered for."""


class Thing(Marked, Base):
    __tablename__ = "event_thing"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    kind: Mapped[str] = mapped_column(default="thing")
    parts: Mapped[list[Part]] = relationship(back_populates="thing", cascade="all, delete-orphan")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "thing"}


class Special(Thing):
    __mapper_args__ = {"polymorphic_identity": "special"}


class Part(Base):
    __tablename__ = "event_part"
    id: Mapped[int] = mapped_column(primary_key=True)
    thing_id: Mapped[int] = mapped_column(sa.ForeignKey("event_thing.id"))
    thing: Mapped[Thing] = relationship(back_populates="parts")


seen: Seen = []
marked: Seen = []
wanted: list[Callable[[], object]] = []


@after_commit_of(Thing)
def told(created: list[Thing], changed: list[Thing], deleted: list[Thing]) -> None:
    seen.append(([x.name for x in created], [x.name for x in changed], [x.name for x in deleted]))
    while wanted:
        wanted.pop()()


@after_commit_of(Marked)
def also_told(created: list[Any], changed: list[Any], deleted: list[Any]) -> None:
    marked.append(([x.name for x in created], [x.name for x in changed], [x.name for x in deleted]))


KINDS: dict[str, Callable[[sa.Engine], sa_orm.Session]] = {
    "commit": OptInSession,
    "begin": lambda engine: OptInSession(engine, writes_outside="begin"),
    "plain": sa_orm.Session,
    "plain, expiring nothing": lambda engine: sa_orm.Session(engine, expire_on_commit=False),
}


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(database_url)
    Base.metadata.create_all(engine)
    yield engine
    Base.metadata.drop_all(engine)
    engine.dispose()


@pytest.fixture(params=KINDS)
def session(request: pytest.FixtureRequest, engine: sa.Engine) -> Iterator[sa_orm.Session]:
    with KINDS[request.param](engine) as session:
        session.add(Thing(name="old"))
        session.commit()
        session.rollback()  # the function has read attributes that were expired, and so begun a transaction
        seen.clear()
        marked.clear()
        yield session
        session.rollback()


def old(session: Any) -> Thing:
    thing: Thing = session.scalars(sa.select(Thing).where(Thing.name == "old")).one()
    return thing


def one_of_each(session: Any) -> None:
    thing = old(session)
    session.delete(thing)
    session.add(Thing(name="new"))


def test_created_changed_and_deleted(session: Any) -> None:
    with transaction(session):
        session.add_all([Thing(name="a"), Special(name="b")])
        session.flush()
        old(session).name = "renamed"
        session.flush()
        assert seen == []
        session.add(Thing(name="c"))
    if session.in_transaction():
        session.commit()
    assert seen == marked == [(["a", "b", "c"], ["renamed"], [])]
    with transaction(session):
        session.delete(session.scalars(sa.select(Thing).where(Thing.name == "a")).one())
    if session.in_transaction():
        session.commit()
    assert seen[1:] == [([], [], ["a"])]


def test_add_and_commit(session: Any) -> None:
    session.add(Thing(name="a"))
    session.commit()
    assert seen == [(["a"], [], [])]
    one_of_each(session)
    session.commit()
    assert seen[1:] == [(["new"], [], ["old"])]


@pytest.mark.parametrize("end", ["rollback", "error"])
def test_what_was_rolled_back_is_not_told(end: str, session: Any) -> None:
    with contextlib.suppress(ZeroDivisionError), transaction(session):
        one_of_each(session)
        session.flush()
        if end == "rollback":
            raise Rollback
        raise ZeroDivisionError
    session.rollback()
    assert seen == []
    session.add(Thing(name="a"))
    session.commit()
    assert seen == [(["a"], [], [])]


def test_savepoints(session: Any) -> None:
    with transaction(session):
        session.add(Thing(name="a"))
        session.flush()
        with session.begin_nested():
            session.add(Thing(name="b"))
            session.flush()
            with contextlib.suppress(ZeroDivisionError), session.begin_nested():
                session.add(Thing(name="c"))
                session.flush()
                raise ZeroDivisionError
        with contextlib.suppress(ZeroDivisionError), session.begin_nested():
            session.add(Thing(name="d"))
            session.flush()
            with session.begin_nested():
                session.add(Thing(name="e"))
                session.flush()
            raise ZeroDivisionError
        session.add(Thing(name="f"))
        session.flush()
        with contextlib.suppress(ZeroDivisionError), session.begin_nested():
            session.add(Thing(name="g"))
            session.flush()
            raise ZeroDivisionError
    if session.in_transaction():
        session.commit()
    assert seen == [(["a", "b", "f"], [], [])]


def test_each_object_is_in_one_list(session: Any) -> None:
    with transaction(session):
        thing, gone, changed = Thing(name="a"), Thing(name="b"), old(session)
        session.add_all([thing, gone])
        session.flush()
        thing.name, changed.name = "aa", "changed"
        session.flush()
        session.delete(gone)
        session.delete(changed)
        session.flush()
    if session.in_transaction():
        session.commit()
    assert seen == [(["aa"], [], ["changed"])]


def test_changed_is_what_was_updated(session: Any) -> None:
    thing = old(session)
    thing.parts.append(Part())
    session.commit()
    assert seen == []
    assert thing.name == "old"  # loaded, or SQLAlchemy would write it without knowing
    thing.name = "old"
    session.commit()
    assert seen == []
    thing.name = "x"
    session.commit()
    assert seen == [([], ["x"], [])]


def test_a_failed_flush_tells_nothing(session: Any) -> None:
    session.add_all([Thing(name="a"), Thing(name="a")])
    with pytest.raises(sa.exc.IntegrityError):
        session.commit()
    session.rollback()
    assert seen == []
    session.add(Thing(name="b"))
    session.commit()
    assert seen == [(["b"], [], [])]


def test_the_function_may_use_the_session(session: Any) -> None:
    def more() -> None:
        with transaction(session):
            session.add(Thing(name="more"))

    wanted.append(more)
    session.add(Thing(name="a"))
    session.commit()
    if session.in_transaction():
        session.commit()
    assert seen == [(["a"], [], []), (["more"], [], [])]


def test_what_the_function_raises(session: Any) -> None:
    wanted.append(lambda: 1 / 0)
    session.add(Thing(name="a"))
    with pytest.raises(HooksFailed) as caught:
        session.commit()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    session.rollback()
    assert session.scalar(sa.select(sa.func.count()).select_from(Thing)) == 2


def test_a_commit_that_fails_tells_nothing(session: Any, engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "alter table event_part drop constraint event_part_thing_id_fkey, add foreign key (thing_id)"
            " references event_thing deferrable initially deferred"
        )
    session.add_all([Thing(name="a"), Part(thing_id=99999)])
    with pytest.raises(sa.exc.IntegrityError):
        session.commit()
    session.rollback()
    assert seen == []


def test_find_or_create_is_seen(make_app: Any) -> None:
    class DB(OptInTransactionMixin, FilterByOrCreateMixin, SQLAlchemy):
        pass

    db = DB(model_class=type("Base", (DeclarativeBase,), {}))

    class City(db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(unique=True)
        size: Mapped[int] = mapped_column(default=0)

    told: list[Any] = []

    @db.after_commit_of(City)
    def hear(created: list[City], changed: list[City], deleted: list[City]) -> None:
        told.append(([x.name for x in created], [x.name for x in changed], [x.name for x in deleted]))

    with make_app(db).app_context():
        db.create_all()
        City.find_or_create(name="Paris")
        assert told == [(["Paris"], [], [])]
        City.find_or_create(name="Paris")
        City.update_or_create({"size": 3}, name="Paris")
        assert told[1:] == [([], ["Paris"], [])]
        with db.session.begin():
            City.find_or_create(name="Rome")
            assert len(told) == 2
        assert told[2:] == [(["Rome"], [], [])]
        db.drop_all()


@pytest.mark.parametrize("wrong", ["Thing", None, 3])
def test_bad_arguments(wrong: Any) -> None:
    with pytest.raises(TypeError, match="takes a model"):
        after_commit_of(wrong)
    with pytest.raises(TypeError, match="decorates a function"):
        after_commit_of(Thing)(3)  # type: ignore[arg-type]


# Several databases


@pytest.fixture
def two(database_url: str, pg: postgres.Server, driver: str, tmp_path: Path, look: Any) -> Iterator[Any]:
    class DB(OptInTransactionMixin, SQLAlchemy):
        pass

    db = DB(model_class=type("Base", (DeclarativeBase,), {}))

    class Here(db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "two_here"
        id: Mapped[int] = mapped_column(primary_key=True)

    class There(db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "two_there"
        __bind_key__ = "there"
        id: Mapped[int] = mapped_column(primary_key=True)

    app = Flask(__name__, instance_path=str(tmp_path))
    app.config.update(SQLALCHEMY_DATABASE_URI=database_url, SQLALCHEMY_BINDS={"there": database_url})
    db.Here, db.There = Here, There
    db.init_app(app)
    with app.app_context():
        db.create_all()
        yield db
        db.session.remove()
        db.drop_all()
        for engine in db.engines.values():
            engine.dispose()


COUNTS = "select (select count(*) from two_here), (select count(*) from two_there)"


@pytest.mark.parametrize("kind", ["opt-in", "begin", "plain"])
def test_b5_hooks_run_after_the_last_of_the_engines(kind: str, two: Any, look: Any) -> None:
    found: list[Any] = []
    if kind == "plain":
        session: Any = sa_orm.Session(binds={two.Here: two.engine, two.There: two.engines["there"]})
    else:
        session = two.session()
        session.writes_outside = "commit" if kind == "opt-in" else "begin"
    for first, second in ((two.Here, two.There), (two.There, two.Here)):
        with transaction(session):
            session.add(first())
            session.flush()
            on_commit(session, lambda: found.append(look(COUNTS)[0]))
            session.add(second())
        session.commit()
    session.close()
    assert found == [(1, 1), (2, 2)]


@pytest.mark.parametrize("kind", ["opt-in", "plain"])
def test_b5_hooks_of_both_databases_are_dropped_together(kind: str, two: Any, look: Any) -> None:
    found: list[str] = []
    session: Any = two.session()
    if kind == "plain":
        session = sa_orm.Session(binds={two.Here: two.engine, two.There: two.engines["there"]})
    with contextlib.suppress(ZeroDivisionError), transaction(session):
        session.add_all([two.Here(), two.There()])
        session.flush()
        on_commit(session, found.append, "commit")
        on_rollback(session, found.append, "rollback")
        raise ZeroDivisionError
    session.close()
    assert found == ["rollback"]
    assert look(COUNTS)[0] == (0, 0)

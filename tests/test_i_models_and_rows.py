"""What the mixins of fictive.models mean for find_or_create and bulk work (rules I1, D2, D7, D8)."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fictive.errors import KeyOfDeletedRow, UnknownAttribute
from fictive.models import SoftDeleteMixin, TimestampMixin, VersionMixin, unique_among_live, with_deleted
from fictive.sqlalchemy import (
    FindOrCreateDescriptor,
    GetOrCreateDescriptor,
    OptInSession,
    UpdateOrCreateDescriptor,
    cleanup_tables,
    update_many,
    upsert_many,
)
from fictive.testing import postgres
from fictive.testing.wire import Wire
from tests.wirelog import verbs

Look = Callable[..., list[Any]]
one_driver = pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
_session: Any = None


class Base(DeclarativeBase):
    find_or_create = FindOrCreateDescriptor(lambda: _session)
    get_or_create = GetOrCreateDescriptor(lambda: _session)
    update_or_create = UpdateOrCreateDescriptor(lambda: _session)


class Person(SoftDeleteMixin, VersionMixin, TimestampMixin, Base):
    """A key that can be given again."""

    __tablename__ = "person"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]
    name: Mapped[str | None]
    __table_args__ = (unique_among_live("email"),)


class Badge(SoftDeleteMixin, Base):
    """An ordinary unique key, which a deleted row keeps."""

    __tablename__ = "badge"
    id: Mapped[int] = mapped_column(primary_key=True)
    code: Mapped[str] = mapped_column(unique=True)
    text: Mapped[str | None]


class Note(SoftDeleteMixin, Base):
    """No key, and a constructor of its own."""

    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]

    def __init__(self, text: str) -> None:
        self.text = text


class Heard(VersionMixin, Base):
    """Listened to, so it is made and changed by a flush."""

    __tablename__ = "heard"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    note: Mapped[str | None]


class HeardBadge(SoftDeleteMixin, Base):
    __tablename__ = "heard_badge"
    id: Mapped[int] = mapped_column(primary_key=True)
    code: Mapped[str] = mapped_column(unique=True)
    text: Mapped[str | None]


_to_do: list[Callable[[], object]] = []


@event.listens_for(Heard, "before_insert")
@event.listens_for(HeardBadge, "before_insert")
def _listen(mapper: Any, connection: Any, target: Any) -> None:
    while _to_do:
        _to_do.pop()()


@pytest.fixture
def engine(wire: Wire, database_url: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(wire.url(database_url))
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture(params=[OptInSession, sa_orm.Session])
def session(request: pytest.FixtureRequest, engine: sa.Engine) -> Iterator[Any]:
    """An opt-in session hides deleted rows by itself; the plain one is not told to."""
    yield from _use(request.param(engine))


@pytest.fixture
def optin(engine: sa.Engine) -> Iterator[Any]:
    yield from _use(OptInSession(engine))


def _use(session: Any) -> Iterator[Any]:
    global _session
    with session:
        _session = session
        yield session
    _session = None


def _deleted(session: Any, model: Any, **values: Any) -> Any:
    made = model(**values)
    session.add(made)
    session.flush()
    made.soft_delete()
    session.commit()
    return made.id


@one_driver
def test_i1_a_deleted_row_is_not_in_the_way_of_a_key_among_live(session: Any, wire: Wire) -> None:
    gone = _deleted(session, Person, email="a", name="gone")
    with wire.record() as log:
        person, created = Person.get_or_create({"name": "new"}, email="a")
    assert created
    assert person.id != gone
    assert [verb for verb in verbs(log) if verb != "BEGIN"] == ["SELECT", "INSERT"]
    assert "ON CONFLICT (email) WHERE deleted_at IS NULL DO NOTHING" in log.statements[-1]
    assert Person.find_or_create(email="a", deleted_at=None) is person
    with wire.record() as log:
        assert Person.update_or_create({"name": "newer"}, email="a") == (person, False)
    assert (person.name, person.version, log.round_trips) == ("newer", 2, 1)
    session.commit()
    # and once more, deleted in this session and not yet written
    person.soft_delete()
    session.flush()
    again, created = Person.update_or_create({"name": "third"}, email="a")
    assert created
    assert again not in (person, gone)
    session.commit()
    every = session.scalars(with_deleted(sa.select(Person).order_by(Person.id))).all()
    assert [(each.name, each.is_deleted) for each in every] == [("gone", True), ("newer", True), ("third", False)]


@one_driver
def test_i1_a_deleted_row_keeps_an_ordinary_key_and_the_error_says_so(session: Any, wire: Wire, look: Look) -> None:
    gone = _deleted(session, Badge, code="a", text="gone")
    _deleted(session, HeardBadge, code="a", text="gone")
    for model in (Badge, HeardBadge):
        for call in (
            lambda model=model: model.get_or_create(code="a"),
            lambda model=model: model.update_or_create({"text": "new"}, code="a"),
            lambda model=model: model.find_or_create(code="a", text="another"),
        ):
            with wire.record() as log, pytest.raises(KeyOfDeletedRow, match=r"deleted has the key code='a'\. Restore"):
                call()
            assert log.round_trips <= (4 if model is Badge else 12)
    assert isinstance(pickle.loads(pickle.dumps(KeyOfDeletedRow("x"))), sa.exc.IntegrityError)
    session.commit()
    # nothing of it aborts a transaction
    with session.begin():
        session.add(Note("kept"))
        with pytest.raises(KeyOfDeletedRow):
            Badge.find_or_create(code="a")
    assert look("select text from note") == ["kept"]
    assert look("select text from badge where deleted_at is not null") == ["gone"]
    # restored it is found
    session.get(Badge, gone, execution_options={"fictive_with_deleted": True}).restore()
    session.commit()
    assert Badge.update_or_create({"text": "new"}, code="a")[0].id == gone


@one_driver
def test_i1_without_a_key_and_what_cannot_be_asked(session: Any, wire: Wire, look: Look) -> None:
    _deleted(session, Note, text="a")
    note, created = Note.get_or_create(text="a")
    assert (created, note.is_deleted) == (True, False)
    assert Note.update_or_create({}, text="a") == (note, False)
    session.commit()
    assert look("select text, deleted_at is null from note order by id") == [("a", False), ("a", True)]
    with wire.record() as log:
        with pytest.raises(ValueError, match=r"Note\.deleted_at in the lookup asks for a deleted row"):
            Note.find_or_create(text="a", deleted_at=sa.func.now())
        with pytest.raises(UnknownAttribute, match=r"Note\.deleted_at cannot be in defaults.*soft_delete\(\)"):
            Note.update_or_create({"deleted_at": sa.func.now()}, text="a")
        with pytest.raises(TypeError, match="at least one attribute"):
            Note.find_or_create(deleted_at=None)
    assert log.statements == []


@pytest.mark.parametrize("rows", [3, 600], ids=["values", "staged"])
def test_i1_upsert_many_and_deleted_rows(optin: Any, look: Look, rows: int) -> None:
    _deleted(optin, Person, email="e1", name="gone")
    given = [{"email": f"e{n}", "name": "new"} for n in range(rows)]
    assert upsert_many(optin, Person, given, key="email") == (rows, 0, 0)
    _deleted(optin, Badge, code="c1", text="gone")
    upsert_many(optin, Badge, [{"code": "c0", "text": "old"}], key="code")
    badges = [{"code": f"c{n}", "text": "gone"} for n in range(rows)]
    for update in (None, []):
        with pytest.raises(KeyOfDeletedRow, match=r"upsert_many\(\): a Badge that is deleted has the key code='c1'"):
            upsert_many(optin, Badge, badges, key="code", update=update)
    assert look("select code, text from badge order by 1") == [("c0", "old"), ("c1", "gone")]
    # rows that give the column say what is to become of the row
    restoring = [{**row, "deleted_at": None} for row in badges]
    assert upsert_many(optin, Badge, restoring, key="code") == (rows - 2, 2, 0)
    assert upsert_many(optin, Badge, badges, key="code") == (0, 0, rows)
    cleanup_tables(optin, Base)
    assert look("select (select count(*) from person) + (select count(*) from badge)") == [0]


def _columns(look: Look, table: str) -> list[Any]:
    return look(f"select name, version, updated_at > created_at from {table} order by id")


@one_driver
@pytest.mark.parametrize("rows", [2, 600], ids=["values", "staged"])
def test_i1_versions_and_times_move_when_a_row_changes(optin: Any, look: Look, rows: int) -> None:
    given = [{"email": f"e{n}", "name": "a"} for n in range(rows)]
    upsert_many(optin, Person, given, key="email")
    assert set(_columns(look, "person")) == {("a", 1, False)}
    assert upsert_many(optin, Person, given, key="email") == (0, 0, rows)
    given[0]["name"] = "b"
    assert upsert_many(optin, Person, given, key="email") == (0, 1, rows - 1)
    assert _columns(look, "person") == [("b", 2, True), *[("a", 1, False)] * (rows - 1)]
    assert update_many(optin, Person, given, key="email") == rows
    assert _columns(look, "person") == [("b", 2, True), *[("a", 1, False)] * (rows - 1)]
    given[1]["name"] = None
    assert update_many(optin, Person, given, key="email") == rows
    assert _columns(look, "person")[:2] == [("b", 2, True), (None, 2, True)]
    assert set(_columns(look, "person")[2:]) <= {("a", 1, False)}
    # loaded objects have the version, so the next flush is not taken for a stale one
    person = optin.get(Person, 1)
    update_many(optin, Person, [{"id": 1, "name": "c"}])
    person.email = "other"
    optin.commit()
    assert (person.name, person.version) == ("c", 4)


@one_driver
def test_i1_versions_and_times_with_update_or_create(optin: Any, look: Look) -> None:
    person, created = Person.update_or_create({"name": "a"}, email="e")
    assert (created, person.version) == (True, 1)
    assert Person.update_or_create({"name": "a"}, email="e") == (person, False)
    assert _columns(look, "person") == [("a", 1, False)]
    assert Person.update_or_create({"name": "b"}, email="e") == (person, False)
    assert person.version == 2
    assert person.updated_at > person.created_at
    person.name = "c"
    optin.commit()
    assert _columns(look, "person") == [("c", 3, True)]
    heard, _ = Heard.update_or_create({"note": "a"}, name="x")
    for note, version in (("a", 1), ("b", 2)):  # of an object that is held
        assert Heard.update_or_create({"note": note}, name="x") == (heard, False)
        assert (heard.note, heard.version) == (note, version)
    heard.note = "c"
    optin.commit()
    assert look("select note, version from heard") == [("c", 3)]


@one_driver
def test_d7_a_row_that_comes_and_goes_between_two_looks(
    optin: Any, engine: sa.Engine, pg: postgres.Server, database_name: str, look: Look
) -> None:
    locks: list[str] = []

    with psycopg.connect(pg.url(database_name), autocommit=True) as other:

        @event.listens_for(engine, "before_cursor_execute")
        def delete(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
            if "FOR NO KEY UPDATE" in statement:
                locks.append(statement)
                if len(locks) == 2:
                    other.execute("delete from heard")

        _to_do.append(lambda: other.execute("insert into heard (name) values ('x')"))
        _, created = Heard.update_or_create({"note": "mine"}, name="x")
    assert (created, len(locks), _to_do) == (True, 2, [])
    assert look("select name, note, version from heard") == [("x", "mine", 1)]


def test_i1_sqlite(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'db'}")
    Base.metadata.create_all(engine)
    for session in _use(OptInSession(engine)):
        _deleted(session, Person, email="a")
        assert Person.get_or_create(email="a")[1]
        assert Person.update_or_create({"name": "n"}, email="a")[0].version == 2
        assert Person.update_or_create({"name": "n"}, email="a")[0].version == 2
        assert upsert_many(session, Person, [{"email": "a", "name": "m"}], key="email") == (0, 1, 0)
        assert update_many(session, Person, [{"email": "b", "name": "m"}], key="email") == 0
        _deleted(session, Badge, code="a", text="gone")
        for call in (
            lambda: Badge.find_or_create(code="a"),
            lambda: Badge.update_or_create({"text": "x"}, code="a"),
            functools.partial(upsert_many, session, Badge, [{"code": "a", "text": "x"}], key="code"),
            functools.partial(upsert_many, session, Badge, [{"code": "a"}], key="code"),
        ):
            with pytest.raises(KeyOfDeletedRow, match="code='a'"):
                call()
        assert session.execute(sa.select(Badge.__table__.c.text)).all() == [("gone",)]
    engine.dispose()

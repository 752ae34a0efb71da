"""Models that are dataclasses, on every kind of declarative base, with and without the mixins of fictive.models."""

from __future__ import annotations

import dataclasses
import types
import uuid
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.model import Model
from sqlalchemy.orm import (
    DeclarativeBase,
    DeclarativeBaseNoMeta,
    Mapped,
    MappedAsDataclass,
    mapped_column,
    relationship,
)

from fictive.flask_sqlalchemy import BulkMixin, FilterByOrCreateMixin, OptInTransactionMixin
from fictive.models import (
    ConcurrentModificationError,
    PublicIdMixin,
    SoftDeleteMixin,
    TimestampMixin,
    UUIDMixin,
    UUIDv7Mixin,
    VersionMixin,
    unique_among_live,
)
from tests.conftest import MakeApp

Look = Callable[..., list[Any]]


class DB(OptInTransactionMixin, FilterByOrCreateMixin, BulkMixin, SQLAlchemy):
    pass


class RowsOnly(FilterByOrCreateMixin, SQLAlchemy):
    """Without opt-in transactions."""


def base(*bases: type, **kwargs: Any) -> Any:
    """A declarative base, as a user writes one."""
    return types.new_class("Base", bases, kwargs)


BASES: dict[str, Callable[[], Any]] = {
    "dataclass": lambda: base(MappedAsDataclass, DeclarativeBase),
    "dataclass, no metaclass": lambda: base(MappedAsDataclass, DeclarativeBaseNoMeta),
    "dataclass, keywords only": lambda: base(MappedAsDataclass, DeclarativeBase, kw_only=True),
    "dataclass, the other way round": lambda: base(DeclarativeBase, MappedAsDataclass),
    "plain": lambda: base(DeclarativeBase),
    "plain, no metaclass": lambda: base(DeclarativeBaseNoMeta),
}


@pytest.fixture(params=BASES)
def own(request: pytest.FixtureRequest) -> Any:
    """A database object on each kind of base."""
    made = DB(model_class=BASES[request.param]())
    made.is_dataclass = "dataclass" in request.param
    return made


def as_dataclass(db: Any) -> tuple[type, ...]:
    """The bases of a model that is a dataclass, by its own base or by the mixin."""
    return (db.Model,) if db.is_dataclass else (MappedAsDataclass, db.Model)


@pytest.mark.parametrize("mode", ["commit", "begin"])
def test_i1_models_and_all_mixins(mode: str, own: Any, make_app: MakeApp, look: Look) -> None:
    class Author(SoftDeleteMixin, TimestampMixin, PublicIdMixin, *as_dataclass(own)):  # type: ignore[misc]
        name: Mapped[str] = mapped_column()
        books: Mapped[list[Any]] = relationship("Book", back_populates="author", default_factory=list)
        __table_args__ = (unique_among_live("name"),)

    class Book(VersionMixin, UUIDv7Mixin, *as_dataclass(own)):  # type: ignore[misc]
        title: Mapped[str] = mapped_column()
        author_id: Mapped[int | None] = mapped_column(sa.ForeignKey(Author.id), init=False)
        author: Mapped[Author | None] = relationship(back_populates="books", default=None)
        note: Mapped[str | None] = mapped_column(default=None)

    class Plain(UUIDMixin, TimestampMixin, own.Model):  # type: ignore[name-defined, misc]
        """Not told to be a dataclass."""

    app = make_app(own, FICTIVE_WRITES_OUTSIDE=mode)
    with app.app_context():
        own.create_all()
        session = own.session
        author = Author(name="Ada")
        assert author.books == []
        book = Book(title="a", author=author) if mode == "begin" else Book(title="a", author=author, note="x")
        assert dataclasses.is_dataclass(Book)
        assert "title='a'" in repr(book)
        session.add_all([author, book, Plain()])
        session.commit()
        assert (author.id, book.version, author.is_deleted) == (1, 1, False)
        assert isinstance(book.id, uuid.UUID)
        assert author.created_at.tzinfo is not None
        book.note = "changed"
        session.commit()
        assert book.version == 2
        author.soft_delete()
        session.commit()
        assert session.scalars(sa.select(Author)).all() == []
        assert Author.query.filter_by(is_deleted=False).count() == 0
        author.restore()
        session.commit()
        found, created = Author.get_or_create(name="Ada")
        assert (found is author, created) == (True, False)
        assert Author.get_or_create(name="Bob")[1]
        assert Author.insert_many([{"name": "Cy"}, Author(name="Dee")]) == 2
        session.commit()
        assert sorted(look("select name from author")) == ["Ada", "Bob", "Cy", "Dee"]
        assert book.version == 2
        look("update book set version = 9")
        book.note = "mine"
        with pytest.raises(ConcurrentModificationError):
            session.commit()
        session.rollback() if mode == "begin" else session.expire_all()
        names = {field.name for field in dataclasses.fields(Author)}
        assert names == {"name", "books"}  # the columns of mixins are no fields


def test_i1_the_users_base_is_not_made_anew(make_app: MakeApp) -> None:
    seen: list[str] = []

    class Base(MappedAsDataclass, DeclarativeBase):
        """The user's own."""

        type_annotation_map: ClassVar[dict[Any, Any]] = {str: sa.String(7)}
        shared: ClassVar[str] = "shared"

        def __init_subclass__(cls, **kwargs: Any) -> None:
            seen.append(cls.__name__)
            super().__init_subclass__(**kwargs)

        def describe(self) -> str:
            return super().__repr__() and self.shared

        @sa_orm.declared_attr.directive
        def __table_args__(cls) -> Any:
            return {"comment": cls.__name__}

    first, second = DB(model_class=Base), RowsOnly(model_class=Base)

    class One(first.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True, init=False)
        name: Mapped[str] = mapped_column(default="one")

    class Two(second.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True, init=False)

    assert issubclass(One, Base)
    assert issubclass(Two, Base)
    assert One.metadata is Base.metadata is first.metadata
    assert (One.__tablename__, One.__table__.comment) == ("one", "One")
    assert One().describe() == "shared"
    assert One.__table__.c.name.type.length == 7
    assert seen[-2:] == ["One", "Two"]
    assert (One.__fsa__, Two.__fsa__) == (first, second)
    assert isinstance(One.query_class, type)
    assert hasattr(Two, "find_or_create")
    app = make_app(first)
    with app.app_context():
        first.create_all()
        assert One.find_or_create(name="x").id == 1
        assert One.query.one() == first.session.get(One, 1)


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_i1_arguments_of_flask_sqlalchemy(make_app: MakeApp, database_url: str) -> None:
    given = DB(model_class=BASES["dataclass"](), disable_autonaming=True)

    class Own(given.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "own_name"
        id: Mapped[int] = mapped_column(primary_key=True, init=False)

    assert Own.__table__.name == "own_name"
    with pytest.raises(sa.exc.InvalidRequestError):

        class Unnamed(given.Model):  # type: ignore[name-defined, misc]
            id: Mapped[int] = mapped_column(primary_key=True, init=False)

    binding = DB(model_class=BASES["dataclass"]())

    class Elsewhere(binding.Model):  # type: ignore[name-defined, misc]
        __bind_key__ = "other"
        id: Mapped[int] = mapped_column(primary_key=True, init=False)

    class Creature(binding.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True, init=False)
        kind: Mapped[str] = mapped_column(init=False)
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "creature"}

    class Wolf(Creature):
        id: Mapped[int] = mapped_column(sa.ForeignKey(Creature.id), primary_key=True, init=False)
        breed: Mapped[str] = mapped_column(default="pug")
        __mapper_args__ = {"polymorphic_identity": "wolf"}

    class Lion(Creature):
        lives: Mapped[int | None] = mapped_column(default=9)
        __mapper_args__ = {"polymorphic_identity": "lion"}

    assert Elsewhere.metadata is binding.metadatas["other"]
    assert (Wolf.__table__.name, Lion.__table__.name) == ("wolf", "creature")  # type: ignore[attr-defined]
    app = make_app(binding, SQLALCHEMY_BINDS={"other": database_url})
    with app.app_context():
        binding.create_all()
        binding.session.add_all([Wolf(), Lion(), Elsewhere()])
        binding.session.commit()
        assert {type(each) for each in Creature.query} == {Wolf, Lion}


def test_i1_a_mixin_that_is_a_dataclass(make_app: MakeApp, look: Look) -> None:
    given = DB(model_class=BASES["dataclass"]())

    class Audited(MappedAsDataclass):
        by: Mapped[str] = mapped_column(default="nobody", kw_only=True)

    class Deletable(SoftDeleteMixin, MappedAsDataclass):
        """A mixin of the user's, over one of ours."""

    class Note(Audited, Deletable, TimestampMixin, given.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True, init=False)
        text: Mapped[str]

    app = make_app(given)
    with app.app_context():
        given.create_all()
        given.session.add(note := Note("a", by="me"))
        given.session.commit()
        note.soft_delete()
        given.session.commit()
        assert Note.query.count() == 0
    assert look("select by, text from note") == [("me", "a")]


def test_i1_other_bases_stay_flask_sqlalchemys(app: Flask) -> None:
    for model_class in (Model, base(DeclarativeBase), base(DeclarativeBaseNoMeta)):
        ours, theirs = DB(model_class=model_class), SQLAlchemy(model_class=model_class)
        assert [each.__name__ for each in ours.Model.__mro__] == [each.__name__ for each in theirs.Model.__mro__]

"""advanced-alchemy's sync repositories and services on `db.session`, operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from advanced_alchemy.exceptions import DuplicateKeyError, NotFoundError
from advanced_alchemy.filters import CollectionFilter, LimitOffset, OrderBy, SearchFilter
from advanced_alchemy.repository import SQLAlchemySyncRepository
from advanced_alchemy.service import SQLAlchemySyncRepositoryService
from flask import Flask
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from tests.compat.ways import Way

AppOf = Callable[..., Flask]
Look = Callable[..., list[Any]]

NAMES = "select name from author order by name"


@pytest.fixture
def db(way: Way, app_of: AppOf) -> Iterator[Any]:
    class Base(DeclarativeBase):
        pass

    db = way.db_class(model_class=Base)
    app = app_of(db)

    class Author(db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(unique=True)
        note: Mapped[str | None]

    db.Author = Author
    with app.app_context():
        db.create_all()
        db.session.execute(sa.insert(Author), [{"name": name} for name in "abc"])
        db.session.commit()
        yield db
        db.session.rollback()


@pytest.fixture
def authors(db: Any) -> Any:
    class Authors(SQLAlchemySyncRepository[Any]):
        model_type = db.Author

    return Authors(session=db.session())


@pytest.fixture
def service(db: Any) -> Any:
    class AuthorService(SQLAlchemySyncRepositoryService[Any]):
        class Repo(SQLAlchemySyncRepository[Any]):
            model_type = db.Author

        repository_type = Repo

    return AuthorService(session=db.session())


def names(found: Any) -> str:
    return "".join(author.name for author in found)


def test_reading(db: Any, authors: Any, way: Way) -> None:
    by_name = OrderBy("name", "desc")
    assert names(authors.get_many(by_name)) == "cba"
    assert names(authors.get_many(db.Author.name != "b", LimitOffset(1, 0), by_name)) == "c"
    assert names(authors.get_many(CollectionFilter("name", ["a", "b"]), order_by=[("name", True)])) == "ba"
    assert names(authors.get_many(SearchFilter("name", "B", ignore_case=True))) == "b"
    assert authors.get(1).name == "a"
    assert authors.get_one(name="b").id == 2
    assert authors.get_one_or_none(name="z") is None
    assert authors.count() == 3
    assert authors.count(name="a") == 1
    assert authors.exists(name="a")
    assert not authors.exists(name="z")
    found, total = authors.get_many_and_count(LimitOffset(2, 0), by_name)
    assert (names(found), total) == ("cb", 3)
    found, total = authors.get_many_and_count(LimitOffset(2, 0), by_name, count_with_window_function=False)
    assert (names(found), total) == ("cb", 3)
    for missing in (lambda: authors.get(9), lambda: authors.get_one(name="z")):
        with pytest.raises(NotFoundError):
            missing()
    if way.fictive:
        assert not db.session.in_transaction()


def test_writing(db: Any, authors: Any, look: Look) -> None:
    created = authors.add(db.Author(name="d"))
    assert created.id == 4
    assert names(authors.add_many([db.Author(name="e"), db.Author(name="f")])) == "ef"
    created.note = "changed"
    assert authors.update(created).note == "changed"
    assert [author.note for author in authors.update_many([db.Author(id=5, name="e", note="many")])] == ["many"]
    assert authors.upsert(db.Author(name="f", note="upserted"), match_fields=["name"]).id == 6
    upserted = authors.upsert_many([db.Author(name="f", note="again"), db.Author(name="g")], match_fields=["name"])
    assert sorted(names(upserted)) == ["f", "g"]
    assert [made for _, made in (authors.get_or_upsert(name="a"), authors.get_or_upsert(name="h"))] == [False, True]
    assert authors.get_and_update(name="a", note="updated", match_fields=["name"])[0].note == "updated"
    assert authors.delete(2).name == "b"
    assert len(authors.delete_many([3, 4])) == 2
    authors.delete_where(name="h")
    db.session.commit()
    assert look(NAMES) == ["a", "e", "f", "g"]
    assert look("select note from author order by name") == ["updated", "many", "again", None]


def test_errors_are_its_own_and_the_session_goes_on(db: Any, authors: Any, look: Look) -> None:
    with pytest.raises(DuplicateKeyError):
        authors.add(db.Author(name="a"))
    db.session.rollback()
    authors.add(db.Author(name="d"))
    db.session.commit()
    assert look(NAMES) == ["a", "b", "c", "d"]


def test_a_service(db: Any, service: Any, look: Look) -> None:
    assert service.create({"name": "d"}).id == 4
    assert names(service.create_many([{"name": "e"}, {"name": "f"}])) == "ef"
    assert service.update({"note": "x"}, item_id=4).note == "x"
    assert service.upsert({"id": 4, "name": "d", "note": "y"}).note == "y"
    assert service.get(4).note == "y"
    found, total = service.get_many_and_count(OrderBy("name"))
    assert (names(found), total) == ("abcdef", 6)
    assert service.exists(name="f")
    assert service.delete(1).name == "a"
    db.session.commit()
    assert look(NAMES) == ["b", "c", "d", "e", "f"]


def test_auto_commit(db: Any, look: Look) -> None:
    class Authors(SQLAlchemySyncRepository[Any]):
        model_type = db.Author

    authors = Authors(session=db.session(), auto_commit=True)
    authors.add(db.Author(name="d"))
    db.session.rollback()
    assert look(NAMES) == ["a", "b", "c", "d"]
    assert authors.delete(1).name == "a"
    assert look(NAMES) == ["b", "c", "d"]


def test_several_calls_in_a_block_are_one_transaction(way: Way, db: Any, authors: Any, look: Look) -> None:
    db.session.rollback()
    with pytest.raises(DuplicateKeyError), db.session.begin():
        authors.add(db.Author(name="d"))
        authors.add(db.Author(name="a"))
    assert look(NAMES) == ["a", "b", "c"]
    with db.session.begin():
        authors.add(db.Author(name="d"))
        authors.delete(1)
    assert look(NAMES) == ["b", "c", "d"]

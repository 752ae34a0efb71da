"""Keywords of the library that code is moved over from, in its own spelling."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy.orm as sa_orm
from flask import Flask

import fictive.sqlalchemy
from fictive.errors import RowChangeTimeout
from fictive.other_names import also_named
from fictive.sqlalchemy import NotFoundError, sessionmaker
from fictive.testing import postgres
from tests.models import Item, Tag, db

Look = Callable[..., list[Any]]
calls: Any = fictive.sqlalchemy  # type checkers know the documented names only


@pytest.mark.parametrize("maker", [sessionmaker, sa_orm.sessionmaker])
def test_all_arguments_by_keyword(maker: Any, app: Flask, look: Look) -> None:
    db_context = calls.create_db_context(session_maker=maker(db.engine))
    get_db = calls.create_db_dependency(session_maker=maker(db.engine, expire_on_commit=False))
    with db_context() as session:
        with calls.get_transaction(session=session):
            session.add(item := Item(name="a"))
            session.add_all(tags := [Tag(label="a"), Tag(label="b")])
        calls.m2m_add(session=session, instance=item, rel_attr=Item.tags)
        calls.m2m_add(session, item, Item.tags, *tags, ignore_conflicts=True)
        calls.m2m_clear(session=session, instance=item, rel_attr=Item.tags)
    for session in get_db():
        item = session.get(Item, 1)
        calls.m2m_set(session, item, Item.tags, session.get(Tag, 1))
        calls.m2m_remove(session=session, instance=item, rel_attr=Item.tags)
        calls.m2m_set(session=session, instance=item, rel_attr=Item.tags)
        with pytest.raises(RowChangeTimeout):
            calls.wait_for_row_change(session=session, model=Item, pk_value=1, interval=0.01, timeout=0.02)
        with pytest.raises(NotFoundError):
            calls.wait_for_row_change(session=session, model=Item, pk_value=9, columns=["note"])
        with calls.lock_tables(session=session, tables=[Item]), calls.advisory_lock(session=session, key=42):
            pass
    with db_context() as session:
        calls.cleanup_tables(session=session, base=db.Model)
    assert look("select count(*) from item") == [0]


def test_methods_of_db(app: Flask) -> None:
    db.session.add(item := Item(name="a"))
    db.session.commit()
    database: Any = db
    for method in (database.m2m_add, database.m2m_remove, database.m2m_set, database.m2m_clear):
        method(instance=item, rel_attr=Item.tags)
    with pytest.raises(RowChangeTimeout):
        database.wait_for_row_change(Item, pk_value=1, timeout=0.01)


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_databases(pg: postgres.Server, driver: str) -> None:
    name, url = f"fictive_{uuid.uuid4().hex[:8]}", pg.url(driver=driver)
    assert calls.create_database(db_name=name, server_url=url)
    assert calls.database_exists(db_name=name, server_url=url)
    assert calls.drop_database(db_name=name, server_url=url)
    with pytest.raises(TypeError, match="'name' and 'db_name'"):
        calls.create_database(name=name, db_name=name, server_url=url)


def test_a_keyword_that_is_neither_is_an_error() -> None:
    @also_named(other="own")
    def function(own: int) -> int:
        return own

    assert [function(1), function(own=1), function(other=1)] == [1, 1, 1]  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="third"):
        function(third=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="own"):
        function(1, other=1)  # type: ignore[call-arg]

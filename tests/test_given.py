"""What the functions on any session share: which session is meant, on which database, and doing several statements
as one (rules A5, A21, A23 for `atomic`)."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask

from fictive.errors import TransactionRequired, UnsupportedDialect
from fictive.session.given import dialect_of, require_postgresql, session_of
from fictive.session.session import atomic
from fictive.testing.wire import Wire
from tests.models import Item, db
from tests.wirelog import verbs


def test_session_of_a_registry_and_of_a_session(app: Flask) -> None:
    assert session_of(db.session) is db.session()
    assert session_of(db.session()) is db.session()


@pytest.mark.parametrize("wrong", [None, db, "session", sa_orm.sessionmaker()], ids=["none", "db", "text", "maker"])
def test_session_of_something_else(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"db\.session"):
        session_of(wrong)


def test_require_postgresql(app: Flask) -> None:
    for entity in (None, Item, Item.__table__, sa.inspect(Item)):
        assert require_postgresql(db.session(), "anything", entity) is dialect_of(db.session()) is db.engine.dialect


def test_a21_require_postgresql_elsewhere() -> None:
    session = sa_orm.Session(sa.create_engine("sqlite://"))
    with pytest.raises(UnsupportedDialect, match=r"lock_tables\(\) needs PostgreSQL.*sqlite"):
        require_postgresql(session, "lock_tables()")


def _two_writes(fail: bool = False) -> None:
    with atomic(db.session(), "two writes"):
        db.session.execute(sa.insert(Item).values(name="a"))
        db.session.execute(sa.insert(Item).values(name="a" if fail else "b"))


def test_a5_atomic_outside_is_one_transaction(app: Flask, wire: Wire, look: Any) -> None:
    with wire.record() as log:
        _two_writes()
    assert verbs(log) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
    assert not db.session.in_transaction()
    assert look("select count(*) from item") == [2]


def test_a5_atomic_that_fails_leaves_nothing(app: Flask, look: Any) -> None:
    with pytest.raises(sa.exc.IntegrityError):
        _two_writes(fail=True)
    assert look("select count(*) from item") == [0]
    assert db.session.scalar(sa.select(sa.func.count(Item.id))) == 0


def test_atomic_inside_joins(app: Flask, wire: Wire) -> None:
    with wire.record() as log, db.session.begin():
        _two_writes()
    assert verbs(log) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]


def test_atomic_flushes_nothing_that_is_pending(app: Flask, look: Any) -> None:
    db.session.add(Item(name="pending"))
    _two_writes()
    assert look("select count(*) from item") == [2]
    db.session.commit()
    assert look("select count(*) from item") == [3]


def test_a23_atomic_under_begin_stays_open(app: Flask, look: Any) -> None:
    db.session.writes_outside = "begin"
    _two_writes()
    assert db.session.in_transaction()
    db.session.rollback()
    assert look("select count(*) from item") == [0]


def test_a23_atomic_under_refuse(app: Flask, wire: Wire) -> None:
    db.session.writes_outside = "refuse"
    with wire.record() as log, pytest.raises(TransactionRequired, match="two writes outside"):
        _two_writes()
    assert not log.exchanges


def test_atomic_on_a_plain_session_is_its_owners(database_url: str) -> None:
    engine = sa.create_engine(database_url)
    with sa_orm.Session(engine) as session:
        with atomic(session, "two writes"):
            session.execute(sa.insert(Item).values(name="a"))
        assert session.in_transaction()
        session.rollback()
        assert session.scalar(sa.select(sa.func.count(Item.id))) == 0
    engine.dispose()

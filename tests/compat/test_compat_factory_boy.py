"""factory_boy's SQLAlchemy factories on `db.session`, as its documentation has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import factory
import pytest
import sqlalchemy as sa
from flask import Flask

from tests.compat.ways import Way

AppOf = Callable[..., Flask]
Look = Callable[..., list[Any]]


@pytest.fixture
def db(way: Way, app_of: AppOf) -> Iterator[Any]:
    db = way.db_class()
    app = app_of(db)

    class User(db.Model):  # type: ignore[name-defined, misc]
        id = db.Column(db.Integer(), primary_key=True)
        name = db.Column(db.Unicode(20), unique=True)
        team_id = db.Column(db.ForeignKey("team.id"))
        team = db.relationship("Team")

    class Team(db.Model):  # type: ignore[name-defined, misc]
        id = db.Column(db.Integer(), primary_key=True)
        name = db.Column(db.Unicode(20), unique=True)

    db.User, db.Team = User, Team
    with app.app_context():
        db.create_all()
        yield db


def user_factory(db: Any, **meta: Any) -> Any:
    class UserFactory(factory.alchemy.SQLAlchemyModelFactory):
        class Meta:
            model = db.User
            sqlalchemy_session = db.session

        name = factory.Sequence(lambda n: f"User {n}")

    for key, value in meta.items():
        setattr(UserFactory._meta, key, value)
    UserFactory.reset_sequence(1)
    return UserFactory


NAMES = 'select name from "user" order by id'


def test_persistence_none_is_pending_until_commit(way: Way, db: Any, look: Look) -> None:
    users = user_factory(db)
    assert db.session.query(db.User).all() == []
    user = users()
    assert user.name == "User 1"
    assert user in db.session
    # the documentation's next line, which needs autoflush: off outside a transaction (A7)
    assert db.session.query(db.User).all() == ([] if way.at_once else [user])
    assert look(NAMES) == []
    db.session.commit()
    assert look(NAMES) == ["User 1"]
    users.create_batch(3)
    db.session.rollback()
    assert look(NAMES) == ["User 1"]


def test_persistence_flush(way: Way, db: Any, look: Look) -> None:
    users = user_factory(db, sqlalchemy_session_persistence="flush")
    user = users()
    assert user.id == 1
    assert db.session.query(db.User).all() == [user]
    assert look(NAMES) == (["User 1"] if way.at_once else [])
    with way.says_already_committed("INSERT of 1 User"):
        db.session.rollback()
    assert look(NAMES) == (["User 1"] if way.at_once else [])


def test_persistence_commit(way: Way, db: Any, look: Look) -> None:
    users = user_factory(db, sqlalchemy_session_persistence="commit")
    users.create_batch(2)
    db.session.rollback()
    assert look(NAMES) == ["User 1", "User 2"]
    with pytest.raises(sa.exc.IntegrityError):
        users(name="User 1")
    db.session.rollback()
    users()
    assert look(NAMES) == ["User 1", "User 2", "User 4"]


def test_build_writes_nothing(way: Way, db: Any, look: Look) -> None:
    user = user_factory(db, sqlalchemy_session_persistence="commit").build()
    db.session.commit()
    assert user not in db.session
    assert look(NAMES) == []


def test_sub_factory(way: Way, db: Any, look: Look) -> None:
    class TeamFactory(factory.alchemy.SQLAlchemyModelFactory):
        class Meta:
            model = db.Team
            sqlalchemy_session = db.session

        name = "Blue"

    class UserFactory(factory.alchemy.SQLAlchemyModelFactory):
        class Meta:
            model = db.User
            sqlalchemy_session = db.session
            sqlalchemy_session_persistence = "commit"

        name = "adam"
        team = factory.SubFactory(TeamFactory)

    assert UserFactory().team.id == 1
    assert look('select u.name, t.name from "user" u join team t on t.id = team_id') == [("adam", "Blue")]


@pytest.mark.parametrize("persistence", [None, "flush", "commit"])
def test_get_or_create(way: Way, db: Any, look: Look, persistence: str | None) -> None:
    if persistence is None and way.at_once:
        pytest.skip("without autoflush the second look-up cannot see what the first only added")
    users = user_factory(db, sqlalchemy_get_or_create=("name",), sqlalchemy_session_persistence=persistence)
    first = users(name="adam")
    assert users(name="adam") is first
    assert users(name="eve") is not first
    db.session.commit()
    assert look(NAMES) == ["adam", "eve"]


def test_get_or_create_falls_back_on_another_key(way: Way, db: Any, look: Look) -> None:
    """`_get_or_create` catches IntegrityError, rolls back and looks again by the parameters it was given."""

    class UserFactory(factory.alchemy.SQLAlchemyModelFactory):
        class Meta:
            model = db.User
            sqlalchemy_session = db.session
            sqlalchemy_session_persistence = "commit"
            sqlalchemy_get_or_create = ("id", "name")

        id = factory.Sequence(lambda n: n + 10)
        name = factory.Sequence(lambda n: f"User {n}")

    adam = UserFactory(name="adam")
    assert UserFactory(name="adam") is adam
    assert look(NAMES) == ["adam"]


def test_session_factory(way: Way, db: Any, look: Look) -> None:
    class UserFactory(factory.alchemy.SQLAlchemyModelFactory):
        class Meta:
            model = db.User
            sqlalchemy_session_factory = lambda: db.session  # noqa: E731 - as factory_boy's documentation writes it
            sqlalchemy_session_persistence = "commit"

        name = "adam"

    UserFactory()
    assert look(NAMES) == ["adam"]

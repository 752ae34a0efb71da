"""Errors of the database as HTTP answers: 404 and 400 in every app, the rest where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flask
import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.orm import Mapped, mapped_column
from werkzeug.exceptions import HTTPException

from fictive.errors import ConfigurationError, LockTimeout, NotFoundError
from fictive.flask_sqlalchemy import FilterByOrCreateMixin
from fictive.models import Repository, SoftDeleteMixin
from fictive.sqlalchemy import OptInSession
from tests.conftest import MakeApp
from tests.models import DB, Child, Item, Tag, db

Look = Callable[..., list[Any]]
JSON = {"Accept": "application/json"}


def answer(app: Flask, view: Callable[[], Any], **kwargs: Any) -> Any:
    """What `view` is answered with."""
    if "view" not in app.view_functions:
        app.add_url_rule("/", "view", methods=["GET", "POST"])
    app.view_functions["view"] = view
    return app.test_client().open("/", **kwargs)


@pytest.fixture(params=["commit", "begin"])
def asked(request: pytest.FixtureRequest, make_app: MakeApp, look: Look) -> Flask:
    """An app that asked for all answers."""
    app = make_app(FICTIVE_WRITES_OUTSIDE=request.param)
    db.init_error_handlers(app, retry_after=7)
    look("insert into item (name) values ('secret')")
    return app


def add(*objects: Any) -> None:
    db.session.add_all(objects)
    db.session.commit()


def test_without_asking_what_is_not_there_is_404_and_a_bad_cursor_400(make_app: MakeApp) -> None:
    app = make_app()
    items = Repository[Item](db.session)
    assert answer(app, lambda: items.get_or_raise(9)).status_code == 404
    assert answer(app, lambda: db.wait_for_row_change(Item, 9)).status_code == 404
    assert answer(app, lambda: items.keyset_page(after="<secret>")).status_code == 400
    assert "secret" not in answer(app, lambda: items.keyset_page(after="<secret>")).text
    app = make_app()
    app.register_error_handler(404, lambda error: (f"own page: {error.code}", 404))
    found = answer(app, lambda: items.get_or_raise(9))
    assert (found.status_code, found.text) == (404, "own page: 404")
    assert answer(app, lambda: add(Item(name="a"), Item(name="a"))).status_code == 500


@pytest.mark.parametrize("asked_for", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["before init_app", "after init_app"])
def test_handlers_of_the_app_come_first(first: bool, asked_for: bool, make_app: MakeApp) -> None:
    items = Repository[Item](db.session)
    for error in (NotFoundError, sa.exc.NoResultFound, sa.exc.SQLAlchemyError):
        app = Flask(__name__) if first else make_app()
        app.register_error_handler(error, lambda error: (f"own: {type(error).__name__}", 418))
        if first:
            app.config["SQLALCHEMY_DATABASE_URI"] = make_app().config["SQLALCHEMY_DATABASE_URI"]
            db.init_app(app)
        if asked_for:
            db.init_error_handlers(app)
        found = answer(app, lambda: items.get_or_raise(9))
        assert (found.status_code, found.text) == (418, "own: NotFoundError")
        if error is sa.exc.SQLAlchemyError:
            assert answer(app, lambda: add(Item(name="a"), Item(name="a"))).status_code == 418
        with app.app_context():
            db.engine.dispose()


def test_a_catch_all_of_the_app(asked: Flask) -> None:
    code = lambda error: error.code if isinstance(error, HTTPException) else 500  # noqa: E731
    asked.register_error_handler(Exception, lambda error: (type(error).__name__, code(error)))
    found = answer(asked, lambda: add(Tag(label="a"), Tag(label="a")))
    assert (found.status_code, found.text) == (409, "Conflict")
    found = answer(asked, lambda: db.session.execute(sa.text("select 1 / 0")))
    assert (found.status_code, found.text) == (500, "DataError")
    found = answer(asked, lambda: 1 / 0)
    assert (found.status_code, found.text) == (500, "ZeroDivisionError")


def test_a_handler_of_a_blueprint_comes_first(asked: Flask) -> None:
    blueprint = flask.Blueprint("blue", __name__)
    blueprint.register_error_handler(sa.exc.IntegrityError, lambda error: ("blue", 418))
    blueprint.add_url_rule("/blue", view_func=lambda: add(Tag(label="a"), Tag(label="a")))
    asked.register_blueprint(blueprint)
    assert asked.test_client().get("/blue").text == "blue"


def test_a_unique_violation_is_409_with_the_columns(asked: Flask, look: Look) -> None:
    views: list[tuple[Callable[[], Any], list[str]]] = [
        (lambda: add(Item(name="secret")), ["name"]),
        (lambda: add(Item(id=1, name="other")), ["id"]),
        (lambda: db.session.execute(sa.text("insert into item (name) values ('secret')")), ["name"]),
        (lambda: db.session.execute(sa.insert(Item), [{"name": "x"}, {"name": "secret"}]), ["name"]),
    ]
    for view, columns in views:
        found = answer(asked, view, headers=JSON)
        assert found.status_code == 409
        assert found.json["columns"] == columns
        assert (found.json["code"], found.json["name"]) == (409, "Conflict")
        assert "secret" not in found.text
        found = answer(asked, view)
        assert found.mimetype == "text/html"
        assert f"the same {columns[0]}" in found.text
        assert "secret" not in found.text
    assert answer(asked, lambda: add(Child(item_id=77)), headers=JSON).status_code == 500  # another violation
    assert answer(asked, lambda: add(Child(item_id=1, size=-1)), headers=JSON).status_code == 500
    assert look("select count(*) from item") == [1]


def test_a_deferred_constraint_that_fails_at_commit(asked: Flask) -> None:
    @db.transactional
    def view() -> str:
        db.session.execute(sa.text("insert into booking (seat) values (1), (1)"))
        return "fine"

    found = answer(asked, view, headers=JSON)
    assert (found.status_code, found.json["columns"]) == (409, ["seat"])


def test_columns_of_indexes_of_schemas_and_of_long_names(make_app: MakeApp, look: Look) -> None:
    own = DB(metadata=sa.MetaData(naming_convention={"uq": "uq_%(table_name)s_%(column_0_N_name)s"}))
    long = "a_column_with_a_name_that_is_rather_long"
    name = lambda: mapped_column(sa.Text)  # noqa: E731

    class Named(own.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "named"
        id: Mapped[int] = mapped_column(primary_key=True)
        a, b, c = name(), name(), name()
        first: Mapped[str | None] = mapped_column(long)
        second: Mapped[str | None] = mapped_column(long + "_2")
        __table_args__ = (
            sa.UniqueConstraint("a", "b", name='We "ird%'),
            sa.Index("lower_c", sa.func.lower(sa.literal_column("c")), c, unique=True),
            sa.UniqueConstraint(long, long + "_2"),
            {"schema": "other"},
        )

    class Other(own.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "named"
        id: Mapped[int] = mapped_column(primary_key=True)

    app = make_app(own)
    own.init_error_handlers(app)
    look("create schema other")
    with app.app_context():
        own.create_all()

    def twice(**values: Any) -> Any:
        def view() -> None:
            own.session.execute(sa.insert(Named), [values, values])

        return answer(app, view, headers=JSON).json["columns"]

    assert twice(a="1", b="2") == ["a", "b"]
    assert twice(c="1") == ["c"]
    assert twice(first="1", second="2") == [long, long + "_2"]
    look("alter table other.named add constraint unknown unique (a)")
    assert twice(a="x") == []


def test_races_and_locks_are_503(asked: Flask, look: Look, caplog: pytest.LogCaptureFixture) -> None:
    with asked.app_context(), OptInSession(db.engine) as other, other.begin():
        other.execute(sa.text("lock table tag; select * from item for update"))

        def view() -> None:
            with db.lock_tables([Tag], nowait=True):
                pass

        def nowait() -> None:
            with db.session.begin():
                db.session.scalars(sa.select(Item).with_for_update(nowait=True)).all()

        for each in (view, nowait):
            caplog.clear()
            found = answer(asked, each, headers=JSON)
            assert (found.status_code, found.headers["Retry-After"]) == (503, "7")
            assert "secret" not in found.text
            assert "lock table" not in found.text
            assert [record.name for record in caplog.records] == ["fictive.http"]

    @db.transactional(isolation_level="SERIALIZABLE")
    def race() -> str:
        item = db.session.get(Item, 1)
        look("update item set note = 'theirs'")
        item.note = "ours"  # type: ignore[union-attr]
        db.session.flush()
        return "fine"

    found = answer(asked, race)
    assert (found.status_code, found.headers["Retry-After"]) == (503, "7")
    assert found.mimetype == "text/html"


def test_no_connection_in_the_pool_is_503(make_app: MakeApp) -> None:
    app = make_app(SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05})
    db.init_error_handlers(app)
    with app.app_context(), db.engine.connect():
        found = answer(app, lambda: str(db.session.scalar(sa.select(1))))
    assert (found.status_code, found.headers["Retry-After"]) == (503, "1")


def test_a_stale_object_is_409(asked: Flask, look: Look) -> None:
    def view() -> None:
        item = db.session.get(Item, 1)
        look("delete from item")
        item.note = "changed"  # type: ignore[union-attr]
        db.session.commit()

    assert answer(asked, view).status_code == 409


def test_a_key_of_a_deleted_row_is_409(make_app: MakeApp) -> None:
    class WithFindOrCreate(FilterByOrCreateMixin, DB):
        pass

    own = WithFindOrCreate()

    class Person(SoftDeleteMixin, own.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(unique=True)

    app = make_app(own)
    own.init_error_handlers(app)
    with app.app_context():
        own.create_all()
        own.session.add(person := Person(name="secret"))
        own.session.commit()
        person.soft_delete()
        own.session.commit()
    found = answer(app, lambda: Person.find_or_create(name="secret"), headers=JSON)
    assert (found.status_code, "secret" in found.text) == (409, False)


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_json_or_html(asked: Flask) -> None:
    def view() -> None:
        raise LockTimeout("pid 7 (secret)")

    kinds: Iterator[tuple[dict[str, Any], str]] = iter(
        [
            ({}, "text/html"),
            ({"headers": {"Accept": "*/*"}}, "text/html"),
            ({"headers": {"Accept": "application/json"}}, "application/json"),
            ({"headers": {"Accept": "text/html,application/json;q=0.9"}}, "text/html"),
            ({"headers": {"Accept": "application/json, text/plain, */*"}}, "application/json"),
            ({"json": {}, "method": "POST"}, "application/json"),
        ]
    )
    for kwargs, mimetype in kinds:
        found = answer(asked, view, **kwargs)
        assert (found.status_code, found.mimetype) == (503, mimetype), kwargs
        assert "secret" not in found.text
        assert found.headers["Retry-After"] == "7"


def test_sqlite(tmp_path: Path) -> None:
    own = DB()

    class Thing(own.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(unique=True)

    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path}/a.db"
    own.init_app(app)
    own.init_error_handlers(app)
    with app.app_context():
        own.create_all()

    def view() -> None:
        own.session.add_all([Thing(name="secret"), Thing(name="secret")])
        own.session.commit()

    found = answer(app, view, headers=JSON)
    assert (found.status_code, "secret" in found.text) == (409, False)
    with app.app_context():
        own.engine.dispose()


def test_bad_input() -> None:
    for wrong in (-1, True, "1", None, 1.5):
        with pytest.raises(ConfigurationError, match="retry_after"):
            db.init_error_handlers(Flask(__name__), retry_after=wrong)  # type: ignore[arg-type]

"""Flask-SQLAlchemy's quick start and documented features, as its documentation writes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask, redirect, render_template_string, request, url_for
from flask_sqlalchemy.model import Model
from flask_sqlalchemy.query import Query
from flask_sqlalchemy.record_queries import get_recorded_queries
from flask_sqlalchemy.session import Session
from flask_sqlalchemy.track_modifications import before_models_committed, models_committed
from sqlalchemy.orm import DeclarativeBase, DeclarativeBaseNoMeta, Mapped, mapped_column
from werkzeug.exceptions import NotFound

from fictive.flask_sqlalchemy import OptInTransactionMixin
from tests.compat.ways import Way

AppOf = Callable[..., Flask]
Look = Callable[..., list[Any]]


# -- the quick start ----


def quick_start(way: Way, app_of: AppOf) -> tuple[Any, type[Any], Flask]:
    """https://flask-sqlalchemy.readthedocs.io/en/stable/quickstart/, with its templates in one line each."""

    class Base(DeclarativeBase):
        pass

    db = way.db_class(model_class=Base)
    app = app_of(db)

    class User(db.Model):
        id: Mapped[int] = mapped_column(primary_key=True)
        username: Mapped[str] = mapped_column(unique=True)
        email: Mapped[str]

    with app.app_context():
        db.create_all()

    @app.route("/users")
    def user_list() -> Any:
        users = db.session.execute(db.select(User).order_by(User.username)).scalars()
        return render_template_string("{% for user in users %}{{ user.username }} {% endfor %}", users=users)

    @app.route("/users/create", methods=["GET", "POST"])
    def user_create() -> Any:
        if request.method == "POST":
            user = User(
                username=request.form["username"],
                email=request.form["email"],
            )
            db.session.add(user)
            db.session.commit()
            return redirect(url_for("user_detail", id=user.id))

        return render_template_string("create")

    @app.route("/user/<int:id>")
    def user_detail(id: int) -> Any:
        user = db.get_or_404(User, id)
        return render_template_string("{{ user.username }} <{{ user.email }}>", user=user)

    @app.route("/user/<int:id>/delete", methods=["GET", "POST"])
    def user_delete(id: int) -> Any:
        user = db.get_or_404(User, id)

        if request.method == "POST":
            db.session.delete(user)
            db.session.commit()
            return redirect(url_for("user_list"))

        return render_template_string("delete {{ user.username }}?", user=user)

    return db, User, app


def test_quick_start(way: Way, app_of: AppOf, look: Look) -> None:
    _, _, app = quick_start(way, app_of)
    client = app.test_client()
    for name in ("zoe", "adam"):
        response = client.post("/users/create", data={"username": name, "email": f"{name}@example.com"})
        assert response.status_code == 302
    assert response.location == "/user/2"
    assert client.get("/users/create").text == "create"
    assert client.get("/users").text == "adam zoe "
    assert client.get("/user/2").text == "adam <adam@example.com>"
    assert client.get("/user/3").status_code == 404
    assert client.get("/user/1/delete").text == "delete zoe?"
    assert client.post("/user/1/delete").location == "/users"
    assert client.post("/user/1/delete").status_code == 404
    assert look('select id, username, email from "user"') == [(2, "adam", "adam@example.com")]


def test_quick_start_duplicate_leaves_the_app_working(way: Way, app_of: AppOf, look: Look) -> None:
    _, _, app = quick_start(way, app_of)
    client = app.test_client()
    form = {"username": "adam", "email": "adam@example.com"}
    client.post("/users/create", data=form)
    with pytest.raises(sa.exc.IntegrityError):
        client.post("/users/create", data=form)
    assert client.post("/users/create", data=form | {"username": "eve"}).status_code == 302
    assert look('select username from "user" order by id') == ["adam", "eve"]


# -- queries for views ----


@pytest.fixture
def users(way: Way, app_of: AppOf) -> Iterator[tuple[Any, type[Any]]]:
    """The quick start's `db` and `User`, 45 of them, in a context."""
    db, User, app = quick_start(way, app_of)
    with app.app_context():
        db.session.add_all(
            [User(username=f"u{n:02}", email="even@x" if n % 2 == 0 else "odd@x") for n in range(1, 46)]
        )
        db.session.commit()
        yield db, User


def test_or_404(users: tuple[Any, type[Any]]) -> None:
    db, User = users
    everyone, adam = db.select(User), db.select(User).filter_by(username="u07")
    assert db.get_or_404(User, 7).username == "u07"
    assert db.first_or_404(everyone.order_by(User.id)).id == 1
    assert db.one_or_404(adam).id == 7
    for call in (
        lambda: db.get_or_404(User, 99, description="no 99"),
        lambda: db.first_or_404(everyone.filter_by(username="x")),
        lambda: db.one_or_404(everyone.filter_by(username="x"), description="no x"),
        lambda: db.one_or_404(everyone),
    ):
        with pytest.raises(NotFound):
            call()


def test_paginate(users: tuple[Any, type[Any]]) -> None:
    db, User = users
    page = db.paginate(db.select(User).order_by(User.username), page=2, per_page=20)
    assert [user.id for user in page] == list(range(21, 41))
    assert (page.total, page.pages, page.has_next, page.next_num, page.prev_num) == (45, 3, True, 3, 1)
    assert [user.id for user in page.next()] == [41, 42, 43, 44, 45]
    assert page.prev().items[0].id == 1
    assert list(page.iter_pages()) == [1, 2, 3]
    assert db.paginate(db.select(User), count=False).total is None
    with pytest.raises(NotFound):
        db.paginate(db.select(User), page=9)
    assert db.paginate(db.select(User), page=9, error_out=False).items == []


def test_paginate_in_a_view(users: tuple[Any, type[Any]], way: Way) -> None:
    db, User = users
    from flask import current_app

    with current_app.test_request_context("/?page=3&per_page=21"):
        page = db.paginate(db.select(User).order_by(User.id), max_per_page=50)
        assert [user.id for user in page] == [43, 44, 45]


# Flask-SQLAlchemy's own get_or_404() of the legacy query calls Query.get()
@pytest.mark.filterwarnings("ignore:The Query.get:sqlalchemy.exc.LegacyAPIWarning")
def test_model_query(users: tuple[Any, type[Any]], way: Way, look: Look) -> None:
    db, User = users
    assert User.query.filter_by(email="even@x").count() == 22
    assert User.query.filter_by(username="u05").first().id == 5
    assert User.query.filter_by(username="u05").first_or_404().id == 5
    assert User.query.filter_by(username="u05").one_or_404().id == 5
    assert User.query.get_or_404(5).username == "u05"
    assert [user.id for user in User.query.order_by(User.id.desc()).limit(2)] == [45, 44]
    page = User.query.order_by(User.id).paginate(page=5, per_page=10)
    assert ([user.id for user in page], page.total) == ([41, 42, 43, 44, 45], 45)
    assert page.prev().items[0].id == 31
    with pytest.raises(NotFound):
        User.query.get_or_404(99)

    assert User.query.filter_by(email="even@x").update({"email": "changed@x"}) == 22
    assert User.query.filter(User.id > 40).delete() == 5
    db.session.commit()
    assert look("select count(*), count(*) filter (where email = 'changed@x') from \"user\"") == [(40, 20)]

    User.query.delete()
    with way.says_already_committed('DELETE FROM "user"|DELETE user'):
        db.session.rollback()
    assert look('select count(*) from "user"') == [0 if way.at_once else 40]


# -- binds ----


@pytest.fixture
def binds(way: Way, app_of: AppOf, other_database_url: str) -> Iterator[Any]:
    """https://flask-sqlalchemy.readthedocs.io/en/stable/binds/, both forms of configuration."""
    db = way.db_class()
    app_of(
        db, SQLALCHEMY_BINDS={"auth": {"url": other_database_url, "pool_recycle": 3600}, "meta": other_database_url}
    )

    class Post(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        title = db.Column(db.String, unique=True)

    class User(db.Model):
        __bind_key__ = "auth"
        id = db.Column(db.Integer, primary_key=True)
        name = db.Column(db.String, unique=True)

    db.Table("tag", db.Column("id", db.Integer, primary_key=True), bind_key="meta")
    db.Post, db.User = Post, User
    return db


def tables(db: Any, key: str | None) -> list[str]:
    return sorted(sa.inspect(db.engines[key]).get_table_names())


def test_a19_create_and_drop_by_bind_key(binds: Any, way: Way) -> None:
    db = binds
    with app_context(db):
        db.create_all(bind_key="auth")
        assert (tables(db, None), tables(db, "auth")) == ([], ["user"])
        db.create_all(bind_key=[None, "meta"])
        assert (tables(db, None), tables(db, "auth")) == (["post"], ["tag", "user"])
        db.drop_all(bind_key=None)
        assert (tables(db, None), tables(db, "auth")) == ([], ["tag", "user"])
        db.create_all()
        db.session.execute(sa.select(db.Post)).all()
        db.session.execute(sa.select(db.User)).all()
        if not way.fictive:
            db.session.rollback()  # drop_all() would wait for ever for the session's own transaction
        db.drop_all()
        assert (tables(db, None), tables(db, "auth")) == ([], [])


def app_context(db: Any) -> Any:
    (app,) = db._app_engines
    return app.app_context()


def test_a19_models_on_several_databases(binds: Any, way: Way, look: Look) -> None:
    db = binds
    with app_context(db):
        db.create_all()
        db.session.add_all([db.Post(title="one"), db.User(name="adam"), db.Post(title="two")])
        db.session.commit()
        assert db.session.scalars(sa.select(db.Post.title).order_by(db.Post.id)).all() == ["one", "two"]
        assert db.session.scalars(sa.select(db.User.name)).all() == ["adam"]
        assert db.session.scalar(sa.select(sa.func.count()).select_from(db.User)) == 1
        db.session.execute(sa.insert(db.metadatas["meta"].tables["tag"]).values(id=3))
        db.session.commit()
        assert look("select title from post order by id") == ["one", "two"]
        with db.engines["meta"].connect() as connection:
            assert connection.execute(sa.text("select id from tag")).all() == [(3,)]


def test_a19_a_flush_on_two_databases_fails_as_one(binds: Any, way: Way, look: Look) -> None:
    db = binds
    with app_context(db):
        db.create_all()
        db.session.add(db.User(name="adam"))
        db.session.commit()
        db.session.add_all([db.Post(title="new"), db.User(name="adam")])
        with pytest.raises(sa.exc.IntegrityError):
            db.session.commit()
        db.session.rollback()
        assert look("select count(*) from post") == [0]
        assert db.User.query.count() == 1


def test_a19_a_rollback_covers_both_databases(binds: Any, way: Way, look: Look) -> None:
    db = binds
    with app_context(db):
        db.create_all()
        db.session.add_all([db.Post(title="new"), db.User(name="adam")])
        db.session.flush()
        db.User.query.update({"name": "eve"})
        with way.says_already_committed():
            db.session.rollback()
        left = 1 if way.at_once else 0
        assert look("select count(*) from post") == [left]
        assert db.User.query.count() == left


# -- track modifications, recorded queries ----


def test_track_modifications(way: Way, app_of: AppOf, look: Look) -> None:
    db = way.db_class()
    app = app_of(db, SQLALCHEMY_TRACK_MODIFICATIONS=True)

    class Todo(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        title = db.Column(db.String, unique=True)

    seen: list[Any] = []

    def before(sender: Flask, changes: Any) -> None:
        seen.append(("before", [(type(obj), what) for obj, what in changes], look("select count(*) from todo")))

    def after(sender: Flask, changes: Any) -> None:
        seen.append(("after", [(type(obj), what) for obj, what in changes], look("select count(*) from todo")))

    with app.app_context(), models_committed.connected_to(after), before_models_committed.connected_to(before):
        db.create_all()
        todo = Todo(title="a")
        db.session.add(todo)
        db.session.commit()
        assert seen == [("before", [(Todo, "insert")], [0]), ("after", [(Todo, "insert")], [1])]
        seen.clear()

        todo.title = "b"
        db.session.commit()
        db.session.delete(todo)
        db.session.commit()
        assert [entry[1][0][1] for entry in seen] == ["update", "update", "delete", "delete"]
        seen.clear()

        db.session.add(Todo(title="rolled back"))
        db.session.rollback()
        db.session.commit()
        db.session.execute(sa.select(Todo)).all()
        db.session.commit()
        assert seen == []


def test_track_modifications_says_committed_once_and_only_then(way: Way, app_of: AppOf, look: Look) -> None:
    db = way.db_class()
    app = app_of(db, SQLALCHEMY_TRACK_MODIFICATIONS=True)

    class Todo(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        title = db.Column(db.String, unique=True)

    seen: list[Any] = []

    def after(sender: Flask, changes: Any) -> None:
        seen.append(sorted((obj.title, what) for obj, what in changes))

    with app.app_context(), models_committed.connected_to(after):
        db.create_all()
        db.session.add(Todo(title="a"))
        db.session.flush()
        assert seen == ([[("a", "insert")]] if way.at_once else [])
        db.session.add(Todo(title="b"))
        db.session.commit()
        assert seen == (
            [[("a", "insert")], [("b", "insert")]] if way.at_once else [[("a", "insert"), ("b", "insert")]]
        )
        seen.clear()
        db.session.add(Todo(title="a"))
        with pytest.raises(sa.exc.IntegrityError):
            db.session.commit()
        db.session.rollback()
        db.session.commit()
        assert seen == []


def test_record_queries(way: Way, app_of: AppOf) -> None:
    db = way.db_class()
    app = app_of(db, SQLALCHEMY_RECORD_QUERIES=True)

    class Todo(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        title = db.Column(db.String)

    with app.app_context():
        db.create_all()
    with app.app_context():
        db.session.add(Todo(title="a"))
        db.session.commit()
        db.session.execute(sa.select(Todo).filter_by(title="a")).scalars().all()
        statements = [" ".join(info.statement.split()[:2]) for info in get_recorded_queries()]
        assert statements == ["INSERT INTO", "SELECT todo.id,"]
        assert get_recorded_queries()[0].duration > 0
        assert list(get_recorded_queries()[1].parameters[0].values()) == ["a"]


def test_a20_echo(way: Way, app_of: AppOf, caplog: pytest.LogCaptureFixture) -> None:
    db = way.db_class()
    app = app_of(db, SQLALCHEMY_ECHO=True)

    class Todo(db.Model):
        id = db.Column(db.Integer, primary_key=True)

    with app.app_context():
        db.create_all()
        with caplog.at_level(logging.INFO, "sqlalchemy.engine.Engine"):
            caplog.clear()
            db.session.add(Todo())
            db.session.commit()
    verbs = [message.split(" ")[0] for message in caplog.messages if not message.startswith("[")]
    assert verbs == ["BEGIN", "INSERT", "COMMIT"]
    assert not [message for message in caplog.messages if "autocommit" in message]


# -- several apps, tables ----


def test_a22_several_apps_on_one_db(way: Way, app_of: AppOf, look: Look, other_database_url: str) -> None:
    db = way.db_class()
    first, second = app_of(db), app_of(db, SQLALCHEMY_DATABASE_URI=other_database_url)

    class Todo(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        title = db.Column(db.String)

    for app, title in ((first, "first"), (second, "second")):
        with app.app_context():
            db.create_all()
            db.session.add(Todo(title=title))
            db.session.commit()
    with first.app_context():
        todo = db.session.scalars(sa.select(Todo)).one()
        todo.title = "changed in first"
        with second.app_context():
            assert db.session.scalars(sa.select(Todo.title)).all() == ["second"]
            db.session.add(Todo(title="more"))
            db.session.commit()
        db.session.commit()
    assert look("select title from todo") == ["changed in first"]


def test_a22_settings_of_one_app_stay_with_it(app_of: AppOf, way: Way, database_url: str) -> None:
    if not way.fictive:
        pytest.skip("about fictive's settings")
    db = way.db_class()
    first = app_of(db)
    second = app_of(db, FICTIVE_WRITES_OUTSIDE="refuse")
    with first.app_context():
        mode = db.session.writes_outside
        with second.app_context():
            assert db.session.writes_outside == "refuse"
        assert db.session.writes_outside == mode == way.name


def test_create_drop_reflect(way: Way, app_of: AppOf, look: Look) -> None:
    db = way.db_class()
    app = app_of(db)
    db.Table("pair", db.Column("id", db.Integer, primary_key=True), db.Column("title", db.String))
    with app.app_context():
        db.create_all()
        db.create_all()
        assert look("select count(*) from pg_tables where tablename = 'pair'") == [1]
        db.engine.dispose()
    del app.extensions["sqlalchemy"]

    db = way.db_class()
    db.init_app(app)
    with app.app_context():
        db.reflect()

        class Pair(db.Model):
            __table__ = db.metadata.tables["pair"]

        db.session.add(Pair(id=1, title="reflected"))
        db.session.commit()
        assert look("select * from pair") == [(1, "reflected")]
        db.session.execute(sa.select(Pair)).all()
        if not way.fictive:
            db.session.rollback()  # drop_all() would wait for ever for the session's own transaction
        db.drop_all()
        assert look("select count(*) from pg_tables where tablename = 'pair'") == [0]


def test_a16_create_all_is_atomic(way: Way, app_of: AppOf, look: Look) -> None:
    db = way.db_class()
    app = app_of(db)
    db.Table("first", db.Column("id", db.Integer, primary_key=True))
    db.Table("second", db.Column("id", db.Integer, primary_key=True), db.CheckConstraint("no_such_column > 0"))
    with app.app_context():
        with pytest.raises(sa.exc.ProgrammingError):
            db.create_all()
        assert look("select tablename from pg_tables where schemaname = 'public'") == []


def test_a16_core_on_the_engine(way: Way, app_of: AppOf, look: Look) -> None:
    db = way.db_class()
    app = app_of(db)
    look("create table t (n int primary key)")
    with app.app_context():
        assert db.session.get_bind() is db.engine
        db.session.execute(sa.text("select 1"))
        with pytest.raises(sa.exc.IntegrityError), db.engine.begin() as connection:
            connection.execute(sa.text("insert into t values (1)"))
            connection.execute(sa.text("insert into t values (1)"))
        with db.engine.connect() as connection:
            connection.execute(sa.text("insert into t values (2)"))
        with db.engine.begin() as connection:
            connection.execute(sa.text("insert into t values (3)"))
        assert look("select n from t") == [3]


# -- model classes ----


class IdModel(Model):
    """The documented custom base of the legacy kind."""

    id = sa.Column(sa.Integer, primary_key=True)


@pytest.mark.parametrize("kind", ["Model", "IdModel", "DeclarativeBase", "NoMeta", "Dataclass", "DataclassNoMeta"])
def test_a22_model_classes(way: Way, app_of: AppOf, look: Look, kind: str) -> None:
    if kind.startswith("Dataclass") and sa.__version__ >= "2.1" and not way.fictive:
        pytest.skip("Flask-SQLAlchemy 3.1 cannot make a dataclass base on SQLAlchemy 2.1")

    class Base(DeclarativeBase):
        pass

    class NoMeta(DeclarativeBaseNoMeta):
        pass

    class Dataclass(sa_orm.MappedAsDataclass, DeclarativeBase):
        pass

    class DataclassNoMeta(sa_orm.MappedAsDataclass, DeclarativeBaseNoMeta):
        pass

    model_class: Any = {
        "Model": Model,
        "IdModel": IdModel,
        "DeclarativeBase": Base,
        "NoMeta": NoMeta,
        "Dataclass": Dataclass,
        "DataclassNoMeta": DataclassNoMeta,
    }[kind]
    db = way.db_class(model_class=model_class)
    app = app_of(db)

    class Todo(db.Model):
        if kind.startswith("Dataclass"):
            id: Mapped[int] = mapped_column(primary_key=True, init=False)
            title: Mapped[str] = mapped_column(default=None)
        elif kind == "Model":
            id = db.Column(db.Integer, primary_key=True)
            title = db.Column(db.String)
        elif kind == "IdModel":
            title = db.Column(db.String)
        else:
            id: Mapped[int] = mapped_column(primary_key=True)
            title: Mapped[str]

    with app.app_context():
        db.create_all()
        db.session.add(Todo(title="a"))
        db.session.commit()
        todo = db.session.scalars(sa.select(Todo)).one()
        todo.title = "b"
        db.session.commit()
        assert Todo.query.filter_by(title="b").one() is todo
        assert repr(todo) == ("<Todo 1>" if not kind.startswith("Dataclass") else repr(todo))
        assert look("select id, title from todo") == [(1, "b")]


# -- session options ----


class CountingSession(Session):
    """A session class of the user's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.executed = 0

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        self.executed += 1
        return super().execute(*args, **kwargs)


class GetOrQuery(Query):
    """https://flask-sqlalchemy.readthedocs.io/en/stable/customizing/#query-class"""

    def get_or(self, ident: Any, default: Any = None) -> Any:
        out = self.session.get(self.column_descriptions[0]["type"], ident)

        if out is None:
            return default

        return out


def todo_model(db: Any) -> type[Any]:
    class Todo(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        title = db.Column(db.String)

    return Todo


def test_a22_session_class(way: Way, app_of: AppOf, look: Look) -> None:
    db = way.db_class(session_options={"class_": CountingSession})
    app, Todo = app_of(db), todo_model(db)
    with app.app_context():
        db.create_all()
        assert isinstance(db.session(), CountingSession)
        db.session.add(Todo(title="a"))
        db.session.commit()
        assert db.session.execute(sa.select(Todo.title)).scalars().all() == ["a"]
        assert db.session().executed == 1
    assert look("select title from todo") == ["a"]


def test_a22_scopefunc(way: Way, app_of: AppOf, look: Look) -> None:
    scope = 1
    db = way.db_class(session_options={"scopefunc": lambda: scope})
    app, Todo = app_of(db), todo_model(db)
    with app.app_context():
        db.create_all()
        first = db.session()
        with app.app_context():
            assert db.session() is first
            scope = 2
            assert db.session() is not first
            db.session.add(Todo(title="second"))
            db.session.commit()
            db.session.remove()
            scope = 1
        db.session.remove()
    assert look("select title from todo") == ["second"]


@pytest.mark.parametrize("option", ["query_cls", "query_class"])
def test_a22_query_class(way: Way, app_of: AppOf, option: str) -> None:
    if option == "query_cls":
        db = way.db_class(session_options={"query_cls": GetOrQuery})
    else:
        db = way.db_class(query_class=GetOrQuery)
    app, Todo = app_of(db), todo_model(db)
    with app.app_context():
        db.create_all()
        db.session.add(Todo(title="a"))
        db.session.commit()
        assert db.session.query(Todo).get_or(1).title == "a"
        assert db.session.query(Todo).get_or(2, "none") == "none"
        if option == "query_class":
            assert Todo.query.get_or(1).title == "a"


@pytest.mark.parametrize(("option", "value"), [("autoflush", True), ("autoflush", False), ("expire_on_commit", False)])
def test_a7_session_options_are_kept(way: Way, app_of: AppOf, option: str, value: bool) -> None:
    db = way.db_class(session_options={option: value})
    app = app_of(db)
    with app.app_context():
        assert getattr(db.session(), option) is value


def test_a22_the_options_dict_is_not_kept_or_shared(way: Way, app_of: AppOf) -> None:
    options = {"expire_on_commit": False}
    first, second = way.db_class(session_options=dict(options)), way.db_class(session_options=dict(options))
    assert first.session is not second.session
    assert first.session.session_factory.class_ is not second.session.session_factory.class_


@pytest.mark.parametrize("add_models_to_shell", [True, False])
def test_add_models_to_shell(way: Way, app_of: AppOf, add_models_to_shell: bool) -> None:
    db = way.db_class(add_models_to_shell=add_models_to_shell)
    app, Todo = app_of(db), todo_model(db)
    with app.app_context():
        context = app.make_shell_context()
    assert (context.get("db"), context.get("Todo")) == ((db, Todo) if add_models_to_shell else (None, None))


def test_the_class_is_the_one_under_test(way: Way) -> None:
    assert issubclass(way.db_class, OptInTransactionMixin) == way.fictive


# -- a well-known test fixture: everything in one transaction that is rolled back ----


@pytest.mark.parametrize("savepoints", [False, True])
def test_engines_replaced_by_connections_in_a_transaction(
    way: Way, app_of: AppOf, look: Look, savepoints: bool
) -> None:
    """What Flask-SQLAlchemy users do in tests: each engine becomes a connection in a transaction."""
    options = {"join_transaction_mode": "create_savepoint"} if savepoints else {}
    db = way.db_class(session_options=options)
    app, Todo = app_of(db), todo_model(db)
    with app.app_context():
        db.create_all()
    engines = db._app_engines[app]
    engine = engines[None]
    connection = engine.connect()
    transaction = connection.begin()
    engines[None] = connection
    try:
        for expected in (1, 2):
            with app.app_context():
                db.session.add(Todo(title="seen by later requests of the test"))
                db.session.commit()
                assert Todo.query.count() == expected
                assert look("select count(*) from todo") == [0]
        with app.app_context():
            db.session.execute(sa.insert(Todo).values(title="in bulk"))
            db.session.commit()
            assert db.session.scalar(sa.select(sa.func.count()).select_from(Todo)) == 3
            with pytest.raises(ZeroDivisionError), db.session.begin_nested():
                db.session.add(Todo(title="undone"))
                db.session.flush()
                raise ZeroDivisionError
            assert Todo.query.count() == 3
    finally:
        engines[None] = engine
        if transaction.is_active:
            transaction.rollback()
        connection.close()
    assert look("select count(*) from todo") == [0]
    with app.app_context():
        assert Todo.query.count() == 0

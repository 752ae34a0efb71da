"""What cannot work is refused where the class is made or in `init_app`, with the thing and the remedy named."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.orm import Mapped, mapped_column

from fictive.errors import ConfigurationError
from fictive.flask_sqlalchemy import OptInTransactionMixin

Look = Callable[..., list[Any]]


class DB(OptInTransactionMixin, SQLAlchemy):
    pass


def app_on(url: str = "sqlite://", **config: Any) -> Flask:
    app = Flask("bad_input")
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config.update(config)
    return app


def disposing(db: Any, app: Flask) -> None:
    with app.app_context():
        for engine in db.engines.values():
            engine.dispose()


def works(db: Any, app: Flask) -> None:
    """Statements, a transaction and the end of a context, and nothing is left over."""
    with app.app_context():
        assert db.session.scalar(sa.text("select 1")) == 1
        with db.session.begin():
            assert db.session.scalar(sa.text("select 2")) == 2
            assert db.session.in_transaction()
        assert not db.session.in_transaction()
    disposing(db, app)


# -- where the class is made ----


def test_the_mixin_after_sqlalchemy() -> None:
    with pytest.raises(ConfigurationError) as caught:

        class Wrong(SQLAlchemy, OptInTransactionMixin):
            pass

    assert "OptInTransactionMixin comes after SQLAlchemy" in str(caught.value)
    assert "class Wrong(OptInTransactionMixin, SQLAlchemy)" in str(caught.value)


def test_the_mixin_after_a_subclass_of_sqlalchemy() -> None:
    class Own(SQLAlchemy):
        pass

    with pytest.raises(ConfigurationError, match=r"class Wrong\(OptInTransactionMixin, "):

        class Wrong(Own, OptInTransactionMixin):
            pass

    class Right(OptInTransactionMixin, Own):
        pass

    class Further(Right):
        pass

    db, app = Further(), app_on()
    db.init_app(app)
    works(db, app)


def test_the_mixin_without_sqlalchemy() -> None:
    """A class that only extends the mixin is all right; it may meet SQLAlchemy further down."""

    class MoreMixin(OptInTransactionMixin):
        pass

    class Right(MoreMixin, SQLAlchemy):
        pass

    db, app = Right(), app_on()
    db.init_app(app)
    works(db, app)


@pytest.mark.parametrize(
    ("package", "found", "needed"),
    [
        ("sqlalchemy", "1.4.54", "2.0.43"),
        ("sqlalchemy", "2.0.42", "2.0.43"),
        ("sqlalchemy", "2.0.9", "2.0.43"),
        ("flask-sqlalchemy", "2.5.1", "3.1"),
        ("flask-sqlalchemy", "3.0.5", "3.1"),
    ],
)
def test_a_package_that_is_too_old(monkeypatch: pytest.MonkeyPatch, package: str, found: str, needed: str) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found if name.lower() == package else real(name))
    with pytest.raises(ConfigurationError) as caught:

        class Wrong(OptInTransactionMixin, SQLAlchemy):
            pass

    for part in (package, found, needed, "pip install"):
        assert part in str(caught.value)


@pytest.mark.parametrize("found", ["2.0.43", "2.0.44", "2.1.0b1", "2.1.9", "2.1.10.post1"])
def test_versions_that_are_new_enough(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found if name == "sqlalchemy" else real(name))

    class Right(OptInTransactionMixin, SQLAlchemy):
        pass


# -- session_options ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"autobegin": False}, ["autobegin", "Leave the option out"]),
        ({"class_": dict}, ["class_", "dict", "subclass of flask_sqlalchemy.session.Session"]),
        ({"class_": "Session"}, ["class_", "'Session'", "subclass of flask_sqlalchemy.session.Session"]),
        ({"class_": None}, ["class_", "None", "subclass of flask_sqlalchemy.session.Session"]),
        (
            {"execution_options": {"isolation_level": "AUTOCOMMIT"}},
            ["execution_options", "AUTOCOMMIT", "Leave it out"],
        ),
        ({"writes_outside": "sometimes"}, ["writes_outside", "'sometimes'", "'commit', 'begin', 'refuse'"]),
        ({"unsaved_changes": "sometimes"}, ["unsaved_changes", "'sometimes'", "'warn', 'error', 'ignore'"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_session_options_that_cannot_be_combined(options: dict[str, Any], words: list[str]) -> None:
    """At the latest in `init_app`, not in the first request."""
    with pytest.raises(ConfigurationError) as caught:
        DB(session_options=options).init_app(app_on())
    for word in words:
        assert word in str(caught.value)


def test_session_options_the_user_made_are_left_as_they_were() -> None:
    options: dict[str, Any] = {"expire_on_commit": True, "autoflush": True}
    first, second = DB(session_options=options), DB(session_options=options)
    app = app_on()
    first.init_app(app)
    other = app_on()
    second.init_app(other)
    works(first, app)
    works(second, other)


# -- engines ----


class NoAutocommitDialect(SQLiteDialect_pysqlite):
    """A database that knows two levels, and no autocommit."""

    name = "timid"
    driver = "pytimid"
    supports_statement_cache = True

    def get_isolation_level_values(self, dbapi_conn: Any) -> list[str]:
        return ["READ COMMITTED", "SERIALIZABLE"]


class NoLevelsDialect(NoAutocommitDialect):
    """A database whose dialect knows no levels at all."""

    driver = "pytimider"

    def get_isolation_level_values(self, dbapi_conn: Any) -> list[str]:
        raise NotImplementedError


@pytest.fixture(autouse=True, scope="module")
def dialects() -> None:
    registry.register("timid", __name__, "NoAutocommitDialect")
    registry.register("timid.timider", __name__, "NoLevelsDialect")


def with_bind(where: str, url: str, **options: Any) -> dict[str, Any]:
    """The configuration of one engine, the default one or that of a bind, and of a good one beside it."""
    if where == "default":
        return {"SQLALCHEMY_DATABASE_URI": url, "SQLALCHEMY_ENGINE_OPTIONS": options}
    return {"SQLALCHEMY_DATABASE_URI": "sqlite://", "SQLALCHEMY_BINDS": {"other": {"url": url, **options}}}


@pytest.mark.parametrize("where", ["default", "bind"])
@pytest.mark.parametrize("url", ["timid://", "timid+timider://"])
def test_a_dialect_without_autocommit(where: str, url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        DB().init_app(app_on(**with_bind(where, url)))
    for word in ("timid+py", "AUTOCOMMIT", "leave the mixin out"):
        assert word in str(caught.value)


# SQLAlchemy takes a level in small letters too, and refuses it with an underscore
@pytest.mark.parametrize("level", ["AUTOCOMMIT", "autocommit"])
@pytest.mark.parametrize("way", ["isolation_level", "execution_options"])
@pytest.mark.parametrize("where", ["default", "bind"])
def test_an_engine_in_autocommit(where: str, way: str, level: str, database_url: str) -> None:
    """Under it no transaction can be begun: `db.engine.begin()` would not roll back, without a word (A16)."""
    options: dict[str, Any] = {"isolation_level": level}
    if way == "execution_options":
        options = {"execution_options": options}
    with pytest.raises(ConfigurationError) as caught:
        DB().init_app(app_on(**with_bind(where, database_url, **options)))
    for word in ("isolation_level", "AUTOCOMMIT", "Leave the option out"):
        assert word in str(caught.value)


def test_the_error_names_the_bind(database_url: str) -> None:
    """By its key or by its database."""
    name = sa.make_url(database_url).database or ""
    with pytest.raises(ConfigurationError, match=f"'other'|{re.escape(name)}"):
        DB().init_app(app_on(**with_bind("bind", database_url, isolation_level="AUTOCOMMIT")))


def test_the_error_shows_no_password() -> None:
    url = "postgresql+psycopg://someone:secret-word@127.0.0.1:1/nowhere"
    with pytest.raises(ConfigurationError) as caught:
        DB().init_app(app_on(url, SQLALCHEMY_ENGINE_OPTIONS={"isolation_level": "AUTOCOMMIT"}))
    assert "secret-word" not in str(caught.value)


def test_engine_options_of_the_class(database_url: str) -> None:
    """`engine_options` of the constructor are every bind's."""
    with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
        DB(engine_options={"isolation_level": "AUTOCOMMIT"}).init_app(app_on(database_url))


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_other_levels_are_all_right(database_url: str, level: str) -> None:
    db, app = DB(), app_on(database_url, SQLALCHEMY_ENGINE_OPTIONS={"isolation_level": level})
    db.init_app(app)
    with app.app_context():
        with db.session.begin():
            assert db.session.scalar(sa.text("show transaction_isolation")) == level.lower()
    works(db, app)


# -- settings ----


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("FICTIVE_WRITE_OUTSIDE", "FICTIVE_WRITES_OUTSIDE"),
        ("FICTIVE_WRITES_OUTSIDES", "FICTIVE_WRITES_OUTSIDE"),
        ("FICTIVE_writes_outside", "FICTIVE_WRITES_OUTSIDE"),
        ("FICTIVE_UNSAVED", "FICTIVE_UNSAVED_CHANGES"),
    ],
)
def test_a_setting_that_is_nearly_one(key: str, near: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        DB().init_app(app_on(**{key: "begin"}))
    assert key in str(caught.value)
    assert f"did you mean {near}?" in str(caught.value)


def test_a_setting_that_is_like_none() -> None:
    with pytest.raises(ConfigurationError) as caught:
        DB().init_app(app_on(FICTIVE_ZZZ=1))
    for word in ("FICTIVE_ZZZ", "FICTIVE_WRITES_OUTSIDE", "FICTIVE_UNSAVED_CHANGES"):
        assert word in str(caught.value)


@pytest.mark.parametrize("value", ["Begin", "", None, True, 3, ["begin"], {"begin": 1}])
@pytest.mark.parametrize(
    ("key", "choices"),
    [
        ("FICTIVE_WRITES_OUTSIDE", "'commit', 'begin', 'refuse'"),
        ("FICTIVE_UNSAVED_CHANGES", "'warn', 'error', 'ignore'"),
    ],
)
def test_a_bad_value(key: str, choices: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        DB().init_app(app_on(**{key: value}))
    for word in (key, repr(value), choices):
        assert word in str(caught.value)


def test_other_people_s_settings_are_passed_over() -> None:
    db, app = DB(), app_on(FICTIVELY="yes", fictive_writes_outside="no", SOMETHING_FICTIVE_="no")
    db.init_app(app)
    works(db, app)


def test_configuration_errors_are_sqlalchemy_s_too() -> None:
    assert issubclass(ConfigurationError, sa.exc.ArgumentError)


# -- a second try ----


@pytest.mark.parametrize(
    "bad",
    [
        {"FICTIVE_WRITES_OUTSIDE": "sometimes"},
        {"FICTIVE_NOTHING": 1},
        {"SQLALCHEMY_ENGINE_OPTIONS": {"isolation_level": "AUTOCOMMIT"}},
        {"SQLALCHEMY_BINDS": {"other": {"url": "sqlite://", "isolation_level": "AUTOCOMMIT"}}},
        {"SQLALCHEMY_BINDS": {"other": "timid://"}},
        {"SQLALCHEMY_DATABASE_URI": "timid://"},
    ],
    ids=["value", "key", "autocommit", "autocommit of a bind", "dialect of a bind", "dialect"],
)
def test_the_app_can_be_corrected_and_tried_again(bad: dict[str, Any], database_url: str) -> None:
    db, app = DB(), app_on(database_url)
    good = dict(app.config)
    app.config.update(bad)
    with pytest.raises(ConfigurationError):
        db.init_app(app)
    assert "sqlalchemy" not in app.extensions
    assert "fictive" not in app.extensions
    for key in bad:
        app.config.pop(key)
        if key in good:
            app.config[key] = good[key]
    db.init_app(app)
    works(db, app)


def test_a_failed_init_app_leaves_the_db_s_other_app_alone(database_url: str) -> None:
    db, good = DB(), app_on(database_url)
    db.init_app(good)
    with pytest.raises(ConfigurationError):
        db.init_app(app_on(database_url, FICTIVE_WRITES_OUTSIDE="sometimes"))
    with pytest.raises(ConfigurationError):
        db.init_app(app_on("timid://"))
    works(db, good)


def test_init_app_twice(database_url: str) -> None:
    db, app = DB(), app_on(database_url, FICTIVE_WRITES_OUTSIDE="begin")
    db.init_app(app)
    app.config["FICTIVE_WRITES_OUTSIDE"] = "refuse"
    with pytest.raises(RuntimeError, match="already been registered"):
        db.init_app(app)
    with pytest.raises(RuntimeError, match="already been registered"):
        DB().init_app(app)
    with app.app_context():
        assert db.session.writes_outside == "begin"
    works(db, app)


def test_init_app_again_after_the_extension_was_taken_out(database_url: str) -> None:
    """As Flask-SQLAlchemy's own tests do; the new configuration counts, the old engines are gone."""
    db, app = DB(), app_on(database_url, FICTIVE_WRITES_OUTSIDE="begin")
    db.init_app(app)
    with app.app_context():
        before = db.engine
        assert db.session.scalar(sa.text("select 1")) == 1
    del app.extensions["sqlalchemy"]
    app.config["FICTIVE_WRITES_OUTSIDE"] = "commit"
    db.init_app(app)
    with app.app_context():
        assert db.engine is not before
        assert db.session.writes_outside == "commit"
    works(db, app)


def test_two_apps_share_nothing(database_url: str, look: Look) -> None:
    look("create table thing (n int)")
    db = DB()
    first, second = app_on(database_url, FICTIVE_WRITES_OUTSIDE="begin"), app_on(database_url)
    for app in (first, second):
        db.init_app(app)
    with first.app_context():
        db.session.execute(sa.text("insert into thing values (1)"))
        with second.app_context():
            assert not db.session.in_transaction()
            db.session.execute(sa.text("insert into thing values (2)"))
            assert look("select n from thing") == [2]
            second_engine = db.engine
        assert db.session.in_transaction()
        assert db.engine is not second_engine
        db.session.commit()
    assert look("select n from thing order by n") == [1, 2]
    disposing(db, first)
    disposing(db, second)


def test_two_dbs_share_nothing(database_url: str, look: Look) -> None:
    first_db, second_db = DB(), DB()
    first, second = app_on(database_url, FICTIVE_WRITES_OUTSIDE="refuse"), app_on(database_url)
    first_db.init_app(first)
    second_db.init_app(second)

    class Thing(second_db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)

    assert list(first_db.metadata.tables) == []
    with first.app_context(), second.app_context():
        assert second_db.session.writes_outside == "commit"
        with first.app_context():
            assert first_db.session.writes_outside == "refuse"
    assert first_db.session.session_factory.class_ is not second_db.session.session_factory.class_
    works(first_db, first)
    works(second_db, second)


# -- fork ----


@pytest.fixture
def forked() -> Callable[[Callable[[], str]], str]:
    """`forked(function)`: what it returns in a child process."""

    def run(function: Callable[[], str]) -> str:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writer, function().encode())
            except BaseException as error:
                os.write(writer, f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        return said

    return run


# pytest and its plugins have threads; the child leaves by _exit and takes no lock of theirs
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_before_the_first_query(database_url: str, forked: Any, look: Look) -> None:
    look("create table thing (n int)")
    db, app = DB(), app_on(database_url, SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 1, "max_overflow": 0})
    db.init_app(app)

    def use() -> str:
        with app.app_context():
            first = db.session.scalar(sa.text("select pg_backend_pid()"))
            with db.session.begin():
                db.session.execute(sa.text("insert into thing values (1)"))
                second = db.session.scalar(sa.text("select pg_backend_pid()"))
            return f"{first} {second}"

    child = forked(use)
    parent = use()
    another = forked_after_dispose(app, db, forked, use)
    pids = {tuple(said.split()) for said in (child, parent, another)}
    assert all(first == second for first, second in pids), pids
    assert len(pids) == 3
    assert use() == parent
    assert look("select count(*) from thing") == [4]
    disposing(db, app)


def forked_after_dispose(app: Flask, db: Any, forked: Any, use: Callable[[], str]) -> str:
    """A fork after queries, as SQLAlchemy's documentation has it: `engine.dispose(close=False)` in the child."""

    def child() -> str:
        with app.app_context():
            db.engine.dispose(close=False)
        return use()

    said: str = forked(child)
    return said


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_within_an_app_context(database_url: str, forked: Any, look: Look) -> None:
    db, app = DB(), app_on(database_url)
    db.init_app(app)
    with app.app_context():
        pid = lambda: str(db.session.scalar(sa.text("select pg_backend_pid()")))  # noqa: E731
        child = forked(pid)
        parent = pid()
        assert child.isdigit()
        assert child != parent
    disposing(db, app)


def test_errors_of_the_database_are_its_own() -> None:
    """A server that cannot be reached is no configuration error; it is SQLAlchemy's, at the first statement."""
    db, app = DB(), app_on("postgresql+psycopg://nobody@127.0.0.1:1/nowhere?connect_timeout=2")
    db.init_app(app)
    with app.app_context():
        with pytest.raises(sa.exc.OperationalError) as caught:
            db.session.scalar(sa.text("select 1"))
        assert isinstance(caught.value.orig, psycopg.OperationalError)

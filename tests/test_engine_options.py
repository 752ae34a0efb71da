"""Which options an engine gets, of all that are given somewhere (contract A19, A22)."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flask_sqlalchemy
import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase

from fictive.databases.engine_options import add_options, merged_connect_args
from fictive.errors import ConfigurationError
from fictive.flask_sqlalchemy import BulkMixin, FilterByOrCreateMixin, OptInTransactionMixin
from fictive.testing import postgres

Made = Callable[..., Any]


class DB(OptInTransactionMixin, SQLAlchemy):
    pass


@pytest.fixture
def made(tmp_path: Path, database_url: str, pg: postgres.Server, driver: str) -> Iterator[Made]:
    """`made(default, bind, every)`: a `db` with a bind on another database, by options of each."""
    with contextlib.ExitStack() as stack:

        def make(
            default: dict[str, Any] | None = None, bind: Any = None, every: dict[str, Any] | None = None, cls: Any = DB
        ) -> Any:
            app = Flask(__name__, instance_path=str(tmp_path))
            other = {"url": pg.url("postgres", driver=driver), **(bind or {})}
            app.config.update(SQLALCHEMY_DATABASE_URI=database_url, SQLALCHEMY_BINDS={"other": other})
            if default is not None:
                app.config["SQLALCHEMY_ENGINE_OPTIONS"] = default
            db = cls(model_class=type("Base", (DeclarativeBase,), {}), engine_options=every)
            db.init_app(app)
            stack.enter_context(app.app_context())
            for engine in db.engines.values():
                stack.callback(engine.dispose)
            return db

        yield make


def ask(db: Any, query: str, key: str | None = "other") -> Any:
    with db.engines[key].connect() as connection:
        return connection.scalar(sa.text(query))


def with_query(url: str, **query: str) -> str:
    return sa.make_url(url).update_query_dict(query).render_as_string(hide_password=False)


POOL = {
    "pool_size": 3, "max_overflow": 2, "pool_timeout": 7, "pool_recycle": 99, "pool_pre_ping": True, "echo": True,
    "pool_use_lifo": True, "hide_parameters": True,
}  # fmt: skip


def pool_of(engine: sa.Engine) -> dict[str, Any]:
    pool: Any = engine.pool
    return {
        "pool_size": pool.size(), "max_overflow": pool._max_overflow, "pool_timeout": pool.timeout(),
        "pool_recycle": pool._recycle, "pool_pre_ping": pool._pre_ping, "echo": engine.echo,
        "pool_use_lifo": pool._pool.use_lifo, "hide_parameters": engine.hide_parameters,
    }  # fmt: skip


class Watched(sa.QueuePool):
    pass


def test_a19_how_the_default_engines_pool_behaves_is_how_every_pool_does(made: Made) -> None:
    db = made(POOL)
    assert pool_of(db.engine) == pool_of(db.engines["other"]) == POOL
    db = made({"poolclass": Watched, "pool_size": 3})
    assert type(db.engines["other"].pool) is Watched
    assert db.engines["other"].pool.size() == 3
    assert type(made({"poolclass": sa.NullPool}).engines["other"].pool) is sa.NullPool


def test_a19_a_binds_own_options_win(made: Made) -> None:
    own = {**POOL, "pool_size": 1, "max_overflow": 0, "pool_timeout": 1, "pool_recycle": 5, "echo": False}
    assert pool_of(made(POOL, own).engines["other"]) == own


@pytest.mark.parametrize(
    ("default", "own"),
    [
        ({"poolclass": sa.NullPool}, {"pool_size": 2}),
        ({"pool_size": 4, "max_overflow": 1, "pool_timeout": 3}, {"poolclass": sa.NullPool}),
        ({"pool_size": 4, "pool_use_lifo": True}, {"poolclass": sa.StaticPool}),
    ],
)
def test_a19_options_that_do_not_go_with_a_binds_own_stay_away(made: Made, default: Any, own: Any) -> None:
    db = made(default, own)
    assert ask(db, "select 1") == 1
    if "poolclass" in own:
        assert type(db.engines["other"].pool) is own["poolclass"]


def test_a19_where_to_connect_is_never_another_engines(
    made: Made, database_url: str, driver: str, pg: postgres.Server
) -> None:
    main = sa.make_url(database_url).database
    parameters = {"host": pg.host, "port": pg.port, "user": pg.user, "password": pg.password, "dbname": main}
    for default in (
        {"creator": lambda: importlib.import_module(driver).connect(**parameters)},
        {"connect_args": {"dbname": main}},
        {"connect_args": {"application_name": "main", "options": "-c work_mem=3MB"}},
        {"execution_options": {"schema_translate_map": {None: "elsewhere"}, "isolation_level": "SERIALIZABLE"}},
        {"isolation_level": "SERIALIZABLE"},
        {"json_serializer": str},
    ):
        db = made(default)
        assert ask(db, "select current_database()") == "postgres"
        assert ask(db, "select current_database()", None) == main
        assert ask(db, "show transaction_isolation") == "read committed"
        assert ask(db, "show application_name") != "main"
        assert ask(db, "show work_mem") != "3MB"
        assert not db.engines["other"].get_execution_options()


@pytest.mark.parametrize("cls", [DB, SQLAlchemy], ids=["fictive", "plain"])
def test_a19_a_binds_url_is_not_weakened(made: Made, cls: Any, pg: postgres.Server, driver: str) -> None:
    default = {"connect_args": {"connect_timeout": 1, "options": "-c statement_timeout=11s"}}
    url = with_query(pg.url("postgres", driver=driver), connect_timeout="10", options="-csearch_path=tenant")
    db = made(default, {"url": url}, cls=cls)
    assert ask(db, "show search_path") == "tenant"
    assert ask(db, "show statement_timeout") == "0"
    with db.engines["other"].connect() as connection:
        info: Any = connection.connection.dbapi_connection.info  # type: ignore[union-attr]
        parameters = info.dsn_parameters if driver == "psycopg2" else info.get_parameters()
    assert parameters["connect_timeout"] == "10"


def test_a19_options_of_the_class_are_for_every_engine_and_win_on_binds(made: Made) -> None:
    """`SQLAlchemy(engine_options=...)`: on the default engine the configuration wins, as in Flask-SQLAlchemy."""
    every = {"pool_size": 4, "pool_recycle": 50, "isolation_level": "REPEATABLE READ"}
    db = made({"pool_size": 3, "max_overflow": 1}, {"pool_recycle": 9}, every)
    here, there = db.engine.pool, db.engines["other"].pool
    assert (here.size(), here._max_overflow, here._recycle) == (3, 1, 50)
    assert (there.size(), there._max_overflow, there._recycle) == (4, 1, 9)
    assert ask(db, "show transaction_isolation") == ask(db, "show transaction_isolation", None) == "repeatable read"
    assert every == {"pool_size": 4, "pool_recycle": 50, "isolation_level": "REPEATABLE READ"}


def test_a19_echo_of_the_class_and_of_the_configuration(made: Made) -> None:
    assert made({"echo": True}, None, {"echo": False}).engines["other"].echo is False
    assert made({"echo": True}).engines["other"].echo is True
    assert made({"echo": True}, {"echo": False}).engines["other"].echo is False


def test_a19_connect_args_are_merged_key_by_key(made: Made) -> None:
    """Of an engine's own: the class's, the configuration's and the bind's; never the default engine's on a bind."""
    every = {"connect_args": {"application_name": "every", "options": "-c work_mem=3MB -c lock_timeout=1s"}}
    db = made(
        {"connect_args": {"options": "-c lock_timeout=2s"}},
        {"connect_args": {"application_name": "bind", "options": "-c lock_timeout=3s"}},
        every,
    )
    names = ("application_name", "work_mem", "lock_timeout")
    assert [ask(db, f"show {name}", None) for name in names] == ["every", "3MB", "2s"]
    assert [ask(db, f"show {name}") for name in names] == ["bind", "3MB", "3s"]
    assert every["connect_args"]["options"] == "-c work_mem=3MB -c lock_timeout=1s"


def test_a19_one_dictionary_for_several_engines(tmp_path: Path, database_url: str) -> None:
    """Flask-SQLAlchemy adds `check_same_thread` to that of an in-memory SQLite; PostgreSQL has no such argument."""
    every = {"connect_args": {}}
    shared = {"application_name": "shared"}
    db, app = DB(engine_options=every), Flask(__name__, instance_path=str(tmp_path))
    app.config.update(SQLALCHEMY_DATABASE_URI=database_url, SQLALCHEMY_BINDS={"lite": "sqlite://"})
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"connect_args": shared}
    db.init_app(app)
    with app.app_context():
        assert ask(db, "show application_name", None) == "shared"
        assert ask(db, "select 1", "lite") == 1
        for engine in db.engines.values():
            engine.dispose()
    assert (every, shared) == ({"connect_args": {}}, {"application_name": "shared"})


def test_a19_a_bind_of_another_kind_of_database_keeps_to_its_own(tmp_path: Path, database_url: str) -> None:
    db, app = DB(), Flask(__name__, instance_path=str(tmp_path))
    app.config.update(SQLALCHEMY_DATABASE_URI=database_url, SQLALCHEMY_BINDS={"lite": "sqlite:///x.db"})
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_size": 3, "connect_args": {"options": "-c work_mem=3MB"}}
    db.init_app(app)
    with app.app_context():
        assert ask(db, "select 1", "lite") == 1
        assert db.engines["lite"].pool.size() != 3
        for engine in db.engines.values():
            engine.dispose()


def test_adding_options() -> None:
    options: dict[str, Any] = {"pool_size": 1}
    assert add_options(options, {"pool_size": 2, "max_overflow": 3, "poolclass": sa.NullPool}) == ["poolclass"]
    assert options == {"pool_size": 1, "max_overflow": 3}
    options = {"pool": object()}
    assert add_options(options, {"echo": True, "pool_recycle": 3, "poolclass": sa.QueuePool}) == [
        "poolclass", "pool_recycle"
    ]  # fmt: skip
    assert options.keys() == {"pool", "echo"}
    assert merged_connect_args([{}, {"connect_args": None}, {"connect_args": {"a": 1}}]) == {"a": 1}


# Under somebody's subclass of SQLAlchemy, or a class in its place


class Theirs(SQLAlchemy):
    """Takes arguments of its own, and hands the rest on."""

    told: Any = None

    def __init__(self, *args: Any, flavour: str = "", **kwargs: Any) -> None:
        self.flavour = flavour
        super().__init__(*args, **kwargs)

    def init_app(self, app: Flask, told: Any = None) -> None:
        self.told = told
        super().init_app(app)


def works(db: Any, app: Flask) -> None:
    with app.app_context():
        db.session.execute(sa.text("select 1"))
        assert not db.session.in_transaction()
        with db.session.begin():
            assert db.session.in_transaction()
        db.engine.dispose()


def app_on(url: str) -> Flask:
    app = Flask("app")
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    return app


def test_a22_under_a_subclass(database_url: str) -> None:
    class Mine(OptInTransactionMixin, Theirs):
        pass

    class Further(Mine):
        pass

    for cls in (Mine, Further):
        db, app = cls(flavour="sweet"), app_on(database_url)
        db.init_app(app, told="a thing")
        assert (db.flavour, db.told) == ("sweet", "a thing")
        works(db, app)


@pytest.mark.parametrize("mixin", [OptInTransactionMixin, FilterByOrCreateMixin, BulkMixin])
def test_a22_in_the_wrong_order_under_a_subclass(mixin: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"{mixin.__name__} comes after Theirs.*DB\({mixin.__name__}, Theirs"
    ):
        type("DB", (Theirs, mixin), {})


def test_a22_a_class_in_the_place_of_sqlalchemys(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shim makes the name `flask_sqlalchemy.SQLAlchemy` a class with the mixins, so that old code gets them."""

    class Shim(OptInTransactionMixin, FilterByOrCreateMixin, BulkMixin, SQLAlchemy):
        pass

    monkeypatch.setattr(flask_sqlalchemy, "SQLAlchemy", Shim)

    class Application(flask_sqlalchemy.SQLAlchemy):  # type: ignore[misc]
        pass

    for cls in (Shim, Application):
        db, app = cls(), app_on(database_url)
        db.init_app(app)
        works(db, app)

"""Settings from the environment (rule I4)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase

import fictive
from fictive.errors import ConfigurationError, DatabaseNotConfigured, SettingIgnoredWarning
from fictive.flask_sqlalchemy import OptInTransactionMixin
from fictive.settings import DatabaseSettings, is_configured
from fictive.testing import postgres
from fictive.testing.wire import Wire
from tests.wirelog import messages

URL = "postgresql+psycopg2://app:hunter2@localhost/shop"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """No variables of this machine's, an empty directory, and a way to set some."""
    for name in list(os.environ):
        if "DB_" in name or "DATABASE_URL" in name or name == "PGOPTIONS":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def put(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def fresh_db(**options: Any) -> Any:
    class Base(DeclarativeBase):
        pass

    class DB(OptInTransactionMixin, SQLAlchemy):
        pass

    return DB(model_class=Base, **options)


GOOD = {
    "nothing else": ({}, {}),
    "pool": (
        {"DB_POOL_SIZE": "3", "DB_MAX_OVERFLOW": "0", "DB_POOL_TIMEOUT": "2", "DB_POOL_RECYCLE": "60"},
        {"pool_size": 3, "max_overflow": 0, "pool_timeout": 2, "pool_recycle": 60},
    ),
    "flags": ({"DB_POOL_PRE_PING": "yes", "DB_ECHO": "off"}, {"pool_pre_ping": True, "echo": False}),
    "timeout in seconds": ({"DB_STATEMENT_TIMEOUT": "5"}, {"connect_args": {"options": "-c statement_timeout=5000"}}),
    "timeout with unit": (
        {"DB_STATEMENT_TIMEOUT": "1min"},
        {"connect_args": {"options": "-c statement_timeout=60000"}},
    ),
    "pgbouncer": (
        {"DB_STATEMENT_TIMEOUT": "1s", "DB_PGBOUNCER": "1"},
        {"execution_options": {"fictive_statement_timeout": 1000}},
    ),
    "explicitly no timeout": (
        {"DB_STATEMENT_TIMEOUT": "0"},
        {"connect_args": {"options": "-c statement_timeout=0"}},
    ),
    "empty means unset": ({"DB_POOL_SIZE": "", "DB_ECHO": "", "DB_STATEMENT_TIMEOUT": "", "DB_BINDS": ""}, {}),
    "somebody else's variables": ({"DB_HOST": "elsewhere", "DB_NAME": "x", "DB_PASSWORD": "y"}, {}),
}


@pytest.mark.parametrize("name", GOOD)
def test_i4_good_environments(name: str, environment: Callable[..., None]) -> None:
    variables, options = GOOD[name]
    environment(DATABASE_URL=URL, **variables)
    settings = DatabaseSettings()
    assert settings.engine_options() == options
    assert settings.flask_config().get("SQLALCHEMY_ENGINE_OPTIONS", {}) == options
    assert "hunter2" not in repr(settings) + str(settings) + repr(settings.flask_config())


BAD = {
    "no url": ({}, "DATABASE_URL is not set. For example: DATABASE_URL="),
    "not a url": ({"DATABASE_URL": "postgresql//app:hunter2@h/x"}, "DATABASE_URL is not a database URL"),
    "bad port": ({"DATABASE_URL": "postgresql://app:hunter2@h:hunter2/x"}, "DATABASE_URL is not a database URL"),
    "unknown database": (
        {"DATABASE_URL": "mongodb://app:hunter2@h/x"}, "DATABASE_URL names a database or driver.*mongodb",
    ),
    "unknown driver": ({"DATABASE_URL": "postgresql+secret2://h/x"}, "DATABASE_URL names a database or driver"),
    "not a number": ({"DATABASE_URL": URL, "DB_POOL_SIZE": "many"}, "DB_POOL_SIZE .*integer.*DB_POOL_SIZE=5"),
    "too small": ({"DATABASE_URL": URL, "DB_POOL_SIZE": "-2"}, "DB_POOL_SIZE .*greater than or equal to 0"),
    "no time": ({"DATABASE_URL": URL, "DB_POOL_TIMEOUT": "0"}, "DB_POOL_TIMEOUT .*greater than 0"),
    "half a second": ({"DATABASE_URL": URL, "DB_POOL_TIMEOUT": "0.5"}, "DB_POOL_TIMEOUT .*integer"),
    "endless": ({"DATABASE_URL": URL, "DB_POOL_TIMEOUT": "inf"}, "DB_POOL_TIMEOUT .*integer"),
    "not a flag": ({"DATABASE_URL": URL, "DB_ECHO": "perhaps"}, "DB_ECHO .*boolean.*DB_ECHO=false"),
    "not a duration": (
        {"DATABASE_URL": URL, "DB_STATEMENT_TIMEOUT": "5 parsecs"}, "DB_STATEMENT_TIMEOUT is '5 parsecs'",
    ),
    "negative duration": ({"DATABASE_URL": URL, "DB_STATEMENT_TIMEOUT": "-1"}, "DB_STATEMENT_TIMEOUT is '-1'"),
    "empty url": ({"DATABASE_URL": ""}, "DATABASE_URL is not set. For example: DATABASE_URL="),
    "blank url": ({"DATABASE_URL": " "}, "DATABASE_URL is not a database URL"),
    "asyncpg": (
        {"DATABASE_URL": "postgresql+asyncpg://app:hunter2@h/x"},
        r"DATABASE_URL names postgresql\+asyncpg, a driver for asyncio.*Write postgresql\+psycopg",
    ),
    "bind without url": ({"DATABASE_URL": URL, "DB_BINDS": "audit"}, "AUDIT_DATABASE_URL is not set"),
    "bad option of a bind": (
        {"DATABASE_URL": URL, "DB_BINDS": "audit", "AUDIT_DATABASE_URL": URL, "AUDIT_DB_POOL_SIZE": "x"},
        "AUDIT_DB_POOL_SIZE .*integer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_i4_bad_environments(name: str, environment: Callable[..., None]) -> None:
    variables, message = BAD[name]
    environment(**variables)
    with pytest.raises(ConfigurationError, match=message) as caught:
        DatabaseSettings().flask_config()
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_i4_all_that_is_wrong_is_told_at_once(environment: Callable[..., None]) -> None:
    environment(DB_POOL_SIZE="x", DB_ECHO="maybe")
    with pytest.raises(ConfigurationError, match=r"DATABASE_URL is not set.*DB_POOL_SIZE.*DB_ECHO"):
        DatabaseSettings()


def test_i4_a_file_and_the_environment_which_wins(environment: Callable[..., None], tmp_path: Path) -> None:
    assert not is_configured()
    (tmp_path / ".env").write_text(f"DATABASE_URL={URL}\nDB_POOL_SIZE=2\nDB_MAX_OVERFLOW=4\n")
    environment(DB_POOL_SIZE="3")
    settings = DatabaseSettings()
    assert is_configured()
    assert settings.engine_options() == {"pool_size": 3, "max_overflow": 4}
    assert settings.origins() == {
        "DATABASE_URL": ".env", "DB_POOL_SIZE": "environment", "DB_MAX_OVERFLOW": ".env"
    }  # fmt: skip
    (tmp_path / ".env").write_text(f"DATABASE_URL={URL}\nDB_POL_SIZE=2\n")
    with pytest.warns(SettingIgnoredWarning, match="DB_POL_SIZE"):
        DatabaseSettings()
    (tmp_path / ".env").write_text("DATABASE_URL=\n")
    assert not is_configured()
    assert DatabaseSettings(env_file=None, database_url="sqlite://").url.drivername == "sqlite"


def test_i4_binds(environment: Callable[..., None], tmp_path: Path) -> None:
    environment(
        DATABASE_URL="sqlite:///main.db", DB_BINDS="audit, old", AUDIT_DATABASE_URL=URL, AUDIT_DB_POOL_SIZE="1",
        OLD_DATABASE_URL="sqlite:///old.db",
    )  # fmt: skip
    db, app = fresh_db(), Flask(__name__, instance_path=str(tmp_path))
    db.init_app(app)
    with app.app_context():
        assert {key: engine.dialect.name for key, engine in db.engines.items()} == {
            None: "sqlite", "audit": "postgresql", "old": "sqlite"
        }  # fmt: skip
        assert db.engines["audit"].pool.size() == 1


def test_i4_an_app_that_names_a_database_keeps_it(environment: Callable[..., None], tmp_path: Path) -> None:
    environment(DATABASE_URL="postgresql://nowhere/x")
    db, app = fresh_db(), Flask(__name__, instance_path=str(tmp_path))
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    db.init_app(app)
    with app.app_context():
        assert db.engine.dialect.name == "sqlite"


@pytest.mark.parametrize("uri", [None, "", " "])
def test_i4_neither_app_nor_environment(uri: str | None, tmp_path: Path) -> None:
    app = Flask(__name__, instance_path=str(tmp_path))
    app.config["SQLALCHEMY_DATABASE_URI"] = uri
    with pytest.raises(RuntimeError, match=r"SQLALCHEMY_DATABASE_URI.*\bDATABASE_URL\b") as caught:
        fresh_db().init_app(app)
    assert isinstance(caught.value, DatabaseNotConfigured)
    assert isinstance(caught.value, ConfigurationError)
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    fresh_db().init_app(app)


def test_i4_a_bad_variable_leaves_the_app_untouched(environment: Callable[..., None], tmp_path: Path) -> None:
    environment(DATABASE_URL="postgresql://h/x", DB_ECHO="perhaps")
    app = Flask(__name__, instance_path=str(tmp_path))
    before = dict(app.config)
    with pytest.raises(ConfigurationError, match="DB_ECHO"):
        fresh_db().init_app(app)
    assert app.config == before
    assert not app.extensions


def test_i4_flask_fictive_settings(environment: Callable[..., None], tmp_path: Path) -> None:
    environment(DATABASE_URL=URL, DB_POOL_SIZE="3", DB_STATEMENT_TIMEOUT="2s")
    (tmp_path / ".env").write_text("DB_MAX_OVERFLOW=4\n")
    db, app = fresh_db(), Flask(__name__, instance_path=str(tmp_path))
    app.config.update(SQLALCHEMY_ENGINE_OPTIONS={"pool_recycle": 60}, FICTIVE_RETRY_READS=False)
    app.config["FICTIVE_ROLLBACK_STATUSES"] = [*range(400, 500), 503, 510, 511]
    db.init_app(app)
    runner = app.test_cli_runner()
    lines = [json.loads(line) for line in runner.invoke(args=["fictive", "settings", "--json"]).output.splitlines()]
    found = {line["name"]: (line["value"], line["origin"]) for line in lines}
    assert found["DATABASE_URL"] == ("postgresql+psycopg2://app:***@localhost/shop", "environment")
    assert found["DB_POOL_SIZE"] == ("3", "environment")
    assert found["DB_MAX_OVERFLOW"] == ("4", ".env")
    assert found["DB_POOL_RECYCLE"] == ("60", "app.config")
    assert found["DB_POOL_PRE_PING"] == ("False", "default")
    assert found["DB_STATEMENT_TIMEOUT"] == ("2000ms", "environment")
    assert found["FICTIVE_RETRY_READS"] == ("False", "app.config")
    assert found["FICTIVE_WRITES_OUTSIDE"] == ("commit", "default")
    assert found["FICTIVE_ROLLBACK_STATUSES"] == ("400-499, 503, 510-511", "app.config")
    table = runner.invoke(args=["fictive", "settings"])
    assert table.exit_code == 0
    assert "hunter2" not in table.output
    assert len(table.output.splitlines()) == len(lines)
    assert "passwords are hidden" in runner.invoke(args=["fictive", "settings", "--help"]).output.lower()


def test_i4_flask_fictive_settings_hides_the_passwords_of_replicas(
    environment: Callable[..., None], tmp_path: Path
) -> None:
    environment()
    app = Flask(__name__, instance_path=str(tmp_path))
    app.config.update(
        SECRET_KEY="k",
        SQLALCHEMY_DATABASE_URI=URL,
        SQLALCHEMY_BINDS={"near": "postgresql+psycopg2://app:hunter2@near/shop"},
        FICTIVE_REPLICAS=["near", "postgresql+psycopg2://app:hunter2@far/shop"],
        FICTIVE_POOLER="transaction",
        FICTIVE_DIRECT_URL={
            None: "postgresql://app:hunter2@direct/shop",
            "near": "postgresql://app:hunter2@near/shop",
        },
    )
    fresh_db().init_app(app)
    output = app.test_cli_runner().invoke(args=["fictive", "settings", "--json"]).output
    assert "hunter2" not in output
    lines = [json.loads(line) for line in output.splitlines()]
    found = {line["name"]: line["value"] for line in lines}
    assert found["FICTIVE_REPLICAS"] == "near, postgresql+psycopg2://app:***@far/shop"
    assert found["FICTIVE_DIRECT_URL"] == "postgresql://app:***@direct/shop, near: postgresql://app:***@near/shop"
    of_replica = {line["name"] for line in lines if line["bind"] == "default replica 2"}
    assert "DATABASE_URL" in of_replica, "no variable of the environment is named after a replica"


def test_i4_flask_fictive_settings_shows_what_is_not_set_as_the_docs_do(
    environment: Callable[..., None], tmp_path: Path
) -> None:
    environment(DATABASE_URL=URL)
    app = Flask(__name__, instance_path=str(tmp_path))
    fresh_db().init_app(app)
    output = app.test_cli_runner().invoke(args=["fictive", "settings", "--json"]).output
    found = {line["name"]: line["value"] for line in map(json.loads, output.splitlines())}
    assert found["FICTIVE_REPLICAS"] == found["FICTIVE_DIRECT_URL"] == "None"


def test_i4_statement_timeout_holds(
    database_url: str, environment: Callable[..., None], driver: str, wire: Wire, tmp_path: Path
) -> None:
    """Everywhere on an ordinary server; in each transaction, with no round trip of its own, behind a PgBouncer."""
    environment(DATABASE_URL=wire.url(database_url), DB_STATEMENT_TIMEOUT="1234ms")
    show = sa.text("select current_setting('statement_timeout')")
    db, app = fresh_db(), Flask(__name__, instance_path=str(tmp_path))
    db.init_app(app)
    with app.app_context():
        assert db.session.scalar(show) == "1234ms"
        db.engine.dispose()
    environment(DB_PGBOUNCER="true")
    db, app = fresh_db(), Flask(__name__, instance_path=str(tmp_path))
    db.init_app(app)
    with app.app_context():
        assert db.session.scalar(show) == "0"
        with wire.record() as log, db.session.begin():
            assert db.session.scalar(show) == "1234ms"
        assert messages(log) == ["BEGIN+SET+SELECT", "COMMIT"]
        with db.engine.begin() as connection:
            assert connection.scalar(show) == "1234ms"
        assert db.session.scalar(show) == "0"
        db.engine.dispose()


# The environment beneath the app's own configuration


def show(db: Any, name: str, key: str | None = None) -> Any:
    with db.engines[key].connect() as connection:
        return connection.scalar(sa.text("select current_setting(:name)"), {"name": name})


Made = Callable[..., Any]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    """`made(class_options, **config)`: a `db` on an app of its own, whose context is pushed."""
    with contextlib.ExitStack() as stack:

        def make(class_options: dict[str, Any] | None = None, **config: Any) -> Any:
            app = Flask(__name__, instance_path=str(tmp_path))
            app.config.update(config)
            db = fresh_db(engine_options=class_options)
            db.init_app(app)
            stack.enter_context(app.app_context())
            for engine in db.engines.values():
                stack.callback(engine.dispose)
            return db

        yield make


def with_query(url: str, **query: str) -> str:
    return sa.make_url(url).update_query_dict(query).render_as_string(hide_password=False)


@pytest.mark.parametrize("named_by", ["environment", "app"])
@pytest.mark.parametrize(
    ("url_options", "pgoptions", "class_options", "connect_args", "expected"),
    [
        ("-csearch_path=tenant", "", "", {}, {"search_path": "tenant", "statement_timeout": "7s"}),
        ("-c statement_timeout=3s", "", "", {}, {"statement_timeout": "7s"}),
        ("", "-c work_mem=3MB", "", {}, {"work_mem": "3MB", "statement_timeout": "7s"}),
        ("-c lock_timeout=9s", "-c work_mem=3MB", "", {}, {"lock_timeout": "9s", "work_mem": "4MB"}),
        ("", "", "", {"application_name": "web"}, {"application_name": "web", "statement_timeout": "7s"}),
        (
            "-csearch_path=tenant", "", "", {"options": "-c lock_timeout=2s"},
            {"search_path": "tenant", "lock_timeout": "2s", "statement_timeout": "7s"},
        ),
        ("", "", "", {"options": "-c statement_timeout=1s"}, {"statement_timeout": "1s"}),
        (
            "", "", "-c lock_timeout=2s", {"options": "-c work_mem=3MB"},
            {"lock_timeout": "2s", "work_mem": "3MB", "statement_timeout": "7s"},
        ),
    ],
)  # fmt: skip
def test_i4_the_statement_timeout_keeps_other_options_and_they_keep_it(
    url_options: str, pgoptions: str, class_options: str, connect_args: dict[str, Any], expected: dict[str, str],
    named_by: str, database_url: str, environment: Callable[..., None], made: Made,
) -> None:  # fmt: skip
    url = with_query(database_url, options=url_options) if url_options else database_url
    environment(DB_STATEMENT_TIMEOUT="7s", PGOPTIONS=pgoptions)
    config: dict[str, Any] = {"SQLALCHEMY_ENGINE_OPTIONS": {"connect_args": connect_args}} if connect_args else {}
    if named_by == "environment":
        environment(DATABASE_URL=url)
    else:
        config["SQLALCHEMY_DATABASE_URI"] = url
    db = made({"connect_args": {"options": class_options}} if class_options else None, **config)
    assert {name: show(db, name) for name in expected} == expected


def test_i4_no_timeout_over_that_of_the_url(database_url: str, environment: Callable[..., None], made: Made) -> None:
    environment(DATABASE_URL=with_query(database_url, options="-c statement_timeout=3s"), DB_STATEMENT_TIMEOUT="0")
    assert show(made(), "statement_timeout") == "0"


def test_i4_a_timeout_on_a_driver_that_has_no_options(pg: postgres.Server, environment: Callable[..., None]) -> None:
    environment(DATABASE_URL=pg.url("postgres", driver="pg8000"), DB_STATEMENT_TIMEOUT="7s")
    assert DatabaseSettings().engine_options() == {"execution_options": {"fictive_statement_timeout": 7000}}


def test_i4_variables_count_for_an_app_that_names_its_database(
    database_url: str, environment: Callable[..., None], made: Made
) -> None:
    environment(DB_POOL_SIZE="17", DB_MAX_OVERFLOW="2", DB_POOL_RECYCLE="60", DB_POOL_PRE_PING="1", DB_ECHO="0")
    db = made(SQLALCHEMY_DATABASE_URI=database_url, SQLALCHEMY_ENGINE_OPTIONS={"max_overflow": 3})
    pool = db.engine.pool
    assert (pool.size(), pool._max_overflow, pool._recycle, pool._pre_ping) == (17, 3, 60, True)
    environment(DATABASE_URL="postgresql://elsewhere/x")
    assert made(SQLALCHEMY_DATABASE_URI=database_url).engine.url.database == sa.make_url(database_url).database


def test_i4_what_the_app_says_of_echo_wins(environment: Callable[..., None], made: Made) -> None:
    environment(DB_ECHO="1")
    assert made(SQLALCHEMY_DATABASE_URI="sqlite://").engine.echo is True
    assert made(SQLALCHEMY_DATABASE_URI="sqlite://", SQLALCHEMY_ECHO=False).engine.echo is False


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "sqlite:///file.db"])
def test_i4_variables_of_a_pool_do_not_stop_sqlite(uri: str, environment: Callable[..., None], made: Made) -> None:
    environment(DB_POOL_SIZE="17", DB_MAX_OVERFLOW="2", DB_POOL_TIMEOUT="3", DB_STATEMENT_TIMEOUT="3s")
    assert made(SQLALCHEMY_DATABASE_URI=uri).session.scalar(sa.text("select 1")) == 1
    environment(DATABASE_URL=uri)
    assert made().session.scalar(sa.text("select 1")) == 1


def test_i4_a_variable_that_cannot_have_effect_warns(
    database_url: str, environment: Callable[..., None], made: Made
) -> None:
    environment(DB_POOL_SIZE="17", DB_POOL_RECYCLE="60")
    with pytest.warns(SettingIgnoredWarning, match="DB_POOL_SIZE is without effect.*no pool_size"):
        db = made(SQLALCHEMY_DATABASE_URI=database_url, SQLALCHEMY_ENGINE_OPTIONS={"poolclass": sa.NullPool})
    assert db.engine.pool._recycle == 60


@pytest.mark.parametrize(
    "name", ["DB_LOCK_TIMEOUT", "DB_IDLE_TIMEOUT", "DB_POOL_MAX_SIZE", "DB_POOLSIZE", "DB_STATEMENT_TIMEOUTS"]
)
def test_i4_variables_of_other_programs_do_not_stop_the_app(
    name: str, database_url: str, environment: Callable[..., None], made: Made
) -> None:
    environment(**{"DATABASE_URL": database_url, name: "5"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert made().session.scalar(sa.text("select 1")) == 1
    assert all(name in str(each.message) and each.category is SettingIgnoredWarning for each in caught)
    assert caught or name in ("DB_POOL_MAX_SIZE",)


def test_i4_binds_in_the_app_and_the_default_database_in_the_environment(
    database_url: str, environment: Callable[..., None], made: Made
) -> None:
    environment(
        DATABASE_URL=database_url, DB_POOL_SIZE="2", AUDIT_DB_MAX_OVERFLOW="4", AUDIT_DB_STATEMENT_TIMEOUT="7s"
    )
    db = made(SQLALCHEMY_BINDS={"audit": database_url})
    assert set(db.engines) == {None, "audit"}
    assert db.engine.url == db.engines["audit"].url
    assert (db.engines["audit"].pool.size(), db.engines["audit"].pool._max_overflow) == (2, 4)
    assert (show(db, "statement_timeout"), show(db, "statement_timeout", "audit")) == ("0", "7s")


def test_i4_binds_in_both(database_url: str, environment: Callable[..., None], made: Made) -> None:
    """The app's own URL of a bind wins, and the environment need not have one."""
    environment(DB_BINDS="audit,more", MORE_DATABASE_URL="sqlite://", AUDIT_DB_POOL_SIZE="3")
    db = made(SQLALCHEMY_DATABASE_URI="sqlite://", SQLALCHEMY_BINDS={"audit": {"url": database_url}})
    assert {key: engine.dialect.name for key, engine in db.engines.items()} == {
        None: "sqlite", "audit": "postgresql", "more": "sqlite"
    }  # fmt: skip
    assert db.engines["audit"].pool.size() == 3


def test_i4_binds_alone(database_url: str, environment: Callable[..., None], made: Made) -> None:
    environment(DB_POOL_SIZE="3")
    db = made(SQLALCHEMY_BINDS={"audit": database_url})
    assert set(db.engines) == {"audit"}
    assert db.engines["audit"].pool.size() == 3


def test_i4_a_subclass_with_plain_fields(environment: Callable[..., None]) -> None:
    class Settings(DatabaseSettings):
        database_url: str  # type: ignore[assignment]
        db_pool_size: int = 7
        stripe_key: str

    environment(DATABASE_URL=URL, STRIPE_KEY="x")
    settings = Settings()  # type: ignore[call-arg]
    assert settings.database_url == URL
    assert settings.engine_options() == {"pool_size": 7}
    assert str(settings.url.database) == "shop"
    assert "hunter2" not in repr(settings) + str(settings)
    environment(STRIPE_KEY="")
    with pytest.raises(ConfigurationError, match=r"^STRIPE_KEY is not set\.$"):
        Settings()  # type: ignore[call-arg]


def test_i4_a_subclass_with_a_prefix_and_a_file(environment: Callable[..., None], tmp_path: Path) -> None:
    class Settings(DatabaseSettings):
        model_config = {"env_prefix": "SHOP_", "env_file": "production.env"}

    (tmp_path / "production.env").write_text("SHOP_DB_POOL_SIZE=4\n")
    environment(SHOP_DATABASE_URL=URL, DB_POOL_SIZE="9")
    assert Settings().engine_options() == {"pool_size": 4}
    assert Settings().origins() == {"SHOP_DATABASE_URL": "environment", "SHOP_DB_POOL_SIZE": "production.env"}


def test_i4_flask_fictive_settings_names_who_set_what(
    database_url: str, environment: Callable[..., None], tmp_path: Path
) -> None:
    environment(DB_POOL_SIZE="3", DB_STATEMENT_TIMEOUT="2s", AUDIT_DB_POOL_RECYCLE="9")
    app = Flask(__name__, instance_path=str(tmp_path))
    app.config.update(
        SQLALCHEMY_DATABASE_URI=database_url,
        SQLALCHEMY_ENGINE_OPTIONS={"connect_args": {"options": "-c lock_timeout=1s"}, "max_overflow": 1},
        SQLALCHEMY_BINDS={
            "audit": {"url": with_query(database_url, options="-cstatement_timeout=4s"), "pool_timeout": 5},
        },
    )
    db = fresh_db(engine_options={"pool_use_lifo": True, "pool_pre_ping": True})
    db.init_app(app)
    output = app.test_cli_runner().invoke(args=["fictive", "settings", "--json"]).output
    found = {line["name"]: (line["value"], line["origin"]) for line in map(json.loads, output.splitlines())}
    assert found["DATABASE_URL"][1] == found["AUDIT_DATABASE_URL"][1] == "app.config"
    assert found["DB_POOL_SIZE"] == found["AUDIT_DB_POOL_SIZE"] == ("3", "environment")
    assert found["DB_MAX_OVERFLOW"] == found["AUDIT_DB_MAX_OVERFLOW"] == ("1", "app.config")
    assert found["DB_POOL_PRE_PING"] == found["AUDIT_DB_POOL_PRE_PING"] == ("True", "engine_options")
    assert found["AUDIT_DB_POOL_RECYCLE"] == ("9", "environment")
    assert found["DB_POOL_RECYCLE"] == ("-1", "default")
    assert found["AUDIT_DB_POOL_TIMEOUT"] == ("5", "app.config")
    assert found["DB_STATEMENT_TIMEOUT"] == ("2000ms", "environment")
    assert found["AUDIT_DB_STATEMENT_TIMEOUT"] == ("4s", "app.config")


# The end of the process


TERMINATE = b"X\0\0\0\4"


@pytest.fixture
def farewells(pg: postgres.Server) -> Iterator[tuple[int, list[bool]]]:
    """A port that leads to the server, and for each connection that has ended whether it said so to the server."""
    said: list[bool] = []
    threads = []
    sockets = []
    listener = socket.create_server(("127.0.0.1", 0))

    def pass_on(source: socket.socket, target: socket.socket, note: bool) -> None:
        last = b""
        while data := source.recv(65536):
            last = data
            target.sendall(data)
        if note:
            said.append(last.endswith(TERMINATE))
        with contextlib.suppress(OSError):  # it is gone already
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection((pg.host, pg.port))
            sockets.extend((client, server))
            for arguments in ((client, server, True), (server, client, False)):
                threads.append(threading.Thread(target=pass_on, args=arguments))
                threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    yield listener.getsockname()[1], said
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for thread in [accepting, *threads]:
        thread.join(10)
    for each in sockets:
        each.close()


APP = """
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import text
from fictive.flask_sqlalchemy import OptInTransactionMixin
class DB(OptInTransactionMixin, SQLAlchemy): pass
db = DB()
app = Flask(__name__)
db.init_app(app)
with app.app_context():
    db.session.execute(text("select 1"))
@app.get("/")
def view():
    return str(db.session.scalar(text("select 1")))
"""


def _url(pg: postgres.Server, port: int) -> str:
    return sa.make_url(pg.url("postgres", driver="psycopg2")).set(port=port).render_as_string(hide_password=False)


def _run(tmp_path: Path, *command: str, url: str) -> subprocess.Popen[str]:
    (tmp_path / "served.py").write_text(APP)
    root = str(Path(fictive.__file__).parents[1])
    variables = {**os.environ, "DATABASE_URL": url, "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=tmp_path,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.any_sqlalchemy
def test_i4_engines_are_disposed_at_the_end_of_the_process(
    pg: postgres.Server, farewells: tuple[int, list[bool]], tmp_path: Path
) -> None:
    port, said = farewells
    process = _run(tmp_path, "-c", "import served", url=_url(pg, port))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert said == [True]


@pytest.mark.any_sqlalchemy
def test_i4_engines_are_disposed_on_sigterm_under_gunicorn(
    pg: postgres.Server, farewells: tuple[int, list[bool]], tmp_path: Path
) -> None:
    """Those of the worker, forked from a process that had a connection, and that process's."""
    port, said = farewells
    process = _run(
        tmp_path, "-m", "gunicorn", "--preload", "--bind", "unix:web", "--workers", "1", "served:app",
        url=_url(pg, port),
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "Booting worker" in line:
                break
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "web"))
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            answer = b""
            while data := client.recv(4096):
                answer += data
        assert answer.endswith(b"1"), answer
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert said == [True, True]

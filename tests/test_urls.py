"""One rule for database URLs, wherever they come from (rule I4)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase

from fictive.databases.urls import database_url as usable
from fictive.databases.urls import installed_driver
from fictive.errors import ConfigurationError
from fictive.flask_sqlalchemy import OptInTransactionMixin
from fictive.settings import DatabaseSettings
from fictive.sqlalchemy import create_database, database_exists

PREFERRED = sa.make_url("postgresql://").get_dialect().driver
PACKAGES = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary"}
OTHER = {"psycopg": "psycopg2", "psycopg2": "psycopg"}


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """As if no drivers but these were installed."""

    def hide(*installed: str) -> None:
        for name in OTHER:
            if name not in installed:
                monkeypatch.setitem(sys.modules, name, None)

    return hide


def without_driver(url: str, scheme: str) -> str:
    text = sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return scheme + text.removeprefix("postgresql")


def _config(url: Any) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    yield "SQLALCHEMY_DATABASE_URI", {}, {"SQLALCHEMY_DATABASE_URI": url}
    yield "SQLALCHEMY_ENGINE_OPTIONS['url']", {}, {"SQLALCHEMY_ENGINE_OPTIONS": {"url": url}}
    yield "SQLALCHEMY_BINDS['x']", {}, {"SQLALCHEMY_BINDS": {"x": url}}
    yield "SQLALCHEMY_BINDS['x']", {}, {"SQLALCHEMY_BINDS": {"x": {"url": url, "pool_size": 1}}}
    yield "SQLALCHEMY_BINDS[None]", {}, {"SQLALCHEMY_BINDS": {None: {"url": url}}}
    yield "url", {"url": url}, {}


def _init(class_options: dict[str, Any], config: dict[str, Any], tmp_path: Path) -> tuple[Any, Flask]:
    class DB(OptInTransactionMixin, SQLAlchemy):
        pass

    db = DB(model_class=type("Base", (DeclarativeBase,), {}), engine_options=class_options)
    app = Flask(__name__, instance_path=str(tmp_path))
    app.config.update(config)
    db.init_app(app)
    return db, app


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if "DB_" in name or "DATABASE_URL" in name:
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "POSTGRES", " postgresql"])
def test_i4_every_way_takes_the_driver_that_is_installed(
    scheme: str, driver: str, database_url: str, only: Callable[..., None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    only(driver)
    url = without_driver(database_url, scheme)
    ways: list[tuple[dict[str, Any], dict[str, Any]]] = [(a, b) for _, a, b in _config(url)]
    monkeypatch.setenv("DATABASE_URL", url)
    for class_options, config in [*ways, ({}, {})]:
        db, app = _init(class_options, config, tmp_path)
        with app.app_context():
            for engine in db.engines.values():
                assert engine.driver == driver
                with engine.connect() as connection:
                    assert connection.scalar(sa.text("select 1")) == 1
                engine.dispose()
    assert DatabaseSettings().url.drivername == f"postgresql+{driver}"
    assert database_exists(sa.make_url(database_url).database or "", server_url=url)


@pytest.mark.parametrize("given", [str, sa.make_url])
def test_i4_the_driver_of_a_url_that_names_none(given: Callable[[str], Any], only: Callable[..., None]) -> None:
    """SQLAlchemy's own choice where it is installed, or else the other one; a driver that is named stays."""
    assert usable(given("postgresql://h/x"), "URL").drivername == f"postgresql+{PREFERRED}"
    assert usable(given(f"postgres+{OTHER[PREFERRED]}://h/x"), "URL").drivername == f"postgresql+{OTHER[PREFERRED]}"
    assert usable(given("sqlite://"), "URL").drivername == "sqlite"
    only(OTHER[PREFERRED])
    assert usable(given("postgresql://h/x"), "URL").drivername == f"postgresql+{OTHER[PREFERRED]}"
    only()
    assert installed_driver() is None
    with pytest.raises(ConfigurationError, match=r"^URL needs a driver that is not installed .*'psycopg\[binary\]'"):
        usable(given("postgresql://h/x"), "URL")


BAD = {
    "postgresql+asyncpg://u:secret@h/x": r"postgresql\+asyncpg, a driver for asyncio.*Write postgresql\+psycopg2?://",
    "postgresql+psycopg_async://u:secret@h/x": r"a driver for asyncio.*Write postgresql\+psycopg2?://",
    "sqlite+aiosqlite:///secret.db": "a driver for asyncio.*Write sqlite://",
    "mysql+aiomysql://u:secret@h/x": r"a driver for asyncio.*Write mysql\+pymysql://",
    "mongodb://u:secret@h/x": "a database or driver that SQLAlchemy does not have: mongodb",
    "postgresql+psycopg4://u:secret@h/x": r"does not have: postgresql\+psycopg4",
    "postgresql//u:secret@h/x": "is not a database URL",
    "postgresql://u:sec/ret@h:secret/x": "is not a database URL.*escaped",
    "postgresql+pygresql://u:secret@h/x": "does not have|driver is missing",
    17: "is not a database URL",
}


@pytest.mark.parametrize("url", BAD)
def test_i4_a_url_that_cannot_be_used_is_named_by_its_place(url: Any, tmp_path: Path) -> None:
    for name, class_options, config in _config(url):
        with pytest.raises(ConfigurationError, match=BAD[url]) as caught:
            _init(class_options, config, tmp_path)
        assert name in str(caught.value)
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None or isinstance(caught.value.__cause__, ImportError)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("missing", OTHER)
def test_i4_a_named_driver_that_is_missing_names_the_extra(
    missing: str, only: Callable[..., None], tmp_path: Path
) -> None:
    only(OTHER[missing])
    for name, class_options, config in _config(f"postgresql+{missing}://h/x"):
        with pytest.raises(ConfigurationError) as caught:
            _init(class_options, config, tmp_path)
        for words in (name, f"pip install {PACKAGES[missing]}", f"postgresql:// for {OTHER[missing]}"):
            assert words in str(caught.value)
    only()
    with pytest.raises(ConfigurationError, match=re.escape(f"pip install {PACKAGES[missing]}.")):
        usable(f"postgresql+{missing}://h/x", "URL")


def test_i4_a_driver_module_of_the_apps_own(driver: str, database_url: str, tmp_path: Path) -> None:
    """`module=` is SQLAlchemy's way to bring the driver along; the URL is then the app's affair."""
    module = __import__(driver)
    url = sa.make_url(database_url)
    db, app = _init({}, {"SQLALCHEMY_DATABASE_URI": url, "SQLALCHEMY_ENGINE_OPTIONS": {"module": module}}, tmp_path)
    with app.app_context():
        assert db.session.scalar(sa.text("select 1")) == 1
        db.engine.dispose()


def test_i4_a_bind_without_url(tmp_path: Path) -> None:
    for bind in ({"pool_size": 1}, {"url": ""}, "", {"url": None}):
        with pytest.raises(ConfigurationError, match=r"SQLALCHEMY_BINDS\['x'\] has no url"):
            _init({}, {"SQLALCHEMY_BINDS": {"x": bind}}, tmp_path)


def test_i4_binds_and_options_that_are_none_or_unusual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_POOL_RECYCLE", "60")
    for config in (
        {"SQLALCHEMY_BINDS": None},
        {"SQLALCHEMY_ENGINE_OPTIONS": None},
        {"SQLALCHEMY_BINDS": {1: "sqlite://"}},
    ):
        db, app = _init({}, {"SQLALCHEMY_DATABASE_URI": "sqlite:///x.db", **config}, tmp_path)
        with app.app_context():
            assert db.session.scalar(sa.text("select 1")) == 1
            for engine in db.engines.values():
                engine.dispose()
        shown = app.test_cli_runner().invoke(args=["fictive", "settings"])
        assert shown.exit_code == 0, shown.output
    for name in ("SQLALCHEMY_BINDS", "SQLALCHEMY_ENGINE_OPTIONS"):
        with pytest.raises(ConfigurationError, match=f"{name} = .*expected a dictionary"):
            _init({}, {"SQLALCHEMY_DATABASE_URI": "sqlite://", name: ["x"]}, tmp_path)


def test_h1_a_server_url_may_name_any_driver(driver: str, database_url: str, only: Callable[..., None]) -> None:
    """A server can be administered by whatever driver is there, so that one URL serves an asyncio application too."""
    only(driver)
    url = sa.make_url(database_url)
    for name in ("psycopg", "psycopg2", "pg8000", "asyncpg", "psycopg_async"):
        assert database_exists(url.database or "", server_url=url.set(drivername=f"postgresql+{name}"))
    with pytest.raises(TypeError, match="DATABASE_URL"):
        create_database("x", server_url=None)  # type: ignore[arg-type]

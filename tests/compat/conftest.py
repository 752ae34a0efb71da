"""The packages people already have, run on plain Flask-SQLAlchemy and on fictive alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from pytest_postgresql.janitor import DatabaseJanitor

from fictive.testing import postgres
from tests.compat.ways import Way
from tests.conftest import settled


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What other packages do is not another on SQLAlchemy's oldest version."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.any_sqlalchemy)


@pytest.fixture(params=["plain", "begin", "commit"])
def way(request: pytest.FixtureRequest) -> Way:
    return Way(request.param)


@pytest.fixture(scope="session")
def template(pg: postgres.Server) -> Iterator[DatabaseJanitor]:
    """An empty one: the packages here create their tables themselves, and look which are there."""
    name = f"fictive_compat_{os.environ.get('PYTEST_XDIST_WORKER', 'main')}_{os.getpid()}_template"
    janitor = DatabaseJanitor(
        user=pg.user, host=pg.host, port=pg.port, dbname=name, password=pg.password, as_template=True
    )
    with janitor:
        yield janitor


@pytest.fixture
def other_database_url(pg: postgres.Server, template: DatabaseJanitor, driver: str) -> Iterator[str]:
    """A second database, for a bind key."""
    with DatabaseJanitor(
        user=pg.user,
        host=pg.host,
        port=pg.port,
        dbname=template.dbname.replace("_template", "_other"),
        template_dbname=template.dbname,
        password=pg.password,
    ) as janitor:
        yield pg.url(janitor.dbname, driver=driver)


@pytest.fixture
def app_of(
    way: Way, database_url: str, backends: Callable[[], list[str]], tmp_path: Path
) -> Iterator[Callable[..., Flask]]:
    """`app_of(db, **config)`: an app on this test's database, with `db` on it unless that is None.

    After the test no connection may be out of its pool, and no backend in a transaction.
    """
    made: list[Flask] = []

    def make(db: SQLAlchemy | None, **config: Any) -> Flask:
        app = Flask("compat_app", instance_path=str(tmp_path))
        app.config.update(SQLALCHEMY_DATABASE_URI=database_url, SECRET_KEY="not secret", TESTING=True)
        app.config.update(way.config)
        app.config.update(config)
        if db is not None:
            db.init_app(app)
        made.append(app)
        return app

    yield make
    engines = []
    for app in made:
        with app.app_context():
            if "sqlalchemy" in app.extensions:
                engines += app.extensions["sqlalchemy"].engines.values()
    left_out = [engine.pool.checkedout() for engine in engines]
    states = settled(backends)
    for engine in engines:
        engine.dispose()
    assert not any(left_out), "connections not returned to the pool"
    assert not [state for state in states if state != "idle"], states

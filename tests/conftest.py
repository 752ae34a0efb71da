"""Fixtures for all tests: a server for the run, a database for each test, and the wire between.

`--drivers` (comma list of psycopg2, psycopg, sqlite; default all) narrows a run to some drivers.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask, has_app_context
from pytest_postgresql.janitor import DatabaseJanitor

from fictive.testing import postgres
from fictive.testing.wire import Wire
from tests.docs_runner import leave_app_contexts
from tests.fix_nodes import node_database, nodes
from tests.fix_pooler import mark_exceptions, pooler
from tests.fix_sandbox import Exceptions, Sandboxes, SandboxWire
from tests.fresh_database import PATIENCE, FreshDatabase
from tests.models import opt_in

__all__ = ["node_database", "nodes", "pooler"]  # fixtures

DRIVERS = ("psycopg2", "psycopg")
EXCEPTIONS = pytest.StashKey[Exceptions]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--drivers", default="psycopg2,psycopg,sqlite", help="those whose tests are run; default: %(default)s"
    )
    parser.addoption(
        "--programs", type=int, default=360, help="how many programs of transactions; default: %(default)s"
    )
    parser.addoption(
        "--pooler", action="store_true", help="go through a PgBouncer with two server connections, wherever it can be"
    )
    parser.addoption("--sandbox", action="store_true", help="run the tests that have an app, each in a sandbox")
    parser.addoption("--all-cells", action="store_true", help="the whole matrix of types, not a sample (some hours)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what belongs to a driver that was not chosen."""
    if config.getoption("pooler"):
        mark_exceptions(items, whole_files=not any("::" in each for each in config.args))
    chosen = config.getoption("drivers").split(",")

    def wanted(item: pytest.Item) -> bool:
        driver = getattr(item, "callspec", None) and item.callspec.params.get("driver")  # type: ignore[attr-defined]
        return driver is None or driver in chosen

    unwanted = [item for item in items if not wanted(item)]
    if unwanted:
        config.hook.pytest_deselected(items=unwanted)
        items[:] = [item for item in items if wanted(item)]
    if exceptions := config.stash.get(EXCEPTIONS, None):
        exceptions.choose(config, items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Take what earlier tests made out of the garbage collector's sight: one that collects is 10 times as fast."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
    gc.collect()  # else engines of tests are still there at exit, to be disposed of when the logs are closed


def pytest_configure(config: pytest.Config) -> None:
    """Start one server for all workers of a run; a run without workers starts it when a test needs it."""
    if config.getoption("pooler"):
        sa.event.listen(sa.Pool, "connect", _prepare_nothing)
    if config.getoption("--sandbox"):
        exceptions = config.stash[EXCEPTIONS] = Exceptions()
        exceptions.is_whole = not (config.option.keyword or config.option.markexpr or "::" in "".join(config.args))
        if not hasattr(config, "workerinput"):
            config.pluginmanager.register(exceptions)
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        server = contextlib.ExitStack()
        config.add_cleanup(server.close)
        server.enter_context(postgres.server(for_children=True))


@pytest.fixture(scope="session")
def pg() -> Iterator[postgres.Server]:
    """The server that every test of this run, and every worker, shares."""
    with postgres.server() as server:
        yield server


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """The driver under test; `@pytest.mark.parametrize("driver", [...], indirect=True)` for others."""
    return str(request.param)


@pytest.fixture(scope="session")
def template(pg: postgres.Server, suffix: str = "") -> Iterator[DatabaseJanitor]:
    """The database that each test's own is cloned from: the tables of `tests.models`, empty."""
    name = f"fictive_{os.environ.get('PYTEST_XDIST_WORKER', 'main')}_{os.getpid()}"
    janitor = _janitor(pg, f"{name}{suffix}_template", as_template=True)
    with janitor:
        engine = sa.create_engine(pg.url(janitor.dbname, driver="psycopg"), poolclass=sa.NullPool)
        opt_in.db.metadata.create_all(engine)
        yield janitor


@pytest.fixture(autouse=True)
def nothing_of_the_process_is_left() -> Iterator[None]:
    """Threads that a test starts have ended when it and its fixtures have, and so has its app context."""
    before = set(threading.enumerate())
    yield
    left = threads_left(before)
    in_context = has_app_context()
    open_still = [connection for connection in sqlite_connections if _is_open(connection)]
    sqlite_connections.clear()
    leave_app_contexts()  # else all later tests would run in it
    assert not in_context, "an app context was left behind"
    assert not left, f"threads left behind: {left}"
    # Python 3.13 warns of them, but in whatever test the garbage is collected.
    assert not open_still, f"connections to SQLite left open, dispose of their engine: {open_still}"


sqlite_connections: list[sqlite3.Connection] = []
"""Those that the test under way opened through SQLAlchemy."""


@sa.event.listens_for(sa.Pool, "connect")
def _remember(dbapi: Any, record: Any) -> None:
    if isinstance(dbapi, sqlite3.Connection):
        sqlite_connections.append(dbapi)


def _prepare_nothing(dbapi: Any, record: Any) -> None:
    """As the pooler's documentation asks of psycopg, also for engines that fictive does not know of."""
    if hasattr(dbapi, "prepare_threshold"):
        dbapi.prepare_threshold = None


def _is_open(connection: sqlite3.Connection) -> bool:
    try:
        return connection.total_changes >= 0
    except sqlite3.ProgrammingError:
        return False


def threads_left(before: set[threading.Thread], patience: float = PATIENCE) -> list[threading.Thread]:
    """Threads that are not of `before`; those that are ending get a moment."""
    started = [thread for thread in threading.enumerate() if thread not in before]
    for thread in started:
        thread.join(patience)
    return [thread for thread in started if thread.is_alive()]


@pytest.fixture(scope="session")
def databases() -> Iterator[dict[str, FreshDatabase]]:
    """This worker's databases, by the template that they are clones of."""
    kept: dict[str, FreshDatabase] = {}
    yield kept
    for database in kept.values():
        database.drop()


@pytest.fixture
def database(
    pg: postgres.Server, template: DatabaseJanitor, databases: dict[str, FreshDatabase]
) -> Iterator[FreshDatabase]:
    """A database that is like new, and of which no test leaves a lock, a transaction or a listener."""
    database = databases.setdefault(template.dbname, FreshDatabase(pg, template))
    database.ensure()
    yield database
    left_behind = database.left_behind()
    database.renew()
    assert not left_behind, left_behind


@pytest.fixture
def database_name(database: FreshDatabase) -> str:
    """Its name."""
    return database.name


@pytest.fixture
def database_url(pg: postgres.Server, database_name: str, driver: str, request: pytest.FixtureRequest) -> str:
    """Its URL, with the driver under test."""
    url = pg.url(database_name, driver=driver)
    return request.getfixturevalue("pooler").url(url) if request.config.getoption("pooler") else url


@pytest.fixture
def sandboxes(request: pytest.FixtureRequest) -> Sandboxes | None:
    """What `put_in_sandbox` has made; None without `--sandbox`."""
    return Sandboxes() if request.config.getoption("--sandbox") else None


@pytest.fixture
def put_in_sandbox(sandboxes: Sandboxes | None) -> Iterator[Callable[[Iterable[sa.Engine]], None]]:
    """`put_in_sandbox(engines)`: with `--sandbox`, until the test ends. Only tests with this fixture are run then."""
    yield lambda engines: sandboxes.put_around(engines) if sandboxes is not None else None
    if sandboxes is not None:
        sandboxes.close()


@pytest.fixture
def wire(pg: postgres.Server, request: pytest.FixtureRequest, sandboxes: Sandboxes | None) -> Iterator[Wire]:
    """The proxy through which what is tested connects."""
    upstream = request.getfixturevalue("pooler") if request.config.getoption("pooler") else pg
    with (Wire if sandboxes is None else SandboxWire)(upstream.host, upstream.port) as wire:
        if isinstance(wire, SandboxWire) and sandboxes is not None:
            wire.sandboxes = sandboxes
        yield wire


@pytest.fixture
def look(database: FreshDatabase, sandboxes: Sandboxes | None) -> Callable[..., list[Any]]:
    """What another connection sees: `look("select ...", *args)` returns rows, or values where there is one column."""

    def run(query: str, *args: Any) -> list[Any]:
        if sandboxes is not None and sandboxes.boxes:
            cursor = sandboxes.look(query, args or None)
        else:
            cursor = database.connection.execute(query, args or None)
        if cursor.description is None:
            return []
        rows = cursor.fetchall()
        return [row[0] for row in rows] if cursor.description and len(cursor.description) == 1 else rows

    return run


@pytest.fixture
def backends(look: Callable[..., list[Any]]) -> Callable[[], list[str]]:
    """The states of this database's other backends, as `pg_stat_activity` has them."""
    return lambda: look(
        "select state from pg_stat_activity"
        " where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'"
    )


def settled(backends: Callable[[], list[str]]) -> list[str]:
    """Their states once all are idle, or after a while: one that lost its client goes in its own time."""
    deadline = time.monotonic() + PATIENCE
    while (states := backends()) != ["idle"] * len(states) and time.monotonic() < deadline:
        time.sleep(0.01)
    return states


MakeApp = Callable[..., Flask]


@pytest.fixture
def make_app(
    database_url: str,
    wire: Wire,
    backends: Callable[[], list[str]],
    tmp_path: Path,
    sandboxes: Sandboxes | None,
    request: pytest.FixtureRequest,
    put_in_sandbox: Callable[[Iterable[sa.Engine]], None],
) -> Iterator[MakeApp]:
    """`make_app(db, **config)`: an app on this test's database, through the wire, with a warm pool of one connection.

    After the test no connection may be out of the pool, and no backend in a transaction.
    """
    made: list[tuple[Any, Flask]] = []

    def make(db: Any = opt_in.db, **config: Any) -> Flask:
        app = Flask(__name__, instance_path=str(tmp_path))
        app.config["SQLALCHEMY_DATABASE_URI"] = wire.url(database_url)
        if request.config.getoption("pooler"):
            app.config["FICTIVE_POOLER"] = "transaction"
        app.config.update(config)
        db.init_app(app)
        made.append((db, app))
        with app.app_context():
            for engine in db.engines.values():
                engine.connect().close()  # SQLAlchemy asks the server a few things the first time
            put_in_sandbox(db.engines.values())
        return app

    yield make
    if sandboxes is not None:
        sandboxes.close()
    left_out = {}
    for db, app in made:
        with app.app_context():
            for key, engine in db.engines.items():
                left_out[key] = engine.pool.checkedout() if hasattr(engine.pool, "checkedout") else 0
    states = settled(backends)
    for db, app in made:
        with app.app_context():
            for engine in db.engines.values():
                engine.dispose()
    assert not any(left_out.values()), f"connections not returned to the pool: {left_out}"
    assert not [state for state in states if state != "idle"], states


@pytest.fixture(params=["opt-in", "plain"])
def session(request: pytest.FixtureRequest, app: Flask) -> Iterator[Any]:
    """The app's session, and a plain one on the same engine."""
    if request.param == "opt-in":
        yield opt_in.db.session
    else:
        with sa_orm.Session(opt_in.db.engine) as session:
            yield session


@pytest.fixture
def app(make_app: MakeApp) -> Iterator[Flask]:
    """An app of `tests.models.db` with default settings, its context pushed."""
    app = make_app()
    with app.app_context():
        yield app


@pytest.fixture
def lite() -> Iterator[sa.Engine]:
    """An empty SQLite database in memory, where another database than PostgreSQL is all that matters."""
    engine = sa.create_engine("sqlite://")
    yield engine
    engine.dispose()


def _janitor(pg: postgres.Server, name: str, **options: Any) -> DatabaseJanitor:
    return DatabaseJanitor(user=pg.user, host=pg.host, port=pg.port, dbname=name, password=pg.password, **options)

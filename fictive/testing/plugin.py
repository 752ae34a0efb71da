"""The pytest plugin `fictive`: a database for the run, and a sandbox for each test. See the page "Testing".

Nothing of fictive is imported, and no server is started, before a test asks for one of the fixtures.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sqlalchemy import URL

    from .sandbox import Sandbox
    from .shared_connection import Recording

_BOX = pytest.StashKey[Any]()
_SERVER = pytest.StashKey[str]()
_RUN = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fictive", "databases of tests")
    for name, options in (
        ("--db-url", {"help": "URL of a PostgreSQL server on which databases for tests may be made and dropped"}),
        ("--reuse-db", {"action": "store_true", "help": "keep the databases, and use them again if the models did not "
                        "change"}),
        ("--db-log", {"action": "store_true", "help": "show the statements of a failed test"}),
    ):  # fmt: skip
        with contextlib.suppress(ValueError):  # another plugin, such as pytest-django, has an option of that name
            group.addoption(name, **options)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    recording = item.stash.get(_BOX, None)
    if recording is not None and report.when == "call" and report.failed:
        report.sections.append(("statements of this test", _listed(recording)))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # pytest-xdist's, on its way to the controller
        session.config.workeroutput["fictive_server"] = session.config.stash.get(_SERVER, None)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    if told := getattr(node, "workeroutput", {}).get("fictive_server"):
        node.config.stash[_SERVER] = told


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Which server it was: it is not known before a test needs it."""
    if told := config.stash.get(_SERVER, None):
        terminalreporter.write_line(f"fictive: {told}")


# -- the database ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def db_server(request: pytest.FixtureRequest) -> Iterator[URL]:
    """The URL of the server: `--db-url`, `FICTIVE_TEST_DATABASE_URL`, or an embedded one, started now."""
    from ..databases.urls import database_url
    from . import templates

    given = request.config.getoption("--db-url", None)
    with contextlib.nullcontext(given) if given else templates.server_url() as text:
        url = database_url(text, "--db-url" if given else "the server's URL")
        request.config.stash[_SERVER] = templates.described(url)
        yield url


@pytest.fixture(scope="session")
def db_url(request: pytest.FixtureRequest, db_server: URL) -> Iterator[str]:
    """The URL of this worker's database, which is empty until `db_template` has been asked for."""
    from ..databases.create import create_database, drop_database
    from . import templates

    project = _project(request.config)
    reuses = request.config.getoption("--reuse-db", False)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    name = f"fictive_test_{project}_" + (worker if reuses else f"{_run(request.config)}_{worker}")
    mark = f"fictive_run_{project}_" + (worker if reuses else _run(request.config))
    with templates.marked(db_server, mark) as is_alone:
        if reuses and not is_alone:
            raise pytest.UsageError(
                f"Another run with --reuse-db uses the database {name}. Wait for its end, or leave out --reuse-db."
            )
        templates.drop_abandoned(db_server, project)
        create_database(name, server_url=db_server, exist_ok=reuses)
        try:
            yield db_server.set(database=name).render_as_string(hide_password=False)
        finally:
            if not reuses:
                drop_database(name, server_url=db_server, force=True, missing_ok=True)


@pytest.fixture(scope="session")
def db_app(db_url: str) -> Any:
    """The Flask app under test, or an engine: override it in your conftest.py."""
    raise pytest.UsageError(
        "fictive's fixtures need your app. Put a fixture of session scope in conftest.py: "
        "def db_app(db_url): return create_app(db_url)"
    )


@pytest.fixture(scope="session")
def db_schema(db_app: Any) -> Any:
    """How the tables are made: None for `create_all()` of the app's models.

    Override it to return a MetaData, a Config of Alembic, or a function that is called with the app, in its context:
    `lambda app: flask_migrate.upgrade()`.
    """
    return None


@pytest.fixture(scope="session")
def db_template(
    request: pytest.FixtureRequest, db_app: Any, db_schema: Any, db_url: str, db_server: URL
) -> Iterator[str]:
    """This worker's database with its tables: cloned from a template that is made once. Gives the template's name.

    With `--reuse-db` it is kept, and used again until the tables of the models change, or the migrations of Alembic or
    Flask-Migrate. What any other function makes cannot be compared, and is made anew.
    """
    import sqlalchemy as sa

    from ..databases.create import create_database, database_exists, drop_database
    from . import templates

    prefix = f"fictive_template_{_project(request.config)}_"
    reuses = request.config.getoption("--reuse-db", False)
    content = templates.content_of(db_app, db_schema) if reuses else None
    keeps = content is not None
    if content is not None:
        prefix += "kept_"
        name = prefix + hashlib.sha256(content.encode()).hexdigest()[:16]
    else:
        name = prefix + _run(request.config)
    database = sa.make_url(db_url).database
    assert database is not None
    with templates.one_at_a_time(db_server, name):
        templates.dispose(db_app)
        if reuses or database_exists(name, server_url=db_server):
            drop_database(database, server_url=db_server, force=True, missing_ok=True)
        if database_exists(name, server_url=db_server):
            create_database(database, server_url=db_server, template=name)
        else:
            create_database(database, server_url=db_server, exist_ok=True)
            templates.make_tables(db_app, db_schema, db_url)
            templates.dispose(db_app)
            if keeps:
                templates.drop_others(db_server, prefix)
            templates.end_sessions(db_server, database)
            create_database(name, server_url=db_server, template=database)
    yield name
    templates.dispose(db_app)
    if not keeps:
        with templates.one_at_a_time(db_server, name):  # a worker that is late makes another
            drop_database(name, server_url=db_server, force=True, missing_ok=True)


# -- a test ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def db_sandbox(request: pytest.FixtureRequest, db_app: Any, db_template: str) -> Iterator[Sandbox]:
    """The test runs in a sandbox: all that the app does is rolled back. No app context is pushed."""
    from .sandbox import engines_of, sandbox

    with sandbox(*engines_of(db_app)) as box:
        if request.config.getoption("--db-log", False):
            with box.record() as recording:
                request.node.stash[_BOX] = recording
                yield box
        else:
            yield box


@pytest.fixture
def db_clean(db_app: Any, db_template: str) -> Iterator[None]:
    """The test runs without a sandbox, and all tables are emptied after it."""
    from ..databases.cleanup import cleanup_tables
    from ..session.session import OptInSession

    yield
    if hasattr(db_app, "app_context"):
        with db_app.app_context():
            db = db_app.extensions["sqlalchemy"]
            binds = {
                table: db.engines[table.metadata.info.get("bind_key")]
                for metadata in db.metadatas.values()
                for table in metadata.tables.values()
            }
            with OptInSession(binds=binds) as session:
                for metadata in db.metadatas.values():
                    cleanup_tables(session, metadata)
        return
    import sqlalchemy as sa

    metadata = sa.MetaData()
    metadata.reflect(db_app)
    with OptInSession(db_app) as session:
        cleanup_tables(session, metadata)


@pytest.fixture
def db_hooks() -> Callable[[], contextlib.AbstractContextManager[list[Callable[[], object]]]]:
    """`with db_hooks() as hooks:` hooks of transactions that end in the block are not run, but put into the list."""
    from ..session.hooks import captured

    @contextlib.contextmanager
    def capture() -> Iterator[list[Callable[[], object]]]:
        found: list[Callable[[], object]] = []
        captured.append(found)
        try:
            yield found
        finally:
            captured[:] = [each for each in captured if each is not found]

    return capture


@pytest.fixture
def assert_statements(db_sandbox: Sandbox) -> Callable[..., contextlib.AbstractContextManager[Recording]]:
    """`with assert_statements(2):` the block sends exactly 2 statements; `at_most=True`: 2 or fewer."""
    return lambda n, *, at_most=False: _asserting(db_sandbox, n, "statements", at_most)


@pytest.fixture
def assert_round_trips(db_sandbox: Sandbox) -> Callable[..., contextlib.AbstractContextManager[Recording]]:
    """As `assert_statements`, of round trips as they are without the sandbox: COMMIT counts, and BEGIN where it does
    not travel with a statement."""
    return lambda n, *, at_most=False: _asserting(db_sandbox, n, "round trips", at_most)


@contextlib.contextmanager
def _asserting(box: Sandbox, expected: int, what: str, at_most: bool) -> Iterator[Recording]:
    __tracebackhide__ = True
    with box.record() as recording:
        yield recording
    found = recording.round_trips if what == "round trips" else len(recording.statements)
    if found > expected or (found < expected and not at_most):
        sent = "\n".join(f"    {text}" for text in recording.messages) if what == "round trips" else _listed(recording)
        pytest.fail(f"{found} {what}, expected {'at most ' if at_most else ''}{expected}:\n{sent}", pytrace=False)


def _listed(recording: Recording) -> str:
    return "\n".join(
        f"    {' '.join(text.split())}  -- {place}"
        for text, place in zip(recording.statements, recording.places, strict=True)
    )


# -- the app ---------------------------------------------------------------------------------------------------------


def _run(config: pytest.Config) -> str:
    """The number of this run, which all of its workers know."""
    from . import templates

    run = os.environ.get("PYTEST_XDIST_TESTRUNUID") or config.stash.setdefault(_RUN, uuid.uuid4().hex)
    return hashlib.sha256(run.encode()).hexdigest()[: templates.RUN_DIGITS]


def _project(config: pytest.Config) -> str:
    return hashlib.sha256(str(config.rootpath).encode()).hexdigest()[:8]

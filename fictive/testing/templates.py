"""For the pytest plugin: the server of a run, and a database with the app's tables, which is made once and copied."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from ..databases.create import drop_database
from ..errors import DatabaseInUse
from . import postgres
from .places import URL_VARIABLE
from .sandbox import engines_of

__all__ = [
    "RUN_DIGITS", "content_of", "described", "dispose", "drop_abandoned", "drop_others", "end_sessions", "make_tables",
    "marked", "one_at_a_time", "server_url",
]  # fmt: skip


RUN_DIGITS = 12
"""Of the number of a run, in the names of its databases."""


# -- the server ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server_url() -> Iterator[str]:
    """That of `FICTIVE_TEST_DATABASE_URL`, or of an embedded server, which all pytest-xdist workers of a run share.

    The first worker that needs it starts it, and ends it when no other needs it any more: each holds a lock on a file,
    which the kernel drops for a worker that is killed.
    """
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None or os.environ.get(URL_VARIABLE):
        with postgres.server() as server:
            yield server.url()
        return
    path = Path(tempfile.gettempdir()) / f"fictive-run-{os.geteuid()}-{run}"
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+") as file:
        url = ""
        for lock in (fcntl.LOCK_SH, fcntl.LOCK_EX):
            fcntl.flock(file, lock)
            file.seek(0)
            if url := file.read():
                break
        if url:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield url
            return
        with postgres.server() as server:
            file.write(server.url())
            file.flush()
            fcntl.flock(file, fcntl.LOCK_SH)
            try:
                yield server.url()
            finally:
                file.truncate(0)  # a worker that comes late starts another
                fcntl.flock(file, fcntl.LOCK_EX)
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def one_at_a_time(server: sa.URL, name: str) -> Iterator[None]:
    """Workers of one run make the template once."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    engine = sa.create_engine(server, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.select(sa.func.pg_advisory_lock(key)))
        yield


@contextlib.contextmanager
def marked(server: sa.URL, run: str) -> Iterator[bool]:
    """A connection whose application_name tells other runs that this one goes on, and so uses its databases. Gives
    whether it is the only one of this name."""
    engine = sa.create_engine(server, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.select(sa.func.set_config("application_name", run, False)))
        yield connection.scalar(sa.text(f"SELECT count(*) FROM ({_RUNS}) AS runs"), {"text": run}) == 1


def drop_abandoned(server: sa.URL, project: str) -> None:
    """Drop what is left of runs that were killed: databases that carry the number of a run which has no connection."""
    pattern = f"^fictive_(test|template)_{project}_[0-9a-f]{{{RUN_DIGITS}}}(_|$)"
    found = _ask(server, "SELECT datname FROM pg_catalog.pg_database WHERE datname ~ :text", pattern)
    prefix = f"fictive_run_{project}_"
    going_on = {
        run.removeprefix(prefix) for run in _ask(server, _RUNS, prefix)
    }  # after the databases: it was there first
    for name in found:
        if name.split("_")[3] not in going_on:
            with contextlib.suppress(DatabaseInUse):  # that run has lost its connection
                drop_database(name, server_url=server, missing_ok=True)


_RUNS = "SELECT application_name FROM pg_catalog.pg_stat_activity WHERE starts_with(application_name, :text)"


def drop_others(server: sa.URL, prefix: str) -> None:
    """Drop the templates of this project that are out of date."""
    names = _ask(server, "SELECT datname FROM pg_catalog.pg_database WHERE starts_with(datname, :text)", prefix)
    for name in names:
        drop_database(name, server_url=server, force=True, missing_ok=True)


def end_sessions(server: sa.URL, database: str) -> None:
    """What made the tables may have left connections open, such as the engine of an `env.py`."""
    _ask(server, "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :text", database)


def described(server: sa.URL) -> str:
    """`"PostgreSQL 17.2 on localhost:5432"`."""
    engine = sa.create_engine(server, poolclass=sa.NullPool)
    with engine.connect() as connection:
        version = connection.scalar(sa.text("SHOW server_version"))
    return f"PostgreSQL {version} on {server.host or 'a socket'}:{server.port or 5432}"


def _ask(server: sa.URL, query: str, text: str) -> list[Any]:
    engine = sa.create_engine(server, poolclass=sa.NullPool)
    with engine.connect() as connection:
        return list(connection.scalars(sa.text(query), {"text": text}))


# -- the tables ------------------------------------------------------------------------------------------------------


def make_tables(app: Any, schema: Any, url: str) -> None:
    """Make what the fixture `db_schema` says, in the app's context."""
    with app.app_context() if hasattr(app, "app_context") else contextlib.nullcontext():
        if callable(schema):
            schema(app)
        elif _is_alembic(schema):
            from alembic import command

            schema.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
            command.upgrade(schema, "heads")
        elif schema is None and hasattr(app, "app_context"):
            app.extensions["sqlalchemy"].create_all()
        elif schema is not None:
            schema.create_all(engines_of(app)[0])


def content_of(app: Any, schema: Any) -> str | None:
    """What tells whether the tables have changed: the migrations where there are some, else the text of the tables.

    None for a function that makes tables in a way of its own.
    """
    if _is_alembic(schema):
        return _migrations(schema)
    if callable(schema):
        flask_migrate = getattr(app, "extensions", {}).get("migrate")
        if flask_migrate is None:
            return None
        with app.app_context():
            return _migrations(flask_migrate.migrate.get_config())
    if schema is not None:
        return _ddl(schema)
    if hasattr(app, "app_context"):
        return "\n".join(map(_ddl, app.extensions["sqlalchemy"].metadatas.values()))
    return ""


def dispose(app: Any) -> None:
    for engine in engines_of(app):
        engine.dispose()


def _is_alembic(schema: Any) -> bool:
    return hasattr(schema, "get_main_option")


def _migrations(config: Any) -> str:
    """The heads, and the text of all migrations: one that was edited is another one."""
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory.from_config(config)
    texts = [Path(script.path).read_text() for script in scripts.walk_revisions()]
    return "\n".join([*sorted(scripts.get_heads()), *sorted(texts)])


def _ddl(metadata: sa.MetaData) -> str:
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    found: list[str] = []
    engine = sa.create_mock_engine(
        "postgresql://", lambda element, *_, **__: found.append(str(element.compile(dialect=dialect)))
    )
    metadata.create_all(engine, checkfirst=False)
    return "\n".join(found)

"""Making and dropping databases (PostgreSQL documentation, "Managing Databases")."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import ExecutableDDLElement

from ..config import flag
from ..drivers import sqlstate
from ..errors import ConfigurationError, DatabaseInUse, UnsupportedDialect
from ..other_names import also_named
from .urls import database_url

__all__ = ["create_database", "database_exists", "drop_database"]

# SQLSTATEs (PostgreSQL documentation, "PostgreSQL Error Codes")
_DUPLICATE_DATABASE = "42P04"
_UNIQUE_VIOLATION = "23505"
_INVALID_CATALOG_NAME = "3D000"
_OBJECT_IN_USE = "55006"

LONGEST_NAME = 63
"""Bytes; PostgreSQL cuts longer names off (PostgreSQL documentation, "Identifiers and Key Words")."""

MAINTENANCE_DATABASE = "postgres"
_MOST_SESSIONS = 10


class CreateDatabase(ExecutableDDLElement):
    """CREATE DATABASE, names and texts quoted by the dialect."""

    def __init__(self, name: str, *, template: str | None, owner: str | None, encoding: str | None) -> None:
        self.name, self.template, self.owner, self.encoding = name, template, owner, encoding


@compiles(CreateDatabase, "postgresql")
def _compile_create(element: CreateDatabase, compiler: Any, **kwargs: Any) -> str:
    quote = compiler.preparer.quote_identifier
    parts = [f"CREATE DATABASE {quote(element.name)}"]
    if element.template is not None:
        parts.append(f"TEMPLATE {quote(element.template)}")
    if element.owner is not None:
        parts.append(f"OWNER {quote(element.owner)}")
    if element.encoding is not None:
        parts.append(f"ENCODING {compiler.sql_compiler.render_literal_value(element.encoding, sa.String())}")
    return " ".join(parts)


class DropDatabase(ExecutableDDLElement):
    """DROP DATABASE, the name quoted by the dialect."""

    def __init__(self, name: str, *, force: bool) -> None:
        self.name, self.force = name, force


@compiles(DropDatabase, "postgresql")
def _compile_drop(element: DropDatabase, compiler: Any, **kwargs: Any) -> str:
    return (
        f"DROP DATABASE {compiler.preparer.quote_identifier(element.name)}{' WITH (FORCE)' if element.force else ''}"
    )


@also_named(db_name="name")
def create_database(
    name: str,
    *,
    server_url: str | sa.URL,
    template: str | None = None,
    owner: str | None = None,
    encoding: str | None = None,
    exist_ok: bool = False,
) -> bool:
    """Make the database `name`; returns whether it was made, which is False only with `exist_ok`.

    `server_url` is a URL of the server: of any database on it, of the one to be made too, which may be what the
    application is configured with; the driver may be any that SQLAlchemy knows, and one that is installed is used. The
    connection is closed before the call returns. `template` is the database to copy, `owner` a role, `encoding` a
    name such as `"UTF8"`; what is left out is the server's default.

    With `exist_ok` a database that is there already is left as it is, and of several callers at once each succeeds.
    Without it that raises SQLAlchemy's `ProgrammingError` ("already exists"). A template that others are connected
    to raises `DatabaseInUse`, naming them, after the 5 seconds that PostgreSQL waits for them. Other errors of the
    server's (a role or a template that does not exist, no right to make databases) come out as they are. Names that
    PostgreSQL would cut off or refuse raise at the call, and so does a malformed URL. Only for PostgreSQL.
    """
    for value, what in ((name, "name"), (template, "template"), (owner, "owner"), (encoding, "encoding")):
        if value is not None or what == "name":
            _check_name(value, what)
    flag(exist_ok, "exist_ok")
    with _connected(server_url, name) as connection:
        if exist_ok and _exists(connection, name):
            return False
        statement = CreateDatabase(name, template=template, owner=owner, encoding=encoding)
        try:
            connection.execute(statement)
        except sa.exc.DBAPIError as error:
            state = sqlstate(error)
            # of two at once, the second finds the first one's row in the catalogue's index
            if state in (_DUPLICATE_DATABASE, _UNIQUE_VIOLATION) and exist_ok and _exists(connection, name):
                return False
            if state == _OBJECT_IN_USE:
                used = template if template is not None else "template1"
                raise _in_use(connection, used, f"The template {used!r} cannot be copied", "", error) from error
            raise
    return True


@also_named(db_name="name")
def drop_database(name: str, *, server_url: str | sa.URL, force: bool = False, missing_ok: bool = False) -> bool:
    """Drop the database `name` with all that is in it; returns whether it was there.

    `force` ends the sessions that are connected to it (PostgreSQL 13 or newer). Without it they raise
    `DatabaseInUse`, naming them, after the 5 seconds that PostgreSQL waits for them. A database that is not there
    raises SQLAlchemy's `ProgrammingError`, unless `missing_ok`. `server_url` as for `create_database`.
    """
    _check_name(name, "name")
    statement = DropDatabase(name, force=flag(force, "force"))
    flag(missing_ok, "missing_ok")
    with _connected(server_url, name) as connection:
        try:
            connection.execute(statement)
        except sa.exc.DBAPIError as error:
            state = sqlstate(error)
            if state == _INVALID_CATALOG_NAME and missing_ok:
                return False
            if state == _OBJECT_IN_USE:
                what, remedy = f"The database {name!r} cannot be dropped", " force=True ends their sessions."
                raise _in_use(connection, name, what, remedy, error) from error
            raise
    return True


@also_named(db_name="name")
def database_exists(name: str, *, server_url: str | sa.URL) -> bool:
    """Whether there is a database `name`. `server_url` as for `create_database`."""
    _check_name(name, "name")
    with _connected(server_url, name) as connection:
        return _exists(connection, name)


def _exists(connection: sa.Connection, name: str) -> bool:
    names = sa.table("pg_database", sa.column("datname"), schema="pg_catalog")
    query = sa.select(sa.literal(1)).select_from(names).where(names.c.datname == sa.cast(name, sa.Text))
    return connection.scalar(query) is not None


def _in_use(connection: sa.Connection, name: str, what: str, remedy: str, error: sa.exc.DBAPIError) -> DatabaseInUse:
    activity = sa.table(
        "pg_stat_activity",
        *map(sa.column, ("pid", "usename", "application_name", "state", "datname")),
        sa.column("client_addr", sa.Text),
        schema="pg_catalog",
    )
    query = sa.select(
        activity.c.pid, activity.c.usename, activity.c.application_name, activity.c.state,
        sa.cast(activity.c.client_addr, sa.Text),
    ).where(activity.c.datname == sa.cast(name, sa.Text)).order_by(activity.c.pid).limit(_MOST_SESSIONS)  # fmt: skip
    found = [f"pid {pid} ({', '.join(filter(None, rest))})" for pid, *rest in connection.execute(query)]
    if not found:  # a prepared transaction, say; or they are gone by now
        told = getattr(getattr(error.orig, "diag", None), "message_detail", None) or str(error.orig)
        return DatabaseInUse(f"{what} while it is in use: {told}", error)
    return DatabaseInUse(f"{what} while others are connected to it: {'; '.join(found)}.{remedy}", error)


def _check_name(name: object, what: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{what} = {name!r}: expected text.")
    if not name or "\0" in name:
        raise ConfigurationError(f"{what} = {name!r}: a name cannot be empty or contain a zero byte.")
    if len(name.encode("utf-8", "surrogatepass")) > LONGEST_NAME:
        raise ConfigurationError(f"{what} = {name!r}: longer than {LONGEST_NAME} bytes; PostgreSQL would cut it off.")


@contextlib.contextmanager
def _connected(server_url: str | sa.URL, name: str) -> Iterator[sa.Connection]:
    """A connection in autocommit to any database but `name`, closed afterwards."""
    url = _url_of_server(server_url, name)
    engine = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _url_of_server(server_url: object, name: str) -> sa.URL:
    """The URL to connect to. Error messages have no part of the given one, which may hold a password."""
    if not isinstance(server_url, (str, sa.URL)):
        unset = "; is DATABASE_URL set?" if server_url is None else "."
        kind = "None" if server_url is None else f"a {type(server_url).__name__}"
        raise TypeError(f"server_url: expected a URL as text or sqlalchemy.URL, not {kind}{unset}")
    url = database_url(server_url, "server_url", any_driver=True)
    if url.get_backend_name() != "postgresql":
        raise UnsupportedDialect(
            f"create_database(), drop_database() and database_exists() need PostgreSQL, not {url.get_backend_name()}."
        )
    # one cannot be connected to what is to be made or dropped
    return url.set(database=MAINTENANCE_DATABASE) if url.database in (None, "", name) else url

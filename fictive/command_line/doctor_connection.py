"""What `doctor` finds out about an engine and the connections that it makes."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from ..connection.pooler import is_pooled
from ..connection.replicas import is_replica
from ..drivers import driver_for
from ..report.watcher import WATCHER
from ..session.session import OptInSession
from .doctor_pooler import pooler_findings
from .findings import Finding, Severity
from .target import Database

__all__ = ["connection_findings", "setting_findings", "version_findings"]

_OLDEST_SERVER = 130000
_NEEDED = {"sqlalchemy": (2, 0, 43), "flask-sqlalchemy": (3, 1), "psycopg": (3, 1)}
_SHOWN = ("sqlalchemy", "flask-sqlalchemy", "fictive")
_PACKAGES = {"psycopg2": ("psycopg2-binary", "psycopg2"), "psycopg": ("psycopg",)}


def version_findings(database: Database) -> Iterator[Finding]:
    """The versions of what is in use, and those that are too old."""
    dialect = database.engine.dialect
    shown = []
    for package in (*_SHOWN, *_PACKAGES.get(dialect.driver, (dialect.driver,))):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        shown.append(f"{package} {found}")
        if (needed := _NEEDED.get(package)) and _numbers(found) < needed:
            least = ".".join(map(str, needed))
            yield Finding("versions", Severity.ERROR, f"{package} {found} is older than {least}.",
                          f"pip install '{package}>={least}'")  # fmt: skip
    with database.engine.connect() as connection:
        if dialect.name == "postgresql":
            server, number = connection.exec_driver_sql(
                "SELECT current_setting('server_version'), current_setting('server_version_num')::int"
            ).one()
            shown.insert(0, f"PostgreSQL {server}")
            if number < _OLDEST_SERVER:
                yield Finding("versions", Severity.WARNING, f"PostgreSQL {server} gets no more fixes.",
                              "Upgrade the server (https://www.postgresql.org/support/versioning/).")  # fmt: skip
        else:
            shown.insert(0, f"{dialect.name} {'.'.join(map(str, dialect.server_version_info or ()))}")
    yield Finding("versions", Severity.INFO, ", ".join(shown))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


class _Probe:
    """A watcher that keeps what travelled with the statements."""

    def __init__(self) -> None:
        self.carried: list[list[str]] = []

    def statement(self, *event: Any) -> None:
        self.carried.append(list(event[6]))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *_: None


def connection_findings(database: Database, *, pooler_is_known: bool) -> Iterator[Finding]:
    """How its connections are made, what is between them and the server, and whether BEGIN travels along."""
    engine, url = database.engine, database.engine.url
    driver_connection: Any
    with engine.connect() as connection:
        driver_connection = connection.connection.driver_connection
        reported = _reported_pid(driver_connection)
        autocommit = getattr(driver_connection, "autocommit", False) is True
        actual, database_name, user, read_only, standby = connection.exec_driver_sql(
            "SELECT pg_backend_pid(), current_database(), current_user,"
            " current_setting('default_transaction_read_only')::bool, pg_is_in_recovery()"
        ).one()
        limit = connection.exec_driver_sql(
            "SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int"
        ).scalar_one()
    if autocommit:
        yield Finding(
            "autocommit",
            Severity.ERROR,
            "Connections are made in autocommit mode: engine.begin() commits each statement at once, and rolls "
            "nothing back.",
            "Remove isolation_level='AUTOCOMMIT', and autocommit=True from the creator, connect_args or a connect "
            "listener. fictive puts sessions into autocommit by itself.",
        )
    if url.database and database_name != url.database and not database.options.get("creator"):
        yield Finding(
            "database",
            Severity.ERROR,
            f"The URL names the database {url.database!r}; connections are to {database_name!r}.",
            "Look for a do_connect listener, connect_args or a pooler that says so.",
        )
    elif url.database and database_name != url.database:
        yield Finding(
            "creator",
            Severity.ERROR,
            f"The creator connects to {database_name!r}, and the URL says {url.database!r}. Commands that take the "
            "URL (create, drop, migrations) mean another database.",
            "Let the URL say what the creator does, or remove the creator.",
        )
    elif url.username and user != url.username and database.options.get("creator"):
        yield Finding("creator", Severity.WARNING, f"The creator connects as {user!r}, and the URL says "
                      f"{url.username!r}.", "Let the URL say what the creator does.")  # fmt: skip
    if (read_only or standby) and not is_replica(engine):
        why = "is a standby" if standby else "has default_transaction_read_only"
        yield Finding(
            "read-only",
            Severity.ERROR,
            f"The server {why}: every write fails.",
            "Point the URL at the primary (target_session_attrs=read-write), or reset the setting.",
        )
    if (reported is not None and reported != actual) or is_pooled(engine):
        yield from pooler_findings(engine, is_known=pooler_is_known)
    size = getattr(engine.pool, "size", lambda: 0)() + max(getattr(engine.pool, "_max_overflow", 0), 0)
    if size > limit:
        yield Finding(
            "pool-size",
            Severity.ERROR,
            f"The pool of one process may open {size} connections; the server takes {limit} in all.",
            "Lower DB_POOL_SIZE or DB_MAX_OVERFLOW, or raise max_connections.",
        )
    yield _rides(database, driver_connection)


def _reported_pid(connection: Any) -> int | None:
    """The pid in the server's greeting; a pooler makes one up."""
    if hasattr(connection, "get_backend_pid"):
        return int(connection.get_backend_pid())
    pid = getattr(getattr(connection, "info", None), "backend_pid", None)
    return pid if isinstance(pid, int) and pid else None


def _rides(database: Database, driver_connection: Any) -> Finding:
    """Whether BEGIN travels with the first statement, tried out."""
    probe = _Probe()
    with OptInSession(database.engine, info={WATCHER: probe}) as session, session.begin():
        session.execute(sa.text("SELECT 1"))
    if probe.carried:
        rides = bool(probe.carried[0])
    else:
        rides = driver_for(database.engine.dialect).can_carry(driver_connection)
    if rides:
        return Finding("begin", Severity.INFO, "BEGIN travels with the first statement of a transaction.")
    return Finding(
        "begin",
        Severity.WARNING,
        "BEGIN is sent apart, so each transaction costs a round trip more: "
        f"{_why_apart(database, driver_connection)}.",
        "Remove it, or accept the price.",
    )


def _why_apart(database: Database, connection: Any) -> str:
    arguments = database.options.get("connect_args") or {}
    for name in ("connection_factory", "cursor_factory"):
        if name in arguments:
            return f"connect_args has a {name}"
    if database.options.get("creator"):
        return f"the engine's creator makes connections of its own ({_name(type(connection))})"
    if database.engine.dialect.driver not in _PACKAGES:
        return f"the driver {database.engine.dialect.driver} cannot carry it"
    return f"the connections are of the class {_name(type(connection))}, with cursors of its own"


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def setting_findings(
    databases: Sequence[Database], origins: Mapping[str, str], in_force: Mapping[str, Mapping[str, Any]]
) -> Iterator[Finding]:
    """Variables of the environment that say something else than what is in force."""
    try:
        from ..errors import ConfigurationError
        from ..settings import DatabaseSettings, is_configured
    except ImportError:
        return
    if not is_configured():
        return
    try:
        settings = DatabaseSettings()
        wanted = {"default": settings, **{key: settings.bind(key) for key in settings.db_binds}}
    except ConfigurationError as error:
        yield Finding("settings", Severity.ERROR, f"The environment cannot be used: {error}")
        return
    for database in databases:
        if (given := wanted.get(database.key)) is None:
            continue
        force = in_force.get(database.key, {})
        said: dict[str, Any] = {"DATABASE_URL": given.url}
        for name in ("db_pool_size", "db_max_overflow", "db_pool_timeout", "db_pool_recycle", "db_pool_pre_ping",
                     "db_echo"):  # fmt: skip
            if (value := getattr(given, name)) is not None:
                said[name.upper()] = value
        for name, value in said.items():
            found = force.get(name)
            if found is None or _same(value, found):
                continue
            shown = value.render_as_string(hide_password=True) if isinstance(value, sa.URL) else value
            is_url = isinstance(found, sa.URL)
            actual = found.render_as_string(hide_password=True) if is_url else found
            variable = name if database.key == "default" else f"{database.key}_{name}".upper()
            yield Finding(
                "settings",
                Severity.WARNING,
                f"{variable} is {shown} in the environment, and {actual} is in force.",
                "What app.config says wins over the environment: remove one of the two.",
                database.key,
            )


def _same(given: Any, found: Any) -> bool:
    if isinstance(given, sa.URL) and isinstance(found, sa.URL):
        # the driver is the app's business; the port that is not named is 5432
        parts = [(url.host or "localhost", url.port or 5432, url.database, url.username) for url in (given, found)]
        return parts[0] == parts[1]
    return bool(given == found)

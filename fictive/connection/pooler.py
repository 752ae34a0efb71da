"""Engines behind a pooler of transactions, such as PgBouncer: what cannot work there, and the way around it.

Such a pooler gives a client another server connection for each transaction, so whatever belongs to the server
connection (session locks, LISTEN, SET, temporary tables, prepared statements) is lost, or met by another client
(PgBouncer documentation, "SQL feature map for pooling modes").
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import weakref
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from ..errors import ConfigurationError, DirectConnectionRequired
from ..session import private
from .servers import expect_answer, patience_of, set_patience

__all__ = ["FoundPooler", "direct_engine", "find_pooler", "is_pooled", "set_pooler", "way_around"]

log = logging.getLogger("fictive.pooler")


class _Pooled:
    """What is known of a pooled engine. The engine on the direct URL is made when it is first needed."""

    def __init__(self, direct_url: sa.URL | None) -> None:
        self.direct_url = direct_url
        self._lock = threading.Lock()
        self._direct: sa.Engine | None = None

    def direct(self, engine: sa.Engine) -> sa.Engine | None:
        if self.direct_url is None:
            return None
        with self._lock:
            if self._direct is None:
                self._direct = _like(engine, self.direct_url)
            return self._direct

    def dispose(self, *, close: bool) -> None:
        if self._direct is not None:
            self._direct.dispose(close=close)


_pooled: weakref.WeakKeyDictionary[sa.Engine, _Pooled] = weakref.WeakKeyDictionary()


any_pooled = False
"""Whether any engine was ever said to be behind a pooler: else nothing has to be asked."""


def set_pooler(engine: sa.Engine, mode: str = "transaction", *, direct_url: str | sa.URL | None = None) -> None:
    """Tell that `engine` reaches PostgreSQL by way of a pooler that pools transactions. Sends nothing.

    From then on psycopg prepares no statements on its new connections, `advisory_lock()` in autocommit opens a
    transaction, and what needs one server connection for longer than a transaction goes to `direct_url`, which is that
    of the server itself, or raises `DirectConnectionRequired` where there is none. Call it before the engine's first
    connection. In a Flask app the settings `FICTIVE_POOLER` and `FICTIVE_DIRECT_URL` do it.

    Raises `ConfigurationError` for another mode, another database than PostgreSQL, and a malformed direct URL.
    """
    if mode != "transaction":
        raise ConfigurationError(
            f"set_pooler(): mode = {mode!r}: expected 'transaction'. Session pooling needs no setting; under "
            "statement pooling there are no transactions."
        )
    if engine.dialect.name != "postgresql":
        raise ConfigurationError(f"set_pooler(): {engine.url!r} is not a PostgreSQL database.")
    try:
        url = None if direct_url is None else sa.make_url(direct_url)
    except sa.exc.ArgumentError:
        raise ConfigurationError("The direct URL is not a database URL.") from None
    if url is not None and url.get_backend_name() != "postgresql":
        raise ConfigurationError(f"The direct URL {url!r} is not that of a PostgreSQL database.")
    global any_pooled
    any_pooled = True
    root = private.root_engine(engine)
    if root not in _pooled:
        event.listen(root, "connect", _prepare_nothing)
        event.listen(root, "engine_disposed", _dispose_direct)
    _pooled[root] = _Pooled(url)
    expect_answer(root)


def is_pooled(engine: sa.Engine) -> bool:
    """Whether `set_pooler` was called for it."""
    return bool(_pooled) and private.root_engine(engine) in _pooled


def way_around(engine: sa.Engine) -> sa.Engine | None:
    """The engine for what needs one server connection: `engine` itself without a pooler, that of the direct URL, or
    None."""
    pooled = _pooled.get(private.root_engine(engine)) if _pooled else None
    return engine if pooled is None else pooled.direct(engine)


def direct_engine(engine: sa.Engine, feature: str) -> sa.Engine:
    """`way_around(engine)`; raises `DirectConnectionRequired` naming `feature` where there is none."""
    found = way_around(engine)
    if found is None:
        raise refusal(feature)
    return found


def refusal(feature: str) -> DirectConnectionRequired:
    """The error for `feature` behind a pooler without a direct URL."""
    return DirectConnectionRequired(
        f"{feature} needs one server connection for longer than a transaction, and behind a pooler of transactions "
        "(FICTIVE_POOLER) each transaction may have another one. Set FICTIVE_DIRECT_URL to the URL of the server "
        "itself, or do it within `with db.session.begin():` in a form that ends with the transaction."
    )


def _prepare_nothing(dbapi: Any, record: Any) -> None:
    """Prepared by one server process, a statement would be executed by another."""
    if hasattr(dbapi, "prepare_threshold"):
        dbapi.prepare_threshold = None


def _dispose_direct(engine: sa.Engine) -> None:
    pooled = _pooled.get(engine)
    if pooled is not None:
        pooled.dispose(close=True)


def _like(engine: sa.Engine, url: sa.URL) -> sa.Engine:
    """An engine on `url` with the driver of `engine`, whose connections are few and are not kept."""
    if "+" not in url.drivername:
        url = url.set(drivername=engine.url.drivername)
    made = sa.create_engine(url, pool_size=1, max_overflow=-1, echo=engine.echo)
    set_patience(made, patience_of(engine))
    return made


# -- finding out -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FoundPooler:
    """A pooler between an engine and its server."""

    mode: str | None
    """`"transaction"`, `"statement"`, `"session"`, or None where it could not be told."""
    version: str | None
    """What it says of itself, such as `"PgBouncer 1.18.0"`; None where its console is closed to this user."""


def find_pooler(engine: sa.Engine) -> FoundPooler | None:
    """Find out whether a pooler is between `engine` and its server; None when there is none. Changes nothing.

    A pooler greets with a process id of its own making, which is not the server's. Its mode is found with a second
    connection, which is given the server connection of the first one where transactions are pooled. At most three
    connections are made, all outside the engine's pool. Raises the driver's errors where none can be made.
    """
    if engine.dialect.name != "postgresql":
        return None
    with _connected(engine) as first:
        served_by = _server_pid(first)
        if _greeted_pid(first) in (None, served_by):
            return None
        with _connected(engine) as second:
            mode = "transaction" if _server_pid(second) == served_by or _moved(first, second, served_by) else "session"
            if mode == "transaction" and not _lets_begin(second):
                mode = "statement"
    return FoundPooler(mode, _console_version(engine))


class _connected:
    """A driver's connection of its own, in autocommit."""

    def __init__(self, engine: sa.Engine, **changes: Any) -> None:
        dialect = engine.dialect
        args, kwargs = dialect.create_connect_args(engine.url.set(**changes) if changes else engine.url)
        self._dbapi: Any = dialect.connect(*args, **kwargs)
        self._dbapi.autocommit = True
        if hasattr(self._dbapi, "prepare_threshold"):
            self._dbapi.prepare_threshold = None

    def __enter__(self) -> Any:
        return self._dbapi

    def __exit__(self, *_: object) -> None:
        self._dbapi.close()


def _ask(dbapi: Any, query: str) -> Any:
    cursor = dbapi.cursor()
    try:
        cursor.execute(query)
        return cursor.fetchone()[0]
    finally:
        cursor.close()


def _server_pid(dbapi: Any) -> int:
    return int(_ask(dbapi, "SELECT pg_catalog.pg_backend_pid()"))


def _greeted_pid(dbapi: Any) -> int | None:
    return getattr(dbapi.info, "backend_pid", None)


def _moved(first: Any, second: Any, served_by: int) -> bool:
    """Whether the first connection changes its server connection while the second one has that in a transaction."""
    second.cursor().execute("BEGIN")
    try:
        return _server_pid(second) == served_by or _server_pid(first) != served_by
    finally:
        second.cursor().execute("ROLLBACK")


def _lets_begin(dbapi: Any) -> bool:
    """A pooler of statements closes a connection on which a transaction begins."""
    try:
        dbapi.cursor().execute("BEGIN")
        dbapi.cursor().execute("ROLLBACK")
    except Exception:  # whatever it is, there is no transaction
        return False
    return True


def _console_version(engine: sa.Engine) -> str | None:
    """`SHOW VERSION` of its console; most users are not let in."""
    try:
        with _connected(engine, database="pgbouncer") as dbapi:
            # it speaks the simple protocol only
            make = getattr(engine.dialect.loaded_dbapi, "ClientCursor", None)
            cursor = make(dbapi) if make is not None else dbapi.cursor()
            cursor.execute("SHOW VERSION")
            return str(cursor.fetchone()[0])
    except Exception:  # whatever it is, nothing was learnt
        return None

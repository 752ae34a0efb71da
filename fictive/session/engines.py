"""What fictive adds to an engine: connections come back to the pool as they were, whatever happened to them."""

from __future__ import annotations

import atexit
import functools
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.pool import ConnectionPoolEntry, SingletonThreadPool, StaticPool

from ..drivers import Driver, TransactionStatus, driver_for
from ..drivers.base import dbapi_connection
from ..errors import ConfigurationError, TransactionAborted
from . import private

__all__ = [
    "ABORTED",
    "STATEMENT_TIMEOUT",
    "check_engine",
    "is_aborted",
    "is_lost",
    "listen_to",
    "prepare",
    "status_of",
]


class Listener(Protocol):
    """What a session is told of its transaction's connections."""

    def note_error(self, error: BaseException) -> None: ...

    def commit_begins(self) -> None: ...


ABORTED = "The server has given this transaction up after an error; it was rolled back, and nothing of it is saved."

log = logging.getLogger("fictive.engines")

PATIENCE = 5.0
"""Seconds after the loss of a connection during which one that is refused is tried again."""
_PAUSE = 0.05

# When the connections of a dialect object, which is one per engine, were last found lost.
_lost: weakref.WeakKeyDictionary[sa.Dialect, float] = weakref.WeakKeyDictionary()

_prepared: weakref.WeakSet[sa.Engine] = weakref.WeakSet()
_preparing = threading.Lock()
_fork_hooks: list[Any] = []
_inherited: list[sa.Pool] = []
_REST = "fictive.rest"
_SESSION = "fictive.session"

STATEMENT_TIMEOUT = "fictive_statement_timeout"
"""The execution option of an engine whose transactions have a `statement_timeout`, in milliseconds."""


def prepare(engine: sa.Engine) -> None:
    """Attach fictive's listeners to `engine`, once; costs a set lookup afterwards. Sends nothing.

    Raises `ConfigurationError` for an engine that cannot work.
    """
    if engine in _prepared:
        return
    root = private.root_engine(engine)
    with _preparing:
        if root not in _prepared:
            check_engine(root)
            driver = driver_for(root.dialect)
            event.listen(root, "do_connect", functools.partial(_connect, driver))
            event.listen(root, "connect", functools.partial(_record_rest, driver, []))
            event.listen(root, "checkout", functools.partial(_check_out, root.dialect, driver))
            event.listen(root, "checkin", functools.partial(_restore, driver))
            event.listen(root, "handle_error", _hand_on_error)
            # not the `commit` event: listeners for connection events cost every statement of the engine
            root.dialect.do_commit = functools.partial(_commit, driver, root.dialect.do_commit)  # type: ignore[method-assign]
            if driver.rests_in_autocommit:
                # after all `begin` listeners, among which may be SQLAlchemy's documented recipe to the same end
                root.dialect.do_begin = driver.begin  # type: ignore[method-assign, assignment]
            if (timeout := root.get_execution_options().get(STATEMENT_TIMEOUT)) is not None:
                event.listen(root, "begin", functools.partial(_limit, driver, int(timeout)))
            if not _fork_hooks:
                _fork_hooks.append(_after_fork)
                os.register_at_fork(after_in_child=_after_fork)
                atexit.register(_dispose_all)
            _prepared.add(root)
        _prepared.add(engine)


def check_engine(engine: sa.Engine) -> None:
    """Raise `ConfigurationError` for an engine on which transactions cannot be opted into."""
    if private.is_autocommit(engine.get_execution_options()) or private.connects_in_autocommit(engine.dialect):
        raise ConfigurationError(
            f"The engine {engine.url!r} has isolation_level='AUTOCOMMIT', under which no transaction can be "
            "begun. Leave the option out: outside begin() fictive runs statements in autocommit by itself."
        )
    try:
        levels = engine.dialect.get_isolation_level_values(None)  # type: ignore[arg-type]
    except NotImplementedError:
        levels = ()
    except Exception:  # a dialect that has to ask a connection; it is believed to know AUTOCOMMIT
        levels = ("AUTOCOMMIT",)
    if "AUTOCOMMIT" not in levels:
        raise ConfigurationError(
            f"The dialect {engine.dialect.name}+{engine.dialect.driver} has no AUTOCOMMIT isolation level, so "
            "statements cannot run outside a transaction. Use a driver that has one, or leave the mixin out."
        )
    if engine.dialect.name == "sqlite" and isinstance(engine.pool, (StaticPool, SingletonThreadPool)):
        raise ConfigurationError(
            f"{type(engine.pool).__name__} gives one SQLite connection to several sessions at once, so that one would "
            "end another's transaction. Pass poolclass=fictive.sqlalchemy.TakeTurnsPool to create_engine()."
        )


def is_aborted(connection: sa.Connection) -> bool:
    """Whether a COMMIT on a connection, of any session's, would be answered with ROLLBACK, or not at all."""
    return connection.invalidated or status_of(connection) is TransactionStatus.ABORTED


def is_lost(connection: sa.Connection) -> bool:
    """Whether the transaction that SQLAlchemy believes open can no longer be committed; for the opt-in session."""
    status = status_of(connection)
    if driver_for(connection.dialect).rests_in_autocommit:  # begun at once: idle is ended behind the back
        return connection.invalidated or status is TransactionStatus.IDLE
    return connection.invalidated or status is TransactionStatus.ABORTED


def status_of(connection: sa.Connection) -> TransactionStatus:
    """What the server last said of the connection's transaction; UNKNOWN when the connection is lost."""
    if connection.closed or connection.invalidated:
        return TransactionStatus.UNKNOWN
    return driver_for(connection.dialect).status(dbapi_connection(connection))


def listen_to(connection: sa.Connection, listener: Listener) -> None:
    """Tell `listener` what happens on `connection`, until that goes back to the pool."""
    connection.info[_SESSION] = weakref.ref(listener)


def _after_fork() -> None:
    """The connections are the parent's: the child makes its own (SQLAlchemy documentation, "Using Connection Pools
    with Multiprocessing or os.fork()")."""
    for engine in list(_prepared):
        _inherited.append(engine.pool)  # never collected, so that no driver ends the parent's sessions
        engine.dispose(close=False)


def _dispose_all() -> None:
    """The process ends: the server is told so, connection by connection."""
    for engine in list(_prepared):
        engine.dispose()


def _limit(driver: Driver, timeout: int, connection: sa.Connection) -> None:
    driver.ride(connection, f"SET LOCAL statement_timeout = {timeout}")


def _connect(driver: Driver, dialect: sa.Dialect, record: ConnectionPoolEntry, cargs: Any, cparams: Any) -> Any:
    """Connect; shortly after a connection was lost, with patience, since the server may be restarting."""
    while True:
        try:
            return driver.connect(cargs, cparams) or dialect.connect(*cargs, **cparams)
        except dialect.loaded_dbapi.OperationalError:
            if time.monotonic() - _lost.get(dialect, -math.inf) > PATIENCE:
                raise
            time.sleep(_PAUSE)


def _check_out(dialect: sa.Dialect, driver: Driver, dbapi: Any, record: ConnectionPoolEntry, proxy: Any) -> None:
    """Let the pool replace a connection whose server has closed it, before a statement finds out."""
    if _REST not in record.info:  # made before `prepare`; nothing has changed its mode yet
        if driver.is_accelerated(dbapi) is False:
            raise sa.exc.DisconnectionError("made before fictive had the engine: a connection of its kind follows")
        record.info[_REST] = driver.snapshot(dbapi)
    if not driver.is_alive(dbapi, record.info):
        _lost[dialect] = time.monotonic()
        raise sa.exc.DisconnectionError("the server has closed the connection")


def _record_rest(driver: Driver, told: list[bool], dbapi: Any, record: ConnectionPoolEntry) -> None:
    record.info[_REST] = driver.snapshot(dbapi)
    if driver.is_accelerated(dbapi) is False and not told:
        told.append(True)
        log.info(
            "The engine makes connections of its own (creator, connection_factory or cursor_factory): BEGIN and "
            "SAVEPOINT are sent apart from the statements that need them. %s",
            type(dbapi),
        )


def _restore(driver: Driver, dbapi: Any, record: ConnectionPoolEntry) -> None:
    """The last thing that happens to a connection before the pool has it: no one else can have it yet."""
    record.info.pop(_SESSION, None)
    if dbapi is None:
        return  # invalidated
    try:
        # without a note it was out already when `prepare` came, and only its owner can have changed it
        known = _REST not in record.info or driver.restore(dbapi, record.info[_REST])
    except Exception as error:  # whatever it was, the connection's mode is not known
        record.invalidate(error)
    else:
        if not known:
            record.invalidate()


def _commit(driver: Driver, commit: Callable[[Any], None], dbapi: Any) -> None:
    """COMMIT of an aborted transaction is answered with ROLLBACK, and no driver says so. Sessions only."""
    if (session := _session_on(dbapi)) is not None:
        if driver.status(dbapi.dbapi_connection) is TransactionStatus.ABORTED:
            raise TransactionAborted(ABORTED)
        session.commit_begins()
    commit(dbapi)


def _hand_on_error(context: ExceptionContext) -> None:
    if context.is_disconnect:
        _lost[context.dialect] = time.monotonic()
    connection = context.connection
    if connection is None or connection.closed or connection.invalidated:
        return
    if (session := _session_on(connection)) is not None:
        session.note_error(context.sqlalchemy_exception or context.original_exception)


def _session_on(connection: sa.Connection | sa.PoolProxiedConnection) -> Listener | None:
    reference = connection.info.get(_SESSION)
    return reference() if reference is not None else None

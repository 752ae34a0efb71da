"""What fictive adds to an engine, and no more: dead connections are found at checkout, and come back as they were.

The driver's classes, its BEGIN, SQLAlchemy's events and the application's `creator` stay as they are: what Core does
on the engine it does as without fictive.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.pool import ConnectionPoolEntry, SingletonThreadPool, StaticPool

from ..drivers import Driver, TransactionStatus, driver_for
from ..drivers.base import dbapi_connection
from ..errors import ConfigurationError
from ..session import private
from . import process
from .link import SessionConnection, statement_timeout_command
from .pool import BorrowingPool
from .servers import PINNED, REST, note_lost, patiently, wants_answer

__all__ = ["check_engine", "connection_in_autocommit", "listeners_of", "prepare", "status_of"]

log = logging.getLogger("fictive.connection")

_prepared: weakref.WeakSet[sa.Engine] = weakref.WeakSet()
_preparing = threading.Lock()


def prepare(engine: sa.Engine) -> None:
    """Attach fictive's listeners to `engine`, once; costs a set lookup afterwards. Sends nothing.

    Raises `ConfigurationError` for an engine that cannot work.
    """
    if engine in _prepared:
        return
    root = private.root_engine(engine)
    check_engine(engine)
    with _preparing:
        if root not in _prepared:
            dialect, driver = root.dialect, driver_for(root.dialect)
            dialect.connect = functools.partial(_connect, dialect, driver, dialect.connect)  # type: ignore[method-assign]
            for name, listener in listeners_of(root, driver):
                event.listen(root, name, listener)
            if driver.begins_by_statement:
                # after all `begin` listeners, among which may be SQLAlchemy's documented recipe to the same end
                dialect.do_begin = driver.begin  # type: ignore[method-assign, assignment]
                # asked before a ROLLBACK where the engine has `skip_autocommit_rollback`
                dialect.detect_autocommit_setting = driver.in_autocommit  # type: ignore[method-assign, assignment]
            if (command := statement_timeout_command(root.get_execution_options())) is not None:
                event.listen(root, "begin", functools.partial(_begin_core, command))
            if isinstance(root.pool, BorrowingPool):
                root.pool.find_listeners()
            process.watch(root)
            _prepared.add(root)
        _prepared.add(engine)
    if engine is root and isinstance(root.pool, BorrowingPool):
        root.pool.is_prepared = True


def listeners_of(engine: sa.Engine, driver: Driver) -> list[tuple[str, Any]]:
    """fictive's own listeners of a pool."""
    return [
        ("checkout", functools.partial(_check_out, engine.dialect, driver)),
        ("checkin", functools.partial(_restore, engine.dialect, driver)),
    ]


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
    if isinstance(engine.pool, sa.NullPool):
        log.warning(
            "The engine %r has NullPool: a session keeps its connection until it is closed, instead of opening one "
            "for each statement. With the default pool connections are shared between statements.",
            engine.url,
        )


takers: list[Callable[[sa.Engine], None]] = []
"""Called with each engine that a Flask app makes: sandboxes that are open."""


def status_of(connection: sa.Connection) -> TransactionStatus:
    """What the server last said of the connection's transaction; UNKNOWN when the connection is lost."""
    if connection.closed or connection.invalidated:
        return TransactionStatus.UNKNOWN
    return driver_for(connection.dialect).status(dbapi_connection(connection))


def connection_in_autocommit(engine: sa.Engine, watcher: Any = None) -> Any:
    """A connection of the caller's own, each statement on it standing alone: `with connection_in_autocommit(e) as c:`.

    It goes back to the pool as it was; whoever has doubts about its state invalidates it. `watcher` is told of what is
    run on it, as part of a session's work.
    """
    prepare(engine)
    return SessionConnection.standing_alone(engine, watcher)


def _connect(dialect: sa.Dialect, driver: Driver, connect: Any, *cargs: Any, **cparams: Any) -> Any:
    driver.connect_arguments(cparams)

    def attempt() -> Any:
        dbapi = connect(*cargs, **cparams)
        if wants_answer(dialect):
            try:
                driver.ask_for_answer(dbapi)
            except BaseException:
                dbapi.close()
                raise
        return dbapi

    return patiently(attempt, dialect)


def _check_out(dialect: sa.Dialect, driver: Driver, dbapi: Any, record: ConnectionPoolEntry, proxy: Any) -> None:
    """Let the pool replace a connection whose server has closed it, before a statement finds out."""
    if not driver.is_alive(dbapi):
        note_lost(dialect)
        raise sa.exc.DisconnectionError("the server has closed the connection")
    if REST not in record.info:  # the application's `connect` listeners, which may set a level, have all been called
        record.info[REST] = driver.rest(dbapi)


def _restore(dialect: sa.Dialect, driver: Driver, dbapi: Any, record: ConnectionPoolEntry) -> None:
    """The last thing that happens to a connection before the pool has it: no one else can have it yet."""
    try:
        rest = record.info.get(REST)
        if dbapi is None or driver.is_closed(dbapi):
            known = True  # invalidated; or lost, and the pool opens another in its place
        elif record.info.get(PINNED):
            known = False
        elif rest is not None:
            known = driver.restore(dbapi, dialect, rest)
        else:
            known = driver.status(dbapi) in (TransactionStatus.IDLE, TransactionStatus.UNTOLD)
    except BaseException as error:  # whatever it was, the connection's mode is not known
        record.invalidate(error)
        if not isinstance(error, Exception):
            private.return_interrupted(private.pool_of(record), record, error)
            raise
    else:
        if not known:
            record.invalidate()


def _begin_core(command: str, connection: sa.Connection) -> None:
    """A transaction of Core's on an engine with a timeout; with those of sessions it rides."""
    if not isinstance(connection, SessionConnection):
        connection.connection.cursor().execute(command)

"""A server connection while a session has it, or while it lies idle for the next one."""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from ..drivers import Driver, TransactionStatus
from ..drivers.base import Rest
from ..session import private
from ..session.private import EmptyListener
from . import process
from .pool import PATIENCE, BorrowingPool, patiently

if TYPE_CHECKING:
    from sqlalchemy.pool import PoolProxiedConnection

__all__ = ["PINNED", "REST", "ServerConnection", "check_out", "lost_at", "note_lost"]

log = logging.getLogger("fictive.connection")

INERROR = 3
"""libpq's number for a transaction that the server has aborted."""

PINNED = "fictive.pinned"
"""The key, in a pool entry's `info`, by which the pool closes a connection however it comes back."""

REST = "fictive.rest"
"""The key, in a pool entry's `info`, of the mode in which the connection was made, and is to lie in the pool."""

# When the connections of a dialect object, which is one per engine, were last found lost.
_lost: weakref.WeakKeyDictionary[sa.Dialect, float] = weakref.WeakKeyDictionary()


def note_lost(dialect: sa.Dialect) -> None:
    _lost[dialect] = time.monotonic()


def lost_at(dialect: sa.Dialect) -> float:
    return _lost.get(dialect, -math.inf)


class ServerConnection:
    """One connection of the driver's, taken from an engine's pool and in autocommit."""

    __slots__ = ("__weakref__", "begin_command", "buffers", "dbapi", "dialect", "driver", "fairy",
                 "generation", "has_notices", "idle_since", "idles", "poll", "pool", "rest",
                 "tainted", "transaction_status", "trips")  # fmt: skip

    def __init__(self, fairy: PoolProxiedConnection, engine: sa.Engine, driver: Driver) -> None:
        self.fairy = fairy
        self.dbapi: Any = fairy.dbapi_connection
        self.dialect = engine.dialect
        self.driver = driver
        self.pool: Any = engine.pool
        self.generation = process.generation
        self.tainted = False
        """Whether something was set on it that the end of a transaction does not undo."""
        self.idles = isinstance(self.pool, BorrowingPool) and not self.pool.has_reset_listeners()
        """Whether it can lie idle for the next statement."""
        self.trips = 0
        """How many messages with commands alone were sent on it."""
        self.idle_since = 0.0
        self.buffers = driver.buffers
        self.has_notices = driver.has_notices
        self._note_rest()
        fairy.info.setdefault(REST, self.rest)
        self.transaction_status: Callable[[], int] = driver.status_of(self.dbapi)
        self.poll: Callable[[int], Any] = driver.poll(self.dbapi)
        process.servers.add(self)

    def _note_rest(self) -> None:
        """The level and the like that are set on it, by the application's listeners of the pool too."""
        self.rest: Rest = self.driver.rest(self.dbapi)
        self.begin_command = self.rest.characteristics.begin_command()

    def tell_taken(self) -> None:
        """Tell the application's listeners of a connection that is taken from the idle ones, as of one from the
        pool."""
        for listener in self.pool.checkout_listeners:
            if listener is not self.pool.checkout_listeners[0]:
                listener(self.dbapi, self.fairy._connection_record, self.fairy)
        self._note_rest()

    def tell_given(self) -> None:
        for listener in self.pool.checkin_listeners:
            if listener is not self.pool.checkin_listeners[0]:
                listener(self.dbapi, self.fairy._connection_record)

    def is_lost(self) -> bool:
        """Whether the driver knows that the server is gone."""
        return self.driver.is_closed(self.dbapi)

    def is_aborted(self) -> bool:
        """Whether the server refuses all statements of the transaction until ROLLBACK."""
        return self.transaction_status() == INERROR

    def give_back(self) -> None:
        """After a statement or a transaction of a session: let the next one have it."""
        pool = self.pool
        if self.tainted:
            self.drop()
        elif not self.idles or pool.dispatch.reset.__class__ is not EmptyListener:
            self.release()
        elif pool.wanted or pool._overflow > 0:
            pool.give(self)
        elif pool.ages or (back := pool.checkin_listeners)[0] is not back[-1]:
            self.lie_idle()
        else:
            pool.idle.append(self)
            if pool.wanted:
                pool._hand_over()

    def lie_idle(self) -> None:
        pool = self.pool
        back = pool.checkin_listeners
        if back and back[0] is not back[-1]:
            self.tell_given()
        if pool.ages:
            self.idle_since = time.monotonic()
        pool.idle.append(self)
        if pool.wanted:
            pool._hand_over()

    def taint(self) -> None:
        """Close it instead of giving it back: something was set on it that the end of a transaction does not undo."""
        self.note_pinned(True)
        self.tainted, self.idles = True, False

    def note_pinned(self, pinned: bool) -> None:
        """Tell the pool whether to close it when it comes back, also by way of the garbage collector."""
        self.fairy.info[PINNED] = pinned

    def release(self) -> None:
        """Give it back to SQLAlchemy's pool, in the mode in which it came."""
        if self.generation is process.generation:
            self._end(self.fairy.close)

    def drop(self, error: BaseException | None = None) -> None:
        """Close it for good; the pool opens another in its place."""
        if self.generation is not process.generation:
            return
        if self.fairy.dbapi_connection is None:
            self._end(self.fairy.close)
        else:
            self._end(lambda: self.fairy.invalidate(error))

    def _end(self, give: Callable[[], None]) -> None:
        """Give the pool its entry; where that is interrupted, with its connection closed."""
        record = self.fairy._connection_record
        try:
            give()
        except BaseException as error:
            if record is not None and not private.return_interrupted(self.pool, record, error):
                record.invalidate(error)
                self.fairy.close()
            raise


def check_out(engine: sa.Engine, driver: Driver, *, patience: float = PATIENCE) -> ServerConnection:
    """A connection from the engine's pool, in autocommit, and known to be alive as far as this side can tell."""
    refusal = engine.dialect.loaded_dbapi.OperationalError
    fairy = patiently(engine.raw_connection, refusal, lambda: lost_at(engine.dialect), patience)
    try:
        server = ServerConnection(fairy, engine, driver)
        if driver.status(server.dbapi) in (TransactionStatus.IN_TRANSACTION, TransactionStatus.ABORTED):
            server.dbapi.commit()  # a listener of the pool ran something, and what it set is for this user
        driver.enter_autocommit(server.dbapi, engine.dialect, server.rest)
    except BaseException as error:
        fairy.invalidate(error)
        fairy.close()
        raise
    return server

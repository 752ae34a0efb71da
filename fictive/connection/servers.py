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
from ..drivers.base import IDLE, INERROR, INTRANS, Rest
from ..session import private
from . import process
from .pool import IDLE_FOR, BorrowingPool

if TYPE_CHECKING:
    from sqlalchemy.pool import PoolProxiedConnection

__all__ = [
    "AT_REST",
    "PINNED",
    "REST",
    "ServerConnection",
    "check_out",
    "expect_answer",
    "note_lost",
    "patience_of",
    "patiently",
    "set_patience",
    "wants_answer",
]

log = logging.getLogger("fictive.connection")

PINNED = "fictive.pinned"
"""The key, in a pool entry's `info`, by which the pool closes a connection however it comes back."""

REST = "fictive.rest"
"""The key, in a pool entry's `info`, of the mode in which the connection was made, and is to lie in the pool."""

AT_REST = (IDLE, TransactionStatus.UNTOLD)

# By dialect object, of which there is one per engine.
_lost: weakref.WeakKeyDictionary[sa.Dialect, float] = weakref.WeakKeyDictionary()
_patience: weakref.WeakKeyDictionary[sa.Dialect, float] = weakref.WeakKeyDictionary()
_answered_by_others: weakref.WeakSet[sa.Dialect] = weakref.WeakSet()

_PATIENCE = 5.0
_PAUSE = 0.05


def note_lost(dialect: sa.Dialect) -> None:
    """A connection of the engine's was found lost."""
    _lost[dialect] = time.monotonic()


def set_patience(engine: sa.Engine, seconds: float) -> None:
    """For how long after the loss of a connection of the engine's connecting is tried again; 5 seconds otherwise."""
    _patience[private.root_engine(engine).dialect] = seconds


def patience_of(engine: sa.Engine) -> float:
    return _patience.get(engine.dialect, _PATIENCE)


def expect_answer(engine: sa.Engine) -> None:
    """Tell that `engine` connects to a pooler, which accepts connections whether or not the server is there."""
    _answered_by_others.add(engine.dialect)


def wants_answer(dialect: sa.Dialect) -> bool:
    """Whether a connection that is made now counts as one only once the server has answered on it."""
    return dialect in _answered_by_others and _has_lost_lately(dialect)


def _has_lost_lately(dialect: sa.Dialect) -> bool:
    return time.monotonic() - _lost.get(dialect, -math.inf) <= _patience.get(dialect, _PATIENCE)


def patiently(connect: Callable[[], Any], dialect: sa.Dialect) -> Any:
    """Call `connect` until it works: shortly after a connection was lost, since the server may be restarting."""
    while True:
        try:
            return connect()
        except dialect.loaded_dbapi.OperationalError:
            if not _has_lost_lately(dialect):
                raise
            time.sleep(_PAUSE)


class ServerConnection:
    """One connection of the driver's, taken from an engine's pool and in autocommit."""

    __slots__ = ("__weakref__", "begin_command", "buffers", "dbapi", "dialect", "driver", "fairy",
                 "generation", "has_notices", "idle_since", "idles", "poll", "pool", "remembered", "rest",
                 "tainted", "transaction_status", "trips", "url")  # fmt: skip

    def __init__(self, fairy: PoolProxiedConnection, engine: sa.Engine, driver: Driver) -> None:
        self.fairy = fairy
        self.dbapi: Any = fairy.dbapi_connection
        self.dialect, self.url = engine.dialect, engine.url
        self.driver = driver
        self.pool: Any = engine.pool
        self.generation = process.generation
        self.tainted = False
        """Whether something was set on it that the end of a transaction does not undo."""
        self.remembered: object = None
        """What the driver needs to undo it, where it can."""
        self.idles = isinstance(self.pool, BorrowingPool)
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
        for listener in (*self.pool.checkouts_of_all, *self.pool.checkout_listeners):
            if not private.is_own_listener(listener):
                listener(self.dbapi, self.fairy._connection_record, self.fairy)
        self._note_rest()
        self.make_ready()

    def make_ready(self) -> None:
        """Let each statement stand alone, whatever the application's listeners have set or run."""
        if self.transaction_status() in (INTRANS, INERROR):
            self.dbapi.commit()  # what a listener set is for this user
        self.driver.enter_autocommit(self.dbapi, self.dialect)

    def tell_given(self) -> None:
        for listener in (*self.pool.checkins_of_all, *self.pool.checkin_listeners):
            if not private.is_own_listener(listener):
                listener(self.dbapi, self.fairy._connection_record)
        self.make_ready()

    def is_lost(self) -> bool:
        """Whether the driver knows that the server is gone."""
        return self.driver.is_closed(self.dbapi)

    def may_be_used(self, error: BaseException | None = None) -> bool:
        """After a statement in autocommit, and its error: whether the next one can have it."""
        is_known = error is None or isinstance(error, Exception)
        return is_known and not self.is_lost() and self.transaction_status() in AT_REST

    def needs_pool(self) -> bool:
        """Whether SQLAlchemy's pool has to look it over before the next use, since it has been idle for long."""
        return self.pool.ages and time.monotonic() - self.idle_since > IDLE_FOR

    def give_back(self) -> None:
        """After a statement or a transaction of a session: let the next one have it."""
        pool = self.pool
        if self.tainted:
            self._undo_or_drop()
        elif not self.idles or pool.reset_listeners or pool.resets_of_all:
            self.release()  # a listener to `reset` wants a connection to be really given back
        elif pool.wanted or pool._overflow > 0:
            pool.give(self)
        elif pool.ages or pool.checkins_of_all or (back := pool.checkin_listeners)[0] is not back[-1]:
            self.lie_idle()
        else:
            pool.idle.append(self)
            if pool.wanted:
                pool._hand_over()

    def lie_idle(self) -> None:
        pool = self.pool
        back = pool.checkin_listeners
        if pool.checkins_of_all or (back and back[0] is not back[-1]):
            self.tell_given()
        if pool.ages:
            self.idle_since = time.monotonic()
        pool.idle.append(self)
        if pool.wanted:
            pool._hand_over()

    def taint(self) -> None:
        """Close it instead of giving it back: something was set on it that the end of a transaction does not undo."""
        self.remember()
        self.tainted, self.idles = True, False

    def remember(self) -> None:
        """Keep what the driver needs to undo what is about to be set on it. Sends nothing to a server."""
        self.note_pinned(True)
        if self.remembered is None:
            self.remembered = self.driver.remember(self.dbapi, self.url)

    def _undo_or_drop(self) -> None:
        """Closing an in-memory database of SQLite's would lose it."""
        done = False
        try:
            done = self.remembered is not None and self.driver.forget(self.dbapi, self.dialect, self.remembered)
        finally:
            if not done:
                self.drop()
        if done:
            self.note_pinned(False)
            self.release()

    def note_pinned(self, pinned: bool) -> None:
        """Tell the pool whether to close it when it comes back, also by way of the garbage collector."""
        self.fairy.info[PINNED] = pinned

    def release(self) -> None:
        """Give it back to SQLAlchemy's pool, in the mode in which it came."""
        if self.generation is process.generation:
            self._end(self.fairy.close)

    def check_in(self) -> None:
        """Give one that lay idle to SQLAlchemy's pool. For who listens to the pool it was given back before."""
        if self.generation is process.generation:
            self._end(self._restore_and_return)

    def _restore_and_return(self) -> None:
        record = self.fairy._connection_record
        for listener in self.pool.checkin_listeners:
            if private.is_own_listener(listener):
                listener(self.dbapi, record)
        private.return_unheard(self.fairy)

    def drop_idle(self) -> None:
        """Close one that lay idle for good."""
        if self.generation is process.generation:
            self._end(self._close_and_return)

    def _close_and_return(self) -> None:
        self.fairy._connection_record.invalidate()
        private.return_unheard(self.fairy)

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


def check_out(engine: sa.Engine, driver: Driver) -> ServerConnection:
    """A connection from the engine's pool, in autocommit, and known to be alive as far as this side can tell."""
    fairy = patiently(engine.raw_connection, engine.dialect)
    try:
        server = ServerConnection(fairy, engine, driver)
        server.make_ready()
    except BaseException as error:
        fairy.invalidate(error)
        fairy.close()
        raise
    return server

"""Which connection a statement outside runs on, and when it goes back."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import sqlalchemy as sa

from ..drivers import NO_OPTIONS, TransactionOptions, driver_for
from ..drivers.base import dbapi_connection
from ..errors import PinnedConnectionLost
from . import private
from .engines import prepare
from .parking import leave, take

__all__ = ["Lease", "Pins", "Stream", "StreamLease", "connection_in_autocommit"]

log = logging.getLogger("fictive.session")

_READ_ONLY = TransactionOptions(read_only=True)


class Lease:
    """The connections of one statement: taken when it asks for them, back in the pool, or parked, when it is done.

    One per engine; a statement that the first one causes on its way (a column default, an eager load) shares them, so
    that a pool of one connection is enough.
    """

    def __init__(self, streams: Iterable[Stream] = ()) -> None:
        self._streams = streams
        self._taken: dict[sa.Engine, sa.Connection] = {}
        self._lent: list[sa.Connection] = []  # connections that the session was bound to, idle until now

    def connection(self, bind: sa.Engine | sa.Connection) -> sa.Connection:
        if isinstance(bind, sa.Connection):
            if not bind.in_transaction():
                self._lent.append(bind)
            return bind
        connection = self._taken.get(bind)
        if connection is None:
            for stream in self._streams:  # what its rows load eagerly must not need a second connection
                if stream.serves(bind):
                    return stream.connection
            connection = self._taken[bind] = self.open(bind)
        return connection

    def open(self, engine: sa.Engine) -> sa.Connection:
        if (parked := take(engine)) is not None:
            return parked
        prepare(engine)
        connection = private.BareConnection(engine)
        try:
            if private.streams(engine):  # outside a cursor needs a transaction; only a statement can ask for one
                connection.execution_options(stream_results=False, yield_per=None)
            driver_for(engine.dialect).enter_autocommit(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def release(self, *, failed: bool) -> None:
        """Give all connections back."""
        for bind in self._lent:
            if failed:
                bind.rollback()
            else:
                bind.commit()
        for connection in self._taken.values():
            if failed:
                connection.close()
            else:
                leave(connection)


@contextlib.contextmanager
def connection_in_autocommit(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection of the caller's own, each statement on it standing alone. It goes back to the pool as it was;
    whoever has doubts about its state invalidates it. For engines of any session, opt-in or not."""
    connection = private.BareConnection(engine)
    try:
        driver, dbapi = driver_for(engine.dialect), dbapi_connection(connection)
        rest = driver.snapshot(dbapi)
        driver.enter_autocommit(connection)
        try:
            yield connection
        finally:
            if not connection.invalidated and not driver.restore(dbapi, rest):
                connection.invalidate()
    finally:
        connection.close()


class StreamLease(Lease):
    """A connection in a READ ONLY transaction of its own, for a result that is read bit by bit while it is held.

    PostgreSQL has cursors within transactions only (PostgreSQL documentation, "DECLARE").
    """

    def release(self, *, failed: bool) -> None:
        for connection in self._taken.values():
            connection.close()

    def open(self, engine: sa.Engine) -> sa.Connection:
        prepare(engine)
        connection = private.StreamConnection(engine)
        driver = driver_for(engine.dialect)
        try:
            connection.begin()
            driver.enter_transaction(connection, _READ_ONLY if driver.has_options else NO_OPTIONS)
        except BaseException:
            connection.close()
            raise
        return connection

    def hand_over(self, result: Any) -> Stream | None:
        """Leave the connection to `result`, which reads from it; None when there is nothing left to read."""
        inner = private.cursor_result(result)
        if inner is None or inner.cursor is None:
            return None
        connection = inner.connection
        assert isinstance(connection, private.StreamConnection)
        connection.held_for = inner.cursor
        self._taken = {engine: other for engine, other in self._taken.items() if other is not connection}
        stream = Stream(connection, inner.cursor)
        private.keep_with(result, stream)
        return stream


class Stream:
    """A result that is being read, its cursor and its connection: closed when the result is exhausted or closed, when
    it is dropped half read, or when its session is closed, whatever comes first."""

    def __init__(self, connection: sa.Connection, cursor: Any) -> None:
        self.connection = connection
        self.close = weakref.finalize(self, _close_stream, connection, cursor)
        self.close.atexit = False

    def serves(self, engine: sa.Engine) -> bool:
        """Whether its connection can run a read of the same session between two of its rows."""
        if self.connection.engine is not engine or self.connection.closed or self.connection.invalidated:
            return False
        return driver_for(engine.dialect).is_alive(dbapi_connection(self.connection), self.connection.info)


def _close_stream(connection: sa.Connection, cursor: Any) -> None:
    if connection.closed:
        return
    try:
        cursor.close()
    except Exception:  # the connection is lost
        log.debug("closing a cursor failed", exc_info=True)
        driver_for(connection.dialect).abandon(cursor)
    try:
        connection.close()
    except Exception:  # SQLAlchemy has invalidated it
        log.debug("closing the connection of a stream failed", exc_info=True)


class Pins:
    """The connections that a `pinned()` block keeps, one per engine, taken when first asked for."""

    def __init__(self) -> None:
        self._kept: dict[sa.Engine, sa.Connection] = {}
        self._remembered: dict[sa.Engine, object] = {}

    def pin(self, engine: sa.Engine) -> sa.Connection:
        connection = self._kept.get(engine)
        if connection is None:
            prepare(engine)
            driver = driver_for(engine.dialect)
            connection = self._kept[engine] = private.PinnedConnection(engine, driver.leave_autocommit)
            self._remembered[engine] = driver.remember(connection)
        if connection.invalidated or connection.closed:
            raise PinnedConnectionLost(
                "The connection of this pinned() block was lost, and what was set through it with it. "
                "Leave the block and begin it again."
            )
        if not connection.in_transaction():
            driver_for(engine.dialect).enter_autocommit(connection)
        return connection

    def __contains__(self, connection: object) -> bool:
        return connection in self._kept.values()

    def __bool__(self) -> bool:
        """Whether any connection was taken."""
        return bool(self._kept)

    def release(self) -> None:
        """Undo what was set through the connections, and give them back."""
        for engine, connection in self._kept.items():
            try:
                if not connection.invalidated and not connection.closed:
                    driver_for(engine.dialect).forget(connection, self._remembered[engine])
            finally:
                connection.close()

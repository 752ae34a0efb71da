"""Connections that wait, ready for a statement outside, where anyone who needs one may have them.

Checking a connection in and out costs more than the rest of what a statement outside adds. So a session *parks* it
instead: the pool counts it as in, the next statement outside takes it back for next to nothing, whatever session it is
of, and a pool that has no other connection left takes all parked ones back first. What must stay true: a connection is
either parked or in use, decided under the pool's lock; and none is parked while somebody waits for one.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from ..drivers import driver_for
from ..drivers.base import dbapi_connection
from . import private

__all__ = ["ParkingPool", "leave", "take"]

_SECONDS = 1.0
"""How long a connection may be taken from where it was parked; after that the pool looks it over again."""


class ParkingPool(QueuePool):
    """SQLAlchemy's `QueuePool`, whose connections sessions may park."""

    def __init__(self, creator: Any, **kwargs: Any) -> None:
        self._parked: dict[sa.Engine, list[tuple[sa.Connection, float]]] = {}
        self._takers = 0
        self._lock = threading.Lock()
        super().__init__(creator, **kwargs)

    def park(self, connection: sa.Connection) -> bool:
        """Leave `connection` for the next statement; False when somebody is waiting for one, so that it goes in."""
        parked = connection, time.monotonic()
        with self._lock:
            if self._takers or self.overflow() > 0:  # none was parked when it was opened, and it will be closed
                return False
            self._parked.setdefault(connection.engine, []).append(parked)
            return True

    def take(self, engine: sa.Engine) -> tuple[sa.Connection, float] | None:
        """The connection that was parked last, and when."""
        with self._lock:
            parked = self._parked.get(engine)
            return parked.pop() if parked else None

    def clear_parking(self) -> None:
        """Check all parked connections in."""
        with self._lock:
            parked, self._parked = self._parked, {}
        for connections in parked.values():
            for connection, _ in connections:
                connection.close()

    def _do_get(self) -> ConnectionPoolEntry:
        with self._lock:
            self._takers += 1
        try:
            if self._parked and not super().checkedin():
                self.clear_parking()
            return super()._do_get()
        finally:
            with self._lock:
                self._takers -= 1

    def _count(self) -> int:
        with self._lock:
            return sum(map(len, self._parked.values()))

    def checkedin(self) -> int:
        return super().checkedin() + self._count()

    def checkedout(self) -> int:
        return super().checkedout() - self._count()

    def dispose(self) -> None:
        self.clear_parking()
        super().dispose()


def leave(connection: sa.Connection) -> None:
    """Park a connection as a statement outside left it, or give it back where that cannot be."""
    engine = connection.engine
    pool = engine.pool
    if (
        not isinstance(pool, ParkingPool)
        or connection.invalidated
        or private.is_watched(engine)
        or not pool.park(connection)
    ):
        connection.close()


def take(engine: sa.Engine) -> sa.Connection | None:
    """A connection in autocommit that was parked a moment ago, and is alive."""
    pool = engine.pool
    if not isinstance(pool, ParkingPool) or (parked := pool.take(engine)) is None:
        return None
    connection, since = parked
    if (
        time.monotonic() - since < _SECONDS
        and not private.is_watched(engine)
        and driver_for(engine.dialect).is_alive(dbapi_connection(connection), connection.info)
    ):
        return connection
    connection.close()
    return None

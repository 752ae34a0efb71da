"""Connections that wait with their session between two statements, and that anyone who needs one may have.

Checking a connection in and out costs more than the rest of what a statement outside adds. So a session *parks* it
instead: the pool counts it as in, the session takes it back for nothing, and a pool that has no other connection left
takes all parked ones back first. What must stay true: a connection is either parked or in use, decided under the
pool's lock; and none is parked while somebody waits for one.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from ..drivers import driver_for
from ..drivers.base import dbapi_connection

__all__ = ["ParkingPool", "Spots"]

_SECONDS = 1.0
"""How long a session may find its connection where it left it; after that the pool looks it over again."""


class ParkingPool(QueuePool):
    """SQLAlchemy's `QueuePool`, whose connections sessions may park."""

    def __init__(self, creator: Any, **kwargs: Any) -> None:
        self._parked: set[sa.Connection] = set()
        self._takers = 0
        self._lock = threading.Lock()
        super().__init__(creator, **kwargs)

    def park(self, connection: sa.Connection) -> bool:
        """Leave `connection` between two statements; False when somebody is waiting for one, so that it goes in."""
        with self._lock:
            if self._takers:
                return False
            self._parked.add(connection)
            return True

    def take_back(self, connection: sa.Connection) -> bool:
        """Have `connection` again; False when the pool has taken it in the meantime."""
        with self._lock:
            if connection not in self._parked:
                return False
            self._parked.discard(connection)
            return True

    def clear_parking(self) -> None:
        """Check all parked connections in."""
        with self._lock:
            parked, self._parked = self._parked, set()
        for connection in parked:
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

    def checkedin(self) -> int:
        return super().checkedin() + len(self._parked)

    def checkedout(self) -> int:
        return super().checkedout() - len(self._parked)

    def dispose(self) -> None:
        self.clear_parking()
        super().dispose()


class Spots:
    """Where one session has parked: a connection per engine at most. In autocommit, as a statement outside left it."""

    def __init__(self) -> None:
        self._spots: dict[sa.Engine, tuple[sa.Connection, ParkingPool, float, int]] = {}

    def leave(self, engine: sa.Engine, connection: sa.Connection) -> None:
        """Park a connection after a statement, or give it back where that cannot be."""
        pool = engine.pool
        if (
            isinstance(pool, ParkingPool)
            and engine not in self._spots
            and not connection.invalidated
            and pool.park(connection)
        ):
            self._spots[engine] = connection, pool, time.monotonic(), os.getpid()
        else:
            connection.close()

    def take(self, engine: sa.Engine) -> sa.Connection | None:
        """The connection parked for `engine`, if it is still there and alive."""
        spot = self._spots.pop(engine, None)
        if spot is None:
            return None
        connection, pool, since, process = spot
        if process != os.getpid() or not pool.take_back(connection):
            return None
        in_time = pool is engine.pool and time.monotonic() - since < _SECONDS
        if in_time and driver_for(engine.dialect).is_alive(dbapi_connection(connection), connection.info):
            return connection
        connection.close()
        return None

    def clear(self) -> None:
        """Give all back."""
        spots, self._spots = self._spots, {}
        for connection, pool, _, process in spots.values():
            if process == os.getpid() and pool.take_back(connection):
                connection.close()

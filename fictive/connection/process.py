"""What a fork leaves the child: connections that are the parent's, on which the child must never send anything."""

from __future__ import annotations

import atexit
import os
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sqlalchemy as sa

    from .servers import ServerConnection

__all__ = ["engines", "generation", "servers", "servers_of", "watch"]

generation = object()
"""Another one in each process: what has an older one belongs to a parent."""

servers: weakref.WeakSet[ServerConnection] = weakref.WeakSet()
engines: weakref.WeakSet[sa.Engine] = weakref.WeakSet()
_inherited: list[Any] = []
_watches = False


def watch(engine: sa.Engine) -> None:
    """Let a child of this process make connections of its own, and the server be told when this process ends."""
    global _watches
    engines.add(engine)
    if not _watches:
        _watches = True
        os.register_at_fork(after_in_child=_after_fork)
        atexit.register(_dispose_all)


def servers_of(pool: Any) -> list[ServerConnection]:
    """The connections of a pool that sessions have, or that lie idle."""
    while True:
        try:
            return [each for each in servers if each.pool is pool and each.fairy.dbapi_connection is not None]
        except RuntimeError:  # another thread has added one meanwhile
            continue


def _after_fork() -> None:
    """SQLAlchemy documentation, "Using Connection Pools with Multiprocessing or os.fork()"."""
    global generation
    generation = object()
    for server in list(servers):
        _inherited.append((server, server.fairy))  # never collected, so that nothing ends the parent's transactions
        if (idle := getattr(server.pool, "idle", None)) is not None:  # also of a pool that was disposed of
            idle.clear()
    for engine in list(engines):
        _inherited.append(engine.pool)
        engine.dispose(close=False)


def _dispose_all() -> None:
    for engine in list(engines):
        engine.dispose()

"""A read of a session's on a replica, and back to the primary where that could not answer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.pool import QueuePool

from ..drivers import sqlstate
from ..session import private
from .pool import BorrowingPool
from .replicas import BEHIND, Replica, check_position, wants_primary
from .servers import ServerConnection

if TYPE_CHECKING:
    from .cursors import StatementCursor
    from .link import Link
    from .statement_settings import DueSettings

__all__ = ["read_from_replica"]

log = logging.getLogger("fictive.replicas")

_FULL_FOR = 0.1
"""Seconds that a read waits for a connection to a replica where all are in use, before it goes to the primary."""


def read_from_replica(
    link: Link, cursor: StatementCursor, query: Any, parameters: Any, settings: DueSettings = ()
) -> bool:
    """Run a read outside a transaction on a replica, in 1 round trip; False where the primary is to run it.

    Whatever goes wrong on a replica sends the read to the primary, whose answer or error is the one that counts.
    """
    assert link.replicas is not None
    if wants_primary() or link.early is not None or link.kept is not None or link.streams:
        return False
    owner, engine = link.owner, link.replicas.primary
    if owner.keeps or _asks_for_primary(link):
        return False
    positions = owner.positions()
    if positions.needs_primary(engine):
        return False
    position = positions[engine]
    replica = link.replicas.choose(position)
    if replica is None:
        return False
    replica.busy.append(None)
    try:
        return _read(link, replica, position, cursor, query, parameters, settings)
    finally:
        replica.busy.pop()


def _asks_for_primary(link: Link) -> bool:
    """Whether the statement's execution options say so, or those of the engine."""
    says = link.owner.statement_options.get("fictive_primary")
    return bool(link.engine.get_execution_options().get("fictive_primary") if says is None else says)


def _read(
    link: Link,
    replica: Replica,
    position: int,
    cursor: StatementCursor,
    query: Any,
    parameters: Any,
    settings: DueSettings,
) -> bool:
    try:
        server = _borrow(link, replica.engine)
    except Exception as error:
        replica.failed(lost=not isinstance(error, sa.exc.TimeoutError))
        link.replica_told(replica, "unreachable", 0)
        log.info("no connection to the replica %r: %s", replica.engine.url, error)
        return False
    link.replica_asked(server)
    sent = server.trips
    try:
        found = _execute(link, server, position, query, parameters, settings)
        if found is not None:
            cursor.take_over(found, server)
    except BaseException as error:
        lost = server.is_lost()
        if server.may_be_used(error):
            server.give_back()
        else:
            server.drop(error)
        if not isinstance(error, Exception):
            raise
        cursor.driver_cursor = cursor.description = cursor._rows = None
        if position and sqlstate(error) == BEHIND:
            replica.was_behind(position)
            link.replica_told(replica, "behind", 1)
        else:
            replica.failed(lost=lost)
            link.replica_told(replica, "failed", 1 + server.trips - sent)
            log.info("the replica %r did not answer; asking the primary: %s", replica.engine.url, error)
        return False
    server.give_back()
    if found is None:
        return False
    replica.passed(position)
    link.replica_told(replica, "answered", 1 + server.trips - sent)
    return True


def _execute(
    link: Link, server: ServerConnection, position: int, query: Any, parameters: Any, settings: DueSettings
) -> Any:
    """The driver's cursor; None where the application's cursor class lets nothing ride."""
    driver = link.driver
    commands = [check_position(position)] if position else []
    if settings:
        commands.append(driver.set_command(server.dbapi, settings))
    if commands:
        return driver.execute_behind(server, link.dialect, commands, query, parameters)
    cursor = server.dbapi.cursor()
    cursor.execute(query, parameters)
    return cursor


def _borrow(link: Link, engine: sa.Engine) -> ServerConnection:
    pool = engine.pool
    while isinstance(pool, BorrowingPool):
        try:
            server: ServerConnection | None = pool.idle.pop()
        except IndexError:
            server = pool.take_soon(_FULL_FOR)
        if server is None:
            break
        if server.poll(0) and not link.driver.is_alive(server.dbapi):
            server.drop_idle()
            continue
        if server.needs_pool():
            server.check_in()
            break
        if (out := pool.checkout_listeners)[0] is out[-1] and not pool.checkouts_of_all:
            return server
        try:
            server.tell_taken()
        except sa.exc.DisconnectionError as error:
            if error.invalidate_pool:
                private.recycle(pool)
                pool.check_in_for_good()
            server.drop(error)
        except BaseException as error:
            server.drop(error)
            raise
        else:
            return server
    if isinstance(pool, QueuePool) and not isinstance(pool, BorrowingPool) and _is_full(pool):
        raise sa.exc.TimeoutError("all connections to the replica are in use")
    return link.check_out_of(engine)


def _is_full(pool: QueuePool) -> bool:
    most = private.pool_settings(pool)["max_overflow"]
    return bool(pool.checkedin() == 0 and 0 <= most <= pool.overflow())

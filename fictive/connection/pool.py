"""A connection pool whose connections sessions can borrow for one statement, for less than a checkout.

A connection that a session gives back after a statement lies *idle*: SQLAlchemy's pool counts it as in, the next
statement takes it, whatever session it is of, and whoever comes through the pool has it checked in first. What must
stay true: a connection is idle or in use, never both (`deque` makes that atomic), and whoever gives one back looks
whether it is wanted after it has become idle, whoever wants one says so before looking. There is no lock that an
interrupt could leave taken.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from ..session.private import listeners_to
from . import process

if TYPE_CHECKING:
    from .servers import ServerConnection

__all__ = ["BorrowingPool"]

IDLE_FOR = 1.0
"""Seconds that a connection may be idle in a pool that pings or recycles."""
HAND_OVER = 0.005
"""Seconds that a statement waits for another one's connection before a further one is opened."""
LOOK_AGAIN = 0.05
"""Seconds after which one that waits looks itself: a connection may also be closed, and so make room."""


class BorrowingPool(QueuePool):
    """SQLAlchemy's `QueuePool`, whose connections sessions borrow for single statements."""

    def __init__(self, creator: Any, **kwargs: Any) -> None:
        self.idle: deque[ServerConnection] = deque()
        self.wanted: set[object] = set()
        """Who waits for a connection."""
        self._takers: set[object] = set()
        """Those of them who wait for one that is checked in."""
        self._came_back: queue.SimpleQueue[None] = queue.SimpleQueue()
        """Wakes the others."""
        super().__init__(creator, **kwargs)
        self.ages = self._pre_ping or self._recycle >= 0
        """Whether a connection that has been idle for long has to go through SQLAlchemy's pool, which looks it
        over."""
        self.checkout_listeners: Sequence[Any] = ()
        self.checkin_listeners: Sequence[Any] = ()
        self.reset_listeners: Sequence[Any] = ()
        self.checkouts_of_all: Sequence[Any] = ()
        """Listeners to the checkouts of all pools, or of all of this class."""
        self.checkins_of_all: Sequence[Any] = ()
        self.resets_of_all: Sequence[Any] = ()
        self.is_prepared = False
        """Whether `engines.prepare` has seen the engine."""
        self.find_listeners()

    def find_listeners(self) -> None:
        """Told when fictive has attached its own listeners; the sequences then show those that come later, too."""
        self.checkout_listeners, self.checkouts_of_all = listeners_to(self.dispatch, "checkout")
        self.checkin_listeners, self.checkins_of_all = listeners_to(self.dispatch, "checkin")
        self.reset_listeners, self.resets_of_all = listeners_to(self.dispatch, "reset")

    def take_soon(self, patience: float | None = None) -> ServerConnection | None:
        """The next connection that a statement gives back, if that is soon, and before one more is opened. Where none
        may be, all who wait do so here, for as long as the pool's `timeout`, or `patience`: to check a connection in
        and out again takes longer than most statements."""
        me, began = object(), time.monotonic()
        timeout = self._timeout if patience is None else min(patience, self._timeout)
        try:
            self.wanted.add(me)
            while self._overflow >= 0 and not self._queued():  # else the pool has one, or opens one of those it keeps
                with contextlib.suppress(IndexError):
                    return self.idle.pop()
                may_open = self._max_overflow < 0 or self._overflow < self._max_overflow
                left = began + (HAND_OVER if may_open else timeout) - time.monotonic()
                if left > 0:
                    with contextlib.suppress(queue.Empty):
                        self._came_back.get(timeout=min(left, LOOK_AGAIN))
                elif may_open:
                    break
                else:
                    raise sa.exc.TimeoutError(
                        f"QueuePool limit of size {self.size()} overflow {self.overflow()} reached, connection timed "
                        f"out, timeout {timeout:0.2f}",
                        code="3o7r",
                    )
            return None
        finally:
            self.wanted.discard(me)

    def give(self, server: ServerConnection) -> None:
        """Make a connection idle while somebody waits for one, or more are open than the pool keeps."""
        if self._overflow > 0 and len(self.idle) + self._queued() >= self.size():
            server.release()
            return
        server.lie_idle()

    def _hand_over(self) -> None:
        if self._takers:
            self._check_in_one()
        elif self._came_back.qsize() < len(self.wanted):  # else an interrupted one, still wanted, would fill it
            self._came_back.put(None)

    def _check_in_one(self) -> None:
        try:
            server = self.idle.popleft()
        except IndexError:
            return
        server.check_in()

    def _do_get(self) -> ConnectionPoolEntry:
        me: object = object()
        taken: list[ConnectionPoolEntry] = []
        try:
            self._takers.add(me)
            self.wanted.add(me)
            if self.idle and not self._queued():
                self._check_in_one()
            # into the list at once: an interrupt between a call and the assignment of what it returns would lose it
            taken.extend(map(QueuePool._do_get, (self,)))
            self.wanted.discard(me)
            self._takers.discard(me)
            return taken[0]
        except BaseException:
            self.wanted.discard(me)
            self._takers.discard(me)
            for record in taken:
                super()._do_return_conn(record)  # as it came: ours might close it
            raise

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if self._overflow > 0 and self.idle and len(self.idle) + self._queued() >= self.size():
            try:  # as SQLAlchemy does with one that its queue has no place for
                record.close()
            finally:
                self._dec_overflow()
        else:
            super()._do_return_conn(record)

    def _invalidate(self, connection: Any, exception: BaseException | None = None, checkin: bool = True) -> None:
        """SQLAlchemy's, by which the pool's connections are replaced when they are next taken."""
        super()._invalidate(connection, exception, checkin)
        self.check_in_for_good()

    def check_in_for_good(self) -> None:
        """Let SQLAlchemy's pool have each connection before its next use, those that are in use when they come
        back."""
        for server in process.servers_of(self):
            server.idles = False
        self.check_in_all()

    def check_in_all(self) -> None:
        """Give all idle connections back to SQLAlchemy's pool."""
        while self.idle:
            self._check_in_one()

    def checkedin(self) -> int:
        return self._queued() + len(self.idle)

    def _queued(self) -> int:
        return super().checkedin()  # of SQLAlchemy's queue, without the idle ones

    def checkedout(self) -> int:
        return super().checkedout() - len(self.idle)

    def dispose(self) -> None:
        self.check_in_all()
        for server in process.servers_of(self):  # in use: they are closed when they come back, not idle for the next
            server.taint()
        super().dispose()

"""The one connection of a process on which notifications for all its waiters arrive, and the thread that reads it.

One per engine, outside the pool, open while there are waiters and `LINGER` seconds longer.
While nothing changes it sends nothing. When it is lost its thread connects again, and waiters poll meanwhile. It ends
with `engine.dispose()` and at exit; a forked child begins with none.
"""

from __future__ import annotations

import atexit
import contextlib
import enum
import logging
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from ..connection.pooler import way_around
from ..drivers import driver_for
from ..drivers.base import dbapi_connection
from ..session import private
from .notify_triggers import ANY_ROW, INSERT_TRIGGER, TRIGGER, channel_of, inserts_channel_of

__all__ = ["LINGER", "Listening", "Waiter", "listen", "listening"]

log = logging.getLogger("fictive.listening")

LINGER = 5.0
"""Seconds for which the connection stays after its last waiter, so that a loop of waits does not connect each time."""

TRUST = 5.0
"""Seconds for which a trigger is taken to be there still; a migration may drop it, or rename its table."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds between two attempts to connect
_PATIENCE = 2.0  # seconds for the thread to end

# listener connections inherited by a fork: never closed and never collected, since that would end the parent's session
_inherited: list[Any] = []
_listeners: weakref.WeakKeyDictionary[sa.Engine, Listening] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_warned: set[str] = set()
_told: weakref.WeakSet[sa.Engine] = weakref.WeakSet()
_process: list[int] = []  # of whom the listeners are, once there was one


class State(enum.Enum):
    """Of a waiter."""

    NEW = "new"
    """Nothing is known yet, or the connection was lost and is being made again."""
    LIVE = "live"
    """What changes from now on sets `woken`."""
    POLLING = "polling"
    """No notification will come: a trigger is missing, or the listener has ended."""


class Waiter:
    """Somebody who waits for a row, by the tables that hold it, or with `inserts` for new rows of them.

    `woken` is set when the row may have changed, and when `state` changed. `key` is the row as the trigger names it;
    until it is known every row of the tables is taken for it.
    """

    def __init__(self, tables: Sequence[sa.Table], *, inserts: bool = False) -> None:
        self.channels = {(inserts_channel_of if inserts else channel_of)(table): table for table in tables}
        self.trigger = INSERT_TRIGGER if inserts else TRIGGER
        self.key: str | None = None
        self.state = State.NEW
        self.notified = False
        self.answered = threading.Event()
        self.woken = threading.Event()

    def concerns(self, channel: str, payload: str) -> bool:
        return channel in self.channels and (payload == ANY_ROW or self.key is None or payload == self.key)

    def set_state(self, state: State) -> None:
        self.state = state
        self.woken.set()  # before `answered`, whose waiter clears it and looks; after that it would cost a second look
        if state is State.NEW:
            self.answered.clear()
        else:
            self.answered.set()

    def sleep(self, interval: float, remaining: float | None) -> None:
        """Return when the row may have changed, after `remaining` seconds; and, if no notification can be relied on,
        after `interval`."""
        if self.state is State.LIVE:
            self.woken.wait(remaining)
            if self.state is State.LIVE:
                return
            self.woken.clear()  # the connection was lost; the server may be restarting, so not at once
        self.woken.wait(interval if remaining is None else min(interval, remaining))


@contextlib.contextmanager
def listen(engine: sa.Engine, tables: Sequence[sa.Table], *, inserts: bool = False) -> Iterator[Waiter]:
    """A waiter for changes in `tables`, or with `inserts` for new rows. Its first check comes after `answered`: it is
    live from then on, or polls."""
    waiter = Waiter(tables, inserts=inserts)
    direct = way_around(private.root_engine(engine))
    if direct is None:
        if engine not in _told:
            _told.add(engine)
            log.info("LISTEN does not work behind a pooler of transactions, so waiters poll: set FICTIVE_DIRECT_URL")
        waiter.set_state(State.POLLING)
        yield waiter
        return
    engine = direct
    with _lock:
        listener = _listeners.get(engine)
        if listener is None or not listener.add(waiter):
            _prepare(engine)
            listener = _listeners[engine] = Listening(engine)
            listener.add(waiter)
    try:
        yield waiter
    finally:
        listener.remove(waiter)


def listening() -> list[Listening]:
    """The listeners of this process whose connection is there or being made."""
    with _lock:
        return [listener for listener in _listeners.values() if listener.is_alive()]


class Listening:
    """A connection that listens, and its thread."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._waiters: set[Waiter] = set()
        self._ended = False
        self._connection: Any = None  # kept here for a fork
        self._wakeup_r, self._wakeup_w = socket.socketpair()
        self._wakeup_r.setblocking(False)
        self._wakeup_w.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="fictive-listening", daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        return not self._ended

    def add(self, waiter: Waiter) -> bool:
        """False when it has ended, and a new one is needed."""
        with self._lock:
            if self._ended:
                return False
            self._waiters.add(waiter)
        self._wake()
        return True

    def remove(self, waiter: Waiter) -> None:
        with self._lock:
            self._waiters.discard(waiter)
            last = not self._waiters and not self._ended
        if last:
            self._wake()

    def end(self) -> None:
        """End the thread and close the connection. Whoever still waits polls."""
        self._end()
        self._wake()
        if self._thread is not threading.current_thread():
            self._thread.join(_PATIENCE)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # rung already, or ended
            self._wakeup_w.send(b"!")

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            waiters = list(self._waiters)
        for waiter in waiters:
            waiter.set_state(State.POLLING)

    # -- in the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        try:
            while not self._ended:
                started = time.monotonic()
                try:
                    with self._connected() as dbapi:
                        self._serve(dbapi)
                except Exception as error:
                    log.info("the connection that listens was lost, or could not be made: %s", error)
                    self._lost()
                    pause = min(pause * 2, _LONGEST_PAUSE) if time.monotonic() - started < pause else _FIRST_PAUSE
                    self._wait_for_wakeup(pause)
        finally:
            self._end()
            with _lock:
                if _listeners.get(self._engine) is self:  # which would keep the engine
                    del _listeners[self._engine]
            self._wakeup_r.close()
            self._wakeup_w.close()

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        """A connection made as the engine makes them, and not of its pool."""
        connection = self._engine.connect()
        driver, dbapi = driver_for(self._engine.dialect), dbapi_connection(connection)
        try:
            driver.enter_autocommit(dbapi, self._engine.dialect)
            connection.detach()
            self._connection = connection
            yield dbapi
        finally:
            self._connection = None
            with contextlib.suppress(Exception):
                if driver.is_closed(dbapi):  # else SQLAlchemy would try to roll back, and log that as an error
                    connection.invalidate()
                connection.close()

    def _serve(self, dbapi: Any) -> None:
        """Until nobody has waited for a while, or the connection is lost, which raises."""
        read = driver_for(self._engine.dialect).notifications(dbapi)
        if read is None:
            self._end()
            return
        heard: dict[str, float] = {}  # by channel, when its table was last seen to have the trigger
        idle_since = time.monotonic()
        while not self._ended:
            with self._lock:
                waiters = list(self._waiters)
            for waiter in waiters:
                if waiter.state is State.NEW:
                    heard_all = all(self._hear(dbapi, channel, waiter, heard) for channel in waiter.channels)
                    waiter.set_state(State.LIVE if heard_all else State.POLLING)
            self._hand_out(read)
            if waiters:
                idle_since = time.monotonic()
            elif self._is_over(idle_since):
                return
            left = None if waiters else max(0.0, idle_since + LINGER - time.monotonic())
            if self._wakeup_r in select.select([dbapi.fileno(), self._wakeup_r], [], [], left)[0]:
                self._drain_wakeups()

    def _is_over(self, idle_since: float) -> bool:
        with self._lock:
            if self._waiters or time.monotonic() - idle_since < LINGER:
                return False
            self._ended = True
            return True

    def _hand_out(self, read: Callable[[], list[tuple[str, str]]]) -> None:
        found = set(read())
        if not found:
            return
        with self._lock:
            waiters = list(self._waiters)
        for waiter in waiters:
            if any(waiter.concerns(channel, payload) for channel, payload in found):
                waiter.notified = True
                waiter.woken.set()

    def _hear(self, dbapi: Any, channel: str, waiter: Waiter, heard: dict[str, float]) -> bool:
        """LISTEN; whether the table has its trigger, so that something will come."""
        now = time.monotonic()
        if channel in heard and now - heard[channel] < TRUST:
            return True
        table = waiter.channels[channel]
        cursor = dbapi.cursor()
        try:
            cursor.execute(f"LISTEN {_quoted(channel)}")
            cursor.execute(
                "SELECT count(*) FROM pg_catalog.pg_trigger WHERE tgrelid = to_regclass(%s) AND tgname = %s"
                " AND tgenabled IN ('O', 'A')",
                (_plain_name(table), waiter.trigger),
            )
            found = bool(cursor.fetchone()[0])
        finally:
            cursor.close()
        if found:
            heard[channel] = now
        elif channel not in _warned:
            _warned.add(channel)
            log.warning(
                "notify_changes() was called for %s, but the table has no trigger %s: waiters poll. Install it with "
                "op.create_notify_changes() in a migration, or notify_changes(Model, session).",
                table.fullname,
                waiter.trigger,
            )
        return found

    def _lost(self) -> None:
        with self._lock:
            waiters = list(self._waiters)
            if not waiters:
                self._ended = True
        for waiter in waiters:
            if waiter.state is State.LIVE:
                waiter.set_state(State.NEW)

    def _wait_for_wakeup(self, seconds: float) -> None:
        """A pause that only the end cuts short."""
        until = time.monotonic() + seconds
        while not self._ended and (left := until - time.monotonic()) > 0:
            select.select([self._wakeup_r], [], [], left)
            self._drain_wakeups()

    def _drain_wakeups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wakeup_r.recv(4096):
                pass

    def keep_for_ever(self) -> None:
        """In a forked child: the connection is the parent's."""
        _inherited.append((self, self._connection))


def _plain_name(table: sa.Table) -> str:
    """The table for `to_regclass`."""
    return ".".join(_quoted(part) for part in (table.schema, table.name) if part is not None)


def _quoted(name: str) -> str:
    """Not by SQLAlchemy's preparer, which doubles percent signs for statements that have parameters."""
    return '"' + name.replace('"', '""') + '"'


def _prepare(engine: sa.Engine) -> None:
    private.listen_once(engine, "engine_disposed", _on_dispose)
    if not _process:
        atexit.register(_at_exit)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_after_fork)
        _process.append(os.getpid())


def _on_dispose(engine: sa.Engine) -> None:
    if os.getpid() not in _process:
        return  # in a forked child, where another thread's lock may be held for ever
    with _lock:
        listener = _listeners.get(engine)
    if listener is not None:
        listener.end()


def _at_exit() -> None:
    for listener in listening():
        listener.end()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    for listener in list(_listeners.values()):
        listener.keep_for_ever()
    _listeners.clear()
    _process[:] = [os.getpid()]

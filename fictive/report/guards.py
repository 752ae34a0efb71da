"""Says while it goes on that a transaction is open, or a connection held, for too long: logger `fictive.report`."""

from __future__ import annotations

import logging
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

from .collector import Collector
from .holders import Holder, Holders
from .lines import is_library, line_of

__all__ = ["Guard", "where_is"]

LINGER = 1.0
"""Seconds for which the thread stays when there is nothing to watch."""

log = logging.getLogger("fictive.report")

_DATABASE = ("psycopg", "psycopg2", "sqlalchemy", "fictive", "sqlite3", "pg8000")


class Guard:
    """Watches the transactions and connections of one app, in a thread that runs while there are any.

    Each is logged once, when it is older than `transaction_open` or `connection_held` seconds (None: not at all).
    """

    def __init__(self, *, transaction_open: float | None, connection_held: float | None) -> None:
        self.transaction_open = transaction_open
        self.connection_held = connection_held
        self.holders: list[Holders] = []
        self._collectors: weakref.WeakSet[Collector] = weakref.WeakSet()
        self._told: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, collector: Collector) -> None:
        """A transaction was begun."""
        with self._lock:
            self._collectors.add(collector)
        self.wake()

    def wake(self) -> None:
        """Start the thread, if none runs."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fictive-guard", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        idle_since: float | None = None
        while True:
            due = self._look()
            now = time.perf_counter()
            if due is not None:
                idle_since = None
            elif idle_since is None:
                idle_since = now
            with self._lock:
                if idle_since is not None and now - idle_since >= LINGER:
                    self._thread = None
                    return
            time.sleep(min(due, LINGER) if due is not None else LINGER / 4)

    def _look(self) -> float | None:
        """Log what is due; returns in how many seconds to look again, None with nothing to watch."""
        due: float | None = None
        for age, limit, owner, key, tell in self._watched():
            told = self._told.setdefault(owner, set())
            if key in told:
                continue
            if age >= limit:
                told.add(key)
                try:
                    tell()
                except Exception:  # what is told of goes on meanwhile
                    log.debug("a guard could not tell", exc_info=True)
            else:
                due = min(limit - age, due if due is not None else limit)
        return due

    def _watched(self) -> Iterator[tuple[float, float, Any, Any, Any]]:
        """Age, limit, owner, key and how to tell, of all that is open or held."""
        now = time.perf_counter()
        if self.transaction_open is not None:
            with self._lock:
                collectors = list(self._collectors)
            for collector in collectors:
                for number, (since, place, thread) in list(collector.open.items()):
                    yield (
                        now - since, self.transaction_open, collector, number,
                        lambda c=collector, s=since, p=place, t=thread: self._tell_transaction(c, s, p, t),
                    )  # fmt: skip
        if self.connection_held is not None:
            for holders in self.holders:
                for holder in holders.held:
                    yield (
                        holder.age, self.connection_held, holders, id(holder),
                        lambda h=holder: self._tell_holder(h),
                    )  # fmt: skip

    def _tell_transaction(self, collector: Collector, since: float, place: Any, thread: int) -> None:
        log.warning(
            "a transaction of %s is open for %.1f s, begun at %s; %s",
            collector.what or "work without a request",
            time.perf_counter() - since,
            line_of(place) or "an unknown line",
            where_is(thread),
        )  # fmt: skip

    def _tell_holder(self, holder: Holder) -> None:
        log.warning("a connection is held by %s; %s", str(holder), where_is(holder.thread))


def where_is(thread: int) -> str:
    """What a thread does now: the application's line, and whether it waits for the database."""
    frame: Any = sys._current_frames().get(thread)
    if frame is None:
        return "its thread has ended"
    in_database = False
    inner = frame.f_code.co_name
    while frame is not None and is_library(frame.f_code.co_filename):
        in_database = in_database or str(frame.f_globals.get("__name__", "")).partition(".")[0] in _DATABASE
        frame = frame.f_back
    if frame is None:
        return f"its thread is in {inner}"
    line = line_of((frame.f_code, frame.f_lineno, frame.f_globals))
    return f"it waits for the database at {line}" if in_database else f"it is at {line}, outside of the database"

"""Keeps what a session's connection tells: one tuple an event, from which everything is derived later."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from sys import _getframe
from typing import Any, TypeAlias

from .lines import LIBRARY, Place, is_library

__all__ = [
    "BEGAN",
    "COMMAND",
    "ENDED",
    "HOOK",
    "LOST",
    "MOST_EVENTS",
    "REPLICA",
    "RETRY",
    "STATEMENT",
    "WAITED",
    "Collector",
    "Event",
    "place_of_caller",
]

Event: TypeAlias = "tuple[Any, ...]"
"""Its kind, and what the method of that name was given, with the application's line where that matters."""

STATEMENT, COMMAND, BEGAN, ENDED, WAITED, LOST, HOOK, RETRY, REPLICA = range(9)

MOST_EVENTS = 20_000
"""Of a request with more events than these only the last are kept."""

_numbers = itertools.count(1)


class Collector:
    """A `Watcher` that keeps the events of one request, or of another piece of work.

    `on_begin` is called when a transaction begins, `on_transaction` at its end, with its number.
    """

    def __init__(
        self,
        on_transaction: Callable[[Collector, int], None] | None = None,
        on_begin: Callable[[Collector], None] | None = None,
    ) -> None:
        self.number = 0
        self.on_transaction = on_transaction
        self.on_begin = on_begin
        self.what = ""
        """Whose work it is, in words."""
        self.started = self.started_wall = 0.0
        self.events: deque[Event] = deque()
        self.open: dict[int, tuple[float, Place | None, int]] = {}
        """The transactions that are open: since when, the line that began each, and the thread."""
        self.start()

    def start(self) -> None:
        """Forget all events, and begin anew."""
        self.number = next(_numbers)
        self.started, self.started_wall = time.perf_counter(), time.time()
        self.events = deque(maxlen=MOST_EVENTS)

    def totals(self) -> tuple[int, float, bool]:
        """Round trips, seconds in the database, and whether there was a transaction: as in the report, but cheaper."""
        trips, seconds, transactions = 0, 0.0, False
        for event in self.events:
            kind = event[0]
            if kind == STATEMENT:
                trips += event[6]
            elif kind == COMMAND:
                trips += event[4]
            elif kind == ENDED:
                trips += event[5]
                transactions = True
            else:
                transactions = transactions or kind == BEGAN
                continue
            seconds += event[2] - event[1]
        return trips, seconds, transactions

    # -- Watcher ----------------------------------------------------------------------------------------------------

    def statement(
        self,
        sql: str,
        parameters: object,
        started: float,
        ended: float,
        rows: int,
        round_trips: int,
        carried: Sequence[str],
        transaction: int | None,
        error: BaseException | None,
    ) -> None:
        # place_of_caller(), without its call: this runs once a statement
        frame: Any = _getframe(1)
        while frame is not None:
            file = frame.f_code.co_filename
            if not (LIBRARY[file] if file in LIBRARY else is_library(file)):
                break
            frame = frame.f_back
        self.events.append(
            (STATEMENT, started, ended, sql, parameters, rows, round_trips, carried, transaction,
             None if error is None else _shown(error),
             None if frame is None else (frame.f_code, frame.f_lineno, frame.f_globals))
        )  # fmt: skip

    def command(self, sql: str, started: float, ended: float, round_trips: int, transaction: int | None) -> None:
        self.events.append((COMMAND, started, ended, sql, round_trips, transaction))

    def replica_told(self, name: str, outcome: str) -> None:
        now = time.perf_counter()
        self.events.append((REPLICA, now, now, name, outcome))

    def waited_for_pool(self, started: float, ended: float) -> None:
        self.events.append((WAITED, started, ended))

    def transaction_began(self, transaction: int) -> None:
        place = place_of_caller()
        now = time.perf_counter()
        self.open[transaction] = (now, place, threading.get_ident())
        self.events.append((BEGAN, now, now, transaction, place))
        if self.on_begin is not None:
            self.on_begin(self)

    def transaction_ended(
        self, transaction: int, outcome: str, started: float, ended: float, round_trips: int
    ) -> None:
        self.open.pop(transaction, None)
        self.events.append((ENDED, started, ended, transaction, outcome, round_trips, place_of_caller()))
        if self.on_transaction is not None:
            self.on_transaction(self, transaction)

    def connection_lost(self) -> None:
        now = time.perf_counter()
        self.events.append((LOST, now, now))

    def hook_ran(self, kind: str, started: float, ended: float, error: BaseException | None) -> None:
        self.events.append((HOOK, started, ended, kind, None if error is None else _shown(error)))

    def retried(self, number: int, error: BaseException) -> None:
        now = time.perf_counter()
        self.events.append((RETRY, now, now, number, _shown(error)))


def place_of_caller() -> Place | None:
    """The innermost line of the application on the caller's stack."""
    frame: Any = _getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not (LIBRARY[file] if file in LIBRARY else is_library(file)):
            return frame.f_code, frame.f_lineno, frame.f_globals
        frame = frame.f_back
    return None


def _shown(error: BaseException) -> str:
    """An error as text: the error itself would keep its frames, and all that is in them."""
    return f"{type(error).__name__.lstrip('_')}: {error}".partition("\n")[0]

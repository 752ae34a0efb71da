"""What goes wrong on purpose while the operations run."""

from __future__ import annotations

import ctypes
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg

from fictive.testing import postgres
from fictive.testing.wire import Wire

OTHERS = (
    "select {}(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    " and backend_type = 'client backend' and application_name <> 'audit' order by random() limit 1"
)


class Faults:
    """A thread that disturbs about `rate` times a second until `stop`."""

    def __init__(
        self,
        server: postgres.Server,
        wire: Wire,
        workers: list[threading.Thread],
        seed: int,
        rate: float,
        kinds: list[str],
    ) -> None:
        self.server = server
        self.wire = wire
        self.workers = workers
        self.done: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._rate = rate
        self._kinds = [getattr(self, kind.replace(" ", "_")) for kind in kinds]
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos-faults", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ending.set()
        self._thread.join()
        self.wire.delay = 0.0
        self.wire.restore()

    def _run(self) -> None:
        while not self._ending.wait(self._rng.expovariate(self._rate)):
            fault: Callable[[], None] = self._rng.choice(self._kinds)
            try:
                fault()
            except psycopg.Error:  # the server restarts
                continue
            self.done[fault.__name__.replace("_", " ")] += 1

    def _sql(self, query: str) -> None:
        with psycopg.connect(self.server.url("ledger"), autocommit=True, application_name="audit") as connection:
            connection.execute(query.encode())

    def _one(self) -> int | None:
        numbers = self.wire.connections
        return self._rng.choice(numbers) if numbers else None

    def _word(self) -> Callable[[str], bool]:
        word = self._rng.choice(["COMMIT", "INSERT", "UPDATE", "SELECT", "BEGIN", "SAVEPOINT"])
        return lambda text: word in text.upper()

    # -- kinds -------------------------------------------------------------------------------------------------------

    def killed_backend(self) -> None:
        self._sql(OTHERS.format("pg_terminate_backend"))

    def cancelled_statement(self) -> None:
        self._sql(OTHERS.format("pg_cancel_backend"))

    def restart(self) -> None:
        if self._rng.random() < 0.1:  # else little else would happen
            self.server.restart(self._rng.choice(["fast", "immediate"]))

    def reset_all(self) -> None:
        self.wire.reset()

    def reset_one(self) -> None:
        if (one := self._one()) is not None:
            self.wire.reset(one)

    def closed(self) -> None:
        if (one := self._one()) is not None:
            self.wire.close_connections(one)

    def half_closed(self) -> None:
        if (one := self._one()) is not None:
            self.wire.half_close(one)

    def cut(self) -> None:
        self.wire.cut()
        self._ending.wait(0.3)
        self.wire.restore()

    def stalled(self) -> None:
        if (one := self._one()) is not None:
            self.wire.cut(one)
            self._ending.wait(0.2)
            self.wire.restore()

    def delayed(self) -> None:
        self.wire.delay = self._rng.choice([0.001, 0.02])
        self._ending.wait(0.3)
        self.wire.delay = 0.0

    def reset_before(self) -> None:
        self.wire.reset_when(self._word(), "before")

    def reset_after(self) -> None:
        self.wire.reset_when(self._word(), "after")

    def truncated(self) -> None:
        self.wire.truncate_when(self._word())

    def interrupt(self) -> None:
        thread = self._rng.choice(self.workers)
        raise_in(thread, self._rng.choice([KeyboardInterrupt, Interrupt]))


class Interrupt(BaseException):
    """As gevent.Timeout and GreenletExit are: no Exception, and from anywhere."""


def raise_in(thread: threading.Thread, error: Any) -> None:
    """Raise `error` at the next bytecode of `thread`, but not within `logging`: up to Python 3.12 it takes its lock in
    one statement and has the `try` in the next, so that the lock would stay taken, and stop everything, for ever."""
    if thread.is_alive() and not _is_logging(thread):  # another may have the identifier of one that has ended
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(error))


def _is_logging(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_globals.get("__name__") == "logging":
            return True
        frame = frame.f_back
    return False


KINDS = [
    "killed backend",
    "killed backend",
    "cancelled statement",
    "restart",
    "reset all",
    "reset one",
    "closed",
    "half closed",
    "cut",
    "stalled",
    "delayed",
    "reset before",
    "reset after",
    "truncated",
    "interrupt",
    "interrupt",
]

"""Who has which connection of a pool, for those who wait for one in vain and for connections held for long."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from .collector import STATEMENT, Collector, place_of_caller
from .lines import Place, line_of
from .timeline import shortened

__all__ = ["Holder", "Holders"]

_MOST_SQL = 100


@dataclasses.dataclass
class Holder:
    """Who took a connection out of the pool, and when."""

    since: float
    thread: int
    thread_name: str
    place: Place | None
    endpoint: str | None
    collector: Collector | None

    def __str__(self) -> str:
        found = [f"{self.endpoint or 'no request'}", f"thread {self.thread_name}", f"for {self.age:.1f} s"]
        if self.place is not None:
            found.append(f"taken at {line_of(self.place)}")
        if (sql := self.last_statement) is not None:
            found.append(f"its last statement: {sql}")
        return ", ".join(found)

    @property
    def age(self) -> float:
        return time.perf_counter() - self.since

    @property
    def last_statement(self) -> str | None:
        """The last one that was answered since the connection was taken."""
        events = list(self.collector.events) if self.collector is not None else []
        for each in reversed(events):
            if each[0] == STATEMENT and each[2] >= self.since:
                return shortened(each[3], _MOST_SQL)
        return None


class Holders:
    """The holders of an engine's connections. Listens to check-outs and check-ins of its pool."""

    def __init__(
        self,
        engine: sa.Engine,
        current: Callable[[], tuple[str | None, Collector | None]],
        on_checkout: Callable[[Holder], None] | None = None,
    ) -> None:
        """`current` gives the endpoint and the collector of who takes a connection."""
        self.engine = engine
        self.current = current
        self.on_checkout = on_checkout
        self._held: dict[Any, Holder] = {}
        event.listen(engine, "checkout", self._check_out)
        event.listen(engine, "checkin", self._check_in)
        event.listen(engine, "detach", self._check_in)
        event.listen(engine, "engine_disposed", self._name_them_in_timeouts)
        self._name_them_in_timeouts(engine)

    @property
    def held(self) -> list[Holder]:
        """Those that have a connection now, the longest first."""
        return sorted(self._held.copy().values(), key=lambda each: each.since)

    def _check_out(self, dbapi: Any, record: Any, proxy: Any) -> None:
        thread = threading.current_thread()
        endpoint, collector = self.current()
        holder = Holder(
            time.perf_counter(), threading.get_ident(), thread.name, place_of_caller(), endpoint, collector
        )
        self._held[record] = holder
        if self.on_checkout is not None:
            self.on_checkout(holder)

    def _check_in(self, dbapi: Any, record: Any) -> None:
        self._held.pop(record, None)

    def _name_them_in_timeouts(self, engine: sa.Engine) -> None:
        """Wrap what waits for a connection; on each pool that the engine gets."""
        pool: Any = engine.pool
        for name in ("connect", "take_soon"):
            if (waits := getattr(pool, name, None)) is not None:
                setattr(pool, name, functools.partial(self._name_them_in_timeout, waits))

    def _name_them_in_timeout(self, waits: Callable[..., Any], *how_long: float) -> Any:
        try:
            return waits(*how_long)
        except sa.exc.TimeoutError as error:
            if holders := self.held:
                named = "".join(f"\n  {each}" for each in holders)
                error.args = (f"{error.args[0] if error.args else error}\nHeld by:{named}", *error.args[1:])
            raise

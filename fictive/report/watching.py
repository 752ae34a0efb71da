"""What a block does with its session's databases, for tests and jobs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import sqlalchemy.orm as sa_orm

from ..connection.watched import unwatch, watch
from ..errors import ConfigurationError
from ..session.given import session_of
from ..session.session import OptInSession
from .collector import Collector
from .report import Report
from .watcher import WATCHER

__all__ = ["Watching", "watching"]


class Watching:
    """What `watching` gives: the report so far, during the block and after it."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self.ended: float | None = None
        """When the block ended."""

    @property
    def report(self) -> Report:
        """Derived anew each time it is asked for."""
        collector = self._collector
        return Report.of(
            collector.events,
            number=collector.number,
            started=collector.started,
            started_wall=collector.started_wall,
            ended=self.ended if self.ended is not None else time.perf_counter(),
        )


@contextlib.contextmanager
def watching(session: sa_orm.Session | sa_orm.scoped_session[Any]) -> Iterator[Watching]:
    """`with watching(db.session) as watched:` and then `watched.report`: statements, round trips, lines, findings.

    Of an opt-in session and its connections; whoever watched it before is told nothing meanwhile. Sends nothing.
    """
    of = session_of(session)
    if not isinstance(of, OptInSession):
        raise ConfigurationError(f"watching() needs an OptInSession, not {type(of).__name__}.")
    collector, before = Collector(), of.info.get(WATCHER)
    watched = Watching(collector)
    _set(of, collector)
    try:
        yield watched
    finally:
        _set(of, before)
        watched.ended = time.perf_counter()


def _set(session: OptInSession, watcher: Any) -> None:
    if watcher is None:
        session.info.pop(WATCHER, None)
    else:
        session.info[WATCHER] = watcher
    for connection in session._fictive.connections.values():
        if watcher is None:
            unwatch(connection.link)
        else:
            watch(connection.link, watcher)

"""Tells a watcher of the statements on Core's connections, whose driver is the driver's own: `db.engine.begin()`.

A session's connection tells its watcher itself, and more exactly; SQLAlchemy's events are all there is for the others.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from .watcher import Watcher

__all__ = ["NUMBERS", "watch_engine"]

NUMBERS = itertools.count(-1, -1)
"""Of Core's transactions: negative, so that they are none of a session's."""

_STATE = "fictive.report"
_SAVEPOINTS = ("SAVEPOINT ", "RELEASE SAVEPOINT ", "ROLLBACK TO SAVEPOINT ")


class _State:
    """What is known of one connection while it is out of the pool."""

    __slots__ = ("carried", "ending", "started", "transaction")

    def __init__(self) -> None:
        self.started: list[float] = []
        self.transaction: int | None = None
        self.carried: list[str] = []
        self.ending: tuple[str, float] | None = None


def watch_engine(engine: sa.Engine, current: Callable[[], Watcher | None], *, rides: bool) -> None:
    """Tell the watcher that `current` gives of the statements on `engine`. `rides`: BEGIN travels with a statement."""
    if engine.dialect.is_async:
        return

    def state_of(connection: sa.Connection) -> _State:
        found = connection.info.get(_STATE)
        if found is None:
            found = connection.info[_STATE] = _State()
        return found

    def before(
        connection: sa.Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: Any
    ) -> None:
        watcher = current()
        if watcher is None:
            return
        state = state_of(connection)
        finish(state, watcher)
        if state.carried and not rides:
            now = time.perf_counter()
            for command in state.carried:
                watcher.command(command, now, now, 1, state.transaction)
            state.carried.clear()
        state.started.append(time.perf_counter())

    def after(
        connection: sa.Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: Any
    ) -> None:
        ended = time.perf_counter()
        tell(connection, cursor, statement, parameters, many, ended, None)

    def tell(
        connection: sa.Connection, cursor: Any, statement: str, parameters: Any, many: Any, ended: float,
        error: BaseException | None,
    ) -> None:  # fmt: skip
        watcher, state = current(), state_of(connection)
        if watcher is None or not state.started:
            return
        started = state.started.pop()
        carried, state.carried = state.carried, []
        trips = len(parameters) if many and engine.dialect.driver == "psycopg2" else 1
        rows = getattr(cursor, "rowcount", -1)
        if statement.startswith(_SAVEPOINTS):
            watcher.command(statement, started, ended, 1, state.transaction)
            return
        watcher.statement(statement, parameters, started, ended, rows, trips, carried, state.transaction, error)

    def failed(context: Any) -> None:
        if context.connection is None or context.connection.closed or context.statement is None:
            return
        if not context.connection.invalidated:
            tell(
                context.connection, None, context.statement, context.parameters, False,
                time.perf_counter(), context.original_exception,
            )  # fmt: skip
        if context.is_disconnect and (watcher := current()) is not None:
            watcher.connection_lost()

    def begin(connection: sa.Connection) -> None:
        watcher = current()
        if watcher is None or connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
            return
        state = state_of(connection)
        finish(state, watcher)
        state.transaction = next(NUMBERS)
        state.carried.append("BEGIN")
        watcher.transaction_began(state.transaction)

    def ending(outcome: str) -> Callable[[sa.Connection], None]:
        def listener(connection: sa.Connection) -> None:
            if not connection.invalidated and state_of(connection).transaction is not None:
                state_of(connection).ending = outcome, time.perf_counter()

        return listener

    def finish(state: _State, watcher: Watcher) -> None:
        if state.ending is not None and state.transaction is not None:
            outcome, started = state.ending
            # BEGIN was not sent if it waits still: neither is its end
            trips = 0 if "BEGIN" in state.carried else 1
            watcher.transaction_ended(state.transaction, outcome, started, time.perf_counter(), trips)
        if state.ending is not None:
            state.ending, state.transaction, state.carried = None, None, []

    def checkin(dbapi: Any, record: Any) -> None:
        state = record.info.pop(_STATE, None)
        if state is not None and (watcher := current()) is not None:
            finish(state, watcher)

    event.listen(engine, "before_cursor_execute", before)
    event.listen(engine, "after_cursor_execute", after)
    event.listen(engine, "handle_error", failed)
    event.listen(engine, "begin", begin)
    event.listen(engine, "commit", ending("committed"))
    event.listen(engine, "rollback", ending("rolled back"))
    event.listen(engine.pool, "checkin", checkin)

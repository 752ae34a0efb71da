"""Tells a watcher of the statements on Core's connections, whose driver is the driver's own: `db.engine.begin()`.

A session's connection tells its watcher itself, and more exactly; SQLAlchemy's events are all there is for the others.
They are listened to on each such connection: on the engine they would cost every statement of the sessions too.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine.interfaces import ExecuteStyle

from ..connection.prepared import Prepared
from .watcher import Watcher

__all__ = ["watch_engine"]

_numbers = itertools.count(-1, -1)
"""Of Core's transactions: negative, so that they are none of a session's."""

_SAVEPOINTS = ("SAVEPOINT ", "RELEASE SAVEPOINT ", "ROLLBACK TO SAVEPOINT ")


def watch_engine(
    engine: sa.Engine,
    current: Callable[[], Watcher | None],
    *,
    tells_itself: Callable[[sa.Connection], bool],
) -> None:
    """Tell the watcher that `current` gives of the statements on connections of `engine`, from the next one on.

    `tells_itself` says which connections tell their watcher without it.
    """

    def connected(connection: sa.Connection) -> None:
        if tells_itself(connection) or (watcher := current()) is None:
            return
        _Listener(connection, watcher)

    event.listen(engine, "engine_connect", connected)


class _Listener:
    """Listens to one connection, and knows what it is at."""

    def __init__(self, connection: sa.Connection, watcher: Watcher) -> None:
        self.watcher = watcher
        self.counts_each = connection.dialect.driver == "psycopg2"
        self.running: tuple[str, Any, float] | None = None
        self.prepared = Prepared(None)
        self.transaction: int | None = None
        self.waiting = False
        """Whether BEGIN has not been sent yet."""
        event.listen(connection, "before_cursor_execute", self.before)
        event.listen(connection, "after_cursor_execute", self.after)
        event.listen(connection, "begin", self.begin)
        event.listen(connection, "commit", self.commit)
        event.listen(connection, "rollback", self.rollback)

    def before(self, connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        self.failed()
        self.prepared.look(_dbapi(connection))
        self.running = statement, parameters, time.perf_counter()

    def after(self, connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        ended = time.perf_counter()
        # each set of parameters is a message; psycopg sends them in one go. SQLAlchemy's "insertmanyvalues" is "many"
        # too, and is one statement
        many = many and context.execute_style is ExecuteStyle.EXECUTEMANY
        trips = len(parameters) if many and self.counts_each else 1
        if not many:
            trips += self.prepared.messages(_dbapi(connection))
        self.tell(ended, getattr(cursor, "rowcount", -1), trips, None)

    def failed(self) -> None:
        """A statement that was not answered has failed, when something else comes."""
        if self.running is not None:
            self.tell(time.perf_counter(), -1, 1, _Failed("see the application's log"))

    def tell(self, ended: float, rows: int, trips: int, error: BaseException | None) -> None:
        if self.running is None:
            return
        (statement, parameters, started), self.running = self.running, None
        if self.waiting:
            self.watcher.command("BEGIN", started, started, 1, self.transaction)
            self.waiting = False
        if statement.startswith(_SAVEPOINTS):
            self.watcher.command(statement, started, ended, 1, self.transaction)
        else:
            self.watcher.statement(statement, parameters, started, ended, rows, trips, (), self.transaction, error)

    def begin(self, connection: sa.Connection) -> None:
        if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
            return
        self.transaction, self.waiting = next(_numbers), True
        self.watcher.transaction_began(self.transaction)

    def commit(self, connection: Any) -> None:
        self.end("committed", 1)

    def rollback(self, connection: Any) -> None:
        self.failed()
        self.prepared.look(None if connection.invalidated else _dbapi(connection))
        self.end("rolled back", 2 if self.prepared.names else 1)  # psycopg forgets what it has prepared

    def end(self, outcome: str, trips: int) -> None:
        """The event comes before COMMIT or ROLLBACK is sent: how long that takes is not known."""
        if self.transaction is not None:
            now = time.perf_counter()
            number, self.transaction = self.transaction, None
            self.watcher.transaction_ended(number, outcome, now, now, 0 if self.waiting else trips)
            self.waiting = False


def _dbapi(connection: sa.Connection) -> Any:
    return connection.connection.dbapi_connection


class _Failed(Exception):
    """Stands for the error of a statement, which the events do not tell."""

"""A link that tells a watcher what it does (`fictive.report.watcher`). Without a watcher none of this is in the way:
a link becomes a `WatchedLink` when it is given one, and makes other cursors from then on.
"""

from __future__ import annotations

import functools
import itertools
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..drivers import TransactionStatus
from ..errors import DirectConnectionRequired, TransactionAborted
from .cursors import StatementCursor, TransactionCursor
from .link import Link
from .prepared import Prepared

if TYPE_CHECKING:
    from collections.abc import Callable

    import sqlalchemy as sa

    from ..report.watcher import Watcher
    from .link import SessionConnection
    from .replicas import Replica
    from .servers import ServerConnection

__all__ = ["unwatch", "watch"]

_numbers = itertools.count(1)

_SAVEPOINTS = ("SAVEPOINT ", "RELEASE SAVEPOINT ", "ROLLBACK TO SAVEPOINT ")


def watch(link: Link, watcher: Watcher) -> None:
    """Tell `watcher` of everything on `link` from now on. A transaction that is open is told of as begun now."""
    link.watcher = watcher
    link.__class__ = WatchedLink
    if link.in_transaction:
        link.number = link.number or next(_numbers)
        watcher.transaction_began(link.number)


def unwatch(link: Link) -> None:
    """Tell nobody any more."""
    link.watcher = None
    link.__class__ = Link


class WatchedLink(Link):
    __slots__ = ()

    def begin(self) -> None:
        super().begin()
        self.number = next(_numbers)
        self.watcher.transaction_began(self.number)

    def commit(self) -> None:
        self._end_watched(super().commit, "committed")

    def rollback(self) -> None:
        self._end_watched(super().rollback, "rolled back")

    def end_two_phase(self, end: Callable[[], None], *, commits: bool) -> None:
        ends = functools.partial(super().end_two_phase, end, commits=commits)
        self._end_watched(ends, "committed" if commits else "rolled back")

    def _end_watched(self, end: Callable[[], None], outcome: str) -> None:
        number, server, self.number = self.number, self.server, None
        if number is None:  # a rollback within a commit, or a second one
            end()
            return
        sends = server is not None and self._is_open(server)
        sent, prepared = 0 if server is None else server.trips, None if self.driver.buffers else _prepared(self)
        started = perf_counter()
        try:
            end()
        except TransactionAborted:
            outcome = "aborted"
            raise
        except BaseException:
            if outcome == "committed":
                outcome = "in doubt" if self.may_be_committed else "rolled back"
            raise
        finally:
            ended, trips = perf_counter(), 0
            if server is not None:
                apart = server.trips - sent
                trips = max(apart, 1) if sends else apart
                if prepared is not None:
                    trips += prepared.messages(server.dbapi)
            self.watcher.transaction_ended(number, outcome, started, ended, trips)

    def _is_open(self, server: ServerConnection) -> bool:
        """Whether there is something to end on the server: neither a text nor the loss of its connection has done
        so."""
        if server.is_lost() or not (self.begun or self.native):
            return False
        return server.transaction_status() != TransactionStatus.IDLE or self.driver.own_transaction(server.dbapi)

    def check_out(self) -> ServerConnection:
        started = perf_counter()
        try:
            server = super().check_out()
        finally:
            self.watcher.waited_for_pool(started, perf_counter())
        if self.prepared is not None:
            self.prepared.look(server.dbapi)
        return server

    def check_out_of(self, replica: sa.Engine) -> ServerConnection:
        started = perf_counter()
        try:
            return super().check_out_of(replica)
        finally:
            self.watcher.waited_for_pool(started, perf_counter())

    def unpin(self) -> None:
        server = self.kept
        locks = server is not None and server is not self.server and not server.is_lost()
        started = perf_counter()
        super().unpin()
        if locks:
            self.watcher.command("SELECT pg_advisory_unlock_all()", started, perf_counter(), 1, None)

    def replica_asked(self, server: ServerConnection) -> None:
        if self.prepared is not None:
            self.prepared.look(server.dbapi)

    def replica_told(self, replica: Replica, outcome: str, trips: int) -> None:
        self.watcher.replica_told(replica.name, outcome)
        self.replica_trips = trips
        if outcome == "answered":
            self.replica_trips -= 1  # that of the statement itself
        elif self.prepared is not None:
            self.prepared = _prepared(self)

    def stream_connection(self) -> SessionConnection:
        connection = super().stream_connection()
        link = connection.link
        watch(link, self.watcher)
        return connection

    def statement_failed(self, server: ServerConnection, error: BaseException, *, may_repeat: bool) -> bool:
        repeats = super().statement_failed(server, error, may_repeat=may_repeat)
        if repeats:
            self.watcher.retried(1, error)
        return repeats

    def first_statement_failed(self, server: ServerConnection, error: BaseException, waited: list[str]) -> bool:
        repeats = super().first_statement_failed(server, error, waited)
        if repeats:
            self.watcher.retried(1, error)
        return repeats

    def _drop(self, server: ServerConnection, error: BaseException | None = None) -> None:
        Link._drop(self, server, error)
        if self.lost:
            self.watcher.connection_lost()


class WatchedStatementCursor(StatementCursor):
    """Times the statement."""

    __slots__ = ()

    def execute(self, query: Any, parameters: Any = None, **options: Any) -> Any:
        link = self.link
        failure: BaseException | None = None
        link.prepared = None if link.driver.buffers else _prepared(link)
        link.replica_trips, link.told = 0, False
        self.__class__ = StatementCursor  # type: ignore[assignment]  # a second try is not another statement
        started = perf_counter()
        try:
            return StatementCursor.execute(self, query, parameters, **options)
        except BaseException as error:
            failure = error
            raise
        finally:
            ended = perf_counter()
            # this statement has begun a transaction, or had one of its own, and was told of as a part of it
            if link.in_transaction or isinstance(self, WatchedTransactionCursor):
                self.__class__ = WatchedTransactionCursor  # type: ignore[assignment]
            else:
                self.__class__ = WatchedStatementCursor
                if not link.told and (failure is None or self.driver_cursor is not None):
                    trips = 1 + link.replica_trips
                    _tell(self, query, parameters, started, ended, trips, (), failure, link.prepared)


class WatchedTransactionCursor(TransactionCursor):
    """Times the statement, and notes what it carried."""

    __slots__ = ()

    def execute(self, query: Any, parameters: Any = None, **options: Any) -> Any:
        link = self.link
        if not link.in_transaction:  # a cursor that outlived its transaction
            self.__class__ = WatchedStatementCursor  # type: ignore[assignment]
            return self.execute(query, parameters, **options)
        waiting = link.pending.commands
        carried: Any = list(waiting) if waiting else ()
        server = link.server
        sent = 0 if server is None else server.trips
        first = not link.begun
        failure: BaseException | None = None
        prepared = link.prepared = None if link.driver.buffers else _prepared(link)
        self.__class__ = TransactionCursor  # type: ignore[assignment]  # a second try is not another statement
        started = perf_counter()
        try:
            return TransactionCursor.execute(self, query, parameters, **options)
        except BaseException as error:
            failure = error
            raise
        finally:
            ended = perf_counter()
            self.__class__ = WatchedTransactionCursor
            used = link.server
            refused = isinstance(failure, (TransactionAborted, DirectConnectionRequired))  # nothing was sent
            if self.driver_cursor is not None or (failure is not None and used is not None and not refused):
                trips = 1
                if used is not None:
                    trips += used.trips - (sent if used is server else 0)
                if link.native:
                    trips += first
                    carried = ()
                elif first and (not carried or not carried[0].startswith("BEGIN")):
                    carried = ["BEGIN", *carried]
                _tell(self, query, parameters, started, ended, trips, carried, failure, prepared)

    def executemany(self, query: Any, parameters: Any) -> Any:
        return _watched_many(self, TransactionCursor.executemany, query, parameters)

    def run_instead(self, run: Callable[[Any], None], query: Any) -> None:
        """A COPY, which is more than `execute`."""
        _watched_many(self, lambda cursor, query, parameters: run(cursor), query, None)


WatchedLink.statement_cursor = WatchedStatementCursor
WatchedLink.transaction_cursor = WatchedTransactionCursor


def _tell(
    cursor: Any, query: Any, parameters: Any, started: float, ended: float, trips: int, carried: Any,
    failure: BaseException | None, prepared: Prepared | None,
) -> None:  # fmt: skip
    driver_cursor, link = cursor.driver_cursor, cursor.link
    rows = -1
    if driver_cursor is not None:
        rows = driver_cursor.rowcount
        if prepared is not None:
            trips += prepared.messages(driver_cursor.connection)
    text = query if type(query) is str else str(query, "utf-8", "replace") if isinstance(query, bytes) else str(query)
    if text.startswith(_SAVEPOINTS):
        link.watcher.command(text, started, ended, trips, link.number)
    else:
        link.watcher.statement(text, parameters, started, ended, rows, trips, carried, link.number, failure)


def _watched_many(cursor: Any, run: Callable[..., Any], query: Any, parameters: Any) -> Any:
    """Several sets of parameters: psycopg2 sends each by itself, psycopg all in one pipeline."""
    link = cursor.link
    server = link.server
    sent = 0 if server is None else server.trips
    failure: BaseException | None = None
    started = perf_counter()
    try:
        return run(cursor, query, parameters)
    except BaseException as error:
        failure = error
        raise
    finally:
        ended = perf_counter()
        trips = len(parameters) if parameters is not None and link.driver.buffers else 1
        if link.server is not None:
            trips += link.server.trips - (sent if link.server is server else 0)
        _tell(cursor, query, parameters, started, ended, trips, (), failure, None)


def _prepared(link: Link) -> Prepared:
    """Of the connection that the next statement will be sent on, as far as that is known."""
    server = link.server or link.kept or link.early or (link.idle[-1] if link.idle else None)
    return Prepared(None if server is None else server.dbapi)

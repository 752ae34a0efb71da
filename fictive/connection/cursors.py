"""The cursors that SQLAlchemy gets: one statement outside, one in a transaction, and one that is read bit by bit.

All that is decided about a statement is decided here, where it is about to be sent, by its text.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Self

from ..drivers.base import INERROR, INTRANS
from ..drivers.pending import note_parsed, parsed
from ..errors import TransactionRequired
from ..session.private import EmptyListener
from . import process
from .classify import PLAIN_READ, classify, known_texts
from .servers import check_out
from .statement_settings import execute_with_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from .link import Link, SessionConnection
    from .servers import ServerConnection
    from .statement_settings import DueSettings

__all__ = ["StatementCursor", "StreamCursor", "TransactionCursor"]

log = logging.getLogger("fictive.connection")

_SEND_A_STATEMENT = frozenset({"callproc", "copy", "copy_expert", "stream"})
"""What of a driver's cursor sends a statement that it is given, besides `execute`."""
_SEND = _SEND_A_STATEMENT | {"copy_from", "copy_to"}


class SessionCursor:
    """What the cursors have in common: a driver's cursor behind them, once there is one."""

    __slots__ = ("__weakref__", "_rows", "arraysize", "connection", "description", "driver_cursor", "link",
                 "repeats")  # fmt: skip

    def __init__(self, link: Link) -> None:
        self.link = link
        self.connection = link.driver_side
        self.driver_cursor: Any = None
        self.description: Any = None
        self._rows: Any = None
        self.repeats = True
        """Whether a read outside is run again when its connection is lost under it."""

    def fetchall(self) -> Any:
        rows = self._rows
        if rows is None:
            return self.driver_cursor.fetchall()
        self._rows = ()
        return rows

    def fetchone(self) -> Any:
        rows = self._rows
        if rows is None:
            return self.driver_cursor.fetchone()
        if type(rows) is not deque:
            rows = self._rows = deque(rows)
        return rows.popleft() if rows else None

    def fetchmany(self, size: int | None = None) -> Any:
        rows = self._rows
        wanted: int = size or self.arraysize
        if rows is None:
            return self.driver_cursor.fetchmany(wanted)
        found = (self.fetchone() for _ in range(min(wanted, len(rows))))
        return list(found)

    def __iter__(self) -> Any:
        return iter(self.fetchall())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        cursor, self.driver_cursor = self.driver_cursor, None
        if cursor is not None and not self.link.driver.buffers:  # else it holds nothing on the server
            cursor.close()
        if self.link.early is not None:
            self.link.let_early_go()

    @property
    def rowcount(self) -> int:
        return -1 if self.driver_cursor is None else self.driver_cursor.rowcount

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        cursor = self.driver_cursor
        if cursor is None:
            cursor = self.driver_cursor = self._driver_cursor()
        return getattr(cursor, name)

    def _driver_cursor(self) -> Any:
        """One for what is no `execute`: COPY, `mogrify`, `setinputsizes`."""
        raise NotImplementedError


class StatementCursor(SessionCursor):
    """A statement outside: borrows a connection, sends, fetches, and gives the connection back."""

    __slots__ = ()

    def execute(self, query: Any, parameters: Any = None, **options: Any) -> Any:
        link = self.link
        if options:  # the driver's own, which nothing rides with
            written = link.owner.judge(link, classify(query), query, parameters)
            if not link.in_transaction:
                return self.execute_in_transaction(query, parameters, written, **options)
            self.__class__ = link.transaction_cursor  # type: ignore[assignment]
            return self.execute(query, parameters, **options)
        try:
            statement = known_texts[query]
        except (KeyError, TypeError):
            statement = classify(query)
        owner = link.owner
        written = None
        if statement is not PLAIN_READ or owner.statement_options:
            written = owner.judge(link, statement, query, parameters)
            if link.in_transaction:  # this statement has begun one
                self.__class__ = link.transaction_cursor  # type: ignore[assignment]
                return self.execute(query, parameters)
            if written is not None and link.rest_options.read_only:  # only a transaction can be READ ONLY
                return self.execute_in_transaction(query, parameters, written)
        begin, events = link.engine.dispatch.begin, owner.dispatch
        after = begin if events is None else events.after_begin
        if (
            begin.__class__ is not EmptyListener
            or begin.parent_listeners
            or after.__class__ is not EmptyListener
            or after.parent_listeners
        ) and (not owner.keeps and link.begin_is_heard()):
            return self.execute_in_transaction(query, parameters, written)
        if owner.local_settings.function is not None and (settings := owner.local_settings.of(link)):
            return execute_with_settings(self, settings, statement, query, parameters, written)
        if link.replicas is not None and written is None and statement.is_plain_read:
            from .replica_reads import read_from_replica  # not before there is a replica

            if read_from_replica(link, self, query, parameters):
                return None
        if owner.keeps:
            server = link.keep()
        elif link.early is not None or link.kept is not None:
            server = link.in_use()
        elif link.streams and written is None and (stream := link.open_stream()) is not None:
            return stream.run(self, query, parameters)
        elif not self.repeats:
            server = check_out(link.engine, link.driver)
        else:
            try:
                server = link.idle.pop()
            except IndexError:
                server = link.check_out()
            else:
                # a read is run again anyway if its connection turns out to be lost; nothing else is
                pool = server.pool
                out = pool.checkout_listeners
                if (
                    ((statement is not PLAIN_READ or not owner.retries) and server.poll(0))
                    or out[0] is not out[-1]  # somebody else than fictive listens to the pool
                    or pool.checkouts_of_all
                    or pool.ages
                ):
                    server = link.second_look(server)
        if written is not None and server.rest.characteristics.read_only:
            if server is not link.kept and server is not link.early:
                server.give_back()
            return self.execute_in_transaction(query, parameters, written)
        try:
            cursor = self.driver_cursor = server.dbapi.cursor()
            if parameters is None:
                cursor.execute(query)
            else:
                cursor.execute(query, parameters)
            description = self.description = cursor.description
            if server.buffers:
                self._rows = cursor.fetchall() if description is not None else None
                if server.has_notices and server.dbapi.notices:
                    link.take_notices(server.dbapi)
        except BaseException as error:
            if link.statement_failed(server, error, may_repeat=self.repeats and written is None):
                self.repeats = False
                return self.execute(query, parameters)
            raise
        if server is not link.early and server is not link.kept:
            pool = server.pool
            if not server.idles or pool.wanted or pool._overflow > 0 or pool.reset_listeners or pool.resets_of_all:
                server.give_back()
            elif pool.ages or pool.checkins_of_all or (back := pool.checkin_listeners)[0] is not back[-1]:
                server.lie_idle()
            else:
                pool.idle.append(server)
                if pool.wanted:
                    pool._hand_over()
        elif server is link.early:
            link.let_early_go()
        if written is not None:
            link.wrote_alone(written, query, cursor.rowcount)
        return self

    def take_over(self, cursor: Any, server: ServerConnection) -> None:
        """Keep the driver's cursor, and the rows that are in it."""
        self.driver_cursor, self.description = cursor, cursor.description
        if server.buffers:
            self._rows = cursor.fetchall() if self.description is not None else None
            if server.has_notices and server.dbapi.notices:
                self.link.take_notices(server.dbapi)

    def execute_in_transaction(self, query: Any, parameters: Any, written: str | None, **options: Any) -> Any:
        """In a short transaction of its own: somebody listens to the beginning of transactions, and counts on each
        statement having one; or its settings cannot share its message."""
        link = self.link
        with link.owner.short_transaction(link.engine):
            self.__class__ = link.transaction_cursor  # type: ignore[assignment]
            self.execute(query, parameters, **options)
        if written is not None:
            link.owner.wrote(written)
        return self

    def executemany(self, query: Any, parameters: Any) -> Any:
        """Several statements: in a transaction of their own."""
        link = self.link
        written = link.owner.judge(link, classify(query), query, None)
        has_begun = link.in_transaction
        with contextlib.nullcontext() if has_begun else link.owner.short_transaction(link.engine):
            self.__class__ = link.transaction_cursor  # type: ignore[assignment]
            self.executemany(query, parameters)
        if written is not None:
            link.owner.wrote(written)

    def __getattr__(self, name: str) -> Any:
        if name in _SEND:
            self.link.note_written()
        return super().__getattr__(name)

    def _driver_cursor(self) -> Any:
        return self.link.in_use().dbapi.cursor()


class TransactionCursor(SessionCursor):
    """A statement in a transaction: the first takes what waits along, later ones go straight through."""

    __slots__ = ()

    def execute(self, query: Any, parameters: Any = None, **options: Any) -> Any:
        link = self.link
        if not link.in_transaction:  # a cursor that outlived its transaction
            self.__class__ = StatementCursor  # type: ignore[assignment]
            return self.execute(query, parameters, **options)
        if link.trouble is not None:
            raise link.aborted()
        try:
            statement = known_texts[query]
        except (KeyError, TypeError):
            statement = classify(query)
        if statement is not PLAIN_READ and statement.savepoint is not None and link.controls(*statement.savepoint):
            return None
        if link.is_pooled and statement is not PLAIN_READ:
            link.refuse_connection_state(statement, parameters)
        server = link.server
        if server is None:
            server = link.take(repeats=True)
        elif server.generation is not process.generation:
            raise link.inherited()
        if link.native and not link.begun:
            link.begun = link.look_natively(server)
        if link.begun:
            status = server.transaction_status()
            if status != INTRANS and status != INERROR:
                link.refuse_state(server, status)
        pending = link.pending
        first = not link.begun
        waited = list(pending.commands) if first else []
        try:
            if options:
                parameters = options.pop("params", options.pop("vars", parameters))
                link.send_pending(server)
                cursor = self.driver_cursor = server.dbapi.cursor()
                cursor.execute(query, parameters, **options)
            elif link.native or not pending.commands or (not first and pending.waits_for_commit()):
                cursor = self.driver_cursor = server.dbapi.cursor()
                if parameters is None:
                    cursor.execute(query)
                else:
                    cursor.execute(query, parameters)
            else:
                cursor = link.driver.execute_with(server, pending, query, parameters)
                if cursor is None:
                    link.go_native(server)
                    cursor = server.dbapi.cursor()
                    cursor.execute(query, parameters)
                self.driver_cursor = cursor
            self.description = cursor.description
            link.begun = True
        except BaseException as error:
            if first and link.first_statement_failed(server, error, waited):
                return self.execute(query, parameters, **options)
            if first and link.settings_command is not None and link.settings_were_fine(server, error, waited):
                return self.execute(query, parameters, **options)
            link.note_failure(server, error, first=first)
            raise
        if link.prefetches and server.buffers and self.description is not None:
            self._rows = cursor.fetchall()
        if statement.leaves_something or (
            (statement is not PLAIN_READ or link.owner.statement_options)
            and (link.log is not None or link.replicas is not None)
        ):
            link.note_statement(statement, query, parameters)
        if query.__class__ is str and query not in parsed:
            note_parsed(query)
        if server.has_notices and server.dbapi.notices:
            link.take_notices(server.dbapi)
        return self

    def executemany(self, query: Any, parameters: Any) -> Any:
        cursor = self.driver_cursor = self._driver_cursor()
        statement = classify(query)
        try:
            cursor.executemany(query, parameters)
        except BaseException as error:
            if self.link.server is not None:
                self.link.note_failure(self.link.server, error, first=False)
            raise
        self.description = cursor.description
        if statement is not PLAIN_READ:
            self.link.note_statement(statement, query)
        return None

    def __getattr__(self, name: str) -> Any:
        if name == "mogrify" and self.driver_cursor is None and self.link.trouble is None:
            # it sends nothing; tools that watch look for it before each statement
            return getattr(self.link.take().dbapi.cursor(), name)
        found = super().__getattr__(name)
        return functools.partial(self._run_past_execute, found) if name in _SEND_A_STATEMENT else found

    def _run_past_execute(self, run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """A statement by a method of the driver's cursor other than `execute`."""
        if self.link.trouble is not None:
            raise self.link.aborted()
        query = next(iter((*args, *options.values())), "")
        if getattr(run, "__name__", "") == "callproc":
            query = f"SELECT {query}()"
        self.link.note_statement(classify(query), query)
        return run(*args, **options)

    def _driver_cursor(self) -> Any:
        link = self.link
        if link.trouble is not None:
            raise link.aborted()
        server = link.take()
        link.send_pending(server)
        link.wrote = True
        return server.dbapi.cursor()


class StreamCursor(SessionCursor):
    """A result that is read bit by bit from a cursor of the server's, which PostgreSQL has within transactions only
    (PostgreSQL documentation, "DECLARE"). Outside it has a connection and a READ ONLY transaction of its own, which
    end when the result is exhausted, closed or dropped."""

    __slots__ = ("_end", "_failure", "_name", "_stream")

    def __init__(self, link: Link, name: str) -> None:
        super().__init__(link)
        self._name = '"' + name.replace('"', '""') + '"'
        self._end: Any = None
        self._stream: Any = None  # the link of a connection of its own
        self._failure: Exception | None = None
        if not link.in_transaction and not link.owner.keeps:
            try:
                self._open()
            except Exception as error:  # raised by `execute`, as it is: here SQLAlchemy would wrap it
                self._failure = error

    def _open(self) -> None:
        link = self.link
        other = link.open_stream(link.owner.local_settings.of(link)) if link.streams else None
        if other is not None:  # an eager load of its rows, as a rule, which needs no second connection
            connection, self._stream = other._end.peek()[2][0], other._stream
        else:
            connection = link.stream_connection()
            self._stream = connection.link
        self._stream.users += 1
        self._end = weakref.finalize(self, _end_stream, connection)
        self._end.atexit = False
        if link.streams is None:
            link.streams = weakref.WeakSet()
        link.streams.add(self)

    def execute(self, query: Any, parameters: Any = None) -> Any:
        link = self.link
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        try:
            if not link.in_transaction:
                link.owner.judge(link, classify(query), query, parameters)
                if link.in_transaction:  # this statement has begun one
                    self._finish()
                    self._stream = self._end = None
                elif link.owner.keeps:
                    raise TransactionRequired(
                        "yield_per and stream_results need a transaction, and in pinned() only you can begin it: "
                        "`with db.pinned(), db.session.begin():`."
                    )
            text = query.decode() if isinstance(query, bytes) else query
            self._run(f"DECLARE {self._name} CURSOR WITHOUT HOLD FOR {text}", parameters)
        except BaseException:
            self._finish()
            raise

    def _run(self, command: str, parameters: Any = None) -> Any:
        link = self._stream or self.link
        if self._end is not None and not self._end.alive:
            raise link.dialect.loaded_dbapi.ProgrammingError("this result was closed with its session")
        cursor = link.cursor()
        try:
            cursor.execute(command, parameters)
        except Exception as error:
            if self._end is not None and link.server is not None and link.server.is_lost():
                self._finish()
                lost: type[Exception] = link.dialect.loaded_dbapi.OperationalError
                if not isinstance(error, lost):
                    raise lost(f"the connection was lost while its result was read: {error}") from error
            raise
        self.driver_cursor = cursor.driver_cursor
        self.description = cursor.driver_cursor.description
        return cursor.driver_cursor

    def _fetch(self, how_many: str) -> Any:
        return self._run(f"FETCH FORWARD {how_many} FROM {self._name}").fetchall()

    def fetchone(self) -> Any:
        rows = self._fetch("1")
        return rows[0] if rows else None

    def fetchmany(self, size: int | None = None) -> Any:
        return self._fetch(str(int(size or 1)))

    def fetchall(self) -> Any:
        return self._fetch("ALL")

    def serves(self, settings: DueSettings) -> bool:
        """Whether its connection can run a read of the same session, with these settings, between two of its rows."""
        stream = self._stream
        return (
            stream is not None
            and stream.in_transaction
            and stream.server is not None
            and not stream.server.is_lost()
            and stream.settings == settings
        )

    def run(self, cursor: SessionCursor, query: Any, parameters: Any) -> None:
        """Run a read of the session's on the connection of this stream."""
        self.link.told = True
        inner = self._stream.cursor()
        inner.execute(query, parameters)
        cursor.driver_cursor, cursor.description = inner.driver_cursor, inner.description
        cursor._rows = inner.fetchall() if inner.description is not None else None

    def close(self) -> None:
        self.driver_cursor = None
        if self._end is not None:
            self._finish()
            return
        link = self.link
        if link.in_transaction and link.begun and link.trouble is None:
            server = link.server
            if server is not None and server.transaction_status() == INTRANS:
                self._run(f"CLOSE {self._name}")
                self.driver_cursor = None

    def _finish(self) -> None:
        if self._end is not None:
            self._end()


def _end_stream(connection: SessionConnection) -> None:
    link = connection.link
    link.users -= 1
    if link.users:
        return
    try:
        connection.close()
    except Exception:  # the connection is lost, and was dropped
        log.debug("closing the connection of a stream failed", exc_info=True)

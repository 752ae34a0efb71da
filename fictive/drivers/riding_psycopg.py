"""psycopg (3) connections whose BEGIN and SAVEPOINT ride with the next statement. Imported where psycopg is in use.

The statement goes in the extended protocol with its values and types as psycopg always sends them; in front of it, in
libpq's pipeline mode, the control statements, and one Sync behind all: one round trip (PostgreSQL documentation,
"Pipeline Mode"). Each statement is parsed by itself: none takes another down, and errors are the statement's own.
psycopg's own `pipeline()` waits for BEGIN; docs/round-trips has the measurement, also of client-side binding, which
changes the types of values. Whatever does not come by a cursor of ours meets `_start_query`, where psycopg begins its
transactions, and sends what waits from there: unaccelerated, and right.

Uses of psycopg's own names, held by `tests/test_private.py`: `Connection._start_query`, `_exec_command`,
`_get_tx_start_command`, `_pipeline`; `Cursor._maybe_prepare_gen`, `_check_results`, `_select_current_result`.
"""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import generators
from psycopg.pq import Format, TransactionStatus

from .riding import Waiting, is_anonymous_block, parse_control

if TYPE_CHECKING:
    from psycopg.abc import PQGen

__all__ = ["RidingConnection"]


class RidingConnection(psycopg.Connection[Any]):
    """A psycopg connection; what differs is only how many messages it sends."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._waiting = Waiting()
        self._carrying = False
        super().__init__(*args, **kwargs)
        self.cursor_factory = _CarryingCursor

    def commit(self) -> None:
        releases = self._waiting.with_commit()
        if releases and self.pgconn.transaction_status == TransactionStatus.INTRANS and self._pipeline is None:
            self.send([*releases, "COMMIT"])
        else:
            super().commit()

    def rollback(self) -> None:
        self._waiting.clear()
        super().rollback()

    def ride(self, command: str) -> None:
        """Let `command`, such as a SET LOCAL, go with the next statement of the transaction."""
        self._waiting.add(command)

    def begin_command(self) -> str | None:
        """The BEGIN that the next statement needs; None in autocommit and within a transaction."""
        if self.autocommit or self.pgconn.transaction_status != TransactionStatus.IDLE:
            return None
        return self._get_tx_start_command().decode()

    def transaction(self, *args: Any, **kwargs: Any) -> Any:
        if self._waiting:  # savepoints by hand, so a transaction is open
            with self.lock:
                self.wait(self._start_query())
        return super().transaction(*args, **kwargs)

    def _start_query(self) -> PQGen[None]:
        if self._carrying:
            return
        yield from super()._start_query()
        if self.pgconn.transaction_status == TransactionStatus.INTRANS:
            commands = self._waiting.all(None)
            self._waiting.sent(commands)
            for command in commands:
                yield from self._exec_command(command)

    def send(self, commands: list[str]) -> None:
        """Send control statements in one message of their own."""
        self._waiting.sent(commands)
        self._carrying = True
        try:
            with psycopg.Cursor(self) as cursor:
                cursor.execute("; ".join(commands).encode(), prepare=False)
        finally:
            self._carrying = False


class _CarryingCursor(psycopg.Cursor[Any]):
    """A cursor whose statements take along what waits on the connection."""

    _riding: Sequence[str] = ()

    def execute(
        self, query: Any, params: Any = None, *, prepare: bool | None = None, binary: bool | None = None
    ) -> Any:
        connection = self.connection
        if connection.autocommit or not isinstance(connection, RidingConnection) or connection._pipeline is not None:
            return super().execute(query, params, prepare=prepare, binary=binary)
        waiting = connection._waiting
        if control := parse_control(query):
            return self._execute_control(query, *control)
        if not prepare and _is_single(query, params):
            self._riding = waiting.all(connection.begin_command())
        if not self._riding:
            return super().execute(query, params, prepare=prepare, binary=binary)
        connection._carrying = True
        try:
            return super().execute(query, params, prepare=False, binary=binary)
        finally:
            connection._carrying = False
            riding, self._riding = self._riding, ()
            if riding:  # the statement was never sent; psycopg's own BEGIN would have been
                connection.send(list(riding))

    def _execute_control(self, query: str, kind: str, name: str) -> Any:
        connection: Any = self.connection
        waiting = connection._waiting
        aborted = connection.pgconn.transaction_status == TransactionStatus.INERROR
        if waiting.takes(kind, name, aborted=aborted):
            return self
        if not aborted and (commands := waiting.all(connection.begin_command())):
            connection.send(commands)
        super().execute(query)
        waiting.sent([query])
        return self

    def _maybe_prepare_gen(self, pgq: Any, *, prepare: bool | None = None, binary: bool | None = None) -> Any:
        """Where psycopg sends a statement, once its values are converted."""
        if not self._riding:
            return (yield from super()._maybe_prepare_gen(pgq, prepare=prepare, binary=binary))
        for value in pgq.params or ():
            if value is not None:
                memoryview(value)  # of what libpq would refuse, before the pipeline begins, which could not be left
        pgconn = self._pgconn
        commands: deque[Any] = deque(
            partial(pgconn.send_query_params, command.encode(), None) for command in self._riding
        )
        connection: Any = self.connection
        connection._waiting.sent(self._riding)
        self._riding = ()
        commands.append(
            partial(
                pgconn.send_query_params,
                pgq.query,
                pgq.params,
                param_formats=pgq.formats,
                param_types=pgq.types,
                result_format=self.format if binary is None else Format(int(binary)),
            )
        )
        commands.append(pgconn.pipeline_sync)
        answers = len(commands)
        self._query = pgq
        pgconn.enter_pipeline_mode()
        try:
            found = yield from generators.pipeline_communicate(pgconn, commands)
            while len(found) < answers:
                found.append((yield from generators.fetch_many(pgconn)))
        finally:
            with contextlib.suppress(psycopg.Error):  # of a connection that is lost
                pgconn.exit_pipeline_mode()
        for results in found[:-1]:
            self._check_results(results)
        own = found[-2]
        self._results[:] = own
        self._select_current_result(0)
        return own


_COPY = re.compile(r"\s*copy\b", re.IGNORECASE)


def _is_single(query: Any, params: Any) -> bool:
    """Whether it is one statement, as the extended protocol wants; psycopg lets several through without values."""
    if isinstance(query, bytes):
        query = query.decode("utf-8", "replace")
    if not isinstance(query, str) or _COPY.match(query):  # which psycopg refuses by another error in a pipeline
        return False
    return bool(params) or ";" not in query.rstrip().rstrip(";") or is_anonymous_block(query)

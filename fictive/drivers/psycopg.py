"""psycopg (3): commands ride in front of a statement, in libpq's pipeline mode. Imported where psycopg is in use.

The statement goes in the extended protocol with its values and types as psycopg always sends them; in front of it the
commands, and one Sync behind all: one round trip (PostgreSQL documentation, "Pipeline Mode"). Each is parsed by
itself: none takes another down, and errors are the statement's own. psycopg's own `pipeline()` waits for BEGIN;
docs/design has the measurement.

Private names of psycopg, in `JOINTS`: where one is missing nothing rides, and psycopg's own BEGIN is sent apart. While
a session has a transaction open the connection is out of autocommit, so that a way past `_CarryingCursor` meets it
too.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import psycopg
import sqlalchemy as sa
from psycopg import generators, sql
from psycopg.client_cursor import ClientCursor
from psycopg.cursor import Cursor  # not psycopg.Cursor, which tools that watch replace
from psycopg.pq import Format, PipelineStatus, TransactionStatus

from . import copying
from .base import Rest, bare, dbapi_connection
from .pending import PendingCommands, as_bytes, is_anonymous_block
from .postgresql import PostgreSQLDriver

if TYPE_CHECKING:
    from psycopg.abc import PQGen

__all__ = ["JOINTS", "PsycopgDriver"]

JOINTS: dict[Any, tuple[str, ...]] = {
    Cursor: ("_execute_gen", "_start_query", "_convert_query", "_check_results", "_set_results"),
    psycopg.Connection: ("_start_query", "_get_tx_start_command"),
    generators: ("pipeline_communicate", "fetch_many"),
}
"""What riding uses of psycopg that has no public name."""

_has_joints = all(hasattr(owner, name) for owner, names in JOINTS.items() for name in names)


class PsycopgDriver(PostgreSQLDriver):
    carries = _has_joints
    buffers = False
    read_only_attribute = "read_only"

    def enter_autocommit(self, dbapi: Any, dialect: sa.Dialect) -> None:
        if _keeps_autocommit_there:
            dbapi._autocommit = True
        else:
            dbapi.autocommit = True

    def leave_autocommit(self, dbapi: Any) -> None:
        if _keeps_autocommit_there:
            dbapi._autocommit = False
        else:
            dbapi.autocommit = False

    def resume_autocommit(self, dbapi: Any, dialect: sa.Dialect, rest: Rest) -> None:
        self.set_characteristics(dbapi, rest.characteristics)
        self.enter_autocommit(dbapi, dialect)

    def status_of(self, dbapi: Any) -> Callable[[], int]:
        return functools.partial(getattr, dbapi.pgconn, "transaction_status")

    def adopt(self, dbapi: Any) -> None:
        _set_autocommit(dbapi, False)

    def is_busy(self, dbapi: Any) -> bool:
        # whoever is within `copy()` or `stream()` has psycopg's lock: to wait for it is to wait for oneself
        return bool(
            dbapi.pgconn.transaction_status == TransactionStatus.ACTIVE
            and dbapi.pgconn.pipeline_status == PipelineStatus.OFF
        )

    def own_transaction(self, dbapi: Any) -> bool:
        return False  # psycopg goes by the server's status, whoever began

    def level(self, name: str) -> Any:
        return psycopg.IsolationLevel[name.upper().replace(" ", "_")]

    def level_name(self, level: Any) -> str:
        return str(level.name).replace("_", " ")

    def is_standby(self, dbapi: Any) -> bool:
        return bool(dbapi.info.parameter_status("in_hot_standby") == "on")

    def consume(self, dbapi: Any) -> None:
        dbapi.pgconn.consume_input()
        while (notification := dbapi.pgconn.notifies()) is not None:
            dbapi.pgconn.notify_handler(notification)  # psycopg's own, which keeps it for `notifies()`

    # -- what rides ---------------------------------------------------------------------------------------------------

    def send(self, server: Any, commands: list[str]) -> None:
        server.trips += 1
        dbapi = server.dbapi
        autocommit = dbapi.autocommit
        _set_autocommit(dbapi, True)
        try:
            with Cursor(dbapi) as cursor:
                cursor.execute(as_bytes("; ".join(commands)), prepare=False)
        finally:
            _set_autocommit(dbapi, autocommit)

    def commit(self, server: Any, releases: list[str]) -> None:
        if releases:
            self.send(server, [*releases, "COMMIT"])
        else:
            server.dbapi.commit()

    def can_carry(self, dbapi: Any) -> bool:
        return self.carries and dbapi.cursor_factory in _reaching

    def commit_and_ask(self, server: Any, releases: list[str], query: str) -> str:
        dbapi = server.dbapi
        _set_autocommit(dbapi, True)
        with Cursor(dbapi) as cursor:
            cursor.execute("; ".join([*releases, "COMMIT", query]).encode(), prepare=False)
            while cursor.nextset():
                pass
            return str((cursor.fetchone() or [""])[0])

    def can_share(self, query: Any, parameters: Any) -> bool:
        # CALL and DO may commit within a pipeline, and go on without what was set in front of them
        return query.__class__ is str and _is_single(query, parameters) and not _MAY_COMMIT.match(query)

    def set_command(self, dbapi: Any, settings: Iterable[tuple[str, str | None]]) -> str:
        calls = []
        for name, value in settings:
            quoted = sql.SQL("pg_catalog.set_config({}, {}, true)").format(name, value).as_bytes(dbapi)
            calls.append(quoted.decode("utf-8", "surrogateescape"))
        return "SELECT " + ", ".join(calls)

    def execute_with(self, server: Any, pending: PendingCommands, query: Any, parameters: Any) -> Any:
        dbapi = server.dbapi
        factory = dbapi.cursor_factory
        is_known = factory in _reaching
        if not self.carries or not isinstance(factory, type) or not (is_known or pending.commands == ["BEGIN"]):
            return None
        values = None if ClientCursor in factory.__mro__ else parameters  # it has them in the text
        if not (values and query.__class__ is str and query in _single) and not _is_single(query, values):
            commands = pending.take()
            self.send(server, commands)
            pending.sent(commands)
            cursor = dbapi.cursor()
            cursor.execute(query, parameters)
            return cursor
        if not hasattr(dbapi, "__wrapped__"):
            cursor = ours = carrying(factory)(dbapi, row_factory=dbapi.row_factory)
        else:  # a tool's, around the driver's: its cursor goes around ours
            dbapi.cursor_factory = carrying(factory)
            try:
                cursor = ours = dbapi.cursor()
            finally:
                dbapi.cursor_factory = factory
            ours = bare(ours, _Carrying)
            if not issubclass(type(ours), _Carrying):
                return None
        ours.carries = pending
        cursor.execute(query, parameters)
        if ours.carries is None:
            _reaching.add(factory)
        else:  # the statement did not come down to ours, and psycopg has sent its own BEGIN
            ours.carries = None
            pending.take()
        return cursor

    # -- the rest -----------------------------------------------------------------------------------------------------

    def can_copy(self) -> bool:
        return True

    def copy_writer(self, cursor: Any, statement: str) -> copying.CopyWriter:
        return copying.PsycopgWriter(cursor, statement)

    def copy_texts(self, connection: sa.Connection) -> Callable[[Any], str]:
        return copying.psycopg_texts(dbapi_connection(connection))

    def notifications(self, dbapi: Any) -> Callable[[], list[tuple[str, str]]]:
        found: list[tuple[str, str]] = []
        dbapi.add_notify_handler(lambda notification: found.append((notification.channel, notification.payload)))

        def read() -> list[tuple[str, str]]:
            self.consume(dbapi)
            come = found[:]
            found.clear()
            return come

        return read


_keeps_autocommit_there = "_autocommit" in psycopg.Connection.autocommit.fget.__code__.co_names  # type: ignore[attr-defined]
_SENDABLE = frozenset({bytes, bytearray, memoryview})
_reaching: set[Any] = {Cursor}
"""Cursor classes whose `execute` is known to come down to psycopg's `_execute_gen`."""


def _set_autocommit(dbapi: Any, value: bool) -> None:
    """Assigning the public attribute takes psycopg's lock and thirty calls, and sends nothing either."""
    if _keeps_autocommit_there:
        dbapi._autocommit = value
    else:
        dbapi.autocommit = value


class _Carrying:
    """Beneath the user's cursor class and above psycopg's."""

    carries: PendingCommands | None = None

    def _execute_gen(
        self, query: Any, params: Any = None, *, prepare: bool | None = None, binary: bool | None = None
    ) -> PQGen[None]:
        pending, self.carries = self.carries, None
        if pending is None:
            yield from super()._execute_gen(query, params, prepare=prepare, binary=binary)  # type: ignore[misc]
            return
        cursor: Any = self
        dbapi, pgconn = cursor._conn, cursor._pgconn
        _set_autocommit(dbapi, True)  # else psycopg would send its BEGIN here
        try:
            yield from cursor._start_query(query)
            pgq = cursor._convert_query(query, params)
            sends_values = ClientCursor not in cursor.__class__.__mro__  # which has them in the text
            for value in (pgq.params or ()) if sends_values else ():
                if value is not None and value.__class__ not in _SENDABLE:  # a dumper has made something else of it
                    pgconn.send_query_params(pgq.query, pgq.params)  # raises what psycopg raises, with nothing sent
            messages: deque[Any] = deque()
            commands = pending.take()
            for command in commands:
                messages.append(functools.partial(pgconn.send_query_params, as_bytes(command), None))
            messages.append(
                functools.partial(
                    pgconn.send_query_params,
                    pgq.query,
                    pgq.params if sends_values else None,
                    param_formats=pgq.formats if sends_values else None,
                    param_types=pgq.types if sends_values else None,
                    result_format=cursor.format if binary is None else Format(int(binary)),
                )
            )
            messages.append(pgconn.pipeline_sync)
            answers = len(messages)
            cursor._query = pgq
            pgconn.enter_pipeline_mode()
            try:
                found = yield from generators.pipeline_communicate(pgconn, messages)
                while len(found) < answers:
                    found.append((yield from generators.fetch_many(pgconn)))
            finally:
                with contextlib.suppress(psycopg.Error):  # of a connection that is lost
                    pgconn.exit_pipeline_mode()
        finally:
            _set_autocommit(dbapi, False)
        pending.sent(commands)
        for results in found[:-1]:
            cursor._check_results(results)
        cursor._set_results(found[-2])
        cursor._last_query = query


@functools.cache
def carrying(factory: type) -> Any:
    """A class with `_Carrying` between `factory` and psycopg's cursor."""
    base = ClientCursor if issubclass(factory, ClientCursor) else Cursor
    beneath = type("_CarryingCursor", (_Carrying, base), {})
    return (
        beneath if factory is base else type(factory.__name__, (factory, beneath), {"__module__": factory.__module__})
    )


_single: set[object] = set()
"""Texts that were one statement when they were run with values."""
_MOST_KNOWN = 10_000
_COPY = re.compile(r"\s*copy\b", re.IGNORECASE)
_MAY_COMMIT = re.compile(r"(?:\s|--[^\n]*|/\*(?:[^*]|\*(?!/))*\*/)*(?:call|do)\b", re.IGNORECASE)


def _is_single(query: Any, params: Any) -> bool:
    """Whether it is one statement, as the extended protocol wants; psycopg lets several through without values."""
    if isinstance(query, bytes):
        query = query.decode("utf-8", "replace")
    if not isinstance(query, str) or _COPY.match(query):  # which psycopg refuses by another error in a pipeline
        return False
    if params and len(_single) < _MOST_KNOWN:
        _single.add(query)
    return bool(params) or ";" not in query.rstrip().rstrip(";") or is_anonymous_block(query)

"""psycopg2: commands ride in front of a statement, in its one simple message. Imported where psycopg2 is in use.

While a session has a connection it is in autocommit, so that psycopg2 sends no BEGIN of its own; at the first
statement of a transaction it is out of autocommit until that statement has reached `_Carrying.execute`. A cursor
class that goes another way, as psycopg2's documentation shows it ("DictCursor" calls `super().execute`, but a user's
may call `psycopg2.extensions.cursor.execute(self, ...)`), or a raw cursor, therefore meets psycopg2's own BEGIN, sent
apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import psycopg2
import psycopg2.extensions as ext
import sqlalchemy as sa

from . import copying
from .base import IDLE, NO_OPTIONS, Rest, bare
from .pending import PendingCommands, again, are_plain, as_bytes, goes_alone, may_carry
from .postgresql import PostgreSQLDriver

__all__ = ["Psycopg2Driver"]

_LEVELS = {1: "READ COMMITTED", 2: "REPEATABLE READ", 3: "SERIALIZABLE", 4: "READ UNCOMMITTED"}
_Cursor: Any = ext.cursor
_Connection: Any = ext.connection
_MOST_KNOWN = 10_000


class Psycopg2Driver(PostgreSQLDriver):
    has_notices = True
    rides_in_autocommit = True
    read_only_attribute = "readonly"

    def enter_autocommit(self, dbapi: Any, dialect: sa.Dialect) -> None:
        # psycopg2 sends SET default_transaction_... for a characteristic that is set when autocommit changes
        if dbapi.autocommit:
            return
        self.set_characteristics(dbapi, NO_OPTIONS)
        dbapi.autocommit = True

    def leave_autocommit(self, dbapi: Any) -> None:
        dbapi.autocommit = False

    def restore(self, dbapi: Any, dialect: sa.Dialect, rest: Rest) -> bool:
        # psycopg2 keeps a status of its own, which a COMMIT by text does not change
        return super().restore(dbapi, dialect, rest) and dbapi.status == ext.STATUS_READY

    def status_of(self, dbapi: Any) -> Callable[[], int]:
        return dbapi.get_transaction_status  # type: ignore[no-any-return]

    def adopt(self, dbapi: Any) -> None:
        # psycopg2 begins by itself with whatever comes next; the server answers with a warning and changes nothing
        dbapi.autocommit = False
        before = list(dbapi.notices)
        try:
            _Cursor(bare(dbapi, _Connection)).execute("SELECT")  # an empty query is an error for psycopg2
        except psycopg2.Error:  # the transaction has failed; a savepoint may save it, and comes without a BEGIN
            if not dbapi.closed:
                dbapi.autocommit = True
            raise
        dbapi.notices[:] = before

    def own_transaction(self, dbapi: Any) -> bool:
        return bool(dbapi.status != ext.STATUS_READY)

    def level(self, name: str) -> Any:
        return name

    def level_name(self, level: Any) -> str:
        return _LEVELS[level]

    def is_standby(self, dbapi: Any) -> bool:
        return bool(dbapi.get_parameter_status("in_hot_standby") == "on")

    def consume(self, dbapi: Any) -> None:
        dbapi.poll()

    # -- what rides ---------------------------------------------------------------------------------------------------

    def send(self, server: Any, commands: list[str]) -> None:
        server.trips += 1
        dbapi = server.dbapi
        if dbapi.status == ext.STATUS_READY and not dbapi.autocommit:
            dbapi.autocommit = True
        _Cursor(bare(dbapi, _Connection)).execute(as_bytes("; ".join(commands)))

    def commit(self, server: Any, releases: list[str]) -> None:
        dbapi = server.dbapi
        cursor = _Cursor(dbapi if type(dbapi) is _Connection else bare(dbapi, _Connection))
        cursor.execute("; ".join([*releases, "COMMIT"]) if releases else "COMMIT")

    def can_carry(self, dbapi: Any) -> bool:
        factory = dbapi.cursor_factory or _Cursor
        return isinstance(factory, type) and _is_known_to_reach(factory)

    def commit_and_ask(self, server: Any, releases: list[str], query: str) -> str:
        cursor = _Cursor(bare(server.dbapi, _Connection))
        cursor.execute("; ".join([*releases, "COMMIT", query]))
        return str(cursor.fetchone()[0])

    def execute_with(self, server: Any, pending: PendingCommands, query: Any, parameters: Any) -> Any:
        dbapi = server.dbapi
        factory = dbapi.cursor_factory or _Cursor
        is_known = factory in _reaching or (isinstance(factory, type) and _is_known_to_reach(factory))
        if not is_known and (not isinstance(factory, type) or pending.commands != ["BEGIN"]):
            return None
        if type(dbapi) is _Connection or not hasattr(dbapi, "__wrapped__"):
            cursor = ours = carrying(factory)(dbapi)
        else:  # a tool's, around the driver's: its cursor goes around ours
            cursor = dbapi.cursor(cursor_factory=carrying(factory))
            ours = bare(cursor, _Cursor)
            if not issubclass(type(ours), _Carrying):
                return None
        ours.carries = self, server, pending
        cursor.execute(query, parameters)
        if ours.carries is None:
            if not is_known:
                _reaching.add(factory)
        else:  # the class went past ours, and psycopg2 has sent its own BEGIN
            ours.carries = None
            pending.take()
        return cursor

    def can_share(self, query: Any, parameters: Any) -> bool:
        return query.__class__ is str and (query in may_carry or not goes_alone(query))

    def set_command(self, dbapi: Any, settings: Iterable[tuple[str, str | None]]) -> str:
        calls, values = [], []
        for name, value in settings:
            calls.append("pg_catalog.set_config(%s, %s, true)")
            values += [name, value]
        quoted: bytes = _Cursor(bare(dbapi, _Connection)).mogrify("SELECT " + ", ".join(calls), values)
        return quoted.decode("utf-8", "surrogateescape")

    def _send_apart(self, server: Any, pending: PendingCommands) -> None:
        commands = pending.take()
        self.send(server, commands)
        pending.sent(commands)

    def carry(
        self,
        cursor: Any,
        execute: Callable[..., Any],
        server: Any,
        pending: PendingCommands,
        query: Any,
        parameters: Any,
    ) -> Any:
        """Run a statement that has come down to ours, with what waits: in one message, or after it."""
        dbapi = server.dbapi
        own: bytes = _Cursor.mogrify(cursor, query, parameters)  # raises before anything is sent
        plain = are_plain(parameters) and query.__class__ is str
        if pending.bound:
            cursor.carried = own
            return execute(as_bytes("; ".join(pending.take())) + b";\n" + own)  # errors quote the statement's own line
        dbapi.autocommit = True
        if not plain or query not in may_carry:
            if goes_alone(query if plain else own.decode("latin-1")):
                self._send_apart(server, pending)
                return execute(query, parameters)
            if plain and len(may_carry) < _MOST_KNOWN:
                may_carry.add(query)
        riding = pending.commands
        if riding[0] == server.begin_command:
            pending.commands = []
        else:
            before, riding = pending.before_and_with(query if plain else None)
            if before:
                self.send(server, before)
                pending.sent(before)
            if not riding:
                return execute(query, parameters)
        if riding == ["BEGIN"]:
            message = b"BEGIN"
        else:
            pending.sent(riding)
            message = as_bytes("; ".join(riding))
        cursor.carried = own
        try:
            return execute(message + b"; " + own)
        except psycopg2.Error as error:
            commands = again(
                riding,
                idle=dbapi.get_transaction_status() == IDLE,
                has_position=error.diag.statement_position is not None,
            )
            if commands is None or dbapi.closed:
                raise
        cursor.carried = None
        self.send(server, commands)
        server.trips += 1  # the message that failed
        return execute(query, parameters)

    # -- the rest -----------------------------------------------------------------------------------------------------

    def can_copy(self) -> bool:
        return ext.get_wait_callback() is None  # psycopg2 refuses COPY while it is green

    def copy_writer(self, cursor: Any, statement: str) -> copying.CopyWriter:
        return copying.Psycopg2Writer(cursor, statement)

    def copy_texts(self, connection: sa.Connection) -> Callable[[Any], str]:
        return copying.psycopg2_texts()

    def notifications(self, dbapi: Any) -> Callable[[], list[tuple[str, str]]]:
        def read() -> list[tuple[str, str]]:
            dbapi.poll()
            found, dbapi.notifies = dbapi.notifies, []
            return [(each.channel, each.payload) for each in found]

        return read


class _Carrying:
    """Beneath the user's cursor class and above psycopg2's."""

    carries: tuple[Psycopg2Driver, Any, PendingCommands] | None = None
    carried: bytes | None = None

    def execute(self, query: Any, vars: Any = None) -> Any:
        carries, self.carries, self.carried = self.carries, None, None
        if carries is None:
            return super().execute(query, vars)  # type: ignore[misc]
        driver, server, pending = carries
        return driver.carry(self, super().execute, server, pending, query, vars)  # type: ignore[misc]

    @property
    def query(self) -> bytes | None:
        """The user's statement as it was sent."""
        return self.carried if self.carried is not None else _Cursor.query.__get__(self)


_reaching: set[type] = {_Cursor}
"""Cursor classes whose `execute` is known to come down to psycopg2's."""


def _is_known_to_reach(factory: type) -> bool:
    return factory in _reaching or all(
        each.__module__.startswith("psycopg2.") for each in factory.__mro__ if "execute" in vars(each)
    )


@functools.cache
def carrying(factory: type) -> Any:
    """A class with `_Carrying` between `factory` and psycopg2's cursor."""
    beneath = type("_CarryingCursor", (_Carrying, _Cursor), {})
    return (
        beneath
        if factory is _Cursor
        else type(factory.__name__, (factory, beneath), {"__module__": factory.__module__})
    )

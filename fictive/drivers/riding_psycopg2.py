"""psycopg2 connections whose BEGIN and SAVEPOINT ride with the next statement. Imported where psycopg2 is in use.

psycopg2 would send BEGIN as a message of its own. So for it these connections are in autocommit all the time, and the
mode that the user sees is kept here. Named cursors, large objects and two-phase commit want psycopg2's own
transaction: for these the connection goes *native* until the transaction ends, at psycopg2's own price.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import psycopg2
import psycopg2.extensions as ext

from .riding import Waiting, again, are_plain, may_end_transaction, parse_control, parsed

__all__ = ["RidingConnection"]

_Connection: Any = ext.connection
_Cursor: Any = ext.cursor

_LEVELS = {1: "READ COMMITTED", 2: "REPEATABLE READ", 3: "SERIALIZABLE", 4: "READ UNCOMMITTED"}
_LEVEL_NUMBERS = {name: number for number, name in _LEVELS.items()}


class RidingConnection(_Connection):  # type: ignore[misc]
    """A psycopg2 connection; what differs is only how many messages it sends."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._autocommit = False
        self._native = False
        self._characteristics: list[Any] = [None, None, None]
        self._set_readonly: bool | None = None  # in autocommit there is no BEGIN to say it
        self._waiting = Waiting()
        super().__init__(*args, **kwargs)
        if not self.async_:
            _Connection.autocommit.__set__(self, True)

    # -- the mode, as the user sees it ------------------------------------------------------------------------------

    @property
    def autocommit(self) -> bool:
        return self._autocommit

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        self._raise_in_transaction("autocommit")
        self._autocommit = bool(value)

    @property
    def isolation_level(self) -> int | None:
        level: int | None = self._characteristics[0]
        return level

    @isolation_level.setter
    def isolation_level(self, value: int | str | None) -> None:
        self._raise_in_transaction("isolation_level")
        self._characteristics[0] = _level(value)

    @property
    def readonly(self) -> bool | None:
        value: bool | None = self._characteristics[1]
        return value

    @readonly.setter
    def readonly(self, value: bool | str | None) -> None:
        self._raise_in_transaction("readonly")
        self._characteristics[1] = _flag(value)

    @property
    def deferrable(self) -> bool | None:
        value: bool | None = self._characteristics[2]
        return value

    @deferrable.setter
    def deferrable(self, value: bool | str | None) -> None:
        self._raise_in_transaction("deferrable")
        self._characteristics[2] = _flag(value)

    def set_session(
        self,
        isolation_level: int | str | None = None,
        readonly: bool | str | None = None,
        deferrable: bool | str | None = None,
        autocommit: bool | None = None,
    ) -> None:
        self._raise_in_transaction("set_session")
        if isolation_level is not None:
            self._characteristics[0] = _level(isolation_level)
        if readonly is not None:
            self._characteristics[1] = _flag(readonly)
        if deferrable is not None:
            self._characteristics[2] = _flag(deferrable)
        if autocommit is not None:
            self._autocommit = bool(autocommit)

    def set_isolation_level(self, level: int | None) -> None:
        self.rollback()
        self._autocommit = level == ext.ISOLATION_LEVEL_AUTOCOMMIT
        self._characteristics[0] = None if self._autocommit else _level(level)

    @property
    def status(self) -> int:
        if self._native or self.async_:
            native: int = _Connection.status.__get__(self)
            return native
        status: int = ext.STATUS_IN_TRANSACTION if self._is_begun() else ext.STATUS_READY
        return status

    def _raise_in_transaction(self, name: str) -> None:
        if self._native or self._is_begun():
            raise psycopg2.ProgrammingError(f"{name} cannot be used inside a transaction")

    def _is_begun(self) -> bool:
        return not self._autocommit and self.get_transaction_status() in (
            ext.TRANSACTION_STATUS_INTRANS,
            ext.TRANSACTION_STATUS_INERROR,
        )

    # -- transactions -----------------------------------------------------------------------------------------------

    def commit(self) -> None:
        releases = self._waiting.with_commit()
        self._end_native(super().commit)
        if self._is_begun():
            aborted = self.get_transaction_status() == ext.TRANSACTION_STATUS_INERROR
            self.send([*([] if aborted else releases), "COMMIT"])

    def rollback(self) -> None:
        self._waiting.clear()
        self._end_native(super().rollback)
        if self._is_begun():
            self.send(["ROLLBACK"])

    def _end_native(self, end: Any) -> None:
        if self._native or self._autocommit or self.closed or self.async_:
            try:
                end()
            finally:
                self._leave_native()

    def __enter__(self) -> Any:
        # in autocommit psycopg2 begins a transaction for the block; otherwise the block only ends the one there is
        return super().__enter__() if self._autocommit or self._native or self.closed else self

    def __exit__(self, type_: Any, error: Any, traceback: Any) -> Any:
        if self._autocommit or self._native or self.closed:
            return super().__exit__(type_, error, traceback)
        if type_ is None:
            self.commit()
        else:
            self.rollback()
        return None

    def ride(self, command: str) -> None:
        """Let `command`, such as a SET LOCAL, go with the next statement of the transaction."""
        if self._native:  # where nothing is carried
            self.send([command])
        else:
            self._waiting.add(command)

    def begin_command(self) -> str | None:
        """The BEGIN that the next statement needs; None in autocommit and within a transaction."""
        if self._autocommit or self._native or self.async_:
            return None
        if self.get_transaction_status() != ext.TRANSACTION_STATUS_IDLE:
            return None
        level, readonly, deferrable = self._characteristics
        command = "BEGIN"
        if level is not None:
            command += f" ISOLATION LEVEL {_LEVELS[level]}"
        if readonly is not None:
            command += " READ ONLY" if readonly else " READ WRITE"
        if deferrable is not None:
            command += " DEFERRABLE" if deferrable else " NOT DEFERRABLE"
        return command

    def sync_readonly(self) -> None:
        """Let the server refuse writes in autocommit where `readonly` asks for it, and only there."""
        wanted = self._characteristics[1] if self._autocommit else None
        if wanted is not self._set_readonly and not self._native and not self._is_begun():
            super().set_session(readonly="DEFAULT" if wanted is None else wanted)
            self._set_readonly = wanted

    def send_waiting(self) -> None:
        """Send what waits, for something that cannot carry it along."""
        if not self._autocommit and (commands := self._waiting.all(self.begin_command())):
            self.send(commands)

    def send(self, commands: list[str], *, noted: bool = False) -> None:
        """Send control statements in one message of their own."""
        if not noted:
            self._waiting.sent(commands)
        cursor = super().cursor(cursor_factory=_Cursor)
        try:
            cursor.execute("; ".join(commands))
        finally:
            cursor.close()

    def _go_native(self) -> None:
        """Hand the transaction over to psycopg2. In one that was begun it sends a BEGIN that changes nothing."""
        if self._native or self._autocommit or self.async_:
            return
        begun = self._is_begun()
        if begun:
            self.send_waiting()
        _Connection.autocommit.__set__(self, False)
        self._native = True
        if not begun:
            level, readonly, deferrable = self._characteristics
            super().set_session(isolation_level=level, readonly=readonly, deferrable=deferrable)
            if self._waiting:
                self.send(self._waiting.all(None))

    def _leave_native(self) -> None:
        if self._native and not self.closed:
            # while psycopg2 is not in autocommit: there it would send these at once
            super().set_session(isolation_level="DEFAULT", readonly="DEFAULT", deferrable="DEFAULT")
            _Connection.autocommit.__set__(self, True)
        self._native = False

    # -- what else runs statements ------------------------------------------------------------------------------------

    def cursor(self, name: str | None = None, cursor_factory: Any = None, **kwargs: Any) -> Any:
        factory = cursor_factory or self.cursor_factory or _Cursor
        if name is not None:
            if not kwargs.pop("withhold", False):
                if factory is _Cursor and self._is_begun() and not self._native:
                    return super().cursor(cursor_factory=functools.partial(_NamedCursor, name=name, **kwargs))
                self._go_native()
            else:
                self.send_waiting()
                kwargs["withhold"] = True
            return super().cursor(name, cursor_factory=factory, **kwargs)
        return super().cursor(cursor_factory=_carrying(factory), **kwargs)

    def lobject(self, *args: Any, **kwargs: Any) -> Any:
        self._go_native()
        return super().lobject(*args, **kwargs)

    def tpc_begin(self, xid: Any) -> None:
        self._go_native()
        super().tpc_begin(xid)

    def tpc_commit(self, *args: Any) -> None:
        self._end_two_phase(super().tpc_commit, args)

    def tpc_rollback(self, *args: Any) -> None:
        self._end_two_phase(super().tpc_rollback, args)

    def _end_two_phase(self, end: Any, args: Any) -> None:
        if not self._native and not self._autocommit:
            _Connection.autocommit.__set__(self, False)
            self._native = True
        end(*args)
        self._leave_native()

    def tpc_recover(self) -> Any:
        self.send_waiting()
        return super().tpc_recover()

    def reset(self) -> None:
        self.rollback()
        self._native = self._autocommit = False
        self._characteristics = [None, None, None]
        super().reset()
        _Connection.autocommit.__set__(self, True)

    def set_client_encoding(self, encoding: str) -> None:
        self.rollback()
        super().set_client_encoding(encoding)


class _CarryingMixin:
    """In front of any psycopg2 cursor class: its statements take along what waits on the connection."""

    connection: RidingConnection
    _carried: bytes | None = None

    def execute(self, query: Any, vars: Any = None) -> Any:
        connection = self.connection
        waiting = connection._waiting
        self._carried = None
        if connection._set_readonly is not None or connection._characteristics[1] is not None:
            connection.sync_readonly()
        if connection._autocommit or connection._native:
            return super().execute(query, vars)  # type: ignore[misc]
        if control := parse_control(query):
            return self._execute_control(query, *control)
        before, riding = waiting.riders(connection.begin_command(), query if are_plain(vars) else None)
        if before:
            connection.send(before)
        if riding:
            self._execute_together(riding, query, vars)
        else:
            super().execute(query, vars)  # type: ignore[misc]
        parsed(query)
        return None

    def _execute_control(self, query: str, kind: str, name: str) -> None:
        connection = self.connection
        aborted = self._is_aborted()
        if connection._waiting.takes(kind, name, aborted=aborted):
            return
        if not aborted:
            connection.send_waiting()
        super().execute(query)  # type: ignore[misc]
        connection._waiting.sent([query])

    def _execute_together(self, riding: list[str], query: Any, vars: Any) -> None:
        connection = self.connection
        try:
            own: bytes = self.mogrify(query, vars)  # type: ignore[attr-defined]
        except BaseException:
            connection._waiting.put_back(riding)
            raise
        connection._waiting.sent(riding)
        try:
            super().execute("; ".join(riding).encode() + b"; " + own)  # type: ignore[misc]
            self._carried = own
        except psycopg2.Error as error:
            commands = again(
                riding,
                idle=connection.get_transaction_status() == ext.TRANSACTION_STATUS_IDLE,
                has_position=error.diag.statement_position is not None,
            )
            if commands is None or connection.closed or may_end_transaction(own):
                self._carried = own
                raise
        else:
            return
        connection.send(commands, noted=True)
        super().execute(query, vars)  # type: ignore[misc]

    def _is_aborted(self) -> bool:
        aborted: bool = self.connection.get_transaction_status() == ext.TRANSACTION_STATUS_INERROR
        return aborted

    @property
    def query(self) -> bytes | None:
        """The user's statement as it was sent."""
        return self._carried if self._carried is not None else _Cursor.query.__get__(self)

    def _let_go(self) -> None:
        """Before something that cannot take along what waits."""
        self._carried = None
        self.connection.sync_readonly()
        self.connection.send_waiting()

    def executemany(self, query: Any, vars_list: Any) -> Any:
        self._let_go()
        return super().executemany(query, vars_list)  # type: ignore[misc]

    def callproc(self, procname: Any, parameters: Any = None) -> Any:
        self._let_go()
        return super().callproc(procname, parameters)  # type: ignore[misc]

    def copy_expert(self, *args: Any, **kwargs: Any) -> Any:
        self._let_go()
        return super().copy_expert(*args, **kwargs)  # type: ignore[misc]

    def copy_from(self, *args: Any, **kwargs: Any) -> Any:
        self._let_go()
        return super().copy_from(*args, **kwargs)  # type: ignore[misc]

    def copy_to(self, *args: Any, **kwargs: Any) -> Any:
        self._let_go()
        return super().copy_to(*args, **kwargs)  # type: ignore[misc]


class _NamedCursor(_CarryingMixin, _Cursor):  # type: ignore[misc]
    """A server-side cursor in a transaction that psycopg2 does not know of, for which it would send a second BEGIN."""

    itersize = 2000

    def __init__(self, connection: Any, *_: Any, name: str, scrollable: bool | None = None) -> None:
        super().__init__(connection)
        self._name = name
        self._scroll = {None: "", True: "SCROLL ", False: "NO SCROLL "}[scrollable]
        self._is_open = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def scrollable(self) -> bool | None:
        return {"": None, "SCROLL ": True, "NO SCROLL ": False}[self._scroll]

    def execute(self, query: Any, vars: Any = None) -> None:
        if self._is_open:
            raise psycopg2.ProgrammingError("can't call .execute() on named cursors more than once")
        declare = f"DECLARE {self._quoted} {self._scroll}CURSOR WITHOUT HOLD FOR "
        super().execute(declare.encode() + self.mogrify(query, vars))
        self._is_open = True

    def executemany(self, query: Any, vars_list: Any) -> None:
        raise psycopg2.ProgrammingError("can't call .executemany() on named cursors")

    def fetchone(self) -> Any:
        self._fetch("1")
        return super().fetchone()

    def fetchmany(self, size: int | None = None) -> Any:
        self._fetch(str(self.arraysize if size is None else size))
        return super().fetchall()

    def fetchall(self) -> Any:
        self._fetch("ALL")
        return super().fetchall()

    def __iter__(self) -> Iterator[Any]:
        while rows := self.fetchmany(self.itersize):
            yield from rows

    def scroll(self, value: int, mode: str = "relative") -> None:
        if mode not in ("relative", "absolute"):
            raise psycopg2.ProgrammingError("scroll mode must be 'relative' or 'absolute'")
        super().execute(f"MOVE {mode.upper()} {int(value)} FROM {self._quoted}")

    def close(self) -> None:
        if self._is_open and not self.connection.closed and self.connection._is_begun() and not self._is_aborted():
            super().execute(f"CLOSE {self._quoted}")
        self._is_open = False
        super().close()

    def _fetch(self, count: str) -> None:
        if not self._is_open:
            raise psycopg2.ProgrammingError("no results to fetch")
        super().execute(f"FETCH FORWARD {count} FROM {self._quoted}")

    @property
    def _quoted(self) -> str:
        quoted: str = ext.quote_ident(self._name, self.connection)
        return quoted


@functools.cache
def _carrying(factory: Any) -> Any:
    """`factory` with the mixin in front; a factory that is not a class is the user's own business."""
    if not isinstance(factory, type) or issubclass(factory, _CarryingMixin):
        return factory
    return type(factory.__name__, (_CarryingMixin, factory), {})


def _level(value: int | str | None) -> int | None:
    if value is None or (isinstance(value, str) and value.upper() == "DEFAULT"):
        return None
    number = _LEVEL_NUMBERS.get(value.upper()) if isinstance(value, str) else value
    if number not in _LEVELS:
        raise ValueError(f"bad value for isolation_level: {value!r}")
    return number


def _flag(value: bool | str | None) -> bool | None:
    return None if value is None or (isinstance(value, str) and value.upper() == "DEFAULT") else bool(value)

"""psycopg2 connections whose BEGIN and SAVEPOINT ride with the next statement. Imported where psycopg2 is in use.

psycopg2 would send BEGIN as a message of its own. So for it these connections are in autocommit all the time, and the
mode (psycopg2_modes.py) and the state that the user sees are kept here. The state follows psycopg2's own, and not the
server's: from the BEGIN until `commit()` or `rollback()`, whatever the texts in between have ended.

Large objects, two-phase commit and named cursors of another class want psycopg2's own transaction: for these the
connection goes *native* until the transaction ends, at psycopg2's own price.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import psycopg2
import psycopg2.extensions as ext

from .psycopg2_cursors import NamedCursor, carrying
from .psycopg2_modes import LEVELS, ModesConnection
from .riding import Waiting

__all__ = ["RidingConnection"]

_Connection: Any = ext.connection
_Cursor: Any = ext.cursor


class RidingConnection(ModesConnection):
    """A psycopg2 connection; what differs is only how many messages it sends."""

    notices: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._waiting = Waiting()
        self._begun = False  # where psycopg2 would have the status STATUS_BEGIN
        self._entered = False  # within `with connection:`, where a transaction is begun in autocommit as well
        self._native = False
        self._mark = 0  # counts the transactions, beyond which no named cursor lives
        self.beginning = threading.RLock()  # psycopg2's connections may be shared by threads: one of them begins
        super().__init__(*args, **kwargs)
        _Connection.autocommit.__set__(self, True)

    @property
    def status(self) -> int:
        if self._native:
            native: int = _Connection.status.__get__(self)
            return native
        status: int = ext.STATUS_BEGIN if self._begun or self._waiting else ext.STATUS_READY
        return status

    # -- transactions -----------------------------------------------------------------------------------------------

    def commit(self) -> None:
        was_active = self.status != ext.STATUS_READY
        try:
            super().commit()  # raises when closed or in a two-phase transaction; native, it is all there is to do
            if self._begun:
                releases = self._waiting.with_commit() if self.is_in_transaction() else []
                self.send([*releases, "COMMIT"])
        finally:
            if not self._is_native_transaction():  # else it was refused, and nothing has happened
                self._ended(was_active)  # after a failed COMMIT too: there is nothing left of the transaction

    def rollback(self) -> None:
        was_active = self.status != ext.STATUS_READY
        super().rollback()
        self._waiting.clear()
        if self._begun:
            self.send(["ROLLBACK"])
        self._ended(was_active)

    def _ended(self, was_active: bool) -> None:
        self._begun = False
        self._waiting.clear()
        self._leave_native()
        self._mark += was_active

    def __enter__(self) -> Any:
        if self.closed:
            raise psycopg2.InterfaceError("connection already closed")
        if self._entered:
            raise psycopg2.ProgrammingError("the connection cannot be re-entered recursively")
        self._entered = True
        return self

    def __exit__(self, type_: Any, error: Any, traceback: Any) -> None:
        self._entered = False
        if type_ is None:
            self.commit()
        else:
            self.rollback()

    def reset(self) -> None:
        if self._begun and not self.closed:
            self.send(["ROLLBACK"])
        super().reset()
        self._forget_modes()
        self._native = False
        self._ended(True)
        _Connection.autocommit.__set__(self, True)

    def set_client_encoding(self, encoding: str) -> None:
        """psycopg2 rolls back where the encoding is another one."""
        if "".join(filter(str.isalnum, encoding)).upper() != self.encoding and not self._native:
            self.rollback()
        super().set_client_encoding(encoding)

    # -- what rides -------------------------------------------------------------------------------------------------

    def is_bare(self) -> bool:
        """Whether nothing of ours goes with statements: in autocommit, and in a transaction of psycopg2's own."""
        return self._native or (self._autocommit and not self._entered and not self._begun)

    def is_in_transaction(self) -> bool:
        """Whether the server is in a transaction that is not aborted."""
        found: bool = self.get_transaction_status() == ext.TRANSACTION_STATUS_INTRANS
        return found

    def ride(self, command: str) -> None:
        """Let `command`, such as a SET LOCAL, go with the next statement of the transaction."""
        if self._native:  # where nothing is carried
            self.send([command])
        else:
            self._waiting.add(command)

    def begin_command(self) -> str | None:
        """The BEGIN that the next statement needs; None in autocommit and within a transaction."""
        if self._begun or self.is_bare():
            return None
        level, readonly, deferrable = self._characteristics.values()
        command = "BEGIN"
        if level is not None:
            command += f" ISOLATION LEVEL {LEVELS[level]}"
        if readonly is not None:
            command += " READ ONLY" if readonly else " READ WRITE"
        if deferrable is not None:
            command += " DEFERRABLE" if deferrable else " NOT DEFERRABLE"
        return command

    def send_waiting(self) -> None:
        """Send what waits, for something that cannot carry it along."""
        with self.beginning:
            if not self.is_bare() and (commands := self._waiting.all(self.begin_command())):
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
            self.note_begin(commands)

    def note_begin(self, commands: list[str]) -> None:
        """Told of a message that was sent: when a BEGIN in it was not refused, a transaction has begun."""
        if any(command.startswith("BEGIN") for command in commands):
            self._begun = self.get_transaction_status() != ext.TRANSACTION_STATUS_IDLE

    # -- psycopg2's own transactions --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def native(self) -> Iterator[None]:
        """Hand the transaction over to psycopg2 with what is done in the block.

        In one that was begun psycopg2 sends a BEGIN that changes nothing, and the server warns of it.
        """
        if self.is_bare():
            yield
            return
        begun, notices = self._begun, self.notices
        if begun:
            self.send_waiting()
        _Connection.autocommit.__set__(self, False)
        self._native = True
        try:
            if begun:
                self.notices = []
            else:
                given = {name: value for name, value in self._characteristics.items() if value is not None}
                super().set_session(**given)
                if self._waiting:
                    self.send(self._waiting.all(None))
            yield
        finally:
            self.notices = notices
            if self._is_native_transaction():
                self._begun = False
            else:  # it came to nothing
                self._leave_native()

    def _is_native_transaction(self) -> bool:
        return bool(_Connection.status.__get__(self) != ext.STATUS_READY)

    def _leave_native(self) -> None:
        if self._native and not self.closed and not self._is_native_transaction():
            # while psycopg2 is not in autocommit: there it would send these at once
            super().set_session(isolation_level="DEFAULT", readonly="DEFAULT", deferrable="DEFAULT")
            _Connection.autocommit.__set__(self, True)
            self._native = False

    def lobject(self, *args: Any, **kwargs: Any) -> Any:
        with self.native():
            return super().lobject(*args, **kwargs)

    def tpc_begin(self, xid: Any) -> None:
        self._refuse_in_transaction("tpc_begin")
        with self.native() if not self._autocommit else contextlib.nullcontext():
            super().tpc_begin(xid)

    def tpc_commit(self, *xid: Any) -> None:
        self._refuse_recovered(xid)
        super().tpc_commit(*xid)
        self._ended(True)

    def tpc_rollback(self, *xid: Any) -> None:
        self._refuse_recovered(xid)
        super().tpc_rollback(*xid)
        self._ended(True)

    def _refuse_recovered(self, xid: tuple[Any, ...]) -> None:
        if xid and self.status != ext.STATUS_READY:
            raise psycopg2.ProgrammingError("tpc_commit/tpc_rollback with a xid must be called outside a transaction")

    # -- cursors ----------------------------------------------------------------------------------------------------

    def cursor(
        self, name: str | None = None, cursor_factory: Any = None, withhold: bool = False, scrollable: Any = None
    ) -> Any:
        factory = cursor_factory or self.cursor_factory or _Cursor
        if name is None:
            return super().cursor(None, carrying(factory), withhold, scrollable)
        if factory is not _Cursor:
            return super().cursor(name, carrying(factory, named=True), withhold, scrollable)
        return super().cursor(
            cursor_factory=functools.partial(NamedCursor, name=name, withhold=withhold, scrollable=scrollable)
        )

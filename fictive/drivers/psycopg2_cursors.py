"""Cursors of psycopg2 whose statements take along what waits on their connection."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import psycopg2
import psycopg2.extensions as ext

from .riding import again, are_plain, goes_alone, parse_control, parsed

if TYPE_CHECKING:
    from .riding_psycopg2 import RidingConnection

__all__ = ["NamedCursor", "carrying", "is_users_own"]

_Cursor: Any = ext.cursor


class _CarryingMixin:
    """In front of any psycopg2 cursor class."""

    connection: RidingConnection
    _shows_text = False
    """Whether the class behind is the user's, who is to see his own texts."""
    _carried: bytes | None = None

    def execute(self, query: Any, vars: Any = None) -> Any:
        connection = self.connection
        self._carried = None
        if connection.is_bare() or self.closed:  # type: ignore[attr-defined]
            return super().execute(query, vars)  # type: ignore[misc]
        if control := parse_control(query):
            return self._execute_control(query, *control)
        if connection.begin_command() is None and connection._waiting.waits_for_commit():
            result = super().execute(query, vars)  # type: ignore[misc]
        else:
            with connection.beginning:
                result = self._execute_with(connection.begin_command(), query, vars)
        parsed(query)
        return result

    def _execute_control(self, query: str, kind: str, name: str) -> None:
        connection = self.connection
        status = connection.get_transaction_status()
        aborted = status == ext.TRANSACTION_STATUS_INERROR
        # else a text began or ended the transaction, and the server is to say what it says
        expected = ext.TRANSACTION_STATUS_INTRANS if connection._begun else ext.TRANSACTION_STATUS_IDLE
        may_wait = not self._shows_text and (status == expected or aborted)
        if may_wait and connection._waiting.takes(kind, name, aborted=aborted):
            return
        if not aborted:
            connection.send_waiting()
        super().execute(query)  # type: ignore[misc]
        connection._waiting.sent([query])

    def _execute_with(self, begin: str | None, query: Any, vars: Any) -> Any:
        """Execute with what waits: before it or together with it."""
        connection = self.connection
        waiting = connection._waiting
        own: bytes = self.mogrify(query, vars)  # type: ignore[attr-defined]  # raises before anything is sent
        plain = are_plain(vars)
        if self._must_be_alone(begin, query if plain and isinstance(query, str) else own.decode("latin-1")):
            connection.send_waiting()
            result = super().execute(query, vars)  # type: ignore[misc]
            if connection.get_transaction_status() == ext.TRANSACTION_STATUS_IDLE:
                waiting.clear()
            return result
        before, riding = waiting.riders(begin, query if plain else None)
        if before:
            connection.send(before)
        if riding:
            return self._execute_together(riding, own, query, vars)
        return super().execute(query, vars)  # type: ignore[misc]

    def _must_be_alone(self, begin: str | None, text: str) -> bool:
        if self._shows_text or goes_alone(text):
            return True
        # a transaction that a text began: psycopg2 sends its BEGIN all the same
        return begin is not None and self.connection.get_transaction_status() != ext.TRANSACTION_STATUS_IDLE

    def _execute_together(self, riding: list[str], own: bytes, query: Any, vars: Any) -> Any:
        connection = self.connection
        connection._waiting.sent(riding)
        self._carried = own
        try:
            return super().execute("; ".join(riding).encode() + b"; " + own)  # type: ignore[misc]
        except psycopg2.Error as error:
            commands = again(
                riding,
                idle=connection.get_transaction_status() == ext.TRANSACTION_STATUS_IDLE,
                has_position=error.diag.statement_position is not None,
            )
            if commands is None or connection.closed:
                raise
        finally:
            connection.note_begin(riding)
        self._carried = None
        connection.send(commands, noted=True)
        return super().execute(query, vars)  # type: ignore[misc]

    @property
    def query(self) -> bytes | None:
        """The user's statement as it was sent."""
        return self._carried if self._carried is not None else _Cursor.query.__get__(self)

    def _let_go(self) -> None:
        """Before something that cannot take along what waits."""
        self._carried = None
        if not self.closed:  # type: ignore[attr-defined]
            self.connection.send_waiting()

    def executemany(self, query: Any, vars_list: Any) -> Any:
        rows = iter(vars_list)
        first = list(itertools.islice(rows, 1))
        if first:  # else nothing is sent at all, nor is it when the values are wrong
            self.mogrify(query, first[0])  # type: ignore[attr-defined]
            self._let_go()
        return super().executemany(query, itertools.chain(first, rows))  # type: ignore[misc]

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


class _NativeNamedMixin:
    """In front of another class than psycopg2's plain one: a server-side cursor in psycopg2's own transaction."""

    connection: RidingConnection

    def __init__(self, connection: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(connection, *args, **kwargs)  # type: ignore[call-arg]
        self._mark = connection._mark

    def execute(self, query: Any, vars: Any = None) -> Any:
        if self._mark != self.connection._mark and not self.withhold:  # type: ignore[attr-defined]
            raise psycopg2.ProgrammingError("named cursor isn't valid anymore")
        with self.connection.native():
            return super().execute(query, vars)  # type: ignore[misc]


class NamedCursor(_CarryingMixin, _Cursor):  # type: ignore[misc]
    """A server-side cursor in a transaction that psycopg2 does not know of, for which it would send a second BEGIN.

    What it sends and refuses is what psycopg2's own does.
    """

    def __init__(self, connection: Any, *_: Any, name: str, withhold: bool, scrollable: bool | None) -> None:
        super().__init__(connection)
        self._name = name
        self._mark = connection._mark
        self._declared: bytes | None = None
        self.withhold = bool(withhold)
        self.scrollable = scrollable

    name = property(lambda self: self._name)
    withhold: bool = False
    scrollable: bool | None = None

    @property
    def query(self) -> bytes | None:
        return self._declared

    def execute(self, query: Any, vars: Any = None) -> None:
        if self._declared is not None:
            raise psycopg2.ProgrammingError("can't call .execute() on named cursors more than once")
        if self.connection.autocommit and not self.withhold:
            raise psycopg2.ProgrammingError("can't use a named cursor outside of transactions")
        self._check_mark()
        scroll = "" if self.scrollable is None else "SCROLL " if self.scrollable else "NO SCROLL "
        hold = "WITH" if self.withhold else "WITHOUT"
        declare = f"DECLARE {self._quoted} {scroll}CURSOR {hold} HOLD FOR "
        declared = declare.encode() + self.mogrify(query, vars)
        if not self.closed:
            self._declared = declared
        super().execute(declared)

    def executemany(self, query: Any, vars_list: Any) -> None:
        raise psycopg2.ProgrammingError("can't call .executemany() on named cursors")

    def callproc(self, procname: Any, parameters: Any = None) -> None:
        raise psycopg2.ProgrammingError("can't call .callproc() on named cursors")

    def fetchone(self) -> Any:
        self._run(f"FETCH FORWARD 1 FROM {self._quoted}")
        return super().fetchone()

    def fetchmany(self, size: int | None = None) -> Any:
        self._run(f"FETCH FORWARD {self.arraysize if size is None else int(size)} FROM {self._quoted}")
        return super().fetchall()

    def fetchall(self) -> Any:
        self._run(f"FETCH FORWARD ALL FROM {self._quoted}")
        return super().fetchall()

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        if self.rownumber >= self.rowcount:
            self._run(f"FETCH FORWARD {self.itersize} FROM {self._quoted}")
        if (row := super().fetchone()) is None:
            raise StopIteration
        return row

    def scroll(self, value: int, mode: str = "relative") -> None:
        self._run(f"MOVE {'ABSOLUTE ' if mode == 'absolute' else ''}{int(value)} FROM {self._quoted}")

    def close(self) -> None:
        if self._can_close() and (self._declared is not None or self._exists()):
            self._run(f"CLOSE {self._quoted}", begins=False)
        super().close()

    def _can_close(self) -> bool:
        status = self.connection.get_transaction_status()
        return not self.closed and status not in (ext.TRANSACTION_STATUS_UNKNOWN, ext.TRANSACTION_STATUS_INERROR)

    def _exists(self) -> bool:
        """Whether there is a cursor of this name that was declared by other means."""
        _Cursor.execute(self, "SELECT 1 FROM pg_catalog.pg_cursors WHERE name = %s", (self._name,))
        return bool(self.rowcount)

    def _run(self, command: str, *, begins: bool = True) -> None:
        if not self.closed:
            self._check_mark()
        if begins and not self.withhold:
            super().execute(command)
        else:
            _Cursor.execute(self, command)

    def _check_mark(self) -> None:
        if self._mark != self.connection._mark and not self.withhold:
            raise psycopg2.ProgrammingError("named cursor isn't valid anymore")

    @property
    def _quoted(self) -> str:
        quoted: str = ext.quote_ident(self._name, self.connection)
        return quoted


@functools.cache
def carrying(factory: Any, *, named: bool = False) -> Any:
    """`factory` with a mixin in front; a factory that is not a class is the user's own business."""
    if not isinstance(factory, type) or issubclass(factory, (_CarryingMixin, _NativeNamedMixin)):
        return factory
    if named:
        return type(factory.__name__, (_NativeNamedMixin, factory), {})
    return type(factory.__name__, (_CarryingMixin, factory), {"_shows_text": is_users_own(factory)})


def is_users_own(factory: Any) -> bool:
    """Whether a cursor class has code for statements that is not psycopg2's: it may look at their texts."""
    executing = (each for each in factory.__mro__ if "execute" in vars(each) or "mogrify" in vars(each))
    return any(not each.__module__.startswith("psycopg2.") for each in executing)

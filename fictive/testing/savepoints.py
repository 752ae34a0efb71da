"""The one server connection of a sandbox: the savepoints that are on it, and the commands that wait for a statement.

BEGIN, SAVEPOINT and RELEASE travel in one message with the next statement, as in a session's own transactions
(`drivers.pending` says which may). A savepoint protects what was done before it from the error of a statement. It is
good for all that follow until one of them has written: a read that was answered leaves nothing to be lost.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, cast

import sqlalchemy as sa

from ..connection.servers import REST
from ..drivers import TransactionStatus, driver_for
from ..drivers.base import IDLE, INERROR, INTRANS, Rest, bare
from ..drivers.pending import PendingCommands, note_parsed, parsed

__all__ = ["SandboxServer"]

_STATEMENT = "fictive_statement_"


class SandboxServer:
    """A server connection in one transaction, which is begun with the first statement. Its user sees to it that one
    thread at a time uses it."""

    def __init__(self, engine: sa.Engine) -> None:
        self.dialect = engine.dialect
        self.driver = driver_for(engine.dialect)
        self.is_psycopg = engine.dialect.driver == "psycopg"
        self.pending = PendingCommands()
        self.savepoints: list[str] = []
        """From the outermost in, those that wait included."""
        self.is_protected = False
        """Whether nothing was written since the innermost savepoint, which is one of a statement."""
        self.is_read_only = False
        """Whether the innermost savepoint was read only, and its RELEASE waits."""
        self.trips = 0
        """How many messages with commands alone the driver sent."""
        self.numbers = itertools.count(1)
        self.fairy = engine.raw_connection()
        self.dbapi = cast(Any, self.fairy.dbapi_connection)
        try:
            rest: Rest = self.fairy.info.get(REST) or self.driver.rest(self.dbapi)
            self.fairy.info[REST] = rest
            self.begin_command = rest.characteristics.begin_command()
            if self.driver.status(self.dbapi) is TransactionStatus.IDLE:
                self.driver.enter_autocommit(self.dbapi, self.dialect)
                if self.is_psycopg:  # which looks at the server's status, and not for its own BEGIN
                    self.driver.leave_autocommit(self.dbapi)
                self.pending.commands.append(self.begin_command)
            self.protect()
        except BaseException as error:
            self.fairy.invalidate(error)
            self.fairy.close()
            raise

    @property
    def is_begun(self) -> bool:
        """Whether BEGIN was sent."""
        commands = self.pending.commands
        return not commands or commands[0] != self.begin_command

    @property
    def is_lost(self) -> bool:
        return bool(self.dbapi.closed)

    @property
    def status(self) -> int:
        """libpq's number, as the server said it last."""
        return self.driver.status_of(self.dbapi)()

    # -- messages -----------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Send what waits, in a message of its own."""
        if self.pending.commands:
            self.is_read_only = False
            self.driver.send(self, self.pending.take())

    def run(self, *commands: str) -> Any:
        """Send what waits and these commands in one message; returns the driver's cursor, at the last result."""
        text = "; ".join([*self.pending.take(), *commands])
        self.is_read_only = self.is_protected = False
        dbapi, cursor = self.dbapi, self._plain_cursor()
        if not self.is_psycopg:
            cursor.execute(text)
            return cursor
        self.driver.enter_autocommit(dbapi, self.dialect)  # else psycopg would send its BEGIN
        try:
            cursor.execute(text, prepare=False)
        finally:
            self.driver.leave_autocommit(dbapi)
        while cursor.nextset():
            pass
        return cursor

    def execute(self, made: Any, query: Any, parameters: Any) -> Any:
        """Run a statement, what waits with it; returns the driver's cursor. `made`: the one that is to be used, where
        the application has done something with it."""
        pending = self.pending
        if pending.commands and (self.is_read_only or not pending.waits_for_commit()):
            if made is None and not self.is_read_only and not self.driver.own_transaction(self.dbapi):
                cursor = self.driver.execute_with(self, pending, query, parameters)
                if cursor is not None:
                    if query.__class__ is str and query not in parsed:
                        note_parsed(query)
                    return cursor
            self.flush()
        cursor = self.dbapi.cursor() if made is None else made
        if parameters is None:
            cursor.execute(query)
        else:
            cursor.execute(query, parameters)
        if query.__class__ is str and query not in parsed:
            note_parsed(query)
        return cursor

    def rendered(self, query: Any) -> Any:
        """The text of a statement that was composed with the driver's `sql` module; others as they are."""
        if isinstance(query, (str, bytes)) or not hasattr(query, "as_string"):
            return query
        return query.as_string(self._plain_cursor())

    def adopt(self) -> None:
        """Let psycopg2 know of the transaction, for what it does in none: named cursors and large objects. From then
        on nothing rides."""
        self.flush()
        if not self.is_psycopg and not self.driver.own_transaction(self.dbapi):
            self.driver.adopt(self.dbapi)

    def _plain_cursor(self) -> Any:
        """The driver's own class of cursor, past those of the application and of tools that watch."""
        if self.is_psycopg:
            import psycopg

            return psycopg.Cursor(bare(self.dbapi, psycopg.Connection))
        from psycopg2.extensions import connection, cursor

        return cursor(bare(self.dbapi, connection))

    # -- savepoints ---------------------------------------------------------------------------------------------------

    def savepoint(self, name: str) -> None:
        """Waits for the next statement."""
        self.pending.commands.append(f"SAVEPOINT {name}")
        self.savepoints.append(name)
        self.is_protected = False

    def release(self, name: str) -> None:
        """Waits, too; nothing is sent where the savepoint was not."""
        self._forget_from(name)
        self.is_protected = False
        if not self._take_back(name):
            self.pending.commands.append(f"RELEASE SAVEPOINT {name}")

    def undo(self, name: str) -> None:
        """Undo all since the savepoint, and the savepoint."""
        self._forget_from(name)
        self.is_protected = False
        if not self._take_back(name):
            self.pending.commands.clear()  # all of it came within the savepoint
            self.run(f"ROLLBACK TO SAVEPOINT {name}", f"RELEASE SAVEPOINT {name}")

    def roll_back_to(self, name: str) -> None:
        """Undo all since the savepoint, which stays."""
        self._forget_from(name)
        if self._take_back(name):
            self.savepoint(name)
            return
        self.savepoints.append(name)
        self.pending.commands.clear()
        self.run(f"ROLLBACK TO SAVEPOINT {name}")
        self.is_protected = name.startswith(_STATEMENT)

    def _forget_from(self, name: str) -> None:
        if name in self.savepoints:
            del self.savepoints[len(self.savepoints) - 1 - self.savepoints[::-1].index(name) :]

    def _take_back(self, name: str) -> bool:
        """Whether the savepoint has not been sent, and is not going to be, nor what came within it."""
        commands, command = self.pending.commands, f"SAVEPOINT {name}"
        if command not in commands:
            return False
        del commands[len(commands) - 1 - commands[::-1].index(command) :]
        return True

    def protect(self, *, read_only: bool = False) -> None:
        """Let the error of the next statement undo that one only."""
        if self.is_protected and not read_only:
            return
        if self.savepoints and (last := self.savepoints[-1]).startswith(_STATEMENT):
            while self.pending.commands[-1:] and self.pending.commands[-1].startswith("RELEASE"):
                self.pending.commands.pop()  # of one within the last
            self.release(last)
        self.savepoint(f"{_STATEMENT}{next(self.numbers)}")
        self.is_protected = True
        self.is_read_only = False
        if read_only:
            self.pending.commands.append("SET TRANSACTION READ ONLY")

    def end_read_only(self) -> None:
        """After a statement that was protected with `read_only`."""
        self.release(self.savepoints[-1])
        self.is_read_only = bool(self.pending.commands)

    @contextlib.contextmanager
    def protected(self) -> Iterator[None]:
        """Around something of our own that may fail."""
        self.protect()
        waiting = list(self.pending.commands)
        try:
            yield
        except BaseException as error:
            self.recover(error, waiting)
            raise

    def abort(self) -> None:
        """Let the server refuse what comes next, as in a transaction that failed. `recover()` after it ends that."""
        self.protect()
        waiting = list(self.pending.commands)
        try:
            self.run("ROLLBACK TO SAVEPOINT fictive_none")
        except self.dialect.loaded_dbapi.Error:
            pass
        except BaseException as error:
            self.recover(error, waiting)
            raise

    def recover(self, error: BaseException, waiting: list[str]) -> bool:
        """After a statement that failed: back to the innermost savepoint. `waiting`: what was to travel with it.

        Returns whether it failed on the server. What the driver refused, such as a value, never reached it.
        """
        if self.is_lost:
            return True
        status = self.status
        if status not in (IDLE, INTRANS, INERROR) or (self.is_psycopg and self.dbapi.pgconn.pipeline_status):
            self.dbapi.close()  # interrupted in the middle of a message; the server rolls back
            return True
        if not isinstance(error, Exception) and waiting and not self.pending.commands:
            self._settle(status, waiting)
            return status == INERROR
        if status == INERROR:
            self.roll_back_to(self.savepoints[-1])
        return status == INERROR

    def _settle(self, status: int, waiting: list[str]) -> None:
        """An interrupt has struck while a message was on its way: find out whether the server has had it."""
        names = [command.removeprefix("SAVEPOINT ") for command in waiting if command.startswith("SAVEPOINT ")]
        if status == INERROR:
            self.roll_back_to(self.savepoints[-1])
        elif status == IDLE:
            self.pending.commands[:] = waiting
        elif names:
            self.run("SAVEPOINT fictive_look")
            try:
                self.run(f"ROLLBACK TO SAVEPOINT {names[-1]}")
            except self.dialect.loaded_dbapi.Error:
                self.run("ROLLBACK TO SAVEPOINT fictive_look", "RELEASE SAVEPOINT fictive_look")
                self.pending.commands[:] = waiting

    # -- the end ------------------------------------------------------------------------------------------------------

    def end(self, *, keep: bool, close: bool) -> None:
        """COMMIT or ROLLBACK, and the connection goes back to the pool, or is closed."""
        try:
            if self.is_begun:
                self._end(keep=keep)
        except BaseException as error:
            self.fairy.invalidate(error)
            if keep or not self.is_lost or not isinstance(error, Exception):
                raise  # else the server has rolled back when the connection went
        finally:
            if close and self.fairy.dbapi_connection is not None:
                self.fairy.invalidate()
            self.fairy.close()

    def _end(self, *, keep: bool) -> None:
        if keep:
            self.flush()
        self.pending.commands.clear()
        if self.is_psycopg or self.driver.own_transaction(self.dbapi):
            self.dbapi.commit() if keep else self.dbapi.rollback()
        else:
            self.driver.send(self, ["COMMIT" if keep else "ROLLBACK"])

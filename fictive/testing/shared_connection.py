"""One server connection under several connections of a driver: what a sandbox has in place of a pool's connections.

The server connection is in one transaction, which is never committed. A `SandboxConnection` behaves as a connection
of its own: autocommit, BEGIN, COMMIT, ROLLBACK, READ ONLY, a failed transaction. Each of its statements runs in a
savepoint, so that an error undoes that statement only. A transaction gets a savepoint with its first statement that
is no plain read; until then it is only a note, and several may be open at once. From then on other threads wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, cast

import sqlalchemy as sa

from ..connection.classify import StatementClass, classify, summary
from ..errors import ConfigurationError, SandboxError
from ..session.callers import caller

__all__ = ["Recording", "SandboxConnection", "SandboxCursor", "SharedConnection", "as_thread"]

OVER = "This connection is of a sandbox that has ended."
OTHER_PROCESS = (
    "A child process cannot use the connection of its parent's sandbox as it is: give it sandbox.token(), and use "
    "fictive.testing.join there."
)
TWO_PHASE = "Two-phase transactions cannot be in a sandbox."
IDLE, _ACTIVE, INTRANS, INERROR = range(4)
"""libpq's PGTransactionStatusType."""

_CONTROL = re.compile(r"(BEGIN|START\s+TRANSACTION|COMMIT|END|ROLLBACK|ABORT)\b([^;]*)", re.IGNORECASE)
_CHAIN = re.compile(r"\bAND\s+CHAIN\b", re.IGNORECASE)
_READ_ONLY = re.compile(r"\bREAD\s+(ONLY|WRITE)\b", re.IGNORECASE)
_SET_TRANSACTION = re.compile(r"SET\s+(?:LOCAL\s+)?TRANSACTION\b(?!\s+SNAPSHOT)[^;]*", re.IGNORECASE)
_CURSOR = re.compile(r"\s*DECLARE\b.*?\bCURSOR\b.*?\bFOR\b(.*)", re.IGNORECASE | re.DOTALL)
_CURSOR_USE = re.compile(r"\s*(?:FETCH|MOVE|CLOSE)\b", re.IGNORECASE)
_CURSOR_NAME = re.compile(r'\s*(DECLARE|CLOSE)\s+("(?:[^"]|"")+"|\w+)', re.IGNORECASE)
_SET = re.compile(
    r"(?:^|;)\s*(?:RE)?SET\s+(?:(LOCAL|SESSION)\s+)?(TIME\s+ZONE|(?!CHARACTERISTICS|CONSTRAINTS|TRANSACTION)[a-z_][\w.]*)",
    re.IGNORECASE,
)
_SET_CONFIG = re.compile(r"\bset_config\s*\(\s*(?:'((?:[^']|'')+)'|%\((\w+)\)s|(%s))", re.IGNORECASE)
_TEMPORARY = re.compile(
    r"\bCREATE\s+(?:(?:LOCAL|GLOBAL)\s+)?TEMP(?:ORARY)?\s+TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?"
    r'((?:"(?:[^"]|"")+"|\w+)(?:\.(?:"(?:[^"]|"")+"|\w+))?)(.*?)(?:;|$)',
    re.IGNORECASE | re.DOTALL,
)
_ON_COMMIT = re.compile(r"\bON\s+COMMIT\s+(DROP|DELETE\s+ROWS)\b", re.IGNORECASE)
_DML = re.compile(r"\s*(?:SELECT|INSERT|UPDATE|DELETE|WITH|VALUES|COPY|SET|SHOW|EXPLAIN|FETCH|MERGE)\b", re.IGNORECASE)

_DEFERRABLE = """
SELECT format('%I.%I', n.nspname, c.conname), c.condeferred
FROM pg_catalog.pg_constraint c JOIN pg_catalog.pg_namespace n ON n.oid = c.connamespace
WHERE c.condeferrable AND NOT EXISTS (
    SELECT FROM pg_catalog.pg_constraint o
    WHERE o.conname = c.conname AND o.connamespace = c.connamespace AND NOT o.condeferrable)
"""


_acting = threading.local()


@contextlib.contextmanager
def as_thread(thread: Hashable) -> Iterator[None]:
    """This thread acts for one of another process."""
    _acting.thread = thread
    try:
        yield
    finally:
        del _acting.thread


def _this_thread() -> Hashable:
    return getattr(_acting, "thread", None) or threading.get_ident()


def _described(thread: Hashable) -> str:
    if isinstance(thread, tuple):
        return f"A thread of process {thread[0]}"
    return "The thread " + next((each.name for each in threading.enumerate() if each.ident == thread), str(thread))


@dataclasses.dataclass
class Recording:
    """What `box.record()` gives: the statements of the application, and the round trips that they would be outside of
    the sandbox."""

    statements: list[str] = dataclasses.field(default_factory=list)
    """As the driver got them, without BEGIN, COMMIT, ROLLBACK and savepoints."""
    places: list[str] = dataclasses.field(default_factory=list)
    """The application's line of each statement."""
    messages: list[str] = dataclasses.field(default_factory=list)
    """What would be sent, one entry for each round trip: `"BEGIN; INSERT ..."` where they travel together."""

    @property
    def round_trips(self) -> int:
        return len(self.messages)


@dataclasses.dataclass
class Frame:
    """The savepoint that stands for the transaction of a `SandboxConnection`."""

    connection: SandboxConnection
    thread: Hashable
    name: str
    number: int
    is_done: bool = False
    """Committed, but a later transaction of the same thread is open, and is to end first."""


class SharedConnection:
    """A server connection in one transaction, and whose turn it is."""

    def __init__(self, engine: sa.Engine, *, staged: deque[str], patience: float) -> None:
        self.dialect = engine.dialect
        self.patience = patience
        self.staged = staged
        """SQLSTATEs with which the next commits fail."""
        self.frames: list[Frame] = []
        self.portals: list[str] = []
        """Server-side cursors whose transaction has ended."""
        self.is_tainted = False
        """Whether something was done that ROLLBACK does not undo."""
        self.is_kept = False
        self.is_over = False
        self.was_aborted = True
        """Whether the last statement that failed did so on the server."""
        self.recordings: list[Recording] = []
        self.connections: list[SandboxConnection] = []
        self._pid = os.getpid()
        self._turn = threading.Condition(threading.RLock())
        self._numbers = itertools.count(1)
        self._unreleased: str | None = None
        """The savepoint of the last statement, whose RELEASE travels with the next command."""
        self._deferrable: list[str] | None = None
        self._deferred: list[str] = []
        self.fairy = engine.raw_connection()
        self.dbapi = cast(Any, self.fairy.dbapi_connection)
        try:
            if self.dbapi.autocommit:
                self.dbapi.autocommit = False
            self.run("SAVEPOINT fictive_sandbox")
        except BaseException as error:
            self.fairy.invalidate(error)
            self.fairy.close()
            raise

    def connect(self) -> SandboxConnection:
        if self.is_over:
            raise SandboxError(OVER)
        connection = SandboxConnection(self)
        self.connections.append(connection)
        return connection

    def nest(self, staged: deque[str]) -> tuple[str, deque[str]]:
        """Begin a sandbox in this one."""
        if os.getpid() != self._pid:
            raise SandboxError(OTHER_PROCESS)
        if self.frames:
            raise ConfigurationError("sandbox() goes around transactions, and one is open.")
        name = f"fictive_sandbox_{next(self._numbers)}"
        self.run(f"SAVEPOINT {name}")
        before, self.staged = self.staged, staged
        return name, before

    def unnest(self, name: str, staged: deque[str], *, keep: bool) -> None:
        self.staged = staged
        self.portals.clear()
        self._deferrable = None
        try:
            self.run(*([] if keep else [f"ROLLBACK TO SAVEPOINT {name}"]), f"RELEASE SAVEPOINT {name}")
        except Exception:
            if keep or not self.is_lost:
                raise  # else the server has rolled back when the connection went

    def end(self, *, keep: bool) -> None:
        """Roll all of it back, or commit it, and give the server connection back."""
        self.is_over = True
        for connection in self.connections:
            connection.is_ended = True
        try:
            if keep:
                self.dbapi.commit()
            else:
                self.dbapi.rollback()
        except BaseException as error:
            self.fairy.invalidate(error)
            if keep or not self.is_lost or not isinstance(error, Exception):
                raise  # else the server has rolled back when the connection went
        finally:
            if self.is_tainted and self.fairy.dbapi_connection is not None:
                self.fairy.invalidate()
            self.fairy.close()

    @property
    def is_lost(self) -> bool:
        return bool(self.dbapi.closed)

    # -- what is sent of our own --------------------------------------------------------------------------------------

    def run(self, *commands: str) -> Any:
        """Send commands in one message; returns the driver's cursor."""
        if self._unreleased is not None:
            commands = (f"RELEASE SAVEPOINT {self._unreleased}", *commands)
            self._unreleased = None
        cursor = self._plain_cursor()
        if self.dialect.driver == "psycopg":
            cursor.execute("; ".join(commands), prepare=False)
            while cursor.nextset():  # to the result of the last one
                pass
            return cursor
        cursor.execute("; ".join(commands))
        return cursor

    def _status(self) -> int:
        if self.dialect.driver == "psycopg":
            return int(self.dbapi.info.transaction_status)
        return int(self.dbapi.get_transaction_status())

    def _plain_cursor(self) -> Any:
        """The driver's own class of cursor, past those of the application and of tools that watch."""
        dbapi = self.dbapi
        while (inner := getattr(dbapi, "__wrapped__", None)) is not None:
            dbapi = inner
        if self.dialect.driver == "psycopg":
            from psycopg.cursor import Cursor

            return Cursor(dbapi)
        from psycopg2.extensions import cursor

        return cursor(dbapi)

    @contextlib.contextmanager
    def _savepoint(self, *, then: str | None = None) -> Iterator[list[str]]:
        """A savepoint around one statement. What the body appends is sent with its RELEASE."""
        name = f"fictive_statement_{next(self._numbers)}"
        self.run(f"SAVEPOINT {name}", *([then] if then else ()))
        finally_run: list[str] = []
        try:
            yield finally_run
            if finally_run:
                self.run(*finally_run, f"RELEASE SAVEPOINT {name}")
            else:
                self._unreleased = name
        except BaseException:
            self._unreleased = None  # it is within this one
            if not self.is_lost:
                # what the driver refused, such as a value, never reached the server
                self.was_aborted = self._status() != INTRANS
                undo = [f"ROLLBACK TO SAVEPOINT {name}"] if self.was_aborted else []
                self.run(*undo, f"RELEASE SAVEPOINT {name}")
            raise

    def fail(self, code: str, message: str) -> None:
        """Let the server raise an error, so that it is the driver's own."""
        with self._savepoint():
            self.run(f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{code}', MESSAGE = {_literal(message)}; END $$")

    # -- whose turn it is ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def turn(self, connection: SandboxConnection) -> Iterator[None]:
        """Wait until no other thread has a transaction open that has written."""
        if connection.is_ended:
            raise SandboxError(OVER)
        if os.getpid() != self._pid:
            raise SandboxError(OTHER_PROCESS)
        end = time.monotonic() + self.patience
        if not self._turn.acquire(timeout=self.patience):
            raise SandboxError(f"Another thread has been running a statement for {self.patience:g} seconds.")
        try:
            thread = connection.thread or _this_thread()
            while self.frames and self.frames[-1].thread != thread and connection.frame is None:
                if connection.is_abandoned:
                    raise SandboxError(OVER)
                if not self._turn.wait(max(0.0, end - time.monotonic())) and time.monotonic() >= end:
                    raise SandboxError(
                        f"{_described(self.frames[-1].thread)} has a transaction open in the sandbox, and this "
                        f"thread has waited {self.patience:g} seconds for its end. Threads share one connection: end "
                        "the transaction before another thread is waited for."
                    )
            yield
        finally:
            self._turn.release()

    # -- a statement -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def statement(self, connection: SandboxConnection, query: Any, parameters: Any) -> Iterator[bool]:
        """Around one statement; gives False where it was a command about the transaction, and is done."""
        with self.turn(connection):
            text = _text_of(query)
            if self._controls(connection, text):
                yield False
                return
            if not connection.autocommit and connection.state == IDLE:
                self.begin(connection)
                self._record(connection, "BEGIN")
            if connection.state == INERROR:
                self._record(connection, text, is_statement=True)
                self.fail("25P02", "current transaction is aborted, commands ignored until end of transaction block")
            statement = classify(query).resolved(parameters)
            if statement.transaction_only == "PREPARE TRANSACTION":
                raise SandboxError(TWO_PHASE)
            if statement.may_end_transaction:
                raise SandboxError(f"{summary(text)!r} holds a COMMIT or ROLLBACK among other statements.")
            writes = not _only_reads(text, statement)
            in_transaction = connection.state == INTRANS
            read_only = connection.is_read_only if in_transaction else bool(connection.read_only)
            if in_transaction and writes and not read_only:
                self._materialise(connection)
            self._close_portals()
            if writes:
                self._note_settings(connection, text, parameters, statement)
            if self.recordings and not connection.rides:
                self._record(connection, text, is_statement=True)
            try:
                with self._savepoint(then="SET TRANSACTION READ ONLY" if read_only else None) as finally_run:
                    yield True
                    if writes and not in_transaction:
                        finally_run += self._at_commit(connection, text)
            except BaseException:
                if in_transaction and self.was_aborted:
                    connection.state = INERROR
                raise
            if writes or not in_transaction:
                self._note_effects(connection, text, statement)
            elif (cursor := _CURSOR_NAME.match(text)) is not None:
                self._note_portal(connection, cursor)

    def _record(self, connection: SandboxConnection, text: str, *, is_statement: bool = False) -> None:
        if not self.recordings:
            return
        connection.riding.append(text)
        if connection.rides:
            return
        message = "; ".join(connection.riding)
        connection.riding.clear()
        for recording in self.recordings:
            recording.messages.append(message)
            if is_statement:
                recording.statements.append(text)
                recording.places.append(caller())

    def _controls(self, connection: SandboxConnection, text: str) -> bool:
        """Do what a command about the transaction asks for; False where the text is none."""
        text = text.strip().rstrip("; \n\t")
        statement = classify(text)
        if statement.savepoint is not None:
            return self._controls_savepoint(connection, text, *statement.savepoint)
        if (match := _SET_TRANSACTION.fullmatch(text)) is not None:
            if not connection.autocommit and connection.state == IDLE:
                self.begin(connection)
                self._record(connection, "BEGIN")
            self._record(connection, text, is_statement=True)
            if (mode := _READ_ONLY.search(text)) is not None:
                connection.is_read_only = mode[1].upper() == "ONLY"
            return True
        if (match := _CONTROL.fullmatch(text)) is None:
            return False
        verb, rest = match[1].upper(), match[2]
        if "PREPARED" in rest.upper():
            raise SandboxError(TWO_PHASE)
        if verb.startswith(("BEGIN", "START")):
            self._record(connection, text)
            if connection.state == IDLE:
                self.begin(connection)
            if (mode := _READ_ONLY.search(rest)) is not None:
                connection.is_read_only = mode[1].upper() == "ONLY"
            return True
        (self.commit if verb in ("COMMIT", "END") else self.rollback)(connection)
        if _CHAIN.search(rest):
            self.begin(connection)
        return True

    def _controls_savepoint(self, connection: SandboxConnection, text: str, verb: str, name: str) -> bool:
        if not connection.autocommit and connection.state == IDLE:
            self.begin(connection)
            self._record(connection, "BEGIN")
        if connection.state == IDLE:
            return False  # the server says what is wrong
        key = name[1:-1] if name.startswith('"') else name.lower()
        known = [known for known, _ in connection.savepoints]
        if verb == "SAVEPOINT":
            if connection.state == INERROR:
                return False
            self._materialise(connection)
            self._record(connection, text)
            self.run(text)
            connection.savepoints.append((key, next(self._numbers)))
            return True
        if key not in known or (verb == "RELEASE" and connection.state == INERROR):
            return False
        index = len(known) - 1 - known[::-1].index(key)
        self._record(connection, text)
        self.run(text)
        if verb == "RELEASE":
            del connection.savepoints[index:]
        else:
            self._kill_above(connection.savepoints[index][1])
            del connection.savepoints[index + 1 :]
            connection.state = INTRANS
        return True

    # -- transactions -------------------------------------------------------------------------------------------------

    def begin(self, connection: SandboxConnection) -> None:
        connection.state = INTRANS
        connection.thread = _this_thread()
        connection.is_read_only = bool(connection.read_only)

    def _materialise(self, connection: SandboxConnection) -> None:
        """Give a transaction its savepoint."""
        if connection.frame is None:
            number = next(self._numbers)
            frame = Frame(connection, connection.thread, f"fictive_transaction_{number}", number)
            self.run(f"SAVEPOINT {frame.name}")
            connection.frame = frame
            self.frames.append(frame)

    def commit(self, connection: SandboxConnection) -> None:
        if connection.state == INERROR:  # as PostgreSQL does
            self._record(connection, "COMMIT")
            self._roll_back(connection)
        if connection.state == IDLE:
            return
        with self.turn(connection):
            if not connection.rides:
                self._record(connection, "COMMIT")
            try:
                if self.staged and not connection.rides:
                    self.fail(self.staged.popleft(), "staged by sandbox.fail_next_commit()")
                if connection.frame is not None or connection.local_settings:
                    commands = self._at_commit(connection)
                    if commands:
                        self.run(*commands)
            except BaseException:
                if not self.is_lost:
                    self._roll_back(connection)
                raise
            frame = connection.frame
            self._forget(connection)
            if frame is not None:
                frame.is_done = True
                ended = None
                while self.frames and self.frames[-1].is_done:
                    ended = self.frames.pop()
                if ended is not None:  # and with it those above
                    self.run(f"RELEASE SAVEPOINT {ended.name}")
                self._turn.notify_all()

    def rollback(self, connection: SandboxConnection) -> None:
        if connection.state != IDLE and not connection.rides:
            self._record(connection, "ROLLBACK")
        self._roll_back(connection)

    def _roll_back(self, connection: SandboxConnection) -> None:
        frame = connection.frame
        if frame is None and not connection.local_settings:
            self._forget(connection)  # sends nothing, so that a garbage collection may do it at any time
            return
        with self.turn(connection):
            try:
                if frame is not None:
                    self.run(f"ROLLBACK TO SAVEPOINT {frame.name}", f"RELEASE SAVEPOINT {frame.name}")
                    self._kill_above(frame.number)
                    self.frames.remove(frame)
                    self._deferrable = None
                else:
                    self.run(*_restoring(connection.local_settings))
            finally:
                self._forget(connection)
                self._turn.notify_all()

    def _forget(self, connection: SandboxConnection) -> None:
        connection.state, connection.frame, connection.thread = IDLE, None, None
        connection.is_read_only = False
        connection.savepoints.clear()
        connection.local_settings.clear()
        connection.temporary.clear()
        self.portals += connection.portals
        connection.portals.clear()

    def _kill_above(self, number: int) -> None:
        """Transactions of the same thread, begun later, were undone by a ROLLBACK TO."""
        for frame in [frame for frame in self.frames if frame.number > number]:
            self.frames.remove(frame)
            if not frame.is_done:
                connection = frame.connection
                self._forget(connection)
                connection.state = INERROR

    def _at_commit(self, connection: SandboxConnection, text: str | None = None) -> list[str]:
        """What the server does at COMMIT."""
        commands = []
        if text is not None and not _DML.match(text):
            self._deferrable = None
        if self._deferrable is None:
            rows = self.run(_DEFERRABLE).fetchall()
            self._deferrable = [name for name, _ in rows]
            self._deferred = [name for name, is_deferred in rows if is_deferred]
        if self._deferrable:
            commands.append("SET CONSTRAINTS ALL IMMEDIATE")
            if self._deferred:
                commands.append(f"SET CONSTRAINTS {', '.join(self._deferred)} DEFERRED")
        commands += _restoring(connection.local_settings)
        for name, action in connection.temporary:
            commands.append(f"DROP TABLE IF EXISTS {name}" if action == "DROP" else f"TRUNCATE {name}")
        return commands

    # -- what statements leave ---------------------------------------------------------------------------------------

    def _note_settings(
        self, connection: SandboxConnection, text: str, parameters: Any, statement: StatementClass
    ) -> None:
        """Remember the value of a setting that is about to change: of a local one to the end of the transaction."""
        found = []
        for scope, words in _SET.findall(text):
            name = words.lower() if words[:4].lower() != "time" or "zone" not in words.lower() else "timezone"
            found.append((name, scope.upper() == "LOCAL"))
        if "set_config" in text.lower():
            is_local = statement.transaction_only is not None and statement.transaction_only.startswith("set_config")
            for literal, key, positional in _SET_CONFIG.findall(text):
                given = literal.replace("''", "'") or _parameter(parameters, key, positional)
                if isinstance(given, str):
                    found.append((given, is_local))
        for name, is_local in found:
            kept = connection.local_settings if is_local else connection.settings
            if name not in kept and name not in ("all", "session"):
                try:
                    with self._savepoint():
                        value = self.run(f"SELECT current_setting({_literal(name)}, true)").fetchone()[0]
                except Exception:  # the statement itself says what is wrong with the name
                    continue
                kept[name] = value

    def _note_effects(self, connection: SandboxConnection, text: str, statement: StatementClass) -> None:
        if not _DML.match(text):
            self._deferrable = None
        if statement.connection_state is not None:
            connection.has_session_state = True
            if not statement.connection_state.startswith(("SET", "RESET", "set_config", "CREATE TEMPORARY")):
                self.is_tainted = True
        if connection.state == IDLE:
            connection.local_settings.clear()
        for name, options in _TEMPORARY.findall(text):
            if (action := _ON_COMMIT.search(options)) is not None and connection.state != IDLE:
                connection.temporary.append((name, action[1].upper()))
        if (cursor := _CURSOR_NAME.match(text)) is not None:
            self._note_portal(connection, cursor)

    def _note_portal(self, connection: SandboxConnection, match: re.Match[str]) -> None:
        if match[1].upper() == "DECLARE":
            connection.portals.append(match[2])
        elif match[2] in connection.portals:
            connection.portals.remove(match[2])

    def _close_portals(self) -> None:
        while self.portals:
            name = self.portals.pop()
            with contextlib.suppress(self.dialect.loaded_dbapi.Error), self._savepoint():
                self.run(f"CLOSE {name}")

    def abandon(self, connection: SandboxConnection) -> None:
        """Let a thread that waits with this connection for its turn wait no longer."""
        with self._turn:
            connection.is_abandoned = True
            self._turn.notify_all()

    def close(self, connection: SandboxConnection) -> None:
        """Undo what was set through a connection that is closed."""
        if connection.is_ended or connection not in self.connections:
            return
        self.connections.remove(connection)
        if self.is_lost or os.getpid() != self._pid:
            return
        self.rollback(connection)
        if connection.has_session_state:
            with self.turn(connection):
                self.run(
                    *_restoring(connection.settings), "SELECT pg_catalog.pg_advisory_unlock_all()", "DISCARD TEMP"
                )


class SandboxConnection:
    """A connection of the driver's, as far as anybody can tell, over a `SharedConnection`."""

    def __init__(self, shared: SharedConnection) -> None:
        self.shared = shared
        self.autocommit: bool = False
        self.isolation_level: Any = None
        self.read_only: bool | None = None
        self.deferrable: bool | None = None
        self.state = IDLE
        self.is_read_only = False
        """Of the transaction that is open."""
        self.is_ended = False
        self.is_abandoned = False
        """Whether it is of a process that was told to go, and waits for no turn."""
        self.thread: Hashable | None = None
        """That of the transaction that is open."""
        self.frame: Frame | None = None
        self.savepoints: list[tuple[str, int]] = []
        self.local_settings: dict[str, str | None] = {}
        self.settings: dict[str, str | None] = {}
        self.temporary: list[tuple[str, str]] = []
        self.portals: list[str] = []
        self.has_session_state = False
        self.rides = False
        """Whether commands are given to it that travel with a statement, and are no round trips."""
        self.riding: list[str] = []
        """Those, for the recordings."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.startswith("tpc_") or name == "xid":
            raise SandboxError(TWO_PHASE)
        return getattr(self.shared.dbapi, name)

    @property
    def readonly(self) -> bool | None:
        return self.read_only

    @readonly.setter
    def readonly(self, value: bool | None) -> None:
        self.read_only = value

    def set_isolation_level(self, level: Any) -> None:
        self.autocommit = level == 0 or str(level).upper() == "AUTOCOMMIT"
        self.isolation_level = None if self.autocommit else level

    def set_autocommit(self, value: bool) -> None:
        self.autocommit = value

    def set_read_only(self, value: bool | None) -> None:
        self.read_only = value

    def set_deferrable(self, value: bool | None) -> None:
        self.deferrable = value

    def set_session(
        self, isolation_level: Any = None, readonly: Any = None, deferrable: Any = None, autocommit: Any = None
    ) -> None:
        if isolation_level is not None:
            self.isolation_level = isolation_level
        if readonly is not None:
            self.read_only = bool(readonly)
        if deferrable is not None:
            self.deferrable = bool(deferrable)
        if autocommit is not None:
            self.autocommit = bool(autocommit)

    def get_transaction_status(self) -> int:
        return self.state

    @property
    def status(self) -> int:
        return 1 if self.state == IDLE else 2

    @property
    def closed(self) -> bool:
        return self.is_ended or self.shared.is_lost

    broken = closed

    def cursor(self, *args: Any, **kwargs: Any) -> SandboxCursor:
        return SandboxCursor(self, self.shared.dbapi.cursor(*args, **kwargs))

    def execute(self, query: Any, params: Any = None, **kwargs: Any) -> Any:
        return self.cursor().execute(query, params, **kwargs)

    def commit(self) -> None:
        self.shared.commit(self)

    def rollback(self) -> None:
        if not self.closed:
            self.shared.rollback(self)

    def reset(self) -> None:
        """As a connection is that comes back to the pool."""
        self.autocommit, self.isolation_level, self.read_only, self.deferrable = False, None, None, None

    def close(self) -> None:
        self.shared.close(self)
        self.is_ended = True

    def __enter__(self) -> SandboxConnection:
        return self

    def __exit__(self, type_: Any, value: Any, traceback: Any) -> None:
        if type_ is None:
            self.commit()
        else:
            self.rollback()


class SandboxCursor:
    """The driver's cursor, whose statements run in savepoints."""

    def __init__(self, connection: SandboxConnection, cursor: Any) -> None:
        self.__dict__.update(connection=connection, driver_cursor=cursor, has_name=bool(getattr(cursor, "name", None)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.driver_cursor, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.driver_cursor, name, value)

    def _statement(self, query: Any, parameters: Any = None) -> contextlib.AbstractContextManager[bool]:
        shared: SharedConnection = self.connection.shared
        return shared.statement(self.connection, query, parameters)

    def execute(self, query: Any, parameters: Any = None, *args: Any, **kwargs: Any) -> Any:
        with self._statement(query, parameters) as goes_on:
            if goes_on:
                if parameters is None:
                    self.driver_cursor.execute(query, *args, **kwargs)
                else:
                    self.driver_cursor.execute(query, parameters, *args, **kwargs)
        return self

    def executemany(self, query: Any, *args: Any, **kwargs: Any) -> None:
        with self._statement(query):
            self.driver_cursor.executemany(query, *args, **kwargs)

    def callproc(self, name: str, *args: Any) -> Any:
        with self._statement(f"SELECT {name}()"):
            return self.driver_cursor.callproc(name, *args)

    def stream(self, query: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with self._statement(query):
            rows = list(self.driver_cursor.stream(query, *args, **kwargs))
        return iter(rows)

    @contextlib.contextmanager
    def copy(self, statement: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with self._statement(statement), self.driver_cursor.copy(statement, *args, **kwargs) as copy:
            yield copy

    def copy_expert(self, sql: Any, *args: Any, **kwargs: Any) -> Any:
        with self._statement(sql):
            return self.driver_cursor.copy_expert(sql, *args, **kwargs)

    def copy_from(self, *args: Any, **kwargs: Any) -> Any:
        with self._statement("COPY t FROM STDIN"):
            return self.driver_cursor.copy_from(*args, **kwargs)

    def copy_to(self, *args: Any, **kwargs: Any) -> Any:
        with self._statement("COPY t TO STDOUT"):
            return self.driver_cursor.copy_to(*args, **kwargs)

    # A cursor with a name asks the server for its rows.

    def _fetch(self, name: str, *args: Any) -> Any:
        fetch = getattr(self.driver_cursor, name)
        if not self.has_name:
            return fetch(*args)
        with self._statement("FETCH"):
            return fetch(*args)

    def fetchone(self) -> Any:
        return self._fetch("fetchone")

    def fetchmany(self, *args: Any) -> Any:
        return self._fetch("fetchmany", *args)

    def fetchall(self) -> Any:
        return self._fetch("fetchall")

    def __iter__(self) -> Iterator[Any]:
        while (row := self.fetchone()) is not None:
            yield row

    def close(self) -> None:
        if not self.has_name or self.connection.closed:
            self.driver_cursor.close()
            return
        with self._statement("CLOSE"):
            self.driver_cursor.close()

    def __enter__(self) -> SandboxCursor:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()


def _text_of(query: Any) -> str:
    if isinstance(query, bytes):
        return query.decode("utf-8", "replace")
    return query if isinstance(query, str) else ""


def _only_reads(text: str, statement: StatementClass) -> bool:
    if _CURSOR_USE.match(text):
        return True
    if (match := _CURSOR.match(text)) is not None:
        return classify(match[1].strip()).is_plain_read
    return statement.is_plain_read


def _parameter(parameters: Any, key: str, positional: str) -> Any:
    if key and isinstance(parameters, Mapping):
        return parameters.get(key)
    if positional and isinstance(parameters, Sequence) and parameters:
        return parameters[0]
    return None


def _restoring(settings: Mapping[str, str | None]) -> list[str]:
    """Commands that put settings back, for the rest of the sandbox."""
    return [
        f"SELECT pg_catalog.set_config({_literal(name)}, {_literal(value or '')}, true)"
        for name, value in settings.items()
    ]


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"

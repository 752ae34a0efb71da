"""One server connection under several connections of a driver: what a sandbox has in place of a pool's connections.

The server connection is in one transaction, which is never committed. A `SandboxConnection` behaves as a connection
of its own: autocommit, BEGIN, COMMIT, ROLLBACK, READ ONLY, a failed transaction. Before a statement of its own, or a
read, is a savepoint, so that an error undoes that statement only. A transaction gets a savepoint with its first
statement that is no plain read; until then it is only a note, and several may be open at once. From then on other
threads wait, and its statements need no savepoint: an error aborts it, as ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import sqlalchemy as sa

from ..connection.classify import StatementClass, summary
from ..drivers.base import IDLE, INERROR, INTRANS
from ..errors import ConfigurationError, SandboxError
from ..session.callers import caller
from .psycopg_blocks import block_of, check_no_block
from .sandbox_texts import ON_COMMIT, SandboxText, settings_of, temporary_tables, text_of
from .savepoints import SandboxServer

__all__ = ["Recording", "SandboxConnection", "SandboxCursor", "SharedConnection", "as_thread"]

OVER = "This connection is of a sandbox that has ended."
LOST = "The server connection of this sandbox was lost, or interrupted, and what was done in the sandbox with it."
OTHER_PROCESS = (
    "A child process cannot use the connection of its parent's sandbox as it is: give it sandbox.token(), and use "
    "fictive.testing.join there."
)
ENCODING = (
    "psycopg2 ends a transaction that it knows of with set_client_encoding(), and after a named cursor or a large "
    "object it knows of the sandbox's. Call it before them."
)
TWO_PHASE = "Two-phase transactions cannot be in a sandbox."

_HAS_DEFERRABLE = "SELECT FROM pg_catalog.pg_constraint WHERE condeferrable LIMIT 1"
"""A fifth of the time of the next one, and most databases have none."""
_DEFERRABLE = """
SELECT format('%I.%I', n.nspname, c.conname), c.condeferred
FROM pg_catalog.pg_constraint c JOIN pg_catalog.pg_namespace n ON n.oid = c.connamespace
WHERE c.condeferrable AND NOT EXISTS (
    SELECT FROM pg_catalog.pg_constraint o
    WHERE o.conname = c.conname AND o.connamespace = c.connamespace AND NOT o.condeferrable)
"""

_AS_OWN_ROLE = (
    "SELECT pg_catalog.set_config('fictive.role', pg_catalog.current_setting('role'), true); "
    "SET LOCAL ROLE NONE; {}; "
    "SELECT pg_catalog.set_config('role', pg_catalog.current_setting('fictive.role'), true)"
)
"""Around a command that a role of the application's may have no right to."""

_IN_BLOCKS = ("LOCK TABLE", "SAVEPOINT", "RELEASE SAVEPOINT", "ROLLBACK", "DECLARE CURSOR")
"""What PostgreSQL refuses in autocommit (ROLLBACK is ROLLBACK TO here), and would do in the sandbox's transaction."""

_HARMLESS = frozenset(
    """
    adapters cancel cancel_safe cursor_factory dsn encoding fileno get_dsn_parameters get_parameter_status info notices
    notifies prepare_threshold prepared_max protocol_version row_factory server_version
    """.split()
)
"""Attributes of the driver's connection through which nothing can be sent before the sandbox's BEGIN."""


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


@dataclasses.dataclass(frozen=True, slots=True)
class Savepoint:
    """One of the application's."""

    name: str
    number: int
    was_read_only: bool
    """What a SET TRANSACTION after it changes, to its RELEASE as well."""


@dataclasses.dataclass(frozen=True)
class Nested:
    """A sandbox in another one: its savepoint, and what was known before it."""

    name: str
    staged: deque[str]
    deferrable: list[str] | None
    deferred: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Running:
    """A statement that is about to be sent, or was."""

    text: SandboxText
    statement: StatementClass
    writes: bool
    in_transaction: bool
    read_only: bool
    waiting: list[str]
    """What is to travel with it."""


class SharedConnection:
    """A server connection in one transaction, and whose turn it is."""

    def __init__(self, engine: sa.Engine, *, staged: deque[str], patience: float) -> None:
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
        self.recordings: list[Recording] = []
        self.connections: list[SandboxConnection] = []
        self._pid = os.getpid()
        self._turn = threading.Condition(threading.RLock())
        self._deferrable: list[str] | None = None
        self._deferred: list[str] = []
        self._schema_may_return = False
        """Whether a ROLLBACK may undo a change to the schema."""
        self.server = SandboxServer(engine)
        self.dbapi = self.server.dbapi

    def connect(self) -> SandboxConnection:
        if self.is_over:
            raise SandboxError(OVER)
        if self.is_lost:
            raise SandboxError(LOST)
        connection = (PsycopgConnection if self.server.is_psycopg else Psycopg2Connection)(self)
        self.connections.append(connection)
        return connection

    def nest(self, staged: deque[str]) -> Nested:
        """Begin a sandbox in this one."""
        if os.getpid() != self._pid:
            raise SandboxError(OTHER_PROCESS)
        if self.frames:
            raise ConfigurationError("sandbox() goes around transactions, and one is open.")
        nested = Nested(f"fictive_sandbox_{next(self.server.numbers)}", self.staged, self._deferrable, self._deferred)
        self.server.savepoint(nested.name)
        self.staged = staged
        return nested

    def unnest(self, nested: Nested, *, keep: bool) -> None:
        self.staged = nested.staged
        self.portals.clear()
        try:
            if keep:
                self._deferrable = None
                self.server.release(nested.name)
            else:
                self._deferrable, self._deferred = nested.deferrable, nested.deferred
                self.server.undo(nested.name)
        except Exception:
            if keep or not self.is_lost:
                raise  # else the server has rolled back when the connection went

    def end(self, *, keep: bool) -> None:
        """Roll all of it back, or commit it, and give the server connection back."""
        self.is_over = True
        for connection in self.connections:
            connection.is_ended = True
        self.server.end(keep=keep, close=self.is_tainted)

    @property
    def is_lost(self) -> bool:
        return bool(self.dbapi.closed)

    def begin_now(self, *, has_to_be_known: bool) -> None:
        """Before somebody sends past us. `has_to_be_known`: to the driver, which begins by itself else."""
        if (has_to_be_known or not self.server.is_begun) and not self.is_over and os.getpid() == self._pid:
            with self._turn:
                self.server.adopt() if has_to_be_known else self.server.flush()

    def fail(self, code: str, message: str) -> None:
        """Let the server raise an error, so that it is the driver's own."""
        with self.server.protected():
            self.server.run(
                f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{code}', MESSAGE = {_literal(message)}; END $$"
            )

    # -- whose turn it is ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def turn(self, connection: SandboxConnection) -> Iterator[None]:
        """Wait until no other thread has a transaction open that has written."""
        self._take_turn(connection)
        try:
            yield
        finally:
            self._turn.release()

    def _take_turn(self, connection: SandboxConnection) -> None:
        if connection.is_ended:
            raise SandboxError(OVER)
        if os.getpid() != self._pid:
            raise SandboxError(OTHER_PROCESS)
        if not self._turn.acquire(timeout=self.patience):
            raise SandboxError(f"Another thread has been running a statement for {self.patience:g} seconds.")
        if not self.frames or connection.frame is not None:
            return
        try:
            self._wait_for_turn(connection)
        except BaseException:
            self._turn.release()
            raise

    def _wait_for_turn(self, connection: SandboxConnection) -> None:
        end = time.monotonic() + self.patience
        thread = connection.thread or _this_thread()
        while self.frames and self.frames[-1].thread != thread:
            if connection.is_abandoned:
                raise SandboxError(OVER)
            if not self._turn.wait(max(0.0, end - time.monotonic())) and time.monotonic() >= end:
                raise SandboxError(
                    f"{_described(self.frames[-1].thread)} has a transaction open in the sandbox, and this "
                    f"thread has waited {self.patience:g} seconds for its end. Threads share one connection: end "
                    "the transaction before another thread is waited for."
                )

    # -- a statement -------------------------------------------------------------------------------------------------

    def execute(self, cursor: SandboxCursor, query: Any, parameters: Any) -> None:
        """One statement, in one message with the commands that wait where that can be."""
        connection: SandboxConnection = cursor.connection
        self._take_turn(connection)
        try:
            if query.__class__ is not str:
                query = self.server.rendered(query)
            text = text_of(query)
            if text.is_plain or not self._controls(connection, text):
                running = self._prepare(connection, text, parameters)
                try:
                    cursor.run(self.server, query, parameters)
                    self._commit_alone(connection, running)
                except BaseException as error:
                    self._failed(connection, running, error)
                    raise
                self._done(connection, running)
            else:
                cursor.forget()
        finally:
            self._turn.release()

    def command(self, connection: SandboxConnection, query: str) -> None:
        """One statement whose result nobody wants."""
        self.execute(SandboxCursor(connection), query, None)

    @contextlib.contextmanager
    def statement(
        self, connection: SandboxConnection, query: Any, parameters: Any = None, *, is_named: bool = False
    ) -> Iterator[bool]:
        """Around what sends statements by a way of its own; gives False where it was a command about the transaction,
        and is done."""
        with self.turn(connection):
            text = text_of(self.server.rendered(query))
            if not text.is_plain and self._controls(connection, text):
                yield False
                return
            running = self._prepare(connection, text, parameters)
            try:
                self.server.adopt() if is_named else self.server.flush()
                self.server.is_protected = False  # a cursor of the server's may be left
                yield True
                self._commit_alone(connection, running)
            except BaseException as error:
                self._failed(connection, running, error)
                raise
            self._done(connection, running)

    def _prepare(self, connection: SandboxConnection, text: SandboxText, parameters: Any) -> Running:
        """All that comes before a statement, short of sending it."""
        server = self.server
        if not connection.autocommit and connection.state == IDLE:
            self.begin(connection)
            self._record(connection, "BEGIN")
        statement, writes = text.statement, not text.only_reads
        if connection.state == INERROR:
            if statement.may_end_transaction:
                raise SandboxError(_holds_an_end(text))
            self._record(connection, text.text, is_statement=True)
            server.abort()  # it is the server that knows what is wrong with the statement
            return Running(text, statement, False, False, False, [])
        if not text.is_plain:
            if statement.bound_flags:
                statement = statement.resolved(parameters)
                writes = not statement.is_plain_read
            if statement.transaction_only == "PREPARE TRANSACTION":
                raise SandboxError(TWO_PHASE)
            if connection.state == IDLE and _needs_block(text, statement):
                self._record(connection, text.text, is_statement=True)
                command = statement.transaction_only
                command = "ROLLBACK TO SAVEPOINT" if command == "ROLLBACK" else command
                self.fail("25P01", f"{command} can only be used in transaction blocks")
            if statement.may_end_transaction:
                raise SandboxError(_holds_an_end(text))
        in_transaction = connection.state == INTRANS
        read_only = connection.is_read_only if in_transaction else bool(connection.begins_read_only)
        if in_transaction and writes and not read_only:
            self._materialise(connection)
        if self.portals:
            self._close_portals()
        if writes and not text.is_plain:
            self._note_settings(connection, text.text, parameters, statement)
        if self.recordings and not connection.rides:
            self._record(connection, text.text, is_statement=True)
        # an error aborts a transaction that has its savepoint, unless another one has begun within it
        if read_only or connection.frame is None or self.frames[-1] is not connection.frame:
            server.protect(read_only=read_only)
        if writes or text.cursor is not None:
            server.is_protected = False
        return Running(text, statement, writes, in_transaction, read_only, server.pending.commands[:])

    def _commit_alone(self, connection: SandboxConnection, running: Running) -> None:
        """The end of a statement that is its own transaction."""
        if connection.state == INERROR:  # an empty text, which the server takes even so
            self.server.roll_back_to(self.server.savepoints[-1])
        elif running.writes and not running.in_transaction:
            if not running.text.is_dml:
                self._deferrable = None
            if commands := self._at_commit(connection):
                self.server.run(*commands)

    def _failed(self, connection: SandboxConnection, running: Running, error: BaseException) -> None:
        was_aborted = self.server.recover(error, running.waiting)
        if running.read_only:
            self.server.end_read_only()
        if running.in_transaction and was_aborted:
            connection.state = INERROR

    def _done(self, connection: SandboxConnection, running: Running) -> None:
        text = running.text
        if running.read_only:
            self.server.end_read_only()
        if not text.is_dml:
            self._deferrable = None
            if self.frames:
                self._schema_may_return = True
        if not text.is_plain:
            self._note_effects(connection, text, running.statement)

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

    def _controls(self, connection: SandboxConnection, text: SandboxText) -> bool:
        """Do what a command about the transaction asks for; False where the text is none."""
        if text.savepoint is not None:
            return self._controls_savepoint(connection, text, *text.savepoint)
        if connection.state == INERROR and (text.sets_transaction or text.verb == "BEGIN"):
            return False  # the server refuses it
        if text.sets_transaction:
            if not connection.autocommit and connection.state == IDLE:
                self.begin(connection)
                self._record(connection, "BEGIN")
            self._record(connection, text.command, is_statement=True)
            if text.read_only is not None:
                connection.is_read_only = text.read_only
            return True
        if text.verb is None:
            return False
        if text.is_two_phase:
            raise SandboxError(TWO_PHASE)
        if text.verb == "BEGIN":
            self._record(connection, text.command)
            if connection.state == IDLE:
                self.begin(connection)
            if text.read_only is not None:
                connection.is_read_only = text.read_only
            return True
        (self.commit if text.verb == "COMMIT" else self.rollback)(connection)
        if text.chains:
            self.begin(connection)
        return True

    def _controls_savepoint(self, connection: SandboxConnection, text: SandboxText, verb: str, name: str) -> bool:
        if not connection.autocommit and connection.state == IDLE:
            self.begin(connection)
            self._record(connection, "BEGIN")
        if connection.state == IDLE:
            return False  # the server says what is wrong
        key = name if name.startswith('"') else f'"{name.lower()}"'
        known = [each.name for each in connection.savepoints]
        if verb == "SAVEPOINT":
            if connection.state == INERROR:
                return False
            self._materialise(connection)
            self._record(connection, text.command)
            self.server.savepoint(key)
            connection.savepoints.append(Savepoint(key, next(self.server.numbers), connection.is_read_only))
            return True
        if key not in known or (verb == "RELEASE" and connection.state == INERROR):
            return False
        index = len(known) - 1 - known[::-1].index(key)
        self._record(connection, text.command)
        connection.is_read_only = connection.savepoints[index].was_read_only
        if verb == "RELEASE":
            self.server.release(key)
            del connection.savepoints[index:]
        else:
            self.server.roll_back_to(key)
            self._forget_schema()
            self._kill_above(connection.savepoints[index].number)
            del connection.savepoints[index + 1 :]
            connection.state = INTRANS
        return True

    # -- transactions -------------------------------------------------------------------------------------------------

    def begin(self, connection: SandboxConnection) -> None:
        connection.state = INTRANS
        connection.thread = _this_thread()
        connection.is_read_only = bool(connection.begins_read_only)

    def _materialise(self, connection: SandboxConnection) -> None:
        """Give a transaction its savepoint."""
        if connection.frame is None:
            number = next(self.server.numbers)
            frame = Frame(connection, connection.thread, f"fictive_transaction_{number}", number)
            self.server.savepoint(frame.name)
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
                        self.server.run(*commands)
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
                    self.server.release(ended.name)
                self._schema_may_return &= bool(self.frames)
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
                    try:
                        self.server.undo(frame.name)
                    finally:
                        self._kill_above(frame.number - 1)  # and this one
                        self._forget_schema()
                else:
                    self.server.run(*_restoring(connection.local_settings))
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

    def _forget_schema(self) -> None:
        """After a ROLLBACK that may have undone a change to it."""
        if self._schema_may_return:
            self._deferrable = None
            self._schema_may_return = bool(self.frames)

    def _at_commit(self, connection: SandboxConnection) -> list[str]:
        """What the server does at COMMIT."""
        if self._deferrable is None:
            rows: list[Any] = []
            if self.server.run(_HAS_DEFERRABLE).rowcount:
                rows = self.server.run(_DEFERRABLE).fetchall()
            self._deferrable = [name for name, _ in rows]
            self._deferred = [name for name, is_deferred in rows if is_deferred]
        commands = ["SET CONSTRAINTS ALL IMMEDIATE"] if self._deferrable else []
        commands += _restoring(connection.local_settings)
        if self._deferred:  # after a local role, which may have no right to use a constraint's schema
            deferred = f"SET CONSTRAINTS {', '.join(self._deferred)} DEFERRED"
            commands.append(_AS_OWN_ROLE.format(deferred) if "role" in connection.settings else deferred)
        for name, action in connection.temporary:
            commands.append(f"DROP TABLE IF EXISTS {name}" if action == "DROP" else f"TRUNCATE {name}")
        return commands

    # -- what statements leave ---------------------------------------------------------------------------------------

    def _note_settings(
        self, connection: SandboxConnection, text: str, parameters: Any, statement: StatementClass
    ) -> None:
        """Remember the value of a setting that is about to change: of a local one to the end of the transaction."""
        for name, is_local in settings_of(text, parameters, statement):
            if name.startswith("transaction_"):  # READ ONLY and the level, which end with the savepoint
                continue
            kept = connection.local_settings if is_local else connection.settings
            if not is_local and name in connection.local_settings:  # which it ends
                kept.setdefault(name, connection.local_settings.pop(name))
            if name not in kept and name not in ("all", "session"):
                try:
                    with self.server.protected():
                        value = self.server.run(f"SELECT current_setting({_literal(name)}, true)").fetchone()[0]
                except Exception:  # the statement itself says what is wrong with the name
                    continue
                kept[name] = value

    def _note_effects(self, connection: SandboxConnection, text: SandboxText, statement: StatementClass) -> None:
        if statement.connection_state is not None:
            connection.has_session_state = True
            if not statement.connection_state.startswith(("SET", "RESET", "set_config", "CREATE TEMPORARY")):
                self.is_tainted = True
        if connection.state == IDLE:
            connection.local_settings.clear()
        for name, options in temporary_tables(text.text):
            if (action := ON_COMMIT.search(options)) is not None and connection.state != IDLE:
                connection.temporary.append((name, action[1].upper()))
        if text.cursor is not None:
            verb, name = text.cursor
            if verb == "DECLARE":
                connection.portals.append(name)
            elif name in connection.portals:
                connection.portals.remove(name)

    def _close_portals(self) -> None:
        while self.portals:
            name = self.portals.pop()
            with contextlib.suppress(self.server.dialect.loaded_dbapi.Error), self.server.protected():
                self.server.run(f"CLOSE {name}")

    def abandon(self, connection: SandboxConnection) -> None:
        """Let a thread that waits with this connection for its turn wait no longer."""
        with self._turn:
            connection.is_abandoned = True
            self._turn.notify_all()

    def encode(self, connection: SandboxConnection, name: str) -> None:
        """psycopg2's `set_client_encoding()`, whose other half is in the driver: no ROLLBACK sets that back."""
        with self.turn(connection):
            if self.server.driver.own_transaction(self.dbapi):
                raise SandboxError(ENCODING)
            with self.server.protected():
                self.server.flush()
                self.dbapi.set_client_encoding(name)
            self.server.is_protected = False
            self.is_tainted = True

    def wait(self, connection: PsycopgConnection, generator: Any, *args: Any, **kwargs: Any) -> Any:
        """What a cursor sends that psycopg made of the connection itself, as in `psycopg.Cursor(connection)`."""
        if self.server.status not in (IDLE, INTRANS, INERROR):  # the rows of a stream, the data of a COPY
            with self.turn(connection):
                try:
                    return self.dbapi.wait(generator, *args, **kwargs)
                except BaseException as error:
                    if self.server.recover(error, []) and connection.state == INTRANS:
                        connection.state = INERROR
                    raise
        # The statement is an argument of psycopg's generators. Where it is not, it may be anything.
        given = getattr(getattr(generator, "gi_frame", None), "f_locals", {})
        with self.statement(connection, given.get("query", given.get("statement"))) as goes_on:
            if goes_on:
                with self.dbapi._pipeline_nolock() if connection.pipes else contextlib.nullcontext():
                    return self.dbapi.wait(generator, *args, **kwargs)
        generator.close()
        return None

    def close(self, connection: SandboxConnection) -> None:
        """Undo what was set through a connection that is closed."""
        if connection.is_ended or connection not in self.connections:
            return
        self.connections.remove(connection)
        if self.is_lost or os.getpid() != self._pid:
            return
        self.rollback(connection)
        if connection.has_session_state:
            with self.turn(connection), contextlib.suppress(self.server.dialect.loaded_dbapi.Error):
                with self.server.protected():  # such as a role that is gone
                    self.server.run(
                        "SELECT pg_catalog.pg_advisory_unlock_all()", "DISCARD TEMP", *_restoring(connection.settings)
                    )


class SandboxConnection:
    """A connection of the driver's, as far as anybody can tell, over a `SharedConnection`.

    What only one driver has is in its subclass: `hasattr()` is how code asks which driver it has.
    """

    cursor_class: type[SandboxCursor]
    factories: tuple[str, ...]
    """Attributes that an application sets, and that say what its cursors are."""

    def __init__(self, shared: SharedConnection) -> None:
        self.shared = shared
        self.autocommit: bool = False
        self.isolation_level: Any = None
        self.begins_read_only: bool | None = None
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
        self.savepoints: list[Savepoint] = []
        self.local_settings: dict[str, str | None] = {}
        self.settings: dict[str, str | None] = {}
        self.temporary: list[tuple[str, str]] = []
        self.portals: list[str] = []
        self.has_session_state = False
        self.blocks = 0
        """How many of psycopg's `transaction()` are open."""
        self.rides = False
        """Whether commands are given to it that travel with a statement, and are no round trips."""
        self.riding: list[str] = []
        """Those, for the recordings."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.startswith("tpc_") or name == "xid":
            raise SandboxError(TWO_PHASE)
        if self.shared.server.is_psycopg and (block := block_of(self, name)) is not None:
            return block
        if name not in _HARMLESS:
            self.shared.begin_now(has_to_be_known=name == "lobject")
        return getattr(self.shared.dbapi, name)

    def set_isolation_level(self, level: Any) -> None:
        self.autocommit = level == 0 or str(level).upper() == "AUTOCOMMIT"
        self.isolation_level = None if self.autocommit else level

    @property
    def closed(self) -> bool:
        return self.is_ended or self.shared.is_lost

    def cursor(self, *args: Any, **kwargs: Any) -> SandboxCursor:
        factories = {name: vars(self)[name] for name in self.factories if vars(self).get(name) is not None}
        if args or kwargs or factories:
            return self.cursor_class(self, self._driver_cursor(*args, **factories | kwargs))
        return self.cursor_class(self)

    def _driver_cursor(self, *args: Any, **kwargs: Any) -> Any:
        return self.shared.dbapi.cursor(*args, **kwargs)

    def give(self, commands: list[str]) -> None:
        """Commands that travel with a statement, and are no round trips."""
        self.rides = True
        try:
            for command in commands:
                self.shared.command(self, command)
        finally:
            self.rides = False

    def send(self, command: str) -> None:
        """A command that is a round trip."""
        self.shared.command(self, command)

    def commit(self) -> None:
        check_no_block(self, "commit")
        self.shared.commit(self)

    def rollback(self) -> None:
        if not self.closed:
            check_no_block(self, "rollback")
            self.shared.rollback(self)

    def renew(self) -> None:
        """As a connection is that comes back to the pool."""
        self.autocommit, self.isolation_level, self.begins_read_only, self.deferrable = False, None, None, None

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

    def __init__(self, connection: SandboxConnection, cursor: Any = None) -> None:
        state = self.__dict__
        state["connection"] = connection
        state["has_name"] = False
        state["is_plain"] = cursor is None
        """Whether it is as the driver makes it, so that another one can be in its place."""
        if cursor is not None:
            state["driver_cursor"] = cursor
            state["has_name"] = bool(getattr(cursor, "name", None))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "driver_cursor":
            made = self.__dict__[name] = self.connection.shared.dbapi.cursor()
            return made
        return getattr(self.driver_cursor, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.driver_cursor, name, value)
        self.__dict__["is_plain"] = False

    def _statement(self, query: Any, parameters: Any = None) -> contextlib.AbstractContextManager[bool]:
        shared: SharedConnection = self.connection.shared
        return shared.statement(self.connection, query, parameters, is_named=self.has_name)

    def run(self, server: SandboxServer, query: Any, parameters: Any) -> None:
        """What the sandbox calls when it is this statement's turn."""
        state = self.__dict__
        state["driver_cursor"] = server.execute(None if self.is_plain else self.driver_cursor, query, parameters)

    def forget(self) -> None:
        """Have no result, as after a command about the transaction."""
        if self.is_plain:
            self.__dict__.pop("driver_cursor", None)

    def execute(self, query: Any, parameters: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not (args or kwargs or self.has_name):
            self.connection.shared.execute(self, query, parameters)
            return self
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
            if "driver_cursor" in self.__dict__:  # else nothing was done with it
                self.driver_cursor.close()
            return
        with self._statement("CLOSE"):
            self.driver_cursor.close()

    def __enter__(self) -> SandboxCursor:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()


class Psycopg2Cursor(SandboxCursor):
    """psycopg2's."""

    def callproc(self, name: str, *args: Any) -> Any:
        with self._statement(f"SELECT {name}()"):
            return self.driver_cursor.callproc(name, *args)

    def copy_expert(self, sql: Any, *args: Any, **kwargs: Any) -> Any:
        with self._statement(sql):
            return self.driver_cursor.copy_expert(sql, *args, **kwargs)

    def copy_from(self, *args: Any, **kwargs: Any) -> Any:
        with self._statement("COPY t FROM STDIN"):
            return self.driver_cursor.copy_from(*args, **kwargs)

    def copy_to(self, *args: Any, **kwargs: Any) -> Any:
        with self._statement("COPY t TO STDOUT"):
            return self.driver_cursor.copy_to(*args, **kwargs)


class PsycopgCursor(SandboxCursor):
    """psycopg's."""

    def stream(self, query: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with self._statement(query):
            rows = list(self.driver_cursor.stream(query, *args, **kwargs))
        return iter(rows)

    @contextlib.contextmanager
    def copy(self, statement: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with self._statement(statement), self.driver_cursor.copy(statement, *args, **kwargs) as copy:
            yield copy


class Psycopg2Connection(SandboxConnection):
    """psycopg2's."""

    cursor_class = Psycopg2Cursor
    factories = ("cursor_factory",)
    _encoding: str | None = None
    """The one before `set_client_encoding()`."""

    @property
    def readonly(self) -> bool | None:
        return self.begins_read_only

    @readonly.setter
    def readonly(self, value: bool | None) -> None:
        self.begins_read_only = value

    def set_session(
        self, isolation_level: Any = None, readonly: Any = None, deferrable: Any = None, autocommit: Any = None
    ) -> None:
        if isolation_level is not None:
            self.isolation_level = isolation_level
        if readonly is not None:
            self.begins_read_only = bool(readonly)
        if deferrable is not None:
            self.deferrable = bool(deferrable)
        if autocommit is not None:
            self.autocommit = bool(autocommit)

    def reset(self) -> None:
        self.rollback()
        self.renew()
        self.autocommit = True
        for command in ("RESET ALL", "SET SESSION AUTHORIZATION DEFAULT"):
            self.cursor().execute(command)
        self.autocommit = False

    def set_client_encoding(self, encoding: str) -> None:
        self.rollback()
        before = self.shared.dbapi.encoding
        self.shared.encode(self, encoding)
        if self._encoding is None:
            self._encoding = before

    def renew(self) -> None:
        super().renew()
        if self._encoding is not None and not self.closed:  # which all have in common here
            encoding, self._encoding = self._encoding, None
            with contextlib.suppress(SandboxError):  # a named cursor has come since: it lasts until the sandbox ends
                self.shared.encode(self, encoding)

    def get_transaction_status(self) -> int:
        return self.state

    @property
    def status(self) -> int:
        return 1 if self.state == IDLE else 2


class PsycopgConnection(SandboxConnection):
    """psycopg's."""

    cursor_class = PsycopgCursor
    factories = "cursor_factory", "row_factory"

    def __init__(self, shared: SharedConnection) -> None:
        super().__init__(shared)
        self.lock = threading.RLock()
        self.pipes = False
        """Whether psycopg's `executemany()` has asked for a pipeline, which is to be around its statements only."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """psycopg's, for `isinstance()`: its `TypeInfo.fetch()` asks."""
        import psycopg

        return psycopg.Connection

    @contextlib.contextmanager
    def _pipeline_nolock(self) -> Iterator[None]:
        self.pipes = True
        try:
            yield
        finally:
            self.pipes = False

    def wait(self, generator: Any, *args: Any, **kwargs: Any) -> Any:
        return self.shared.wait(self, generator, *args, **kwargs)

    def _driver_cursor(self, *args: Any, cursor_factory: Any = None, **kwargs: Any) -> Any:
        if cursor_factory is None or args or "name" in kwargs:
            return super()._driver_cursor(*args, **kwargs)
        return cursor_factory(self.shared.dbapi, **kwargs)

    def set_autocommit(self, value: bool) -> None:
        self.autocommit = value

    @property
    def read_only(self) -> bool | None:
        return self.begins_read_only

    @read_only.setter
    def read_only(self, value: bool | None) -> None:
        self.begins_read_only = value

    def set_read_only(self, value: bool | None) -> None:
        self.begins_read_only = value

    def set_deferrable(self, value: bool | None) -> None:
        self.deferrable = value

    @property
    def broken(self) -> bool:
        return self.closed

    def execute(self, query: Any, params: Any = None, **kwargs: Any) -> Any:
        return self.cursor().execute(query, params, **kwargs)


def _holds_an_end(text: SandboxText) -> str:
    return f"{summary(text.text)!r} holds a COMMIT or ROLLBACK among other statements."


def _needs_block(text: SandboxText, statement: StatementClass) -> bool:
    """Whether PostgreSQL refuses it in autocommit. Several statements of one text are a block; a cursor WITH HOLD, or
    what else stays with the connection, needs none."""
    return statement.transaction_only in _IN_BLOCKS and statement.connection_state is None and ";" not in text.command


def _restoring(settings: Mapping[str, str | None]) -> list[str]:
    """Commands that put settings back, for the rest of the sandbox."""
    return [
        f"SELECT pg_catalog.set_config({_literal(name)}, {_literal(value or '')}, true)"
        for name, value in settings.items()
    ]


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"

"""What a session has instead of a connection: an object that borrows one from the pool, for as long as it is needed.

SQLAlchemy gets one `Connection` per session and engine, made once, over a `Link`, which has the interface of a pooled
connection (`sqlalchemy.pool.PoolProxiedConnection`). Outside a transaction each statement borrows a server connection
and gives it back before its result is read (`cursors.StatementCursor`). From `begin()` to `commit()` or `rollback()`
there is one, taken by the first statement, with which BEGIN travels (`cursors.TransactionCursor`). In `pinned()` one
is kept.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, ClassVar

import sqlalchemy as sa

from ..drivers import NO_OPTIONS, TransactionOptions, driver_for, sqlstate
from ..drivers.base import IDLE, INERROR, INTRANS
from ..drivers.pending import PendingCommands, as_bytes
from ..errors import AbortedTransactionStatement, ConfigurationError, PinnedConnectionLost, TransactionAborted
from ..session import private
from . import pooler, process
from . import replicas as read_replicas
from .classify import Effect, StatementClass, classify_with, counts_its_rows, summary
from .cursors import StatementCursor, StreamCursor, TransactionCursor
from .pool import BorrowingPool
from .pooler import direct_engine, is_pooled, refusal
from .replicas import COMMIT_POSITION, Positions, parse_lsn, replicas_of
from .servers import AT_REST, ServerConnection, check_out, note_lost
from .statement_settings import MAY_BE_OF_SETTINGS, NO_SETTINGS, explained

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..session.write_log import WriteLog
    from .replicas import Replica, Replicas
    from .statement_settings import DueSettings, SettingsSource


__all__ = ["BEHIND_THE_BACK", "Link", "LinkOwner", "SessionConnection", "abandoned"]

log = logging.getLogger("fictive.connection")

_READ_ONLY = TransactionOptions(read_only=True)
# What a COMMIT that brings its position back may report although it was done: the question after it was cancelled.
_MAY_COME_AFTER_COMMIT = ("57014", "53200", "57P01")
# Classes of SQLSTATEs by which a server refuses the question itself: no right to call the function, or not supported.
_MAY_BE_OF_THE_QUESTION = ("0A", "42", "55")

ABORTED = "PostgreSQL aborted this transaction after an earlier error."
_COMMITS = re.compile(r"\b(?:commit|end)\b", re.IGNORECASE)
_COMMITTED = " What was done until then may be committed."
BEHIND_THE_BACK = "The transaction was ended on the driver's connection, not by the session." + _COMMITTED
BUSY = "A COPY or a stream of this transaction was left before its end."
_NEVER_IDLE: deque[ServerConnection] = deque(maxlen=0)


class LinkOwner:
    """What is decided about statements outside a transaction, asked where they are about to be sent.

    That of a session is `session.scope.Scope`. This one is for connections that fictive itself uses, and on which
    everything may be run.
    """

    statement_options: Mapping[str, Any] = {}
    """What execution options say of the statement under way."""
    retries = False
    """Whether what met a lost connection is run again where it can have done nothing."""
    keeps = True
    """Whether connections are pinned."""
    dispatch: Any = None
    """The session's events; None without a session."""
    had_error = False
    """Whether a statement of the transaction has failed."""
    local_settings: SettingsSource = NO_SETTINGS

    def judge(self, link: Link, statement: StatementClass, query: Any, parameters: Any) -> str | None:
        """Raise for what must not run outside, or begin a transaction for it; else what to remember of a write."""
        return None

    def wrote(self, what: str) -> None:
        """A write was committed at once."""

    def positions(self) -> Positions:
        """How far this session has to see."""
        return Positions()

    def wrote_up_to(self, engine: sa.Engine, position: int | None) -> None:
        """A commit on a primary, up to this position in its log; None where nobody has asked for it."""

    def short_transaction(self, engine: sa.Engine) -> contextlib.AbstractContextManager[None]:
        """A transaction for one statement, whose beginning is told to those who listen, with its settings."""
        raise NotImplementedError

    def tell_begun(self, connection: SessionConnection) -> None:
        """Tell those who listen to the session's `after_begin` of a stream's transaction."""


class Link:
    """One session's way to one engine's server connections."""

    __slots__ = ("__weakref__", "_connection_record", "begins_with", "begun", "dialect", "driver", "driver_side",
                 "early", "ending", "engine", "first_error", "idle", "in_transaction", "is_pooled", "kept", "log",
                 "lost", "may_be_committed", "native", "number", "options", "owner", "pending", "prefetches",
                 "prepared", "replica_trips", "replicas", "rest_options", "retried", "server", "settings",
                 "settings_command", "streams", "told", "trouble", "users", "watcher", "wrote")  # fmt: skip

    statement_cursor: ClassVar[type[StatementCursor]] = StatementCursor
    transaction_cursor: ClassVar[type[TransactionCursor]] = TransactionCursor

    def __init__(self, engine: sa.Engine, owner: LinkOwner) -> None:
        self.engine = engine
        self.dialect = engine.dialect
        self.driver = driver_for(engine.dialect)
        self.owner = owner
        pool: Any = engine.pool
        is_borrowing = pool.__class__ is BorrowingPool or isinstance(pool, BorrowingPool)
        self.idle = pool.idle if is_borrowing else _NEVER_IDLE
        self.replicas = replicas_of(engine) if read_replicas.any_replicas else None
        self.is_pooled = pooler.any_pooled and is_pooled(engine)
        """Whether a pooler of transactions is between it and the server."""
        self.wrote = False
        """Whether the transaction may have written."""
        self.server: ServerConnection | None = None
        """The transaction's, from its first statement on."""
        self.kept: ServerConnection | None = None
        """That of a `pinned()` block, or of an app context whose pool keeps no connection."""
        self.early: ServerConnection | None = None
        """Borrowed for a statement that is about to be sent, because somebody looked at its connection."""
        self.in_transaction = False
        self.begun = False
        """Whether BEGIN was sent."""
        self.native = False
        """Whether the driver itself begins and ends the transaction."""
        self.may_be_committed = False
        """Whether COMMIT was sent, and the server has not refused it."""
        self.ending = False
        """Whether it is SQLAlchemy that is about to end the transaction, and not the user on what he was handed."""
        self.options = self.rest_options = NO_OPTIONS
        """What the next BEGIN asks for, and what every BEGIN does that says nothing else."""
        self.pending = PendingCommands()
        self.trouble: str | None = None
        """Why the transaction that SQLAlchemy believes open is none that could be committed."""
        self.first_error: BaseException | None = None
        """The first error in the transaction, for the message."""
        self.retried = False
        self.begins_with: str | None = None
        """A command that follows each BEGIN."""
        self.settings: DueSettings = ()
        """What `local_settings` gave for the transaction."""
        self.settings_command: str | None = None
        """The command that sets them, once there is a connection."""
        self.lost = False
        """Whether the connection that was in use last was lost."""
        self.prefetches = False
        """Whether rows are fetched at once, since the transaction ends before anybody reads them."""
        self.log: WriteLog | None = None
        """Of a transaction in place of a savepoint, what was written in it."""
        self.streams: weakref.WeakSet[StreamCursor] | None = None
        self.users = 0
        """How many results are read on it, of a link for streams."""
        self.watcher: Any = None
        """Who is told of what happens (`fictive.report.watcher`); a link with one is a `watched.WatchedLink`."""
        self.number: int | None = None
        """The watched transaction's."""
        self.prepared: Any = None
        """Of a watched statement under way on psycopg, what was prepared before it."""
        self.replica_trips = 0
        """Of a watched statement under way, the round trips to a replica besides that of the statement itself."""
        self.told = False
        """Whether the watcher was told of the statement under way as one of a stream's transaction."""
        self.driver_side = DriverSide()
        self.driver_side._link = self
        self._connection_record: Any = None

    def __repr__(self) -> str:
        state = "in transaction" if self.in_transaction else "pinned" if self.kept else "in autocommit"
        return f"<Link to {self.engine!r}, {state}{f', {self.trouble}' if self.trouble else ''}>"

    # -- what SQLAlchemy asks of a pooled connection ----------------------------------------------------------------

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return self._named_cursor(*args, **kwargs)
        return self.transaction_cursor(self) if self.in_transaction else self.statement_cursor(self)

    def _named_cursor(self, name: str | None = None, **kwargs: Any) -> Any:
        if name is None or kwargs or not self.driver.carries:
            return self.dbapi_connection.cursor(*((name,) if name is not None else ()), **kwargs)
        return StreamCursor(self, name)

    def commit(self) -> None:
        """COMMIT, with what waits for it. Ends the transaction, whatever happens."""
        by_hand, self.ending = not self.ending, False
        if not self.in_transaction:
            return
        if by_hand:
            self._end_by_hand("commit")
            return
        server = self.server
        if server is not None and server.generation is not process.generation:
            inherited = self.inherited()
            self.end(inherited)
            raise inherited
        releases = self.pending.with_commit() if self.pending.commands else []
        if server is not None:
            self._look_before_commit(server)
        if self.trouble is not None:
            error = self._not_committable()
            if server is not None and server.is_lost():
                self.end(error)
            else:
                self.ending = True
                self.rollback()
            raise error
        replicas = self.replicas if self.wrote else None
        position: int | None = None
        try:
            if server is not None:
                if self.native:
                    self.may_be_committed = True
                    server.dbapi.commit()
                elif self.begun:
                    self.may_be_committed = True
                    if replicas is not None and replicas.tell_position:
                        position = parse_lsn(self.driver.commit_and_ask(server, releases, COMMIT_POSITION))
                    else:
                        self.driver.commit(server, releases)
        except BaseException as error:
            if replicas is not None:
                self.owner.wrote_up_to(replicas.primary, None)
                if server is not None and self._may_come_after_commit(error, replicas):
                    server.drop(error)  # SQLAlchemy takes it for a lost connection, and so for an unknown outcome
            if isinstance(error, Exception) and server is not None and not server.is_lost():
                self.may_be_committed = False
            self.end(error)
            raise
        if replicas is not None:
            self.owner.wrote_up_to(replicas.primary, position)
        self.end()

    def _may_come_after_commit(self, error: BaseException, replicas: Replicas) -> bool:
        """Whether COMMIT may be done, and the error be that of the question behind it."""
        state = sqlstate(error)
        if state in _MAY_COME_AFTER_COMMIT:
            return True
        # that of a deferred trigger says where it comes from
        if (state or "")[:2] not in _MAY_BE_OF_THE_QUESTION or getattr(error.diag, "context", None):  # type: ignore[attr-defined]
            return False
        replicas.tell_position = False
        log.warning(
            "%r does not tell its position in the write-ahead log, so that reads after a write go to it: %s",
            self.engine.url,
            error,
        )
        return True

    def _look_before_commit(self, server: ServerConnection) -> None:
        """Whether the transaction is still the one that was begun, and not aborted. Sends nothing."""
        if self.trouble is not None or not (self.begun or self.native):
            return
        if not server.poll(0) and server.transaction_status() == INTRANS:
            return
        if server.poll(0) and not self.driver.is_alive(server.dbapi):
            self.trouble = "The connection of this transaction was lost before COMMIT."
            return
        status = server.transaction_status()
        if status == INERROR:
            self.trouble = ABORTED
        elif self.driver.is_busy(server.dbapi):
            self.trouble = BUSY
        elif status > INERROR or (status == IDLE and self.begun):  # else nothing was sent on what was handed out
            self.trouble = BEHIND_THE_BACK

    def _not_committable(self) -> Exception:
        if self.server is not None and self.server.is_lost():  # as the driver would say it, had COMMIT been sent
            error: Exception = self.dialect.loaded_dbapi.OperationalError(
                self.trouble or "The connection of this transaction was lost."
            )
            return error
        return self.aborted()

    def rollback(self) -> None:
        """ROLLBACK, if anything was sent. Ends the transaction, whatever happens."""
        by_hand, self.ending = not self.ending, False
        server = self.server
        if not self.in_transaction:
            return
        if by_hand:
            self._end_by_hand("rollback")
            return
        try:
            if server is not None and server.generation is process.generation and not server.is_lost():
                if (self.begun or self.native) and server.transaction_status() == IDLE:
                    self._note_doubt()
                if self.driver.is_busy(server.dbapi):
                    self._drop(server)
                    self.end(TransactionAborted(BUSY))  # it is closed, and is given back as a lost one
                    return
                if self.native or self.driver.own_transaction(server.dbapi):
                    server.dbapi.rollback()
                elif self.begun and server.transaction_status() != IDLE:
                    self.driver.send(server, ["ROLLBACK"])
        except BaseException as error:
            self.end(error)
            raise
        # one that is lost is closed, not given back: SQLAlchemy's pool would log that it cannot be rolled back
        self.end(self._not_committable() if server is not None and server.is_lost() else None)

    def _end_by_hand(self, how: str) -> None:
        """The user ends the transaction on the connection that the session handed out: nothing may run after it in
        what the session, and SQLAlchemy, take for one transaction."""
        server = self.server
        if server is None or self.trouble is not None:
            return
        try:
            self.go_native(server)
            getattr(server.dbapi, how)()
        finally:
            self.trouble = BEHIND_THE_BACK

    def end(self, error: BaseException | None = None) -> None:
        """The transaction is over: back to autocommit, and the connection goes back. After an interrupt, when how far
        it came is not known, the connection is closed."""
        server, self.server = self.server, None
        was_native, options = self.native, self.options
        if self.trouble is not None:
            self._note_doubt()
        self.in_transaction = self.begun = self.native = False
        self.options = self.rest_options
        self.prefetches = False
        self.log = self.trouble = self.first_error = None
        if self.pending.commands or self.pending.savepoints:
            self.pending = PendingCommands()
        if server is None:
            return
        if error is not None or server.generation is not process.generation:
            interrupted = error is not None and not isinstance(error, Exception)
            if interrupted or server.is_lost() or server.generation is not process.generation:
                self._drop(server, error)
                return
        self.lost = False
        try:
            if was_native or options is not NO_OPTIONS:
                self.driver.resume_autocommit(server.dbapi, self.dialect, server.rest)
            elif not self.driver.rides_in_autocommit or not server.dbapi.autocommit:
                self.driver.enter_autocommit(server.dbapi, self.dialect)
            # after a COMMIT or ROLLBACK of ours that was answered it is known
            if (error is not None or was_native) and server.transaction_status() not in AT_REST:
                raise sa.exc.InvalidRequestError("the connection is still in a transaction")
        except BaseException as failure:
            self._drop(server, failure)
            if not isinstance(failure, Exception):
                raise
            return
        if server is not self.kept:
            server.give_back()

    def close(self) -> None:
        """The session is done with it."""
        if self.in_transaction:
            self.rollback()
        if not self.in_transaction:  # else it is not SQLAlchemy that closes it
            self.let_go()

    def _close_special(self, transaction_reset: bool = False) -> None:
        self.close()

    def invalidate(self, e: BaseException | None = None, soft: bool = False) -> None:
        """Close the server connection in use for good; `soft`: when it is next taken from the pool."""
        server = self.server or self.kept or self.early
        if soft:
            if server is not None:
                server.fairy.invalidate(e, soft=True)
                server.idles = False
            return
        if self.in_transaction:  # to its end, so that nothing runs in autocommit in its place
            self.trouble = self.trouble or "The connection of this transaction was invalidated."
        self.begun = self.native = False
        self.server = self.early = None
        if server is not None:
            self._drop(server, e)

    def detach(self) -> None:
        raise ConfigurationError("A session's connection cannot be detached from the pool; use db.engine.connect().")

    @property
    def autocommit(self) -> bool:
        """Whether there is nothing to roll back: what SQLAlchemy asks where the engine has
        `skip_autocommit_rollback`. The driver may believe that it is in autocommit within a transaction of ours."""
        return not self.in_transaction

    @property
    def is_valid(self) -> bool:
        return True

    @property
    def is_detached(self) -> bool:
        return False

    @property
    def closed(self) -> bool:
        """Whether the connection used last is lost: what SQLAlchemy asks after an error."""
        server = self.server or self.early or self.kept
        return self.lost if server is None else server.is_lost()

    broken = closed

    @property
    def dbapi_connection(self) -> Any:
        """The driver's connection, handed out: what waits has been sent, and from here on the driver's own BEGIN is
        sent before whatever comes past the session's cursors. What is set through it cannot be seen from here, so the
        connection is closed at the end, and does not go back to the pool."""
        server = self._at_hand()
        if self.in_transaction:
            self.go_native(server)
        else:
            self.note_written()  # whatever the caller does with it
        if not self.ending:
            server.taint()
        return server.dbapi

    driver_connection = dbapi_connection

    @property
    def server_connection(self) -> Any:
        """The driver's connection, for code that reads from it and sends nothing on it, such as tools that watch."""
        return self._at_hand().dbapi

    @property
    def info(self) -> dict[Any, Any]:
        return self._at_hand().fairy.info

    @property
    def record_info(self) -> Any:
        return self._at_hand().fairy.record_info

    def _at_hand(self) -> ServerConnection:
        """The connection of the next statement. Nothing is sent for it."""
        if not self.in_transaction:
            return self.in_use()
        if self.server is None and self.trouble is not None:
            raise self.aborted()
        return self.take()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "tpc_begin":
            return self._begin_two_phase
        return getattr(self.dbapi_connection, name)

    def _begin_two_phase(self, xid: Any) -> None:
        """What waits comes after it, since it has to be the first of its transaction."""
        server = self.take()
        self.retried = True  # another connection would be in a transaction of one phase
        commands, self.pending.commands = self.pending.commands[1:], self.pending.commands[:1]
        self.go_native(server)
        server.dbapi.tpc_begin(xid)
        self._run_natively(server, commands)

    def prepare_two_phase(self, prepare: Callable[[], None]) -> None:
        """The first phase of two. PostgreSQL answers a PREPARE TRANSACTION of an aborted transaction by ROLLBACK, and
        no error; one that fails has ended the transaction, which psycopg does not believe."""
        server = self.server
        if server is not None:
            self._look_before_commit(server)
        if self.trouble is not None:
            raise self._not_committable()
        self.ending = True
        try:
            prepare()
        except BaseException as error:
            if server is not None:
                server.taint()
            self.end(error)
            raise
        finally:
            self.ending = False

    def end_two_phase(self, end: Callable[[], None], *, commits: bool) -> None:
        """The second phase, or the only one. Ends the transaction, whatever happens."""
        self.ending, self.may_be_committed = True, commits
        server = self.server
        try:
            end()
        except BaseException as error:
            if server is not None:
                if isinstance(error, Exception) and not server.is_lost():
                    self.may_be_committed = False
                server.taint()  # the driver may believe that it is still in the transaction
            if commits:
                self._note_doubt()
            self.ending = False
            self.end(error)
            raise
        self.ending = False
        self._note_doubt()
        self.end()

    # -- transactions -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """From here on statements are in one transaction; nothing is sent."""
        if self.owner.local_settings.function is not None:  # which may raise
            self.settings, self.settings_command = self.owner.local_settings.of(self), None
        self.wrote = False
        self.in_transaction = True
        self.may_be_committed = self.retried = self.ending = False
        if self.begins_with:
            self.pending.commands.append(self.begins_with)
        self.first_error = self.trouble = None

    def take(self, repeats: bool = False) -> ServerConnection:
        """The transaction's connection; the first call takes one from the pool.

        `repeats`: what it is for is run again on another one if this one turns out to be lost."""
        server = self.server
        if server is not None:
            if server.generation is not process.generation:
                raise self.inherited()
            return server
        try:
            if self.early is not None:  # somebody looked before the transaction began
                self.let_early_go()
            server = self.server = self.keep() if self.owner.keeps else self.kept or self.borrow(repeats)
        except BaseException:  # it cannot be committed: a statement would be missing from it
            self.lost = False
            self.trouble = "A statement of this transaction had no connection to run on."
            raise
        self._connection_record = server.fairy._connection_record
        server.trips = 0
        if self.settings and self.settings_command is None:
            self._insert_settings(server)
        if self.driver.carries:
            self.driver.leave_autocommit(server.dbapi)
            begin = server.begin_command
            if self.options is not NO_OPTIONS:
                begin = self.options.over(server.rest.characteristics).begin_command()
            self.pending.commands = [begin, *self.pending.commands]
        else:
            self.driver.lend_natively(server.dbapi, self.dialect, self.options)
            self.native = True
            if self.pending.commands:
                self._run_natively(server, self.pending.take())
        return server

    def _insert_settings(self, server: ServerConnection) -> None:
        """Let the settings of `local_settings` follow BEGIN."""
        try:
            self.settings_command = self.driver.set_command(server.dbapi, self.settings)
        except BaseException:  # a text that the connection's encoding does not have
            self.server = None
            self.trouble = "The settings of this transaction could not be set."
            if server is not self.kept:
                server.give_back()
            raise
        self.pending.commands.insert(1 if self.begins_with else 0, self.settings_command)

    def ride(self, command: str) -> None:
        """Let a command, such as SET LOCAL, go with the next statement of the transaction."""
        if self.native:
            self.take().dbapi.cursor().execute(command)
        else:
            self.pending.commands.append(command)

    def go_native(self, server: ServerConnection) -> None:
        """Leave the transaction to the driver: what waits is sent, and its own BEGIN comes first if none was sent."""
        self.wrote = True
        if self.native:
            return
        commands = self.pending.take()
        if not self.begun:
            self.driver.lend_natively(server.dbapi, self.dialect, self.options.over(server.rest.characteristics))
            commands = commands[1:]
        else:
            self.driver.adopt(server.dbapi)
        self.native = True
        self._run_natively(server, commands)
        self.pending.sent(commands)

    def _run_natively(self, server: ServerConnection, commands: list[str]) -> None:
        for command in commands:
            with explained(self.settings if command is self.settings_command else (), self.dialect.loaded_dbapi.Error):
                server.dbapi.cursor().execute(command if command.isascii() else as_bytes(command))

    def look_natively(self, server: ServerConnection) -> bool:
        """Whether the server is in the transaction that the driver itself began; it begins one if none was."""
        if server.transaction_status() in (INTRANS, INERROR):  # it may have failed past us
            return True
        if self.driver.carries:
            if self.driver.own_transaction(server.dbapi):  # the driver believes in one, and would begin no other
                raise self.ended_behind_the_back()
            if server.dbapi.autocommit:
                server.dbapi.autocommit = False
        return False

    def first_statement_failed(self, server: ServerConnection, error: BaseException, waited: list[str]) -> bool:
        """Whether the transaction's first statement may be sent again, once: its connection was lost, and nothing is
        done. `waited` are the commands that went with it."""
        if self.retried or not self.owner.retries or self.owner.keeps:
            return False
        if not server.is_lost() or not isinstance(error, Exception):
            return False
        self.retried = True
        log.info("the connection was lost; running the first statement of the transaction again")
        self.server = None
        self.kept = None if server is self.kept else self.kept
        self.begun = self.native = False
        self.pending.commands = [command for command in waited if not command.startswith("BEGIN")]
        self.pending.savepoints.clear()
        self._drop(server, error)
        self.distrust_pool()
        return True

    def settings_were_fine(self, server: ServerConnection, error: BaseException, waited: list[str]) -> bool:
        """After an error of the transaction's first statement that may be that of its settings: begin anew, without
        the statement, which may then be run again. Raises where the server refuses the settings."""
        if self.native or sqlstate(error) not in MAY_BE_OF_SETTINGS or server.transaction_status() != INERROR:
            return False
        command, self.settings_command = self.settings_command, None  # once
        if command not in waited:
            return False
        try:
            with explained(self.settings, self.dialect.loaded_dbapi.Error):
                self.driver.send(server, ["ROLLBACK", *waited])
        except BaseException as failure:
            self.note_failure(server, failure, first=True)
            raise
        self.pending.savepoints.clear()
        self.pending.sent(waited)
        self.begun = True
        return True

    def distrust_pool(self) -> None:
        """A connection was lost, so that others, made before, may be about to be: the next one is a new one."""
        pool = self.engine.pool
        private.recycle(pool)
        if isinstance(pool, BorrowingPool):
            pool.check_in_for_good()

    def aborted(self) -> TransactionAborted:
        return abandoned(self.trouble, self.first_error)

    def inherited(self) -> TransactionAborted:
        return TransactionAborted(
            "This transaction was begun before os.fork(), by the parent process, and is the parent's."
        )

    # -- borrowing --------------------------------------------------------------------------------------------------

    def borrow(self, repeats: bool = False) -> ServerConnection:
        """A server connection that is alive, from among the idle ones or from the pool."""
        try:
            server = self.idle.pop()
        except IndexError:
            return self.check_out()
        pool = server.pool
        out = pool.checkout_listeners
        if (
            (not (repeats and self.owner.retries and not self.retried) and server.poll(0))
            or out[0] is not out[-1]
            or pool.checkouts_of_all
            or pool.ages
        ):
            return self.second_look(server)
        return server

    def second_look(self, server: ServerConnection) -> ServerConnection:
        """The server has said something on an idle connection (a notice or notification, or that it is gone), it has
        been idle for long, or the application wants to be told of each connection that is taken."""
        if not self.driver.is_alive(server.dbapi):
            log.info("a pooled connection was closed by the server; taking another one")
            self.lost = server.is_lost()
            if self.lost:
                note_lost(self.dialect)
            server.drop_idle()
            return self.borrow()
        if server.needs_pool():
            server.check_in()
            return check_out(self.engine, self.driver)
        try:
            server.tell_taken()
        except sa.exc.DisconnectionError as error:
            if error.invalidate_pool:
                self.distrust_pool()
            self._drop(server, error)
            return self.borrow()
        except BaseException as error:
            self._drop(server, error)
            raise
        return server

    def check_out(self) -> ServerConnection:
        """One from the pool, where none lies idle."""
        pool = self.engine.pool
        if isinstance(pool, BorrowingPool):
            self.idle = pool.idle
            if (server := pool.take_soon()) is not None:
                return self.second_look(server)
        server = check_out(self.engine, self.driver)
        if isinstance(pool, sa.NullPool) and not self.in_transaction:
            self.kept = server  # to the end of the context: this pool would open one for each statement
        return server

    def check_out_of(self, replica: sa.Engine) -> ServerConnection:
        """One from a replica's pool."""
        return check_out(replica, self.driver)

    def send_pending(self, server: ServerConnection) -> None:
        """Send what waits in a message of its own, for something that cannot take it along."""
        if not self.native and not (self.begun and self.pending.waits_for_commit()):
            commands = self.pending.take()
            self.driver.send(server, commands)
            self.pending.sent(commands)
            self.begun = True

    def controls(self, kind: str, name: str) -> bool:
        """Whether SAVEPOINT, RELEASE or ROLLBACK TO waits, or has nothing left to do, so that it is not sent now."""
        if self.native or not self.driver.carries:
            return False
        pending, server = self.pending, self.server
        if kind == "ROLLBACK TO":
            return not pending.roll_back_to(name)
        if server is not None and self.begun and server.transaction_status() != INTRANS:
            return False  # the server is to say what it says
        if kind == "SAVEPOINT":
            pending.savepoint(name)
            return True
        return not pending.release(name)

    # -- what became of a statement -----------------------------------------------------------------------------------

    def statement_failed(self, server: ServerConnection, error: BaseException, *, may_repeat: bool) -> bool:
        """Outside: let go of the connection after an error; whether the statement may be run again on another one."""
        if self.kept is server and self.owner.keeps:
            return False
        self._connection_record = server.fairy._connection_record
        is_lost = server.is_lost()
        self._note_demotion(server, error)
        if not server.may_be_used(error):
            self.kept = None if server is self.kept else self.kept
            self._drop(server, error)
            if not may_repeat:
                self.note_written()  # it may have been done
            if is_lost and may_repeat and self.owner.retries and isinstance(error, Exception):
                log.info("the connection was lost; running the read again")
                self.distrust_pool()
                return True
        else:
            self.lost = False
            if server is not self.early and server is not self.kept:
                server.give_back()
        return False

    def note_failure(self, server: ServerConnection, error: BaseException, *, first: bool) -> None:
        """In a transaction: whether it can go on after an error."""
        self._note_demotion(server, error)
        is_idle = not server.is_lost() and server.transaction_status() == IDLE
        if first and not self.native:
            self.begun = not is_idle
        if is_idle and (not first or not (self.native or self.pending.commands)):  # BEGIN was sent, and is gone
            self.trouble = "The statement that failed has ended this transaction."
            self.wrote = True
        elif server.is_lost():
            self.trouble = "The connection of this transaction was lost."
        elif not isinstance(error, Exception):
            self.trouble = "A statement of this transaction was interrupted."
            self.server = None
            self._drop(server, error)

    def _note_demotion(self, server: ServerConnection, error: BaseException) -> None:
        """A write was refused because the server is a standby now: another one has its place, and is to be found."""
        if sqlstate(error) != "25006" or self.options.read_only or not self.driver.is_standby(server.dbapi):
            return
        log.warning("%r is a standby now; its connections are closed, and made anew", self.engine.url)
        server.taint()
        note_lost(self.dialect)
        self.engine.dispose()

    def refuse_connection_state(self, statement: StatementClass, parameters: Any) -> None:
        """Behind a pooler another client would meet what the statement leaves on the server connection."""
        found = classify_with(statement, parameters, self.owner.statement_options)
        if found.connection_state is not None:
            raise refusal(found.connection_state)

    def wrote_alone(self, written: str, query: Any, rowcount: int = -1) -> None:
        """A write in autocommit was committed."""
        if rowcount != 0 or not counts_its_rows(query):  # else it met no row, and there is nothing to roll back
            self.owner.wrote(written)
        self.note_written()

    def note_written(self) -> None:
        """Outside a transaction something was written, or may be: whoever reads next is to see it. Also after a
        statement that met no row, which a trigger of the statement's may have followed."""
        if self.replicas is not None:
            self.owner.wrote_up_to(self.replicas.primary, None)

    def _note_doubt(self) -> None:
        """Of a transaction whose position is not known, what it wrote may be committed."""
        if self.wrote and self.replicas is not None:
            self.owner.wrote_up_to(self.replicas.primary, None)

    def note_statement(self, statement: StatementClass, query: Any, parameters: Any = None) -> None:
        """In a transaction: what a statement that was run leaves behind."""
        statement = statement.resolved(parameters)
        if statement.effect is not Effect.READ or self.owner.statement_options.get("fictive_writes"):
            self.wrote = True
        if statement.savepoint is not None:
            self.pending.sent([" ".join(statement.savepoint)])
        if statement.connection_state is not None and self.server is not None:
            self.server.taint()
        if self.log is not None and statement.effect is not Effect.READ:
            self.log.note(summary(query))
        if statement.may_end_transaction:
            self.trouble = f"The transaction was ended by {summary(query)!r}, sent as text."
            if _COMMITS.search(str(query)):
                self.trouble += _COMMITTED

    def refuse_state(self, server: ServerConnection, status: int) -> None:
        """Raise where the server is not in the transaction, or cannot be asked for anything."""
        if status == IDLE or status > INERROR:
            raise self.ended_behind_the_back()
        if self.driver.is_busy(server.dbapi):
            self.trouble = BUSY
            raise self.aborted()

    def ended_behind_the_back(self) -> TransactionAborted:
        self.trouble = BEHIND_THE_BACK
        return self.aborted()

    def take_notices(self, dbapi: Any) -> None:
        """Where SQLAlchemy's psycopg2 dialect looks for the server's notices, to log them."""
        self.driver_side.notices = list(dbapi.notices)
        del dbapi.notices[:]

    def replica_asked(self, server: ServerConnection) -> None:
        """A read is about to be sent to a replica, on `server`: for `watched`."""

    def replica_told(self, replica: Replica, outcome: str, trips: int) -> None:
        """It was `"answered"`; or the primary is asked next, since the replica was `"behind"` or `"unreachable"`, or
        the read `"failed"`. It took so many round trips: for `watched`."""

    # -- streams ------------------------------------------------------------------------------------------------------

    def stream_connection(self) -> SessionConnection:
        """A connection in a READ ONLY transaction, for one result that is read bit by bit."""
        connection = SessionConnection(self.engine, self.owner)
        connection.link.options = _READ_ONLY.over(connection.link.options)
        connection.begin()
        events = self.owner.dispatch
        if events is not None and events.after_begin:
            self.owner.tell_begun(connection)
        return connection

    def begin_is_heard(self) -> bool:
        """Whether anybody but fictive listens to the beginning of transactions on this engine or in this session."""
        if self.owner.dispatch is not None and self.owner.dispatch.after_begin:
            return True
        own = 1 if self.begins_with is not None else 0  # fictive's own, for a timeout of Core's transactions
        return len(list(self.engine.dispatch.begin)) > own

    def open_stream(self, settings: DueSettings = ()) -> StreamCursor | None:
        """A stream of this session's, on whose connection a read with these settings can run between two of its
        rows."""
        return next((stream for stream in self.streams or () if stream.serves(settings)), None)

    def close_streams(self) -> None:
        for stream in list(self.streams or ()):
            stream.close()

    def in_use(self) -> ServerConnection:
        """The connection of the statement that is about to be sent, outside a transaction."""
        if self.owner.keeps:
            return self.keep()
        server = self.kept or self.early
        if server is None:
            server = self.early = self.borrow()
        return server

    def keep(self) -> ServerConnection:
        """The connection of a `pinned()` block."""
        server = self.kept
        if server is None:
            if self.is_pooled:
                direct = direct_engine(self.engine, "pinned()")
                server = self.kept = check_out(direct, self.driver)
            else:
                server = self.kept = self.borrow()
            server.remember()
        elif server.is_lost():
            raise PinnedConnectionLost(
                "The connection of this pinned() block was lost, and what was set through it with it. "
                "Leave the block and begin it again."
            )
        return server

    def unpin(self) -> None:
        """Undo what was set through the pinned connection: close it, where no command undoes all and only that."""
        server, self.kept = self.kept, None
        if server is None or server is self.server:
            if server is not None:
                server.taint()  # a transaction that goes on keeps it to its end
            return
        done = False
        try:
            done = not server.is_lost() and self.driver.forget(server.dbapi, self.dialect, server.remembered)
        finally:
            if not done:
                self._drop(server)
        if done:
            server.note_pinned(False)
            server.give_back()

    def let_go(self) -> None:
        """Give back whatever is held outside a transaction."""
        self.let_early_go()
        kept = self.kept
        if kept is not None and not self.owner.keeps:
            self.kept = None
            kept.release()

    def let_early_go(self) -> None:
        early, self.early = self.early, None
        if early is not None:
            early.give_back()

    def _drop(self, server: ServerConnection, error: BaseException | None = None) -> None:
        self._connection_record = server.fairy._connection_record
        self.lost = server.is_lost()
        if self.lost:
            note_lost(self.dialect)
        if server is self.early:
            self.early = None
        server.drop(error)


class DriverSide:
    """What a cursor of a session has as its `connection`: the driver's, borrowed when somebody looks at it."""

    _link: Link
    notices: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        link = self._link
        if name in ("commit", "rollback"):
            return getattr(link, name)
        return getattr(link.dbapi_connection if name in _SENDS else link.server_connection, name)


# What of a driver's connection sends, or changes what is sent next.
_SENDS = frozenset({"add_notice_handler", "add_notify_handler", "cursor", "execute", "lobject", "notifies", "pipeline",
                    "reset", "set_autocommit", "set_client_encoding", "set_deferrable", "set_isolation_level",
                    "set_read_only", "set_session", "tpc_begin", "tpc_commit", "tpc_prepare", "tpc_recover",
                    "tpc_rollback", "transaction"})  # fmt: skip


def abandoned(trouble: str | None, first_error: BaseException | None) -> TransactionAborted:
    """The error of a transaction that the server, a text or a lost connection has ended."""
    if trouble is not None and trouble.endswith(_COMMITTED):
        return TransactionAborted(f"{trouble} Nothing runs after it. Use commit(), or leave the block.")
    message = f"{trouble or ABORTED} "
    cause = getattr(first_error, "orig", None) or first_error
    if cause is not None:
        message += f"The first error was: {str(cause).strip().splitlines()[0] if str(cause).strip() else cause!r}. "
    error = TransactionAborted(
        message
        + "The transaction was rolled back, and nothing of it is saved. To go on in a transaction after an error "
        "that you expect, put the statement in `with db.session.begin_nested():`."
    )
    error.__cause__ = first_error
    return error


STATEMENT_TIMEOUT = "fictive_statement_timeout"
"""The execution option of an engine whose transactions have a `statement_timeout`, in milliseconds."""


def statement_timeout_command(options: Mapping[str, Any]) -> str | None:
    """What an engine's transactions begin with, for its execution options."""
    timeout = options.get(STATEMENT_TIMEOUT)
    return None if timeout is None else f"SET LOCAL statement_timeout = {int(timeout)}"


class SessionConnection(sa.Connection):
    """SQLAlchemy's connection of a session, over a `Link`. It lasts as long as the session."""

    def __init__(self, engine: sa.Engine, owner: LinkOwner) -> None:
        link = Link(engine, owner)
        # the engine's own listener would set its isolation level on the driver's connection; here BEGIN says it
        super().__init__(engine, connection=link, _has_events=False, _allow_autobegin=False)  # type: ignore[arg-type]
        private.join_events(self, engine)
        self.link = link
        if options := engine.get_execution_options():
            self._begin_as(options)
        self.rest_options = self._execution_options
        """Its execution options outside a transaction."""

    def _begin_as(self, options: Mapping[str, Any]) -> None:
        """What the engine's own options ask of each transaction."""
        link = self.link
        link.begins_with = statement_timeout_command(options)
        asked = {field: options[name] for name, field in private.BEGIN_OPTIONS.items() if name in options}
        if asked:
            link.rest_options = link.options = TransactionOptions(**asked)
        if options.get("stream_results") or options.get("yield_per"):
            # outside, a server-side cursor needs a transaction of its own; only a statement can ask for one
            self._execution_options = self._execution_options.union({"stream_results": False, "yield_per": None})

    def forget(self) -> None:
        """Drop the execution options and the listeners that a transaction, which is over, was given through it."""
        self._execution_options = self.rest_options
        if self._has_events:
            private.hear_engine_only(self, self.engine)

    def begin(self) -> sa.RootTransaction:
        if self._transaction is None:
            link = self.link
            if link.server is not None:  # of a transaction that an interrupt has cut off from its end
                link.end(KeyboardInterrupt())
            if link.begins_with or link.__class__ is not Link or link.owner.local_settings.function is not None:
                link.begin()
            else:  # the same, without a call
                link.in_transaction = True
                link.wrote = link.may_be_committed = link.retried = False
                link.first_error = link.trouble = None
            self._Connection__savepoint_seq = 0  # names are used anew in each transaction, as on a new connection
        return super().begin()

    def begin_twophase(self, xid: Any = None) -> sa.TwoPhaseTransaction:
        if self._transaction is None:
            self.link.begin()
        return super().begin_twophase(xid)

    def _savepoint_impl(self, name: str | None = None) -> str:
        """SQLAlchemy compiles and executes a construct for each SAVEPOINT; where nobody looks, the command just
        waits."""
        if self._may_wait():
            if name is None:
                self._Connection__savepoint_seq += 1
                name = f"sa_savepoint_{self._Connection__savepoint_seq}"
            if self.link.controls("SAVEPOINT", name):
                return name
        return super()._savepoint_impl(name)

    def _release_savepoint_impl(self, name: str) -> None:
        if not (self._may_wait() and self.link.controls("RELEASE", name)):
            super()._release_savepoint_impl(name)

    def _may_wait(self) -> bool:
        """Whether a savepoint is for the server alone: it is not logged, and no listener of the engine's is told."""
        heard = self._echo or self._has_events or self.engine._has_events or self.dialect._has_events
        return not heard and self.link.trouble is None

    def _prepare_twophase_impl(self, xid: Any) -> None:
        try:
            self.link.prepare_two_phase(functools.partial(super()._prepare_twophase_impl, xid))
        except self.dialect.loaded_dbapi.Error as error:
            self._handle_dbapi_exception(error, None, None, None, None)

    def _commit_twophase_impl(self, xid: Any, is_prepared: bool) -> None:
        self.link.end_two_phase(functools.partial(super()._commit_twophase_impl, xid, is_prepared), commits=True)

    def _rollback_twophase_impl(self, xid: Any, is_prepared: bool) -> None:
        if self.link.in_transaction:  # else a phase that failed has ended it
            end = functools.partial(super()._rollback_twophase_impl, xid, is_prepared)
            self.link.end_two_phase(end, commits=False)

    def execution_options(self, **options: Any) -> SessionConnection:
        """As SQLAlchemy's; the level, READ ONLY and DEFERRABLE are those of the transaction that is about to begin."""
        asked = {field: options.pop(name) for name, field in private.BEGIN_OPTIONS.items() if name in options}
        if asked:
            if private.is_autocommit(asked):
                raise ConfigurationError(
                    "isolation_level='AUTOCOMMIT' of a session's connection: a session is in autocommit until "
                    "begin(). For a connection in autocommit there is db.engine.connect().execution_options(...)."
                )
            if self.in_transaction():
                raise sa.exc.InvalidRequestError("isolation_level cannot change in a transaction that has begun.")
            self.link.options = TransactionOptions(**asked).over(self.link.options)
        if options:
            super().execution_options(**options)
        return self

    def _rollback_impl(self) -> None:
        if self.in_transaction():  # else SQLAlchemy cleans up after an error, where there is nothing to undo
            self.link.ending = True
            super()._rollback_impl()

    def _commit_impl(self) -> None:
        self.link.ending = True
        if self._echo or self._dbapi_connection is None:  # invalidated, and SQLAlchemy says so
            super()._commit_impl()
            return
        if self._has_events or self.engine._has_events:
            self.dispatch.commit(self)
        try:
            self.link.commit()
        except BaseException as error:
            self._handle_dbapi_exception(error, None, None, None, None)

    def _handle_dbapi_exception(self, e: BaseException, *args: Any, **kwargs: Any) -> Any:
        link, first_error = self.link, self.link.first_error
        in_transaction = link.in_transaction
        try:
            super()._handle_dbapi_exception(e, *args, **kwargs)
        except BaseException as error:
            if not isinstance(error, Exception):
                # SQLAlchemy has the traceback in a variable of a frame in it: what was on its way, a connection, would
                # be held until the garbage is collected
                del e
                clear_frames(error.__traceback__)
                raise
            if in_transaction and first_error is None:
                link.first_error = error
                link.owner.had_error = True
            if first_error is not None and sqlstate(e) == "25P02" and isinstance(error, sa.exc.DBAPIError):
                raise AbortedTransactionStatement(error, abandoned(None, first_error)) from first_error
            raise

    @classmethod
    @contextlib.contextmanager
    def standing_alone(cls, engine: sa.Engine, watcher: Any = None) -> Iterator[sa.Connection]:
        """A connection that is kept for the block, each statement on it standing alone; of no session."""
        connection = cls(engine, LinkOwner())
        if watcher is not None:
            from .watched import watch  # not before there is one

            watch(connection.link, watcher)
        try:
            yield connection
        finally:
            server, connection.link.kept = connection.link.kept, None
            if server is not None and server.may_be_used():
                server.note_pinned(False)
                server.release()
            elif server is not None:
                server.drop()
            connection.close()

"""SQLAlchemy's transaction object with what fictive adds: an honest end, `Rollback`, hooks, and messages.

`begin()`, `begin_nested()` and `transaction()` return SQLAlchemy's own `SessionTransaction`, of this subclass. So
handles, `get_transaction()` and `get_nested_transaction()` are one and the same object, and behave as SQLAlchemy
documents it. A plain session's transaction becomes one when a block of fictive's or a hook needs it (`adopt`).
"""

from __future__ import annotations

import contextlib
import enum
import logging
import weakref
from collections.abc import Callable, Mapping
from traceback import clear_frames
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..connection import process
from ..connection.engines import status_of
from ..connection.link import BEHIND_THE_BACK, SessionConnection, abandoned
from ..connection.statement_settings import set_on_foreign
from ..drivers import NO_OPTIONS, TransactionStatus
from ..drivers.base import INERROR
from ..errors import (
    AbortedTransactionStatement,
    CommitOutcomeUnknown,
    HooksFailed,
    TransactionAborted,
    TransactionAlreadyBegun,
    TransactionEnded,
    TransactionOutOfOrder,
)
from . import private
from .callers import caller
from .hooks import due_hooks, run_due
from .local_settings import LocalSettings
from .private import ACTIVE, CLOSED, COMMITTED, PREPARED

if TYPE_CHECKING:
    from .hooks import Hook, HookKind
    from .write_log import WriteLog

__all__ = [
    "Joined",
    "Kind",
    "Rollback",
    "Transaction",
    "TransactionState",
    "adopt",
    "drop_left",
    "ended_error",
    "innermost",
    "is_enclosed",
]

log = logging.getLogger("fictive.transaction")


class TransactionState(enum.Enum):
    """Where a transaction is in its life. Readable after its end."""

    ACTIVE = "active"
    COMMITTED = "committed"
    """Committed; of a savepoint: released, its fate is that of the transaction around it."""
    ROLLED_BACK = "rolled back"
    IN_DOUBT = "in doubt"
    """COMMIT was sent and never answered (`CommitOutcomeUnknown`)."""


ROLLED_BACK_BY_FLUSH = "SQLAlchemy rolled this transaction back after a flush in it failed."
PREPARED_ONLY = "prepare() was called in this block, and commit() was not."
COMMIT_FAILED = "commit() in this block failed."


class Kind(enum.Enum):
    """What a transaction object stands for."""

    RECORD = "record of changes"
    """SQLAlchemy's note of what a rollback has to undo on objects. The session is in autocommit."""
    IMPLICIT = "implicit"
    """Begun for one flush, commit or statement of several parts, and committed with it."""
    BLOCK = "block"
    """Begun by the code."""
    LASTING = "lasting"
    """Begun by a first write, as in SQLAlchemy (`writes_outside="begin"`), or by a plain session."""


class Rollback(Exception):
    """Raised in a block by your code: undoes that block, and ends there. Not an error, and no `FictiveError`.

    `Rollback(tx)` goes on to the block that `tx` is, an outer one, and undoes all that is in it. A block that joined
    (`savepoint=False`) has nothing of its own to undo: it ends the block that it joined.
    """

    def __init__(self, transaction: Transaction | Joined | None = None) -> None:
        super().__init__("raised outside the block that it is for" if transaction else "raised outside any block")
        self.transaction: Transaction | Joined | None = None
        if transaction is not None:
            if not isinstance(transaction, (Transaction, Joined)):
                raise TypeError(f"Rollback() takes what `with transaction() as tx:` gives, not {transaction!r}.")
            self.transaction = transaction.own_block()
            self.transaction.raise_unless_active()

    def ends(self, transaction: Transaction | Joined) -> bool:
        """Whether it is for this block, which it has reached."""
        return self.transaction is None or self.transaction is transaction


class _Exit:
    """`__exit__`, and whether a `with` statement still holds it.

    An interrupt may strike between the end of a block and the first line of `__exit__`, or within it. The block is
    left then, and nothing could be told; but the method that `with` took from the object at its beginning is gone.
    """

    def __init__(self, method: Callable[..., bool | None]) -> None:
        self._method = method

    def __get__(self, transaction: Transaction | None, owner: type) -> Callable[..., bool | None]:
        if transaction is None:
            return self._method
        bound = MethodType(self._method, transaction)
        if transaction.held_by_with is None or transaction.held_by_with() is None:  # else `with` holds it already
            transaction.held_by_with = weakref.ref(bound)
        return bound


class Transaction(sa_orm.SessionTransaction):
    """What `begin()`, `begin_nested()` and `transaction()` return: a context manager around atomic work.

    A block that ends normally commits (a savepoint: is released); an exception rolls back and comes out unchanged,
    but for `Rollback`, which ends with the block that it is for. Without `with`, `commit()` or `rollback()` end it.
    BEGIN goes with the first statement; a transaction of n statements is n + 1 round trips, and none without a
    statement.
    """

    # SQLAlchemy makes savepoints and those of plain sessions, and their class is changed afterwards: so attributes
    # have their defaults here.
    kind = Kind.LASTING
    options = NO_OPTIONS
    settings: tuple[LocalSettings, ...] = ()
    is_plain = True
    """Of a session of SQLAlchemy's own, or on a connection that the session was given: COMMIT is looked at here."""
    has_foreign = False
    """Whether it has a connection that the session was given."""
    hooks: list[tuple[HookKind, Hook]] | None = None
    hooks_of: object = None
    """The process that registered them: a child that inherits the block by `os.fork()` runs none."""
    ended_at: str | None = None
    """The line that ended the transaction before its block was left."""
    begun_at: str | None = None
    """The line of the first write, of a `LASTING` one."""
    whole: Transaction | None = None
    """The transaction that this savepoint was begun with, and ends with."""
    is_sandbox = False
    """Set on the transaction that a test puts around the application: what is in it counts as outside."""
    writes: WriteLog | None = None
    began_before_load = 0
    """The number of SQLAlchemy's load before which objects were loaded before it began; 0 where there were none."""
    has_written = False
    """Of a savepoint: whether what was read in it may be undone with it."""
    _outcome: TransactionState | None = None
    _ending = False
    _has_due = False
    """Whether hooks have become due with its end."""
    _is_left = False
    held_by_with: weakref.ref[Any] | None = None
    _around: Any = None

    def __init__(self, session: sa_orm.Session, origin: Any, kind: Kind) -> None:
        """One of an opt-in session's own, which SQLAlchemy would make of its class."""
        self.kind, self.is_plain = kind, False
        super().__init__(session, origin)

    def __repr__(self) -> str:
        what = "savepoint" if self.nested else "transaction"
        return f"<{what} {self.state.value}{f', ended at {self.ended_at}' if self.ended_at else ''}>"

    @property
    def state(self) -> TransactionState:
        """A `TransactionState`, readable after the end."""
        if self._outcome is not None:
            return self._outcome
        return TransactionState.ACTIVE if self.is_active else TransactionState.ROLLED_BACK

    @property
    def is_root(self) -> bool:
        return self._parent is None

    def raise_unless_active(self) -> None:
        if not self.is_active:
            raise ended_error(self)

    def own_block(self) -> Transaction:
        """The block that a `Rollback` for this one ends."""
        return self

    def _raise_for_prerequisite_state(self, operation_name: str, state: Any) -> NoReturn:
        if self._state is CLOSED:
            raise ended_error(self)
        super()._raise_for_prerequisite_state(operation_name, state)

    # -- its connections ----------------------------------------------------------------------------------------------

    def _connection_for_bind(self, bind: Any, execution_options: Any) -> sa.Connection:
        connections = self._connections
        if bind in connections:
            if not execution_options and self._state is ACTIVE:
                found = connections[bind]
                if not found[1].is_active:  # ended on SQLAlchemy's connection, which would be in autocommit now
                    raise abandoned(BEHIND_THE_BACK, None)
                return found[0]
        elif self._parent is None and not self.is_plain:
            if bind.__class__ is sa.Engine or isinstance(bind, (sa.Engine, SessionConnection)):
                if bind.__class__ is not SessionConnection:
                    scope: Any = self.session._fictive  # type: ignore[attr-defined]
                    bind = scope.connection(bind)
                link = bind.link
                if self.options is not NO_OPTIONS:
                    link.options = self.options
                link.prefetches = self.kind is Kind.IMPLICIT
                link.log = self.writes
            else:
                self.has_foreign = True
        connection = super()._connection_for_bind(bind, execution_options)
        if self.has_foreign and not isinstance(connection, SessionConnection):
            source = self.session._fictive.local_settings  # type: ignore[attr-defined]
            if source.function is not None:
                set_on_foreign(connection, source)
        for settings in self.settings:
            settings.apply(connection)
        return connection

    def _restore_snapshot(self, dirty_only: bool = False) -> None:
        # what was read after a write in a savepoint, which is undone now, and which no commit expires
        if dirty_only and self.has_written and not self.session.expire_on_commit:
            private.expire_loaded_since(self, self.began_before_load)
        super()._restore_snapshot(dirty_only)

    # -- its end ----------------------------------------------------------------------------------------------------

    def commit(self, _to_root: bool = False) -> None:
        """Flush what is pending and commit; release, for a savepoint. 1 round trip.

        Raises `TransactionAborted`, from the first error, when the server has aborted the transaction already; it
        is rolled back then.
        """
        session, outermost = self.session, not self._ending
        if self._state is CLOSED:
            raise ended_error(self)
        try:
            if self._trans_subject is not None:
                self._note_end()
        except AttributeError:  # never entered by `with`
            pass
        self._ending = True
        try:
            if not self.is_plain and session._fictive.had_error:  # type: ignore[attr-defined]
                self._raise_if_aborted()
            if self.settings or (self._parent is None and (self.is_plain or self.has_foreign)):
                self._before_commit()
            super().commit(_to_root)
        except BaseException as error:
            self._commit_failed(error, outermost)
            self._abandon_connections(error)
            raise
        finally:
            self._ending = False
        if outermost:
            if self.whole is not None:
                self._end_whole()
            if self._has_due:
                run_due(session)

    def _before_commit(self) -> None:
        """What SQLAlchemy's commit would do first, so that a timeout of the block is still in force, and a plain
        session's COMMIT is honest."""
        self._raise_if_foreign_aborted()
        if not self.session._flushing and self.is_active and not self.session._is_clean():
            self.session.flush()
        for settings in self.settings[::-1]:
            settings.end()
        self._raise_if_foreign_aborted()

    def _raise_if_foreign_aborted(self) -> None:
        for connection in private.connections_of(self) if self._parent is None else ():
            is_lost = connection.invalidated or status_of(connection) is TransactionStatus.ABORTED
            if is_lost and not isinstance(connection, SessionConnection):
                raise abandoned(None, None)

    def _commit_failed(self, error: BaseException, outermost: bool) -> None:
        if self._state is COMMITTED:  # what came after it has failed
            self.close()
        if self._outcome is not None:
            if outermost:
                run_due(self.session, after=error)
            return
        interrupted = not isinstance(error, Exception)
        if self._parent is None and self._state is PREPARED and self._may_be_committed(error):
            self._outcome = TransactionState.IN_DOUBT  # so that no hook may run
            self._roll_back_quietly(error)
            if isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated:
                raise CommitOutcomeUnknown(error) from error
            return
        # after a statement of the commit that failed, a flush or RELEASE, the code rolls back itself, as in SQLAlchemy
        is_given_up = isinstance(error, TransactionAborted) and not isinstance(error, AbortedTransactionStatement)
        if is_given_up or self.kind is Kind.IMPLICIT or interrupted:
            self._roll_back_quietly(error)
        if outermost:
            run_due(self.session, after=error)

    def _may_be_committed(self, error: BaseException) -> bool:
        """Whether any of its databases, of which there may be several, has done it or may have."""
        links = [each.link for each in private.connections_of(self) if isinstance(each, SessionConnection)]
        if not links:
            return not isinstance(error, Exception) or (
                isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated
            )
        found = [link for link in links if link.may_be_committed]
        if found and len(links) > 1:
            where = ", ".join(repr(link.engine.url) for link in found)
            log.error("%r in a transaction over %d databases: it may be committed at %s", error, len(links), where)
        return bool(found)

    def rollback(self, _capture_exception: bool = False, _to_root: bool = False) -> None:
        """Undo all of it, in the database and on the session's objects. 1 round trip; none if nothing was sent."""
        session, outermost = self.session, not self._ending
        if self._state is CLOSED:
            raise ended_error(self)
        self._note_end()
        self._ending = True
        try:
            with private.expecting_the_end(self) if session.twophase else contextlib.nullcontext():
                super().rollback(_capture_exception, _to_root)
        except BaseException as error:
            self._abandon_connections(error)
            if outermost:
                run_due(session, after=error)
            raise
        finally:
            self._ending = False
        if outermost:
            if self.whole is not None:
                self._end_whole()
            if self._has_due:
                run_due(session)

    def _roll_back_quietly(self, error: BaseException) -> None:
        """Roll back after an error, which is the one to see."""
        try:
            if self._rollback_can_be_called():
                sa_orm.SessionTransaction.rollback(self)
        except Exception:
            log.warning("ROLLBACK failed after %r", error, exc_info=True)

    def close(self, invalidate: bool = False) -> None:
        """End it: rolled back, if it was not committed."""
        committed = self._state is COMMITTED
        if self._state is PREPARED:
            self._let_go_of_failed_commit()
        try:
            super().close(invalidate)
        except BaseException as error:
            self._abandon_connections(error)
            raise
        finally:
            if self._outcome is None:
                self._outcome = TransactionState.COMMITTED if committed else TransactionState.ROLLED_BACK
            for settings in self.settings:
                settings.forget()
            if self._parent is None:
                connection: Any
                for connection in self._connections:  # and their engines
                    if connection.__class__ is SessionConnection and (
                        connection._has_events or connection._execution_options is not connection.rest_options
                    ):
                        connection.forget()
            kind = self.kind
            if not self.is_plain and self._parent is None and kind is not Kind.RECORD and kind is not Kind.IMPLICIT:
                scope: Any = self.session._fictive  # type: ignore[attr-defined]
                scope.had_error = False
                if scope.committed_writes:
                    scope.committed_writes.clear()  # what was written before is settled
                if self.writes and committed:
                    scope.committed_writes.extend(self.writes)
            if self.hooks:
                self._hand_on_hooks(self.hooks, committed)
            if self._has_due and isinstance(self._parent, Transaction):
                self._parent._has_due = True  # whose end runs them, where this one's is a part of it
            elif self._has_due and not self._ending and self._parent is None:
                run_due(self.session)

    def _let_go_of_failed_commit(self) -> None:
        """SQLAlchemy leaves it to the connection's end, and the session's connection object stays."""
        for connection, on_connection, *_ in self._connections.values():
            if not on_connection.is_active and connection.get_transaction() is on_connection:
                on_connection.rollback()

    def add_hook(self, kind: HookKind, hook: Hook) -> None:
        self.hooks = [*(self.hooks or ()), (kind, hook)]
        self.hooks_of = process.generation

    def _hand_on_hooks(self, hooks: list[tuple[HookKind, Hook]], committed: bool) -> None:
        """At its end: to the transaction around it, or to those that are due."""
        self.hooks = None
        if self.hooks_of is not process.generation:
            return
        parent = self._parent
        if self.nested and committed and isinstance(parent, Transaction):
            for kind, hook in hooks:
                parent.add_hook(kind, hook)
        elif self._outcome is TransactionState.IN_DOUBT:
            log.warning("the outcome of a COMMIT is unknown: %d hooks were not run", len(hooks))
        else:
            wanted = "commit" if committed else "rollback"
            due_hooks(self.session).extend(hook for hook in hooks if hook[0] == wanted)
            self._has_due = True

    def _abandon_connections(self, error: BaseException) -> None:
        """After an interrupt, which may have left a transaction of the server's without one of SQLAlchemy's."""
        if not isinstance(error, Exception) and not self.is_plain:
            clear_frames(error.__traceback__)  # a connection may be in one
            scope: Any = self.session._fictive  # type: ignore[attr-defined]
            scope.abandon_transactions(error)

    def _note_end(self) -> None:
        """Remember the line that ends a block from within; its own `__exit__` does not count."""
        if self._outcome is None and self._is_entered() and self.ended_at is None:
            self.ended_at = caller()

    def _raise_if_aborted(self) -> None:
        """Raise, rolled back, where PostgreSQL or the network has ended the transaction: before a flush that would
        fail for it, and before a RELEASE after whose failure SQLAlchemy sends no ROLLBACK TO."""
        for entry in self._connections.values():
            connection: Any = entry[0]
            if connection.__class__ is not SessionConnection:
                continue
            link = connection.link
            if connection._dbapi_connection is None:
                error = abandoned("The connection of this transaction was lost.", link.first_error)
            elif (
                link.first_error is not None
                and link.server is not None
                and link.server.transaction_status() == INERROR
            ):
                error = abandoned(None, link.first_error)
            else:
                continue
            self._roll_back_quietly(error)
            raise error

    def _is_entered(self) -> bool:
        return getattr(self, "_trans_subject", None) is not None

    def _end_whole(self) -> None:
        """The transaction that a savepoint was begun with ends with it."""
        whole, self.whole = self.whole, None
        if whole is not None and whole.is_active:
            whole.commit()

    # -- with ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Transaction:
        if self._state is not ACTIVE:
            self.raise_unless_active()
        if getattr(self, "_trans_subject", None) is not None:
            raise TransactionAlreadyBegun("This block has been entered already, and is open; begin another one in it.")
        session = self.session  # as SQLAlchemy's own `__enter__`, without its two calls
        self._around = self._outer_trans_ctx = session._trans_context_manager
        self._trans_subject = session
        session._trans_context_manager = self
        return self

    def _leave(
        self, type_: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        session = self.session
        if session._trans_context_manager is not self:
            drop_left(session)
        is_innermost = session._trans_context_manager is self
        ends_here = error is not None and isinstance(error, Rollback) and error.ends(self)
        try:
            if self._state is not ACTIVE:
                if self._state is not CLOSED:  # a flush or a commit in it failed
                    why = ROLLED_BACK_BY_FLUSH
                    if self._state is PREPARED:
                        why = PREPARED_ONLY if self.ended_at is None else COMMIT_FAILED
                        # only a rollback makes SQLAlchemy's connections forget the transaction
                        self._roll_back_quietly(error or TransactionAborted(why))
                    self.close()
                    failure = error or abandoned(why, self._rollback_exception)
                    run_due(session, after=failure)
                    if error is None:
                        raise failure
                if ends_here and self.state is TransactionState.COMMITTED:
                    raise ended_error(self) from error
                return ends_here or None  # ended inside; another exception goes on
            self._trans_subject = None
            if error is None:
                if not is_innermost:
                    self._raise_if_left_too_early()
                try:
                    self.commit()
                except BaseException as failure:
                    if self._outcome is None:
                        self._roll_back_quietly(failure)
                        run_due(session, after=failure)
                    raise
                return None
            try:
                self.rollback()
            except HooksFailed:
                if ends_here:
                    raise
                log.warning("hooks failed after %r", error, exc_info=True)
            except Exception:  # the user's error is the one to see; the connection has been closed
                log.warning("ROLLBACK failed after %r", error, exc_info=True)
            return ends_here or None
        finally:
            self._is_left = True
            self._trans_subject = self._outer_trans_ctx = None
            if is_innermost:
                session._trans_context_manager = outer = self._around
                if outer is not None:
                    drop_left(session)

    __exit__ = _Exit(_leave)  # type: ignore[assignment]

    def is_left(self) -> bool:
        """Whether its block is over."""
        return self._is_left or (self.held_by_with is not None and self.held_by_with() is None)

    def _raise_if_left_too_early(self) -> None:
        inner = self.session._trans_context_manager
        if not isinstance(inner, Transaction) or not inner.is_active or inner.whole is self:
            return
        still_open = repr(inner)
        self._roll_back_quietly(RuntimeError("left out of order"))
        run_due(self.session, after=RuntimeError("left out of order"))
        raise TransactionOutOfOrder(
            f"The block was left while {still_open}, begun within it, is open. Both were rolled back. Leave "
            "blocks in the reverse order of entering them; a generator that holds one open has to be closed."
        )


class Joined:
    """What `transaction(savepoint=False)` returns in a transaction: a part of it, with its state."""

    def __init__(self, session: sa_orm.Session, transaction: Transaction, settings: Mapping[str, int]) -> None:
        self.session = session
        self.settings = LocalSettings(transaction, settings) if settings else None
        self._joined = transaction

    def __repr__(self) -> str:
        return f"<part of {self._joined!r}>"

    @property
    def state(self) -> TransactionState:
        return self._joined.state

    @property
    def is_active(self) -> bool:
        return self._joined.is_active

    @property
    def nested(self) -> bool:
        return False

    @property
    def parent(self) -> Transaction:
        return self._joined

    def own_block(self) -> Transaction | Joined:
        return self if self._joined.kind is Kind.LASTING and self._joined.is_root else self._joined.own_block()

    def raise_unless_active(self) -> None:
        self._joined.raise_unless_active()

    def commit(self) -> None:
        self.raise_unless_active()
        raise TransactionAlreadyBegun("This block joined the transaction around it, whose block commits it.")

    def rollback(self) -> None:
        """Undo the whole transaction or savepoint that it joined."""
        self.raise_unless_active()
        self._joined.rollback()

    def close(self) -> None:
        """Nothing of its own is open."""

    def __enter__(self) -> Joined:
        self.raise_unless_active()
        return self

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if self.settings is not None:
            failed = True
            try:
                if error is None and self.is_active:
                    self.session.flush()  # the timeouts are for what the block wrote
                failed = error is not None
            finally:
                self.settings.end(failed=failed)
        ends_here = self.own_block() is self and isinstance(error, Rollback) and error.ends(self)
        if ends_here and self.is_active:
            self._joined.rollback()
        return ends_here or None


def drop_left(session: sa_orm.Session) -> None:
    """Let blocks that are over, in whatever way they were left, no longer count as being around what comes."""
    block: Any = session._trans_context_manager
    while isinstance(block, Transaction) and block.is_left():
        block = block._around
    session._trans_context_manager = block


def adopt(transaction: sa_orm.SessionTransaction | None) -> Transaction | None:
    """Make SQLAlchemy's transaction object, and those around it, ours; the innermost transaction or savepoint."""
    while transaction is not None and not (transaction.nested or transaction.parent is None):
        transaction = transaction.parent  # that of a flush
    found = transaction
    while transaction is not None:
        if type(transaction) is sa_orm.SessionTransaction and (transaction.nested or transaction.parent is None):
            transaction.__class__ = Transaction
        transaction = transaction.parent
    assert found is None or isinstance(found, Transaction)
    return found


def innermost(session: sa_orm.Session) -> Transaction | None:
    """The innermost savepoint or transaction of a session, with or without a connection."""
    return adopt(session._nested_transaction or session._transaction)


def is_enclosed(session: sa_orm.Session) -> bool:
    """In a transaction: whether its outcome depends on one other than that of a test's sandbox."""
    block: sa_orm.SessionTransaction | None = innermost(session)
    while isinstance(block, Transaction) and block.is_sandbox:
        block = block.parent
    return block is not None


def ended_error(transaction: Transaction) -> TransactionEnded:
    where = f" at {transaction.ended_at}" if transaction.ended_at else ""
    kind = "savepoint" if transaction.nested else "transaction"
    return TransactionEnded(
        f"The {kind} of this block was {transaction.state.value}{where}; nothing more can run in the block. "
        "Leave the block, or begin another one after it."
    )

"""One block: a transaction or a savepoint, from `begin()` to its end."""

from __future__ import annotations

import enum
import logging
from types import TracebackType
from typing import Protocol

import sqlalchemy.orm as sa_orm

from ..errors import HooksFailed, TransactionAlreadyBegun, TransactionEnded, TransactionOutOfOrder
from .callers import caller
from .local_settings import LocalSettings

__all__ = [
    "Joined",
    "Keeper",
    "Rollback",
    "Transaction",
    "TransactionState",
    "after_ending",
    "after_leaving",
    "ended_error",
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


class Rollback(Exception):
    """Raised in a block by your code: undoes that block, and ends there. Not an error, and no `FictiveError`.

    `Rollback(tx)` goes on to the block that `tx` is, an outer one, and undoes all that is in it. A block that joined
    (`savepoint=False`) has nothing of its own to undo: it ends the block that it joined.
    """

    def __init__(self, transaction: Transaction | None = None) -> None:
        super().__init__("raised outside the block that it is for" if transaction else "raised outside any block")
        if transaction is not None:
            if not isinstance(transaction, Transaction):
                raise TypeError(f"Rollback() takes what `with transaction() as tx:` gives, not {transaction!r}.")
            transaction = transaction.own_block()
            transaction.raise_unless_active()
        self.transaction = transaction

    def ends(self, transaction: Transaction) -> bool:
        """Whether it is for this block, which it has reached."""
        return self.transaction is None or self.transaction is transaction


class Keeper(Protocol):
    """Who ends the blocks of one session: the opt-in session itself, or `PlainBlocks` for a plain one."""

    def end_transaction(self, block: Transaction, *, commit: bool, ended_at: str | None = None) -> None: ...

    def leave(self, block: Transaction) -> None: ...

    def innermost_block(self) -> Transaction | None: ...


class Transaction:
    """What `begin()`, `begin_nested()` and `transaction()` return: a context manager around atomic work.

    A block that ends normally commits (a savepoint: is released); an exception rolls back and comes out unchanged,
    but for `Rollback`, which ends with the block that it is for. Without `with`, `commit()` or `rollback()` end it.
    BEGIN goes with the first statement; a transaction of n statements is n + 1 round trips, and none without a
    statement.

    Not a `sqlalchemy.orm.SessionTransaction`, but has its `commit`, `rollback`, `close`, `is_active`, `nested`,
    `parent` and `session`.
    """

    def __init__(
        self,
        session: sa_orm.Session,
        inner: sa_orm.SessionTransaction,
        parent: Transaction | None,
        *,
        nested: bool,
        keeper: Keeper,
    ) -> None:
        self.session = session
        self.parent = parent
        self.nested = nested
        self.ended_at: str | None = None
        """The line that ended the transaction before its block was left."""
        self.asked_for_savepoint = False
        """Begun by `begin_nested()` where there was no transaction to nest in."""
        self.whole: Transaction | None = None
        """The transaction that this savepoint was begun with, and ends with."""
        self.is_sandbox = False
        """Set on the transaction that a test puts around the application: what is in it counts as outside."""
        self.settings: LocalSettings | None = None
        self.writes: list[str] = []
        self._state = TransactionState.ACTIVE
        self._keeper = keeper
        self._inner = inner
        self._entered = False

    def __repr__(self) -> str:
        kind = "savepoint" if self.nested else "transaction"
        return f"<{kind} {self.state.value}{f', ended at {self.ended_at}' if self.ended_at else ''}>"

    @property
    def state(self) -> TransactionState:
        """A `TransactionState`, readable after the end."""
        return self._state

    @property
    def is_active(self) -> bool:
        """Whether statements still go into it."""
        return self.state is TransactionState.ACTIVE

    def commit(self) -> None:
        """Flush what is pending and commit; release, for a savepoint. 1 round trip.

        Raises `TransactionAborted`, from the first error, when the server has given the transaction up already; it
        is rolled back then, and so it is when the flush or the COMMIT fails.
        """
        self.raise_unless_active()
        self._keeper.end_transaction(self, commit=True, ended_at=caller() if self._entered else None)

    def rollback(self) -> None:
        """Undo all of it, in the database and on the session's objects. 1 round trip; none if nothing was sent."""
        self.raise_unless_active()
        self._keeper.end_transaction(self, commit=False, ended_at=caller() if self._entered else None)

    def close(self) -> None:
        """Roll back if it is still open."""
        if self.is_active:
            self.rollback()

    def __enter__(self) -> Transaction:
        self.raise_unless_active()
        self._entered = True
        return self

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        ends_here = isinstance(error, Rollback) and error.ends(self)
        try:
            if not self.is_active:
                if ends_here and self.state is not TransactionState.ROLLED_BACK:
                    raise ended_error(self) from error
                return ends_here or None  # ended inside; another exception goes on
            if error is None:
                self._raise_if_left_too_early()
                self._keeper.end_transaction(self, commit=True)
                return None
            try:
                self._keeper.end_transaction(self, commit=False)
            except HooksFailed:
                if ends_here:
                    raise
                log.warning("hooks failed after %r", error, exc_info=True)
            except Exception:  # the user's error is the one to see; the connection has been closed
                log.warning("ROLLBACK failed after %r", error, exc_info=True)
            return ends_here or None
        finally:
            self._keeper.leave(self)

    def _raise_if_left_too_early(self) -> None:
        block = self._keeper.innermost_block()
        while block is not None and block is not self:
            if block.is_active and block.entered and block.whole is not self:
                still_open = repr(block)
                self._keeper.end_transaction(self, commit=False, ended_at=caller())
                raise TransactionOutOfOrder(
                    f"The block was left while {still_open}, begun within it, is open. Both were rolled back. Leave "
                    "blocks in the reverse order of entering them; a generator that holds one open has to be closed."
                )
            block = block.parent

    def ended(self, state: TransactionState, ended_at: str | None) -> None:
        """Told by its keeper, which ended it."""
        self._state = state
        self.ended_at = ended_at
        if self.settings is not None:
            self.settings.end()

    @property
    def inner(self) -> sa_orm.SessionTransaction:
        """SQLAlchemy's own object."""
        return self._inner

    @property
    def entered(self) -> bool:
        """Whether it is the object of a `with` block."""
        return self._entered

    def own_block(self) -> Transaction:
        """The block that a `Rollback` for this one ends."""
        return self

    def raise_unless_active(self) -> None:
        if not self.is_active:
            raise ended_error(self)


class Joined(Transaction):
    """What `transaction(savepoint=False)` returns inside: part of the block around it, whose state is its own."""

    def __init__(
        self, session: sa_orm.Session, inner: sa_orm.SessionTransaction, joined: Transaction | None, keeper: Keeper
    ) -> None:
        super().__init__(session, inner, joined, nested=False, keeper=keeper)
        self._joined = joined  # None: a transaction that no block began, as under writes_outside="begin"

    @property
    def state(self) -> TransactionState:
        return self._joined.state if self._joined is not None else self._state

    def own_block(self) -> Transaction:
        return self._joined.own_block() if self._joined is not None else self

    def commit(self) -> None:
        self.raise_unless_active()
        raise TransactionAlreadyBegun("This block joined the transaction around it, whose block commits it.")

    def rollback(self) -> None:
        """Undo the whole block that it joined."""
        self.raise_unless_active()
        if self._joined is not None:
            self._joined.rollback()
        else:
            self.session.rollback()
            self._state = TransactionState.ROLLED_BACK

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
        ends_here = self._joined is None and isinstance(error, Rollback) and error.ends(self)
        if ends_here and self.is_active:
            self.rollback()
        return ends_here or None


# What the keepers share, as functions of their innermost block.


def is_enclosed(innermost: Transaction | None) -> bool:
    """Inside: whether the outcome depends on a transaction around, other than that of a test's sandbox."""
    block = innermost
    while block is not None and block.is_sandbox:
        block = block.parent
    return block is not None or innermost is None


def after_leaving(block: Transaction, innermost: Transaction | None) -> Transaction | None:
    """The innermost block once `block` is left; the same where it was left already, with one around it."""
    found = innermost
    while found is not None and found is not block:
        found = found.parent
    return innermost if found is None else (block.whole or block).parent


def after_ending(
    block: Transaction, innermost: Transaction | None, state: TransactionState, ended_at: str | None
) -> Transaction | None:
    """Mark `block` and all in it; the innermost block then. One whose `with` is open stays until it is left."""
    inner = innermost
    while inner is not None:
        if inner.is_active:
            inner.ended(state, ended_at)
        if inner is block:
            break
        inner = inner.parent
    while innermost is not None and not innermost.is_active and not innermost.entered:
        innermost = innermost.parent
    return innermost


def ended_error(transaction: Transaction) -> TransactionEnded:
    where = f" at {transaction.ended_at}" if transaction.ended_at else ""
    kind = "savepoint" if transaction.nested else "transaction"
    return TransactionEnded(
        f"The {kind} of this block was {transaction.state.value}{where}; nothing more can run in the block. "
        "Leave the block, or begin another one after it."
    )

"""One block: a transaction or a savepoint, from `begin()` to its end."""

from __future__ import annotations

import enum
import logging
from types import TracebackType
from typing import TYPE_CHECKING

import sqlalchemy.orm as sa_orm

from ..errors import TransactionEnded
from .callers import caller

if TYPE_CHECKING:
    from .optin import OptInSession

__all__ = ["Transaction", "TransactionState"]

log = logging.getLogger("fictive.transaction")


class TransactionState(enum.Enum):
    """Where a transaction is in its life. Readable after its end."""

    ACTIVE = "active"
    COMMITTED = "committed"
    """Committed; of a savepoint: released, its fate is that of the transaction around it."""
    ROLLED_BACK = "rolled back"


class Transaction:
    """What `begin()`, `begin_nested()` and `transaction()` return: a context manager around atomic work.

    A block that ends normally commits (a savepoint: is released); an exception rolls back and comes out unchanged.
    Without `with`, `commit()` or `rollback()` end it. BEGIN goes with the first statement; a transaction of n
    statements is n + 1 round trips, and none without a statement.

    Not a `sqlalchemy.orm.SessionTransaction`, but has its `commit`, `rollback`, `close`, `is_active`, `nested`,
    `parent` and `session`.
    """

    def __init__(
        self, session: OptInSession, inner: sa_orm.SessionTransaction, parent: Transaction | None, *, nested: bool
    ) -> None:
        self.session = session
        self.parent = parent
        self.nested = nested
        self.state = TransactionState.ACTIVE
        self.ended_at: str | None = None
        """The line that ended the transaction before its block was left."""
        self.asked_for_savepoint = False
        """Begun by `begin_nested()` where there was no transaction to nest in."""
        self.whole: Transaction | None = None
        """The transaction that this savepoint was begun with, and ends with."""
        self.writes: list[str] = []
        self._inner = inner
        self._entered = False

    def __repr__(self) -> str:
        kind = "savepoint" if self.nested else "transaction"
        return f"<{kind} {self.state.value}{f', ended at {self.ended_at}' if self.ended_at else ''}>"

    @property
    def is_active(self) -> bool:
        """Whether statements still go into it."""
        return self.state is TransactionState.ACTIVE

    def commit(self) -> None:
        """Flush what is pending and commit; release, for a savepoint. 1 round trip.

        Raises `TransactionAborted`, from the first error, when the server has given the transaction up already; it
        is rolled back then, and so it is when the flush or the COMMIT fails.
        """
        self._raise_unless_active()
        self.session.end_transaction(self, commit=True, ended_at=caller() if self._entered else None)

    def rollback(self) -> None:
        """Undo all of it, in the database and on the session's objects. 1 round trip; none if nothing was sent."""
        self._raise_unless_active()
        self.session.end_transaction(self, commit=False, ended_at=caller() if self._entered else None)

    def close(self) -> None:
        """Roll back if it is still open."""
        if self.is_active:
            self.rollback()

    def __enter__(self) -> Transaction:
        self._raise_unless_active()
        self._entered = True
        return self

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if not self.is_active:
                return  # ended inside; an exception goes on
            if error is None:
                self.session.end_transaction(self, commit=True)
                return
            try:
                self.session.end_transaction(self, commit=False)
            except Exception:  # the user's error is the one to see; the connection has been closed
                log.warning("ROLLBACK failed after %r", error, exc_info=True)
        finally:
            self.session.leave(self)

    def ended(self, state: TransactionState, ended_at: str | None) -> None:
        """Told by the session, which ended it."""
        self.state = state
        self.ended_at = ended_at

    @property
    def inner(self) -> sa_orm.SessionTransaction:
        """SQLAlchemy's own object."""
        return self._inner

    @property
    def entered(self) -> bool:
        """Whether it is the object of a `with` block."""
        return self._entered

    def _raise_unless_active(self) -> None:
        if not self.is_active:
            raise ended_error(self)


def ended_error(transaction: Transaction) -> TransactionEnded:
    where = f" at {transaction.ended_at}" if transaction.ended_at else ""
    kind = "savepoint" if transaction.nested else "transaction"
    return TransactionEnded(
        f"The {kind} of this block was {transaction.state.value}{where}; nothing more can run in the block. "
        "Leave the block, or begin another one after it."
    )

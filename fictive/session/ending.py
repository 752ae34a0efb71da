"""How a block ends: committed, rolled back, given up by the server, or nobody knows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..drivers import NO_OPTIONS, TransactionStatus
from ..errors import CommitOutcomeUnknown, TransactionAborted
from . import private
from .callers import caller
from .engines import ABORTED, is_lost, status_of
from .hooks import Hook, HookKind, Hooks, check_hook, settles
from .remembered import RemembersWrites
from .transaction import Transaction, TransactionState, after_ending, after_leaving

__all__ = ["EndsBlocks"]

log = logging.getLogger("fictive.session")


class EndsBlocks(RemembersWrites):
    """The keeper of its blocks (`transaction.Keeper`), and who runs their hooks."""

    def innermost_block(self) -> Transaction | None:
        """The block that was begun last and not left, whether it is active or not."""
        return self._tx

    def _root_block(self) -> Transaction:
        assert self._tx is not None
        block = self._tx
        while block.parent is not None:
            block = block.parent
        return block

    @settles
    def end_transaction(self, block: Transaction, *, commit: bool, ended_at: str | None = None) -> None:
        """What `Transaction.commit()` and `rollback()` do; call those."""
        self._end(block, commit=commit, ended_at=ended_at, to_root=False)
        if block.whole is not None and block.whole.is_active:
            self._end(block.whole, commit=True, ended_at=ended_at, to_root=False)

    def leave(self, block: Transaction) -> None:
        """The block has been left; what was begun within it and never ended is ended with it."""
        self._tx = after_leaving(block, self._tx)

    def _end(self, block: Transaction, *, commit: bool, ended_at: str | None, to_root: bool) -> None:
        """End `block` and what is nested in it; with `to_root`, SQLAlchemy's root, under which the first block may be
        a savepoint (`writes_outside="begin"`)."""
        if commit:
            self._raise_if_aborted(block.inner, block, ended_at)
            try:
                self._end_settings(block)
                self._commit_by(super().commit if to_root else block.inner.commit)
            except BaseException as error:
                self._roll_back(block, to_root)
                in_doubt = isinstance(error, CommitOutcomeUnknown)
                self._ended(block, TransactionState.IN_DOUBT if in_doubt else TransactionState.ROLLED_BACK, ended_at)
                raise
            writes = [*self._committed_writes, *block.writes] if block.asked_for_savepoint else []
            self._ended(block, TransactionState.COMMITTED, ended_at)
            self._committed_writes += writes
        else:
            try:
                if to_root:
                    super().rollback()
                else:
                    block.inner.rollback()
            finally:
                self._ended(block, TransactionState.ROLLED_BACK, ended_at)

    def _end_settings(self, block: Transaction) -> None:
        """Put back what `block`, and blocks in it that nobody ended, had set: RELEASE would keep it."""
        inner = self._tx
        while inner is not None:
            if inner.settings is not None and inner.is_active:
                super().flush()
                inner.settings.end()
            if inner is block:
                break
            inner = inner.parent

    def _roll_back(self, block: Transaction, to_root: bool) -> None:
        """Roll back after an error, which is the one to see."""
        try:
            if to_root:
                super().rollback()
            elif block.inner in _chain(self.change_record()):
                block.inner.rollback()
        except Exception:
            log.warning("ROLLBACK failed", exc_info=True)

    def _ended(self, block: Transaction, state: TransactionState, ended_at: str | None) -> None:
        """Mark `block` and all blocks in it, and forget what was theirs."""
        self._tx = after_ending(block, self._tx, state, ended_at)
        if not block.nested or self.change_record() is None:
            self._forget()
            self._release_outlived_pins()
        elif state is TransactionState.ROLLED_BACK:
            self._first_error = None

    def _discard(self) -> None:
        """Roll everything back after an error outside, which is the one to see; the session works at once."""
        try:
            super().rollback()
        except Exception:
            log.warning("ROLLBACK failed", exc_info=True)
        self._first_write = self._first_error = None

    def _discard_blocks(self) -> None:
        for stream in list(self._streams or ()):
            stream.close()
        if self._tx is not None:
            self._ended(self._root_block(), TransactionState.ROLLED_BACK, caller())
        self._forget()

    def _forget(self) -> None:
        """A transaction ended: what was remembered for its messages goes."""
        self._options = NO_OPTIONS
        self._first_write = self._first_error = None
        self._committed_writes = []

    def _release_outlived_pins(self) -> None:
        while self._outlived_pins and not self._is_inside():
            self._outlived_pins.pop().release()

    # -- the outcome of a COMMIT --------------------------------------------------------------------------------------

    def _raise_if_aborted(
        self, inner: sa_orm.SessionTransaction | None, block: Transaction | None = None, ended_at: str | None = None
    ) -> None:
        """Raise `TransactionAborted`, rolled back, where a COMMIT would be answered with ROLLBACK."""
        root = super().get_transaction()
        if inner is None or root is None:
            return
        if inner.is_active:
            lost = any(map(is_lost, private.connections_of(root)))
            cause = self._first_error
        else:
            lost, cause = True, private.rollback_cause(inner) or self._first_error
        if not lost:
            return
        if block is None:
            self._discard()
        else:
            self._roll_back(block, to_root=False)
            self._ended(block, TransactionState.ROLLED_BACK, ended_at)
        raise TransactionAborted(ABORTED) from cause

    def _commit_by(self, commit: Callable[..., object], *args: object) -> None:
        """Commit by a function of SQLAlchemy's, and tell a COMMIT that failed from one whose answer never came."""
        self._commit_sent = False
        try:
            commit(*args)
        except sa.exc.DBAPIError as error:
            if self._commit_sent and error.connection_invalidated:
                if self._hooks is not None:
                    self._hooks.commit_in_doubt()
                raise CommitOutcomeUnknown(error) from error
            raise

    def commit_begins(self) -> None:
        """Told when COMMIT is about to be sent."""
        self._commit_sent = True

    def note_error(self, error: BaseException) -> None:
        """Told of each error on the transaction's connections; the first that lost it is kept for its message."""
        root = super().get_transaction()
        if self._first_error is not None or root is None:
            return
        if any(
            connection.invalidated or status_of(connection) is not TransactionStatus.IN_TRANSACTION
            for connection in private.connections_of(root)
        ):
            self._first_error = error

    # -- hooks ------------------------------------------------------------------------------------------------------

    def add_hook(self, kind: HookKind, fn: Hook) -> None:
        """What `fictive.sqlalchemy.on_commit` and `on_rollback` do; call those."""
        check_hook(fn)
        self._check_block()
        if self._is_inside():
            if self._hooks is None:
                self._hooks = Hooks(self, runs_itself=False)
            self._hooks.add(self, kind, fn)
        elif kind == "commit":
            fn()

    def run_hooks(self, error: BaseException | None) -> None:
        """Run the hooks of transactions that have ended. After `error`, which is the one to see, theirs are logged."""
        if self._hooks is None or not self._hooks.due:
            return
        block = self._tx
        while self._tx is not None and not self._tx.is_active:  # a hook is not part of the block that has ended
            self._tx = self._tx.parent
        try:
            if error is None:
                self._hooks.run_due()
            else:
                self._hooks.run_after(error)
        finally:
            self._tx = block


def _chain(transaction: sa_orm.SessionTransaction | None) -> Iterator[sa_orm.SessionTransaction]:
    while transaction is not None:
        yield transaction
        transaction = transaction.parent

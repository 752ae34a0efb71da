"""Blocks on a session of SQLAlchemy's own, which begins by itself with whatever it runs first."""

from __future__ import annotations

import contextlib
import logging

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy import event

from ..drivers import TransactionOptions
from ..errors import CommitOutcomeUnknown, TransactionAborted
from . import private
from .callers import caller
from .engines import ABORTED, is_aborted
from .hooks import Hooks
from .local_settings import LocalSettings, innermost
from .options import BlockOptions
from .transaction import Joined, Transaction, TransactionState, after_ending, after_leaving, is_enclosed

__all__ = ["PlainBlocks", "plain_blocks", "plain_hooks"]

log = logging.getLogger("fictive.session")

_BLOCKS = "fictive.blocks"
_HOOKS = "fictive.hooks"
_NO_OPTIONS = TransactionOptions()
# SQLAlchemy documentation, "Setting READ ONLY / DEFERRABLE" of the PostgreSQL dialect
_EXECUTION_OPTIONS = {
    "isolation_level": "isolation_level",
    "read_only": "postgresql_readonly",
    "deferrable": "postgresql_deferrable",
}


def plain_blocks(session: sa_orm.Session) -> PlainBlocks:
    """The keeper of a session's blocks; one for each session."""
    blocks: PlainBlocks | None = session.info.get(_BLOCKS)
    if blocks is None:
        blocks = session.info[_BLOCKS] = PlainBlocks(session)
    return blocks


def plain_hooks(session: sa_orm.Session) -> Hooks:
    """The hooks of a session; one object for each session."""
    hooks: Hooks | None = session.info.get(_HOOKS)
    if hooks is None:
        # a hook may begin a block, whose listeners cannot be added while SQLAlchemy goes through those that run hooks
        plain_blocks(session)
        hooks = session.info[_HOOKS] = Hooks(session, runs_itself=True)
    return hooks


class PlainBlocks:
    """Begins and ends the blocks of one session, and knows which are open."""

    def __init__(self, session: sa_orm.Session) -> None:
        self._session = session
        self._block: Transaction | None = None
        self._begun_with = _NO_OPTIONS
        self._ending = False
        self._committed: sa_orm.SessionTransaction | None = None
        event.listen(session, "after_commit", self._after_commit)
        event.listen(session, "after_transaction_end", self._after_transaction_end)

    def innermost_block(self) -> Transaction | None:
        return self._block

    def begin(self, options: BlockOptions) -> Transaction:
        """What `transaction()` does."""
        session = self._session
        if options.settings:
            options.check(session.get_bind().dialect)
        self._forget_ended()
        if not session.in_transaction():
            return self._with_settings(self._begin_whole(options.begin), options)
        options.check_inside(self._begun_with if self._block else _NO_OPTIONS, enclosed=is_enclosed(self._block))
        if options.savepoint:
            return self._with_settings(self._push(session.begin_nested(), nested=True), options)
        inner = innermost(session)
        assert inner is not None
        return self._with_settings(Joined(session, inner, self._block, self), options)

    def _begin_whole(self, options: TransactionOptions) -> Transaction:
        inner = self._session.begin()
        asked = {
            name: value for field, name in _EXECUTION_OPTIONS.items() if (value := getattr(options, field)) is not None
        }
        if asked:
            try:
                self._session.connection(execution_options=asked)
            except BaseException:
                inner.rollback()
                raise
        self._begun_with = options
        return self._push(inner, nested=False)

    def _push(self, inner: sa_orm.SessionTransaction, *, nested: bool) -> Transaction:
        self._block = Transaction(self._session, inner, self._block, nested=nested, keeper=self)
        return self._block

    def _with_settings(self, block: Transaction, options: BlockOptions) -> Transaction:
        if options.settings:
            # a session bound to a connection may be part of a transaction that is not its own
            whole = block.parent is None and not block.nested and isinstance(self._session.get_bind(), sa.Engine)
            block.settings = LocalSettings(self._session, options.settings, whole=whole)
            block.settings.begin()
        return block

    def end_transaction(self, block: Transaction, *, commit: bool, ended_at: str | None = None) -> None:
        """What `Transaction.commit()` and `rollback()` do; call those."""
        hooks: Hooks | None = self._session.info.get(_HOOKS)
        with hooks.held() if hooks is not None else contextlib.nullcontext():  # until the block knows its state
            self._ending = True
            try:
                if commit:
                    self._commit(block, ended_at)
                else:
                    self._roll_back(block, ended_at)
            finally:
                self._ending = False

    def _after_commit(self, session: sa_orm.Session) -> None:
        self._committed = innermost(session)

    def _after_transaction_end(self, session: sa_orm.Session, transaction: sa_orm.SessionTransaction) -> None:
        """`session.commit()`, `rollback()` or `close()` ended a block, or something around it."""
        committed, self._committed = self._committed is transaction, None
        block = self._block
        while block is not None and not self._ending:
            if block.inner is transaction and block.is_active:
                self._ended(block, TransactionState.COMMITTED if committed else TransactionState.ROLLED_BACK, caller())
                break
            block = block.parent

    def _commit(self, block: Transaction, ended_at: str | None) -> None:
        session, commit_sent = self._session, False
        root = sa_orm.Session.get_transaction(session)
        try:
            if root is not None and any(map(is_aborted, private.connections_of(root))):
                raise TransactionAborted(ABORTED)
            session.flush()
            if block.settings is not None:
                block.settings.end()
            commit_sent = block.inner is root
            block.inner.commit()
        except BaseException as error:
            self._roll_back_after_error(block)
            if commit_sent and isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated:
                self._ended(block, TransactionState.IN_DOUBT, ended_at)
                raise CommitOutcomeUnknown(error) from error
            self._ended(block, TransactionState.ROLLED_BACK, ended_at)
            raise
        self._ended(block, TransactionState.COMMITTED, ended_at)

    def _roll_back(self, block: Transaction, ended_at: str | None) -> None:
        try:
            block.inner.rollback()
        finally:
            self._ended(block, TransactionState.ROLLED_BACK, ended_at)

    def _roll_back_after_error(self, block: Transaction) -> None:
        """Roll back after an error, which is the one to see."""
        try:
            block.inner.rollback()
        except Exception:
            log.warning("ROLLBACK failed", exc_info=True)

    def _ended(self, block: Transaction, state: TransactionState, ended_at: str | None) -> None:
        self._block = after_ending(block, self._block, state, ended_at)

    def leave(self, block: Transaction) -> None:
        """The block has been left."""
        self._block = after_leaving(block, self._block)

    def _forget_ended(self) -> None:
        """Blocks that have ended and were not left yet: what begins now is not part of them."""
        while self._block is not None and not self._block.is_active:
            self._block = self._block.parent

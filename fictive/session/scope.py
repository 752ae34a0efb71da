"""What an opt-in session decides: what a statement outside a transaction may do, and what it does to the session."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from ..config import Settings, UnsavedChanges, WritesOutside
from ..connection.classify import Effect, StatementClass, classify_with, summary
from ..connection.engines import prepare
from ..connection.link import Link, LinkOwner, SessionConnection
from ..connection.pool import BorrowingPool
from ..connection.pooler import refusal
from ..connection.replicas import Positions, note_position, positions_of
from ..errors import TransactionRequired
from ..report.watcher import WATCHER
from . import private
from .callers import caller
from .transaction import Kind, Transaction
from .write_log import WriteLog

if TYPE_CHECKING:
    from types import CodeType

    from .session import OptInSession

__all__ = ["EMPTY", "Scope", "implicit", "needs_a_transaction", "refused"]

EMPTY: Mapping[str, Any] = {}

log = logging.getLogger("fictive.session")
log_writes = logging.getLogger("fictive.writes_outside")
_told: weakref.WeakSet[sa.Engine] = weakref.WeakSet()
_reported: set[str] = set()


class Scope(LinkOwner):
    """The part of a session that its connection objects know."""

    def __init__(
        self,
        session: OptInSession,
        settings: Settings,
        mode: WritesOutside,
        unsaved_changes: UnsavedChanges,
        retries: bool,
    ) -> None:
        self.settings = settings
        self._session = weakref.ref(session)
        self.mode = mode
        self.unsaved_changes = unsaved_changes
        self.retries = retries
        self.keeps = self.reports = False
        self.lent: list[sa.Connection] = []
        """Connections of somebody else's that the session is bound to."""
        self.is_special = False
        """Whether `execute` has to look at a statement before it is compiled."""
        self.connections: dict[sa.Engine, SessionConnection] = {}
        self.committed_writes = WriteLog()
        self.added: dict[Any, tuple[CodeType, int]] = {}
        """By state, where objects were added since the last flush."""
        self.stale: list[tuple[Any, str | None]] | None = None
        """What a flush has made stale: states, with the attribute, or None for all."""
        self.skipped: set[tuple[Any, str | None]] = set()
        """Collections with pending changes that a statement has made stale. The next flush writes these."""
        self.orphans: list[Any] = []
        """New objects that were taken out of the session since the last flush."""

    def connection(self, engine: sa.Engine) -> SessionConnection:
        """The session's connection object for an engine, made once; anew where SQLAlchemy has invalidated it."""
        found = self.connections.get(engine)
        if found is None or found._dbapi_connection is None:
            pool = engine.pool
            if pool.__class__ is not BorrowingPool or not pool.is_prepared:
                prepare(engine)
            lost = found
            found = self.connections[engine] = SessionConnection(engine, self)
            if found.link.replicas is not None:
                for replica in found.link.replicas.members:
                    prepare(replica.engine)
            session = self._session()
            # `info` is made when it is first asked for: a session without one has no watcher
            if session is not None and "info" in session.__dict__ and WATCHER in session.info:
                from ..connection.watched import watch  # not before there is one

                watch(found.link, session.info[WATCHER])
            if lost is not None and self.keeps:
                found.link.kept = lost.link.kept  # so that a pinned connection is not replaced in silence
            elif lost is not None:
                lost.link.let_go()
        return found

    def abandon_transactions(self, error: BaseException) -> None:
        """After an interrupt: close the connections of transactions that are over for SQLAlchemy."""
        for connection in self.connections.values():
            if connection.link.in_transaction and not connection.in_transaction():
                connection.link.end(error)

    # -- asked by the connection object -------------------------------------------------------------------------------

    def judge(self, link: Link | sa.Connection, statement: StatementClass, query: Any, parameters: Any) -> str | None:
        options = self.statement_options
        if options or statement.bound_flags:
            statement = classify_with(statement, parameters, options)
        if statement.is_plain_read:
            return None
        if self.mode is WritesOutside.BEGIN:
            self.begin_lasting(link.engine if isinstance(link, Link) else link)
            return None
        if statement.transaction_only:
            raise needs_a_transaction(statement.transaction_only)
        if statement.connection_state and not self.keeps:
            if isinstance(link, Link) and link.is_pooled:
                raise refusal(statement.connection_state)
            raise TransactionRequired(
                f"{statement.connection_state} changes the connection, which goes back to the pool after the "
                "statement. Put it in `with db.pinned():`, which keeps one connection and undoes what was set, or let "
                "it through with execution_options(fictive_outside=True)."
            )
        if statement.effect is Effect.READ:
            return None
        if self.mode is WritesOutside.REFUSE:
            raise refused(summary(query))
        return summary(query) if statement.effect is Effect.WRITE else "a function that may write"

    def wrote(self, what: str) -> None:
        self.committed_writes.note(what)

    def positions(self) -> Positions:
        session = self._session()
        return positions_of({} if session is None else session.info)

    def wrote_up_to(self, engine: sa.Engine, position: int | None) -> None:
        session = self._session()
        if session is not None:
            note_position(session.info, engine, position)

    def short_transaction(self, engine: sa.Engine) -> contextlib.AbstractContextManager[None]:
        session = self._session()
        assert session is not None
        if engine not in _told and self.connection(engine).link.begin_is_heard():
            _told.add(engine)
            log.info(
                "Somebody listens to the beginning of transactions on %r or in its sessions: each statement outside a "
                "transaction runs in a short one of its own; those in one begin() share it. Settings that "
                "@db.local_settings gives cost no round trip.",
                engine.url,
            )
        return implicit(session, engine=engine)

    def tell_begun(self, connection: SessionConnection) -> None:
        session = self._session()
        if session is None:
            return
        aside, session._transaction = session._transaction, None
        try:
            transaction = session._autobegin_t(begin=True)
            transaction.kind = Kind.IMPLICIT  # type: ignore[attr-defined]
            try:
                session.dispatch.after_begin(session, transaction, connection)
            finally:
                transaction.close()
        finally:
            session._transaction = aside

    def begin_lasting(self, engine: sa.Engine | sa.Connection | None = None) -> Transaction:
        """Begin the transaction that a first write opens (`writes_outside="begin"`)."""
        session = self._session()
        assert session is not None
        transaction = session._autobegin_t()
        assert isinstance(transaction, Transaction)
        transaction.kind = Kind.LASTING
        transaction.begun_at = transaction.begun_at or caller()
        if self.reports:
            self.report_write()
        if engine is not None:
            session._connection_for_bind(engine)
        return transaction

    def report_write(self) -> None:
        """Log the line of a write outside a transaction, once for each line (`writes_outside="report"`)."""
        line = caller()
        if line not in _reported:
            _reported.add(line)
            log_writes.warning("a write outside a transaction at %s; put what belongs together in begin()", line)


@contextlib.contextmanager
def implicit(session: OptInSession, what: str | None = None, *, engine: sa.Engine | None = None) -> Iterator[None]:
    """A transaction for the body, committed with it. What is pending in the session stays as it is, either way.

    `what` is remembered as written; `engine`: the one on whose connection a statement is about to be sent.
    """
    aside, session._transaction = session._transaction, None
    try:
        transaction = session._autobegin_t(begin=True)
        assert isinstance(transaction, Transaction)
        transaction.kind = Kind.IMPLICIT
        try:
            if engine is not None:
                session._connection_for_bind(engine)
            yield
            private.commit_as_is(session, transaction)
        except BaseException:
            try:
                transaction.close()
            except Exception:
                log.warning("ROLLBACK failed", exc_info=True)
            raise
    finally:
        if session._transaction is None:
            session._transaction = aside
    if what is not None:
        session._fictive.wrote(what)


def needs_a_transaction(part: str) -> TransactionRequired:
    if part in ("BEGIN", "START TRANSACTION", "COMMIT", "END", "ROLLBACK", "ABORT", "SAVEPOINT", "RELEASE SAVEPOINT"):
        instead = "`with db.session.begin_nested():`" if "SAVEPOINT" in part else "`with db.session.begin():`"
        return TransactionRequired(
            f"{part} as text does not change the session's transaction: each statement goes to a connection of its "
            f"own. Use {instead} instead: begin() begins, the end of its block commits, an exception rolls back."
        )
    return TransactionRequired(
        f"{part} has an effect only within a transaction, and none is open. Put it in "
        "`with db.session.begin():`, or let it run alone with "
        "execution_options(fictive_outside=True)."
    )


def refused(what: str) -> TransactionRequired:
    return TransactionRequired(
        f'{what} outside a transaction, where writes are refused (writes_outside = "refuse"). Put it in '
        "`with db.session.begin():`."
    )

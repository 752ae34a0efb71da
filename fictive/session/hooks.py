"""`on_commit` and `on_rollback`: functions that run once the outcome of a transaction is known.

SQLAlchemy's `after_commit` and `after_rollback` fire for savepoints too, and while the connection is still out. Here
the hooks are kept with SQLAlchemy's own object for the transaction or savepoint they were registered in:
`after_transaction_end` comes exactly once for each, however it ends, and `after_commit` before it for those that
committed. A savepoint that was released hands its hooks on to what is around it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy import event

from ..errors import HooksFailed
from . import private
from .local_settings import innermost

__all__ = ["Hook", "HookKind", "Hooks", "check_hook", "settles"]

log = logging.getLogger("fictive.hooks")

Hook = Callable[[], object]
HookKind = Literal["commit", "rollback"]
_Method = TypeVar("_Method", bound=Callable[..., Any])


def check_hook(fn: object) -> None:
    """Raise `TypeError` for what cannot be called, or would only make a coroutine when called."""
    if not callable(fn):
        raise TypeError(f"a hook is a function without arguments, not {fn!r}.")
    if inspect.iscoroutinefunction(fn):
        raise TypeError(f"{fn!r} is a coroutine function, and nobody would await it. Start the task in a function.")


class Hooks:
    """The hooks of one session."""

    def __init__(self, session: sa_orm.Session, *, runs_itself: bool) -> None:
        """`runs_itself`: run what is due as soon as SQLAlchemy is done; the opt-in session calls `run_due`."""
        self.due: list[Hook] = []
        self._registered: dict[sa_orm.SessionTransaction, list[tuple[HookKind, Hook]]] = {}
        self._committed: sa_orm.SessionTransaction | None = None
        self._in_doubt = False
        self._commit_tried = False
        self._watched: list[Any] = []  # the driver's connections that the transaction has
        self._held = False
        event.listen(session, "after_commit", self._after_commit)
        event.listen(session, "after_transaction_end", self._after_transaction_end)
        if runs_itself:
            event.listen(session, "before_commit", self._before_commit)
            event.listen(session, "after_begin", self._after_begin)
            event.listen(session, "after_rollback", self._after_rollback)
            event.listen(session, "after_soft_rollback", self._after_soft_rollback)
        self._runs_itself = runs_itself

    def add(self, session: sa_orm.Session, kind: HookKind, fn: Hook) -> None:
        """Within a transaction: keep `fn` for its end."""
        transaction = innermost(session)
        while transaction is not None and not (transaction.nested or transaction.parent is None):
            transaction = transaction.parent  # that of a flush
        assert transaction is not None
        self._registered.setdefault(transaction, []).append((kind, fn))

    def commit_in_doubt(self) -> None:
        """The answer to COMMIT never came: neither kind of hook may claim to know."""
        self._in_doubt = True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Do not run by itself what becomes due in the block, but after it."""
        self._held = True
        try:
            yield
        except BaseException as error:
            self._held = False
            self.run_after(error)
            raise
        self._held = False
        self.run_due()

    def run_after(self, error: BaseException) -> None:
        """Run what is due after `error`, which is the one to see: failures of hooks are logged."""
        try:
            self.run_due()
        except HooksFailed:
            log.warning("hooks failed after %r", error, exc_info=True)

    def run_due(self) -> None:
        """Run what is due, all of it; then raise `HooksFailed` if any of it raised."""
        due, self.due = self.due, []
        failures: list[Exception] = []
        interrupt: BaseException | None = None
        for fn in due:
            try:
                fn()
            except Exception as error:
                failures.append(error)
            except BaseException as error:
                interrupt = interrupt or error
        failed = HooksFailed(f"{len(failures)} of {len(due)} hooks failed", failures) if failures else None
        if interrupt is not None:
            raise interrupt from failed
        if failed is not None:
            raise failed from failures[0]

    # -- what SQLAlchemy tells ---------------------------------------------------------------------------------------

    # A plain session does not say which COMMIT was lost on its way: its connection is closed afterwards.

    def _before_commit(self, session: sa_orm.Session) -> None:
        transaction = innermost(session)
        if transaction is not None and transaction.parent is None and self._registered:
            self._commit_tried = True
            for connection in private.connections_of(transaction):
                self._after_begin(session, transaction, connection)

    def _after_begin(
        self, session: sa_orm.Session, transaction: sa_orm.SessionTransaction, connection: sa.Connection
    ) -> None:
        if not connection.invalidated:
            self._watched.append(connection.connection.dbapi_connection)

    def _after_commit(self, session: sa_orm.Session) -> None:
        self._committed = innermost(session)

    def _after_rollback(self, session: sa_orm.Session) -> None:
        transaction = innermost(session)
        if transaction is not None and not any(each.invalidated for each in private.connections_of(transaction)):
            self._commit_tried = False

    def _after_transaction_end(self, session: sa_orm.Session, transaction: sa_orm.SessionTransaction) -> None:
        if not (transaction.nested or transaction.parent is None):
            return
        committed = transaction is self._committed
        self._committed = None
        found = self._registered.pop(transaction, ())
        if transaction.nested and committed:
            if found and transaction.parent is not None:
                self._registered.setdefault(transaction.parent, []).extend(found)
            return
        if transaction.parent is None:
            lost = self._commit_tried and any(getattr(each, "closed", 0) for each in self._watched)
            in_doubt = not committed and (self._in_doubt or lost)
            self._in_doubt = self._commit_tried = False
            self._watched = []
            if in_doubt and found:
                log.warning("the outcome of a COMMIT is unknown: %d hooks were not run", len(found))
                found = ()
        kind = "commit" if committed else "rollback"
        self.due += [fn for registered, fn in found if registered == kind]
        if self._runs_itself and transaction.parent is None:
            self._run_by_itself(session)

    def _after_soft_rollback(self, session: sa_orm.Session, transaction: sa_orm.SessionTransaction) -> None:
        self._run_by_itself(session)

    def _run_by_itself(self, session: sa_orm.Session) -> None:
        if self.due and not self._held:
            with private.past_ended_blocks(session):
                self.run_due()


def settles(method: _Method) -> _Method:
    """Let a method of the opt-in session, at the end of which a transaction may have ended, run the hooks then."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = method(self, *args, **kwargs)
        except BaseException as error:
            self.run_hooks(error)
            raise
        self.run_hooks(None)
        return result

    return run  # type: ignore[return-value]

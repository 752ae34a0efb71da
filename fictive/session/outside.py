"""How a statement runs: alone outside, in the transaction inside."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import sqlalchemy as sa

from ..errors import TransactionRequired
from . import private
from .connections import TakesConnections
from .leases import Lease, StreamLease
from .state import EMPTY
from .statements import PLAIN_READ, Effect, Nature, nature_of, summary

__all__ = ["Executes"]

log = logging.getLogger("fictive.session")

_T = TypeVar("_T")


class Executes(TakesConnections):
    """Sees what a statement does before it is sent, and sends it the way that is safe for it."""

    def execute(
        self,
        statement: Any,
        params: Any = None,
        *,
        execution_options: Mapping[str, Any] = EMPTY,
        **kwargs: Any,
    ) -> sa.Result[Any]:
        """Run a statement as `sqlalchemy.orm.Session.execute` does; outside, in one round trip and nothing around it.

        Two execution options, for one statement: `fictive_writes=True` or `False` says whether it writes, where that
        cannot be seen (a function in `text()`); `fictive_outside=True` lets one through that otherwise raises
        `TransactionRequired`.
        """

        def run(statement: Any, params: Any) -> Any:
            return super(Executes, self).execute(statement, params, execution_options=execution_options, **kwargs)

        return self._run(run, statement, params, execution_options)

    def scalar(
        self,
        statement: Any,
        params: Any = None,
        *,
        execution_options: Mapping[str, Any] = EMPTY,
        **kwargs: Any,
    ) -> Any:
        """The first column of the first row, or None. As `execute`."""

        def run(statement: Any, params: Any) -> Any:
            return super(Executes, self).scalar(statement, params, execution_options=execution_options, **kwargs)

        return self._run(run, statement, params, execution_options, returns_result=False)

    def scalars(self, statement: Any, params: Any = None, **kwargs: Any) -> sa.ScalarResult[Any]:
        """The first column of all rows. As `execute`."""
        return self.execute(statement, params, **kwargs).scalars()

    def refresh(self, instance: object, attribute_names: Any = None, with_for_update: Any = None) -> None:
        """As SQLAlchemy's. `with_for_update` outside raises before the object's state is touched."""
        if with_for_update and not self._is_inside() and not self._mode.stays_open:
            self._refuse_outside(None, Nature(transaction_only="FOR UPDATE / FOR SHARE"))
        super().refresh(instance, attribute_names, with_for_update)

    def may_autoflush(self) -> bool:
        return self._is_inside() and not self._own

    def _run(
        self,
        run: Callable[[Any, Any], _T],
        statement: Any,
        params: Any,
        execution_options: Mapping[str, Any],
        *,
        returns_result: bool = True,
    ) -> _T:
        self._check_block()
        if self._is_inside():
            return self._run_inside(run, statement, params)

        options = execution_options
        own = statement.get_execution_options() if isinstance(statement, sa.Executable) else EMPTY
        if own or self._session_options:
            options = {**self._session_options, **own, **execution_options}
        nature = nature_of(statement, params)
        if (says := options.get("fictive_writes")) is not None:
            nature = Nature(Effect.WRITE if says else Effect.READ, nature.transaction_only, nature.connection_state)
        if options.get("fictive_outside"):
            nature = Nature(nature.effect)
        elif nature is not PLAIN_READ and nature != PLAIN_READ:
            if self._mode.stays_open:
                with self.lasting_transaction():
                    return run(statement, params)
            self._refuse_outside(statement, nature)
        streaming = options.get("stream_results") or options.get("yield_per") or private.yields_per(execution_options)
        if streaming and nature.effect is not Effect.WRITE:
            if not returns_result:  # scalar(): the first value, and the rest is let go
                return self.execute(statement, params, execution_options=execution_options).scalar()  # type: ignore[return-value]
            return self._run_streaming(run, statement, params)
        if (single := private.as_single_insert(statement, params)) is not None:
            statement, params = single, None
        if nature.effect is Effect.READ and self._retry_reads:
            return self._run_read(run, statement, params, returns_result)
        if nature.effect is Effect.READ:
            return self._run_bare(run, statement, params, returns_result, reads=True)
        if _is_several(statement, params):
            result = self._run_atomically(run, statement, params, returns_result)
        else:
            result = self._run_bare(run, statement, params, returns_result)
        if not _changed_nothing(statement, result):
            self._remember_write(summary(statement) if nature.effect is Effect.WRITE else "a function that may write")
        return result

    def _refuse_outside(self, statement: Any, nature: Nature) -> None:
        """Raise for what has no effect, or one that stays behind in the pool, outside. Nothing has been sent."""
        if nature.transaction_only:
            raise TransactionRequired(
                f"{nature.transaction_only} has an effect only within a transaction, and none is open. Put it in "
                "`with db.session.begin():`, or run it alone all the same with "
                "execution_options(fictive_outside=True)."
            )
        if nature.connection_state and self._pins is None:
            raise TransactionRequired(
                f"{nature.connection_state} changes the connection, which goes back to the pool after the statement. "
                "Put it in `with db.pinned():`, which keeps one connection and undoes what was set, or run it all "
                "the same with execution_options(fictive_outside=True)."
            )
        if nature.effect is Effect.WRITE:
            self._mode.check_statement(statement)

    def _run_bare(
        self, run: Callable[[Any, Any], _T], statement: Any, params: Any, returns_result: bool, *, reads: bool = False
    ) -> _T:
        """The statement alone: one round trip, and the connection is back in the pool on return."""
        if self._lease is not None:  # caused by a statement that has a connection already
            result = run(statement, params)
            if returns_result:
                private.buffer(result)
            return result
        lease = self._lease = Lease(self._streams or () if reads else ())
        failed = True
        try:
            result = run(statement, params)
            if returns_result:
                private.buffer(result)
            failed = False
            return result
        finally:
            self._lease = None
            lease.release(failed=failed)

    def _run_read(self, run: Callable[[Any, Any], _T], statement: Any, params: Any, returns_result: bool) -> _T:
        """A read alone, once more on another connection when its own was lost: it has changed nothing."""
        try:
            return self._run_bare(run, statement, params, returns_result, reads=True)
        except sa.exc.DBAPIError as error:
            if not error.connection_invalidated or self._lease is not None or self._pins is not None:
                raise
            log.info("the connection was lost; running the read again")
        return self._run_bare(run, statement, params, returns_result, reads=True)

    def _run_streaming(self, run: Callable[[Any, Any], _T], statement: Any, params: Any) -> _T:
        """The statement in a transaction that lasts as long as its result is read."""
        if self._pins is not None:
            raise TransactionRequired(
                "yield_per and stream_results need a transaction, and in pinned() only you can begin it: "
                "`with db.pinned(), db.session.begin():`."
            )
        outer, lease = self._lease, StreamLease()
        self._lease = lease
        try:
            result = run(statement, params)
        except BaseException:
            lease.release(failed=True)
            raise
        finally:
            self._lease = outer
        if (stream := lease.hand_over(result)) is not None:
            if self._streams is None:
                self._streams = weakref.WeakSet()
            self._streams.add(stream)
        lease.release(failed=False)
        return result

    def _run_inside(self, run: Callable[[Any, Any], _T], statement: Any, params: Any) -> _T:
        """The statement in the transaction. The first one may be run again: it has done nothing that is committed."""
        self._note_in_block(statement, params)
        root = super().get_transaction()
        first = root is not None and not private.connections_of(root) and self._retry_reads
        try:
            return run(statement, params)
        except sa.exc.DBAPIError as error:
            if not first or not error.connection_invalidated or self._pins or self.get_transaction() is not root:
                raise
            assert root is not None
            if not root.is_active or self.in_nested_transaction():
                raise
            log.info("the connection was lost; running the first statement of the transaction again")
            private.drop_connections(root)
            self._first_error = None
        return run(statement, params)

    # -- in a transaction without a block ---------------------------------------------------------------------------

    def together(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Let the statements of the block succeed or fail as one, for functions that take several.

        Inside they are part of the open transaction. Outside, `writes_outside` decides: they get a transaction of
        their own, or the one that stays open, or `TransactionRequired`, which names `what`. Changes pending in the
        session are not flushed by it.
        """
        self._check_block()
        return contextlib.nullcontext() if self._is_inside() else self._mode.together(self, what)

    @contextlib.contextmanager
    def own_transaction(self, what: str) -> Iterator[None]:
        """A transaction for the body, committed with it."""
        with self._transaction_of_its_own():
            yield
        self._remember_write(what)

    def _run_atomically(self, run: Callable[[Any, Any], _T], statement: Any, params: Any, returns_result: bool) -> _T:
        """The statement in a transaction of its own. What is pending in the session stays as it is, either way."""
        with self._transaction_of_its_own():
            result = run(statement, params)
            if returns_result:
                private.buffer(result)
        return result

    @contextlib.contextmanager
    def _transaction_of_its_own(self) -> Iterator[None]:
        try:
            with self._alone():
                yield
        except BaseException as error:
            self.run_hooks(error)
            raise
        self.run_hooks(None)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with self.change_record_aside() as record:
            self._own = True
            try:
                yield
                self._commit_by(private.commit_as_is, self, record)
            except BaseException:
                try:
                    record.close()
                except Exception:
                    log.warning("ROLLBACK failed", exc_info=True)
                raise
            finally:
                self._own = False

    @contextlib.contextmanager
    def lasting_transaction(self) -> Iterator[None]:
        """A transaction that the body begins, and that stays open after it (`writes_outside="begin"`)."""
        self.begin_lasting()
        try:
            yield
        except BaseException as error:
            self._discard()  # nothing but this body was in it
            self.run_hooks(error)
            raise


def _is_several(statement: Any, params: Any) -> bool:
    """Whether a write may be sent as more than one statement, so that it needs a transaction to be atomic."""
    if params and not isinstance(params, Mapping):
        return True
    if not private.is_orm_dml(statement):
        return False
    if isinstance(statement, sa.Insert):
        return bool(params)
    return False


def _changed_nothing(statement: Any, result: Any) -> bool:
    """Whether a DML statement met no row, so that there is nothing that could stay."""
    cursor = private.cursor_result(result) if isinstance(statement, sa.UpdateBase) else None
    return cursor is not None and cursor.rowcount == 0

"""The session: statements stand alone, and a transaction is where the code says so."""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy import event

from ..config import Settings, UnsavedChanges, WritesOutside, choice, flag
from ..drivers import NO_OPTIONS, TransactionOptions, TransactionStatus, driver_for
from ..errors import (
    AlreadyCommittedWarning,
    CommitOutcomeUnknown,
    ConfigurationError,
    TransactionAborted,
    TransactionAlreadyBegun,
    TransactionRequired,
    UnsavedChangesError,
    UnsavedChangesWarning,
)
from . import private
from .callers import caller, stack_level
from .engines import ABORTED, is_lost, listen_to, prepare, status_of
from .hooks import Hook, HookKind, Hooks, check_hook, settles
from .leases import Lease, Pins, Stream, StreamLease
from .local_settings import LocalSettings
from .options import BlockOptions, block_options
from .statements import PLAIN_READ, Effect, Nature, nature_of, summary
from .transaction import (
    Joined,
    Transaction,
    TransactionState,
    after_ending,
    after_leaving,
    ended_error,
    is_enclosed,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import TransactionArguments

__all__ = ["OptInSession", "check_options"]

log = logging.getLogger("fictive.session")

_T = TypeVar("_T")
_DEFAULTS = Settings()
_EMPTY: Mapping[str, Any] = {}
_REMEMBERED_WRITES = 20
_TOGETHER = (
    '. Put what belongs together in `with db.session.begin():`, or set FICTIVE_WRITES_OUTSIDE = "begin"; a function '
    "that only reads can say so with execution_options(fictive_writes=False)."
)


class OptInSession(private.JointedSession):
    """A `sqlalchemy.orm.Session` without the transaction that nobody asked for.

    *Outside* a transaction each statement is one round trip on a connection that is back in the pool when the call
    returns; a flush, and whatever else takes several statements, is atomic in a transaction of its own. *Inside*, from
    `begin()` to the end of its block, it is SQLAlchemy's session. Loaded objects stay attached either way.

    Takes the arguments of `sqlalchemy.orm.Session`, and:

    `writes_outside`
        what a write outside does: `"commit"` (default), `"begin"` or `"refuse"`; see `fictive.config.WritesOutside`.
    `unsaved_changes`
        what happens to changes no one wrote by the end of a `with` block or an app context: `"warn"` (default),
        `"error"` or `"ignore"`.
    `retry_reads`
        whether a statement that met a lost connection is run again, once, where it can have done nothing: a read
        outside, the first statement of a transaction. On by default.

    `autoflush` and `expire_on_commit` are off by default; on under `writes_outside="begin"`, as in SQLAlchemy.
    Not for use by several threads at once, as any session.
    """

    def __init__(
        self,
        *args: Any,
        writes_outside: WritesOutside | str | None = None,
        unsaved_changes: UnsavedChanges | str | None = None,
        retry_reads: bool | None = None,
        **kwargs: Any,
    ) -> None:
        check_options(kwargs)
        self._given_autoflush: bool | None = kwargs.pop("autoflush", None)
        self._given_expire_on_commit: bool | None = kwargs.pop("expire_on_commit", None)
        self._tx: Transaction | None = None  # innermost block, open or ended but not yet left
        self._own = False  # a flush, commit or statement of several parts runs in a transaction of its own
        self._lease: Lease | None = None  # of the statement outside that is under way
        self._pins: Pins | None = None
        self._outlived_pins: list[Pins] = []
        self._streams: weakref.WeakSet[Stream] | None = None
        self._options = NO_OPTIONS  # for the next BEGIN
        self._first_write: str | None = None
        self._first_error: BaseException | None = None
        self._commit_sent = False
        self._committed_writes: list[str] = []
        self._prepared: sa.Engine | None = None  # the last one found prepared
        self._hooks: Hooks | None = None
        settings = self.default_settings()
        self._writes = settings.writes_outside
        self._unsaved_changes = settings.unsaved_changes
        self._retry_reads = settings.retry_reads
        if writes_outside is not None:
            self._writes = choice(WritesOutside, writes_outside, "writes_outside")
        if unsaved_changes is not None:
            self.unsaved_changes = unsaved_changes
        if retry_reads is not None:
            self._retry_reads = flag(retry_reads, "retry_reads")
        super().__init__(*args, **kwargs)
        # the session has execution options from SQLAlchemy 2.1 on
        self._session_options: Mapping[str, Any] = getattr(self, "execution_options", None) or _EMPTY
        self._apply_defaults()

    def default_settings(self) -> Settings:
        """The settings of a session that is not told otherwise; those of the app, in a Flask app."""
        return _DEFAULTS

    # -- settings ---------------------------------------------------------------------------------------------------

    @property
    def writes_outside(self) -> WritesOutside:
        """What a write outside does. Assigning a member or its value changes it for this session."""
        return self._writes

    @writes_outside.setter
    def writes_outside(self, value: WritesOutside | str) -> None:
        mode = choice(WritesOutside, value, "writes_outside")
        if self._is_inside():
            raise TransactionAlreadyBegun("writes_outside cannot change within a transaction; end it first.")
        self._writes = mode
        self._apply_defaults()

    @property
    def unsaved_changes(self) -> UnsavedChanges:
        """What happens to changes no one wrote by the end of the context. Assigning changes it for this session."""
        return self._unsaved_changes

    @unsaved_changes.setter
    def unsaved_changes(self, value: UnsavedChanges | str) -> None:
        self._unsaved_changes = choice(UnsavedChanges, value, "unsaved_changes")

    def _apply_defaults(self) -> None:
        plain = self._writes is WritesOutside.BEGIN
        self.autoflush = plain if self._given_autoflush is None else self._given_autoflush
        self.expire_on_commit = plain if self._given_expire_on_commit is None else self._given_expire_on_commit

    # -- state ------------------------------------------------------------------------------------------------------

    def _is_inside(self) -> bool:
        return (
            self._own
            or (self._tx is not None and self._tx.state is TransactionState.ACTIVE)
            or (self._writes is WritesOutside.BEGIN and self.change_record() is not None)
        )

    def in_transaction(self) -> bool:
        """Whether a transaction is open: from `begin()` to its end, whether or not anything was sent yet."""
        return self._is_inside()

    def get_transaction(self) -> sa_orm.SessionTransaction | None:
        """SQLAlchemy's object for the open transaction; None outside."""
        return super().get_transaction() if self._is_inside() else None

    def _check_block(self) -> None:
        if self._tx is not None and self._tx.state is not TransactionState.ACTIVE and not self._own:
            raise ended_error(self._tx)
        if self._first_error is not None and self._ended_behind_the_back():
            raise TransactionAborted(ABORTED) from self._first_error

    def _ended_behind_the_back(self) -> bool:
        """Whether an error ended the transaction on a database where the next statement would then stand alone."""
        root = super().get_transaction()
        return root is not None and any(
            is_lost(connection) and status_of(connection) is TransactionStatus.IDLE
            for connection in private.connections_of(root)
        )

    # -- statements -------------------------------------------------------------------------------------------------

    def execute(
        self,
        statement: Any,
        params: Any = None,
        *,
        execution_options: Mapping[str, Any] = _EMPTY,
        **kwargs: Any,
    ) -> sa.Result[Any]:
        """Run a statement as `sqlalchemy.orm.Session.execute` does; outside, in one round trip and nothing around it.

        Two execution options, for one statement: `fictive_writes=True` or `False` says whether it writes, where that
        cannot be seen (a function in `text()`); `fictive_outside=True` lets one through that otherwise raises
        `TransactionRequired`.
        """

        def run(statement: Any, params: Any) -> Any:
            return super(OptInSession, self).execute(statement, params, execution_options=execution_options, **kwargs)

        return self._run(run, statement, params, execution_options)

    def scalar(
        self,
        statement: Any,
        params: Any = None,
        *,
        execution_options: Mapping[str, Any] = _EMPTY,
        **kwargs: Any,
    ) -> Any:
        """The first column of the first row, or None. As `execute`."""

        def run(statement: Any, params: Any) -> Any:
            return super(OptInSession, self).scalar(statement, params, execution_options=execution_options, **kwargs)

        return self._run(run, statement, params, execution_options, returns_result=False)

    def scalars(self, statement: Any, params: Any = None, **kwargs: Any) -> sa.ScalarResult[Any]:
        """The first column of all rows. As `execute`."""
        return self.execute(statement, params, **kwargs).scalars()

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
        own = statement.get_execution_options() if isinstance(statement, sa.Executable) else _EMPTY
        if own or self._session_options:
            options = {**self._session_options, **own, **execution_options}
        nature = nature_of(statement, params)
        if (says := options.get("fictive_writes")) is not None:
            nature = Nature(Effect.WRITE if says else Effect.READ, nature.transaction_only, nature.connection_state)
        if options.get("fictive_outside"):
            nature = Nature(nature.effect)
        elif nature is not PLAIN_READ and nature != PLAIN_READ:
            if self._writes is WritesOutside.BEGIN:
                return self._run_and_stay(run, statement, params)
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
        if nature.effect is Effect.WRITE and self._writes is WritesOutside.REFUSE:
            raise TransactionRequired(_refused(summary(statement)))

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

    def _run_read(self, run: Callable[[Any, Any], _T], statement: Any, params: Any, returns_result: bool) -> _T:
        """A read alone, once more on another connection when its own was lost: it has changed nothing."""
        try:
            return self._run_bare(run, statement, params, returns_result, reads=True)
        except sa.exc.DBAPIError as error:
            if not error.connection_invalidated or self._lease is not None or self._pins is not None:
                raise
            log.info("the connection was lost; running the read again")
        return self._run_bare(run, statement, params, returns_result, reads=True)

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

    def _run_atomically(self, run: Callable[[Any, Any], _T], statement: Any, params: Any, returns_result: bool) -> _T:
        """The statement in a transaction of its own. What is pending in the session stays as it is, either way."""
        with self._transaction_of_its_own():
            result = run(statement, params)
            if returns_result:
                private.buffer(result)
        return result

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Let the statements of the block succeed or fail as one, for functions that take several.

        Inside they are part of the open transaction. Outside, `writes_outside` decides: they get a transaction of
        their own, or the one that stays open, or `TransactionRequired`, which names `what`. Changes pending in the
        session are not flushed by it.
        """
        self._check_block()
        if self._is_inside():
            yield
        elif self._writes is WritesOutside.REFUSE:
            raise TransactionRequired(_refused(what))
        elif self._writes is WritesOutside.BEGIN:
            self._first_write = caller()
            self.open_change_record()
            try:
                yield
            except BaseException:
                self._discard()  # nothing but this block was in it
                raise
        else:
            with self._transaction_of_its_own():
                yield
            self._remember_write(what)

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

    @settles
    def _run_and_stay(self, run: Callable[[Any, Any], _T], statement: Any, params: Any) -> _T:
        """The statement begins a transaction that stays open (`writes_outside="begin"`)."""
        self._first_write = caller()
        self.open_change_record()
        try:
            return run(statement, params)
        except BaseException:
            self._discard()  # nothing but this statement was in it
            raise

    def connection(self, bind_arguments: Any = None, execution_options: Any = None) -> sa.Connection:
        """The transaction's connection; in `pinned()`, the pinned one.

        Outside raises `TransactionRequired`: there is no connection that the session keeps. For a connection of your
        own there is `db.engine.connect()`.
        """
        self._check_block()
        if not self._is_inside() and self._pins is None:
            if self._writes is not WritesOutside.BEGIN:
                raise TransactionRequired(
                    "session.connection() outside a transaction: the session keeps no connection. Call it within "
                    "`with db.session.begin():` or `with db.pinned():`, or use db.engine.connect()."
                )
            self._first_write = caller()
            self.open_change_record()
        return super().connection(bind_arguments=bind_arguments, execution_options=execution_options)

    def refresh(self, instance: object, attribute_names: Any = None, with_for_update: Any = None) -> None:
        """As SQLAlchemy's. `with_for_update` outside raises before the object's state is touched."""
        if with_for_update and not self._is_inside() and self._writes is not WritesOutside.BEGIN:
            self._refuse_outside(None, Nature(transaction_only="FOR UPDATE / FOR SHARE"))
        super().refresh(instance, attribute_names, with_for_update)

    def get_bind(self, *args: Any, **kwargs: Any) -> sa.Engine | sa.Connection:
        """The engine, as SQLAlchemy's session has it; in `pinned()`, the pinned connection."""
        bind = super().get_bind(*args, **kwargs)
        if isinstance(bind, sa.Engine):
            if bind is not self._prepared:
                prepare(bind)
                self._prepared = bind
            if self._pins is not None:
                return self._pins.pin(bind)
        return bind

    # -- writing ----------------------------------------------------------------------------------------------------

    def flush(self, objects: Any = None) -> None:
        """Write what is pending. Inside: in the transaction. Outside: in one of its own, all or nothing."""
        if self.flushing or self._own:
            super().flush(*_given(objects))
            return
        self._check_block()
        if self._is_inside():
            self._note_in_block(None, None)
            try:
                super().flush(*_given(objects))
            except BaseException as error:
                self.note_error(error)
                raise
            return
        if self.is_clean():
            return
        writes = self._pending_writes()
        if self._writes is WritesOutside.REFUSE:
            raise TransactionRequired(_refused(writes))
        if self._writes is WritesOutside.BEGIN:  # pending from before the mode was changed
            self._first_write = caller()
            self.open_change_record()
            super().flush(*_given(objects))
            return
        self._flush_alone(objects)
        self._remember_write(writes)

    @settles
    def _flush_alone(self, objects: Any) -> None:
        self._own = True
        try:
            record = self.open_change_record()
            try:
                super().flush(*_given(objects))
                self._commit_by(private.commit_as_is, self, record)
            except BaseException:
                self._discard()
                raise
        finally:
            self._own = False

    @settles
    def commit(self) -> None:
        """Inside: flush and commit, ending the block. Outside: flush what is pending in one transaction, if anything.

        Outside with nothing pending it sends nothing.
        """
        self._check_block()
        if self._tx is not None:
            self._end(self._root_block(), commit=True, ended_at=caller(), to_root=True)
            return
        if self._writes is WritesOutside.BEGIN:
            self._raise_if_aborted(super().get_transaction())
            self._commit_by(super().commit)
            self._forget()
            self._release_outlived_pins()
            return
        if self._writes is WritesOutside.REFUSE and not self.is_clean():
            raise TransactionRequired(_refused(self._pending_writes()))
        self._own = True
        try:
            self._commit_by(super().commit)
        except BaseException:
            self._discard()
            raise
        finally:
            self._own = False
        self._forget()

    @settles
    def rollback(self) -> None:
        """Inside: undo the transaction, ending the block. Outside: discard what is pending; sends nothing.

        Outside under `writes_outside="commit"` it warns with `AlreadyCommittedWarning` of writes since the last
        commit that it can no longer undo.
        """
        if self._tx is not None:
            if self._tx.is_active:
                self._end(self._root_block(), commit=False, ended_at=caller(), to_root=True)
            return
        if self.change_record() is None and (self._writes is WritesOutside.BEGIN or not self.is_clean()):
            self.open_change_record()
        writes = self._committed_writes
        self._forget()
        super().rollback()
        self._release_outlived_pins()
        if writes:
            warnings.warn(
                AlreadyCommittedWarning(
                    "rollback() outside a transaction cannot undo what was committed at once: "
                    + "; ".join(writes)
                    + _TOGETHER
                ),
                stacklevel=stack_level(),
            )

    def bulk_save_objects(self, objects: Iterable[object], *args: Any, **kwargs: Any) -> None:
        """As SQLAlchemy's; outside, all or nothing in a transaction of its own."""
        self._bulk(
            lambda: super(OptInSession, self).bulk_save_objects(objects, *args, **kwargs), "bulk_save_objects()"
        )

    def bulk_insert_mappings(self, mapper: Any, *args: Any, **kwargs: Any) -> None:
        """As SQLAlchemy's; outside, all or nothing in a transaction of its own."""
        self._bulk(
            lambda: super(OptInSession, self).bulk_insert_mappings(mapper, *args, **kwargs), "bulk_insert_mappings()"
        )

    def bulk_update_mappings(self, mapper: Any, *args: Any, **kwargs: Any) -> None:
        """As SQLAlchemy's; outside, all or nothing in a transaction of its own."""
        self._bulk(
            lambda: super(OptInSession, self).bulk_update_mappings(mapper, *args, **kwargs), "bulk_update_mappings()"
        )

    def _bulk(self, run: Callable[[], None], name: str) -> None:
        self._check_block()
        if self._is_inside():
            run()
        elif self._writes is WritesOutside.REFUSE:
            raise TransactionRequired(_refused(name))
        elif self._writes is WritesOutside.BEGIN:
            self._run_and_stay(lambda *_: run(), None, None)
        else:
            self._run_atomically(lambda *_: run(), None, None, returns_result=False)
            self._remember_write(name)

    def _pending_writes(self) -> str:
        parts = []
        for verb, objects in (("INSERT", self.new), ("UPDATE", self.dirty), ("DELETE", self.deleted)):
            for name, count in Counter(type(obj).__name__ for obj in objects).items():
                parts.append(f"{verb} of {count} {name}")
        return ", ".join(parts) or "nothing"

    def _note_in_block(self, statement: Any, params: Any) -> None:
        """Remember a write in a block that asked for a savepoint and, being outside, got a transaction."""
        block = self._tx
        while block is not None and not block.asked_for_savepoint:
            block = block.parent
        if block is None or len(block.writes) >= _REMEMBERED_WRITES:
            return
        if statement is None:
            if not self.is_clean():
                block.writes.append(f"{self._pending_writes()} ({caller()})")
        elif nature_of(statement, params).effect is not Effect.READ:
            block.writes.append(f"{summary(statement)} ({caller()})")

    def _remember_write(self, what: str) -> None:
        if len(self._committed_writes) < _REMEMBERED_WRITES:
            self._committed_writes.append(f"{what} ({caller()})")

    # -- transactions -----------------------------------------------------------------------------------------------

    def begin(self, nested: bool = False) -> Transaction:  # type: ignore[override]
        """Begin a transaction: `with session.begin():` commits at the end of the block, or rolls back on an exception.

        What was changed before on the session's objects is part of it. Sends nothing until the first statement.
        Raises `TransactionAlreadyBegun` inside.
        """
        if nested:
            return self.begin_nested()
        return self._begin(NO_OPTIONS)

    def begin_nested(self) -> Transaction:  # type: ignore[override]
        """Inside: a savepoint. Outside: a transaction of its own, which ends with its block.

        Under `writes_outside="begin"`, outside: a savepoint in a transaction that stays open, as in SQLAlchemy.
        """
        self._check_block()
        if not self._is_inside():
            if self._writes is not WritesOutside.BEGIN:
                return self._begin_alone()
            self._first_write = caller()
            self.open_change_record()
        return self._push(super().begin(nested=True), nested=True)

    def _begin_alone(self) -> Transaction:
        """The transaction that `begin_nested()` is outside."""
        whole = self.begin()
        whole.asked_for_savepoint = True
        if not self._joins_a_transaction():
            return whole
        savepoint = self._push(super().begin(nested=True), nested=True)
        savepoint.whole = whole
        return savepoint

    def _joins_a_transaction(self) -> bool:
        """Whether the session is bound to a connection in a transaction of somebody else's (SQLAlchemy documentation,
        "Joining a Session into an External Transaction")."""
        try:
            bind = self.get_bind()
        except sa.exc.UnboundExecutionError:
            return False
        return isinstance(bind, sa.Connection) and bind.in_transaction()

    def transaction(self, **arguments: Unpack[TransactionArguments]) -> Transaction:
        """A transaction outside, a savepoint inside: for code that must be atomic wherever it is called from.

        It is begun at once. `fictive.sqlalchemy.transaction` has the arguments, and is a decorator as well.
        """
        options = block_options(**arguments)
        self._check_block()
        if options.settings:
            options.check(self.get_bind().dialect)
        if not self._is_inside():
            return self._with_settings(self._begin(options.begin), options)
        options.check_inside(self._options, enclosed=is_enclosed(self._tx))
        if options.savepoint:
            return self._with_settings(self.begin_nested(), options)
        record = self.change_record()
        assert record is not None
        return self._with_settings(Joined(self, record, self._tx, self), options)

    def _with_settings(self, block: Transaction, options: BlockOptions) -> Transaction:
        if options.settings:
            whole = block.parent is None and not block.nested and not self._joins_a_transaction()
            block.settings = LocalSettings(self, options.settings, whole=whole)
            block.settings.begin()
        return block

    def _begin(self, options: TransactionOptions) -> Transaction:
        self._check_block()
        if self._is_inside():
            raise TransactionAlreadyBegun(
                "A transaction is open already"
                + (f", begun by the write at {self._first_write}" if self._tx is None and self._first_write else "")
                + ". For a savepoint in it call begin_nested(); transaction() begins outside, a savepoint inside."
            )
        if options:
            self._check_options(options)
        self._options = options
        record = self.change_record()
        return self._push(super().begin() if record is None else record, nested=False)

    def _check_options(self, options: TransactionOptions) -> None:
        dialect = self.get_bind().dialect
        driver = driver_for(dialect)
        if not driver.has_options:
            driver.refuse_options(options, dialect)
        known = [level for level in dialect.get_isolation_level_values(None) if level != "AUTOCOMMIT"]  # type: ignore[arg-type]
        if options.isolation_level is not None and options.isolation_level not in known:
            raise ConfigurationError(
                f"isolation_level={options.isolation_level!r}: expected one of {', '.join(known)}."
            )

    def _push(self, inner: sa_orm.SessionTransaction, *, nested: bool) -> Transaction:
        self._tx = Transaction(self, inner, self._tx, nested=nested, keeper=self)
        return self._tx

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

    def _forget(self) -> None:
        """A transaction ended: what was remembered for its messages goes."""
        self._options = NO_OPTIONS
        self._first_write = self._first_error = None
        self._committed_writes = []

    def _discard(self) -> None:
        """Roll everything back after an error outside, which is the one to see; the session works at once."""
        try:
            super().rollback()
        except Exception:
            log.warning("ROLLBACK failed", exc_info=True)
        self._first_write = self._first_error = None

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

    @contextlib.contextmanager
    def pinned(self) -> Iterator[OptInSession]:
        """Keep one connection for the block: for temporary tables, `SET`, session-level locks.

        Statements still stand alone, and `begin()` works, all on that connection. At the end it is closed, so that
        nothing set through it reaches anyone else; the price is one reconnect. In a `pinned()` block it changes
        nothing; inside a transaction it raises `TransactionAlreadyBegun`.
        """
        if self._pins is not None:
            yield self
            return
        if self._is_inside():
            raise TransactionAlreadyBegun("pinned() goes around begin(), not inside; a transaction has its own.")
        pins = self._pins = Pins()
        try:
            yield self
        finally:
            self._pins = None
            if self._tx is not None:  # a block that was begun in here and never ended
                self._discard_blocks()
                self._discard()
            if pins and self._is_inside():  # a transaction that goes on: it keeps its connection to its end
                self._outlived_pins.append(pins)
            else:
                pins.release()

    def _release_outlived_pins(self) -> None:
        while self._outlived_pins and not self._is_inside():
            self._outlived_pins.pop().release()

    # -- the end of the context ---------------------------------------------------------------------------------------

    def unsaved(self) -> list[str]:
        """What is new, changed or deleted and not written, a few words for each object. Sends nothing."""
        found = [f"{_name(obj)} (new)" for obj in self.new]
        found += [f"{_name(obj)} (deleted)" for obj in self.deleted]
        for obj in self.dirty:
            if self.is_modified(obj):
                changed = [attr.key for attr in sa.inspect(obj).attrs if attr.history.has_changes()]
                found.append(f"{_name(obj)} (changed: {', '.join(changed)})")
        return found

    def report_unsaved(self) -> None:
        """Warn of, or raise for, changes that are about to be lost, as `unsaved_changes` says."""
        if self.unsaved_changes is UnsavedChanges.IGNORE or self.is_clean():
            return
        found = self.unsaved()
        if not found:
            return
        shown = ", ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "")
        message = f"The context ends with changes that no one wrote, and they are lost: {shown}."
        if self.unsaved_changes is UnsavedChanges.ERROR:
            raise UnsavedChangesError(message)
        warnings.warn(UnsavedChangesWarning(message), stacklevel=stack_level())

    def report_committed(self) -> None:
        """Warn of writes that stay although their context ended with an error."""
        if self._committed_writes:
            warnings.warn(
                AlreadyCommittedWarning(
                    "The context ended with an error, after these were committed at once: "
                    + "; ".join(self._committed_writes)
                    + _TOGETHER
                ),
                stacklevel=stack_level(),
            )

    @settles
    def close(self) -> None:
        """Give back whatever is held; an open transaction is rolled back. Changes not written are dropped."""
        self._discard_blocks()
        super().close()
        self._release_outlived_pins()

    @settles
    def reset(self) -> None:
        """As `close()`, for a session that goes on."""
        self._discard_blocks()
        super().reset()
        self._release_outlived_pins()

    @settles
    def invalidate(self) -> None:
        """As `close()`, closing the connections of an open transaction for good."""
        self._discard_blocks()
        super().invalidate()
        self._release_outlived_pins()

    def _discard_blocks(self) -> None:
        for stream in list(self._streams or ()):
            stream.close()
        if self._tx is not None:
            self._ended(self._root_block(), TransactionState.ROLLED_BACK, caller())
        self._forget()

    def __exit__(self, type_: Any, value: Any, traceback: Any) -> None:
        try:
            if type_ is None:
                self.report_unsaved()
            else:
                self.report_committed()
        finally:
            self.close()

    # -- what SQLAlchemy asks -----------------------------------------------------------------------------------------

    def bare_connection(self, bind: sa.Engine | sa.Connection) -> sa.Connection | None:
        if self._is_inside():
            return None
        if self._pins is not None and bind in self._pins:
            assert isinstance(bind, sa.Connection)
            return bind
        return self._lease.connection(bind) if self._lease is not None else None

    def may_autoflush(self) -> bool:
        return self._is_inside() and not self._own

    def changes_begin(self) -> None:
        if self._writes is WritesOutside.BEGIN and self._first_write is None:
            self._first_write = caller()

    def transaction_begins(self, connection: sa.Connection) -> None:
        """Told when the transaction takes a connection; nothing has been sent on it."""
        driver_for(connection.dialect).enter_transaction(connection, self._options)
        if self._own and private.streams(
            connection.engine
        ):  # SQLAlchemy would declare a cursor for INSERT .. RETURNING
            connection.execution_options(stream_results=False, yield_per=None)
        listen_to(connection, self)


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` for options of a session that cannot work; they may come from a sessionmaker."""
    if options.get("autobegin") is False:
        raise ConfigurationError(
            "autobegin=False cannot be combined with the opt-in session: nothing begins by itself here, and "
            "SQLAlchemy's record of changes needs it. Leave the option out."
        )
    if options.get("execution_options") and private.is_autocommit(options["execution_options"]):
        raise ConfigurationError(
            "execution_options={'isolation_level': 'AUTOCOMMIT'} would leave begin() without a transaction. "
            "Leave it out: outside begin() the session runs statements in autocommit by itself."
        )
    for name, kind in (("writes_outside", WritesOutside), ("unsaved_changes", UnsavedChanges)):
        if options.get(name) is not None:
            choice(kind, options[name], name)
    if options.get("retry_reads") is not None:
        flag(options["retry_reads"], "retry_reads")


def _after_begin(session: sa_orm.Session, transaction: sa_orm.SessionTransaction, connection: sa.Connection) -> None:
    if transaction.parent is None:
        assert isinstance(session, OptInSession)
        session.transaction_begins(connection)


event.listen(OptInSession, "after_begin", _after_begin)


def _is_several(statement: Any, params: Any) -> bool:
    """Whether a write may be sent as more than one statement, so that it needs a transaction to be atomic."""
    if params and not isinstance(params, Mapping):
        return True
    if not private.is_orm_dml(statement):
        return False
    if isinstance(statement, sa.Insert):
        return bool(params)
    return False


def _chain(transaction: sa_orm.SessionTransaction | None) -> Iterator[sa_orm.SessionTransaction]:
    while transaction is not None:
        yield transaction
        transaction = transaction.parent


def _given(objects: Any) -> tuple[Any, ...]:
    return () if objects is None else (objects,)  # naming it is deprecated from SQLAlchemy 2.1 on


def _refused(what: str) -> str:
    return (
        f'{what} outside a transaction, where writes are refused (writes_outside = "refuse"). Put it in '
        "`with db.session.begin():`."
    )


def _name(obj: object) -> str:
    identity = sa.inspect(obj).identity
    return type(obj).__name__ + (f" {', '.join(map(str, identity))}" if identity else "")

"""The session: statements stand alone, and a transaction is where the code says so."""

from __future__ import annotations

import contextlib
import inspect
import logging
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.orm.attributes import instance_state

from ..config import Settings, UnsavedChanges, WritesOutside, choice, flag, nearest
from ..connection.classify import classify
from ..connection.pooler import direct_engine
from ..connection.replicas import reads_for_write
from ..connection.statement_settings import SettingsFunction, SettingsSource, set_on_foreign
from ..drivers import NO_OPTIONS, TransactionOptions, driver_for
from ..errors import (
    ConfigurationError,
    TransactionAlreadyBegun,
    TransactionRequired,
    UnknownOption,
    UnsavedChangesError,
    UnsavedChangesWarning,
)
from . import private
from .callers import caller, find_caller, stack_level
from .local_settings import LocalSettings
from .options import BlockOptions, block_options, refuse_options_of_begin
from .private import ACTIVE, CLOSED
from .reading import IdentityMap, load_numbers, prepared_get
from .scope import EMPTY, Scope, implicit, needs_a_transaction, refused
from .transaction import Joined, Kind, Transaction, drop_left, ended_error, innermost, is_enclosed
from .unentered import needs_with
from .write_log import WriteLog, pending_writes, warn_of_committed
from .written import expire_stale, note_orphan, note_written
from .written_by_statement import expire_written, expire_written_in_bulk

if TYPE_CHECKING:
    from typing_extensions import Never, Self, Unpack

    from .options import TransactionArguments

__all__ = ["OptInSession", "atomic", "check_options", "has_block", "report_committed", "report_unsaved"]

log = logging.getLogger("fictive.session")
log_unsaved = logging.getLogger("fictive.unsaved")

_DEFAULTS = Settings()
_SIMPLE_KEYS = frozenset({int, str, uuid.UUID})
_OWN = frozenset({"writes_outside", "unsaved_changes", "retry_reads", "local_settings"})
_HARMLESS = frozenset({"bind", "binds", "db", "autoflush", "expire_on_commit", "info", "query_cls"})
_KNOWN = _OWN | set(inspect.signature(sa_orm.Session.__init__).parameters) | {"class_"}


class OptInSession(sa_orm.Session):
    """A `sqlalchemy.orm.Session` that runs statements in autocommit unless `begin()` opens a transaction.

    In autocommit each statement is one round trip on a connection that is back in the pool when the call returns; a
    flush, and each other method that takes several statements, is atomic in a transaction of its own. In a
    transaction, from `begin()` to the end of its block, it behaves as SQLAlchemy's session. Loaded objects stay
    attached in both modes.

    Takes the arguments of `sqlalchemy.orm.Session`, and:

    `writes_outside`
        what a write in autocommit does: `"commit"` (default), `"begin"`, `"report"` or `"refuse"`; see
        `WritesOutside`.
    `unsaved_changes`
        what happens when a `with` block or an app context ends with unsaved changes: `"warn"` (default), `"error"` or
        `"ignore"`.
    `retry_reads`
        whether a statement that met a lost connection is run again, once, where it cannot have had an effect: a read
        in autocommit, the first statement of a transaction. On by default.
    `local_settings`
        a function that returns PostgreSQL settings for the statement that runs, `{"app.tenant": "7"}`; see
        `OptInTransactionMixin.local_settings`.

    `autoflush` and `expire_on_commit` are off by default; on under `writes_outside="begin"`, as in SQLAlchemy.
    As with any session, only one thread may use it at a time.
    """

    def __init__(
        self,
        *args: Any,
        writes_outside: WritesOutside | str | None = None,
        unsaved_changes: UnsavedChanges | str | None = None,
        retry_reads: bool | None = None,
        local_settings: SettingsSource | SettingsFunction | None = None,
        **kwargs: Any,
    ) -> None:
        for name in kwargs:
            if name not in _HARMLESS:
                check_options(kwargs)
                break
        self._given_defaults = kwargs.pop("autoflush", None), kwargs.pop("expire_on_commit", None)
        settings = self._fictive_settings()
        mode, unsaved, retries = settings.writes_outside, settings.unsaved_changes, settings.retry_reads
        if writes_outside is not None:
            mode = choice(WritesOutside, writes_outside, "writes_outside")
        if unsaved_changes is not None:
            unsaved = choice(UnsavedChanges, unsaved_changes, "unsaved_changes")
        if retry_reads is not None:
            retries = flag(retry_reads, "retry_reads")
        reports = mode is WritesOutside.REPORT
        if reports:
            mode = WritesOutside.BEGIN
        scope = self._fictive = Scope(self, settings, mode, unsaved, retries)
        scope.reports = reports
        if local_settings is not None:
            if not isinstance(local_settings, SettingsSource):
                local_settings = SettingsSource(local_settings)
            scope.local_settings = local_settings
        super().__init__(*args, **kwargs)
        scope.dispatch = self.dispatch
        if "binds" in kwargs or (self.bind is not None and isinstance(self.bind, sa.Connection)):
            scope.lent = [
                bind for bind in (self.bind, *(kwargs.get("binds") or {}).values()) if isinstance(bind, sa.Connection)
            ]
            scope.is_special = bool(scope.lent)
        if getattr(self, "execution_options", None):  # of the session, from SQLAlchemy 2.1 on
            scope.is_special = True
        if self._given_defaults != (None, None) or mode is WritesOutside.BEGIN:
            self._apply_defaults(mode)
        else:
            self.autoflush = self.expire_on_commit = False

    def _fictive_place(self) -> str:
        """Where the session is used, for log records: the request, in a Flask app."""
        return ""

    def _fictive_settings(self) -> Settings:
        """The settings of a session that is not told otherwise; those of the app, in a Flask app."""
        return _DEFAULTS

    def _apply_defaults(self, mode: WritesOutside) -> None:
        plain = mode is WritesOutside.BEGIN
        autoflush, expire_on_commit = self._given_defaults
        self.autoflush = plain if autoflush is None else autoflush
        self.expire_on_commit = plain if expire_on_commit is None else expire_on_commit

    @property
    def writes_outside(self) -> WritesOutside:
        """What a write in autocommit does. Assigning a member or its value changes it for this session."""
        return WritesOutside.REPORT if self._fictive.reports else self._fictive.mode

    @writes_outside.setter
    def writes_outside(self, value: WritesOutside | str) -> None:
        mode = choice(WritesOutside, value, "writes_outside")
        if self.in_transaction():
            raise TransactionAlreadyBegun("writes_outside cannot change within a transaction; end it first.")
        self._fictive.reports = mode is WritesOutside.REPORT
        if self._fictive.reports:
            mode = WritesOutside.BEGIN
        self._fictive.mode = mode
        if self._transaction is not None:
            self._transaction.kind = Kind.LASTING if mode is WritesOutside.BEGIN else Kind.RECORD  # type: ignore[attr-defined]
        self._apply_defaults(mode)

    @property
    def unsaved_changes(self) -> UnsavedChanges:
        """What happens when the context ends with unsaved changes. Assigning changes it for this session."""
        return self._fictive.unsaved_changes

    @unsaved_changes.setter
    def unsaved_changes(self, value: UnsavedChanges | str) -> None:
        self._fictive.unsaved_changes = choice(UnsavedChanges, value, "unsaved_changes")

    # -- whether a transaction is open ------------------------------------------------------------------------------

    def in_transaction(self) -> bool:
        """Whether a transaction is open: from `begin()` to its end, whether or not anything was sent yet."""
        return not self._is_outside()

    def get_transaction(self) -> Transaction | None:
        """The open transaction, or None."""
        return None if self._is_outside() else super().get_transaction()  # type: ignore[return-value]

    def _is_outside(self) -> bool:
        transaction = self._transaction
        while transaction is not None and transaction._parent is not None:
            transaction = transaction._parent
        return transaction is None or transaction.kind is Kind.RECORD  # type: ignore[attr-defined]

    def _raise_if_ended(self) -> None:
        """Within a `with` block whose transaction has ended nothing can run. (After a failed flush SQLAlchemy itself
        raises `PendingRollbackError`.)"""
        block = self._trans_context_manager
        if block is not None and block is not self._transaction and not block._transaction_is_active():
            drop_left(self)
            if self._trans_context_manager is block:
                raise ended_error(block)  # type: ignore[arg-type]
            self._raise_if_ended()

    # -- where SQLAlchemy would take a transaction for granted ------------------------------------------------------

    def _autobegin_t(self, begin: bool = False) -> sa_orm.SessionTransaction:
        if self._transaction is not None:
            return self._transaction
        if self._trans_context_manager is not None:
            self._raise_if_ended()
        lasts = self._fictive.mode is WritesOutside.BEGIN
        kind = Kind.BLOCK if begin else Kind.LASTING if lasts else Kind.RECORD
        transaction = Transaction(self, private.origin(self, begin), kind)
        if self.identity_map._dict:
            transaction.began_before_load = next(load_numbers)
        if kind is Kind.LASTING:
            transaction.begun_at = caller()
        return transaction

    def _autoflush(self) -> None:
        transaction: Any = self._transaction
        while transaction is not None and transaction._parent is not None:
            transaction = transaction._parent
        if transaction is None:
            # what is pending, and was not written by the transaction that ended, is a first write
            if self._fictive.mode is WritesOutside.BEGIN:
                super()._autoflush()
        elif transaction.kind is not Kind.RECORD and transaction.kind is not Kind.IMPLICIT:
            super()._autoflush()

    def _connection_for_bind(self, engine: Any, execution_options: Any = None, **kwargs: Any) -> sa.Connection:
        transaction: Any = self._transaction
        block: Any = self._trans_context_manager
        if block is not None and block._state is not ACTIVE:
            self._raise_if_ended()
        if transaction is not None and (transaction._parent is not None or transaction.kind is not Kind.RECORD):
            return transaction._connection_for_bind(engine, execution_options)  # type: ignore[no-any-return]
        try:
            found = self._fictive.connections[engine]
        except KeyError:
            return engine if isinstance(engine, sa.Connection) else self._fictive.connection(engine)
        return self._fictive.connection(engine) if found._dbapi_connection is None else found

    def connection(self, bind_arguments: Any = None, execution_options: Any = None) -> sa.Connection:
        """The transaction's connection; in `pinned()`, the pinned one.

        In autocommit raises `TransactionRequired`: the session keeps no connection then. For a connection of your
        own there is `db.engine.connect()`.
        """
        self._raise_if_ended()
        scope = self._fictive
        if self._is_outside() and not scope.keeps:
            if scope.mode is not WritesOutside.BEGIN:
                raise TransactionRequired(
                    "session.connection() outside a transaction: the session keeps no connection. Call it within "
                    "`with db.session.begin():` or `with db.pinned():`, or use db.engine.connect()."
                )
            scope.begin_lasting()
        return super().connection(bind_arguments=bind_arguments, execution_options=execution_options)

    # -- statements -------------------------------------------------------------------------------------------------

    def execute(
        self,
        statement: Any,
        params: Any = None,
        *,
        execution_options: Mapping[str, Any] = EMPTY,
        **kwargs: Any,
    ) -> sa.Result[Any]:
        """Run a statement as `sqlalchemy.orm.Session.execute` does; in autocommit one round trip.

        Three execution options, for one statement: `fictive_writes=True` or `False` says whether it writes, where that
        cannot be seen (a function in `text()`); `fictive_outside=True` lets one through that otherwise raises
        `TransactionRequired`; `fictive_primary=True` reads on the primary, where there are replicas.
        """
        try:
            locks = statement._for_update_arg
        except AttributeError:
            locks = None
        if locks is not None:
            self._check_lock(kwargs.get("bind_arguments"))
        try:
            own, is_dml, is_select = statement._execution_options, statement.is_dml, statement.is_select
        except AttributeError:
            own, is_dml, is_select = None, False, False
        if is_dml and self._transaction is not None:
            self._flush_before(statement)
        if not is_select and self._nested_transaction is not None:
            private.note_savepoint_write(self)
        if (
            (params and not is_select)
            or self._fictive.is_special
            or (own and ("fictive_writes" in own or "fictive_outside" in own or "fictive_primary" in own))
            or (execution_options and not private.OPTIONS.isdisjoint(execution_options))
        ):
            result = self._execute_specially(statement, params, execution_options, kwargs)
        elif not self.identity_map._dict:
            return super().execute(statement, params, execution_options=execution_options, **kwargs)
        else:
            result = self._execute_renewing(statement, execution_options, kwargs, params)
        if is_dml and self.identity_map._dict:
            expire_written(self, statement, params, execution_options)
        return result  # type: ignore[no-any-return]

    def _flush_before(self, statement: Any) -> None:
        """In a transaction of the code's: write what is pending before an ORM UPDATE or DELETE, which loses it."""
        root: Any = super().get_transaction()  # one that only records too, which ours passes over
        if root is None or root.kind in (Kind.RECORD, Kind.IMPLICIT) or isinstance(statement, sa.Insert):
            return
        if private.is_orm_dml(statement) and not self._flushing and not self._is_clean():
            self.flush()

    def _check_lock(self, bind_arguments: Any) -> None:
        """FOR UPDATE has an effect only in a transaction; SQLite's SQL does not even show it."""
        if self._is_outside() and self._fictive.mode is not WritesOutside.BEGIN:
            self._raise_if_ended()
            if self.get_bind(**(bind_arguments or {})).dialect.name == "sqlite":
                raise needs_a_transaction("FOR UPDATE / FOR SHARE")

    def _execute_renewing(self, statement: Any, options: Mapping[str, Any], kwargs: Any, params: Any = None) -> Any:
        """A statement whose rows renew the objects that are in the session (contract A33): in autocommit all of them,
        in a transaction those that were loaded before it began. A locking read renews all (A32), once what is pending
        is written."""
        identity_map: Any = self.identity_map
        identity_map.__class__ = IdentityMap  # SQLAlchemy makes another one when the session is emptied
        transaction: Any = self._transaction
        if self._nested_transaction is not None:
            private.note_lazy_load(self, options)
        while transaction is not None and transaction._parent is not None:
            transaction = transaction._parent
        try:
            # not by a function: it would be a call for each SELECT
            locking: Any = statement.element if statement.__class__ is sa_orm.FromStatement else statement
            locks = locking._for_update_arg is not None
        except AttributeError:
            locks = False
        if transaction is None or transaction.kind is Kind.RECORD:
            identity_map.stale_before = next(load_numbers)
        elif locks:
            self.flush()
            identity_map.stale_before = next(load_numbers)
        else:
            identity_map.stale_before = transaction.began_before_load
        # SQLAlchemy's: ours has led here, and would again.
        return super().execute(statement, params, execution_options=options, **kwargs)

    def get(self, entity: Any, ident: Any, **options: Any) -> Any:
        """As SQLAlchemy's. One round trip, or none for an object that is in the session; a statement that is built
        once for each model with one key column. With `with_for_update` the object shows the row as it is locked."""
        prepared = prepared_get(entity)
        if (
            prepared is None
            or self._fictive.is_special
            or ((heard := bool(self.dispatch.do_orm_execute)) and private.others_look_on(self.dispatch.do_orm_execute))
            or ident.__class__ not in _SIMPLE_KEYS
            or (options and any(options.values()))
            or (prepared.identity_class, (ident,), None) in self.identity_map._dict
        ):
            if options.get("with_for_update") and not self._is_outside():
                self._expire_for_locking_get(entity, ident, options)
            return super().get(entity, ident, **options)
        # No object of this key is in the session, so there is none to renew, which is what ours would do.
        execute = private.without_listeners(super().execute) if heard else super().execute
        return execute(prepared.statement, {"pk_1": ident}).scalars().one_or_none()

    def _expire_for_locking_get(self, entity: Any, ident: Any, options: Mapping[str, Any]) -> None:
        """Let a locking `get()` show the row as it is locked: what is pending is written, and the object read anew."""
        self.flush()
        mapper = sa.inspect(entity)
        known = {key: value for key, value in options.items() if key in ("identity_token",) and value is not None}
        found = private.object_of_key(self, mapper, ident, known)
        if isinstance(found, mapper.class_):
            self.expire(found, mapper.column_attrs.keys())

    def scalar(self, statement: Any, params: Any = None, **kwargs: Any) -> Any:
        """The first column of the first row, or None. As `execute`."""
        return self.execute(statement, params, **kwargs).scalar()

    def scalars(self, statement: Any, params: Any = None, **kwargs: Any) -> sa.ScalarResult[Any]:
        """The first column of all rows. As `execute`."""
        return self.execute(statement, params, **kwargs).scalars()

    def _execute_specially(self, statement: Any, params: Any, options: Mapping[str, Any], kwargs: Any) -> Any:
        """A statement with parameters, with execution options of ours, or on a connection that the session was
        given."""
        self._raise_if_ended()
        scope = self._fictive
        before, scope.statement_options = scope.statement_options, private.own_options(statement, options, self)
        try:
            if not self._is_outside():
                return self._execute_renewing(statement, options, kwargs, params)
            if (single := private.as_single_insert(statement, params)) is not None:
                statement, params = single, None
            several = bool(params) and not isinstance(params, Mapping) and not isinstance(statement, sa.SelectBase)
            if several or (params and private.is_orm_dml(statement) and isinstance(statement, sa.Insert)):
                with atomic(self, private.describe(statement)):
                    # SQLAlchemy's: ours has led here, and rows that are inserted renew no object.
                    return super().execute(statement, params, execution_options=options, **kwargs)
            if scope.lent:
                return self._execute_lent(statement, params, options, kwargs)
            return self._execute_renewing(statement, options, kwargs, params)
        finally:
            scope.statement_options = before

    def _execute_lent(self, statement: Any, params: Any, options: Mapping[str, Any], kwargs: Any) -> Any:
        """In autocommit, where the session is bound to a connection: judged by its text before it is sent, and
        committed after it where the connection is in no transaction of its owner's."""
        scope = self._fictive
        idle = [connection for connection in scope.lent if not connection.in_transaction()]
        text = private.text_of(statement, scope.lent[0].dialect)
        written = scope.judge(scope.lent[0], classify(text), text, params)
        if not self._is_outside():
            # SQLAlchemy's: ours has led here, and would again.
            return super().execute(statement, params, execution_options=options, **kwargs)
        if idle:
            options = {**options, "stream_results": False, "yield_per": None}
        try:
            if scope.local_settings.function is not None:
                bind = self.get_bind(**{"clause": statement, **(kwargs.get("bind_arguments") or {})})
                if isinstance(bind, sa.Connection):
                    set_on_foreign(bind, scope.local_settings)
            # Not ours, as above.
            result = super().execute(statement, params, execution_options=options, **kwargs)
            if idle and getattr(result, "returns_rows", True):
                result = result.freeze()()
        except BaseException:
            for connection in idle:
                connection.rollback()
            raise
        for connection in idle:
            connection.commit()
        if written is not None:
            scope.wrote(written)
        return result

    def refresh(self, instance: object, attribute_names: Any = None, with_for_update: Any = None) -> None:
        """As SQLAlchemy's. `with_for_update` writes what is pending first, and in autocommit raises before the
        object's state is touched."""
        if with_for_update and self._is_outside():
            self._raise_if_ended()
            if self._fictive.mode is not WritesOutside.BEGIN:
                raise needs_a_transaction("FOR UPDATE / FOR SHARE")
        elif with_for_update:
            self.flush()
        super().refresh(instance, attribute_names, with_for_update)

    # -- writing ----------------------------------------------------------------------------------------------------

    def _delete_impl(self, *args: Any, **options: Any) -> None:
        # what is deleted with the object is loaded for it, and a replica may not have it yet
        with reads_for_write():
            super()._delete_impl(*args, **options)

    def _merge(self, *args: Any, **options: Any) -> Any:
        # what a replica has not got yet would be inserted a second time, or taken for unchanged
        with reads_for_write():
            return super()._merge(*args, **options)

    def flush(self, objects: Any = None) -> None:
        """Write what is pending: in the open transaction; in autocommit in one of its own, all or nothing."""
        given = () if objects is None else (objects,)  # naming it is deprecated from SQLAlchemy 2.1 on
        transaction: Any = self._transaction
        if self._flushing or (transaction is not None and transaction.kind is not Kind.RECORD):
            if (
                self._fictive.reports
                and not self._flushing
                and transaction.kind is Kind.LASTING
                and not self._is_clean()
            ):
                self._fictive.report_write()
            super().flush(*given)
            if self._fictive.added:
                self._fictive.added = {}
            if self._fictive.stale and not self._flushing:
                expire_stale(self)
            return
        if self._is_clean():
            return
        self._raise_if_ended()
        scope = self._fictive
        if scope.mode is WritesOutside.REFUSE:
            raise refused(pending_writes(self))
        if scope.mode is WritesOutside.BEGIN:
            scope.begin_lasting()
            self.flush(objects)
            return
        writes = pending_writes(self)
        transaction = self._autobegin_t()
        assert isinstance(transaction, Transaction)
        transaction.kind = Kind.IMPLICIT
        try:
            super().flush(*given)
            scope.added = {}
            if scope.stale:
                expire_stale(self)
            private.commit_as_is(self, transaction)
        except BaseException:
            self._discard(transaction)
            raise
        scope.wrote(writes)

    def commit(self) -> None:
        """In a transaction: flush, commit, and end the block. In autocommit: flush what is pending in one transaction.

        In autocommit with nothing pending it sends nothing.
        """
        if not self._is_outside():
            super().commit()
            if self._transaction is None:
                self._fictive.committed_writes.clear()
            return
        self._raise_if_ended()
        scope = self._fictive
        if scope.mode is WritesOutside.REFUSE and not self._is_clean():
            raise refused(pending_writes(self))
        transaction = self._autobegin_t()
        assert isinstance(transaction, Transaction)
        transaction.kind = Kind.IMPLICIT
        try:
            super().commit()
        except BaseException:
            self._discard(transaction)
            raise
        scope.committed_writes.clear()

    def rollback(self) -> None:
        """In a transaction: undo it, and end the block. In autocommit: discard what is pending; sends nothing.

        In autocommit under `writes_outside="commit"` it warns with `AlreadyCommittedWarning` of writes since the last
        commit that it can no longer undo.
        """
        scope = self._fictive
        drop_left(self)
        if not self._is_outside():
            super().rollback()
            scope.committed_writes.clear()
            return
        block = self._trans_context_manager
        is_ended = block is not None and block._state is not ACTIVE  # type: ignore[attr-defined]
        if self._transaction is None and not is_ended and (scope.mode is WritesOutside.BEGIN or not self._is_clean()):
            self._autobegin_t()
        writes, scope.committed_writes = scope.committed_writes, WriteLog()
        super().rollback()
        if writes:
            what = "rollback() outside a transaction cannot undo what was committed at once: "
            warn_of_committed(what, writes, self._fictive_place())

    def _discard(self, transaction: Transaction) -> None:
        """Roll an implicit transaction back after an error, which is the one to see; the session works at once."""
        try:
            if transaction._state is not CLOSED:
                transaction.rollback(_to_root=True)
        except Exception:
            log.warning("ROLLBACK failed", exc_info=True)

    def bulk_save_objects(self, objects: Iterable[object], *args: Any, **kwargs: Any) -> None:
        """As SQLAlchemy's; in autocommit all or nothing, in a transaction of its own."""
        objects = list(objects)
        with atomic(self, "bulk_save_objects()"):
            super().bulk_save_objects(objects, *args, **kwargs)
        for mapper in {sa.inspect(each).mapper for each in objects}:
            expire_written_in_bulk(self, mapper, makes_rows=True)
            expire_written_in_bulk(self, mapper, makes_rows=False)

    def bulk_insert_mappings(self, mapper: Any, *args: Any, **kwargs: Any) -> None:
        """As SQLAlchemy's; in autocommit all or nothing, in a transaction of its own."""
        with atomic(self, "bulk_insert_mappings()"):
            super().bulk_insert_mappings(mapper, *args, **kwargs)
        expire_written_in_bulk(self, sa.inspect(mapper), makes_rows=True)

    def bulk_update_mappings(self, mapper: Any, *args: Any, **kwargs: Any) -> None:
        """As SQLAlchemy's; in autocommit all or nothing, in a transaction of its own."""
        with atomic(self, "bulk_update_mappings()"):
            super().bulk_update_mappings(mapper, *args, **kwargs)
        expire_written_in_bulk(self, sa.inspect(mapper), makes_rows=False)

    # -- blocks -----------------------------------------------------------------------------------------------------

    def begin(self, nested: bool = False, **unknown: Never) -> Transaction:
        """Begin a transaction: `with session.begin():` commits at the end of the block, or rolls back on an exception.

        What was changed before on the session's objects is part of it. Sends nothing until the first statement.
        Raises `TransactionAlreadyBegun` in a transaction, and `UnknownOption` for options of `transaction()`.
        """
        if unknown:
            refuse_options_of_begin(unknown)
        if nested:
            return self.begin_nested()
        if self._transaction is None and self._trans_context_manager is None:
            return self._autobegin_t(begin=True)  # type: ignore[return-value]
        return self._begin(NO_OPTIONS)

    def begin_nested(self) -> Transaction:
        """In a transaction: a savepoint. In autocommit: a transaction of its own, which ends with its block.

        In autocommit under `writes_outside="begin"`: a savepoint in a transaction that stays open, as in SQLAlchemy.
        """
        self._raise_if_ended()
        if not self._is_outside():
            return self._begin_savepoint()
        if self._fictive.mode is WritesOutside.BEGIN:
            self._fictive.begin_lasting()
            return self._begin_savepoint()
        whole = self._begin(NO_OPTIONS)
        whole.writes = WriteLog()
        if not self._joins_a_transaction():
            return whole
        savepoint = self._begin_savepoint()
        savepoint.whole = whole
        return savepoint

    def transaction(self, **arguments: Unpack[TransactionArguments]) -> Transaction:
        """Begin a transaction, or a savepoint in an open one: for code that must be atomic wherever it is called.

        It is begun at once. `fictive.sqlalchemy.transaction` has the arguments, and is a decorator as well.
        """
        options = block_options(**arguments)
        self._raise_if_ended()
        if options.settings:
            options.check(self.get_bind().dialect)
        if self._is_outside():
            return self._with_settings(self._begin(options.begin), options)
        transaction = innermost(self)
        assert transaction is not None
        options.check_inside(self._begun_with(), enclosed=is_enclosed(self))
        if options.savepoint:
            return self._with_settings(self.begin_nested(), options)
        # which has all of it that a block's user needs
        return cast(Transaction, Joined(self, transaction, options.settings))

    def _begun_with(self) -> TransactionOptions:
        root: Any = super().get_transaction()  # one that only records too, which ours passes over
        return NO_OPTIONS if root is None else root.options

    def _begin(self, options: TransactionOptions) -> Transaction:
        self._raise_if_ended()
        transaction: Any = self._transaction
        if not self._is_outside():
            begun_at = getattr(self.get_transaction(), "begun_at", None)
            raise TransactionAlreadyBegun(
                "A transaction is open already"
                + (f", begun by the write at {begun_at}" if begun_at else "")
                + ". For a savepoint in it call begin_nested(), or transaction(), which begins where none is open."
            )
        if options:
            self._check_begin_options(options)
        if transaction is None:
            transaction = self._autobegin_t(begin=True)
        transaction.kind = Kind.BLOCK
        transaction.options = options
        return transaction  # type: ignore[no-any-return]

    def _begin_savepoint(self) -> Transaction:
        try:
            super().begin(nested=True)  # SQLAlchemy's: ours leads here
        finally:
            savepoint: Any = self._transaction  # also one that a listener, which raised, has interrupted
            if type(savepoint) is sa_orm.SessionTransaction and savepoint.nested:
                made: Any = savepoint
                made.__class__ = Transaction
                made.kind, made.is_plain = Kind.BLOCK, False
                made.began_before_load = next(load_numbers)
        return savepoint  # type: ignore[no-any-return]

    def _joins_a_transaction(self) -> bool:
        """Whether the session is bound to a connection in a transaction of somebody else's (SQLAlchemy documentation,
        "Joining a Session into an External Transaction")."""
        try:
            bind = self.get_bind()
        except sa.exc.UnboundExecutionError:
            return False
        return isinstance(bind, sa.Connection) and bind.in_transaction()

    def _check_begin_options(self, options: TransactionOptions) -> None:
        bind = self.get_bind()
        dialect = bind.dialect
        driver = driver_for(dialect)
        if not driver.has_options:
            driver.refuse_options(options, dialect)
        known = [level for level in dialect.get_isolation_level_values(None) if level != "AUTOCOMMIT"]  # type: ignore[arg-type]
        if options.isolation_level is not None and options.isolation_level not in known:
            raise ConfigurationError(
                f"isolation_level={options.isolation_level!r}: expected one of {', '.join(known)}."
            )
        if isinstance(bind, sa.Connection):
            if bind.in_transaction():
                raise TransactionAlreadyBegun(
                    "The session is bound to a connection that is in a transaction already, whose isolation level, "
                    "READ ONLY and DEFERRABLE cannot change. Leave them out, or ask for them where it was begun."
                )
            bind.execution_options(**private.core_options(options))

    def _with_settings(self, block: Transaction, options: BlockOptions) -> Transaction:
        if options.settings:
            whole = block.is_root and not self._joins_a_transaction()
            LocalSettings(block, options.settings, whole=whole)
        return block

    @needs_with("pinned()")
    def pinned(self) -> Iterator[Self]:
        """Keep one connection for the block: for temporary tables, `SET`, session-level locks.

        Statements still stand alone, and `begin()` works, all on that connection. At the end it is closed, so that
        nothing set through it reaches anyone else; the price is one reconnect. In a `pinned()` block it changes
        nothing; inside a transaction it raises `TransactionAlreadyBegun`. Behind a pooler of transactions it is on the
        direct URL, and raises `DirectConnectionRequired` where there is none.
        """
        scope = self._fictive
        if scope.keeps:
            yield self
            return
        if isinstance(bind := self.get_bind(), sa.Engine):
            direct_engine(bind, "pinned()")
        if not self._is_outside():
            raise TransactionAlreadyBegun(
                "pinned() goes around begin(), not into its block: a transaction has its own connection."
            )
        for connection in scope.connections.values():
            connection.link.let_go()
        scope.keeps = True
        choose = self.get_bind

        def get_bind(*args: Any, **kwargs: Any) -> Any:
            bind = choose(*args, **kwargs)  # code that begins a transaction on it means the connection that is kept
            return scope.connection(bind) if isinstance(bind, sa.Engine) else bind

        self.get_bind = get_bind  # type: ignore[method-assign]
        try:
            yield self
        finally:
            try:
                self._unpin()
            finally:
                scope.keeps = False
                del self.get_bind

    def _unpin(self) -> None:
        try:
            transaction = innermost(self)
            if transaction is not None and transaction.kind is Kind.BLOCK and not transaction._is_entered():
                self.rollback()  # begun in here and never ended
        finally:
            for connection in self._fictive.connections.values():
                connection.forget()
                connection.link.unpin()

    # -- the end of the context -------------------------------------------------------------------------------------

    def add(self, instance: object, **options: Any) -> None:
        """As SQLAlchemy's. `unsaved()` names the line."""
        super().add(instance, **options)
        frame, _ = find_caller()
        self._fictive.added[instance_state(instance)] = frame.f_code, frame.f_lineno

    def unsaved(self) -> list[str]:
        """What is new, changed or deleted and not written, a few words for each object, with the line of its `add()`.
        Sends nothing."""
        found = [f"{_name(obj)} (new{self._added_at(obj)})" for obj in self.new]
        found += [f"{_name(obj)} (deleted)" for obj in self.deleted]
        for obj in self.dirty:
            if self.is_modified(obj):
                changed = [attr.key for attr in sa.inspect(obj).attrs if attr.history.has_changes()]
                found.append(f"{_name(obj)} (changed: {', '.join(changed)})")
        return found

    def _added_at(self, obj: object) -> str:
        try:
            code, line = self._fictive.added[instance_state(obj)]
        except KeyError:  # by a cascade from another object
            return ""
        return f", added at {code.co_filename}:{line} in {code.co_name}"

    def close(self) -> None:
        """Give back whatever is held; an open transaction is rolled back. Changes not written are dropped."""
        try:
            super().close()
        finally:
            scope = self._fictive
            if scope.connections or scope.committed_writes or scope.added or scope.orphans or scope.skipped:
                self._let_go()

    def reset(self) -> None:
        """As `close()`, for a session that goes on."""
        try:
            super().reset()
        finally:
            self._let_go()

    def invalidate(self) -> None:
        """As `close()`, closing the connections of an open transaction for good."""
        try:
            super().invalidate()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        scope = self._fictive
        for engine in tuple(scope.connections):
            link = scope.connections[engine].link
            if link.streams:
                link.close_streams()
            if link.in_transaction or link.early is not None or link.kept is not None:
                link.ending = True
                link.close()
                link.unpin()
            del scope.connections[engine]
        if scope.committed_writes:
            scope.committed_writes.clear()
        scope.added, scope.orphans, scope.skipped = {}, [], set()

    def __exit__(self, type_: Any, value: Any, traceback: Any) -> None:
        try:
            if type_ is None:
                report_unsaved(self)
            else:
                report_committed(self)
        finally:
            self.close()


sa.event.listen(OptInSession, "after_flush", note_written)
sa.event.listen(OptInSession, "pending_to_transient", note_orphan)


def atomic(session: sa_orm.Session, what: str) -> contextlib.AbstractContextManager[None]:
    """Let the statements of the block succeed or fail as one, for functions that take several.

    In a transaction they are part of it. In autocommit `writes_outside` decides: they get a transaction of their own,
    or the one that stays open, or `TransactionRequired`, which names `what`. Changes pending in the session are not
    flushed by it. A plain session keeps its transaction open anyway, and its owner commits.
    """
    if not isinstance(session, OptInSession):
        return contextlib.nullcontext()
    session._raise_if_ended()
    if not session._is_outside():
        return contextlib.nullcontext()
    mode = session._fictive.mode
    if mode is WritesOutside.REFUSE:
        raise refused(what)
    if mode is WritesOutside.COMMIT:
        return implicit(session, what)
    session._fictive.begin_lasting()
    return contextlib.nullcontext()


def has_block(session: OptInSession) -> bool:
    """Whether a transaction is open that `begin()`, `begin_nested()` or `transaction()` has begun."""
    transaction = innermost(session)
    while transaction is not None:
        if transaction.kind is Kind.BLOCK:
            return True
        transaction = transaction.parent  # type: ignore[assignment]
    return False


def report_unsaved(session: OptInSession) -> None:
    """Warn of, or raise for, changes that are about to be lost, as `unsaved_changes` says."""
    if session._is_clean() or session.unsaved_changes is UnsavedChanges.IGNORE:
        return
    found = session.unsaved()
    if not found:
        return
    shown = ", ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "")
    message = (
        f"The context ended with unsaved changes, which are lost: {shown}. Call commit() before it ends to save them."
    )
    log_unsaved.warning("%s%s", message, session._fictive_place())
    if session.unsaved_changes is UnsavedChanges.ERROR:
        raise UnsavedChangesError(message)
    warnings.warn(UnsavedChangesWarning(message), stacklevel=stack_level())


def report_committed(session: OptInSession) -> None:
    """Warn of writes that stay although their context ended with an error."""
    if writes := session._fictive.committed_writes:
        what = "The context ended with an error, after these were committed at once: "
        warn_of_committed(what, writes, session._fictive_place())


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` for options of a session that cannot work; they may come from a sessionmaker."""
    if "autocommit" in options and options["autocommit"] is not None:
        raise ConfigurationError(
            f"autocommit={options['autocommit']} is not an option of the opt-in session. Leave it out: outside "
            "begin() each statement is committed. "
            'For writes that wait for commit(), as in SQLAlchemy, set writes_outside="begin" '
            "or FICTIVE_WRITES_OUTSIDE."
        )
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
    for name in options:
        if name not in _KNOWN and (near := nearest(name, _OWN)):
            raise UnknownOption(f"A session has no option {name}: did you mean {near[0]}?")
    for name, kind in (("writes_outside", WritesOutside), ("unsaved_changes", UnsavedChanges)):
        if options.get(name) is not None:
            choice(kind, options[name], name)
    if options.get("retry_reads") is not None:
        flag(options["retry_reads"], "retry_reads")


def _name(obj: object) -> str:
    identity = sa.inspect(obj).identity
    return type(obj).__name__ + (f" {', '.join(map(str, identity))}" if identity else "")

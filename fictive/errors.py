"""What fictive raises and warns of.

Every error also subclasses what callers of SQLAlchemy already catch. Errors that the database reports pass through
fictive untouched; the classes here speak of how the session was used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy.exc as sa_exc

__all__ = [
    "AlreadyCommittedWarning",
    "CommitOutcomeUnknown",
    "ConfigurationError",
    "ConnectionBusy",
    "DatabaseInUse",
    "DatabaseNotConfigured",
    "DirectConnectionRequired",
    "DuplicateRows",
    "FictiveError",
    "FictiveWarning",
    "HooksFailed",
    "InvalidCursor",
    "InvalidFilter",
    "InvalidToken",
    "KeyOfDeletedRow",
    "LazyLoadRefused",
    "LocalSettingsError",
    "LockLost",
    "LockTimeout",
    "NPlusOneError",
    "NPlusOneWarning",
    "NotEnteredWarning",
    "NotFoundError",
    "PinnedConnectionLost",
    "RowChangeTimeout",
    "RowsDiffer",
    "SandboxError",
    "SettingIgnoredWarning",
    "SnapshotIsFixed",
    "TransactionAborted",
    "TransactionAlreadyBegun",
    "TransactionEnded",
    "TransactionOutOfOrder",
    "TransactionRequired",
    "UnknownAttribute",
    "UnknownOption",
    "UnsavedChangesError",
    "UnsavedChangesWarning",
    "UnsavedObject",
    "UnsupportedDialect",
]


class FictiveError(Exception):
    """Base of the errors that fictive raises itself."""


class ConfigurationError(FictiveError, sa_exc.ArgumentError):
    """A class, a setting or an option that cannot work. The message names it, and the remedy."""


class UnknownOption(ConfigurationError, TypeError):
    """A keyword that a function does not take. The message names the function that was called, and what was meant."""


class DatabaseNotConfigured(ConfigurationError, RuntimeError):
    """Neither the app's configuration nor the environment names a database. Flask-SQLAlchemy raises `RuntimeError`."""


class TransactionRequired(FictiveError, sa_exc.InvalidRequestError):
    """Something that has an effect only in a transaction was tried in autocommit. Nothing was sent."""


class LocalSettingsError(FictiveError, sa_exc.InvalidRequestError):
    """The settings that `local_settings` gives cannot be set, or not together with this statement, which was not run.

    `__cause__` is the driver's error where the server refused them.
    """


class DirectConnectionRequired(FictiveError, sa_exc.InvalidRequestError):
    """Something that needs one server connection for longer than a transaction was tried behind a pooler. Nothing was
    sent. The remedies are `FICTIVE_DIRECT_URL`, or a form that ends with the transaction."""


class SandboxError(FictiveError, sa_exc.InvalidRequestError):
    """Something that the one connection of a test's sandbox cannot do: two-phase transactions, use from a child
    process without a token, two threads with transactions that wait for each other."""


class TransactionAlreadyBegun(FictiveError, sa_exc.InvalidRequestError):
    """`begin()` was called while a transaction is open. Nothing was sent."""


class TransactionEnded(FictiveError, sa_exc.ResourceClosedError):
    """A statement in a block whose transaction was ended by an earlier `commit()` or `rollback()`."""


class TransactionOutOfOrder(FictiveError, sa_exc.InvalidRequestError):
    """A block was left while one that was begun within it is still open. It was rolled back, and so was that one."""


class TransactionAborted(FictiveError, sa_exc.PendingRollbackError):
    """A block ended normally, but PostgreSQL had already aborted its transaction after an error.

    Nothing of the block was committed. `__cause__` is the first error, the one after which PostgreSQL refused all
    others: a failed statement aborts its transaction block.
    """


class AbortedTransactionStatement(TransactionAborted, sa_exc.InternalError):
    """A statement in a transaction that the server has aborted already; the message names the first error."""

    def __init__(self, error: sa_exc.DBAPIError, why: TransactionAborted) -> None:
        sa_exc.InternalError.__init__(
            self,
            error.statement,
            error.params,
            error.orig or error,
            hide_parameters=error.hide_parameters,
            ismulti=error.ismulti,
        )
        self.why = why

    def _message(self) -> str:
        return str(self.why)


class CommitOutcomeUnknown(FictiveError, sa_exc.OperationalError):
    """The connection was lost between sending COMMIT and its answer: what was written may be there, or not.

    Never retried, since it might be done twice. `__cause__` is the driver's error as SQLAlchemy raised it.
    """

    def __init__(self, cause: sa_exc.DBAPIError) -> None:
        super().__init__(cause.statement, cause.params, cause.orig or cause, connection_invalidated=True)
        self.add_detail("COMMIT was sent and not answered: look whether its changes are there before doing it again.")


class HooksFailed(FictiveError, ExceptionGroup[Exception]):
    """Hooks raised, after all of them had run. What happened to the transaction stays: committed, or rolled back.

    `exceptions` are what they raised, in the order of the hooks; the first is also `__cause__`. An `ExceptionGroup`:
    `except*` takes it apart.
    """

    def derive(self, excs: Sequence[Exception]) -> HooksFailed:  # type: ignore[override]
        return HooksFailed(self.message, excs)


class ConnectionBusy(FictiveError, sa_exc.TimeoutError):
    """The only connection of an in-memory SQLite database is in use by this same thread, which would wait forever."""


class PinnedConnectionLost(FictiveError, sa_exc.InvalidRequestError):
    """The connection of a `pinned()` block is gone, and with it what was set through it."""


class _ToldByTheServer(FictiveError, sa_exc.OperationalError):
    """An error of the server, explained; it keeps the driver's error, and so the SQLSTATE."""

    def __init__(self, message: str, cause: sa_exc.DBAPIError | None = None) -> None:
        # DBAPIError would put the driver's message where ours belongs
        sa_exc.StatementError.__init__(self, message, None, None, cause.orig if cause else None)
        self.connection_invalidated = cause is not None and cause.connection_invalidated

    def __reduce__(self) -> Any:
        return type(self), self.args


class LockTimeout(_ToldByTheServer, TimeoutError):
    """A lock was not available in time. The message names who holds it, where that is visible.

    A transaction that was open before `lock_tables()`, `advisory_lock()` or `cleanup_tables()` goes on.
    `__cause__` is the driver's error as SQLAlchemy raised it, if there was one.
    """


class LockLost(_ToldByTheServer):
    """The connection that held an advisory lock is gone: somebody else may have had the lock meanwhile."""


class DatabaseInUse(_ToldByTheServer):
    """A database cannot be dropped, or be a template, while others are connected to it. The message names them."""


class UnsupportedDialect(FictiveError, sa_exc.InvalidRequestError, NotImplementedError):
    """The feature, which the message names, needs another database or driver."""


class UnsavedChangesError(FictiveError, sa_exc.InvalidRequestError):
    """A context ended with changes that were never written (`FICTIVE_UNSAVED_CHANGES = "error"`)."""


class UnknownAttribute(FictiveError, sa_exc.InvalidRequestError, TypeError):
    """A name given for a value is not an attribute of the model, or not a stored one. Nothing was sent.

    SQLAlchemy raises `InvalidRequestError` for it in `filter_by()`, and `TypeError` in a model's constructor.
    """


class NotFoundError(FictiveError, sa_exc.NoResultFound):
    """The row that was asked for, or waited for, does not exist or no longer exists. In a view it is 404."""


class InvalidCursor(FictiveError, ValueError):
    """Malformed pagination cursor, or one from a different ordering. Usually client input: in a view it is 400."""


class InvalidFilter(FictiveError, ValueError):
    """A filter, search or order that a `FilterSet` does not allow, or whose value is not of the column's type. The
    message names the parameter, and not the value. Usually client input: in a view it is 400."""


class InvalidToken(FictiveError, ValueError):
    """A token given to `db.using_token()` that this application has not made, or that was changed."""


class UnsavedObject(FictiveError, sa_exc.InvalidRequestError, ValueError):
    """A related object that has no row yet was given where its key is needed. Nothing was sent."""


class RowsDiffer(FictiveError, sa_exc.InvalidRequestError, ValueError):
    """A row of a bulk call has other keys than the first one. Nothing of its batch was sent."""


class DuplicateRows(FictiveError, sa_exc.InvalidRequestError, ValueError):
    """Two rows of a bulk call have the same key, and the caller has not said that the last one wins."""


class KeyOfDeletedRow(FictiveError, sa_exc.IntegrityError):
    """A row cannot be created or found, because a soft-deleted row has its key. Nothing was written.

    `orig` is None: fictive looked before it wrote, and the server refused nothing.
    """

    def __init__(self, message: str) -> None:
        sa_exc.StatementError.__init__(self, message, None, None, None)
        self.connection_invalidated = False

    def __reduce__(self) -> Any:
        return type(self), self.args


class LazyLoadRefused(FictiveError, sa_exc.InvalidRequestError):
    """A relationship that is not loaded was asked for where lazy loads are refused. Nothing was sent."""


class NPlusOneError(FictiveError, sa_exc.InvalidRequestError):
    """One line of code loads a relationship one by one on many objects of one query."""


class RowChangeTimeout(FictiveError, TimeoutError):
    """A row did not change, or no row appeared, in the given time."""


class SnapshotIsFixed(FictiveError, sa_exc.InvalidRequestError):
    """Waiting for a change in a transaction that can see none (PostgreSQL documentation, "Repeatable Read Isolation
    Level")."""


class FictiveWarning(UserWarning):
    """Base of the warnings that fictive gives."""


class SettingIgnoredWarning(FictiveWarning):
    """A variable of the environment resembles one of fictive's and is not read, or has no effect."""


class UnsavedChangesWarning(FictiveWarning):
    """A context ended with new, changed or deleted objects that were never written; they are lost."""


class NPlusOneWarning(FictiveWarning):
    """One line of code loads a relationship one by one on many objects of one query."""


class NotEnteredWarning(FictiveWarning):
    """A context manager that works by `with` was made and dropped without it, so that it did nothing."""


class AlreadyCommittedWarning(FictiveWarning):
    """A `rollback()`, or an error that ends the context, cannot undo writes that autocommit has committed."""

"""What an opt-in session knows: how it is set, and whether it is inside a transaction."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..config import Settings, UnsavedChanges, WritesOutside, choice, flag, nearest
from ..drivers import NO_OPTIONS, TransactionStatus
from ..errors import ConfigurationError, TransactionAborted, TransactionAlreadyBegun, UnknownOption
from . import private
from .callers import caller
from .engines import ABORTED, is_lost, status_of
from .hooks import Hooks
from .leases import Lease, Pins, Stream
from .transaction import Transaction, TransactionState, ended_error
from .write_modes import write_mode

__all__ = ["EMPTY", "SessionState", "check_options"]

EMPTY: Mapping[str, Any] = {}

_DEFAULTS = Settings()
_OWN = frozenset({"writes_outside", "unsaved_changes", "retry_reads"})
_KNOWN = _OWN | set(inspect.signature(sa_orm.Session.__init__).parameters) | {"class_"}


class SessionState(private.JointedSession):
    """What the layers above share."""

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
        settings = self._settings = self.default_settings()
        self._mode = write_mode(settings.writes_outside)
        self._unsaved_changes = settings.unsaved_changes
        self._retry_reads = settings.retry_reads
        if writes_outside is not None:
            self._mode = write_mode(choice(WritesOutside, writes_outside, "writes_outside"))
        if unsaved_changes is not None:
            self.unsaved_changes = unsaved_changes
        if retry_reads is not None:
            self._retry_reads = flag(retry_reads, "retry_reads")
        super().__init__(*args, **kwargs)
        # the session has execution options from SQLAlchemy 2.1 on
        self._session_options: Mapping[str, Any] = getattr(self, "execution_options", None) or EMPTY
        self._apply_defaults()

    def default_settings(self) -> Settings:
        """The settings of a session that is not told otherwise; those of the app, in a Flask app."""
        return _DEFAULTS

    @property
    def writes_outside(self) -> WritesOutside:
        """What a write outside does. Assigning a member or its value changes it for this session."""
        return self._mode.setting

    @writes_outside.setter
    def writes_outside(self, value: WritesOutside | str) -> None:
        mode = write_mode(choice(WritesOutside, value, "writes_outside"))
        if self._is_inside():
            raise TransactionAlreadyBegun("writes_outside cannot change within a transaction; end it first.")
        self._mode = mode
        self._apply_defaults()

    @property
    def unsaved_changes(self) -> UnsavedChanges:
        """What happens to changes no one wrote by the end of the context. Assigning changes it for this session."""
        return self._unsaved_changes

    @unsaved_changes.setter
    def unsaved_changes(self, value: UnsavedChanges | str) -> None:
        self._unsaved_changes = choice(UnsavedChanges, value, "unsaved_changes")

    def _apply_defaults(self) -> None:
        plain = self._mode.stays_open
        self.autoflush = plain if self._given_autoflush is None else self._given_autoflush
        self.expire_on_commit = plain if self._given_expire_on_commit is None else self._given_expire_on_commit

    # -- whether it is inside -----------------------------------------------------------------------------------------

    def _is_inside(self) -> bool:
        return (
            self._own
            or (self._tx is not None and self._tx.state is TransactionState.ACTIVE)
            or (self._mode.stays_open and self.change_record() is not None)
        )

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

    def changes_begin(self) -> None:
        if self._mode.stays_open and self._first_write is None:
            self._first_write = caller()

    def begin_lasting(self) -> None:
        """Begin the transaction that stays open; its first statement, which is about to run, takes a connection."""
        self._first_write = caller()
        self.open_change_record()


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

"""SQLAlchemy's `sessionmaker` and `scoped_session`, for opt-in sessions."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import sqlalchemy.orm as sa_orm

from ..config import UnsavedChanges, WritesOutside
from ..connection.statement_settings import SettingsSource
from .options import refuse_options_of_begin
from .session import OptInSession, check_options
from .transaction import Transaction

if TYPE_CHECKING:
    from typing_extensions import Never, Unpack

    from .options import TransactionArguments

__all__ = ["OptInScopedSession", "sessionmaker"]


class sessionmaker(sa_orm.sessionmaker[OptInSession]):  # SQLAlchemy's name for the same thing
    """`sqlalchemy.orm.sessionmaker` that makes opt-in sessions, with their defaults instead of SQLAlchemy's.

    Takes the arguments of SQLAlchemy's and those of `OptInSession`.
    """

    def __init__(self, bind: Any = None, **kwargs: Any) -> None:
        check_options(kwargs)
        kwargs.setdefault("class_", OptInSession)
        if kwargs.get("local_settings") is not None:
            kwargs["local_settings"] = SettingsSource(kwargs["local_settings"])
        # SQLAlchemy would name its own defaults, and the session could not tell them from the user's
        kwargs.setdefault("autoflush", None)
        kwargs.setdefault("expire_on_commit", None)
        super().__init__(bind, **kwargs)


class OptInScopedSession(sa_orm.scoped_session[OptInSession]):
    """A registry of opt-in sessions, one per scope; `db.session` is one.

    SQLAlchemy's hands on a fixed list of methods; this one also those that are the opt-in session's own.
    """

    def begin(self, nested: bool = False, **unknown: Never) -> Transaction:
        if unknown:
            refuse_options_of_begin(unknown)
        return self.registry().begin(nested)

    def begin_nested(self) -> Transaction:
        return self().begin_nested()

    def transaction(self, **options: Unpack[TransactionArguments]) -> Transaction:
        return self().transaction(**options)

    def pinned(self) -> contextlib.AbstractContextManager[OptInSession]:
        return self().pinned()

    def in_transaction(self) -> bool:
        return self().in_transaction()

    def in_nested_transaction(self) -> bool:
        return self().in_nested_transaction()

    def get_transaction(self) -> sa_orm.SessionTransaction | None:
        return self().get_transaction()

    def get_nested_transaction(self) -> sa_orm.SessionTransaction | None:
        return self().get_nested_transaction()

    def unsaved(self) -> list[str]:
        return self().unsaved()

    @property
    def writes_outside(self) -> WritesOutside:
        return self().writes_outside

    @writes_outside.setter
    def writes_outside(self, value: WritesOutside | str) -> None:
        self().writes_outside = value

    @property
    def unsaved_changes(self) -> UnsavedChanges:
        return self().unsaved_changes

    @unsaved_changes.setter
    def unsaved_changes(self, value: UnsavedChanges | str) -> None:
        self().unsaved_changes = value

"""Locks that a transaction keeps to its end: taken by the call where one is open, and by `with` elsewhere."""

from __future__ import annotations

from typing import Any

import sqlalchemy.orm as sa_orm

from ..session.given import undone_on_error
from ..session.unentered import NeedsWith

__all__ = ["TakenInside"]


class TakenInside(NeedsWith[sa_orm.Session]):
    """In a transaction the lock is taken at once, since it lasts to the end of that whether or not `with` follows.

    What is pending is flushed by neither.
    """

    def __init__(self, what: str, session: sa_orm.Session, where: dict[str, Any]) -> None:
        """`where` is the `bind_arguments` of the statement."""
        self._session = session
        self._where = where
        self._taken_in: sa_orm.SessionTransaction | None = None
        super().__init__(what)
        try:
            self._take_inside()
        except BaseException:
            self._needs_with = False
            raise

    def _take(self) -> None:
        """Take the lock, in the transaction that is open."""
        raise NotImplementedError

    def _may_fail(self) -> bool:
        """Whether the server may refuse it by an error, after which the transaction could not go on."""
        return True

    def _take_inside(self) -> None:
        if not self._session.in_transaction() or self._is_taken():
            return
        if self._may_fail():
            with undone_on_error(self._session, **self._where):
                self._take()
        else:
            with self._session.no_autoflush:
                self._take()
        self._taken_in = _current(self._session)
        self._needs_with = False

    def _is_taken(self) -> bool:
        """Whether the transaction, or savepoint, that it was taken in is still open."""
        transaction = _current(self._session)
        while transaction is not None and self._taken_in is not None:
            if transaction is self._taken_in:
                return True
            transaction = transaction.parent
        return False


def _current(session: sa_orm.Session) -> sa_orm.SessionTransaction | None:
    if not session.in_transaction():
        return None
    return session.get_nested_transaction() or session.get_transaction()

"""Running a transaction again when the server says that it lost a race."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..drivers import sqlstate
from ..errors import CommitOutcomeUnknown, ConfigurationError, TransactionAborted, TransactionAlreadyBegun
from ..report.watcher import WATCHER

__all__ = ["BeforeRetry", "check_retries", "may_be_retried", "run_with_retries"]

log = logging.getLogger("fictive.retry")

_T = TypeVar("_T")
BeforeRetry = Callable[[int, BaseException], object]

# serialization_failure and deadlock_detected (PostgreSQL documentation, "Serialization Failure Handling")
_LOST_A_RACE = frozenset({"40001", "40P01"})
_FIRST_PAUSE = 0.01
_LONGEST_PAUSE = 1.0


def check_retries(retries: object) -> int:
    """`retries`, which has to be a whole number from 0 on."""
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise ConfigurationError(f"retries = {retries!r}: expected how often to try again, a whole number from 0 on.")
    return retries


def may_be_retried(error: BaseException) -> bool:
    """Whether the server rolled back because of other transactions, so that the same work may succeed now.

    Not after a COMMIT whose outcome is unknown: it might be done twice.
    """
    if isinstance(error, CommitOutcomeUnknown):
        return False
    if isinstance(error, TransactionAborted):  # the code caught the server's error and went on
        error = error.__cause__ or error
    return isinstance(error, sa.exc.DBAPIError) and sqlstate(error) in _LOST_A_RACE


def run_with_retries(
    session: sa_orm.Session,
    run: Callable[[], _T],
    retries: int,
    before_retry: BeforeRetry | None = None,
) -> _T:
    """Call `run`, which runs one transaction, up to `retries` more times while the server reports a lost race."""
    if session.in_transaction():
        raise TransactionAlreadyBegun(
            "A transaction with retries was started inside another. A failed try is undone with all that is around "
            "it, so only the outermost can be tried again: give retries to that one."
        )
    _refuse_unsaved(session)
    attempt = 0
    while True:
        known = {id(instance): instance for instance in session}
        try:
            return run()
        except Exception as error:
            if attempt >= retries or not may_be_retried(error):
                raise
            attempt += 1
            log.info("retry %d of %d after %s", attempt, retries, sqlstate(error) or error)
            if (watcher := session.info.get(WATCHER)) is not None:
                watcher.retried(attempt, error)
            for instance in list(session):  # the next try starts from what the first one knew, freshly loaded
                if id(instance) not in known:
                    session.expunge(instance)
            session.expire_all()
            if before_retry is not None:
                before_retry(attempt, error)
        time.sleep(_pause(attempt))


def _pause(attempt: int) -> float:
    """Seconds: a random part of a time that doubles, so that those who collided do not meet again."""
    return random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt))


def _refuse_unsaved(session: sa_orm.Session) -> None:
    """A rollback would lose what was changed before the first try, and the second would commit without it."""
    changed: list[Any] = [*session.new, *session.deleted, *filter(session.is_modified, session.dirty)]
    if changed:
        names = ", ".join(sorted({type(each).__name__ for each in changed}))
        raise ConfigurationError(
            f"The session has changes that are not written ({names}), and a second try would be without them. "
            "commit() or rollback() before a transaction with retries, or make the changes in its function."
        )

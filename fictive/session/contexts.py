"""A session for a script, a job or a request of another framework: made, committed or rolled back, and closed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy.orm as sa_orm

from ..errors import TransactionAborted, TransactionAlreadyBegun
from . import private
from .engines import ABORTED, is_aborted
from .given import session_of
from .optin import OptInSession

__all__ = ["create_db_context", "create_db_dependency", "finishing"]

log = logging.getLogger("fictive.session")

_OPEN = "fictive.context"


def create_db_context(
    session_factory: Callable[[], Any],
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A function for `with db_context() as session:` that makes a session with `session_factory` and looks after it.

    At the end of the block a transaction that is open is committed, with what is pending; an exception rolls back and
    comes out unchanged; the session is closed either way. `session_factory` is a `sessionmaker`, a `scoped_session`
    (whose session is removed from its scope at the end) or any function that returns a session, opt-in or plain.

    With an opt-in session each statement outside is committed by itself, as always, and changes that no one wrote are
    reported (`unsaved_changes`). The context sends nothing of its own but COMMIT or ROLLBACK.
    """
    if not callable(session_factory):
        raise TypeError(f"session_factory is called for a session; {session_factory!r} cannot be called.")

    @contextlib.contextmanager
    def db_context() -> Iterator[Any]:
        session = session_of(session_factory())
        if session.info.get(_OPEN):
            raise TransactionAlreadyBegun(
                "The session of this scope is in use by a context around this one, which would be closed by it. Give "
                "create_db_context() a sessionmaker, or use the session that is there."
            )
        session.info[_OPEN] = True
        try:
            with finishing(session):
                yield session
                if isinstance(session, OptInSession) and not session.in_transaction():
                    session.report_unsaved()
        finally:
            session.info.pop(_OPEN, None)
            try:
                session.close()
            finally:
                _remove(session_factory, session)

    return db_context


def create_db_dependency(session_factory: Callable[[], Any]) -> Callable[[], Iterator[Any]]:
    """`create_db_context` as a generator function, for frameworks that take dependencies so: `Depends(get_db)`.

    In FastAPI the code after `yield` runs in the thread pool as the code before it does, maybe in another thread, and
    after the response unless the dependency has `scope="function"`: there a COMMIT that fails can still become an
    error response. Use a `sessionmaker`, not a `scoped_session` of threads.
    """
    db_context = create_db_context(session_factory)

    def get_db() -> Iterator[Any]:
        with db_context() as session:
            yield session

    return get_db


@contextlib.contextmanager
def finishing(session: sa_orm.Session) -> Iterator[None]:
    """Commit the transaction that is open at the end of the block, or roll back on an exception. Closes nothing."""
    try:
        yield
        if session.in_transaction():
            _raise_if_aborted(session)
            session.commit()
    except BaseException:
        try:
            session.rollback()
        except Exception:  # the first error is the one to see; the connection has been closed
            log.warning("ROLLBACK failed", exc_info=True)
        raise


def _raise_if_aborted(session: sa_orm.Session) -> None:
    """An honest commit for plain sessions; the opt-in session looks for itself, and knows the error."""
    root = session.get_transaction()
    if root is None or isinstance(session, OptInSession):
        return
    if any(map(is_aborted, private.connections_of(root))):
        raise TransactionAborted(ABORTED)


def _remove(session_factory: Callable[[], Any], session: sa_orm.Session) -> None:
    if isinstance(session_factory, sa_orm.scoped_session):
        registry = session_factory.registry
        if registry.has() and registry() is session:
            session_factory.remove()

"""A session for a script, a job or a request of another framework: made, committed or rolled back, and closed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, overload

import sqlalchemy.orm as sa_orm

from ..errors import TransactionAlreadyBegun
from ..other_names import also_named
from .given import session_of
from .session import OptInSession
from .transaction import innermost
from .unentered import needs_with

__all__ = ["create_db_context", "create_db_dependency", "finishing"]

log = logging.getLogger("fictive.session")

_OPEN = "fictive.context"

_Session = TypeVar("_Session", bound=sa_orm.Session)


@overload
def create_db_context(
    session_factory: Callable[[], _Session],
) -> Callable[[], contextlib.AbstractContextManager[_Session]]: ...


@overload
def create_db_context(
    session_factory: Callable[[], sa_orm.scoped_session[_Session]],
) -> Callable[[], contextlib.AbstractContextManager[_Session]]: ...


@also_named(session_maker="session_factory")
def create_db_context(
    session_factory: Callable[[], Any],
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A function for `with db_context() as session:` that makes a session with `session_factory` and looks after it.

    At the end of the block what is pending is written and committed, in the transaction that is open or in one of its
    own; an exception rolls back and comes out unchanged; the session is closed either way. `session_factory` is a
    `sessionmaker`, a `scoped_session` (whose session is removed from its scope at the end) or any function that
    returns a session, opt-in or plain.

    An opt-in session commits each statement and each `flush()` in autocommit by itself, as always. After an exception
    those stay, and an `AlreadyCommittedWarning` names them: put what belongs together in `with session.begin():`.
    Where nothing is pending and no transaction is open, the context sends nothing.
    """
    if not callable(session_factory):
        raise TypeError(f"session_factory is called for a session; {session_factory!r} cannot be called.")

    @needs_with("db_context()")
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
        finally:
            session.info.pop(_OPEN, None)
            try:
                session.close()
            finally:
                _remove(session_factory, session)

    return db_context


@overload
def create_db_dependency(session_factory: Callable[[], _Session]) -> Callable[[], Iterator[_Session]]: ...


@overload
def create_db_dependency(
    session_factory: Callable[[], sa_orm.scoped_session[_Session]],
) -> Callable[[], Iterator[_Session]]: ...


@also_named(session_maker="session_factory")
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
    """Write and commit what is pending at the end of the block, or roll back on an exception. Closes nothing."""
    try:
        yield
        if isinstance(session, OptInSession):
            session.commit()  # in autocommit with nothing pending it sends nothing
        elif session.in_transaction():
            innermost(session)  # makes an honest commit of it
            session.commit()
    except BaseException as error:
        try:
            session.rollback()  # an opt-in session warns of what stays
        except Exception:  # also that warning, where warnings are errors; the first error is the one to see
            log.warning("rolling back after %r", error, exc_info=True)
        raise


def _remove(session_factory: Callable[[], Any], session: sa_orm.Session) -> None:
    if isinstance(session_factory, sa_orm.scoped_session):
        registry = session_factory.registry
        if registry.has() and registry() is session:
            session_factory.remove()

"""The session that a function was given: any of SQLAlchemy's, opt-in or plain, scoped or not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..errors import UnsupportedDialect
from .session import OptInSession, has_block

__all__ = [
    "commits_without_a_block",
    "dialect_of",
    "in_a_block",
    "require_postgresql",
    "session_of",
    "undone_on_error",
    "write_on",
]


def session_of(given: object) -> sa_orm.Session:
    """The session itself: `given`, or the one of the current scope where it is a `scoped_session`.

    Raises `TypeError` for anything else.
    """
    if isinstance(given, sa_orm.scoped_session):
        given = given()
    if not isinstance(given, sa_orm.Session):
        raise TypeError(f"expected a SQLAlchemy session or scoped_session such as db.session, not {given!r}.")
    return given


def dialect_of(session: sa_orm.Session, entity: Any = None) -> sa.Dialect:
    """The dialect that statements on `entity` (mapped class, mapper or table) run on; without one, the session's."""
    if entity is None:
        return session.get_bind().dialect
    if isinstance(entity, sa.FromClause):
        return session.get_bind(clause=entity).dialect
    return session.get_bind(mapper=sa.inspect(entity)).dialect


def require_postgresql(session: sa_orm.Session, feature: str, entity: Any = None) -> sa.Dialect:
    """The dialect; raises `UnsupportedDialect` naming `feature` on any other database than PostgreSQL."""
    dialect = dialect_of(session, entity)
    if dialect.name != "postgresql":
        raise UnsupportedDialect(f"{feature} needs PostgreSQL; this session is on {dialect.name}+{dialect.driver}.")
    return dialect


def in_a_block(session: sa_orm.Session) -> bool:
    """Whether `begin()`, `begin_nested()` or `transaction()` has opened a transaction that is still open.

    A plain session, and an opt-in session under `writes_outside="begin"`, can be in a transaction without one: the
    first statement, or the first write, has begun it.
    """
    if isinstance(session, OptInSession):
        return has_block(session)
    root = session.get_transaction()
    if root is None:
        return False
    return session.in_nested_transaction() or root.origin is sa_orm.SessionTransactionOrigin.BEGIN


@contextlib.contextmanager
def commits_without_a_block(session: sa_orm.Session) -> Iterator[None]:
    """For helpers whose effect has to stay: in a block the body is part of it; elsewhere what is open is committed
    after the body, with what was pending before."""
    if in_a_block(session):
        yield
        return
    if session.in_transaction():
        session.flush()
    yield
    if session.in_transaction():
        session.commit()


@contextlib.contextmanager
def undone_on_error(session: sa_orm.Session, **bind_arguments: Any) -> Iterator[None]:
    """In a transaction: a savepoint around the body, so that an error that is caught leaves the transaction usable.

    It flushes nothing, as `begin_nested()` would, and the body autoflushes nothing. With an opt-in session it costs no
    round trip: SAVEPOINT and RELEASE travel with other statements.
    """
    with session.connection(bind_arguments=bind_arguments).begin_nested(), session.no_autoflush:
        yield


def write_on(table: sa.FromClause | None = None) -> sa.Update:
    """What to name in `bind_arguments={"clause": ...}` and `get_bind(clause=...)`, so that a session that routes reads
    elsewhere answers with the database that it writes to. It is not executed."""
    return sa.update(_ANY_TABLE if table is None else table)  # type: ignore[arg-type]


_ANY_TABLE = sa.table("fictive")

"""The session that a function was given: any of SQLAlchemy's, opt-in or plain, scoped or not."""

from __future__ import annotations

import contextlib
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..errors import UnsupportedDialect
from .optin import OptInSession

__all__ = ["dialect_of", "require_postgresql", "session_of", "together"]


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


def together(session: sa_orm.Session, what: str) -> contextlib.AbstractContextManager[None]:
    """`OptInSession.together`. A plain session keeps its transaction open anyway, and its owner commits."""
    return session.together(what) if isinstance(session, OptInSession) else contextlib.nullcontext()

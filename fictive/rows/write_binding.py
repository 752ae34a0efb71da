"""How fictive's own writing statements run: as writes, whatever they look like, on the engine for writes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..config import WritesOutside
from ..session.given import write_on
from ..session.session import OptInSession, atomic
from ..session.written_by_statement import EXPIRES_ITSELF

__all__ = ["asked_about_write", "execute_write", "writing"]

_NOT_ROUTING = ("sqlalchemy", "flask_sqlalchemy", "fictive")


def writing(mapper: sa_orm.Mapper[Any], table: Any = None) -> dict[str, Any]:
    """Bind arguments that say what is written."""
    return {"mapper": mapper, "clause": write_on(mapper.local_table if table is None else table)}


def execute_write(
    session: sa_orm.Session,
    statement: sa.Executable,
    mapper: sa_orm.Mapper[Any],
    parameters: Mapping[str, Any] | None = None,
    *,
    table: Any = None,
    what: str = "",
) -> Any:
    """Run a statement that writes rows of `mapper`, or of `table` for it: an upsert that reads back what it wrote is a
    SELECT, and a session that sends those to a replica is asked about an UPDATE instead.

    With `what`, for messages, the statement also sets something for its transaction, which in autocommit ends with it.
    """
    options: dict[str, Any] = {"fictive_writes": True, EXPIRES_ITSELF: True}
    around: Any = contextlib.nullcontext()
    if what and isinstance(session, OptInSession) and not session.in_transaction():
        if session.writes_outside is WritesOutside.COMMIT:
            options["fictive_outside"] = True
        else:
            around = atomic(session, what)
    with around, asked_about_write(session, writing(mapper, table)):
        return session.execute(statement, parameters, bind_arguments={"mapper": mapper}, execution_options=options)


@functools.cache
def _routes(session_class: type[sa_orm.Session]) -> bool:
    """Whether the application chooses the engine."""
    own = (each for each in session_class.__mro__ if "get_bind" in each.__dict__)
    return any(each.__module__.partition(".")[0] not in _NOT_ROUTING for each in own)


@contextlib.contextmanager
def asked_about_write(session: Any, about: dict[str, Any]) -> Iterator[None]:
    """Whatever is executed meanwhile for that mapper runs where an UPDATE would."""
    session_class: Any = type(session)
    if not _routes(session_class):
        yield
        return
    choose = session.get_bind

    def get_bind(*args: Any, **kwargs: Any) -> Any:
        asked_for = args[0] if args else kwargs.get("mapper")
        is_this = asked_for in (None, about["mapper"], about["mapper"].base_mapper)
        return choose(**about) if is_this else choose(*args, **kwargs)

    session.get_bind = get_bind
    try:
        yield
    finally:
        del session.get_bind

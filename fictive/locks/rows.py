"""Locks on rows, for queues."""

from __future__ import annotations

from typing import Any, TypedDict, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles

from ..config import flag
from ..errors import ConfigurationError, UnsupportedDialect
from ..session import private

__all__ = ["ClaimOptions", "Rows", "claim"]

# any Select: of SQLAlchemy 2.1's, which has a type variable for each column, Select[Any] is one of one column
Rows = TypeVar("Rows", bound=sa.GenerativeSelect)


class _PostgreSQLOnly(sa.TextClause):
    """Nothing, on PostgreSQL. Elsewhere SQLAlchemy would leave SKIP LOCKED out without a word."""

    inherit_cache = True
    __visit_name__ = "fictive_postgresql_only"

    def __init__(self) -> None:
        super().__init__("")

    def __str__(self) -> str:
        return ""


@compiles(_PostgreSQLOnly)
def _refuse(element: _PostgreSQLOnly, compiler: Any, **kwargs: Any) -> str:
    if compiler.dialect.name == "default":  # `print(statement)`
        return ""
    raise UnsupportedDialect(f"claim() needs PostgreSQL; this is {compiler.dialect.name}+{compiler.dialect.driver}.")


@compiles(_PostgreSQLOnly, "postgresql")
def _nothing(element: _PostgreSQLOnly, compiler: Any, **kwargs: Any) -> str:
    return ""


class ClaimOptions(TypedDict, total=False):
    """What `claim()` takes by keyword; its docstring has the meanings."""

    of: Any
    key_share: bool
    nowait: bool
    skip_locked: bool


def claim(
    statement: Rows,
    limit: int | None = None,
    *,
    of: Any = None,
    key_share: bool = False,
    nowait: bool = False,
    skip_locked: bool = True,
) -> Rows:
    """`statement` as a claim on rows: FOR UPDATE SKIP LOCKED, at most `limit` of them. Sends nothing.

    The rows that it returns are this transaction's until its end, and nobody else who claims sees them meanwhile: `for
    job in session.scalars(claim(select(Job).where(Job.done.is_(False)).order_by(Job.id), limit=100)): ...`. Run it in
    a transaction; in autocommit `TransactionRequired` is raised, since the rows would be free again at once. 1 round
    trip, which takes BEGIN along: with one UPDATE and the COMMIT 3.

    `of` names the models or tables whose rows are locked; give it where `statement` joins others, whose rows would be
    locked too. `key_share` takes the weaker FOR NO KEY UPDATE, which rows that refer to these by a foreign key do not
    wait for. `skip_locked=False` waits for rows that others hold, and `nowait=True` with it raises instead (SQLSTATE
    55P03, `sqlalchemy.exc.OperationalError`); `nowait` together with `skip_locked` raises `ConfigurationError`.

    Without an ORDER BY the rows are any. The rows skipped make this no answer to "how many are there" (PostgreSQL
    documentation, "The Locking Clause": an inconsistent view, suitable for queue-like tables). Executing it on another
    database raises `UnsupportedDialect`.
    """
    if not isinstance(statement, sa.Select):
        raise TypeError(f"claim() takes a select(...), not {statement!r}.")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
        raise TypeError(f"claim(): limit = {limit!r}: expected a number of rows.")
    if limit is not None and limit < 1:
        raise ConfigurationError(f"claim(): limit = {limit!r}: expected at least 1.")
    if flag(nowait, "nowait") and flag(skip_locked, "skip_locked"):
        raise ConfigurationError(
            "claim(): nowait raises on a row that somebody else holds, and skip_locked, the default, passes it over. "
            "Give nowait=True together with skip_locked=False, or leave nowait out."
        )
    if private.locks_rows(statement):
        raise ConfigurationError("claim(): the statement has a with_for_update() already, which claim() adds itself.")
    claiming: sa.Select[Any] = statement if limit is None else statement.limit(limit)
    claiming = claiming.with_for_update(
        of=of, key_share=flag(key_share, "key_share"), nowait=nowait, skip_locked=skip_locked
    )
    return cast(Rows, claiming.suffix_with(_PostgreSQLOnly()))

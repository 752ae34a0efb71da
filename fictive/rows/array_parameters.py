"""Many values in one parameter: the text of a statement does not grow with their number, and it stays one message.

Pure: nothing here sends. PostgreSQL only ("Set Returning Functions", `unnest` of several arrays).
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

__all__ = ["unnested"]


class _PaddedText(sa.types.UserDefinedType[Any]):
    """`char(n)` of any length: it compares without trailing blanks, which text does not."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "bpchar"


def unnested(
    dialect: sa.Dialect, name: str, columns: Sequence[tuple[str, sa.types.TypeEngine[Any], Sequence[Any]]]
) -> sa.TableValuedAlias:
    """A table called `name` of values: for each column its name, its type and its values, all of one length.

    One array is one parameter, whatever its length.
    """
    arrays = [_array(dialect, type_, values) for _, type_, values in columns]
    names = [sa.column(column, type_) for column, type_, _ in columns]
    return sa.func.unnest(*arrays).table_valued(*names).render_derived(name=name)


def _array(dialect: sa.Dialect, type_: sa.types.TypeEngine[Any], values: Sequence[Any]) -> sa.ColumnElement[Any]:
    process = type_.dialect_impl(dialect).bind_processor(dialect)
    literal = _literal(values if process is None else list(map(process, values)))
    if literal is None:
        return sa.bindparam(None, list(values), ARRAY(type_), unique=True)
    return sa.cast(sa.bindparam(None, literal, sa.Text(), unique=True), ARRAY(_without_length(type_, dialect)))


def _literal(values: Sequence[Any]) -> str | None:
    """The text of an array of numbers, texts or UUIDs (PostgreSQL documentation, "Array Input and Output Syntax");
    None where there are others, which are left to the driver.

    A driver takes several times as long over ten thousand, and so does the server over `ARRAY[1, 2, …]`.
    """
    kinds = set(map(type, values))
    if kinds == {int}:
        return "{" + str(list(values))[1:-1] + "}"
    if not kinds <= {int, str, uuid.UUID, type(None)}:
        return None
    return "{" + ",".join(map(_element, values)) + "}"


def _element(value: Any) -> str:
    if value is None:
        return "NULL"
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _without_length(type_: sa.types.TypeEngine[Any], dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
    """A cast to `varchar(5)` would cut what is longer, and so make another value of it (PostgreSQL documentation,
    "Character Types"); without a length the value finds nothing, or is refused."""
    stored = type_.load_dialect_impl(dialect) if isinstance(type_, sa.types.TypeDecorator) else type_
    if not isinstance(stored, sa.String) or isinstance(stored, sa.Enum) or not (stored.length or stored.collation):
        return type_
    return _PaddedText() if isinstance(stored, sa.CHAR) else sa.Text()

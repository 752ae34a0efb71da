"""Primary keys as callers write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

__all__ = ["as_key", "python_types"]


def python_types(columns: Sequence[sa.ColumnElement[Any]]) -> list[type[Any] | None]:
    """The type of each column's values, where the column's own type says so plainly; else None."""
    return [_python_type(column) for column in columns]


def as_key(given: object, types: Sequence[type[Any] | None]) -> tuple[Any, ...] | None:
    """`given`, a value or a tuple of several, as a tuple that may be a key of `types`; None where it cannot be one."""
    key = given if isinstance(given, tuple) else (given,)
    return key if len(key) == len(types) and all(map(_fits, key, types)) else None


def _python_type(column: sa.ColumnElement[Any]) -> type[Any] | None:
    if isinstance(column.type, (sa.Integer, sa.String, sa.Uuid)) and not isinstance(column.type, sa.Enum):
        found: type[Any] = column.type.python_type
        return found
    return None


def _fits(value: object, python_type: type[Any] | None) -> bool:
    if python_type is not None:
        return isinstance(value, python_type)
    return value is not None and not isinstance(value, (list, set, frozenset, dict, Iterator))

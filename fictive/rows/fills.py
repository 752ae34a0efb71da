"""What the ORM would add to a row that does not give it: defaults, the discriminator, the first version. Pure."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

__all__ = ["Fills", "fills_of", "on_update"]


@dataclass
class Fills:
    """Columns that Python has values for, and what is left to others."""

    values: dict[sa.Column[Any], Callable[[int], Sequence[Any]]] = field(default_factory=dict)
    """By column, the values for so many rows."""
    has_sql: bool = False
    """Some column has a default that is an SQL expression or a sequence; SQLAlchemy writes it into an INSERT."""
    needs_row: bool = False
    """Some default is computed from the other values of its row, which only an INSERT of SQLAlchemy's has."""


def fills_of(mapper: sa_orm.Mapper[Any], given: Collection[sa.Column[Any]]) -> Fills:
    """What is added to rows of `given` columns in the mapper's one table."""
    found = Fills()
    table = mapper.local_table
    for column in table.columns:
        assert isinstance(column, sa.Column)
        if column in given:
            continue
        if column is mapper.polymorphic_on and mapper.polymorphic_identity is not None:
            found.values[column] = _constant(mapper.polymorphic_identity)
        elif column is mapper.version_id_col and callable(mapper.version_id_generator):
            found.values[column] = _constant(mapper.version_id_generator(None))
        elif column.default is not None:
            _add_default(found, column)
    return found


def _add_default(found: Fills, column: sa.Column[Any]) -> None:
    default: Any = column.default
    if default.is_sentinel:
        return
    if default.is_sequence or default.is_clause_element:
        found.has_sql = True
    elif default.is_callable:
        if _takes_context(default.arg):
            found.needs_row = True
        else:
            found.values[column] = lambda size: [default.arg(None) for _ in range(size)]
    else:
        found.values[column] = _constant(default.arg)


def _constant(value: Any) -> Callable[[int], Sequence[Any]]:
    return lambda size: list(itertools.repeat(value, size))


def _takes_context(function: Any) -> bool:
    """Whether a default wants SQLAlchemy's execution context; SQLAlchemy wraps those that do not (SQLAlchemy
    documentation, "Context-Sensitive Default Functions")."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a built-in such as `dict`, wrapped
        return False
    return any(each.default is each.empty and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
               for each in parameters)  # fmt: skip


def on_update(mapper: sa_orm.Mapper[Any], given: Collection[sa.Column[Any]]) -> dict[sa.Column[Any], Any]:
    """What an UPDATE that sets `given` columns sets besides: `onupdate` of the others, and the next version."""
    found: dict[sa.Column[Any], Any] = {}
    table = mapper.local_table
    for column in table.columns:
        assert isinstance(column, sa.Column)
        if column in given:
            continue
        if column is mapper.version_id_col:
            if isinstance(column.type, sa.Integer) and mapper.version_id_generator is not False:
                found[column] = column + 1
        elif column.onupdate is not None:
            default: Any = column.onupdate
            if default.is_callable and _takes_context(default.arg):
                continue
            found[column] = default.arg(None) if default.is_callable else default.arg
    return found

"""Values that the ORM supplies for columns a row leaves out: defaults, `onupdate`, discriminator, version. Pure.

One place for every way of writing, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

__all__ = ["InsertDefaults", "UpdateDefaults", "discriminator", "first_version", "none_is_default", "onupdate_of_each"]

Columns = Mapping[sa.Column[Any], Sequence[Any]]
"""Rows by column."""


class _RowContext:
    """What a default function with a parameter is given (SQLAlchemy documentation, "Context-Sensitive Default
    Functions"): the row's other values, looked up only where it asks."""

    def __init__(self, columns: Columns, row: int = 0) -> None:
        self._columns = columns
        self.row = row
        self.was_asked = False

    @property
    def current_parameters(self) -> dict[str, Any]:
        self.was_asked = True
        return {column.key: values[self.row] for column, values in self._columns.items()}

    def get_current_parameters(self, isolate_multiinsert_groups: bool = True) -> dict[str, Any]:
        return self.current_parameters


def _for_each(function: Any, columns: Columns, size: int) -> list[Any]:
    """What a default function with a parameter makes for each row."""
    context = _RowContext(columns)
    made = []
    for context.row in range(size):
        made.append(function(context))
    return made


def _in_sql(default: Any) -> Any:
    """A default that is no function, in a statement."""
    return default.next_value() if default.is_sequence else default.arg


class InsertDefaults:
    """What is added to rows of `given` columns in one table.

    `columns` are those that Python has values for: `fixed`, the discriminator and the first version, which no INSERT
    of SQLAlchemy Core's adds, and those with a default. It writes `in_sql`: expressions and sequences.
    """

    def __init__(
        self, table: sa.FromClause, given: Collection[Any], fixed: Mapping[sa.Column[Any], Any] | None = None
    ) -> None:
        self.fixed = {column: value for column, value in (fixed or {}).items() if column not in given}
        missing: list[Any] = [each for each in table.columns if each not in given and each not in self.fixed]
        with_default = [each for each in missing if each.default is not None and not each.default.is_sentinel]
        self.in_sql = [each for each in with_default if each.default.is_sequence or each.default.is_clause_element]
        self._in_python = [each for each in with_default if each not in self.in_sql]
        self.columns: list[sa.Column[Any]] = [*self.fixed, *self._in_python]

    def values(self, given: Columns, size: int) -> dict[sa.Column[Any], Sequence[Any]]:
        """So many rows as they are given, and then the values of `columns`. A function is called for each row, and
        sees what was given and what other defaults made before."""
        found: dict[Any, Sequence[Any]] = {**given, **{column: [v] * size for column, v in self.fixed.items()}}
        for column in self._in_python:
            default: Any = column.default
            found[column] = _for_each(default.arg, dict(found), size) if default.is_callable else [default.arg] * size
        return found

    def row(self, given: Mapping[sa.Column[Any], Any]) -> dict[sa.Column[Any], Any]:
        """For one row, all of it in the statement: values, SQL expressions, the next number of a sequence."""
        made = self.values({column: [value] for column, value in given.items()}, 1)
        return {column: value for column, (value,) in made.items()} | self.sql_values()

    def sql_values(self) -> dict[sa.Column[Any], Any]:
        """For each row the SQL expression, or the next number of the sequence."""
        return {column: _in_sql(column.default) for column in self.in_sql}


def none_is_default(column: sa.Column[Any]) -> bool:
    """Whether None in a new row stands for what is made where no value is given, as in a flush."""
    is_made = column.default is not None or column.server_default is not None or column.primary_key
    return is_made and not column.type.should_evaluate_none


def discriminator(mapper: sa_orm.Mapper[Any]) -> dict[sa.Column[Any], Any]:
    """The column of a hierarchy that says which class a row is, and its value for this one."""
    column: Any = mapper.polymorphic_on
    known = isinstance(column, sa.Column) and mapper.polymorphic_identity is not None
    return {column: mapper.polymorphic_identity} if known else {}


def first_version(mapper: sa_orm.Mapper[Any]) -> dict[sa.Column[Any], Any]:
    """The version of a new row, where Python counts."""
    column: Any = mapper.version_id_col
    counted = isinstance(column, sa.Column) and callable(mapper.version_id_generator)
    return {column: mapper.version_id_generator(None)} if counted else {}  # type: ignore[operator, misc]


class UpdateDefaults:
    """What an UPDATE that sets `given` sets too: `onupdate` of the other columns, and the next version.

    `values` are those for the one row that is given. A function is called for each of many rows only if it looks at
    its row: `by_row` are those columns. The others hold for all.
    """

    def __init__(self, mapper: sa_orm.Mapper[Any], given: Mapping[sa.Column[Any], Any]) -> None:
        self.values: dict[sa.Column[Any], Any] = {}
        self.by_row: list[sa.Column[Any]] = []
        for column in mapper.local_table.columns:
            if not isinstance(column, sa.Column) or column in given:
                continue
            default: Any = column.onupdate
            if column is mapper.version_id_col:
                if isinstance(column.type, sa.Integer) and mapper.version_id_generator is not False:
                    self.values[column] = column + 1
                elif callable(mapper.version_id_generator):
                    self.values[column] = mapper.version_id_generator(None)
            elif default is not None and default.is_callable:
                context = _RowContext({each: [value] for each, value in given.items()})
                self.values[column] = default.arg(context)
                if context.was_asked:
                    self.by_row.append(column)
            elif default is not None:
                self.values[column] = _in_sql(default)

    @property
    def for_all(self) -> dict[sa.Column[Any], Any]:
        return {column: value for column, value in self.values.items() if column not in self.by_row}


def onupdate_of_each(columns: Sequence[Any], given: Columns, size: int) -> dict[sa.Column[Any], Sequence[Any]]:
    """For so many rows, the values of columns that are `by_row`."""
    return {column: _for_each(column.onupdate.arg, given, size) for column in columns}

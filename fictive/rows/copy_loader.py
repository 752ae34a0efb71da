"""How the rows of a call get into a table: by COPY where that stores what INSERT stores, else by INSERT."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from ..drivers import driver_for
from ..drivers.copying import NotCopyable
from .bulk_input import Batch
from .bulk_operation import BulkOperation
from .copy_format import CopyFormat
from .copy_stream import CopyStream, copy_statement
from .relations import relation_of
from .upsert_sql import CreateStaging, DropStaging, StagingTable, Upsert

__all__ = ["copy_into_table", "insert_rows", "staged", "statements_for"]

Values = Sequence[Sequence[Any]]
"""Rows, by column."""


def copy_into_table(
    operation: BulkOperation, connection: sa.Connection, batches: Iterator[Batch], *, is_alone: bool
) -> bool:
    """Send all batches to the model's table by COPY. False, and nothing is sent, where COPY is not the way: a default
    is SQL, a type wraps its values in SQL, or the relation does not take COPY as it takes INSERT."""
    defaults = operation.insert_defaults()
    given = operation.given_columns()
    columns = [*given, *defaults.columns]
    if defaults.has_sql or not columns or not _can_copy(connection) or not all(map(_is_plain, columns)):
        return False
    relation = relation_of(connection, operation.table, anew=is_alone)
    if relation is None or not relation.can_copy(columns):
        return False

    def values(batch: Batch) -> Values:
        return [*batch.columns, *defaults.values(dict(zip(given, batch.columns, strict=True)), batch.size)]

    _send(operation, connection, operation.table, columns, batches, values, is_alone=is_alone)
    return True


@contextlib.contextmanager
def staged(
    operation: BulkOperation, connection: sa.Connection, batches: Iterator[Batch], upsert: Upsert, *, is_alone: bool
) -> Iterator[StagingTable]:
    """A staging table with all batches in it, and with what they leave out: for an UPDATE the columns of `by_row`,
    else those that Python has defaults for. It is dropped at the end; with the transaction, where that is alone."""
    given = operation.given_columns()
    update = operation.update_defaults(operation.first_row()) if upsert.by_row else None
    insert = None if operation.function == "update_many()" else operation.insert_defaults()
    more = [*(upsert.by_row if update else ()), *(insert.columns if insert else ())]
    stage = StagingTable(operation.table, [*given, *more])

    def values(batch: Batch) -> Values:
        rows = dict(zip(given, batch.columns, strict=True))
        made = update.rows(rows, batch.size) if update else insert.values(rows, batch.size) if insert else []
        return [*batch.columns, *made, range(batch.first, batch.first + batch.size)]

    operation.create_staging(connection, CreateStaging(stage))
    _send(operation, connection, stage.table, list(stage.table.columns), batches, values, is_alone=is_alone)
    yield stage
    if not is_alone:
        connection.execute(DropStaging(stage))


def insert_rows(
    connection: sa.Connection, table: sa.Table, columns: Sequence[sa.Column[Any]], values: Values, size: int
) -> None:
    """INSERT of these rows; SQLAlchemy adds the defaults of other columns."""
    # psycopg sends rows one by one unless they return something
    returned: list[Any] = [sa.literal_column("1")] if connection.dialect.driver == "psycopg" else []
    statement = sa.insert(table).inline()
    statement = statement.returning(*returned) if returned else statement
    if not columns:
        connection.execute(statement, [{}] * size)
        return
    for each, rows in statements_for(statement, columns, values):
        connection.execute(each, rows)


def statements_for(
    statement: Any, columns: Sequence[sa.Column[Any]], values: Values
) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """An INSERT and its parameters: several where `sa.null()` is among the values, which is no parameter."""
    keys = [column.key for column in columns]
    rows = [dict(zip(keys, row, strict=True)) for row in zip(*values, strict=True)]
    null = sa.null()
    if not any(null is value for column in values for value in column if type(value) is type(null)):
        yield statement, rows
        return
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        nulls = tuple(key for key, value in row.items() if value is null)
        groups.setdefault(nulls, []).append({key: value for key, value in row.items() if value is not null})
    for nulls, group in groups.items():
        yield (statement.values(dict.fromkeys(nulls, null)) if nulls else statement), group


def _send(
    operation: BulkOperation, connection: sa.Connection, table: sa.Table, columns: Sequence[sa.Column[Any]],
    batches: Iterator[Batch], values: Callable[[Batch], Values], *, is_alone: bool,
) -> None:  # fmt: skip
    """Send all batches; those that COPY cannot take by INSERT."""
    model = operation.mapper.class_.__name__
    copies = _can_copy(connection) and all(map(_is_plain, columns))
    driver_text = driver_for(connection.dialect).copy_texts(connection) if copies else _not_copyable
    format_ = CopyFormat(connection.dialect, columns, driver_text) if copies else None

    def blocks() -> Iterator[str]:
        for batch in operation.tracked(batches):
            batch.check_values(model)
            rows = values(batch)
            try:
                block = _not_copyable(batch) if format_ is None else format_.block(rows)
            except NotCopyable:
                insert_rows(connection, table, columns, rows, batch.size)
            else:
                yield block

    if format_ is None:
        for _ in blocks():
            pass
        return
    is_alone = is_alone or operation.reader.is_held
    CopyStream(connection, copy_statement(connection, table, columns), is_alone=is_alone).send(blocks())


def _not_copyable(_: Any) -> str:
    raise NotCopyable


def _can_copy(connection: sa.Connection) -> bool:
    return connection.dialect.name == "postgresql" and driver_for(connection.dialect).can_copy()


def _is_plain(column: sa.Column[Any]) -> bool:
    """Whether values go as they are, without an SQL function of their type around them."""
    return column.type.bind_expression(sa.bindparam("value", type_=column.type)) is None

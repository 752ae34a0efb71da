"""How the rows of a call get into a table: by COPY where that stores what INSERT stores, else by INSERT."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from ..drivers import driver_for
from ..drivers.copying import CopyWriter, NotCopyable
from ..session import private
from .bulk_input import Batch, as_mappings, has_one_of
from .bulk_operation import BulkOperation
from .column_defaults import InsertDefaults, none_is_default
from .copy_format import CopyFormat
from .relations import can_copy_into, table_name
from .upsert_sql import Upsert

__all__ = ["copy_into_table", "insert_rows", "staged", "statements_for"]

Values = Sequence[Sequence[Any]]
Rows = Mapping[sa.Column[Any], Sequence[Any]]
"""Both by column."""


def copy_into_table(operation: BulkOperation, batches: Iterator[Batch]) -> bool:
    """Send all batches to the model's table by COPY. False, and nothing is sent, where COPY is not the way: a default
    is SQL, a type wraps its values in SQL, or the relation does not take COPY as it takes INSERT."""
    defaults = operation.insert_defaults
    columns = [*operation.columns(operation.reader.names), *defaults.columns]
    if defaults.in_sql or not columns or not _can_copy(operation.connection, columns):
        return False
    if not can_copy_into(operation.connection, operation.table, columns, anew=operation.is_alone):
        return False

    def values(batch: Batch) -> Values:
        return list(defaults.values(operation.by_column(batch), batch.size).values())

    _send(operation, operation.table, columns, batches, values)
    return True


@contextlib.contextmanager
def staged(
    operation: BulkOperation, batches: Iterator[Batch], upsert: Upsert, defaults: InsertDefaults | None = None
) -> Iterator[sa.Table]:
    """A staging table with all batches in it, and with what they leave out: the `defaults` of new rows; without them,
    for an UPDATE, the columns of `by_row`. It is dropped at the end; with the transaction, where that is alone."""
    more = upsert.by_row if defaults is None else defaults.columns
    stage = operation.create_staging([*operation.columns(operation.reader.names), *more])

    def values(batch: Batch) -> Values:
        rows = operation.by_column(batch)
        rows = rows | operation.row_defaults(upsert, batch) if defaults is None else defaults.values(rows, batch.size)
        return [*rows.values(), range(operation.done, operation.done + batch.size)]

    _send(operation, stage, list(stage.columns), batches, values)
    yield stage
    if not operation.is_alone:
        operation.connection.execute(sa.schema.DropTable(stage))


def insert_rows(connection: sa.Connection, table: sa.Table, rows: Rows, size: int) -> None:
    """INSERT of so many rows; SQLAlchemy adds the defaults of other columns, and of those that are None."""
    statement: Any = sa.insert(table).inline()
    if connection.dialect.driver == "psycopg":  # which sends rows one by one unless they return something
        statement = statement.returning(sa.literal_column("1"))
    for each, parameters, _ in statements_for(statement, rows, size):
        connection.execute(each, parameters)


def statements_for(
    statement: Any, rows: Rows, size: int, names: Mapping[Any, str] | None = None, *, with_defaults: bool = True
) -> Iterator[tuple[Any, list[dict[str, Any]], Sequence[int]]]:
    """An INSERT, its parameters, and which rows they are of: several where `sa.null()` is among the values, which is
    no parameter, or None that stands for a default. The `names` of parameters are the columns' own."""
    keys = {column: column.key if names is None else names[column] for column in rows}
    parameters = as_mappings({keys[column]: values for column, values in rows.items()}, size)
    absent = {
        keys[column] for column, values in rows.items()
        if with_defaults and none_is_default(column) and has_one_of(NoneType, [values])
    }  # fmt: skip
    if not absent and not has_one_of(sa.sql.elements.Null, rows.values()):
        yield statement, parameters, range(size)
        return
    null = sa.null()
    groups: dict[Any, list[int]] = {}
    for number, row in enumerate(parameters):
        nulls = tuple(key for key, value in row.items() if value is null)
        given = tuple(
            key for key, value in row.items() if value is not null and (value is not None or key not in absent)
        )
        groups.setdefault((nulls, given), []).append(number)
    for (nulls, given), numbers in groups.items():
        part = [{key: parameters[number][key] for key in given} for number in numbers]
        yield (statement.values(dict.fromkeys(nulls, null)) if nulls else statement), part, numbers


def _send(
    operation: BulkOperation, table: sa.Table, columns: Sequence[sa.Column[Any]], batches: Iterator[Batch],
    values: Callable[[Batch], Values],
) -> None:  # fmt: skip
    """Send all batches; those that COPY cannot take by INSERT."""
    connection = operation.connection
    text_of: Callable[[Values], str] = _not_copyable
    if _can_copy(connection, columns):
        driver_text = driver_for(connection.dialect).copy_texts(connection)
        text_of = CopyFormat(connection.dialect, columns, driver_text).block
    # those that the rows give come first
    defaulted = [at for at, _ in enumerate(operation.reader.names) if none_is_default(columns[at])]

    def blocks() -> Iterator[str]:
        for batch in batches:
            rows = values(batch)
            try:
                block = _not_copyable(rows) if has_one_of(NoneType, [rows[at] for at in defaulted]) else text_of(rows)
            except NotCopyable:
                insert_rows(connection, table, dict(zip(columns, rows, strict=True)), batch.size)
            else:
                yield block

    stream = CopyStream(connection, table, columns, is_alone=operation.is_alone or operation.reader.is_held)
    stream.send(blocks())


def _not_copyable(_: Values) -> str:
    raise NotCopyable


def _can_copy(connection: sa.Connection, columns: Sequence[sa.Column[Any]]) -> bool:
    """Whether there is COPY, and values go as they are, without an SQL function of their type around them."""
    return (
        connection.dialect.name == "postgresql"
        and driver_for(connection.dialect).can_copy()
        and all(column.type.bind_expression(sa.bindparam("value", type_=column.type)) is None for column in columns)
    )


# -- one COPY over many batches ---------------------------------------------------------------------------------------


class CopyStream:
    """Sends blocks of lines to a table by COPY, kept open over many of them where that is safe.

    Asking for the next block may run the caller's code, and that may use the connection, which can do nothing else
    during a COPY. With `is_alone`, nothing but SQLAlchemy's statements can come in between; each of them ends the COPY
    before it runs, and from then on, as without `is_alone`, blocks are asked for while no COPY is open. One COPY for
    all is up to twice as fast: the server works while the next block is made.
    """

    def __init__(
        self, connection: sa.Connection, table: sa.Table, columns: Sequence[sa.Column[Any]], *, is_alone: bool
    ) -> None:
        self._connection = connection
        names = ", ".join(connection.dialect.identifier_preparer.quote(column.name) for column in columns)
        # the drivers take it as it is, where SQLAlchemy's statements have their % doubled
        self._statement = f"COPY {table_name(connection, table)} ({names}) FROM STDIN".replace("%%", "%")
        self._is_alone = is_alone
        self._writer: CopyWriter | None = None
        self._callers_error: BaseException | None = None
        self._copy_error: BaseException | None = None
        self._block: str | None = None

    def send(self, blocks: Iterator[str]) -> None:
        """Send all of `blocks`. What they raise comes out unchanged; errors of the server are SQLAlchemy's."""
        listens = self._is_alone
        if listens:
            event.listen(self._connection, "before_cursor_execute", self._make_way)
        try:
            while self._block is not None or (block := next(blocks, None)) is not None:
                self._block = block if self._block is None else self._block
                private.run_on_cursor(self._connection, self._statement, lambda cursor: self._copy(cursor, blocks))
                if self._callers_error is not None:
                    raise self._callers_error
        finally:
            if listens:
                event.remove(self._connection, "before_cursor_execute", self._make_way)

    def _copy(self, cursor: Any, blocks: Iterator[str]) -> None:
        writer = self._writer = driver_for(self._connection.dialect).copy_writer(cursor, self._statement)
        try:
            while self._block is not None:
                writer.write(self._block)
                self._block = self._next(blocks) if self._is_alone else None
                if not self._is_alone:  # or made way
                    break
            if self._copy_error is not None:
                raise self._copy_error
            if self._callers_error is None:
                writer.finish()
            else:
                with contextlib.suppress(Exception):  # the caller's error is the one to see
                    writer.finish()
        except BaseException:
            writer.abort()
            raise
        finally:
            self._writer = None

    def _next(self, blocks: Iterator[str]) -> str | None:
        try:
            return next(blocks, None)
        except BaseException as error:  # not here, where SQLAlchemy would take it for the driver's
            self._callers_error = error
            return None

    def _make_way(self, *_: Any) -> None:
        """End the COPY before another statement on the connection."""
        if self._writer is None:
            return
        self._is_alone = False
        writer, self._writer = self._writer, None
        try:
            writer.finish()
        except BaseException as error:
            self._copy_error = error
            raise

"""How the rows of a call get into a table: by COPY where it can be, their own table or a staging one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.sql.expression import ClauseElement

from ..drivers import driver_for
from ..drivers.copying import NotCopyable
from .batches import Batch
from .calls import Call
from .copying import Encoder
from .fills import fills_of
from .merging import CreateStage, DropStage, Stage
from .sending import CopyIn, copy_statement

__all__ = ["Route", "refuse_expressions"]


class Route:
    """How the rows of a call get into a table by COPY, their own one or a stage."""

    def __init__(
        self, call: Call, columns: list[sa.Column[Any]], values: list[Callable[[int], Sequence[Any]]]
    ) -> None:
        self._call = call
        self.columns = columns
        self.fills = values
        self.stage: Stage | None = None

    @classmethod
    def into_table(cls, call: Call, connection: sa.Connection) -> Route | None:
        """None where the rows cannot go by COPY."""
        names = call.names_of_head()
        given = [call.column(name) for name in names]
        fills = fills_of(call.mapper, given)
        if fills.has_sql or fills.needs_row or not (given or fills.values) or not _can_copy(connection):
            return None
        route = cls(call, [*given, *fills.values], list(fills.values.values()))
        return route if all(map(_is_plain, route.columns)) else None

    @classmethod
    def into_stage(cls, call: Call, connection: sa.Connection, *, only_given: bool = False) -> Route | None:
        """None where SQLAlchemy has to make the INSERT. Where there is no COPY the stage is filled by INSERT."""
        given = [call.column(name) for name in call.names_of_head()]
        fills = fills_of(call.mapper, given)
        if only_given:
            fills.values.clear()
        elif fills.needs_row:
            return None
        route = cls(call, [*given, *fills.values], list(fills.values.values()))
        if not all(map(_is_plain, route.columns)):
            return None
        table: Any = call.mapper.local_table
        route.stage = Stage(table, route.columns)
        return route

    def send(
        self, connection: sa.Connection, batches: Iterator[Batch], insert: Callable[[Batch], None], *, is_alone: bool
    ) -> None:
        """Send all batches; those that COPY cannot take by `insert`."""
        if not _can_copy(connection):
            for batch in batches:
                insert(batch)
            return
        dialect = connection.dialect
        table: Any = self.stage.table if self.stage is not None else self._call.mapper.local_table
        columns = list(table.columns) if self.stage is not None else self.columns
        encoder = Encoder(dialect, columns, driver_for(dialect).copy_texts(connection))

        def blocks() -> Iterator[str]:
            for batch in batches:
                try:
                    block = encoder.block(self._values(batch))
                except NotCopyable:
                    insert(batch)
                else:
                    yield block

        statement = copy_statement(dialect, table, [column.name for column in columns])
        held = self._call.reader.is_held
        CopyIn(connection, statement, is_alone=is_alone or held).send(blocks())

    @contextlib.contextmanager
    def staged(self, connection: sa.Connection, batches: Iterator[Batch], *, is_alone: bool) -> Iterator[Stage]:
        """The stage with all batches in it. It is dropped at the end; with the transaction, where that is alone."""
        stage = self.stage
        assert stage is not None
        names = [column.key for column in stage.table.columns]

        def insert(batch: Batch) -> None:
            refuse_expressions(self._call.mapper, batch)
            rows = zip(*self._values(batch), strict=True)
            connection.execute(sa.insert(stage.table), [dict(zip(names, row, strict=True)) for row in rows])

        connection.execute(CreateStage(stage))
        self.send(connection, self._call.tracked(batches), insert, is_alone=is_alone)
        yield stage
        if not is_alone:
            connection.execute(DropStage(stage))

    def _values(self, batch: Batch) -> list[Sequence[Any]]:
        values = [*batch.columns, *(fill(batch.size) for fill in self.fills)]
        return values if self.stage is None else [*values, range(batch.first, batch.first + batch.size)]


def _can_copy(connection: sa.Connection) -> bool:
    return connection.dialect.name == "postgresql" and driver_for(connection.dialect).can_copy()


def _is_plain(column: sa.Column[Any]) -> bool:
    """Whether values go as they are, without an SQL function of their type around them."""
    return column.type.bind_expression(sa.bindparam("value", type_=column.type)) is None


def refuse_expressions(mapper: sa_orm.Mapper[Any], batch: Batch) -> None:
    for name, column in zip(batch.names, batch.columns, strict=True):
        for kind in set(map(type, column)):
            if issubclass(kind, ClauseElement) or hasattr(kind, "__clause_element__"):
                raise TypeError(
                    f"{mapper.class_.__name__}.{name} is given an SQL expression; rows are values. Make it a default "
                    "of the column, or execute an insert() or update() of your own."
                )

"""COPY into one table, kept open over many batches where that is safe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from ..drivers import driver_for
from ..drivers.copying import CopyWriter
from ..session import private
from .relations import table_name

__all__ = ["CopyStream", "copy_statement"]


def copy_statement(connection: sa.Connection, table: sa.Table, columns: Sequence[sa.Column[Any]]) -> str:
    """`COPY table (columns) FROM STDIN`, names quoted as needed, in the schema that `schema_translate_map` says."""
    prepare = connection.dialect.identifier_preparer
    names = ", ".join(prepare.quote(column.name) for column in columns)
    # the drivers take it as it is, where SQLAlchemy's statements have their % doubled
    return f"COPY {table_name(connection, table)} ({names}) FROM STDIN".replace("%%", "%")


class CopyStream:
    """Sends blocks of lines by COPY on `connection`.

    Asking for the next block may run the caller's code, and that may use the connection, which can do nothing else
    during a COPY. With `is_alone`, nothing but SQLAlchemy's statements can come in between; each of them ends the COPY
    before it runs, and from then on, as without `is_alone`, blocks are asked for while no COPY is open. One COPY for
    all is up to twice as fast: the server works while the next block is made.
    """

    def __init__(self, connection: sa.Connection, statement: str, *, is_alone: bool) -> None:
        self._connection = connection
        self._statement = statement
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
                self._block = None
                if not self._is_alone:
                    break
                self._block = self._next(blocks)
                if not self._is_alone:  # made way
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

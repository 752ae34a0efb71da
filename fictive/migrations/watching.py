"""What an attempt at migrating did: whether it can be made again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import sqlalchemy as sa
from alembic import context
from sqlalchemy import event

from ..drivers import TransactionStatus, driver_for
from ..drivers.base import dbapi_connection

__all__ = ["Watch"]


class Watch:
    """While it is entered: gives each transaction of `engines` a `lock_timeout`, and sees what this thread commits.

    `whole` says whether all that was committed were whole migrations. Alembic ends each one by writing its version, so
    a commit that comes after anything else is one in the middle.
    """

    def __init__(self, engines: Iterable[sa.Engine], milliseconds: int) -> None:
        self.whole = True
        self._engines = list(dict.fromkeys(engines))
        self._milliseconds = milliseconds
        self._thread = threading.get_ident()
        self._unfinished: set[sa.Connection] = set()
        self._listeners: list[tuple[str, Callable[..., None]]] = [
            ("begin", self._begun),
            ("after_cursor_execute", self._executed),
            ("handle_error", self._failed),
            ("commit", self._committed),
            ("rollback", self._rolled_back),
        ]

    def __enter__(self) -> Watch:
        for engine in self._engines:
            for name, listener in self._listeners:
                event.listen(engine, name, listener)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for engine in self._engines:
            for name, listener in self._listeners:
                event.remove(engine, name, listener)

    def _begun(self, connection: sa.Connection) -> None:
        if threading.get_ident() == self._thread:
            # local to a transaction; in an autocommit_block() it is local to this statement, so there is none
            connection.execute(sa.select(sa.func.set_config("lock_timeout", str(self._milliseconds), True)))

    def _executed(
        self, connection: sa.Connection, cursor: Any, statement: Any, parameters: Any, executed: Any, many: bool
    ) -> None:
        if threading.get_ident() != self._thread:
            return
        element = executed.compiled.statement if executed.compiled is not None else None
        if _writes_version(element):
            self._unfinished.discard(connection)
        elif not isinstance(element, sa.Select):
            self._unfinished.add(connection)
            if _stands_alone(connection):
                self.whole = False

    def _failed(self, failure: Any) -> None:
        # what fails outside a transaction may leave something too, such as an invalid index
        connection = failure.connection
        if threading.get_ident() != self._thread or connection is None or connection.invalidated:
            return
        if _stands_alone(connection):
            self.whole = False

    def _committed(self, connection: sa.Connection) -> None:
        if connection in self._unfinished:
            self.whole = False
            self._unfinished.discard(connection)

    def _rolled_back(self, connection: sa.Connection) -> None:
        self._unfinished.discard(connection)


def _stands_alone(connection: sa.Connection) -> bool:
    """Whether what was sent last was committed by itself, or was a COMMIT."""
    return driver_for(connection.dialect).status(dbapi_connection(connection)) is TransactionStatus.IDLE


def _writes_version(element: Any) -> bool:
    table = getattr(element, "table", None)  # of an INSERT, UPDATE, DELETE
    if isinstance(element, sa.schema.CreateTable):
        table = element.element
    return isinstance(table, sa.Table) and table.name == _version_table()


def _version_table() -> str | None:
    try:
        return str(context.get_context().version_table)
    except Exception:  # just that is what Alembic raises where env.py has configured none yet
        return None

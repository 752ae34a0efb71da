"""`transaction()` and `pipeline()` of psycopg's connection, on connections of a sandbox.

psycopg's own look at the server's status and send savepoints past the sandbox.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .shared_connection import SandboxConnection

__all__ = ["block_of", "check_no_block"]

_numbers = itertools.count(1)


class SandboxTransaction:
    """As `psycopg.Transaction`: a transaction, or a savepoint where one is open."""

    def __init__(
        self, connection: SandboxConnection, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> None:
        self.connection = connection
        self.savepoint_name = savepoint_name or ""
        self.force_rollback = force_rollback
        self._is_outer = False

    def __enter__(self) -> SandboxTransaction:
        connection = self.connection
        self._is_outer = not connection.state
        if self._is_outer:
            self._send("BEGIN")
        elif not self.savepoint_name:
            self.savepoint_name = f"_pg3_{next(_numbers)}"
        if self.savepoint_name:
            try:
                self._send(f'SAVEPOINT "{self._quoted_name()}"')
            except BaseException:
                if self._is_outer:
                    self._send("ROLLBACK")
                raise
        connection.blocks += 1
        return self

    def __exit__(self, type_: Any, error: BaseException | None, traceback: Any) -> bool:
        from psycopg import Rollback

        self.connection.blocks -= 1
        if self.connection.closed:
            return False
        if error is None and not self.force_rollback:
            self._send("COMMIT" if self._is_outer else f'RELEASE SAVEPOINT "{self._quoted_name()}"')
            return False
        if self._is_outer:
            self._send("ROLLBACK")
        else:
            self._send(f'ROLLBACK TO SAVEPOINT "{self._quoted_name()}"')
            self._send(f'RELEASE SAVEPOINT "{self._quoted_name()}"')
        target: Any = error.transaction if isinstance(error, Rollback) else error
        return isinstance(error, Rollback) and (target is None or target is self)

    def _quoted_name(self) -> str:
        return self.savepoint_name.replace('"', '""')

    def _send(self, command: str) -> None:
        self.connection.send(command)


class SandboxPipeline(contextlib.AbstractContextManager["SandboxPipeline"]):
    """As `psycopg.Pipeline`, but each statement is sent at once, and raises its own error."""

    def __init__(self, connection: SandboxConnection) -> None:
        self.connection = connection

    def __exit__(self, *exc_info: Any) -> None:
        """Nothing waits."""

    def sync(self) -> None:
        """Nothing waits."""


_BLOCKS: dict[str, Callable[..., Any]] = {"transaction": SandboxTransaction, "pipeline": SandboxPipeline}


def block_of(connection: SandboxConnection, name: str) -> Callable[..., Any] | None:
    """The method of psycopg's connection that gives a block; None for another name."""
    block = _BLOCKS.get(name)
    return functools.partial(block, connection) if block is not None else None


def check_no_block(connection: SandboxConnection, name: str) -> None:
    """Raise what psycopg raises for `commit()` and `rollback()` within `transaction()`."""
    if connection.blocks:
        from psycopg import ProgrammingError

        raise ProgrammingError(f"Explicit {name}() forbidden within a Transaction context.")

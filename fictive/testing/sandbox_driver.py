"""What a session's connection object asks of a driver, on connections of a sandbox."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import sqlalchemy as sa

from ..drivers import NO_OPTIONS, Driver
from ..drivers.base import Rest
from ..drivers.pending import PendingCommands
from ..drivers.postgresql import PostgreSQLDriver

__all__ = ["sandbox_driver"]


class _InSandbox(PostgreSQLDriver):
    """In front of the driver's own class: commands are given to the sandbox one by one, and nothing is switched."""

    def enter_autocommit(self, dbapi: Any, dialect: sa.Dialect) -> None:
        dbapi.autocommit = True

    def leave_autocommit(self, dbapi: Any) -> None:
        dbapi.autocommit = False

    def resume_autocommit(self, dbapi: Any, dialect: sa.Dialect, rest: Rest) -> None:
        self.set_characteristics(dbapi, NO_OPTIONS)
        dbapi.autocommit = True

    def adopt(self, dbapi: Any) -> None:
        dbapi.autocommit = False

    def restore(self, dbapi: Any, dialect: sa.Dialect, rest: Rest) -> bool:
        return True

    def status_of(self, dbapi: Any) -> Callable[[], int]:
        return functools.partial(getattr, dbapi, "state")

    def own_transaction(self, dbapi: Any) -> bool:
        return False

    def level_name(self, level: Any) -> str:
        return str(getattr(level, "name", level)).replace("_", " ")

    def poll(self, dbapi: Any) -> Callable[[int], Any]:
        return _quiet

    def is_alive(self, dbapi: Any) -> bool:
        return not dbapi.closed

    def forget(self, dbapi: Any, dialect: sa.Dialect, remembered: object) -> bool:
        return False

    def notifications(self, dbapi: Any) -> Callable[[], list[tuple[str, str]]] | None:
        return None  # they come at COMMIT, and there is none

    def send(self, server: Any, commands: list[str]) -> None:
        server.trips += 1
        self._send(server, commands)

    def commit(self, server: Any, releases: list[str]) -> None:
        self._send(server, [*releases, "COMMIT"])

    def _send(self, server: Any, commands: list[str]) -> None:
        if len(commands) > 1:
            server.dbapi.give(commands[:-1])  # one message
        server.dbapi.send(commands[-1])

    def can_carry(self, dbapi: Any) -> bool:
        return True

    def execute_with(self, server: Any, pending: PendingCommands, query: Any, parameters: Any) -> Any:
        commands = pending.take()
        if pending.bound:
            return self._run_bound(server, commands, query, parameters)
        server.dbapi.give(commands)
        pending.sent(commands)
        cursor = server.dbapi.cursor()
        cursor.execute(query, parameters)
        return cursor

    def _run_bound(self, server: Any, commands: list[str], query: Any, parameters: Any) -> Any:
        """What the server runs as one transaction, since it comes in one message."""
        dbapi = server.dbapi
        dbapi.give(["BEGIN", *commands])
        try:
            cursor = dbapi.cursor()
            cursor.execute(query, parameters)
            dbapi.give(["COMMIT"])
        except BaseException:
            dbapi.give(["ROLLBACK"])
            raise
        return cursor

    def set_command(self, dbapi: Any, settings: Iterable[tuple[str, str | None]]) -> str:
        return super().set_command(dbapi.shared.dbapi, settings)


def _quiet(timeout: int) -> bool:
    return False


@functools.cache
def sandbox_driver(driver: Driver) -> Driver:
    """The counterpart of `driver` for connections of a sandbox."""
    if isinstance(driver, _InSandbox):
        return driver
    made: Driver = type(f"Sandbox{type(driver).__name__}", (_InSandbox, type(driver)), {"carries": True})()
    return made

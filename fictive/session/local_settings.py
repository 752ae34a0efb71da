"""SET LOCAL for part of a transaction: the server's settings hold for a block, and not past it.

PostgreSQL keeps what SET LOCAL set to the end of the transaction: ROLLBACK TO undoes it, RELEASE does not (PostgreSQL
documentation, "SET"). So what was there before is kept, on the server, in a setting of our own, and put back at the
end of the block. Both ride with the next statement; on connections that cannot carry they are a round trip each.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import sqlalchemy as sa

from ..connection.engines import status_of
from ..connection.link import SessionConnection
from ..drivers import TransactionStatus
from . import private

if TYPE_CHECKING:
    from .transaction import Transaction

__all__ = ["LocalSettings"]

log = logging.getLogger("fictive.session")

_NAME = re.compile(r"[a-z_]+")
_OPEN = "fictive.local_settings"


class LocalSettings:
    """Settings of one block, such as `{"lock_timeout": 5000}`, on each connection that its transaction has or takes.

    On connections to other databases nothing is set. `whole`: the block is the whole transaction, at whose end
    PostgreSQL itself forgets them.
    """

    def __init__(self, transaction: Transaction, values: Mapping[str, int], *, whole: bool = False) -> None:
        bad = [name for name in values if not _NAME.fullmatch(name)]
        assert not bad, bad
        self._transaction = transaction
        self._values = dict(values)
        self._whole = whole
        self._is_open = True
        info = transaction.session.info
        self._depth = info[_OPEN] = info.get(_OPEN, 0) + 1
        self._applied: list[sa.Connection] = []
        transaction.settings = (*transaction.settings, self)
        for connection in private.connections_of(transaction):
            self.apply(connection)

    def apply(self, connection: sa.Connection) -> None:
        """Set them on a connection that the transaction has."""
        if connection.dialect.name != "postgresql" or connection in self._applied:
            return
        self._applied.append(connection)
        for name, value in self._values.items():
            if self._whole:
                _ride(connection, f"SET LOCAL {name} = {int(value)}")
            else:
                _ride(connection, self._setting(name, value))

    def end(self, *, failed: bool = False) -> None:
        """Put back what was there; nothing where the transaction or savepoint has ended, or the server refuses.

        Where the block has `failed` that error is the one to see, and one of this is logged.
        """
        if not self._is_open:
            return
        self.forget()
        if self._whole or not self._transaction.is_active:
            return
        for connection in self._applied:
            if status_of(connection) in (TransactionStatus.IN_TRANSACTION, TransactionStatus.IDLE):
                try:
                    _ride(connection, self._restoring())
                except Exception:
                    if not failed:
                        raise
                    log.warning("restoring %s failed", ", ".join(self._values), exc_info=True)

    def forget(self) -> None:
        """The transaction or savepoint ends, and the settings with it."""
        if self._is_open:
            self._is_open = False
            self._transaction.session.info[_OPEN] = self._depth - 1
            self._transaction.settings = tuple(each for each in self._transaction.settings if each is not self)

    def _setting(self, name: str, value: int) -> str:
        # one call within the other, so that the old value is kept before there is a new one
        kept = f"set_config('{self._kept(name)}', current_setting('{name}'), true)"
        return f"SELECT set_config('{name}', '{int(value)}', {kept} IS NOT NULL)"

    def _restoring(self) -> str:
        calls = (f"set_config('{name}', current_setting('{self._kept(name)}'), true)" for name in self._values)
        return "SELECT " + ", ".join(calls)

    def _kept(self, name: str) -> str:
        # by depth and not by a counter: PostgreSQL remembers the name for as long as the connection lives
        return f"fictive.outer_{self._depth}_{name}"


def _ride(connection: sa.Connection, command: str) -> None:
    """Run a command in the transaction before its next statement: with it in one message where the driver can."""
    if isinstance(connection, SessionConnection):
        connection.link.ride(command)
    else:
        connection.exec_driver_sql(command)

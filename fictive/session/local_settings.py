"""SET LOCAL for part of a transaction: the server's settings hold for a block, and not past it.

PostgreSQL keeps what SET LOCAL set to the end of the transaction: ROLLBACK TO undoes it, RELEASE does not (PostgreSQL
documentation, "SET"). So what was there before is kept, on the server, in a setting of our own, and put back at the
end of the block. Both ride with the next statement; on connections that cannot carry they are a round trip each.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy import event

from ..drivers import TransactionStatus, driver_for
from . import private
from .engines import status_of

__all__ = ["LocalSettings", "innermost", "is_within"]

log = logging.getLogger("fictive.session")

_NAME = re.compile(r"[a-z_]+")
_OPEN = "fictive.local_settings"


def innermost(session: sa_orm.Session) -> sa_orm.SessionTransaction | None:
    """SQLAlchemy's object for the innermost savepoint or transaction, with or without a connection."""
    # SQLAlchemy's own methods: the opt-in session's say None outside
    return sa_orm.Session.get_nested_transaction(session) or sa_orm.Session.get_transaction(session)


class LocalSettings:
    """Settings of one block, such as `{"lock_timeout": 5000}`, on each connection that its transaction has or takes.

    On connections to other databases nothing is set. `whole`: the block is the whole transaction, at whose end
    PostgreSQL itself forgets them.
    """

    def __init__(self, session: sa_orm.Session, values: Mapping[str, int], *, whole: bool = False) -> None:
        bad = [name for name in values if not _NAME.fullmatch(name)]
        assert not bad, bad
        self._session = session
        self._values = dict(values)
        self._whole = whole
        self._depth = 0
        self._inner: sa_orm.SessionTransaction | None = None
        self._applied: list[sa.Connection] = []

    def begin(self) -> None:
        """Within the transaction or savepoint that was begun last: set, now or when it takes its connection."""
        self._inner = innermost(self._session)
        assert self._inner is not None
        self._depth = self._session.info[_OPEN] = self._session.info.get(_OPEN, 0) + 1
        event.listen(self._session, "after_begin", self._connection_taken)
        for connection in private.connections_of(self._inner):
            self._set(connection)

    def end(self, *, failed: bool = False) -> None:
        """Put back what was there; nothing where the transaction or savepoint has ended, or the server refuses.

        Where the block has `failed` that error is the one to see, and one of this is logged.
        """
        if self._inner is None:
            return
        inner, self._inner = self._inner, None
        self._session.info[_OPEN] = self._depth - 1
        event.remove(self._session, "after_begin", self._connection_taken)
        if self._whole or not is_within(inner, innermost(self._session)):
            return
        for connection in self._applied:
            if status_of(connection) in (TransactionStatus.IN_TRANSACTION, TransactionStatus.IDLE):
                try:
                    driver_for(connection.dialect).ride(connection, self._restoring())
                except Exception:
                    if not failed:
                        raise
                    log.warning("restoring %s failed", ", ".join(self._values), exc_info=True)

    def _connection_taken(
        self, session: sa_orm.Session, transaction: sa_orm.SessionTransaction, connection: sa.Connection
    ) -> None:
        if transaction is self._inner:
            self._set(connection)

    def _set(self, connection: sa.Connection) -> None:
        if connection.dialect.name != "postgresql":
            return
        driver = driver_for(connection.dialect)
        for name, value in self._values.items():
            if self._whole:
                driver.ride(connection, f"SET LOCAL {name} = {int(value)}")
            else:
                driver.ride(connection, self._setting(name, value))
        self._applied.append(connection)

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


def is_within(outer: sa_orm.SessionTransaction, inner: sa_orm.SessionTransaction | None) -> bool:
    """Whether `outer` is `inner` or around it."""
    while inner is not None and inner is not outer:
        inner = inner.parent
    return inner is outer

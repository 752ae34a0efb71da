"""Any other driver, through SQLAlchemy's public isolation level API. Right, but each switch may be a round trip."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from .base import Driver, TransactionOptions, TransactionStatus

__all__ = ["GenericDriver"]


class GenericDriver(Driver):
    def enter_autocommit(self, connection: sa.Connection) -> None:
        if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
            connection.execution_options(isolation_level="AUTOCOMMIT")

    def leave_autocommit(self, connection: sa.Connection) -> None:
        if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
            connection.execution_options(isolation_level=connection.default_isolation_level)

    def enter_transaction(self, connection: sa.Connection, options: TransactionOptions) -> None:
        self.refuse_options(options, connection.dialect)

    def snapshot(self, dbapi: Any) -> None:
        return None

    def restore(self, dbapi: Any, rest: object) -> bool:
        return True  # SQLAlchemy resets the level that it set

    def status(self, dbapi: Any) -> TransactionStatus:
        return TransactionStatus.UNKNOWN

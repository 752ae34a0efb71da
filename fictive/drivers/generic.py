"""Any other driver, through SQLAlchemy's public isolation level API. Right, but each switch may be a round trip."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from .base import Driver, Rest, TransactionOptions, TransactionStatus

__all__ = ["GenericDriver"]


class GenericDriver(Driver):
    def rest(self, dbapi: Any) -> Rest:
        return Rest()

    def enter_autocommit(self, dbapi: Any, dialect: sa.Dialect) -> None:
        dialect.set_isolation_level(dbapi, "AUTOCOMMIT")

    def lend_natively(self, dbapi: Any, dialect: sa.Dialect, options: TransactionOptions) -> None:
        self.refuse_options(options, dialect)
        dialect.reset_isolation_level(dbapi)

    def restore(self, dbapi: Any, dialect: sa.Dialect, rest: Rest) -> bool:
        dialect.reset_isolation_level(dbapi)
        return True

    def status(self, dbapi: Any) -> TransactionStatus:
        return TransactionStatus.UNTOLD

"""What differs from one database driver to another. Drivers themselves are imported by SQLAlchemy only."""

from __future__ import annotations

import sqlalchemy as sa

from .base import NO_OPTIONS, Driver, TransactionOptions, TransactionStatus
from .generic import GenericDriver
from .postgresql import Psycopg2Driver, PsycopgDriver
from .sqlite import SQLiteDriver

__all__ = ["NO_OPTIONS", "Driver", "TransactionOptions", "TransactionStatus", "driver_for", "sqlstate"]

_GENERIC = GenericDriver()
_DRIVERS: dict[tuple[str, str], Driver] = {
    ("postgresql", "psycopg2"): Psycopg2Driver(),
    ("postgresql", "psycopg"): PsycopgDriver(),
    ("sqlite", "pysqlite"): SQLiteDriver(),
}


def driver_for(dialect: sa.Dialect) -> Driver:
    """The driver of `dialect`; one that goes by SQLAlchemy's public API alone where fictive has no own."""
    return _DRIVERS.get((dialect.name, dialect.driver), _GENERIC)


def sqlstate(error: BaseException | None) -> str | None:
    """The SQLSTATE of an error, wrapped by SQLAlchemy or not; None where it has none."""
    original = getattr(error, "orig", None) or error
    return getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)

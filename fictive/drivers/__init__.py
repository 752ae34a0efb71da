"""What differs from one database driver to another. Drivers themselves are imported when an engine uses them."""

from __future__ import annotations

import importlib
import weakref

import sqlalchemy as sa

from .base import NO_OPTIONS, Driver, TransactionOptions, TransactionStatus

__all__ = [
    "NO_OPTIONS",
    "Driver",
    "TransactionOptions",
    "TransactionStatus",
    "driver_for",
    "replace_driver",
    "sqlstate",
]

_CLASSES = {
    ("postgresql", "psycopg2"): ("psycopg2", "Psycopg2Driver"),
    ("postgresql", "psycopg"): ("psycopg", "PsycopgDriver"),
    ("sqlite", "pysqlite"): ("sqlite", "SQLiteDriver"),
}
_drivers: dict[tuple[str, str], Driver] = {}
_replaced: weakref.WeakKeyDictionary[sa.Dialect, Driver] = weakref.WeakKeyDictionary()


def driver_for(dialect: sa.Dialect) -> Driver:
    """The driver of `dialect`; one that goes by SQLAlchemy's public API alone where fictive has no own."""
    if _replaced and (replaced := _replaced.get(dialect)) is not None:
        return replaced
    key = dialect.name, dialect.driver
    found = _drivers.get(key)
    if found is None:
        module, name = _CLASSES.get(key, ("generic", "GenericDriver"))
        found = _drivers[key] = getattr(importlib.import_module(f".{module}", __name__), name)()
    return found


def replace_driver(dialect: sa.Dialect, driver: Driver | None) -> None:
    """Use another driver for this dialect object, which is one engine's; None: its own again."""
    if driver is None:
        _replaced.pop(dialect, None)
    else:
        _replaced[dialect] = driver


def sqlstate(error: BaseException | None) -> str | None:
    """The SQLSTATE of an error, wrapped by SQLAlchemy or not; None where it has none."""
    original = getattr(error, "orig", None) or error
    return getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)

"""SQLite by Python's `sqlite3`, and the pool that lets sessions take turns at an in-memory database.

`sqlite3` begins transactions by itself before some statements and not before others, and commits before DDL
(Python documentation, "sqlite3: Transaction control"). With `isolation_level = None` it begins none, so connections
rest in autocommit, and a transaction is begun by a real BEGIN: reads inside are repeatable and DDL is transactional.
"""

from __future__ import annotations

import threading
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from ..errors import ConnectionBusy
from .base import Driver, Rest, TransactionOptions, TransactionStatus, under

__all__ = ["SQLiteDriver", "TakeTurnsPool", "is_memory_url"]


# Of a connection, and readable (SQLite documentation, "Pragma statements").
_PRAGMAS = (
    "busy_timeout", "cache_size", "cell_size_check", "foreign_keys", "ignore_check_constraints", "query_only",
    "read_uncommitted", "recursive_triggers", "reverse_unordered_selects", "synchronous", "temp_store",
)  # fmt: skip


class SQLiteDriver(Driver):
    begins_by_statement = True

    def rest(self, dbapi: Any) -> Rest:
        self._own_transaction_control(dbapi)
        return Rest(autocommit=True)

    def enter_autocommit(self, dbapi: Any, dialect: sa.Dialect) -> None:
        self._own_transaction_control(dbapi)

    def lend_natively(self, dbapi: Any, dialect: sa.Dialect, options: TransactionOptions) -> None:
        self.refuse_options(options, dialect)

    def begin(self, dbapi: Any) -> None:
        dbapi = under(dbapi)
        self._own_transaction_control(dbapi)
        if not dbapi.in_transaction:  # the application may have SQLAlchemy's documented BEGIN recipe as well
            # past SQLAlchemy's cursor events: listeners see the user's statements only
            dbapi.execute("BEGIN").close()

    def in_autocommit(self, dbapi: Any) -> bool:
        return not under(dbapi).in_transaction

    def restore(self, dbapi: Any, dialect: sa.Dialect, rest: Rest) -> bool:
        self._own_transaction_control(dbapi)
        return not dbapi.in_transaction

    def status(self, dbapi: Any) -> TransactionStatus:
        return TransactionStatus.IN_TRANSACTION if dbapi.in_transaction else TransactionStatus.IDLE

    def is_closed(self, dbapi: Any) -> bool:
        return False

    def remember(self, dbapi: Any, url: sa.URL) -> object:
        if not is_memory_url(url):
            return None
        return {name: dbapi.execute(f"PRAGMA {name}").fetchone()[0] for name in _PRAGMAS}

    def forget(self, dbapi: Any, dialect: sa.Dialect, remembered: object) -> bool:
        if not isinstance(remembered, dict):
            return False
        # closing the connection would lose the database
        quote = dialect.identifier_preparer.quote_identifier
        for kind, name in dbapi.execute("SELECT type, name FROM sqlite_temp_master WHERE type <> 'index'").fetchall():
            if name.startswith("sqlite_"):
                continue
            dbapi.execute(f"DROP {kind} IF EXISTS temp.{quote(name)}").close()
        for _, name, _ in dbapi.execute("PRAGMA database_list").fetchall():
            if name not in ("main", "temp"):
                dbapi.execute(f"DETACH {quote(name)}").close()
        for name, value in remembered.items():
            dbapi.execute(f"PRAGMA {name} = {value}").close()
        return True

    def _own_transaction_control(self, dbapi: Any) -> None:
        legacy = getattr(dbapi, "LEGACY_TRANSACTION_CONTROL", None)
        if legacy is None and getattr(dbapi, "autocommit", -1) != -1:  # Python 3.12 and later; -1 is the legacy mode
            dbapi.autocommit = -1
        if dbapi.isolation_level is not None:
            dbapi.isolation_level = None


class TakeTurnsPool(QueuePool):
    """One connection, which sessions use in turns: another thread's transaction is waited for, never joined.

    For in-memory SQLite, where the connection *is* the database. A thread that asks while it holds the connection
    itself would wait for ever; it gets `ConnectionBusy` at once instead.
    """

    def __init__(self, creator: Any, **kwargs: Any) -> None:
        kwargs.update(pool_size=1, max_overflow=0)
        super().__init__(creator, **kwargs)
        self._holder: int | None = None

    def _do_get(self) -> ConnectionPoolEntry:
        if self._holder == threading.get_ident():
            raise ConnectionBusy(
                "An in-memory SQLite database has one connection, and this thread holds it already, in the "
                "transaction or result of another session or of db.engine.connect(). End that one first, do this "
                "work through it, or use a database file."
            )
        entry = super()._do_get()
        self._holder = threading.get_ident()
        return entry

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        self._holder = None  # before the next thread can have it
        super()._do_return_conn(record)


def is_memory_url(url: sa.URL) -> bool:
    """Whether the URL names a database that lives and dies with its connection."""
    return url.get_backend_name() == "sqlite" and (
        url.database in {None, "", ":memory:"} or url.query.get("mode") == "memory"
    )

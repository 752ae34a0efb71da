"""What psycopg2 and psycopg (3) have in common: libpq's status, liveness, transaction characteristics.

Both send BEGIN by themselves before the first statement, and nothing at all while their `autocommit` attribute is set.
Isolation level, READ ONLY and DEFERRABLE are attributes too, and travel in the driver's own BEGIN (psycopg2
documentation, "Transactions control"; psycopg documentation, "Transaction characteristics").
"""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable
from typing import Any, ClassVar

import sqlalchemy as sa

from .base import IDLE, NO_OPTIONS, Driver, Rest, TransactionOptions, TransactionStatus

__all__ = ["PostgreSQLDriver"]

_STATUSES = tuple(TransactionStatus)
_MOST_READS = 1000

# For a network that goes silent: found out after a minute on an idle connection, after half a minute with a query on
# its way (PostgreSQL documentation, "Parameter Key Words"; ignored on Unix sockets and where the platform has none).
_KEEP_ALIVE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 30_000}


class PostgreSQLDriver(Driver):
    """What does not depend on which of the two it is."""

    carries = True
    has_options = True
    read_only_attribute: ClassVar[str]

    def connect_arguments(self, arguments: dict[str, Any]) -> None:
        if not any(name in arguments for name in (*_KEEP_ALIVE, "keepalives")):
            arguments.update(_KEEP_ALIVE)

    def ask_for_answer(self, dbapi: Any) -> None:
        before, dbapi.autocommit = dbapi.autocommit, True
        dbapi.cursor().execute("SELECT 1")
        dbapi.autocommit = before

    def rest(self, dbapi: Any) -> Rest:
        return Rest(dbapi.autocommit, self.characteristics(dbapi))

    def lend_natively(self, dbapi: Any, dialect: sa.Dialect, options: TransactionOptions) -> None:
        if dbapi.autocommit:
            dbapi.autocommit = False
        self.set_characteristics(dbapi, options)

    def restore(self, dbapi: Any, dialect: sa.Dialect, rest: Rest) -> bool:
        if self.status_of(dbapi)() != IDLE:
            return False
        if dbapi.autocommit and (not rest.autocommit or self.characteristics(dbapi) != rest.characteristics):
            dbapi.autocommit = False
        if self.characteristics(dbapi) != rest.characteristics:
            self.set_characteristics(dbapi, rest.characteristics)
        if dbapi.autocommit != rest.autocommit:
            dbapi.autocommit = rest.autocommit
        return True

    def status(self, dbapi: Any) -> TransactionStatus:
        return TransactionStatus.UNKNOWN if dbapi.closed else _STATUSES[self.status_of(dbapi)()]

    def forget(self, dbapi: Any, dialect: sa.Dialect, remembered: object) -> bool:
        # the server notices a closed socket a little later; locks have to be gone at once
        with contextlib.suppress(Exception):
            self.enter_autocommit(dbapi, dialect)
            dbapi.cursor().execute("SELECT pg_advisory_unlock_all()")
        return False

    def status_of(self, dbapi: Any) -> Callable[[], int]:
        raise NotImplementedError

    def characteristics(self, dbapi: Any) -> TransactionOptions:
        """The level, READ ONLY and DEFERRABLE that are set on the driver's connection."""
        level, read_only = dbapi.isolation_level, getattr(dbapi, self.read_only_attribute)
        if level is None and read_only is None and dbapi.deferrable is None:
            return NO_OPTIONS
        return TransactionOptions(None if level is None else self.level_name(level), read_only, dbapi.deferrable)

    def set_characteristics(self, dbapi: Any, options: TransactionOptions) -> None:
        """Set all three; sends nothing on a connection that is not in autocommit."""
        if self.characteristics(dbapi) != options:
            name = options.isolation_level
            dbapi.isolation_level = None if name is None else self.level(name)
            setattr(dbapi, self.read_only_attribute, options.read_only)
            dbapi.deferrable = options.deferrable

    def level(self, name: str) -> Any:
        """The driver's own word for an isolation level."""
        raise NotImplementedError

    def level_name(self, level: Any) -> str:
        """SQL's name for the driver's word."""
        raise NotImplementedError

    def poll(self, dbapi: Any) -> Callable[[int], Any]:
        descriptor = dbapi.fileno()
        if not hasattr(select, "poll"):  # Windows
            return lambda timeout: select.select([descriptor], [], [], timeout)[0]
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return poll.poll

    def is_alive(self, dbapi: Any) -> bool:
        """A server that ended a session has closed the socket, and that can be read; a network that went silent has
        not, and TCP keepalive finds out.

        What is read may also be a notice or a notification, which libpq takes and keeps.
        """
        if dbapi.closed:
            return False
        try:
            poll = self.poll(dbapi)
            for _ in range(_MOST_READS):
                if not poll(0):
                    return True
                self.consume(dbapi)
        except Exception:  # whatever reading it raised: it is not to be used
            return False
        return False  # readable for ever is closed

    def consume(self, dbapi: Any) -> None:
        """Let libpq read what is there; raises when the socket is closed."""
        raise NotImplementedError

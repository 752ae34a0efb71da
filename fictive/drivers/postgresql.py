"""psycopg2 and psycopg (3).

Both send BEGIN by themselves before the first statement, and nothing at all while their `autocommit` attribute is
set; assigning it sends nothing either (measured). Isolation level, READ ONLY and DEFERRABLE are attributes too, and
travel in the BEGIN message (psycopg2 documentation, "Transactions control"; psycopg documentation, "Transaction
characteristics").
"""

from __future__ import annotations

import contextlib
import dataclasses
import select
from collections.abc import Callable
from typing import Any, ClassVar

import sqlalchemy as sa

from . import copying
from .base import Driver, TransactionOptions, TransactionStatus, dbapi_connection

__all__ = ["PostgreSQLDriver", "Psycopg2Driver", "PsycopgDriver"]

# libpq's PGTransactionStatusType, which both drivers hand on as it is.
_STATUS = (
    TransactionStatus.IDLE,
    TransactionStatus.ACTIVE,
    TransactionStatus.IN_TRANSACTION,
    TransactionStatus.ABORTED,
    TransactionStatus.UNKNOWN,
)


_READY = 1  # psycopg2.extensions.STATUS_READY

_POLL = "fictive.poll"
_MOST_READS = 1000

# For a network that goes silent: found out after a minute on an idle connection, after half a minute with a query on
# its way (PostgreSQL documentation, "Parameter Key Words"; ignored on Unix sockets and where the platform has none).
_KEEP_ALIVE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 30_000}


def keep_alive(cparams: dict[str, Any]) -> None:
    """Set TCP keepalive where the user has not set any of it."""
    if not any(name in cparams for name in (*_KEEP_ALIVE, "keepalives")):
        cparams.update(_KEEP_ALIVE)


def _poll_for(descriptor: int) -> Callable[[int], Any]:
    """A function that tells, without waiting, whether there is something to read."""
    if not hasattr(select, "poll"):  # Windows
        return lambda timeout: select.select([descriptor], [], [], timeout)[0]
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return poll.poll


@dataclasses.dataclass(frozen=True)
class _Rest:
    autocommit: bool
    characteristics: tuple[Any, Any, Any]


class PostgreSQLDriver(Driver):
    """What psycopg2 and psycopg have in common."""

    has_options = True
    read_only_attribute: ClassVar[str]

    def enter_autocommit(self, connection: sa.Connection) -> None:
        dbapi_connection(connection).autocommit = True

    def leave_autocommit(self, connection: sa.Connection) -> None:
        dbapi = dbapi_connection(connection)
        if dbapi.autocommit:
            dbapi.autocommit = False

    def forget(self, connection: sa.Connection, remembered: object) -> None:
        # the server notices a closed socket a little later; locks have to be gone at once
        with contextlib.suppress(Exception):
            self.enter_autocommit(connection)
            dbapi_connection(connection).cursor().execute("SELECT pg_advisory_unlock_all()")
        super().forget(connection, remembered)

    def enter_transaction(self, connection: sa.Connection, options: TransactionOptions) -> None:
        dbapi = dbapi_connection(connection)
        if dbapi.autocommit:
            dbapi.autocommit = False
        if not options:
            return
        if options.isolation_level is not None:
            dbapi.isolation_level = self.level(options.isolation_level)
        if options.read_only is not None:
            setattr(dbapi, self.read_only_attribute, options.read_only)
        if options.deferrable is not None:
            dbapi.deferrable = options.deferrable

    def ride(self, connection: sa.Connection, command: str) -> None:
        dbapi = dbapi_connection(connection)
        if self.is_accelerated(dbapi):
            dbapi.ride(command)
        else:
            super().ride(connection, command)

    def level(self, name: str) -> Any:
        """The driver's own word for an isolation level."""
        return name

    def is_alive(self, dbapi: Any, notes: dict[Any, Any]) -> bool:
        """A server that ended a session has closed the socket, and that can be read; a network that went silent has
        not, and TCP keepalive finds out.

        What is read may also be a notice or a notification, which libpq takes and keeps.
        """
        if dbapi.closed:
            return False
        try:
            descriptor, poll = notes.get(_POLL, (None, None))
            if poll is None or descriptor != dbapi.fileno():
                poll = _poll_for(dbapi.fileno())
                notes[_POLL] = dbapi.fileno(), poll
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

    def snapshot(self, dbapi: Any) -> _Rest:
        return _Rest(dbapi.autocommit, self._characteristics(dbapi))

    def restore(self, dbapi: Any, rest: object) -> bool:
        assert isinstance(rest, _Rest)
        if dbapi.closed:
            return True  # the pool opens another in its place
        if self.status(dbapi) is not TransactionStatus.IDLE:
            return False
        if dbapi.autocommit != rest.autocommit:
            dbapi.autocommit = rest.autocommit
        if self._characteristics(dbapi) != rest.characteristics:
            dbapi.isolation_level, read_only, dbapi.deferrable = rest.characteristics
            setattr(dbapi, self.read_only_attribute, read_only)
        return True

    def status(self, dbapi: Any) -> TransactionStatus:
        return _STATUS[self.transaction_status(dbapi)]

    def transaction_status(self, dbapi: Any) -> int:
        """libpq's number for the status."""
        raise NotImplementedError

    def _characteristics(self, dbapi: Any) -> tuple[Any, Any, Any]:
        return dbapi.isolation_level, getattr(dbapi, self.read_only_attribute), dbapi.deferrable


class Psycopg2Driver(PostgreSQLDriver):
    read_only_attribute = "readonly"

    def connect(self, cargs: Any, cparams: dict[str, Any]) -> Any:
        from .psycopg2_cursors import is_users_own
        from .riding_psycopg2 import RidingConnection

        keep_alive(cparams)
        factory = cparams.get("cursor_factory")
        if factory is not None and (not isinstance(factory, type) or is_users_own(factory)):
            return None  # it would see texts of ours
        if not cparams.get("async_") and not cparams.get("async"):
            cparams.setdefault("connection_factory", RidingConnection)

    def can_copy(self) -> bool:
        import psycopg2.extensions

        return psycopg2.extensions.get_wait_callback() is None  # psycopg2 refuses COPY while it is green

    def copy_writer(self, cursor: Any, statement: str) -> copying.CopyWriter:
        return copying.Psycopg2Writer(cursor, statement)

    def copy_texts(self, connection: sa.Connection) -> Callable[[Any], str]:
        return copying.psycopg2_texts(dbapi_connection(connection))

    def consume(self, dbapi: Any) -> None:
        dbapi.poll()

    def restore(self, dbapi: Any, rest: object) -> bool:
        # psycopg2 keeps a status of its own, which a COMMIT by text does not change
        return super().restore(dbapi, rest) and (bool(dbapi.closed) or dbapi.status == _READY)

    def notifications(self, dbapi: Any) -> Callable[[], list[tuple[str, str]]]:
        def read() -> list[tuple[str, str]]:
            dbapi.poll()
            found, dbapi.notifies = dbapi.notifies, []
            return [(each.channel, each.payload) for each in found]

        return read

    def is_accelerated(self, dbapi: Any) -> bool:
        from .riding_psycopg2 import RidingConnection

        return isinstance(dbapi, RidingConnection)

    def transaction_status(self, dbapi: Any) -> int:
        status: int = dbapi.get_transaction_status()
        return status


class PsycopgDriver(PostgreSQLDriver):
    read_only_attribute = "read_only"

    def connect(self, cargs: Any, cparams: dict[str, Any]) -> Any:
        keep_alive(cparams)
        if "cursor_factory" in cparams:
            return None
        from .riding_psycopg import RidingConnection

        return RidingConnection.connect(*cargs, **cparams)

    def can_copy(self) -> bool:
        return True

    def copy_writer(self, cursor: Any, statement: str) -> copying.CopyWriter:
        return copying.PsycopgWriter(cursor, statement)

    def copy_texts(self, connection: sa.Connection) -> Callable[[Any], str]:
        return copying.psycopg_texts(dbapi_connection(connection))

    def consume(self, dbapi: Any) -> None:
        dbapi.pgconn.consume_input()
        while (notification := dbapi.pgconn.notifies()) is not None:
            dbapi.pgconn.notify_handler(notification)  # psycopg's own, which keeps it for `notifies()`

    def notifications(self, dbapi: Any) -> Callable[[], list[tuple[str, str]]]:
        found: list[tuple[str, str]] = []
        dbapi.add_notify_handler(lambda notification: found.append((notification.channel, notification.payload)))

        def read() -> list[tuple[str, str]]:
            self.consume(dbapi)
            come = found[:]
            found.clear()
            return come

        return read

    def abandon(self, cursor: Any) -> None:
        import psycopg

        psycopg.Cursor.close(cursor)  # this side of it only

    def is_accelerated(self, dbapi: Any) -> bool:
        from .riding_psycopg import RidingConnection

        return isinstance(dbapi, RidingConnection)

    def level(self, name: str) -> Any:
        import psycopg

        return psycopg.IsolationLevel[name.upper().replace(" ", "_")]

    def transaction_status(self, dbapi: Any) -> int:
        return int(dbapi.pgconn.transaction_status)

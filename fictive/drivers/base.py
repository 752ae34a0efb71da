"""What the session asks of a driver."""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Callable
from typing import Any, ClassVar

import sqlalchemy as sa

from ..errors import UnsupportedDialect
from .copying import CopyWriter

__all__ = ["NO_OPTIONS", "Driver", "TransactionOptions", "TransactionStatus", "dbapi_connection"]


class TransactionStatus(enum.Enum):
    """What the server last said of a connection's transaction."""

    IDLE = "idle"
    ACTIVE = "active"
    IN_TRANSACTION = "in transaction"
    ABORTED = "aborted"
    UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class TransactionOptions:
    """What BEGIN is asked for. None leaves a characteristic to the server's default."""

    isolation_level: str | None = None
    read_only: bool | None = None
    deferrable: bool | None = None

    def __bool__(self) -> bool:
        return self is not NO_OPTIONS and self != NO_OPTIONS


NO_OPTIONS = TransactionOptions()


def dbapi_connection(connection: sa.Connection) -> Any:
    """The driver's own connection under SQLAlchemy's."""
    return connection.connection.dbapi_connection


class Driver(abc.ABC):
    """How one kind of connection is put into and out of its modes. Stateless: one object serves all connections.

    A connection rests in the pool in the mode it was made with, which is transactional: SQLAlchemy's Core and
    whatever else uses the engine find it as they expect it. Only the session changes modes, and `restore` undoes
    whatever was changed before the pool has the connection back.
    """

    rests_in_autocommit: ClassVar[bool] = False
    """Whether the driver's connections are in autocommit all the time, and a transaction is begun by a statement."""

    has_options: ClassVar[bool] = False
    """Whether BEGIN can be asked for an isolation level, READ ONLY and DEFERRABLE."""

    def connect(self, cargs: Any, cparams: dict[str, Any]) -> Any:
        """SQLAlchemy's `do_connect`: a connection of fictive's own kind, or None to leave connecting to SQLAlchemy.

        May change `cparams` instead.
        """
        return None

    def is_accelerated(self, dbapi: Any) -> bool | None:
        """Whether control statements ride along on this connection; None where no connection of the driver can."""
        return None

    @abc.abstractmethod
    def enter_autocommit(self, connection: sa.Connection) -> None:
        """Let each statement stand alone. Sends nothing where the driver allows it."""

    @abc.abstractmethod
    def enter_transaction(self, connection: sa.Connection, options: TransactionOptions) -> None:
        """Let the next statement begin a transaction with `options`. Sends nothing where the driver allows it."""

    @abc.abstractmethod
    def snapshot(self, dbapi: Any) -> object:
        """The mode of a connection at rest."""

    @abc.abstractmethod
    def restore(self, dbapi: Any, rest: object) -> bool:
        """Bring a connection back to the mode `rest`; False when its state is unknown and it must be closed."""

    @abc.abstractmethod
    def status(self, dbapi: Any) -> TransactionStatus:
        """What the server last said. Sends nothing."""

    def is_alive(self, dbapi: Any, notes: dict[Any, Any]) -> bool:
        """Whether a connection at rest is still there, as far as this side can tell. Sends nothing.

        `notes` is kept with the connection from one call to the next.
        """
        return True

    def ride(self, connection: sa.Connection, command: str) -> None:
        """Run `command` in the transaction before its next statement: with it in one message where the driver can."""
        connection.exec_driver_sql(command)

    def begin(self, dbapi: Any) -> None:
        """SQLAlchemy's `do_begin`, for drivers that send no BEGIN of their own."""
        raise NotImplementedError

    @abc.abstractmethod
    def leave_autocommit(self, connection: sa.Connection) -> None:
        """Undo `enter_autocommit` on a connection that is kept, before a transaction is begun on it."""

    def remember(self, connection: sa.Connection) -> object:
        """What `forget` needs to know of a connection that is about to be pinned."""
        return None

    def forget(self, connection: sa.Connection, remembered: object) -> None:
        """Undo what was set through a pinned connection: close it, since no command undoes all and only that."""
        connection.invalidate()

    def can_copy(self) -> bool:
        """Whether COPY FROM STDIN can be written to, here and now."""
        return False

    def copy_writer(self, cursor: Any, statement: str) -> CopyWriter:
        """Begin a COPY FROM STDIN on the driver's cursor."""
        raise NotImplementedError

    def copy_texts(self, connection: sa.Connection) -> Callable[[Any], str]:
        """How COPY is told a value that only the driver knows; the function raises `NotCopyable`."""
        raise NotImplementedError

    def abandon(self, cursor: Any) -> None:
        """Forget a server-side cursor whose connection is lost, so that the driver does not complain of it later."""
        return

    def notifications(self, dbapi: Any) -> Callable[[], list[tuple[str, str]]] | None:
        """A function that reads, without waiting, the notifications that came on a connection: channel and payload of
        each. It raises once the connection is closed. None where the driver has none."""
        return None

    def refuse_options(self, options: TransactionOptions, dialect: sa.Dialect) -> None:
        """Raise `UnsupportedDialect` naming the first option given."""
        for field in dataclasses.fields(options):
            if getattr(options, field.name) is not None:
                raise UnsupportedDialect(
                    f"{field.name} of a transaction is not supported on {dialect.name}+{dialect.driver}."
                )

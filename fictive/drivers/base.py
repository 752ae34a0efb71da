"""What the session's connection object asks of a driver."""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import sqlalchemy as sa

from ..errors import UnsupportedDialect
from .copying import CopyWriter
from .pending import PendingCommands

__all__ = [
    "IDLE",
    "INERROR",
    "INTRANS",
    "NO_OPTIONS",
    "Driver",
    "Rest",
    "TransactionOptions",
    "TransactionStatus",
    "bare",
    "dbapi_connection",
]


class TransactionStatus(enum.IntEnum):
    """What the server last said of a connection's transaction: libpq's PGTransactionStatusType."""

    IDLE = 0
    ACTIVE = 1
    IN_TRANSACTION = 2
    ABORTED = 3
    UNKNOWN = 4
    """The connection is lost."""
    UNTOLD = -1
    """The driver cannot tell."""


# As plain numbers, with which each statement of a transaction compares: Python is slower with those of an enumeration.
IDLE, INTRANS, INERROR = map(
    int, (TransactionStatus.IDLE, TransactionStatus.IN_TRANSACTION, TransactionStatus.ABORTED)
)


@dataclasses.dataclass(frozen=True)
class TransactionOptions:
    """What BEGIN is asked for. None leaves a characteristic to the server's default."""

    isolation_level: str | None = None
    read_only: bool | None = None
    deferrable: bool | None = None

    def __bool__(self) -> bool:
        return self is not NO_OPTIONS and self != NO_OPTIONS

    def over(self, rest: TransactionOptions) -> TransactionOptions:
        """These options, and those of `rest` where these say nothing."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return dataclasses.replace(rest, **given) if given else rest

    def begin_command(self) -> str:
        command = "BEGIN"
        if self.isolation_level is not None:
            command += f" ISOLATION LEVEL {self.isolation_level}"
        if self.read_only is not None:
            command += " READ ONLY" if self.read_only else " READ WRITE"
        if self.deferrable is not None:
            command += " DEFERRABLE" if self.deferrable else " NOT DEFERRABLE"
        return command


NO_OPTIONS = TransactionOptions()


@dataclasses.dataclass(frozen=True)
class Rest:
    """The mode in which a driver's connection came from the pool, and in which it goes back."""

    autocommit: bool = False
    characteristics: TransactionOptions = NO_OPTIONS


def bare(wrapped: Any, kind: Any) -> Any:
    """The driver's own connection, or cursor, within those that tools put around it (wrapt's proxies, which
    `isinstance` takes for what they wrap)."""
    while not issubclass(type(wrapped), kind) and (inner := getattr(wrapped, "__wrapped__", None)) is not None:
        wrapped = inner
    return wrapped


def dbapi_connection(connection: sa.Connection) -> Any:
    """The driver's own connection under SQLAlchemy's, for reading: nothing of a session's transaction is sent for
    it."""
    return under(connection.connection)


def under(pooled: Any) -> Any:
    """The same, of a pooled connection."""
    return getattr(pooled, "server_connection", None) or getattr(pooled, "dbapi_connection", pooled)


class Driver(abc.ABC):
    """How one kind of connection is used by sessions. Stateless: one object serves all connections.

    A connection rests in the pool in the driver's own mode, which is transactional: SQLAlchemy's Core and whatever
    else uses the engine find it as they expect it. A session that borrows a connection puts it in autocommit; a
    transaction is begun by a command that rides with the first statement, or, where that is missed, by the driver
    itself (`lend_natively`): a statement of a transaction is never sent without one.
    """

    carries: ClassVar[bool] = False
    """Whether commands can ride with a statement in one message."""

    buffers: ClassVar[bool] = True
    """Whether rows must be fetched before a cursor's connection is given back."""

    rides_in_autocommit: ClassVar[bool] = False
    """Whether a connection is in autocommit, to the driver, while a command of ours has begun a transaction."""

    has_notices: ClassVar[bool] = False
    """Whether SQLAlchemy's dialect looks for `notices` on a cursor's connection."""

    has_options: ClassVar[bool] = False
    """Whether BEGIN can be asked for an isolation level, READ ONLY and DEFERRABLE, and settings can be given to a
    transaction or a statement (`set_command`)."""

    begins_by_statement: ClassVar[bool] = False
    """Whether connections are in autocommit all the time, and SQLAlchemy's `do_begin` sends a BEGIN."""

    def connect_arguments(self, arguments: dict[str, Any]) -> None:
        """Add to the arguments of a connect what the application left open."""
        return

    def ask_for_answer(self, dbapi: Any) -> None:
        """Wait for an answer of the server on a connection that was just made; raises where none comes. 1 round
        trip."""
        return

    @abc.abstractmethod
    def rest(self, dbapi: Any) -> Rest:
        """The mode of a connection that was just taken from the pool."""

    @abc.abstractmethod
    def enter_autocommit(self, dbapi: Any, dialect: sa.Dialect) -> None:
        """Let each statement stand alone. Sends nothing where the driver allows it."""

    def leave_autocommit(self, dbapi: Any) -> None:
        """Let whoever sends past us meet the driver's own BEGIN. Of drivers that carry; sends nothing."""
        return

    @abc.abstractmethod
    def lend_natively(self, dbapi: Any, dialect: sa.Dialect, options: TransactionOptions) -> None:
        """Let the driver itself begin a transaction with `options` before the next statement, whoever sends it."""

    def adopt(self, dbapi: Any) -> None:
        """Let the driver know of a transaction that a command of ours began, before somebody else uses it there."""
        return

    def resume_autocommit(self, dbapi: Any, dialect: sa.Dialect, rest: Rest) -> None:
        """Undo `lend_natively` after the end of the transaction."""
        self.enter_autocommit(dbapi, dialect)

    @abc.abstractmethod
    def restore(self, dbapi: Any, dialect: sa.Dialect, rest: Rest) -> bool:
        """Bring a connection back to the mode `rest`; False when its state is unknown and it must be closed."""

    @abc.abstractmethod
    def status(self, dbapi: Any) -> TransactionStatus:
        """What the server last said. Sends nothing."""

    def status_of(self, dbapi: Any) -> Callable[[], int]:
        """A function for the status of a connection that is not closed, as a number."""
        return functools.partial(self.status, dbapi)

    def is_closed(self, dbapi: Any) -> bool:
        """Whether the driver knows that the connection is lost. Sends nothing."""
        return bool(getattr(dbapi, "closed", False))

    def is_busy(self, dbapi: Any) -> bool:
        """Whether a COPY or a stream was left before its end, so that nothing else can be sent. Sends nothing."""
        return False

    def is_standby(self, dbapi: Any) -> bool:
        """Whether the server has said that it takes no writes. Sends nothing."""
        return False

    def poll(self, dbapi: Any) -> Callable[[int], Any]:
        """A function that tells, given 0, whether the server has something to say on a connection at rest."""
        return _nothing_to_read

    def is_alive(self, dbapi: Any) -> bool:
        """Whether a connection at rest is still there, as far as this side can tell. Sends nothing."""
        return True

    # -- what rides ---------------------------------------------------------------------------------------------------

    def can_carry(self, dbapi: Any) -> bool:
        """Whether commands ride on this connection: not past a cursor class that is no class, or is not known yet."""
        return False

    def execute_with(self, server: Any, pending: PendingCommands, query: Any, parameters: Any) -> Any:
        """Run a statement together with the commands that wait, or after them; returns the driver's cursor.

        None where the application's cursor class is not known to let them through: nothing was sent.
        """
        raise NotImplementedError

    def can_share(self, query: Any, parameters: Any) -> bool:
        """Whether a statement in autocommit can be sent in one message, and so in one transaction, with commands."""
        return False

    def execute_behind(
        self, server: Any, dialect: sa.Dialect, commands: list[str], query: Any, parameters: Any
    ) -> Any:
        """`execute_with`, of a statement in autocommit that `can_share`: in one message, and nothing is sent apart."""
        pending = PendingCommands()
        pending.bound, pending.commands = True, commands
        try:
            return self.execute_with(server, pending, query, parameters)
        finally:
            self.enter_autocommit(server.dbapi, dialect)

    def set_command(self, dbapi: Any, settings: Iterable[tuple[str, str | None]]) -> str:
        """A command that sets settings to the end of the transaction, names and values quoted by the driver."""
        raise NotImplementedError

    def send(self, server: Any, commands: list[str]) -> None:
        """Send commands in one message of their own, on a connection in autocommit."""
        raise NotImplementedError

    def commit(self, server: Any, releases: list[str]) -> None:
        """COMMIT a transaction that a command of ours began."""
        raise NotImplementedError

    def commit_and_ask(self, server: Any, releases: list[str], query: str) -> str:
        """`commit`, and in the same message a query whose one value is returned."""
        raise NotImplementedError

    def own_transaction(self, dbapi: Any) -> bool:
        """Whether the driver itself began the transaction that is open."""
        return False

    # -- the rest -----------------------------------------------------------------------------------------------------

    def begin(self, dbapi: Any) -> None:
        """SQLAlchemy's `do_begin`, for drivers that send no BEGIN of their own."""
        raise NotImplementedError

    def in_autocommit(self, dbapi: Any) -> bool:
        """SQLAlchemy's `detect_autocommit_setting`, for the same."""
        raise NotImplementedError

    def remember(self, dbapi: Any, url: sa.URL) -> object:
        """What `forget` needs to know of a connection that is about to be pinned."""
        return None

    def forget(self, dbapi: Any, dialect: sa.Dialect, remembered: object) -> bool:
        """Undo what was set through a pinned connection; False where no command undoes all and only that."""
        return False

    def can_copy(self) -> bool:
        """Whether COPY FROM STDIN can be written to, here and now."""
        return False

    def copy_writer(self, cursor: Any, statement: str) -> CopyWriter:
        """Begin a COPY FROM STDIN on the driver's cursor."""
        raise NotImplementedError

    def copy_texts(self, connection: sa.Connection) -> Callable[[Any], str]:
        """How COPY is told a value that only the driver knows; the function raises `NotCopyable`."""
        raise NotImplementedError

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


def _nothing_to_read(timeout: int) -> bool:
    return False

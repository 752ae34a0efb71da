"""Settings that the application gives for what runs now (`db.local_settings`): asked for, checked, sent, explained.

They are local to a transaction (PostgreSQL documentation, "set_config"). In a transaction of the session's they travel
with its BEGIN (`Link.take`). A statement in autocommit has them in front of it in its one message, which PostgreSQL
runs as one transaction: several statements in a simple message (documentation, "Multiple Statements in a Simple
Query"), or all up to Sync in a pipeline. So they end with the statement, and nothing is left on the connection.

What must stay true: a statement for which settings are due is never sent without them. Where it cannot share a
message (a cursor class of the application's, several statements on psycopg), it has a short transaction of its own.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa

from ..drivers import sqlstate
from ..errors import ConfigurationError, LocalSettingsError, UnsupportedDialect

if TYPE_CHECKING:
    from .classify import StatementClass
    from .cursors import StatementCursor
    from .link import Link
    from .servers import ServerConnection

__all__ = [
    "NO_SETTINGS",
    "DueSettings",
    "SettingValue",
    "SettingsFunction",
    "SettingsSource",
    "execute_with_settings",
    "refusal_of",
    "set_on_foreign",
]

SettingValue = str | int | bool | UUID | None
"""None unsets: the setting has its default."""

SettingsFunction = Callable[..., Mapping[str, SettingValue]]
"""Called without arguments, or with the engine."""

DueSettings = tuple[tuple[str, str | None], ...]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(?:\.[A-Za-z_][A-Za-z0-9_$]*)*")

MAY_BE_OF_SETTINGS = frozenset({"0A000", "22023", "25001", "42501", "42602", "42704", "55P02"})
"""SQLSTATEs by which the server refuses a setting. Statements have them too, so that it is asked which it was."""

CANNOT_SHARE = "25001"
"""The SQLSTATE of what cannot run in a transaction with other statements; active_sql_transaction."""

_asking: contextvars.ContextVar[bool] = contextvars.ContextVar("fictive_asking_for_settings", default=False)


class SettingsSource:
    """Where a session gets its settings from: a function of the application's, once there is one."""

    __slots__ = ("_takes_engine", "function")

    def __init__(self, function: SettingsFunction | None = None) -> None:
        self.function: SettingsFunction | None = None
        self._takes_engine = False
        if function is not None:
            self.register(function)

    def register(self, function: SettingsFunction) -> None:
        """See `db.local_settings`."""
        if not callable(function) or inspect.iscoroutinefunction(function):
            raise ConfigurationError(
                f"local_settings takes a function that returns a dict of settings, not {function!r}."
            )
        needed = _needed_arguments(function)
        if needed > 1:
            raise ConfigurationError(
                f"The function of local_settings is called without arguments, or with the engine: {_name(function)}."
            )
        if self.function is not None and _place(self.function) != _place(function):
            raise ConfigurationError(
                f"local_settings has a function already, {_name(self.function)}; {_name(function)} would take its "
                "place. Put both in one."
            )
        self._takes_engine = needed == 1
        self.function = function

    def due(self, engine: sa.Engine) -> DueSettings:
        """Ask the function, and check what it says."""
        function = self.function
        if function is None:
            return ()
        if _asking.get() and _is_asking():
            raise LocalSettingsError(
                f"The function of local_settings, {_name(function)}, has run a statement of a session that needs its "
                "answer. Read what it needs beforehand, or by db.engine.connect()."
            )
        try:
            _asking.set(True)
            given = function(engine) if self._takes_engine else function()
        finally:
            _asking.set(False)
        if not isinstance(given, Mapping):
            raise LocalSettingsError(f"{_name(function)} returned {given!r}: expected a dict, {{}} for no settings.")
        return tuple((_checked_name(name, function), _checked(name, value, function)) for name, value in given.items())

    def of(self, link: Link) -> DueSettings:
        """`due`, for a session's connection."""
        settings = self.due(link.engine)
        if settings and not link.driver.has_options:
            raise UnsupportedDialect(
                f"local_settings ({_names(settings)}) needs PostgreSQL by psycopg2 or psycopg; this is "
                f"{link.dialect.name}+{link.dialect.driver}. The function may take the engine, and return {{}} for it."
            )
        return settings


NO_SETTINGS = SettingsSource()


def _is_asking() -> bool:
    """Whether a function of settings is really under way: an interrupt may have kept its end from being noted."""
    under_way = 0  # the call that asks is one of them
    frame = inspect.currentframe()
    while frame is not None:
        under_way += frame.f_code is SettingsSource.due.__code__
        frame = frame.f_back
    return under_way > 1


def _checked_name(name: object, function: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise LocalSettingsError(f"{_name(function)} returned {name!r}, which is not the name of a setting.")
    return name


def _checked(name: str, value: object, function: Any) -> str | None:
    if value is None or isinstance(value, str):
        text = value
    elif isinstance(value, bool):
        text = "on" if value else "off"
    elif isinstance(value, (int, UUID)):
        text = str(value)
    else:
        raise LocalSettingsError(
            f"{_name(function)} returned {value!r} for {name}: expected text, an integer, a UUID, True, False or None."
        )
    if text is not None:
        if "\0" in text:
            raise LocalSettingsError(f"{_name(function)} returned a text with a zero byte for {name}.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise LocalSettingsError(f"{_name(function)} returned a text that is not Unicode for {name}.") from None
        text = str(text)
    return text


def _needed_arguments(function: Any) -> int:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of a class written in C
        return 0
    positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return len([each for each in parameters if each.default is each.empty and each.kind in positional])


def _place(function: Any) -> object:
    """The same for a function that is defined anew, as in an app factory."""
    place = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    return function if None in place else place


def _name(function: Any) -> str:
    name = getattr(function, "__qualname__", None)
    return repr(function) if name is None else f"{function.__module__}.{name}()"


def _names(settings: DueSettings) -> str:
    return ", ".join(name for name, _ in settings)


# -- a statement in autocommit ---------------------------------------------------------------------------------------


def execute_with_settings(
    cursor: StatementCursor,
    settings: DueSettings,
    statement: StatementClass,
    query: Any,
    parameters: Any,
    written: Any,
) -> None:
    """Run a statement in autocommit with its settings: 1 round trip, and nothing of them stays."""
    link = cursor.link
    owner, driver = link.owner, link.driver
    if statement.alone is not None or statement.may_end_transaction:
        raise _cannot_share(statement.alone or "A text that ends a transaction", settings)
    if not driver.can_share(query, parameters):
        cursor.execute_in_transaction(query, parameters, written)
        return
    if link.replicas is not None and written is None and statement.is_plain_read:
        from .replica_reads import read_from_replica  # not before there is a replica

        if read_from_replica(link, cursor, query, parameters, settings):
            return
    server = link.keep() if owner.keeps else link.early or link.kept
    if server is None:
        if written is None and (stream := link.open_stream(settings)) is not None:
            stream.run(cursor, query, parameters)
            return
        server = link.borrow()
    command = None
    try:
        command = driver.set_command(server.dbapi, settings)
        found = driver.execute_behind(server, link.dialect, [command], query, parameters)
        if found is not None:
            cursor.take_over(found, server)
    except BaseException as error:
        refusal = None
        if command is not None and isinstance(error, link.dialect.loaded_dbapi.Error):
            refusal = refusal_of(link, server, command, settings, error)
            cursor.driver_cursor = None if server.is_lost() else server.dbapi.cursor()  # a sign that it was sent
        if link.statement_failed(server, error, may_repeat=cursor.repeats and written is None):
            cursor.repeats = False
            cursor.execute(query, parameters)
            return
        if refusal is not None:
            raise refusal from error
        raise
    if server is not link.early and server is not link.kept:
        server.give_back()
    if found is None:  # the application's cursor class lets nothing ride; nothing was sent
        cursor.execute_in_transaction(query, parameters, written)
    elif written is not None:
        link.wrote_alone(written, query, found.rowcount)


def _cannot_share(what: str, settings: DueSettings) -> LocalSettingsError:
    return LocalSettingsError(
        f"{what} cannot share a transaction with the settings that local_settings gives ({_names(settings)}), and was "
        "not run. Run it where the function returns {}, or on a connection of its own: "
        'db.engine.connect().execution_options(isolation_level="AUTOCOMMIT").'
    )


def refusal_of(
    link: Link, server: ServerConnection, command: str, settings: DueSettings, error: BaseException
) -> LocalSettingsError | None:
    """In autocommit, after an error: the error to raise where it is that of the settings, and not of the statement.
    1 round trip more for those errors that can be, none for others."""
    state = sqlstate(error)
    if state not in MAY_BE_OF_SETTINGS or not isinstance(error, Exception) or server.is_lost():
        return None
    started = perf_counter()
    try:
        link.driver.send(server, [command])
    except link.dialect.loaded_dbapi.Error as refused:
        return _refused_by_server(settings, refused) if _is_refusal(refused) else None
    finally:
        if link.watcher is not None:
            link.watcher.command("SELECT set_config", started, perf_counter(), 1, None)
    if state == CANNOT_SHARE:
        return _cannot_share("This statement", settings)
    return None


def _is_refusal(error: BaseException) -> bool:
    """Whether the server has answered, and is not about to go."""
    return (sqlstate(error) or "08")[:2] not in ("08", "57")


def _refused_by_server(settings: DueSettings, error: BaseException) -> LocalSettingsError:
    lines = str(error).strip().splitlines()
    return LocalSettingsError(
        f"The server refused the settings that local_settings gives ({_names(settings)}), and the statement was not "
        f"run: {lines[0] if lines else error!r}"
    )


@contextlib.contextmanager
def explained(settings: DueSettings, errors: type[BaseException]) -> Iterator[None]:
    """Around settings that are sent by themselves; without any it does nothing."""
    try:
        yield
    except errors as error:
        if not settings or not _is_refusal(error):
            raise
        raise _refused_by_server(settings, error) from error


def set_on_foreign(connection: sa.Connection, source: SettingsSource) -> None:
    """Set them on a connection of Core's that the session was given, to the end of its transaction. 1 round trip."""
    settings = source.due(connection.engine)
    if not settings:
        return
    if connection.dialect.name != "postgresql":
        raise UnsupportedDialect(
            f"local_settings ({_names(settings)}) needs PostgreSQL; this is {connection.dialect.name}."
        )
    calls = [sa.func.pg_catalog.set_config(name, sa.literal(value, sa.Text), True) for name, value in settings]
    with explained(settings, sa.exc.DBAPIError):
        connection.execute(sa.select(*calls))

"""The settings of one application, read once into a frozen object."""

from __future__ import annotations

import dataclasses
import difflib
import enum
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from .errors import ConfigurationError, UnknownOption
from .session.durations import timeout_in_ms

__all__ = ["LazyLoads", "NPlusOne", "Settings", "UnsavedChanges", "WritesOutside"]

_PREFIX = "FICTIVE_"

DATABASE_VARIABLES = (
    "DATABASE_URL",
    "DB_POOL_SIZE",
    "DB_MAX_OVERFLOW",
    "DB_POOL_TIMEOUT",
    "DB_POOL_RECYCLE",
    "DB_POOL_PRE_PING",
    "DB_ECHO",
    "DB_STATEMENT_TIMEOUT",
    "DB_PGBOUNCER",
    "DB_BINDS",
)
"""The environment's variables that `fictive.settings.DatabaseSettings` reads."""


class WritesOutside(str, enum.Enum):
    """What a write in autocommit does."""

    COMMIT = "commit"
    """It stands alone: a DML statement commits at once, a flush in a transaction of its own."""
    BEGIN = "begin"
    """It opens a transaction that lasts until `commit()`, `rollback()` or the end of the context."""
    REFUSE = "refuse"
    """It raises `TransactionRequired`."""
    REPORT = "report"
    """As `BEGIN`, and the line of each such write is logged, once: for finding them in an existing app."""


class UnsavedChanges(str, enum.Enum):
    """What happens to changes that were not written by the end of the context."""

    WARN = "warn"
    ERROR = "error"
    IGNORE = "ignore"


class LazyLoads(str, enum.Enum):
    """What happens when a relationship that is not loaded is asked for."""

    LOAD = "load"
    """One query, for that object."""
    BATCH = "batch"
    """One query, for all objects of the same query."""
    RAISE = "raise"


class NPlusOne(str, enum.Enum):
    """What happens when one line of code loads a relationship one by one on many objects."""

    OFF = "off"
    WARN = "warn"
    RAISE = "raise"


def seconds(value: object, name: str) -> float | None:
    """A duration, in seconds; None stays None. `ConfigurationError` naming `name` for anything else."""
    return None if value is None else timeout_in_ms(value, name) / 1000  # type: ignore[arg-type]


def age(value: object, name: str) -> float:
    """A duration of a second or more, in seconds; `ConfigurationError` naming `name` for anything else."""
    found = seconds(value, name)
    if found is None or found < 1:  # a cookie counts whole seconds
        raise ConfigurationError(f"{name} = {value!r}: expected a duration of a second or more.")
    return found


def count(value: object, name: str) -> int | None:
    """A whole number from 1 on, or None; `ConfigurationError` naming `name` otherwise."""
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigurationError(f"{name} = {value!r}: expected a whole number from 1 on, or None.")
    return value


def pooler_mode(value: object, name: str) -> str | None:
    """`"transaction"` or None; `ConfigurationError` naming `name` otherwise."""
    if value not in (None, "transaction"):
        raise ConfigurationError(
            f"{name} = {value!r}: expected 'transaction' or None. Session pooling needs no setting; under "
            "statement pooling there are no transactions."
        )
    return None if value is None else "transaction"


def direct_urls(value: object, name: str) -> tuple[tuple[str | None, sa.URL], ...]:
    """The URLs by bind key, None for the default; `ConfigurationError` naming `name`, and no URL, otherwise."""
    given: Mapping[Any, Any] = value if isinstance(value, Mapping) else {} if value is None else {None: value}
    try:
        found = tuple((key, sa.make_url(each)) for key, each in given.items())
    except sa.exc.ArgumentError:
        raise ConfigurationError(f"{name}: expected a database URL, or a mapping of bind keys to URLs.") from None
    if not all(url.get_backend_name() == "postgresql" for _, url in found):
        raise ConfigurationError(f"{name}: expected the URL of a PostgreSQL server.")
    return found


def patience(value: object, name: str) -> float:
    """A duration of at most a minute, in seconds; 0 is none."""
    found = 0.0 if value in (0, timedelta(0)) and not isinstance(value, bool) else seconds(value, name)
    if found is None or found > 60:
        raise ConfigurationError(f"{name} = {value!r}: expected a duration from 0 to 60 seconds.")
    return found


def replica_names(value: object, name: str) -> tuple[tuple[str | None, tuple[str | sa.URL, ...]], ...]:
    """The bind keys or URLs of replicas, by the primary's bind key; `ConfigurationError` naming `name` otherwise."""
    given: Mapping[Any, Any] = value if isinstance(value, Mapping) else {} if value is None else {None: value}
    found = []
    for key, each in given.items():
        names = [each] if isinstance(each, (str, sa.URL)) else list(each) if isinstance(each, Iterable) else [None]
        if not all(isinstance(one, (str, sa.URL)) and one for one in names):
            raise ConfigurationError(
                f"{name}: expected a list of bind keys or URLs, or a mapping of bind keys to such lists."
            )
        found.append((key, tuple(names)))
    return tuple(found)


def token_way(value: object, name: str) -> str | None:
    """`"cookie"`, `"header"` or None; `ConfigurationError` naming `name` otherwise."""
    if value not in (None, "cookie", "header"):
        raise ConfigurationError(f"{name} = {value!r}: expected 'cookie', 'header' or None.")
    return None if value is None else str(value)


def flag_or_none(value: object, name: str) -> bool | None:
    """True, False or None; `ConfigurationError` naming `name` otherwise."""
    return None if value is None else flag(value, name)


def _optional(read: Callable[[object, str], Any]) -> Any:
    """A field whose default is None, and whose value in `app.config` goes through `read`."""
    return dataclasses.field(default=None, metadata={"read": read})


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings, with their defaults. The key of a field in `app.config` is `FICTIVE_` and its name in capitals."""

    writes_outside: WritesOutside = WritesOutside.COMMIT
    unsaved_changes: UnsavedChanges = UnsavedChanges.WARN
    retry_reads: bool = True
    """Whether a statement that met a lost connection is run again, where it cannot have had an effect: a read in
    autocommit, the first statement of a transaction."""
    rollback_statuses: frozenset[int] = frozenset(range(400, 600))
    """The status codes of a response after which `@db.transactional` rolls back."""
    lazy_loads: LazyLoads = LazyLoads.LOAD
    n_plus_one: NPlusOne = NPlusOne.OFF
    protected: bool = False
    """Whether `flask fictive drop` and `cleanup` are refused."""

    pooler: str | None = _optional(pooler_mode)
    """`"transaction"`: a pooler of transactions, such as PgBouncer, is between the app and its PostgreSQL servers."""
    direct_url: tuple[tuple[str | None, sa.URL], ...] = dataclasses.field(default=(), metadata={"read": direct_urls})
    """The URLs of the servers behind the pooler, by bind key; in `app.config` one URL, or a mapping by bind key."""
    replicas: tuple[tuple[str | None, tuple[str | sa.URL, ...]], ...] = dataclasses.field(
        default=(), metadata={"read": replica_names}
    )
    """Read replicas of the default engine, as bind keys or URLs; in `app.config` a list, or a mapping by bind key."""
    replica_token: str | None = dataclasses.field(default="cookie", metadata={"read": token_way})
    """How users carry what they must see from one request to the next: in a cookie, a header, or not."""
    replica_token_age: float = dataclasses.field(default=3600.0, metadata={"read": age})
    """Seconds after which that is forgotten."""
    patience: float = dataclasses.field(default=5.0, metadata={"read": patience})
    """Seconds during which connecting is tried again, after a connection was lost: the server may be restarting, or
    another one be taking over."""

    # What is reported of requests (see `fictive.report`); durations are in seconds.
    report: bool | None = _optional(flag_or_none)
    """Whether requests are watched. None: in debug mode, and where one of the settings below needs it."""
    report_server_timing: bool | None = _optional(flag_or_none)
    """Whether a response has the header `Server-Timing`. None: in debug mode."""
    report_slow: float | None = _optional(seconds)
    """A request that spends longer than this in the database is logged."""
    report_round_trips: int | None = _optional(count)
    """A request with more round trips than this is logged."""
    report_idle: float | None = _optional(seconds)
    """A request with a transaction that is open but idle for longer than this, in all, is logged."""
    report_json: bool = False
    """Whether the log record's message is JSON."""
    report_transaction_open: float | None = _optional(seconds)
    """A transaction that is open for longer than this is logged while it is open."""
    report_connection_held: float | None = _optional(seconds)
    """A connection that is out of the pool for longer than this is logged while it is held."""
    report_tags: bool = False
    """Whether statements carry a comment with endpoint and trace id (SQLCommenter)."""

    def wants_report(self, debug: bool) -> bool:
        """Whether the requests of an app, in debug mode or not, are watched."""
        if self.report is not None:
            return self.report
        needing = (self.report_slow, self.report_round_trips, self.report_idle, self.report_transaction_open,
                   self.report_connection_held)  # fmt: skip
        return debug or bool(self.report_server_timing) or any(each is not None for each in needing)

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> Settings:
        """Read the `FICTIVE_*` keys of `config`; keys of others are passed over.

        Raises `ConfigurationError` for an unknown key or a value that is not one of the choices, and names them.
        """
        known = {setting_name(field.name): field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key in config:
            if not (isinstance(key, str) and key.startswith(_PREFIX)):
                continue
            if key not in known:
                # without the prefix, in which all are alike
                fields = [field.name for field in known.values()]
                near = nearest(key.removeprefix(_PREFIX).lower(), fields)
                hint = _hint([setting_name(each) for each in near], "the settings are", known)
                raise ConfigurationError(f"There is no setting {key}: {hint}")
            kind: type[Any] = type(known[key].default)
            if (read := known[key].metadata.get("read")) is not None:
                values[known[key].name] = read(config[key], key)
            elif kind is bool:
                values[known[key].name] = flag(config[key], key)
            elif kind is frozenset:
                values[known[key].name] = statuses(config[key], key)
            else:
                values[known[key].name] = choice(kind, config[key], key)
        return cls(**values)


def setting_name(field: str) -> str:
    """The key in `app.config` of a field of `Settings`."""
    return _PREFIX + field.upper()


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Those of `known` that `name` may be a misspelling of, or a part of; the most alike first, two at most."""
    names = sorted(known)
    parts = [each for each in names if len(name) > 2 and name in each.split("_")]
    return parts[:2] or difflib.get_close_matches(name, names, n=2)


def refuse_unknown(given: Iterable[str], known: Iterable[str], function: str) -> None:
    """Raise `UnknownOption` for the first name that is not among those that `function`, `"transaction()"`, takes."""
    names = sorted(known)
    for name in given:
        if name not in names:
            raise UnknownOption(f"{function} has no option {name}: {_hint(nearest(name, names), 'it has', names)}")


def _hint(near: Iterable[str], otherwise: str, known: Iterable[str]) -> str:
    found = " or ".join(near)
    return f"did you mean {found}?" if found else f"{otherwise} {', '.join(sorted(known))}."


def flag(value: object, name: str) -> bool:
    """`value`, which has to be True or False; `ConfigurationError` naming `name` otherwise."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} = {value!r}: expected True or False.")
    return value


def statuses(value: object, name: str) -> frozenset[int]:
    """`value`, a set, list or range of HTTP status codes; `ConfigurationError` naming `name` for anything else."""
    several = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
    codes: list[Any] = list(value) if several else [None]  # type: ignore[call-overload]
    if not all(type(code) is int and 100 <= code <= 599 for code in codes):
        raise ConfigurationError(f"{name} = {value!r}: expected status codes, such as [409, 500] or range(400, 600).")
    return frozenset(codes)


def choice(kind: type[enum.Enum], value: object, name: str) -> Any:
    """`value` as a member of `kind`; `ConfigurationError` naming `name` and the choices otherwise."""
    try:
        return kind(value)
    except ValueError:
        expected = ", ".join(repr(member.value) for member in kind)
        raise ConfigurationError(f"{name} = {value!r}: expected one of {expected}.") from None

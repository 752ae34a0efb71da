"""The settings of one application, read once into a frozen object."""

from __future__ import annotations

import dataclasses
import difflib
import enum
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import ConfigurationError

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
    """What a write outside a transaction does."""

    COMMIT = "commit"
    """It stands alone: a DML statement commits at once, a flush in a transaction of its own."""
    BEGIN = "begin"
    """It opens a transaction that lasts until `commit()`, `rollback()` or the end of the context."""
    REFUSE = "refuse"
    """It raises `TransactionRequired`."""


class UnsavedChanges(str, enum.Enum):
    """What happens to changes that no one wrote by the end of the context."""

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


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings, with their defaults. The key of a field in `app.config` is `FICTIVE_` and its name in capitals."""

    writes_outside: WritesOutside = WritesOutside.COMMIT
    unsaved_changes: UnsavedChanges = UnsavedChanges.WARN
    retry_reads: bool = True
    """Whether a statement that met a lost connection is run again, where it can have done nothing: a read outside,
    the first statement of a transaction."""
    rollback_statuses: frozenset[int] = frozenset(range(400, 600))
    """The status codes of a response after which `@db.transactional` rolls back."""
    lazy_loads: LazyLoads = LazyLoads.LOAD
    n_plus_one: NPlusOne = NPlusOne.OFF
    protected: bool = False
    """Whether `flask fictive drop` and `cleanup` are refused."""

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
                near = difflib.get_close_matches(key.removeprefix(_PREFIX).lower(), fields, n=1)
                every = ", ".join(sorted(known))
                hint = f"did you mean {setting_name(near[0])}?" if near else f"the settings are {every}."
                raise ConfigurationError(f"There is no setting {key}: {hint}")
            kind: type[Any] = type(known[key].default)
            if kind is bool:
                values[known[key].name] = flag(config[key], key)
            elif kind is frozenset:
                values[known[key].name] = statuses(config[key], key)
            else:
                values[known[key].name] = choice(kind, config[key], key)
        return cls(**values)


def setting_name(field: str) -> str:
    """The key in `app.config` of a field of `Settings`."""
    return _PREFIX + field.upper()


def flag(value: object, name: str) -> bool:
    """`value`, which has to be True or False; `ConfigurationError` naming `name` otherwise."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} = {value!r}: expected True or False.")
    return value


def statuses(value: object, name: str) -> frozenset[int]:
    """`value`, a set, list or range of HTTP status codes; `ConfigurationError` naming `name` for anything else."""
    codes: list[Any] = list(value) if isinstance(value, Iterable) else [None]
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

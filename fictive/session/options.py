"""The options of one block, checked where they are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, TypeAlias, TypedDict

import sqlalchemy as sa

from ..config import flag, refuse_unknown
from ..drivers import TransactionOptions
from ..errors import ConfigurationError, TransactionAlreadyBegun, UnknownOption, UnsupportedDialect
from .durations import Duration, timeout_in_ms

__all__ = [
    "OPTIONS",
    "BlockOptions",
    "IsolationLevel",
    "TransactionArguments",
    "block_options",
    "refuse_options_of_begin",
]

IsolationLevel: TypeAlias = Literal["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
"""As SQL writes them; small letters and underscores are accepted too."""


class TransactionArguments(TypedDict, total=False):
    """What `transaction()` takes by keyword; its docstring has the meanings."""

    isolation_level: IsolationLevel | None
    read_only: bool | None
    deferrable: bool | None
    lock_timeout: Duration | None
    statement_timeout: Duration | None
    durable: bool
    savepoint: bool


OPTIONS = tuple(TransactionArguments.__annotations__)


def refuse_options_of_begin(given: Mapping[str, Any]) -> NoReturn:
    """Raise `UnknownOption` for what `begin()` does not take: an option of `transaction()`, or something misspelt."""
    refuse_unknown(set(given) - set(OPTIONS), ("nested",), "begin()")
    raise UnknownOption(f"begin() has no options; transaction() has: `with db.transaction({next(iter(given))}=...):`.")


@dataclasses.dataclass(frozen=True)
class BlockOptions:
    """What `transaction()` was asked for."""

    begin: TransactionOptions
    settings: Mapping[str, int]
    """For SET LOCAL; timeouts in milliseconds."""
    durable: bool
    savepoint: bool

    def check(self, dialect: sa.Dialect) -> None:
        """Raise for what the database does not have."""
        if self.settings and dialect.name != "postgresql":
            name = next(iter(self.settings))
            raise UnsupportedDialect(f"{name} of a transaction needs PostgreSQL; this is {dialect.name}.")

    def check_inside(self, begun_with: TransactionOptions, *, enclosed: bool) -> None:
        """Raise for what cannot be had within a transaction that was `begun_with` other options.

        `enclosed`: whether its outcome depends on a block around.
        """
        if self.durable and enclosed:
            raise TransactionAlreadyBegun(
                "transaction(durable=True) promises that its block is committed when it ends, and a transaction is "
                "open around it. Call it in autocommit, or leave durable out."
            )
        for field in dataclasses.fields(self.begin):
            asked, has = getattr(self.begin, field.name), getattr(begun_with, field.name)
            if asked is not None and asked != has:
                raise TransactionAlreadyBegun(
                    f"A transaction is open, begun with {field.name}={has!r}; that cannot change to {asked!r} in it, "
                    "nor can isolation level, READ ONLY and DEFERRABLE at all. Leave the option out for a savepoint, "
                    "or call transaction() in autocommit."
                )


def block_options(
    *,
    isolation_level: str | None = None,
    read_only: bool | None = None,
    deferrable: bool | None = None,
    lock_timeout: Duration | None = None,
    statement_timeout: Duration | None = None,
    durable: bool = False,
    savepoint: bool = True,
    **unknown: Any,
) -> BlockOptions:
    """The arguments of `transaction()` as one object; `ConfigurationError` for a value that cannot be one."""
    if unknown:
        refuse_unknown(unknown, OPTIONS, "transaction()")
    if isolation_level is not None and not isinstance(isolation_level, str):
        raise ConfigurationError(f"isolation_level = {isolation_level!r}: expected a name such as 'SERIALIZABLE'.")
    for name, value in (("read_only", read_only), ("deferrable", deferrable)):
        if value is not None:
            flag(value, name)
    for name, value in (("durable", durable), ("savepoint", savepoint)):
        flag(value, name)
    if durable and not savepoint:
        raise ConfigurationError("durable=True begins, savepoint=False joins: one of the two.")
    timeouts = {"lock_timeout": lock_timeout, "statement_timeout": statement_timeout}
    return BlockOptions(
        TransactionOptions(
            isolation_level.upper().replace("_", " ") if isolation_level is not None else None, read_only, deferrable
        ),
        {name: timeout_in_ms(value, name) for name, value in timeouts.items() if value is not None},
        durable,
        savepoint,
    )

"""Names for constraints and indexes, so that a migration can drop them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ExcludeConstraint

from ..errors import ConfigurationError
from . import postgresql_names

__all__ = ["check_names", "naming_convention"]

_CONVENTIONS: dict[str, dict[Any, Any]] = {
    "postgresql": {
        "pk": "%(postgresql_pk)s",
        "uq": "%(postgresql_uq)s",
        "fk": "%(postgresql_fk)s",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "ix": "%(postgresql_ix)s",
        ExcludeConstraint: "%(postgresql_ex)s",
        "postgresql_pk": postgresql_names.primary_key_name,
        "postgresql_uq": postgresql_names.unique_name,
        "postgresql_fk": postgresql_names.foreign_key_name,
        "postgresql_ix": postgresql_names.index_name,
        "postgresql_ex": postgresql_names.exclude_name,
    },
    "prefixed": {
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        ExcludeConstraint: "ex_%(table_name)s_%(column_0_N_name)s",
    },
}


def naming_convention(style: Literal["postgresql", "prefixed"]) -> dict[str, Any]:
    """A naming convention for `sqlalchemy.MetaData(naming_convention=...)`.

    `"postgresql"`: the names that PostgreSQL itself gives, such as `users_pkey`, `users_email_key`,
    `orders_user_id_fkey`, `users_lower_idx` for an index on `lower(email)` (an existing database needs no renaming).
    Of a table's indexes that would have one name the second gets `users_lower_idx1`, in the order they are written.
    `"prefixed"`: `pk_users`, `uq_users_email`, `fk_orders_user_id_users`, `ck_orders_amount_positive`,
    `ix_users_email`. In both a CHECK is given a name of its own (`name="amount_positive"`), since there is no column
    to name it by; `check_names` finds those without.

    Raises `ConfigurationError` for another style. (SQLAlchemy documentation, "Configuring Constraint Naming
    Conventions".)
    """
    if style not in _CONVENTIONS:
        known = ", ".join(map(repr, _CONVENTIONS))
        raise ConfigurationError(f"naming_convention({style!r}): expected one of {known}.")
    return dict(_CONVENTIONS[style])


def check_names(metadata: sa.MetaData) -> None:
    """Raise `ConfigurationError` for constraints and indexes of `metadata` that have no name, or one name for two.

    The database invents a name for what has none, and no migration can drop what it cannot name. Two of one name
    cannot be made: indexes and tables of one schema share their names, and so do the constraints of one table. Sends
    nothing. For a test: `check_names(db.metadata)`.
    """
    unnamed = []
    named: defaultdict[tuple[str | None, str], set[str]] = defaultdict(set)
    for table in metadata.tables.values():
        named[table.schema, table.name].add(f"{table.fullname}: Table")
        items: list[Any] = [*table.constraints, *table.indexes]
        items += [constraint for column in table.columns for constraint in column.constraints]
        for item in items:
            columns = ", ".join(str(column.name) for column in item.columns)
            described = f"{table.fullname}: {type(item).__name__}({columns})"
            if isinstance(item.name, str):
                if isinstance(item, sa.Constraint):
                    named[table.schema, f"{table.name}.{item.name}"].add(f"{described} #{id(item)}")
                if not isinstance(item, (sa.ForeignKeyConstraint, sa.CheckConstraint)):  # these have no index
                    named[table.schema, item.name].add(f"{described} #{id(item)}")
            elif len(item.columns) or not isinstance(item, sa.PrimaryKeyConstraint):
                unnamed.append(described)
    problems = []
    if unnamed:
        problems.append(
            "These have no name, so that no migration can drop them: "
            + "; ".join(sorted(unnamed))
            + '. Pass naming_convention=naming_convention("postgresql") to MetaData, and give each CHECK a name.'
        )
    for (_, name), found in sorted(named.items(), key=lambda each: each[0][1]):
        if len(found) > 1:
            shown = "; ".join(sorted(each.partition(" #")[0] for each in found))
            problems.append(
                f"{name.rpartition('.')[2]} is the name of several: {shown}. Give them names of their own."
            )
    if problems:
        raise ConfigurationError(" ".join(problems))

"""Names for constraints and indexes, so that a migration can drop them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from ..errors import ConfigurationError

__all__ = ["check_names", "naming_convention"]

_CONVENTIONS: dict[str, dict[str, Any]] = {
    "postgresql": {
        "pk": "%(table_name)s_pkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    },
    "prefixed": {
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    },
}


def naming_convention(style: str) -> dict[str, Any]:
    """A naming convention for `sqlalchemy.MetaData(naming_convention=...)`.

    `"postgresql"`: the names that PostgreSQL itself gives, such as `users_pkey`, `users_email_key`,
    `orders_user_id_fkey` (an existing database needs no renaming). `"prefixed"`: `pk_users`, `uq_users_email`,
    `fk_orders_user_id_users`, `ck_orders_amount_positive`, `ix_users_email`. In both a CHECK is given a name of its
    own (`name="amount_positive"`), since there is no column to name it by; `check_names` finds those without.

    Raises `ConfigurationError` for another style. (SQLAlchemy documentation, "Configuring Constraint Naming
    Conventions".)
    """
    if style not in _CONVENTIONS:
        known = ", ".join(map(repr, _CONVENTIONS))
        raise ConfigurationError(f"naming_convention({style!r}): expected one of {known}.")
    return dict(_CONVENTIONS[style])


def check_names(metadata: sa.MetaData) -> None:
    """Raise `ConfigurationError` naming all constraints and indexes of `metadata` that would have no name of ours.

    The database invents one then, and no migration can drop what it cannot name. Sends nothing. For a test:
    `check_names(db.metadata)`.
    """
    unnamed = []
    for table in metadata.tables.values():
        items: list[Any] = [*table.constraints, *table.indexes]
        items += [constraint for column in table.columns for constraint in column.constraints]
        for item in items:
            if not isinstance(item.name, str) and (len(item.columns) or not isinstance(item, sa.PrimaryKeyConstraint)):
                columns = ", ".join(str(column.name) for column in item.columns)
                unnamed.append(f"{table.fullname}: {type(item).__name__}({columns})")
    if unnamed:
        raise ConfigurationError(
            "These have no name, so that no migration can drop them: "
            + "; ".join(sorted(unnamed))
            + '. Pass naming_convention=naming_convention("postgresql") to MetaData, and give each CHECK a name.'
        )

"""CHECK constraints that a column was given, which autogenerate would not see."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from alembic.autogenerate.api import AutogenContext
from alembic.operations.ops import UpgradeOps
from alembic.util import PriorityDispatchResult

__all__ = ["move_to_tables"]


def move_to_tables(
    context: AutogenContext, upgrade_ops: UpgradeOps, schemas: Sequence[str | None]
) -> PriorityDispatchResult:
    """Make the CHECK constraints of columns those of their tables, which is the same to the database.

    Alembic writes and compares those of tables only: `mapped_column(CheckConstraint(...))` would be missing in a new
    table, and one that is in the database would be dropped.
    """
    for table in context.sorted_tables:
        for column in table.columns:
            for check in [each for each in column.constraints if isinstance(each, sa.CheckConstraint)]:
                column.constraints.discard(check)
                table.append_constraint(check)
    return PriorityDispatchResult.CONTINUE

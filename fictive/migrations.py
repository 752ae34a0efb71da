"""Operations for Alembic migrations: `import fictive.migrations` where they are used, or once in `env.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic.operations import MigrateOperation, Operations

from .rows.notify import create_statements, drop_statements

__all__ = ["CreateNotifyChanges", "DropNotifyChanges"]


class _NotifyChanges(MigrateOperation):
    def __init__(self, table_name: str, primary_key: Sequence[str], *, schema: str | None = None) -> None:
        if isinstance(primary_key, str) or not primary_key:
            raise TypeError(f"primary_key = {primary_key!r}: expected a list of column names.")
        self.table_name = table_name
        self.primary_key = list(primary_key)
        self.schema = schema

    def table(self) -> sa.Table:
        """As much of the table as the statements need."""
        columns = [sa.Column(name, sa.Integer, primary_key=True) for name in self.primary_key]
        return sa.Table(self.table_name, sa.MetaData(), *columns, schema=self.schema)


@Operations.register_operation("create_notify_changes")
class CreateNotifyChanges(_NotifyChanges):
    """`op.create_notify_changes("job", ["id"], schema=None)` installs what `notify_changes(Job)` does.

    The columns are those of the primary key. What is installed already is replaced.
    """

    @classmethod
    def create_notify_changes(
        cls, operations: Operations, table_name: str, primary_key: Sequence[str], *, schema: str | None = None
    ) -> Any:
        """Install the trigger that tells waiters of changed rows."""
        return operations.invoke(cls(table_name, primary_key, schema=schema))

    def reverse(self) -> DropNotifyChanges:
        return DropNotifyChanges(self.table_name, self.primary_key, schema=self.schema)


@Operations.register_operation("drop_notify_changes")
class DropNotifyChanges(_NotifyChanges):
    """`op.drop_notify_changes("job", ["id"], schema=None)` takes it away; the columns are for the way back."""

    @classmethod
    def drop_notify_changes(
        cls, operations: Operations, table_name: str, primary_key: Sequence[str], *, schema: str | None = None
    ) -> Any:
        """Take away the trigger that tells waiters of changed rows."""
        return operations.invoke(cls(table_name, primary_key, schema=schema))

    def reverse(self) -> CreateNotifyChanges:
        return CreateNotifyChanges(self.table_name, self.primary_key, schema=self.schema)


@Operations.implementation_for(CreateNotifyChanges)
def _create(operations: Operations, operation: CreateNotifyChanges) -> None:
    for statement in create_statements(operation.table()):
        operations.execute(statement)


@Operations.implementation_for(DropNotifyChanges)
def _drop(operations: Operations, operation: DropNotifyChanges) -> None:
    for statement in drop_statements(operation.table()):
        operations.execute(statement)

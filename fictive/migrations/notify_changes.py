"""The triggers of `notify_changes` in migrations: operations, and what autogenerate finds and writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic.autogenerate import renderers
from alembic.autogenerate.api import AutogenContext
from alembic.operations import MigrateOperation, Operations
from alembic.operations.ops import CreateTableOp, DropTableOp, UpgradeOps
from alembic.util import PriorityDispatchResult

from ..changes.notify_triggers import (
    DECLARED,
    DECLARED_INSERTS,
    INSERT_TRIGGER,
    TRIGGERS,
    announces,
    announces_inserts,
    create_statements,
    drop_statements,
    function_body,
    keys_of_body,
)

__all__ = ["CreateNotifyChanges", "DropNotifyChanges", "compare"]


class _NotifyChanges(MigrateOperation):
    def __init__(
        self, table_name: str, primary_key: Sequence[str], *, schema: str | None = None, inserts: bool = False
    ) -> None:
        if isinstance(primary_key, str) or not primary_key:
            raise TypeError(f"primary_key = {primary_key!r}: expected a list of column names.")
        self.table_name = table_name
        self.primary_key = list(primary_key)
        self.schema = schema
        self.inserts = inserts

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """For `alembic check`."""
        kind = "create" if isinstance(self, CreateNotifyChanges) else "drop"
        return (f"{kind}_notify_changes", self.table_name, self.primary_key, self.schema)

    def table(self) -> sa.Table:
        """As much of the table as the statements need."""
        columns = [sa.Column(name, sa.Integer, primary_key=True) for name in self.primary_key]
        return sa.Table(self.table_name, sa.MetaData(), *columns, schema=self.schema)


@Operations.register_operation("create_notify_changes")
class CreateNotifyChanges(_NotifyChanges):
    """`op.create_notify_changes("job", ["id"], schema=None, inserts=False)` installs what `notify_changes(Job)` does.

    The columns are those of the primary key. What is installed already is replaced.
    """

    @classmethod
    def create_notify_changes(
        cls,
        operations: Operations,
        table_name: str,
        primary_key: Sequence[str],
        *,
        schema: str | None = None,
        inserts: bool = False,
    ) -> Any:
        """Install the trigger that tells waiters of changed rows, with `inserts` also that for new ones."""
        return operations.invoke(cls(table_name, primary_key, schema=schema, inserts=inserts))

    def reverse(self) -> DropNotifyChanges:
        return DropNotifyChanges(self.table_name, self.primary_key, schema=self.schema, inserts=self.inserts)


@Operations.register_operation("drop_notify_changes")
class DropNotifyChanges(_NotifyChanges):
    """`op.drop_notify_changes("job", ["id"], schema=None)` takes it away; the columns are for the way back."""

    @classmethod
    def drop_notify_changes(
        cls,
        operations: Operations,
        table_name: str,
        primary_key: Sequence[str],
        *,
        schema: str | None = None,
        inserts: bool = False,
    ) -> Any:
        """Take away the triggers that tell waiters of changed rows and, if there is one, of new ones."""
        return operations.invoke(cls(table_name, primary_key, schema=schema, inserts=inserts))

    def reverse(self) -> CreateNotifyChanges:
        return CreateNotifyChanges(self.table_name, self.primary_key, schema=self.schema, inserts=self.inserts)


@Operations.implementation_for(CreateNotifyChanges)
def _create(operations: Operations, operation: CreateNotifyChanges) -> None:
    for statement in create_statements(operation.table(), inserts=operation.inserts):
        operations.execute(statement)


@Operations.implementation_for(DropNotifyChanges)
def _drop(operations: Operations, operation: DropNotifyChanges) -> None:
    for statement in drop_statements(operation.table()):
        operations.execute(statement)


@renderers.dispatch_for(CreateNotifyChanges)
@renderers.dispatch_for(DropNotifyChanges)
def _render(context: AutogenContext, operation: _NotifyChanges) -> str:
    context.imports.add("import fictive.migrations")
    schema = "" if operation.schema is None else f", schema={operation.schema!r}"
    keys = [str(key) for key in operation.primary_key]
    prefix = context.opts["alembic_module_prefix"]
    inserts = ", inserts=True" if operation.inserts else ""
    return f"{prefix}{operation.to_diff_tuple()[0]}({str(operation.table_name)!r}, {keys!r}{schema}{inserts})"


_INSTALLED = sa.text(
    """
SELECT n.nspname, c.relname, count(*) FILTER (WHERE t.tgname IN :names), min(p.prosrc), bool_or(t.tgname = :inserts)
FROM pg_catalog.pg_trigger t
JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
WHERE (t.tgname IN :names OR t.tgname = :inserts) AND t.tgparentid = 0 AND t.tgenabled <> 'D'
GROUP BY 1, 2 ORDER BY 1, 2
"""
).bindparams(sa.bindparam("names", TRIGGERS, expanding=True), sa.bindparam("inserts", INSERT_TRIGGER))

_WITH_INSERTS = "\n-- inserts"

_Table = tuple[str | None, str]  # schema, None for the default one, and name


def compare(context: AutogenContext, upgrade_ops: UpgradeOps, schemas: Sequence[str | None]) -> PriorityDispatchResult:
    """Add to `upgrade_ops` what makes the triggers in the database those that were declared. One query.

    A trigger is dropped before everything else and created after, so that a table or key it needs is there; on the
    way back too, where the order is reversed. Triggers of tables that autogenerate leaves alone are left alone.
    """
    assert context.connection is not None
    installed = _installed(context.connection, schemas)
    created = set()
    for op in upgrade_ops.ops:
        if isinstance(op, CreateTableOp):
            created.add((op.schema, op.table_name))
            for note in (DECLARED, DECLARED_INSERTS):  # for this process, and would be written into the migration
                op.info.pop(note, None)
    wanted = {
        (table.schema, table.name): table
        for table in context.sorted_tables
        if (table.schema in schemas or (table.schema, table.name) in created)  # in whatever schema, as Alembic does
        and context.run_object_filters(table, table.name, "table", False, None)
    }
    dropped = {(op.schema, op.table_name) for op in upgrade_ops.ops if isinstance(op, DropTableOp)}
    drops: list[MigrateOperation] = []
    creates: list[MigrateOperation] = []
    for key in sorted({*installed, *wanted}, key=lambda key: (key[0] or "", key[1])):
        schema, name = key
        body = installed.get(key)
        table = wanted.get(key)
        right = function_body(table) if table is not None and announces(table) else None
        inserts = right is not None and table is not None and announces_inserts(table)
        if right is not None and inserts:
            right += _WITH_INSERTS
        if body == right or (table is None and key not in dropped):
            continue
        if body is not None and (keys := keys_of_body(body)):
            drops.append(DropNotifyChanges(name, keys, schema=schema, inserts=body.endswith(_WITH_INSERTS)))
        if right is not None and table is not None:
            columns = [column.name for column in table.primary_key]
            creates.append(CreateNotifyChanges(name, columns, schema=schema, inserts=inserts))
    upgrade_ops.ops[:] = [*drops, *upgrade_ops.ops, *creates]
    return PriorityDispatchResult.CONTINUE


def _installed(connection: sa.Connection, schemas: Sequence[str | None]) -> dict[_Table, str]:
    """The body of the function of each table that has triggers."""
    found: dict[_Table, str] = {}
    for schema, name, count, body, inserts in connection.execute(_INSTALLED):
        key = None if schema == connection.dialect.default_schema_name else schema
        if key in schemas:
            # half of them is none: the operation that creates them replaces what is there
            complete = body if count == len(TRIGGERS) else body + "\n-- incomplete"
            found[key, name] = complete + (_WITH_INSERTS if inserts else "")
    return found

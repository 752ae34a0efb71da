"""A trigger that tells who listens which row of a table was changed: its SQL, and installing it.

The statements are built here and sent by whoever installs them. Notifications go out at COMMIT, one for each row and
transaction (PostgreSQL documentation, "NOTIFY").
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy import event
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import ExecutableDDLElement

from ..config import flag
from ..rows.attributes import mapper_of
from ..session.given import commits_without_a_block, require_postgresql, session_of
from ..session.session import atomic

__all__ = [
    "ANY_ROW",
    "DECLARED",
    "DECLARED_INSERTS",
    "INSERT_TRIGGER",
    "TRIGGER",
    "TRIGGERS",
    "announces",
    "announces_inserts",
    "channel_of",
    "create_statements",
    "drop_statements",
    "function_body",
    "inserts_channel_of",
    "keys_of_body",
    "notify_changes",
    "tables_of",
]

TRIGGER = "fictive_notify_changes"
"""The name of the trigger for rows, on each table that has them."""

_TRUNCATE_TRIGGER = f"{TRIGGER}_truncate"

INSERT_TRIGGER = f"{TRIGGER}_insert"
"""The one for INSERT, of which there is only one call for each statement."""

TRIGGERS = (TRIGGER, _TRUNCATE_TRIGGER)
"""It, and the one for TRUNCATE."""

ANY_ROW = ""
"""What is sent instead of a key when all rows may have changed, or the key is too long to be sent."""

_LONGEST_NAME = 63  # bytes of an identifier (PostgreSQL documentation, "Identifiers and Key Words")
_LONGEST_PAYLOAD = 7999  # bytes ("NOTIFY")
DECLARED = "fictive.notify_changes"
"""In the `info` of a table: `notify_changes` was called for it."""
DECLARED_INSERTS = f"{DECLARED}.inserts"
"""In the `info` of a table: and with `inserts`."""


def notify_changes(model: type[Any], on: object = None, *, inserts: bool = False) -> None:
    """Let waiters learn of changes of `model`'s rows from the database, instead of asking it again and again.

    Call it once where the model is defined: `metadata.create_all()` then installs a trigger right after it creates
    the table, on PostgreSQL only, and `wait_for_row_change` listens. For a table that is there already, use the
    Alembic operation `op.create_notify_changes`, or give a session or connection as `on`, where it is installed at
    once, in place of one that is there: five statements for each table, in the block that is open, and committed
    where none is.

    The trigger runs for each row that is updated or deleted and for TRUNCATE; an UPDATE that changes nothing sends
    nothing. It sends the primary key, on a channel named for the table. All of a model's tables get one where
    inheritance spreads it over several. The price: transactions that notify are committed one after the other in the
    whole database, so it is not for tables with thousands of writes a second.

    With `inserts`, a second trigger tells `wait_for_rows` of new rows: it runs once for each INSERT or COPY, of
    however many rows, and sends one notification for each transaction. Two statements more.

    Raises `TypeError` for what is not a mapped class; `UnsupportedDialect` for `on` on another database.
    """
    tables = tables_of(mapper_of(model))
    for table in tables:
        if not table.info.get(DECLARED):
            table.info[DECLARED] = True
            for statement in create_statements(table):
                event.listen(table, "after_create", statement.execute_if(dialect="postgresql"))
            # dropped with its table, the trigger leaves the function behind
            event.listen(table, "after_drop", _DropFunction(table).execute_if(dialect="postgresql"))
        if flag(inserts, "inserts") and not announces_inserts(table):
            table.info[DECLARED_INSERTS] = True
            for statement in _insert_statements(table):
                event.listen(table, "after_create", statement.execute_if(dialect="postgresql"))
    if on is None:
        return
    statements = [statement for table in tables for statement in create_statements(table, inserts=inserts)]
    if isinstance(on, sa.Connection):
        for statement in statements:
            on.execute(statement)
        return
    session = session_of(on)
    require_postgresql(session, "notify_changes()", model)
    with commits_without_a_block(session), atomic(session, "notify_changes()"):
        for statement in statements:
            session.execute(statement, bind_arguments={"mapper": mapper_of(model)})


def announces(table: sa.Table) -> bool:
    """Whether `notify_changes` was called for the table in this process."""
    return bool(table.info.get(DECLARED))


def announces_inserts(table: sa.Table) -> bool:
    """Whether `notify_changes` was called for the table with `inserts`, in this process."""
    return bool(table.info.get(DECLARED_INSERTS))


def tables_of(mapper: sa_orm.Mapper[Any]) -> list[sa.Table]:
    """The tables that a model's rows are stored in: several with joined inheritance."""
    return [table for table in mapper.tables if isinstance(table, sa.Table)]


def channel_of(table: sa.Table) -> str:
    """The channel on which changes of the table are sent."""
    return _short(f"fictive.{table.fullname}")


def inserts_channel_of(table: sa.Table) -> str:
    """The channel on which new rows of the table are announced."""
    return _short(f"fictive.inserts.{table.fullname}")


def create_statements(table: sa.Table, *, inserts: bool = False) -> list[ExecutableDDLElement]:
    """What installs the triggers, in order."""
    row = [_CreateFunction(table), *_drop_triggers(table), _CreateTrigger(table), _CreateTruncateTrigger(table)]
    return [*row, *_insert_statements(table)] if inserts else row


def _insert_statements(table: sa.Table) -> list[ExecutableDDLElement]:
    return [_DropTrigger(table, INSERT_TRIGGER), _CreateInsertTrigger(table)]


def drop_statements(table: sa.Table) -> list[ExecutableDDLElement]:
    """What takes it away again."""
    return [*_drop_triggers(table), _DropTrigger(table, INSERT_TRIGGER), _DropFunction(table)]


def _drop_triggers(table: sa.Table) -> list[ExecutableDDLElement]:
    return [_DropTrigger(table, TRIGGER), _DropTrigger(table, _TRUNCATE_TRIGGER)]


class _OnTable(ExecutableDDLElement):
    def __init__(self, table: sa.Table) -> None:
        self.table = table


class _CreateFunction(_OnTable):
    pass


class _DropFunction(_OnTable):
    pass


class _CreateTrigger(_OnTable):
    pass


class _CreateTruncateTrigger(_OnTable):
    pass


class _CreateInsertTrigger(_OnTable):
    pass


class _DropTrigger(_OnTable):
    def __init__(self, table: sa.Table, name: str) -> None:
        super().__init__(table)
        self.name = name


def _short(name: str) -> str:
    """`name` if it fits, or a hash of it."""
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    return "fictive." + hashlib.sha256(name.encode()).hexdigest()[: _LONGEST_NAME - len("fictive.")]


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def function_body(table: sa.Table) -> str:
    """The body of the function that the triggers call, as `pg_proc.prosrc` has it."""
    keys: Sequence[str] = [column.name for column in table.primary_key.columns]
    if not keys:
        raise ValueError(f"{table.fullname} has no primary key, by which a changed row could be named.")
    quoted = ", ".join('OLD."' + key.replace('"', '""') + '"' for key in keys)
    notify = f"PERFORM pg_catalog.pg_notify({_literal(channel_of(table))}, "
    notify_insert = f"PERFORM pg_catalog.pg_notify({_literal(inserts_channel_of(table))}, "
    return f"""
DECLARE
  changed text := {_literal(ANY_ROW)};
BEGIN
  IF TG_OP = 'TRUNCATE' THEN
    {notify}changed);
    RETURN NULL;
  END IF;
  IF TG_OP = 'INSERT' THEN
    {notify_insert}changed);
    RETURN NULL;
  END IF;
  IF TG_OP = 'UPDATE' AND OLD OPERATOR(pg_catalog.*=) NEW THEN
    RETURN NULL;
  END IF;
  changed := pg_catalog.json_build_array({quoted})::text;
  IF pg_catalog.octet_length(changed) > {_LONGEST_PAYLOAD} THEN
    changed := {_literal(ANY_ROW)};
  END IF;
  {notify}changed);
  RETURN NULL;
END
"""


def keys_of_body(body: str) -> list[str]:
    """The columns that a `function_body` sends."""
    called = re.search(r"json_build_array\((.*)\)::text;$", body, re.MULTILINE)
    return [key.replace('""', '"') for key in re.findall(r'OLD\."((?:[^"]|"")+)"', called[1])] if called else []


def _function_name(table: sa.Table, compiler: Any) -> str:
    """In the table's schema, since two of them may have a table of that name."""
    schema = compiler.preparer.schema_for_object(table)
    name: str = compiler.preparer.quote(_short(f"fictive_notify_{table.name}"))
    return f"{compiler.preparer.quote_schema(schema)}.{name}" if schema else name


@compiles(_CreateFunction, "postgresql")
def _create_function(element: _OnTable, compiler: Any, **_: Any) -> str:
    # a literal, not dollar quotes: no name can end it
    body = compiler.sql_compiler.render_literal_value(function_body(element.table), sa.String())
    return (
        f"CREATE OR REPLACE FUNCTION {_function_name(element.table, compiler)}() RETURNS trigger"
        f" LANGUAGE plpgsql AS {body}"
    )


@compiles(_DropFunction, "postgresql")
def _drop_function(element: _OnTable, compiler: Any, **_: Any) -> str:
    return f"DROP FUNCTION IF EXISTS {_function_name(element.table, compiler)}()"


@compiles(_CreateTrigger, "postgresql")
def _create_trigger(element: _OnTable, compiler: Any, **_: Any) -> str:
    return (
        f"CREATE TRIGGER {TRIGGER} AFTER UPDATE OR DELETE ON {compiler.preparer.format_table(element.table)}"
        f" FOR EACH ROW EXECUTE FUNCTION {_function_name(element.table, compiler)}()"
    )


@compiles(_CreateTruncateTrigger, "postgresql")
def _create_truncate_trigger(element: _OnTable, compiler: Any, **_: Any) -> str:
    return (
        f"CREATE TRIGGER {_TRUNCATE_TRIGGER} AFTER TRUNCATE ON {compiler.preparer.format_table(element.table)}"
        f" FOR EACH STATEMENT EXECUTE FUNCTION {_function_name(element.table, compiler)}()"
    )


@compiles(_CreateInsertTrigger, "postgresql")
def _create_insert_trigger(element: _OnTable, compiler: Any, **_: Any) -> str:
    return (
        f"CREATE TRIGGER {INSERT_TRIGGER} AFTER INSERT ON {compiler.preparer.format_table(element.table)}"
        f" FOR EACH STATEMENT EXECUTE FUNCTION {_function_name(element.table, compiler)}()"
    )


@compiles(_DropTrigger, "postgresql")
def _drop_trigger(element: _DropTrigger, compiler: Any, **_: Any) -> str:
    return f"DROP TRIGGER IF EXISTS {element.name} ON {compiler.preparer.format_table(element.table)}"

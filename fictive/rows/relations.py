"""What kind of relation a table is in the database, and so whether COPY stores in it what INSERT stores."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

import sqlalchemy as sa

__all__ = ["can_copy_into", "forget_relations", "table_name"]

# By name, the columns whose values the server makes; None where COPY is not the way at all.
_known: weakref.WeakKeyDictionary[sa.Engine, dict[str, frozenset[str] | None]] = weakref.WeakKeyDictionary()


def table_name(connection: sa.Connection, table: sa.Table) -> str:
    """The table's name as it stands in a statement on this connection."""
    prepare = connection.dialect.identifier_preparer
    translated = connection.get_execution_options().get("schema_translate_map") or {}
    schema = translated.get(table.schema, table.schema)
    name = prepare.quote(table.name)
    return f"{prepare.quote_schema(schema)}.{name}" if schema else name


def can_copy_into(
    connection: sa.Connection, table: sa.Table, columns: Collection[sa.Column[Any]], *, anew: bool
) -> bool:
    """Whether COPY of these columns stores what INSERT stores (PostgreSQL documentation, "COPY", "Notes"): not into a
    view, under row security or rules, or where the server makes a value, for which COPY would take another or none.

    One statement, and none where it is known: `anew` asks in any case, which costs no round trip as the first
    statement of a transaction.
    """
    known = _known.setdefault(connection.engine, {})
    name = table_name(connection, table)
    if anew or name not in known:
        row = connection.execute(_ASK, {"name": name.replace("%%", "%")}).one_or_none()
        known[name] = frozenset(row.made) if row is not None and row.is_plain else None
    made = known[name]
    return made is not None and not any(column.name in made for column in columns)


def forget_relations(connection: sa.Connection) -> None:
    """After an error: a table may have been changed since it was asked for."""
    _known.pop(connection.engine, None)


_ASK = sa.text(
    "SELECT c.relkind IN ('r', 'p') AND NOT c.relrowsecurity AND NOT c.relhasrules AS is_plain,"
    " ARRAY(SELECT CAST(a.attname AS text) FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid"
    " AND (a.attidentity = 'a' OR a.attgenerated <> '')) AS made"
    " FROM pg_catalog.pg_class c WHERE c.oid = pg_catalog.to_regclass(:name)"
)

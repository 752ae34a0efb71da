"""What kind of relation a table is in the database, and so which ways of writing it takes."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

__all__ = ["Relation", "forget_relations", "relation_of", "table_name"]

_known: weakref.WeakKeyDictionary[sa.Engine, dict[str, Relation | None]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Relation:
    """What the server says of a table."""

    kind: str
    """`pg_class.relkind`."""
    has_row_security: bool
    has_rules: bool
    made: frozenset[str]
    """Columns whose values the server makes, and for which COPY, unlike INSERT, would take others or refuse all."""

    def can_copy(self, columns: Collection[sa.Column[Any]]) -> bool:
        """Whether COPY of these columns stores what INSERT stores (PostgreSQL documentation, "COPY", "Notes")."""
        plain = self.kind in ("r", "p") and not self.has_row_security and not self.has_rules
        return plain and not any(column.name in self.made for column in columns)


def table_name(connection: sa.Connection, table: sa.Table) -> str:
    """The table's name as it stands in a statement on this connection."""
    prepare = connection.dialect.identifier_preparer
    translated = connection.get_execution_options().get("schema_translate_map") or {}
    schema = translated.get(table.schema, table.schema)
    name = prepare.quote(table.name)
    return f"{prepare.quote_schema(schema)}.{name}" if schema else name


def relation_of(connection: sa.Connection, table: sa.Table, *, anew: bool) -> Relation | None:
    """What `table` is; None where it is not there. One statement, and none where it is known: `anew` asks in any case,
    which costs no round trip as the first statement of a transaction."""
    known = _known.setdefault(connection.engine, {})
    name = table_name(connection, table)
    if anew or name not in known:
        row = connection.execute(_ASK, {"name": name.replace("%%", "%")}).one_or_none()
        known[name] = None if row is None else Relation(row.kind, row.secured, row.rules, frozenset(row.made))
    return known[name]


def forget_relations(connection: sa.Connection) -> None:
    """After an error: a table may have been changed since it was asked for."""
    _known.pop(connection.engine, None)


_ASK = sa.text(
    "SELECT CAST(c.relkind AS text) AS kind, c.relrowsecurity AS secured, c.relhasrules AS rules,"
    " ARRAY(SELECT CAST(a.attname AS text) FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid"
    " AND (a.attidentity = 'a' OR a.attgenerated <> '')) AS made"
    " FROM pg_catalog.pg_class c WHERE c.oid = pg_catalog.to_regclass(:name)"
)

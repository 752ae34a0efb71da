"""What `doctor` finds by comparing the app's models and code with the database."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.dialects import postgresql

from ..errors import FictiveError
from ..rows.lookups import Lookup, lookup_of
from .findings import Finding, Severity
from .source import parsed, source_files

__all__ = ["lookup_findings", "table_findings"]

_METHODS = frozenset({"find_or_create", "get_or_create", "update_or_create"})
_NOT_LOOKED_UP = frozenset({"defaults", "create_defaults"})
_SOMETHING = object()


def table_findings(engine: sa.Engine, metadata: sa.MetaData) -> Iterator[Finding]:
    """Tables, columns and unique keys of the models that the database does not have. A few queries."""
    inspector = sa.inspect(engine)
    schemas = {table.schema for table in metadata.tables.values()}
    columns: dict[Any, Any] = {}
    unique: dict[Any, set[frozenset[str]]] = {}
    for schema in schemas:
        columns |= inspector.get_multi_columns(schema=schema, kind=sa.engine.reflection.ObjectKind.ANY)
        for key, found in inspector.get_multi_indexes(schema=schema).items():
            unique.setdefault(key, set()).update(
                frozenset(filter(None, each["column_names"])) for each in found if each["unique"]
            )
        for key, constraints in inspector.get_multi_unique_constraints(schema=schema).items():
            unique.setdefault(key, set()).update(frozenset(each["column_names"]) for each in constraints)
        for key, constraint in inspector.get_multi_pk_constraint(schema=schema).items():
            if constraint:
                unique.setdefault(key, set()).add(frozenset(constraint["constrained_columns"]))
    for table in metadata.sorted_tables:
        key = (table.schema, table.name)
        if key not in columns:
            yield Finding("missing-table", Severity.ERROR, f"The table {table.fullname} of the models is not in the "
                          "database.", "Run the migrations (flask db upgrade), or db.create_all().")  # fmt: skip
            continue
        names = {column["name"] for column in columns[key]}
        if missing := [column.name for column in table.columns if column.name not in names]:
            yield Finding("missing-column", Severity.ERROR, f"{table.fullname} has no column {', '.join(missing)}, "
                          "which the models have.", "Run the migrations (flask db upgrade), or make one.")  # fmt: skip
            continue
        for wanted in _unique_columns(table):
            if wanted not in unique.get(key, set()):
                shown = ", ".join(sorted(wanted))
                yield Finding(
                    "missing-unique-key",
                    Severity.ERROR,
                    f"The models say that {table.fullname}({shown}) is unique; the database does not.",
                    "Make a migration that adds the unique constraint; find_or_create and upsert_many rely on it.",
                )


def _unique_columns(table: sa.Table) -> Iterator[frozenset[str]]:
    for constraint in table.constraints:
        if isinstance(constraint, (sa.UniqueConstraint, sa.PrimaryKeyConstraint)) and len(constraint.columns):
            yield frozenset(column.name for column in constraint.columns)
    for index in table.indexes:
        if index.unique and all(isinstance(each, sa.Column) for each in index.expressions):
            yield frozenset(column.name for column in index.columns)


# -- lookups without a unique key -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Call:
    file: str
    line: int
    model: str
    method: str
    names: tuple[str, ...]
    none: frozenset[str]
    """Names that the call looks up as None."""


def lookup_findings(
    mappers: Sequence[sa_orm.Mapper[Any]], source: Path | None, dialect_name: str
) -> Iterator[Finding]:
    """Calls of `find_or_create` and its family in the app's source whose lookup has no unique key. Sends nothing.

    A call is found by its text: `Model.find_or_create(name=..., ...)`, with `Model` a class's name or its alias.
    """
    by_name: dict[str, list[sa_orm.Mapper[Any]]] = {}
    for mapper in mappers:
        by_name.setdefault(mapper.class_.__name__, []).append(mapper)
    seen = set()
    for path in source_files(source, mappers):
        for call in _calls(path):
            for mapper in by_name.get(call.model, ()):
                lookup = _lookup(mapper, call)
                if lookup is None or lookup.key(dialect_name) is not None:
                    continue
                said = (call.file, call.line, mapper.class_)
                if said in seen:
                    continue
                seen.add(said)
                shown = ", ".join(call.names)
                yield Finding(
                    "find-or-create-key",
                    Severity.WARNING,
                    f"{call.file}:{call.line}: {call.model}.{call.method}({shown}) has no unique key over its lookup: "
                    "it takes an advisory lock on each miss, and other writers may insert a second row.",
                    f"A unique constraint or index on ({shown}) of {mapper.local_table}.",
                )


_DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]


def _lookup(mapper: sa_orm.Mapper[Any], call: _Call) -> Lookup | None:
    """What the call looks up, with a value that stands for any; None where that cannot be told."""
    columns: dict[sa.Column[Any], Any] = {}
    plain: dict[str, Any] = {}
    for name in call.names:
        value = None if name in call.none else _SOMETHING
        prop = mapper.attrs.get(name)
        if isinstance(prop, sa_orm.RelationshipProperty):
            columns |= dict.fromkeys(prop.local_columns, value)  # type: ignore[arg-type]
        else:
            plain[name] = value
    try:
        lookup = lookup_of(mapper, plain, _DIALECT) if plain else Lookup(mapper, (), {}, (), {}, {})
    except (FictiveError, sa.exc.SQLAlchemyError, TypeError, ValueError, AttributeError):
        return None
    return dataclasses.replace(lookup, columns={**lookup.columns, **columns})


def _calls(path: Path) -> Iterator[_Call]:
    if (tree := parsed(path, b"_or_create")) is None:
        return
    aliases = {
        name.asname: name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for name in node.names
        if name.asname
    }
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS):
            continue
        of = node.func.value
        model = of.attr if isinstance(of, ast.Attribute) else of.id if isinstance(of, ast.Name) else ""
        if any(each.arg is None for each in node.keywords):  # **filter_by
            continue
        given = [each for each in node.keywords if each.arg not in _NOT_LOOKED_UP]
        yield _Call(
            str(path),
            node.lineno,
            aliases.get(model, model),
            node.func.attr,
            tuple(str(each.arg) for each in given),
            frozenset(
                str(each.arg) for each in given if isinstance(each.value, ast.Constant) and each.value.value is None
            ),
        )

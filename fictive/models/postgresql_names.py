"""The names that PostgreSQL gives to constraints and indexes that have none, worked out before they are made.

After `makeObjectName`, `ChooseIndexColumnNames` and `FigureIndexColname` in PostgreSQL's source (`indexcmds.c`,
`parse_target.c`). Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.sql import elements, functions, operators

from ..session import private

__all__ = ["LONGEST_NAME", "foreign_key_name", "index_name", "primary_key_name", "unique_name"]

LONGEST_NAME = 63
"""Bytes (PostgreSQL documentation, "Identifiers and Key Words")."""


def primary_key_name(constraint: sa.PrimaryKeyConstraint, table: sa.Table) -> str:
    return _fitted(table.name, "", "pkey")


def unique_name(constraint: sa.UniqueConstraint, table: sa.Table) -> str:
    names = [column.name for column in constraint.columns] + _included(constraint)
    return _free(constraint, table, _distinct(names), "key")


def foreign_key_name(constraint: sa.ForeignKeyConstraint, table: sa.Table) -> str:
    return _free(constraint, table, [element.parent.name for element in constraint.elements], "fkey")


def exclude_name(constraint: pg.ExcludeConstraint, table: sa.Table) -> str:
    names = [_name_of(expression)[0] or "expr" for expression, *_ in private.exclusions_of(constraint)]
    return _free(constraint, table, _distinct(names), "excl")


def index_name(index: sa.Index, table: sa.Table) -> str:
    """`users_lower_idx` for `lower(email)`, `users_expr_idx` for what has no name of its own."""
    names = [_name_of(expression)[0] or "expr" for expression in index.expressions] + _included(index)
    return _free(index, table, _distinct(names), "idx")


# -- putting names together -------------------------------------------------------------------------------------------


def _free(item: Any, table: sa.Table, names: Sequence[str], label: str) -> str:
    """The first name with `label`, `label1` and so on that nothing else of the table has."""
    others: list[Any] = [*table.constraints, *table.indexes]
    taken = {each.name for each in others if each is not item}
    number = 0
    while True:
        found = _fitted(table.name, "_".join(names), f"{label}{number or ''}")
        if found not in taken:
            return found
        number += 1


def _fitted(table: str, names: str, label: str) -> str:
    """The three with underscores between; of the first two the longer one is cut until it fits."""
    first, second = table.encode(), names.encode()[:LONGEST_NAME]
    room = LONGEST_NAME - len(label) - 1 - (1 if second else 0)
    ends = [len(first), len(second)]
    while sum(ends) > room:
        ends[0 if ends[0] > ends[1] else 1] -= 1
    parts = [first[: ends[0]], second[: ends[1]], label.encode()]
    return "_".join(part.decode(errors="ignore") for part in parts if part)


def _distinct(names: Iterable[str]) -> list[str]:
    """Each once: the second `lower` is `lower1`."""
    found: list[str] = []
    for name in names:
        given, number = name, 0
        while name in found:
            number += 1
            end = str(number)
            name = given.encode()[: LONGEST_NAME - len(end)].decode(errors="ignore") + end
        found.append(name)
    return found


def _included(item: Any) -> list[str]:
    """The columns that are only stored in the index."""
    if "postgresql" not in item.dialect_options:
        return []
    return [getattr(each, "name", each) for each in item.dialect_options["postgresql"].get("include") or ()]


# -- the name of an expression ----------------------------------------------------------------------------------------

_Name = tuple[str | None, int]  # and how sure PostgreSQL is of it: 2, 1, or 0 for none
_NONE: _Name = (None, 0)
_DIALECT: sa.Dialect = pg.dialect()  # type: ignore[no-untyped-call]

# What the grammar makes of standard functions that are written like any other.
_FUNCTIONS = {"trim": "btrim"}
_TYPES = {
    "integer": "int4", "int": "int4", "bigint": "int8", "smallint": "int2", "real": "float4", "boolean": "bool",
    "double precision": "float8", "float": "float8", "decimal": "numeric", "dec": "numeric", "character": "bpchar",
    "char": "bpchar", "character varying": "varchar", "nvarchar": "varchar",
    "timestamp with time zone": "timestamptz", "timestamp without time zone": "timestamp",
    "time with time zone": "timetz", "time without time zone": "time", "bit varying": "varbit",
}  # fmt: skip


def _name_of(element: Any) -> _Name:
    if isinstance(element, sa.TextClause):
        return _name_of_text(element.text)
    if isinstance(element, sa.ColumnClause):
        return _name_of_text(element.name) if element.is_literal else (element.name, 2)
    if isinstance(element, elements.UnaryExpression):
        ordering = element.modifier in (
            operators.desc_op, operators.asc_op, operators.nulls_first_op, operators.nulls_last_op,
        )  # fmt: skip
        return _name_of(element.element) if ordering else _NONE
    if isinstance(element, (elements.Grouping, elements.Label, sa.TypeCoerce)):
        return _name_of(element.clause if isinstance(element, sa.TypeCoerce) else element.element)
    if isinstance(element, (sa.Cast, sa.TryCast)):
        return _cast(element.clause, str(element.type.compile(_DIALECT)))
    if isinstance(element, sa.Extract):
        return "extract", 2
    if isinstance(element, sa.Case):
        last = _name_of(element.else_) if element.else_ is not None else _NONE
        return last if last[1] > 1 else ("case", 1)
    if isinstance(element, functions.FunctionElement):
        return _function(getattr(element, "name", None))
    if isinstance(element, pg.array):
        return "array", 2
    if isinstance(element, sa.Tuple):
        return "row", 2
    if isinstance(element, elements.BinaryExpression):
        return _binary(element)
    return _NONE


def _function(name: Any) -> _Name:
    if name is None:
        return _NONE
    folded = str(name) if getattr(name, "quote", None) else str(name).lower()
    return _FUNCTIONS.get(folded, folded), 2


def _cast(inner: Any, type_: str) -> _Name:
    found = _name_of(inner) if not isinstance(inner, str) else _name_of_text(inner)
    if found[1] > 1:
        return found
    bare = re.sub(r"\s*\([^)]*\)|\[\]", "", type_).strip()
    folded = bare.lower() if '"' not in bare else bare.replace('"', "")
    return _TYPES.get(folded, folded.rpartition(".")[2]), 1


def _binary(element: elements.BinaryExpression[Any]) -> _Name:
    operator: Any = element.operator
    if operator is operators.collate:
        return _name_of(element.left)
    if operator is operators.getitem and isinstance(element.left.type, sa.ARRAY):
        return _name_of(element.left)  # a subscript
    if str(getattr(operator, "opstring", "")).upper() == "AT TIME ZONE":
        return "timezone", 2
    return _NONE


_IDENTIFIER = r'(?:[A-Za-z_][\w$]*|"(?:[^"]|"")+")'
_ENDING = re.compile(
    rf"\s+(?:(?:ASC|DESC|NULLS\s+(?:FIRST|LAST))|COLLATE\s+(?:{_IDENTIFIER}\.)*{_IDENTIFIER}|\w+_ops)\s*$",
    re.IGNORECASE,
)
_COLUMN = re.compile(rf"(?:{_IDENTIFIER}\.)*({_IDENTIFIER})$")
_CALL = re.compile(rf"(?:{_IDENTIFIER}\s*\.\s*)*({_IDENTIFIER})\s*\(")
_CAST = re.compile(r"(.+)::\s*([\w\s.\"]+(?:\([\d\s,]*\))?(?:\[\])?)$", re.DOTALL)
_CASE = re.compile(r"(?:\bELSE\s+((?:(?!\b(?:ELSE|WHEN)\b).)+?))?\s+END$", re.I | re.S)


def _name_of_text(text: str) -> _Name:
    """Of SQL: a column, a call, or a cast of either; whatever else is an expression."""
    text = text.strip()
    while (shorter := _ENDING.sub("", text)) != text:
        text = shorter
    if text.startswith("(") and _end_of_brackets(text, 0) == len(text):
        return _name_of_text(text[1:-1])
    if found := _COLUMN.match(text):
        return _unquoted(found[1]), 2
    if (found := _CALL.match(text)) and _end_of_brackets(text, found.end() - 1) == len(text):
        name = _unquoted(found[1])
        if name == "cast" and (inner := re.match(r"(.+)\s+AS\s+(.+)$", text[found.end() : -1], re.I | re.S)):
            return _cast(inner[1], inner[2])
        return _FUNCTIONS.get(name, name), 2
    if found := _CAST.match(text):
        return _cast(found[1], found[2])
    if text[:4].lower() == "case" and (found := _CASE.search(text)):
        last = _name_of_text(found[1]) if found[1] else _NONE
        return last if last[1] > 1 else ("case", 1)
    return ("array", 2) if re.match(r"array\s*\[", text, re.I) else _NONE


def _unquoted(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name.lower()


def _end_of_brackets(text: str, start: int) -> int:
    """Behind the bracket that closes the one at `start`; brackets in quotes do not count."""
    depth, quote = 0, ""
    for position in range(start, len(text)):
        character = text[position]
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "(":
            depth += 1
        elif character == ")":
            depth -= 1
            if not depth:
                return position + 1
    return -1

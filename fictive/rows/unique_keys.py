"""Which unique key of a table serves: for a lookup, for the key of an upsert, for a link. Pure; nothing is sent."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import AsBoolean, BooleanClauseList, Label, TextClause, UnaryExpression

from ..drivers import sqlstate

__all__ = ["UniqueKey", "key_for", "key_over", "keys_within", "refused_conflict", "unique_keys"]

_NO_SUCH_KEY = "42P10"
_NO_CONFLICTS = (("0A000", "RewriteQuery"), ("55000", "ExecCheckIndexConstraints"))
"""A table with rules; a deferrable key. Both are SQLSTATEs of much else, so by the server's function as well."""

Values = Mapping[Any, Any]
"""What a lookup says of columns."""
Expressions = Sequence[tuple[Any, Any]]
"""What it says of SQL expressions."""


@dataclasses.dataclass(frozen=True)
class UniqueKey:
    """What the database holds unique: columns and expressions, in the rows where a condition is true."""

    elements: tuple[Any, ...]
    where: Any = None
    nulls_distinct: bool = True

    @property
    def target(self) -> dict[str, Any]:
        """The arguments of ON CONFLICT, which takes an expression in parentheses. PostgreSQL would not recognise the
        index by a parameter, so values are in the text."""
        elements = [
            element if isinstance(element, sa.Column) else sa.sql.elements.Grouping(_literals(element))
            for element in self.elements
        ]
        return {"index_elements": elements, "index_where": self.condition}

    @property
    def condition(self) -> Any:
        """The condition of a partial index, values in its text."""
        return None if self.where is None else _literals(self.where)

    @property
    def columns(self) -> frozenset[Any]:
        """All columns it looks at, those of its condition included."""
        parts = [*self.elements, *([] if self.where is None else [self.where])]
        return frozenset(column for part in parts for column in _columns_in(part))

    def __str__(self) -> str:
        return f"({', '.join(each.name if isinstance(each, sa.Column) else _sql(each) for each in self.elements)})"


def unique_keys(table: sa.Table, dialect_name: str) -> Iterator[UniqueKey]:
    """The keys of `table` that ON CONFLICT can name: primary key, unique constraints, unique indexes.

    Deferrable ones cannot be (PostgreSQL documentation, "INSERT: ON CONFLICT"); what an index given as text is made
    of is not known here.
    """
    for constraint in sorted(table.constraints, key=lambda each: str(each.name)):
        if not isinstance(constraint, (sa.PrimaryKeyConstraint, sa.UniqueConstraint)):
            continue
        if len(constraint.columns) and not (constraint.deferrable or constraint.initially):
            yield UniqueKey(tuple(constraint.columns), None, _nulls_distinct(constraint, dialect_name))
    for index in sorted(table.indexes, key=lambda each: str(each.name)):
        if not index.unique:
            continue
        elements = tuple(map(_bare, index.expressions))
        if all(_is_known(element) for element in elements):
            where = index.dialect_options[dialect_name].get("where")
            yield UniqueKey(elements, where, _nulls_distinct(index, dialect_name))


def key_over(table: sa.Table, columns: Collection[sa.Column[Any]], dialect_name: str) -> UniqueKey | None:
    """The key over these columns alone: one for all rows if there is one, else the only partial one."""
    found = [key for key in unique_keys(table, dialect_name) if set(key.elements) == set(columns)]
    whole = [key for key in found if key.where is None]
    return whole[0] if whole else found[0] if len(found) == 1 else None


def refused_conflict(error: sa.exc.DBAPIError, what: str, table: Any, key: UniqueKey) -> str | None:
    """In our words that PostgreSQL takes no ON CONFLICT of this key; None where it says something else."""
    state, told = sqlstate(error), getattr(error.orig, "diag", None)
    if state != _NO_SUCH_KEY and (state, getattr(told, "source_function", None)) not in _NO_CONFLICTS:
        return None
    return f"{what}: PostgreSQL takes no ON CONFLICT {key} on {table}: {str(error.orig).splitlines()[0]}."


def keys_within(
    tables: Collection[Any], values: Values, expressions: Expressions, dialect_name: str
) -> list[UniqueKey]:
    """The unique keys whose columns are all in a lookup, the one that uses the most of it first.

    None of their parts is NULL, as NULLs are distinct unless the key says otherwise. No other value matters.
    """
    fitting = [
        key
        for table in tables
        if isinstance(table, sa.Table)
        for key in unique_keys(table, dialect_name)
        if all(_fits(element, values, expressions, key.nulls_distinct) for element in key.elements)
    ]
    return sorted(fitting, key=lambda key: len(key.columns), reverse=True)


def key_for(keys: Iterable[UniqueKey], values: Values) -> UniqueKey | None:
    """The first of these that two rows of a lookup would both have, so that there can be no two; None without one. A
    partial index serves where the lookup implies its condition."""
    return next((key for key in keys if key.where is None or _implies(values, key.where)), None)


def _nulls_distinct(item: Any, dialect_name: str) -> bool:
    return dialect_name != "postgresql" or not item.dialect_options["postgresql"].get("nulls_not_distinct")


def _bare(element: Any) -> Any:
    """An element of an index without its name and its order."""
    while isinstance(element, Label) or (isinstance(element, UnaryExpression) and element.modifier is not None):
        element = element.element
    return element


def _is_known(element: Any) -> bool:
    return not any(
        isinstance(part, TextClause) or getattr(part, "is_literal", False) for part in visitors.iterate(element)
    )


def _columns_in(element: Any) -> Iterator[sa.Column[Any]]:
    return (part for part in visitors.iterate(element) if isinstance(part, sa.Column))


def _literals(element: sa.ColumnElement[Any]) -> Any:
    """`element` with its values in the text of the statement."""

    def replace(part: Any, **_: Any) -> Any:
        if not isinstance(part, sa.BindParameter):
            return None
        try:
            return sa.literal_column(_sql(part).replace("%%", "%"), part.type)
        except sa.exc.CompileError:  # which a statement with many rows cannot have
            return sa.bindparam(None, part.effective_value, part.type, literal_execute=True)

    replaced: Any = visitors.replacement_traverse(element, {}, replace)  # type: ignore[call-overload]
    return replaced


def _fits(element: Any, values: Values, expressions: Expressions, nulls_distinct: bool) -> bool:
    if isinstance(element, sa.Column):
        return element in values and (values[element] is not None or not nulls_distinct)
    for expression, value in expressions:
        if _sql(expression) == _sql(element):
            return value is not None or not nulls_distinct
    known = all(column in values for column in _columns_in(element))
    return known and (not nulls_distinct or _is_never_null(element, values))


def _sql(element: Any) -> str:
    """The text of an expression, values included: `compare()` minds the ORM's annotations in some versions."""
    return str(element.compile(dialect=_DIALECT, compile_kwargs={"literal_binds": True}))


_DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]
_STRICT = frozenset({"lower", "upper", "trim", "btrim", "ltrim", "rtrim", "md5", "abs", "length", "reverse"})


def _is_never_null(element: Any, values: Values) -> bool:
    """Whether an expression of the lookup's columns is known to have a value, from functions that are known."""
    if isinstance(element, sa.Column):
        return values.get(element) is not None
    if isinstance(element, sa.BindParameter):
        return element.effective_value is not None
    if isinstance(element, sa.Cast):
        return _is_never_null(element.clause, values)
    if isinstance(element, sa.sql.functions.FunctionElement):
        name = str(getattr(element, "name", "")).lower()
        arguments = list(element.clauses)
        if name == "coalesce":
            return any(_is_never_null(argument, values) for argument in arguments)
        return name in _STRICT and all(_is_never_null(argument, values) for argument in arguments)
    return False


# -- conditions of partial indexes ------------------------------------------------------------------------------------

_NULL_TEST = re.compile(r'\(*\s*"?(\w+)"?\s+is\s+(not\s+)?null\s*\)*', re.IGNORECASE)
_FLAG = re.compile(r'\(*\s*(not\s+)?"?(\w+)"?(?:\s+(?:is|=)\s+(true|false))?\s*\)*', re.IGNORECASE)
_ORDERED = (int, float, decimal.Decimal, datetime.date, datetime.timedelta)
_COMPARISONS = (operators.eq, operators.ne, operators.lt, operators.le, operators.gt, operators.ge)  # Python's own


def _implies(values: Values, condition: Any) -> bool:
    """Whether every row of the lookup satisfies the condition; False where that cannot be seen."""
    if isinstance(condition, TextClause):
        return all(_implies_text(values, part) for part in re.split(r"\s+and\s+", condition.text, flags=re.IGNORECASE))
    if isinstance(condition, BooleanClauseList):
        each = (_implies(values, clause) for clause in condition.clauses)
        return all(each) if condition.operator is operators.and_ else any(each)
    if isinstance(condition, sa.sql.elements.Grouping):
        return _implies(values, condition.element)
    if isinstance(condition, sa.Column):
        return values.get(condition) is True
    if isinstance(condition, AsBoolean):
        return values.get(condition.element) is (condition.operator is operators.is_true)
    if isinstance(condition, UnaryExpression) and condition.operator is operators.inv:
        return values.get(condition.element) is False
    if isinstance(condition, sa.BinaryExpression) and condition.left in values:
        return _implies_comparison(values[condition.left], condition.operator, condition.right)
    return False


def _implies_comparison(value: Any, compare: Any, right: Any) -> bool:
    if isinstance(right, sa.sql.elements.Null):
        return (value is None) is (compare is operators.is_)
    if isinstance(right, (sa.sql.elements.True_, sa.sql.elements.False_)):
        return compare in (operators.is_, operators.eq) and value is isinstance(right, sa.sql.elements.True_)
    if not isinstance(right, sa.BindParameter) or value is None or isinstance(value, sa.ClauseElement):
        return False
    other: Any = right.effective_value
    if compare is operators.in_op:
        return value in other
    if compare not in _COMPARISONS:
        return False
    if compare is not operators.eq and not (isinstance(value, _ORDERED) and isinstance(other, _ORDERED)):
        return False  # of text the database may think otherwise
    try:
        return bool(compare(value, other))
    except TypeError:
        return False


def _implies_text(values: Values, condition: str) -> bool:
    named = {column.name: value for column, value in values.items()}
    if match := _NULL_TEST.fullmatch(condition.strip()):
        return match[1] in named and (named[match[1]] is None) is (match[2] is None)
    if match := _FLAG.fullmatch(condition.strip()):
        wanted = ((match[3] or "true").lower() == "true") is (match[1] is None)
        return named.get(match[2]) is wanted
    return False

"""Which row a lookup means, and which unique key keeps there from being two of it. Pure functions; nothing is sent."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.dialects import postgresql
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import AsBoolean, BooleanClauseList, Label, TextClause, UnaryExpression

from .columns import (
    LIVE_ROWS,
    composite_values,
    foreign_key_of,
    hybrid,
    live_attribute,
    mapped_property,
    table_columns,
    unknown_attribute,
)

__all__ = ["Lookup", "UniqueKey", "key_for", "lookup_of", "unique_keys"]


@dataclasses.dataclass(frozen=True)
class Lookup:
    """What `filter_by` says: as conditions, as values of columns, and as what a new object is made of."""

    mapper: sa_orm.Mapper[Any]
    criteria: tuple[sa.ColumnElement[bool], ...]
    columns: Mapping[sa.Column[Any], Any]
    """Every column that the lookup fixes, foreign keys and the parts of composites included."""
    expressions: tuple[tuple[Any, Any], ...]
    """What hybrids compare that is not a column, with the value."""
    assigned: Mapping[str, Any]
    """Attributes to set on a new object."""
    related: Mapping[str, Any]
    """Many-to-one relationships, with the related object or None."""
    live: str | None = None
    """The attribute that has to be NULL besides, in a model whose rows can be deleted and still be there. The last of
    the criteria says so."""

    def select(self) -> sa.Select[Any]:
        """The statement that finds the row; of two rows it shows that there are several."""
        live_rows = getattr(self.mapper.class_, LIVE_ROWS, None) if self.live else None
        if live_rows is None:
            return sa.select(self.mapper.class_).where(*self.criteria).limit(2)
        # a session that hides deleted rows does not add it once more
        return sa.select(self.mapper.class_).where(*self.criteria[:-1]).limit(2).options(live_rows)


def lookup_of(mapper: sa_orm.Mapper[Any], filter_by: Mapping[str, Any]) -> Lookup:
    """The lookup for attribute names and values; raises for what cannot be looked up, before any SQL."""
    where = "the lookup"
    model = mapper.class_
    criteria: list[Any] = []
    columns: dict[sa.Column[Any], Any] = {}
    expressions: list[tuple[Any, Any]] = []
    assigned: dict[str, Any] = {}
    related: dict[str, Any] = {}
    live = live_attribute(mapper)
    if live is not None and filter_by.get(live) is not None:
        raise ValueError(
            f"{model.__name__}.{live} in {where} asks for a deleted row; only live ones are found and made here. "
            "SELECT it by with_deleted(...)."
        )
    filter_by = {name: value for name, value in filter_by.items() if name != live}
    if not filter_by:
        raise TypeError(f"{model.__name__}: a lookup needs at least one attribute, such as name='x'.")
    for name, value in filter_by.items():
        prop = mapped_property(mapper, name)
        if isinstance(prop, sa_orm.RelationshipProperty) and prop.direction is sa_orm.RelationshipDirection.MANYTOONE:
            columns |= foreign_key_of(prop, value, where)
            related[prop.key] = value
            criteria.append(getattr(model, name) == value)
        elif isinstance(prop, sa_orm.CompositeProperty):
            for part, part_value in composite_values(prop, value):
                columns |= dict.fromkeys(table_columns(part), part_value)
                criteria.append(_equals(getattr(model, part.key), part_value))
            assigned[name] = value
        elif found := table_columns(prop):
            columns |= dict.fromkeys(found, value)
            criteria.append(_equals(getattr(model, name), value))
            if found[0].computed is None:
                assigned[name] = value
        elif (description := hybrid(mapper, name)) is not None:
            expression = getattr(model, name)
            criteria.append(expression == value)
            if description.fset is not None:
                assigned[name] = value
            element = expression.__clause_element__() if hasattr(expression, "__clause_element__") else expression
            if (column := _own_column(mapper, element)) is not None:
                columns[column] = value
            else:
                expressions.append((element, value))
        else:
            raise unknown_attribute(mapper, name, where)
    if live is not None:
        columns |= dict.fromkeys(table_columns(mapped_property(mapper, live)))
        criteria.append(getattr(model, live).is_(None))
    return Lookup(mapper, tuple(criteria), columns, tuple(expressions), assigned, related, live)


def _equals(attribute: Any, value: Any) -> Any:
    return attribute.is_(None) if value is None else attribute == value


def _own_column(mapper: sa_orm.Mapper[Any], element: Any) -> sa.Column[Any] | None:
    """The column of the model's tables that `element` is, through the ORM's annotations."""
    if not isinstance(element, sa.Column):
        return None
    for table in mapper.tables:
        for column in table.columns if isinstance(table, sa.Table) else ():
            if isinstance(column, sa.Column) and column.shares_lineage(element):
                return column
    return None


# -- unique keys ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class UniqueKey:
    """What the database holds unique: columns and expressions, in the rows where a condition is true."""

    elements: tuple[Any, ...]
    where: Any = None
    nulls_distinct: bool = True

    @property
    def target(self) -> list[Any]:
        """For `index_elements` of ON CONFLICT, which takes an expression in parentheses."""
        return [
            element if isinstance(element, sa.Column) else sa.sql.elements.Grouping(_literals(element))
            for element in self.elements
        ]

    @property
    def target_where(self) -> Any:
        """For `index_where`. PostgreSQL would not recognise the index by a parameter, so values are in the text."""
        return None if self.where is None else _literals(self.where)

    @property
    def columns(self) -> frozenset[Any]:
        """All columns it looks at, those of its condition included."""
        parts = [*self.elements, *([] if self.where is None else [self.where])]
        return frozenset(column for part in parts for column in _columns_in(part))


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
        if isinstance(part, sa.BindParameter):
            return sa.bindparam(None, part.effective_value, part.type, literal_execute=True)
        return None

    replaced: Any = visitors.replacement_traverse(element, {}, replace)  # type: ignore[call-overload]
    return replaced


def key_for(lookup: Lookup, dialect_name: str) -> UniqueKey | None:
    """The unique key that two rows of this lookup would both have, so that there can be no two; None without one.

    Its columns are all in the lookup, and none of its parts is NULL, as NULLs are distinct unless the key says
    otherwise. A partial index serves where the lookup implies its condition. Of several, the one that uses the most
    of the lookup.
    """
    fitting = [
        key
        for table in lookup.mapper.tables
        if isinstance(table, sa.Table)
        for key in unique_keys(table, dialect_name)
        if all(_fits(element, lookup, key.nulls_distinct) for element in key.elements)
        and (key.where is None or _implies(lookup, key.where))
    ]
    return max(fitting, key=lambda key: len(key.columns), default=None)


def _fits(element: Any, lookup: Lookup, nulls_distinct: bool) -> bool:
    if isinstance(element, sa.Column):
        return element in lookup.columns and (lookup.columns[element] is not None or not nulls_distinct)
    for expression, value in lookup.expressions:
        if _sql(expression) == _sql(element):
            return value is not None or not nulls_distinct
    if not all(column in lookup.columns for column in _columns_in(element)):
        return False
    return not nulls_distinct or _is_never_null(element, lookup)


def _sql(element: Any) -> str:
    """The text of an expression, values included: `compare()` minds the ORM's annotations in some versions."""
    return str(element.compile(dialect=_DIALECT, compile_kwargs={"literal_binds": True}))


_DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]
_STRICT = frozenset({"lower", "upper", "trim", "btrim", "ltrim", "rtrim", "md5", "abs", "length", "reverse"})


def _is_never_null(element: Any, lookup: Lookup) -> bool:
    """Whether an expression of the lookup's columns is known to have a value, from functions that are known."""
    if isinstance(element, sa.Column):
        return lookup.columns.get(element) is not None
    if isinstance(element, sa.BindParameter):
        return element.effective_value is not None
    if isinstance(element, sa.Cast):
        return _is_never_null(element.clause, lookup)
    if isinstance(element, sa.sql.functions.FunctionElement):
        name = str(getattr(element, "name", "")).lower()
        arguments = list(element.clauses)
        if name == "coalesce":
            return any(_is_never_null(argument, lookup) for argument in arguments)
        return name in _STRICT and all(_is_never_null(argument, lookup) for argument in arguments)
    return False


# -- conditions of partial indexes ------------------------------------------------------------------------------------

_NULL_TEST = re.compile(r'\(*\s*"?(\w+)"?\s+is\s+(not\s+)?null\s*\)*', re.IGNORECASE)
_FLAG = re.compile(r'\(*\s*(not\s+)?"?(\w+)"?(?:\s+(?:is|=)\s+(true|false))?\s*\)*', re.IGNORECASE)
_ORDERED = (int, float, decimal.Decimal, datetime.date, datetime.timedelta)
_COMPARISONS: dict[Any, Callable[[Any, Any], bool]] = {
    operators.eq: operator.eq,
    operators.ne: operator.ne,
    operators.lt: operator.lt,
    operators.le: operator.le,
    operators.gt: operator.gt,
    operators.ge: operator.ge,
}


def _implies(lookup: Lookup, condition: Any) -> bool:
    """Whether every row of the lookup satisfies the condition; False where that cannot be seen."""
    columns: Mapping[Any, Any] = lookup.columns
    if isinstance(condition, TextClause):
        return all(_implies_text(lookup, part) for part in re.split(r"\s+and\s+", condition.text, flags=re.IGNORECASE))
    if isinstance(condition, BooleanClauseList):
        each = (_implies(lookup, clause) for clause in condition.clauses)
        return all(each) if condition.operator is operators.and_ else any(each)
    if isinstance(condition, sa.sql.elements.Grouping):
        return _implies(lookup, condition.element)
    if isinstance(condition, sa.Column):
        return columns.get(condition) is True
    if isinstance(condition, AsBoolean):
        return columns.get(condition.element) is (condition.operator is operators.is_true)
    if isinstance(condition, UnaryExpression) and condition.operator is operators.inv:
        return columns.get(condition.element) is False
    if isinstance(condition, sa.BinaryExpression) and condition.left in columns:
        return _implies_comparison(columns[condition.left], condition.operator, condition.right)
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
        return bool(_COMPARISONS[compare](value, other))
    except TypeError:
        return False


def _implies_text(lookup: Lookup, condition: str) -> bool:
    values = {column.name: value for column, value in lookup.columns.items()}
    if match := _NULL_TEST.fullmatch(condition.strip()):
        return match[1] in values and (values[match[1]] is None) is (match[2] is None)
    if match := _FLAG.fullmatch(condition.strip()):
        wanted = ((match[3] or "true").lower() == "true") is (match[1] is None)
        return values.get(match[2]) is wanted
    return False

"""Which row a lookup means. Pure functions; nothing is sent."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..session.reading import LIVE_ROWS
from .attributes import (
    composite_values,
    foreign_key_of,
    hybrid,
    live_attribute,
    mapped_property,
    table_columns,
    unknown_attribute,
)
from .stored_values import as_stored, cut_to_length, is_sql, none_is_a_value
from .unique_keys import UniqueKey, key_for, keys_within

__all__ = ["Lookup", "LookupPlan", "lookup_of", "plan_of"]


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

    def key(self, dialect_name: str) -> UniqueKey | None:
        """The unique key that it goes by; None where there is none over it."""
        keys = keys_within(self.mapper.tables, self.columns, self.expressions, dialect_name)
        return key_for(keys, self.columns)

    @property
    def nulls(self) -> list[sa.Column[Any]]:
        """The columns that it asks NULL of."""
        return [column for column, value in self.columns.items() if value is None]

    def select(self) -> sa.Select[Any]:
        """The statement that finds the row; of two rows it shows that there are several."""
        live_rows = getattr(self.mapper.class_, LIVE_ROWS, None) if self.live else None
        if live_rows is None:
            return sa.select(self.mapper.class_).where(*self.criteria).limit(2)
        # a session that hides deleted rows does not add it once more
        return sa.select(self.mapper.class_).where(*self.criteria[:-1]).limit(2).options(live_rows)


@dataclasses.dataclass(frozen=True)
class LookupPlan:
    """What lookups by the same columns and classes of values have in common, made once: building their statements
    would take as long as running them."""

    statement: sa.Select[Any]
    columns: tuple[tuple[sa.Column[Any], ...], ...]
    """The columns of each attribute: several where joined inheritance repeats a key."""
    nulls: tuple[sa.Column[Any], ...]
    dialect: sa.Dialect
    keys: tuple[UniqueKey, ...]
    inserts: dict[tuple[Any, ...], tuple[sa.Executable, list[str]]] = dataclasses.field(default_factory=dict)
    """By key and columns, the statement that makes the row unless another one has the key, and its parameters."""

    def parameters(self, filter_by: Mapping[str, Any]) -> dict[str, Any]:
        values = zip(self.columns, filter_by.values(), strict=True)
        return {f"fictive_{n}": cut_to_length(v, c[0].type, self.dialect) for n, (c, v) in enumerate(values)}

    def key(self, filter_by: Mapping[str, Any]) -> UniqueKey | None:
        """As a lookup's."""
        values: dict[sa.Column[Any], Any] = dict.fromkeys(self.nulls)
        for columns, value in zip(self.columns, filter_by.values(), strict=True):
            values |= dict.fromkeys(columns, value)
        return key_for(self.keys, values)

    def assigned(self, filter_by: Mapping[str, Any]) -> dict[str, Any]:
        """Attributes to set on a new object."""
        given = zip(self.columns, filter_by.items(), strict=True)
        return {name: value for columns, (name, value) in given if columns[0].computed is None}


_plans: weakref.WeakKeyDictionary[sa_orm.Mapper[Any], dict[Any, LookupPlan | None]] = weakref.WeakKeyDictionary()
_MOST_PLANS = 500  # of a model; classes of values without end would be a mistake


def plan_of(mapper: sa_orm.Mapper[Any], filter_by: Mapping[str, Any], dialect: sa.Dialect) -> LookupPlan | None:
    """The plan of a lookup by columns; None where one of the values is NULL, an SQL expression or of no column."""
    known = _plans.setdefault(mapper, {})
    key = (dialect.name, dialect.driver, *((name, type(value)) for name, value in filter_by.items()))
    if key not in known:
        if len(known) >= _MOST_PLANS:
            known.clear()
        known[key] = _plan(mapper, filter_by, dialect)
    return known[key]


def _plan(mapper: sa_orm.Mapper[Any], filter_by: Mapping[str, Any], dialect: sa.Dialect) -> LookupPlan | None:
    live = live_attribute(mapper)
    criteria: list[Any] = []
    columns: list[tuple[sa.Column[Any], ...]] = []
    for number, (name, value) in enumerate(filter_by.items()):
        found = table_columns(mapped_property(mapper, name))
        if not found or value is None or is_sql(value) or name == live:
            return None
        type_ = found[0].type
        parameter = sa.bindparam(f"fictive_{number}", type_=type_)
        criteria.append(getattr(mapper.class_, name) == as_stored(parameter, type_, dialect, type(value)))
        columns.append(found)
    if not columns:
        return None
    nulls: tuple[sa.Column[Any], ...] = ()
    if live is not None:
        criteria.append(getattr(mapper.class_, live).is_(None))
        nulls = table_columns(mapped_property(mapper, live))
    fixed: dict[sa.Column[Any], Any] = {column: True for each in columns for column in each} | dict.fromkeys(nulls)
    keys = keys_within(mapper.tables, fixed, (), dialect.name)
    select = Lookup(mapper, tuple(criteria), {}, (), {}, {}, live).select()
    return LookupPlan(select, tuple(columns), nulls, dialect, tuple(keys))


def lookup_of(mapper: sa_orm.Mapper[Any], filter_by: Mapping[str, Any], dialect: sa.Dialect) -> Lookup:
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
                criteria.append(_equals(getattr(model, part.key), part_value, dialect))
            assigned[name] = value
        elif found := table_columns(prop):
            value = _null_as_none(value, found[0].type, dialect)
            columns |= dict.fromkeys(found, value)
            criteria.append(_equals(getattr(model, name), value, dialect))
            if found[0].computed is None:
                assigned[name] = value
        elif (description := hybrid(mapper, name)) is not None:
            expression = getattr(model, name)
            if description.fset is not None:
                assigned[name] = value
            element = expression.__clause_element__() if hasattr(expression, "__clause_element__") else expression
            if (column := _own_column(mapper, element)) is not None:
                columns[column] = value
                criteria.append(_equals(expression, value, dialect))
            else:
                criteria.append(expression == value)
                expressions.append((element, value))
        else:
            raise unknown_attribute(mapper, name, where)
    if live is not None:
        columns |= dict.fromkeys(table_columns(mapped_property(mapper, live)))
        criteria.append(getattr(model, live).is_(None))
    return Lookup(mapper, tuple(criteria), columns, tuple(expressions), assigned, related, live)


def _equals(attribute: Any, value: Any, dialect: sa.Dialect) -> Any:
    """That the column has the value as it would be stored there; NULL for None, unless the type makes another value
    of None."""
    if isinstance(value, sa.sql.elements.Null) or (value is None and not none_is_a_value(attribute.type, dialect)):
        return attribute.is_(None)
    return attribute == as_stored(value, attribute.type, dialect)


def _null_as_none(value: Any, type_: sa.types.TypeEngine[Any], dialect: sa.Dialect) -> Any:
    """`sa.null()` is None, where that is NULL."""
    return None if isinstance(value, sa.sql.elements.Null) and not none_is_a_value(type_, dialect) else value


def _own_column(mapper: sa_orm.Mapper[Any], element: Any) -> sa.Column[Any] | None:
    """The column of the model's tables that `element` is, through the ORM's annotations."""
    if not isinstance(element, sa.Column):
        return None
    for table in mapper.tables:
        for column in table.columns if isinstance(table, sa.Table) else ():
            if isinstance(column, sa.Column) and column.shares_lineage(element):
                return column
    return None

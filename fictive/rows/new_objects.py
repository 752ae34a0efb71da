"""What a new row is made of: the object that the model's constructor makes, and its columns. Nothing is sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..errors import UnknownAttribute
from .attributes import foreign_key_of, hybrid, live_attribute, mapped_property, table_columns, unknown_attribute
from .column_defaults import InsertDefaults, first_version
from .stored_values import none_is_a_value, stores_none

__all__ = [
    "Defaults",
    "check_names",
    "columns_of",
    "evaluated",
    "lacks",
    "new_object",
    "set_columns",
    "split",
    "written_columns",
]

Defaults = Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None


def check_names(mapper: sa_orm.Mapper[Any], given: Mapping[str, Any], where: str, taken: Collection[str]) -> None:
    """Raise for names that cannot be stored, names the lookup has already, and related objects without a row."""
    model, live = mapper.class_.__name__, live_attribute(mapper)
    for name, value in given.items():
        prop = mapped_property(mapper, name)
        if isinstance(prop, sa_orm.RelationshipProperty):
            if prop.direction is not sa_orm.RelationshipDirection.MANYTOONE:
                raise UnknownAttribute(
                    f"{model}.{name} in {where} is a collection, which is not stored in the row. Set it on the object."
                )
            if not callable(value):
                foreign_key_of(prop, value, where)
        elif columns := table_columns(prop):
            if columns[0].computed is not None:
                raise UnknownAttribute(f"{model}.{name} in {where} is a generated column; the database computes it.")
        elif not isinstance(prop, sa_orm.CompositeProperty) and getattr(hybrid(mapper, name), "fset", None) is None:
            raise unknown_attribute(mapper, name, where)
        if name == live:
            raise UnknownAttribute(
                f"{model}.{name} cannot be in {where}: only rows that are not deleted are found and made here. "
                "Call soft_delete() on the object."
            )
        if name in taken:
            raise UnknownAttribute(f"{model}.{name} is in the lookup, so it cannot be in {where} as well.")


def evaluated(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with those that are callables called."""
    return {name: value() if callable(value) else value for name, value in given.items()}


def split(mapper: sa_orm.Mapper[Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attributes to set, foreign keys of related objects among them, and the related objects by relationship."""
    assigned, related = {}, {}
    for name, value in given.items():
        prop = mapped_property(mapper, name)
        if isinstance(prop, sa_orm.RelationshipProperty):
            related[prop.key] = value
            for column, key in foreign_key_of(prop, value, "the values").items():
                assigned[mapper.get_property_by_column(column).key] = key
        else:
            assigned[name] = value
    return assigned, related


def new_object(mapper: sa_orm.Mapper[Any], assigned: Mapping[str, Any], related: Mapping[str, Any]) -> Any:
    """A new object from the model's constructor, in no session. Related objects know nothing of it."""
    if not dataclasses.is_dataclass(mapper.class_):
        return mapper.class_(**assigned)
    fields = {field.name: field for field in dataclasses.fields(mapper.class_)}
    arguments = {name: value for name, value in assigned.items() if name in fields and fields[name].init}
    passed = [name for name in related if name in fields and fields[name].init]
    created = mapper.class_(**arguments, **{name: related[name] for name in passed})
    for name in passed:
        setattr(created, name, None)  # takes it out of the collection on the other side
        sa_orm.attributes.set_committed_value(created, name, None)
        sa.inspect(created).dict.pop(name, None)
    for name, value in assigned.items():
        if name not in arguments or passed:
            setattr(created, name, value)
    return created


def columns_of(
    mapper: sa_orm.Mapper[Any], created: Any, nulls: Iterable[sa.Column[Any]], dialect: sa.Dialect
) -> dict[sa.Column[Any], Any]:
    """What an INSERT of `created` would say, as the ORM's does: None stands for a column's default, except where the
    lookup asks for NULL, in the columns `nulls`."""
    given = sa.inspect(created).dict
    values: dict[sa.Column[Any], Any] = {}
    for prop in mapper.column_attrs:
        for column in table_columns(prop):
            if prop.key in given and column.computed is None:
                value = given[prop.key]
                if value is not None or column.type.should_evaluate_none:
                    values[column] = value
    for column in nulls:
        if column.computed is None:
            values[column] = None if none_is_a_value(column.type, dialect) else sa.null()
    return values


def set_columns(mapper: sa_orm.Mapper[Any], assigned: Mapping[str, Any]) -> dict[sa.Column[Any], Any]:
    """The columns that setting these attributes would write, validators and setters of hybrids included."""
    blank = mapper.class_manager.new_instance()
    for name, value in assigned.items():
        setattr(blank, name, value)
    given = sa.inspect(blank).dict
    return {
        column: given[prop.key] for prop in mapper.column_attrs if prop.key in given for column in table_columns(prop)
    }


def written_columns(
    mapper: sa_orm.Mapper[Any], values: Mapping[sa.Column[Any], Any], dialect: sa.Dialect
) -> dict[sa.Column[Any], Any]:
    """`values` and the defaults of the other columns: SQLAlchemy does not evaluate them for an INSERT within a WITH,
    or with the context of the row where an object is loaded from it. A type that stores something for None is asked
    where there is no default, as in a flush."""
    table: sa.FromClause = mapper.local_table
    found = dict(values)
    found |= InsertDefaults(table, found, first_version(mapper)).row(found)
    for column in table.columns:
        assert isinstance(column, sa.Column)
        if column not in found and not _is_made(column, table) and stores_none(column.type, dialect):
            found[column] = None
    return found


def _is_made(column: sa.Column[Any], table: Any) -> bool:
    """Whether the server makes a value for the column where none is given."""
    made = column.server_default is not None or column.identity is not None or column.computed is not None
    return made or column is table.autoincrement_column


def lacks(table: Any, values: Mapping[sa.Column[Any], Any]) -> bool:
    """Whether a row of `values` would have NULL where there must be a value."""
    return any(
        not column.nullable
        and (values.get(column) is None or values[column] is sa.null())
        and not (column.type.should_evaluate_none and column in values)
        and not (column.default or _is_made(column, table))
        for column in table.columns
    )

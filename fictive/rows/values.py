"""What a new row is made of: the object that the model's constructor makes, and its columns. Nothing is sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..errors import UnknownAttribute
from .columns import foreign_key_of, hybrid, mapped_property, table_columns, unknown_attribute
from .lookups import Lookup

__all__ = [
    "Defaults",
    "check_names",
    "columns_of",
    "evaluated",
    "lacks",
    "new_object",
    "set_columns",
    "split",
    "update_defaults",
    "written_columns",
]

Defaults = Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None


def check_names(mapper: sa_orm.Mapper[Any], given: Mapping[str, Any], where: str, lookup: Lookup) -> None:
    """Raise for names that cannot be stored, names the lookup has already, and related objects without a row."""
    model = mapper.class_.__name__
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
        if name == lookup.live:
            raise UnknownAttribute(
                f"{model}.{name} cannot be in {where}: only rows that are not deleted are found and made here. "
                "Call soft_delete() on the object."
            )
        if name in lookup.assigned or name in lookup.related:
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


def columns_of(mapper: sa_orm.Mapper[Any], created: Any, nulls: Lookup) -> dict[sa.Column[Any], Any]:
    """What an INSERT of `created` would say, as the ORM's does: None stands for a column's default, except where the
    lookup asks for NULL."""
    given = sa.inspect(created).dict
    values: dict[sa.Column[Any], Any] = {}
    for prop in mapper.column_attrs:
        for column in table_columns(prop):
            if prop.key in given and column.computed is None:
                value = given[prop.key]
                if value is not None or column.type.should_evaluate_none:
                    values[column] = value
    for column, value in nulls.columns.items():
        if value is None and column.computed is None:
            values[column] = sa.null()
    version = mapper.version_id_col
    if isinstance(version, sa.Column) and callable(mapper.version_id_generator):
        values.setdefault(version, mapper.version_id_generator(None))
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


def written_columns(table: sa.Table, values: Mapping[sa.Column[Any], Any]) -> dict[sa.Column[Any], Any]:
    """`values` and the defaults of the other columns.

    SQLAlchemy evaluates those in Python for an INSERT that is the statement itself, not within a WITH; and where an
    object is loaded from it, a default function cannot ask for the other values.
    """
    found = dict(values)
    context = _Context(found)
    for column in table.columns:
        if column not in found and column.default is not None and not column.default.is_sequence:
            found[column] = _default_value(column.default, context)
    return found


def lacks(table: Any, values: Mapping[sa.Column[Any], Any]) -> bool:
    """Whether a row of `values` would have NULL where there must be a value."""
    return any(
        not column.nullable
        and values.get(column) is None
        and not (column.server_default or column.identity or column.default)
        and column is not table.autoincrement_column
        for column in table.columns
    )


def update_defaults(table: sa.Table, values: Mapping[sa.Column[Any], Any]) -> dict[sa.Column[Any], Any]:
    """What `onupdate` sets besides `values`; the ORM and Core do it in an UPDATE, but not in ON CONFLICT."""
    context = _Context(values)
    return {
        column: _default_value(column.onupdate, context)
        for column in table.columns
        if column.onupdate is not None and column not in values
    }


def _default_value(default: Any, context: _Context) -> Any:
    if default.is_sequence:
        return default.next_value()
    return default.arg(context) if default.is_callable else default.arg


class _Context:
    """What a default function with a parameter sees (SQLAlchemy documentation, "Context-Sensitive Default
    Functions")."""

    def __init__(self, values: Mapping[sa.Column[Any], Any]) -> None:
        self._values = values

    @property
    def current_parameters(self) -> dict[str, Any]:
        return {column.key: value for column, value in self._values.items()}

    def get_current_parameters(self, isolate_multiinsert_groups: bool = True) -> dict[str, Any]:
        return self.current_parameters

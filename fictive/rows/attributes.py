"""From the attribute names and primary keys that callers write to the columns of a table. Pure; nothing is sent."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.ext.hybrid import HybridExtensionType

from ..errors import UnknownAttribute, UnsavedObject
from ..session.reading import DELETED_WHEN_SET

__all__ = [
    "WITH_DELETED", "as_key", "attribute_names", "composite_values", "foreign_key_of", "hybrid",
    "live_attribute", "mapped_property", "mapper_of", "python_types", "table_columns", "unknown_attribute",
]  # fmt: skip


WITH_DELETED = "fictive_with_deleted"
"""The execution option by which a SELECT sees rows that are deleted and still there."""


def mapper_of(model: object) -> sa_orm.Mapper[Any]:
    """The mapper of a mapped class; raises `TypeError` for anything else, such as the declarative base itself."""
    mapper = sa.inspect(model, raiseerr=False) if isinstance(model, type) else None
    if not isinstance(mapper, sa_orm.Mapper):
        name = getattr(model, "__name__", repr(model))
        raise TypeError(f"{name} is not a mapped class: it has no table. Call it on a model.")
    return mapper


def live_attribute(mapper: sa_orm.Mapper[Any]) -> str | None:
    """The attribute that is NULL in rows that live, where the model's rows can be deleted and still be there."""
    return getattr(mapper.class_, DELETED_WHEN_SET, None)


def unknown_attribute(mapper: sa_orm.Mapper[Any], name: str, where: str) -> UnknownAttribute:
    """The error for a name in `where` (`"the lookup"`) that cannot be written there, and what was probably meant."""
    model = mapper.class_.__name__
    if mapper.attrs.get(name) is not None or hasattr(mapper.class_, name):
        return UnknownAttribute(f"{model}.{name} in {where} is not a mapped column, so it cannot be stored.")
    known = [key for key in mapper.all_orm_descriptors.keys() if isinstance(key, str)]  # noqa: SIM118
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f". It has: {', '.join(sorted(known))}."
    return UnknownAttribute(f"{model} has no attribute {name!r}, which {where} names{hint}")


def mapped_property(mapper: sa_orm.Mapper[Any], name: str) -> sa_orm.MapperProperty[Any] | None:
    """The mapped attribute `name`, looking through synonyms; None where there is none."""
    found = mapper.attrs.get(name)
    while isinstance(found, sa_orm.SynonymProperty):
        found = mapper.attrs.get(found.name)
    return found


def attribute_names(mapper: sa_orm.Mapper[Any], columns: Iterable[sa.ColumnElement[Any]]) -> list[str]:
    """The mapped attributes that these columns are stored from."""
    return [mapper.get_property_by_column(column).key for column in columns]


def table_columns(prop: object) -> tuple[sa.Column[Any], ...]:
    """The columns that a mapped attribute is stored in: several for a key that joined inheritance repeats; none for
    a relationship or an SQL expression."""
    if not isinstance(prop, sa_orm.ColumnProperty):
        return ()
    return tuple(column for column in prop.columns if isinstance(column, sa.Column))


def hybrid(mapper: sa_orm.Mapper[Any], name: str) -> Any:
    """The `hybrid_property` of that name; None where it is something else."""
    found = mapper.all_orm_descriptors.get(name)
    if found is not None and found.extension_type is HybridExtensionType.HYBRID_PROPERTY:
        return found
    return None


def composite_values(prop: sa_orm.CompositeProperty[Any], value: Any) -> Iterator[tuple[Any, Any]]:
    """The column properties of a composite, each with its part of `value`; all None for None."""
    parts = prop.props
    if value is None:
        given: Any = (None,) * len(parts)
    elif dataclasses.is_dataclass(value) and not hasattr(value, "__composite_values__"):
        given = [getattr(value, field.name) for field in dataclasses.fields(value) if field.init]
    else:
        given = value.__composite_values__()
    return zip(parts, given, strict=True)


def foreign_key_of(prop: sa_orm.RelationshipProperty[Any], related: object, where: str) -> dict[sa.Column[Any], Any]:
    """What a many-to-one relationship to `related` puts into the columns of its own table; NULL for None.

    Raises `UnsavedObject` where `related` has no row yet, and `TypeError` where it is of another class. An expired
    `related` is loaded.
    """
    name = f"{prop.parent.class_.__name__}.{prop.key}"
    pairs = prop.local_remote_pairs or []
    if related is None:
        return {local: None for local, _ in pairs if isinstance(local, sa.Column)}
    state = sa.inspect(related, raiseerr=False)
    if not isinstance(state, sa_orm.InstanceState) or not state.mapper.isa(prop.mapper):
        raise TypeError(f"{name} in {where} is a {prop.mapper.class_.__name__}, not {related!r}.")
    if state.key is None:
        raise UnsavedObject(
            f"{name} in {where} is a {prop.mapper.class_.__name__} that is not saved and has no key. Flush it first."
        )
    return {
        local: getattr(related, state.mapper.get_property_by_column(remote).key)
        for local, remote in pairs
        if isinstance(local, sa.Column) and isinstance(remote, sa.Column)
    }


# -- primary keys as callers write them -------------------------------------------------------------------------------


def python_types(columns: Sequence[sa.ColumnElement[Any]]) -> list[type[Any] | None]:
    """The type of each column's values, where the column's own type says so plainly; else None."""
    types = [column.type for column in columns]
    plain = (sa.Integer, sa.String, sa.Uuid)
    return [each.python_type if isinstance(each, plain) and not isinstance(each, sa.Enum) else None for each in types]


def as_key(given: object, types: Sequence[type[Any] | None]) -> tuple[Any, ...] | None:
    """`given`, a value or a tuple of several, as a tuple that may be a key of `types`; None where it cannot be one."""
    key = given if isinstance(given, tuple) else (given,)
    return key if len(key) == len(types) and all(map(_fits, key, types)) else None


def _fits(value: object, python_type: type[Any] | None) -> bool:
    if python_type is not None:
        return isinstance(value, python_type)
    return value is not None and not isinstance(value, (list, set, frozenset, dict, Iterator))

"""Pages that begin after a row instead of after a number of rows. Pure functions; nothing is sent."""

from __future__ import annotations

import base64
import binascii
import datetime
import decimal
import json
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.sql import operators

from ..errors import ConfigurationError, InvalidCursor
from ..rows.attributes import mapped_property
from ..rows.stored_values import as_stored

__all__ = ["Key", "Order", "decode", "encode", "order_of"]

# How a value is written into a cursor and read from it again, by the Python type of its column.
_READERS: dict[type, Callable[[str], Any]] = {
    int: int,
    str: lambda text: text.encode().decode(),  # which halves of surrogate pairs are not
    float: float,
    decimal.Decimal: decimal.Decimal,
    uuid.UUID: uuid.UUID,
    datetime.datetime: datetime.datetime.fromisoformat,
    datetime.date: datetime.date.fromisoformat,
}


@dataclass(frozen=True)
class Key:
    """One column of the order: its attribute on the model, the SQL, and the direction."""

    name: str
    column: Any
    descending: bool
    type: type

    def backwards(self) -> Key:
        return Key(self.name, self.column, not self.descending, self.type)

    @property
    def order(self) -> Any:
        return self.column.desc() if self.descending else self.column.asc()


_ALIKE = (sa.Integer, sa.BigInteger, sa.SmallInteger, sa.String, sa.Text, sa.Uuid, sa.Date)
"""Types whose values are stored as they are."""


class Order:
    """An order of pages: its columns, and the condition of the rows beyond one of them. Kept for each mapper, since
    building the condition takes longer than asking for it."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self.keys = keys
        self._by_dialect = any(type(key.column.type) not in _ALIKE for key in keys)
        self._beyond: dict[tuple[bool, str], sa.ColumnElement[bool]] = {}

    def order_by(self, *, backwards: bool) -> list[Any]:
        return [(key.backwards() if backwards else key).order for key in self.keys]

    def beyond(self, dialect: Callable[[], sa.Dialect], *, backwards: bool) -> sa.ColumnElement[bool]:
        """The condition of rows after, or before, the one whose values are those of `parameters`. `dialect` is asked
        where the types are not stored alike everywhere."""
        name = dialect().name if self._by_dialect else ""
        found = self._beyond.get((backwards, name))
        if found is None:
            keys = [key.backwards() if backwards else key for key in self.keys]
            found = self._beyond[backwards, name] = _beyond(keys, dialect())
        return found

    def parameters(self, cursor: str) -> dict[str, Any]:
        """The parameters of `beyond`; raises `InvalidCursor`."""
        return {_parameter(at): value for at, value in enumerate(decode(self.keys, cursor))}


_orders: weakref.WeakKeyDictionary[sa_orm.Mapper[Any], dict[Any, Order]] = weakref.WeakKeyDictionary()


def order_of(mapper: sa_orm.Mapper[Any], order_by: Sequence[Any]) -> Order:
    """The order by these columns, with the primary key behind them so that no two rows are equal in it.

    Raises `ConfigurationError` for what a page cannot begin after: an expression, a column that may be NULL, a type
    that has no text form here.
    """
    named = [_named(mapper, each) for each in order_by]
    known = _orders.setdefault(mapper, {})
    found = known.get(tuple(named))
    if found is None:
        names = dict(named)
        last_descends = bool(named) and named[-1][1]
        for column in mapper.primary_key:
            names.setdefault(mapper.get_property_by_column(column).key, last_descends)
        found = known[tuple(named)] = Order([_key(mapper, name, descending) for name, descending in names.items()])
    return found


def _named(mapper: sa_orm.Mapper[Any], order: Any) -> tuple[str, bool]:
    """The attribute that is meant, and whether it descends."""
    descending, element = False, order
    if isinstance(order, sa.UnaryExpression) and order.modifier in (operators.desc_op, operators.asc_op):
        descending, element = order.modifier is operators.desc_op, order.element
    prop = _property(mapper, element)
    if not isinstance(prop, sa_orm.ColumnProperty) or not isinstance(prop.columns[0], sa.Column):
        raise ConfigurationError(
            f"A keyset page of {mapper.class_.__name__} cannot be ordered by {order}: expected its columns, such as "
            f"{mapper.class_.__name__}.{mapper.get_property_by_column(mapper.primary_key[0]).key}, or .desc() of one."
        )
    return prop.key, descending


def _property(mapper: sa_orm.Mapper[Any], order: Any) -> Any:
    """The attribute, by itself or by its column, which may have another attribute's name."""
    if isinstance(order, sa_orm.QueryableAttribute):
        of: Any = order.parent
        return mapped_property(mapper, order.key) if of.is_mapper and (mapper.isa(of) or of.isa(mapper)) else None
    try:
        return mapper.get_property_by_column(order)
    except (sa_orm.exc.UnmappedColumnError, TypeError, AttributeError):
        return None


def _key(mapper: sa_orm.Mapper[Any], name: str, descending: bool) -> Key:
    column = mapper.attrs[name].columns[0]
    if column.nullable:
        raise ConfigurationError(
            f"A keyset page cannot be ordered by {mapper.class_.__name__}.{name}: it may be NULL, and NULL is "
            "neither before nor after anything. Make the column NOT NULL, or use page()."
        )
    type_ = _python_type(column)
    if type_ not in _READERS:
        raise ConfigurationError(
            f"A keyset page cannot be ordered by {mapper.class_.__name__}.{name}: its type {column.type!r} has no "
            "text form for a cursor. Use page()."
        )
    return Key(name, getattr(mapper.class_, name), descending, type_)


def _python_type(column: sa.Column[Any]) -> type:
    try:
        return column.type.python_type
    except NotImplementedError:
        return object


def _beyond(keys: Sequence[Key], dialect: sa.Dialect) -> sa.ColumnElement[bool]:
    """In one direction it is a comparison of rows, which an index over the columns answers (PostgreSQL documentation,
    "Row Constructor Comparison"). The values are compared as their columns store them: a REAL is no double."""
    values = [
        as_stored(sa.bindparam(_parameter(at), type_=key.column.type), key.column.type, dialect, key.type)
        for at, key in enumerate(keys)
    ]
    if len({key.descending for key in keys}) == 1:
        left, right = sa.tuple_(*(key.column for key in keys)), sa.tuple_(*values)
        return left < right if keys[0].descending else left > right
    conditions = []
    for at, (key, value) in enumerate(zip(keys, values, strict=True)):
        equal = [each.column == given for each, given in zip(keys[:at], values, strict=False)]
        conditions.append(sa.and_(*equal, key.column < value if key.descending else key.column > value))
    return sa.or_(*conditions)


def _parameter(at: int) -> str:
    return f"fictive_after_{at}"


def encode(keys: Sequence[Key], instance: object) -> str:
    """A cursor: where `instance` stands in the order, as text for a URL."""
    values = [str(getattr(instance, key.name)) for key in keys]
    packed = json.dumps(values, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def decode(keys: Sequence[Key], cursor: str) -> list[Any]:
    """The values of a cursor. Raises `InvalidCursor` for one that is not of this order; it comes from a URL."""
    try:
        texts = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        values = [_READERS[key.type](text) for key, text in zip(keys, texts, strict=True)]
    except (ValueError, TypeError, binascii.Error, ArithmeticError, AttributeError, RecursionError):
        values = []
    if len(values) != len(keys) or not all(map(_can_be_asked_for, keys, values)):
        raise InvalidCursor(f"{cursor!r} is not a cursor of this page's order.")
    return values


def _can_be_asked_for(key: Key, value: Any) -> bool:
    """Whether PostgreSQL takes the value for the column's type, so that the error is ours and not the driver's."""
    if isinstance(value, str):
        return "\0" not in value
    if isinstance(value, int):
        kind = key.column.type
        bits = 15 if isinstance(kind, sa.SmallInteger) else 63 if isinstance(kind, sa.BigInteger) else 31
        return -(1 << bits) <= value < 1 << bits
    return True

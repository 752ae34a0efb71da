"""Pages that begin after a row instead of after a number of rows. Pure functions; nothing is sent."""

from __future__ import annotations

import base64
import binascii
import datetime
import decimal
import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.sql import operators

from ..errors import ConfigurationError, InvalidCursor

__all__ = ["Key", "beyond", "decode", "encode", "keys_of"]

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


def keys_of(mapper: sa_orm.Mapper[Any], order_by: Sequence[Any]) -> list[Key]:
    """The columns of an order, with the primary key behind them so that no two rows are equal in it.

    Raises `ConfigurationError` for what a page cannot begin after: an expression, a column that may be NULL, a type
    that has no text form here.
    """
    keys = [_key(mapper, each) for each in order_by]
    known = {key.name for key in keys}
    last_descends = bool(keys) and keys[-1].descending
    for column in mapper.primary_key:
        name = mapper.get_property_by_column(column).key
        if name not in known:
            attribute = getattr(mapper.class_, name)
            keys.append(_key(mapper, attribute.desc() if last_descends else attribute))
    return keys


def _key(mapper: sa_orm.Mapper[Any], order: Any) -> Key:
    descending = False
    if isinstance(order, sa.UnaryExpression) and order.modifier in (operators.desc_op, operators.asc_op):
        descending = order.modifier is operators.desc_op
        order = order.element
    name = getattr(order, "key", None)
    prop = mapper.attrs.get(name) if isinstance(name, str) else None
    if not isinstance(prop, sa_orm.ColumnProperty) or not isinstance(prop.columns[0], sa.Column):
        raise ConfigurationError(
            f"A keyset page of {mapper.class_.__name__} cannot be ordered by {order}: expected its columns, such as "
            f"{mapper.class_.__name__}.{mapper.get_property_by_column(mapper.primary_key[0]).key}, or .desc() of one."
        )
    column = prop.columns[0]
    if column.nullable:
        raise ConfigurationError(
            f"A keyset page cannot be ordered by {mapper.class_.__name__}.{prop.key}: it may be NULL, and NULL is "
            "neither before nor after anything. Make the column NOT NULL, or use page()."
        )
    type_ = _python_type(column)
    if type_ not in _READERS:
        raise ConfigurationError(
            f"A keyset page cannot be ordered by {mapper.class_.__name__}.{prop.key}: its type {column.type!r} has no "
            "text form for a cursor. Use page()."
        )
    return Key(prop.key, getattr(mapper.class_, prop.key), descending, type_)


def _python_type(column: sa.Column[Any]) -> type:
    try:
        return column.type.python_type
    except NotImplementedError:
        return object


def beyond(keys: Sequence[Key], values: Sequence[Any]) -> sa.ColumnElement[bool]:
    """The condition of rows after the one with `values`.

    In one direction it is a comparison of rows, which an index over the columns answers (PostgreSQL documentation,
    "Row Constructor Comparison").
    """
    if len({key.descending for key in keys}) == 1:
        left = sa.tuple_(*(key.column for key in keys))
        right = sa.tuple_(*(sa.literal(value, key.column.type) for key, value in zip(keys, values, strict=True)))
        return left < right if keys[0].descending else left > right
    conditions = []
    for at, (key, value) in enumerate(zip(keys, values, strict=True)):
        equal = [each.column == given for each, given in zip(keys[:at], values, strict=False)]
        conditions.append(sa.and_(*equal, key.column < value if key.descending else key.column > value))
    return sa.or_(*conditions)


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

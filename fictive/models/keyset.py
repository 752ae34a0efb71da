"""Pages that begin after a row instead of after a number of rows. Pure functions; nothing is sent."""

from __future__ import annotations

import binascii
import dataclasses
import datetime
import decimal
import json
import uuid
import weakref
from collections.abc import Callable, Sequence
from json.encoder import encode_basestring_ascii
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.sql import operators

from ..errors import ConfigurationError, InvalidCursor
from ..rows.attributes import mapped_property
from ..rows.stored_values import as_stored, database_type
from .url_values import read_datetime, read_decimal

__all__ = ["Key", "Order", "decode", "encode", "no_cursor", "order_of"]

_Reader = Callable[[str], Any]


def _read_text(text: str) -> str:
    if "\0" in text:  # PostgreSQL has no such text, and the error is to be ours and not the driver's
        raise ValueError(text)
    return text.encode().decode()  # which halves of surrogate pairs are not


def _read_integer(bits: int) -> _Reader:
    limit = 1 << bits

    def read(text: str) -> int:
        value = int(text)
        if not -limit <= value < limit:
            raise ValueError(text)
        return value

    return read


_READERS: dict[type, _Reader] = {
    str: _read_text,
    float: float,
    decimal.Decimal: read_decimal,
    uuid.UUID: uuid.UUID,
    datetime.datetime: read_datetime,
    datetime.date: datetime.date.fromisoformat,
}
"""How a value is read from a cursor, into which `str` wrote it, by the Python type of its column."""


def _read_one_of(known: Sequence[str]) -> _Reader:
    def read(text: str) -> str:
        if text not in known:
            raise ValueError(text)
        return text

    return read


def _read_uuid_text(text: str) -> str:
    uuid.UUID(text)
    return text


def _reader(type_: sa.types.TypeEngine[Any], python_type: type, dialect: sa.Dialect) -> _Reader | None:
    stored: Any = database_type(type_, dialect)
    if python_type is int:
        is_wide = isinstance(stored, sa.BigInteger) or dialect.name == "sqlite"
        return _read_integer(63 if is_wide else 15 if isinstance(stored, sa.SmallInteger) else 31)
    if python_type is str and isinstance(stored, sa.Enum):
        return _read_one_of(stored.enums)
    if python_type is str and isinstance(stored, sa.Uuid):
        return _read_uuid_text
    return _READERS.get(python_type)


@dataclasses.dataclass(frozen=True)
class Key:
    """One column of the order: its attribute on the model, and the direction."""

    column: Any
    descending: bool
    type: type
    read: _Reader
    """The value of a text in a cursor; raises `ValueError` for one that the column cannot have."""

    def backwards(self) -> Key:
        return dataclasses.replace(self, descending=not self.descending)

    @property
    def order(self) -> Any:
        return self.column.desc() if self.descending else self.column.asc()


_MOST_STATEMENTS = 100  # of an order; a size comes from a URL


class Order:
    """An order of pages: its columns, and the statements of its pages. Kept for each mapper, since building a
    statement, and its key in SQLAlchemy's cache, takes longer than running it."""

    def __init__(self, model: type[Any], keys: Sequence[Key], dialect: sa.Dialect) -> None:
        self.keys = keys
        self._parameters = [_parameter(at) for at in range(len(keys))]
        self._model = model
        self._dialect = dialect
        self._statements: dict[tuple[int, bool, bool], sa.Select[Any]] = {}

    def page(self, size: int, *, has_cursor: bool, backwards: bool) -> sa.Select[Any]:
        """The SELECT of that many objects, each with its place in the order: the first ones, or those after or before
        the row whose values are those of `parameters`."""
        about = (size, has_cursor, backwards)
        found = self._statements.get(about)
        if found is None:
            keys = [key.backwards() if backwards else key for key in self.keys]
            # in a transaction an object that was loaded before keeps what it has, and pending changes are no row's
            places = [key.column for key in self.keys]
            found = sa.select(self._model, *places).order_by(*(key.order for key in keys)).limit(size)
            if has_cursor:
                found = found.where(_beyond(keys, self._dialect))
            if len(self._statements) >= _MOST_STATEMENTS:
                self._statements.clear()
            self._statements[about] = found
        return found

    def parameters(self, cursor: str) -> dict[str, Any]:
        """The parameters of `page`; raises `InvalidCursor`."""
        return dict(zip(self._parameters, decode(self.keys, cursor), strict=True))


_orders: weakref.WeakKeyDictionary[sa_orm.Mapper[Any], dict[Any, Order]] = weakref.WeakKeyDictionary()


def order_of(mapper: sa_orm.Mapper[Any], order_by: Sequence[Any], dialect: sa.Dialect) -> Order:
    """The order by these columns, with the primary key behind them so that no two rows are equal in it.

    Raises `ConfigurationError` for what a page cannot begin after: an expression, a column that may be NULL, a type
    that has no text form here.
    """
    named = [_named(mapper, each) for each in order_by]
    known = _orders.setdefault(mapper, {})
    about = (dialect.name, dialect.driver, *named)
    found = known.get(about)
    if found is None:
        names = dict(named)
        last_descends = bool(named) and named[-1][1]
        for column in mapper.primary_key:
            names.setdefault(mapper.get_property_by_column(column).key, last_descends)
        keys = [_key(mapper, name, descending, dialect) for name, descending in names.items()]
        found = known[about] = Order(mapper.class_, keys, dialect)
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


def _key(mapper: sa_orm.Mapper[Any], name: str, descending: bool, dialect: sa.Dialect) -> Key:
    column = mapper.attrs[name].columns[0]
    if column.nullable:
        raise ConfigurationError(
            f"A keyset page cannot be ordered by {mapper.class_.__name__}.{name}: it may be NULL, and NULL is "
            "neither before nor after anything. Make the column NOT NULL, or use page()."
        )
    type_ = _python_type(column)
    if (read := _reader(column.type, type_, dialect)) is None:
        raise ConfigurationError(
            f"A keyset page cannot be ordered by {mapper.class_.__name__}.{name}: its type {column.type!r} has no "
            "text form for a cursor. Use page()."
        )
    return Key(getattr(mapper.class_, name), descending, type_, read)


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


_URL_SAFE = bytes.maketrans(b"+/", b"-_")
_parse = json.JSONDecoder().raw_decode


def encode(place: Sequence[Any]) -> str:
    """A cursor: a place in the order, as text for a URL."""
    packed = ",".join([encode_basestring_ascii(str(value)) for value in place])
    coded = binascii.b2a_base64(f"[{packed}]".encode(), newline=False)
    return coded.translate(_URL_SAFE).rstrip(b"=").decode()


def decode(keys: Sequence[Key], cursor: str) -> list[Any]:
    """The values of a cursor. Raises `InvalidCursor` for one that is not of this order; it comes from a URL."""
    try:
        text = binascii.a2b_base64(cursor.replace("-", "+").replace("_", "/") + "==").decode()
        texts, end = _parse(text)
        if end == len(text):
            return [key.read(each) for key, each in zip(keys, texts, strict=True)]
    except (ValueError, TypeError, ArithmeticError, AttributeError, RecursionError):
        pass
    raise no_cursor(cursor)


def no_cursor(cursor: str) -> InvalidCursor:
    """The error for a cursor that is not of the order."""
    return InvalidCursor(f"{cursor!r} is not a cursor of this page's order.")

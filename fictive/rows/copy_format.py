"""Rows as COPY's text format (PostgreSQL documentation, "COPY", "Text Format"), column by column. Nothing is sent.

Only what is certain to be stored as an INSERT stores it: for each type of column, values of the classes named here.
The rest raises `NotCopyable`, and goes by INSERT.

What Python does once for each value is what bulk work costs, so there is as little of it as can be: the values of a
column are turned to text by one `map`, and searched for what must be escaped all at once.
"""

from __future__ import annotations

import datetime
import decimal
import itertools
import math
import struct
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from ..drivers.copying import NotCopyable
from .stored_values import array_text, database_type

__all__ = ["CopyFormat", "escaped"]

NULL = "\\N"
_ESCAPES = (("\\", "\\\\"), ("\n", "\\n"), ("\t", "\\t"), ("\r", "\\r"))

Texts = Callable[[Sequence[Any]], Iterable[str]]
"""The texts of values of one class, none of them None; raises `NotCopyable` where one of them is different."""


class CopyFormat:
    """Makes blocks of lines for COPY from the values of `columns`.

    `driver_text` makes a text of a value that SQLAlchemy wrapped for the driver, or raises `NotCopyable`.
    """

    def __init__(
        self, dialect: sa.Dialect, columns: Sequence[sa.Column[Any]], driver_text: Callable[[Any], str]
    ) -> None:
        self._columns = [_Column(dialect, column.type, driver_text) for column in columns]

    def block(self, values: Sequence[Sequence[Any]]) -> str:
        """The lines for `values`, given by column and not empty."""
        try:
            columns = [column.texts(each) for column, each in zip(self._columns, values, strict=True)]
        except NotCopyable:
            raise
        except Exception as error:  # of a type's processor: INSERT raises it as a flush does
            raise NotCopyable from error
        lines = columns[0] if len(columns) == 1 else map("\t".join, zip(*columns, strict=True))
        block = "\n".join(lines) + "\n"
        if not block.isascii():
            try:
                block.encode()
            except UnicodeEncodeError as error:
                raise NotCopyable from error
        return block


class _Column:
    def __init__(self, dialect: sa.Dialect, type_: Any, driver_text: Callable[[Any], str]) -> None:
        self._process = type_.dialect_impl(dialect).bind_processor(dialect)
        self._rules = _rules_for(dialect, database_type(type_, dialect), driver_text)

    def texts(self, values: Sequence[Any]) -> Iterable[str]:
        """A text for each value, escaped."""
        if self._process is not None:
            if sa.sql.elements.Null in set(map(type, values)):
                raise NotCopyable
            values = list(map(self._process, values))
        kinds = set(map(type, values))
        if type(None) not in kinds:
            return self._of_values(values, kinds)
        given = [value for value in values if value is not None]
        kinds.discard(type(None))
        found = iter(self._of_values(given, kinds)) if given else iter(())
        return [NULL if value is None else next(found) for value in values]

    def _of_values(self, values: Sequence[Any], kinds: set[type]) -> Iterable[str]:
        try:
            rules = {kind: self._rules[_Wrapped if kind.__module__.startswith("psycopg") else kind] for kind in kinds}
        except KeyError:
            raise NotCopyable from None
        if len(rules) == 1:
            (texts,) = rules.values()
            return texts(values)
        singly = {kind: iter(texts([v for v in values if type(v) is kind])) for kind, texts in rules.items()}
        return [next(singly[type(value)]) for value in values]


def escaped(values: Sequence[str]) -> Sequence[str]:
    """The texts as they stand in a line of COPY; the very same ones where nothing must be escaped."""
    joined = "\0".join(values)
    if values and joined.count("\0") != len(values) - 1:
        raise NotCopyable  # a NUL, which PostgreSQL cannot store in text
    if not any(character in joined for character, _ in _ESCAPES):
        return values
    for character, escape in _ESCAPES:
        joined = joined.replace(character, escape)
    return joined.split("\0")


# -- which values of which type ---------------------------------------------------------------------------------------


def _rules_for(dialect: sa.Dialect, type_: Any, driver_text: Callable[[Any], str]) -> Mapping[type, Texts]:
    """For each class of values that COPY can be given for that type, their texts."""
    is_cut = isinstance(type_, sa.CHAR) and not type_.length  # by a cast, to one character
    if not type(type_).__module__.startswith("sqlalchemy.") or isinstance(type_, postgresql.DOMAIN) or is_cut:
        return {}
    if isinstance(type_, sa.ARRAY):
        return _array_rules(dialect, type_, driver_text)
    if isinstance(type_, (sa.JSON, postgresql.JSON)):
        return {str: escaped, _Wrapped: lambda values: escaped(list(map(driver_text, values)))}
    if isinstance(type_, sa.String):
        return {str: escaped}
    if isinstance(type_, sa.Integer):
        bits = 15 if isinstance(type_, sa.SmallInteger) else 63 if isinstance(type_, sa.BigInteger) else 31
        return {int: lambda values: _integers(values, 1 << bits)}
    if isinstance(type_, sa.Float):
        return {int: _plain(str), float: _plain(_float_text(dialect, type_))}
    if isinstance(type_, sa.Numeric):
        # psycopg sends a double, which the server makes a number of 15 digits
        as_float = repr if dialect.driver == "psycopg2" else "{:.15g}".format
        return {int: _plain(str), decimal.Decimal: _decimals, float: lambda values: _finite(values, as_float)}
    if isinstance(type_, sa.DateTime):
        return {datetime.datetime: _plain(datetime.datetime.isoformat) if type_.timezone else _naive_datetimes}
    for kind, rules in _OTHERS.items():
        if isinstance(type_, kind):
            return rules(type_)
    return {}


class _Wrapped:
    """Stands for the classes of the driver in which SQLAlchemy wraps values."""


def _plain(text: Callable[[Any], str]) -> Texts:
    """Texts in which nothing must be escaped."""
    return lambda values: map(text, values)


def _integers(values: Sequence[int], limit: int) -> Iterable[str]:
    if min(values) < -limit or max(values) >= limit:
        raise NotCopyable
    return map(str, values)


def _decimals(values: Sequence[decimal.Decimal]) -> Iterable[str]:
    texts = list(map(str, values))
    joined = "".join(texts)
    if "N" in joined or "I" in joined:  # NaN, Infinity: of which psycopg2 makes NaN
        raise NotCopyable
    return texts


def _finite(values: Sequence[float], text: Callable[[Any], str]) -> Iterable[str]:
    if not all(map(math.isfinite, values)):
        raise NotCopyable
    return map(text, values)


def _float_text(dialect: sa.Dialect, type_: sa.Float[Any]) -> Callable[[Any], str]:
    if dialect.driver == "psycopg2":  # it writes a number into the statement, and PostgreSQL's have no negative zero
        return lambda value: repr(value + 0.0)
    if isinstance(type_, sa.REAL) or (type_.precision or 53) <= 24:
        return _double_for_real
    return repr


def _double_for_real(value: float) -> str:
    """The server rounds a double to a real; the shortest text of that double it would sometimes round otherwise."""
    try:
        exact = not math.isfinite(value) or struct.unpack("f", struct.pack("f", value))[0] == value
    except OverflowError:
        exact = True
    return repr(value) if exact else str(decimal.Decimal(value))


def _naive_datetimes(values: Sequence[datetime.datetime]) -> Iterable[str]:
    texts = list(map(datetime.datetime.isoformat, values))
    joined = "".join(texts)
    if "+" in joined or joined.count("-") != 2 * len(texts):  # the server moves those to the session's time zone
        raise NotCopyable
    return texts


def _times(values: Sequence[datetime.time], *, zoned: bool) -> Iterable[str]:
    texts = list(map(datetime.time.isoformat, values))
    if any(("+" in text or "-" in text) is not zoned for text in texts):
        raise NotCopyable
    return texts


def _interval_text(value: datetime.timedelta) -> str:
    return f"{value.days} days {value.seconds}.{value.microseconds:06} seconds"


def _bytes_text(value: Any) -> str:
    return "\\\\x" + bytes(value).hex()


_BYTES: dict[type, Texts] = dict.fromkeys((bytes, bytearray, memoryview), _plain(_bytes_text))


def _wrapped_bytes(values: Sequence[Any]) -> Iterable[str]:
    """Of what SQLAlchemy wraps for psycopg2, which takes other things for bytes too."""
    found = [getattr(value, "adapted", getattr(value, "obj", None)) for value in values]
    if not set(map(type, found)) <= _BYTES.keys():
        raise NotCopyable
    return map(_bytes_text, found)


_OTHERS: dict[type, Callable[[Any], Mapping[type, Texts]]] = {
    sa.Boolean: lambda type_: {bool: _plain(lambda value: "t" if value else "f")},
    sa.Date: lambda type_: {datetime.date: _plain(datetime.date.isoformat)},
    sa.Time: lambda type_: {datetime.time: lambda values: _times(values, zoned=type_.timezone)},
    sa.Interval: lambda type_: {datetime.timedelta: _plain(_interval_text)},
    postgresql.INTERVAL: lambda type_: {datetime.timedelta: _plain(_interval_text)},
    sa.Uuid: lambda type_: {uuid.UUID: _plain(str), str: escaped},
    sa.LargeBinary: lambda type_: {**_BYTES, _Wrapped: _wrapped_bytes},
}
_ARRAYS_OF = (sa.Integer, sa.Float, sa.Numeric, sa.String, sa.Boolean, sa.Date, sa.DateTime, sa.Uuid)


def _array_rules(dialect: sa.Dialect, type_: sa.ARRAY[Any], driver_text: Callable[[Any], str]) -> Mapping[type, Texts]:
    """Lists of one dimension, of values of one class. A cast to an array cuts and rounds its elements, so theirs is a
    type without length, precision or scale."""
    item: Any = database_type(type_.item_type, dialect)
    is_limited = any(getattr(item, name, None) is not None for name in ("length", "precision", "scale"))
    if not isinstance(item, _ARRAYS_OF) or isinstance(item, (sa.Enum, sa.REAL)):
        return {}
    if is_limited or (type_.dimensions or 1) != 1:
        return {}
    rules = _rules_for(dialect, item, driver_text)

    def texts(values: Sequence[list[Any]]) -> Iterable[str]:
        elements = [each for each in itertools.chain.from_iterable(values) if each is not None]
        kinds = set(map(type, elements))
        if len(kinds) > 1 or not kinds <= rules.keys():
            raise NotCopyable
        if kinds == {float} and not all(map(math.isfinite, elements)):
            raise NotCopyable
        found = iter(elements if kinds <= {str} else rules[kinds.pop()](elements))
        return escaped([array_text(None if each is None else next(found) for each in value) for value in values])

    return {list: texts}

"""Rows as COPY's text format (PostgreSQL documentation, "COPY", "Text Format"), column by column. Nothing is sent.

What Python does once for each value is what bulk work costs, so there is as little of it as can be: the values of a
column are turned to text by one `map`, and searched for what must be escaped all at once.
"""

from __future__ import annotations

import datetime
import decimal
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sqlalchemy as sa

__all__ = ["Encoder", "array_text", "escaped"]

NULL = "\\N"
_ESCAPES = (("\\", "\\\\"), ("\n", "\\n"), ("\t", "\\t"), ("\r", "\\r"))


class Encoder:
    """Makes blocks of lines for COPY from the values of `columns`.

    `texts` makes a text of a value that is of no type known here, or raises `NotCopyable`.
    """

    def __init__(self, dialect: sa.Dialect, columns: Sequence[sa.Column[Any]], texts: Callable[[Any], str]) -> None:
        self._texts = _Texts(texts)
        self._names = [column.name for column in columns]
        self._processors = [column.type.dialect_impl(dialect).bind_processor(dialect) for column in columns]

    def block(self, values: Sequence[Sequence[Any]]) -> str:
        """The lines for `values`, given by column and not empty.

        Raises `NotCopyable`, and for a NUL character `ValueError` as the drivers do.
        """
        columns = [
            self._column(name, each if process is None else list(map(process, each)))
            for name, process, each in zip(self._names, self._processors, values, strict=True)
        ]
        if len(columns) == 1:
            return "\n".join(columns[0]) + "\n"
        return "\n".join(map("\t".join, zip(*columns, strict=True))) + "\n"

    def _column(self, name: str, values: Sequence[Any]) -> Iterable[str]:
        kinds = set(map(type, values))
        if kinds == _INT:
            return map(str, values)
        try:
            if kinds == _STR:
                return escaped(values)
            texts = self._texts
            if kinds <= _CLEAN:
                return [texts[type(value)](value) for value in values]
            found = [texts[type(value)](value) for value in values if value is not None]
            fine = iter(escaped(found))
            return fine if len(found) == len(values) else [NULL if value is None else next(fine) for value in values]
        except _NulCharacter:
            raise ValueError(
                f"A value for {name} has a NUL (0x00) character in it, which PostgreSQL cannot store in text."
            ) from None


class _NulCharacter(Exception):
    pass


def escaped(values: Sequence[str]) -> Sequence[str]:
    """The texts as they stand in a line of COPY; the very same ones where nothing must be escaped."""
    joined = "\0".join(values)
    if values and joined.count("\0") != len(values) - 1:
        raise _NulCharacter
    if not any(character in joined for character, _ in _ESCAPES):
        return values
    for character, escape in _ESCAPES:
        joined = joined.replace(character, escape)
    return joined.split("\0")


def array_text(value: Sequence[Any], text: Callable[[Any], str]) -> str:
    """A list as an array literal (PostgreSQL documentation, "Array Input and Output Syntax")."""
    parts = []
    for each in value:
        if each is None:
            parts.append("NULL")
        elif isinstance(each, list):
            parts.append(array_text(each, text))
        else:
            parts.append('"' + text(each).replace("\\", "\\\\").replace('"', '\\"') + '"')
    return "{" + ",".join(parts) + "}"


def _bytes_text(value: Any) -> str:
    return "\\x" + bytes(value).hex()


def _interval_text(value: datetime.timedelta) -> str:
    return f"{value.days} days {value.seconds}.{value.microseconds:06} seconds"


_KNOWN: dict[type, Callable[[Any], str]] = {
    type(None): lambda value: NULL,
    bool: lambda value: "t" if value else "f",
    # of a subclass, such as an IntEnum, the value and not its name
    int: int.__repr__,
    float: float.__repr__,
    str: str.__str__,
    decimal.Decimal: str,
    bytes: _bytes_text,
    bytearray: _bytes_text,
    memoryview: _bytes_text,
    datetime.date: lambda value: value.isoformat(),
    datetime.time: lambda value: value.isoformat(),
    datetime.timedelta: _interval_text,
    uuid.UUID: str,
}
_INT = {int}
_STR = {str}
# Their texts have nothing in them that must be escaped.
_CLEAN = {type(None), bool, int, float, decimal.Decimal, datetime.date, datetime.datetime, uuid.UUID}


class _Texts(dict[type, Callable[[Any], str]]):
    """How a value becomes text, by its type; found out once for each."""

    def __init__(self, otherwise: Callable[[Any], str]) -> None:
        super().__init__(_KNOWN)
        self._otherwise = otherwise

    def __missing__(self, kind: type) -> Callable[[Any], str]:
        if issubclass(kind, list):
            found: Callable[[Any], str] = self._array
        else:
            found = next((_KNOWN[base] for base in kind.__mro__ if base in _KNOWN), self._otherwise)
        self[kind] = found
        return found

    def _array(self, value: Any) -> str:
        return array_text(value, lambda each: self[type(each)](each))

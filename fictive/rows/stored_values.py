"""A value as its column stores it: rounded, padded or cast as an INSERT would. Pure functions; nothing is sent."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.sql.expression import ClauseElement

__all__ = [
    "PADDED_TEXT", "array_text", "as_stored", "bound", "cut_to_length", "database_type", "images_differ", "is_exact",
    "is_sql", "none_is_a_value", "stores_none", "texts_differ",
]  # fmt: skip


class _Named(sa.types.UserDefinedType[Any]):
    """A type of PostgreSQL's that SQLAlchemy has none for."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        return self.name


PADDED_TEXT = _Named("bpchar")
"""`char(n)` of any length: it compares without trailing blanks, which text does not."""
_RECORD = _Named("record")
"""Any row (PostgreSQL documentation, "Composite Type Comparison")."""


def is_sql(value: object) -> bool:
    """Whether a value is an SQL expression."""
    return isinstance(value, ClauseElement) or hasattr(value, "__clause_element__")


def database_type(type_: sa.types.TypeEngine[Any], dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
    """The type that the database has for `type_`: variants and decorators looked through, and not what the driver's
    dialect makes of it, which is VARCHAR for CHAR."""
    found: Any = type_
    while True:
        if variant := found._variant_mapping.get(dialect.name):
            found = variant
        elif isinstance(found, sa.types.TypeDecorator) and not isinstance(found, sa.Interval):
            found = found.load_dialect_impl(dialect)
        else:
            return found  # type: ignore[no-any-return]


def bound(value: Any, type_: sa.types.TypeEngine[Any]) -> Any:
    """`value` as a parameter of that type, which is asked about None too; an SQL expression is itself."""
    # a nameless one would be param_1, which a column may be called
    return value if is_sql(value) else sa.bindparam("fictive_value", value, type_, unique=True)


def array_text(texts: Iterable[str | None]) -> str:
    """An array of these texts, NULL for None (PostgreSQL documentation, "Array Input and Output Syntax")."""
    quoted = ("NULL" if text is None else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' for text in texts)
    return "{" + ",".join(quoted) + "}"


def none_is_a_value(type_: sa.types.TypeEngine[Any], dialect: sa.Dialect) -> bool:
    """Whether None in a lookup is a value of a decorator's. JSON's null is not meant: None asks for NULL there."""
    return stores_none(type_, dialect) and not isinstance(database_type(type_, dialect), sa.JSON)


def stores_none(type_: sa.types.TypeEngine[Any], dialect: sa.Dialect) -> bool:
    """Whether a decorator stores something for None."""
    if not isinstance(type_, sa.types.TypeDecorator):
        return False
    process = type_.dialect_impl(dialect).bind_processor(dialect)
    try:
        return process is not None and process(None) is not None
    except Exception:  # the processor's business; it says so where the value is written
        return False


# Values of these classes are stored as they are, whatever length or precision the type has.
_EXACT: tuple[tuple[type, frozenset[type]], ...] = (
    (sa.Boolean, frozenset({bool})),
    (sa.Integer, frozenset({int})),
    (sa.Uuid, frozenset({uuid.UUID})),
    (sa.LargeBinary, frozenset({bytes})),
    (sa.Date, frozenset({datetime.date})),
)


def is_exact(type_: sa.types.TypeEngine[Any], dialect: sa.Dialect) -> bool:
    """Whether values that Python tells apart are stored as values that PostgreSQL tells apart. A decorator may make
    one of two, or take values that Python cannot compare."""
    found: Any = type_
    if isinstance(found._variant_mapping.get(dialect.name, found), sa.types.TypeDecorator):
        return False
    stored = database_type(type_, dialect)
    if isinstance(stored, sa.String):
        return not isinstance(stored, (sa.CHAR, postgresql.CITEXT)) and stored.collation is None
    return isinstance(stored, tuple(kind for kind, _ in _EXACT))


def cut_to_length(value: Any, type_: sa.types.TypeEngine[Any], dialect: sa.Dialect) -> Any:
    """A text without the blanks that `varchar(n)` has no room for."""
    stored: Any = database_type(type_, dialect)
    if not isinstance(value, str) or not isinstance(stored, sa.String) or isinstance(stored, (sa.CHAR, sa.Enum)):
        return value
    return value[: stored.length] if stored.length and not value[stored.length :].strip(" ") else value


def as_stored(value: Any, type_: sa.types.TypeEngine[Any], dialect: sa.Dialect, kind: type[Any] | None = None) -> Any:
    """`value`, to be compared with a column of that type as if it had been stored there and read back. `kind` is the
    class of the values of a parameter.

    A cast to the type is what an INSERT does, except that a cast cuts what is longer than `varchar(n)`, where an
    INSERT refuses it unless the rest is blanks (PostgreSQL documentation, "Character Types").
    """
    if dialect.name != "postgresql" or type_._isnull:
        return bound(value, type_)
    stored: Any = database_type(type_, dialect)
    if isinstance(stored, sa.String) and not isinstance(stored, sa.Enum):
        if isinstance(stored, sa.CHAR):
            return sa.cast(bound(value, type_), PADDED_TEXT)
        is_text = issubclass(kind, str) if kind else isinstance(value, str) or is_sql(value)
        given = bound(cut_to_length(value, type_, dialect), type_)
        # another type's text may differ from what a cast to citext makes of it
        return given if is_text else sa.cast(given, type_ if isinstance(stored, postgresql.CITEXT) else sa.Text())
    given_class = kind or type(value)
    for stored_class, exact in _EXACT:
        if isinstance(stored, stored_class) and given_class in exact:
            return bound(value, type_)
    if isinstance(stored, sa.Integer) and issubclass(given_class, (bytes, bytearray, memoryview)):
        return bound(value, type_)  # PostgreSQL 18 casts it to a number where asked, and stores none
    return sa.cast(bound(value, type_), type_)


def images_differ(columns: Any, others: Any) -> sa.ColumnElement[bool]:
    """Whether rows of the same types differ in any byte: what `=` takes for equal, as citext does, may differ all the
    same, and some types have no `=`."""
    ours, theirs = (sa.cast(sa.func.row(*each), _RECORD) for each in (columns, others))
    return ours.op("*<>", is_comparison=True, return_type=sa.Boolean())(theirs)


def texts_differ(column: sa.ColumnElement[Any], value: Any, dialect: sa.Dialect) -> sa.ColumnElement[bool]:
    """Whether a column has another value than `value` would be there, by the text of both: as close to bytes as a
    value comes that is no column's."""
    if dialect.name != "postgresql":
        return column.is_distinct_from(bound(value, column.type))
    plain = sa.type_coerce(column, sa.types.NullType())  # without what its type does to it in a SELECT
    return sa.cast(plain, sa.Text).is_distinct_from(sa.cast(as_stored(value, column.type, dialect), sa.Text))

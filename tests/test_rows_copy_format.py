"""Values as COPY's text, and those that do not go by COPY. No database."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import uuid
from typing import Any

import psycopg2
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import psycopg
from sqlalchemy.dialects.postgresql import psycopg2 as sa_psycopg2

from fictive.drivers.copying import NotCopyable
from fictive.rows.copy_format import CopyFormat, escaped

PSYCOPG2: Any = sa_psycopg2.dialect(dbapi=psycopg2)
PSYCOPG: Any = psycopg.dialect()


class Colour(enum.Enum):
    RED = "r"


class Backwards(sa.types.TypeDecorator[str]):
    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        return value and value[::-1]


def _refuse(value: Any) -> str:
    raise NotCopyable


def _block(type_: Any, *values: Any, dialect: Any = PSYCOPG2) -> str:
    return CopyFormat(dialect, [sa.Column("c", type_)], _refuse).block([values])


@pytest.mark.parametrize(
    ("type_", "value", "text"),
    [
        (sa.Integer, 5, "5"),
        (sa.Boolean, True, "t"),
        (sa.Float, 0.1, "0.1"),
        (sa.Float, -0.0, "0.0"),
        (sa.Numeric, 0.1 + 0.2, "0.30000000000000004"),
        (sa.Integer, -(2**31), "-2147483648"),
        (sa.LargeBinary, b"a\0", "\\\\x6100"),
        (sa.Float, float("-inf"), "-inf"),
        (sa.Numeric, decimal.Decimal("1.10"), "1.10"),
        (sa.Text, None, "\\N"),
        (sa.Text, "", ""),
        (sa.Text, "\\N", "\\\\N"),
        (sa.Text, "\\.", "\\\\."),
        (sa.Text, "a\tb\nc\rd\\e", "a\\tb\\nc\\rd\\\\e"),
        (Backwards, "a\t", "\\ta"),
        (sa.Enum(Colour), Colour.RED, "RED"),
        (sa.Date, dt.date(2024, 2, 29), "2024-02-29"),
        (sa.DateTime, dt.datetime(2024, 2, 29, 1, 2, 3, 4), "2024-02-29T01:02:03.000004"),
        (sa.DateTime(timezone=True), dt.datetime(2024, 1, 1, tzinfo=dt.timezone.utc), "2024-01-01T00:00:00+00:00"),
        (sa.Interval, dt.timedelta(days=-1, microseconds=5), "-1 days 0.000005 seconds"),
        (sa.Uuid, uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (sa.ARRAY(sa.Text), ["a", None, 'q"\\', "null"], '{"a",NULL,"q\\\\"\\\\\\\\","null"}'),
        (sa.ARRAY(sa.Integer), [], "{}"),
    ],
)
def test_the_text_of_a_value(type_: Any, value: Any, text: str) -> None:
    assert _block(type_, value) == text + "\n"
    # among others of its kind, and with NULLs
    assert _block(type_, value, None, value) == f"{text}\n\\N\n{text}\n"


def test_the_text_of_a_value_on_psycopg() -> None:
    assert _block(sa.Float, -0.0, dialect=PSYCOPG) == "-0.0\n"
    assert _block(sa.Numeric, 0.1 + 0.2, dialect=PSYCOPG) == "0.3\n"  # a double, of which the server makes 15 digits
    halfway = 1 + 2**-24  # between two reals, and its shortest text is not
    assert _block(sa.REAL, halfway, dialect=PSYCOPG) == f"{decimal.Decimal(halfway)}\n"


class Size(enum.IntEnum):
    BIG = 3


class Word(str):
    pass


EAST = dt.timezone(dt.timedelta(hours=5))


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        (sa.Integer, True), (sa.Integer, 2.0), (sa.Integer, decimal.Decimal(2)), (sa.Integer, "2"),
        (sa.Integer, 2**31),
        (sa.Integer, Size.BIG), (sa.SmallInteger, 2**15), (sa.Text, 1), (sa.Text, True), (sa.Text, Word("a")),
        (sa.Text, "a\0b"), (sa.Text, "\ud800"), (sa.CHAR, "abc"), (sa.DateTime, dt.datetime(2024, 1, 1, tzinfo=EAST)),
        (sa.DateTime, dt.date(2024, 1, 1)), (sa.Date, dt.datetime(2024, 1, 1)), (sa.Time, dt.time(1, tzinfo=EAST)),
        (sa.Time(timezone=True), dt.time(1)), (sa.Numeric, decimal.Decimal("NaN")), (sa.Numeric, float("inf")),
        (sa.Numeric, decimal.Decimal("Infinity")), (sa.LargeBinary, "text"), (sa.LargeBinary, 5), (sa.JSON, object()),
        (sa.ARRAY(sa.Integer), [[1], [2]]), (sa.ARRAY(sa.Integer), [1.0]), (sa.ARRAY(sa.Float), [1, 0.5]),
        (sa.ARRAY(sa.String(3)), ["abcdef"]), (sa.ARRAY(sa.JSON), [{}]),
        (postgresql.INT4RANGE, postgresql.Range(1, 2)), (postgresql.MONEY, "1"), (sa.Text, object()),
        (sa.Boolean, 3),
    ],
)  # fmt: skip
def test_a31_what_insert_might_store_otherwise_does_not_go_by_copy(type_: Any, value: Any) -> None:
    for dialect in (PSYCOPG2, PSYCOPG):
        with pytest.raises(NotCopyable):
            _block(type_, value, dialect=dialect)


def test_lines_of_several_columns() -> None:
    columns = [sa.Column("a", sa.Integer), sa.Column("b", sa.Text)]
    assert CopyFormat(PSYCOPG2, columns, _refuse).block([[1, 2], ["x", "y\n"]]) == "1\tx\n2\ty\\n\n"


def test_escaping_leaves_alone_what_is_fine() -> None:
    fine = ["a", "b c"]
    assert escaped(fine) is fine
    assert escaped([]) == []

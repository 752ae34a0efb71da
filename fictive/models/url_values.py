"""Values from texts of a URL that PostgreSQL has. Each function raises `ValueError` for what it would refuse."""

from __future__ import annotations

import datetime
import decimal

__all__ = ["read_datetime", "read_decimal", "read_time"]

# PostgreSQL documentation, "Numeric Types", "Date/Time Types"
_MOST_DIGITS, _MOST_DECIMALS = 131072, 16383
_FURTHEST = datetime.timedelta(hours=16)


def read_decimal(text: str) -> decimal.Decimal:
    value = decimal.Decimal(text)
    exponent = value.as_tuple().exponent
    if isinstance(exponent, int):
        if value.adjusted() >= _MOST_DIGITS or exponent < -_MOST_DECIMALS:
            raise ValueError(text)
    elif value.is_nan() and str(value) != "NaN":
        raise ValueError(text)
    return value


def read_datetime(text: str) -> datetime.datetime:
    value = datetime.datetime.fromisoformat(text)
    _check_offset(value.utcoffset())
    return value


def read_time(text: str) -> datetime.time:
    value = datetime.time.fromisoformat(text)
    _check_offset(value.utcoffset())
    return value


def _check_offset(offset: datetime.timedelta | None) -> None:
    if offset is not None and not -_FURTHEST < offset < _FURTHEST:
        raise ValueError(offset)

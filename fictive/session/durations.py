"""Timeouts as callers write them, in the milliseconds that PostgreSQL counts."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from typing import TypeAlias

from ..errors import ConfigurationError

__all__ = ["Duration", "timeout_in_ms"]

Duration: TypeAlias = "str | float | timedelta"
"""`"5s"`, `"100ms"`, `"1min"`; seconds as a number; a `datetime.timedelta`."""

# PostgreSQL documentation, "Setting Parameters": its units of time, and the greatest value of a timeout.
_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "min": 60e3, "h": 3600e3, "d": 86400e3}
_GREATEST = 2**31 - 1
_TEXT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(us|ms|s|min|h|d)\s*", re.ASCII)


def timeout_in_ms(value: Duration, name: str) -> int:
    """`value` in milliseconds, rounded up. Pure.

    A number is seconds; text is a number and one of PostgreSQL's units us, ms, s, min, h, d. Raises
    `ConfigurationError` naming `name` for anything else, and for what is not between 1 ms and 24.8 days: PostgreSQL
    would read 0 as no timeout at all.
    """
    found = _milliseconds(value)
    if found is None or math.isnan(found):
        raise ConfigurationError(f'{name} = {value!r}: expected "5s", "100ms", "1min", seconds or a timedelta.')
    if found <= 0:
        raise ConfigurationError(f"{name} = {value!r}: expected more than zero. For no timeout leave it out.")
    if found > _GREATEST:
        raise ConfigurationError(f"{name} = {value!r}: expected at most {_GREATEST} ms (24.8 days).")
    return math.ceil(round(found, 6))


def _milliseconds(value: object) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return max(-1.0, min(value, _GREATEST)) * 1e3  # an int may be greater than any float
    if isinstance(value, timedelta):
        return value / timedelta(milliseconds=1)
    if isinstance(value, str) and (match := _TEXT.fullmatch(value)):
        return float(match[1]) * _UNITS[match[2]]
    return None

"""Timeouts as they are written; B2 and F1."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal

import pytest

from fictive.errors import ConfigurationError
from fictive.session.durations import timeout_in_ms


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("5s", 5000),
        ("100ms", 100),
        (" 1 min ", 60_000),
        ("1.5s", 1500),
        (".5s", 500),
        ("2h", 7_200_000),
        ("1d", 86_400_000),
        ("1500us", 2),
        (3, 3000),
        (0.1, 100),
        (0.0001, 1),
        (1.001, 1001),
        (timedelta(seconds=2, microseconds=1), 2001),
        (2147483.647, 2**31 - 1),
    ],
)
def test_b2_durations(value: str | float | timedelta, expected: int) -> None:
    assert timeout_in_ms(value, "timeout") == expected


@pytest.mark.parametrize(
    "value",
    [
        0, -1, 0.0, -0.5, float("nan"), float("inf"), float("-inf"), 10**400, -(10**400), 2_147_484, True, False, None,
        "", "5", "s", "-5s", "0s", "0ms", "5 sec", "5S", "1e3s", "nan s", "5s; DROP TABLE item", "\u0665s", "99999d",
        "5s\n5s", b"5s", [5], Decimal(5), timedelta(0), timedelta(days=25), timedelta(seconds=-1),
    ],
)  # fmt: skip
def test_b2_bad_durations(value: object) -> None:
    with pytest.raises(ConfigurationError, match=r"^lock_timeout = "):
        timeout_in_ms(value, "lock_timeout")  # type: ignore[arg-type]

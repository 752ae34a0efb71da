"""The response header `Server-Timing` (https://www.w3.org/TR/server-timing/), which browsers show beside a request."""

from __future__ import annotations

from .report import Report

__all__ = ["server_timing"]


def server_timing(report: Report) -> str:
    """The header's value: time in the database, waiting for the pool, idle in a transaction; in milliseconds."""
    statements, trips = len(report.statements), report.round_trips
    parts = [
        _metric("db", report.database_seconds, f"{_count(statements, 'statement')}, {_count(trips, 'round trip')}")
    ]
    if report.pool_waits:
        parts.append(_metric("db-pool", report.pool_seconds, "waiting for a connection"))
    if report.transactions:
        parts.append(_metric("db-idle", report.idle_seconds, "idle in a transaction"))
    return ", ".join(parts)


def _metric(name: str, seconds: float, description: str) -> str:
    return f'{name};dur={seconds * 1000:.2f};desc="{description}"'


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

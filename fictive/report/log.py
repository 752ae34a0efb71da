"""One log record for a request that is above a threshold: logger `fictive.report`, level WARNING."""

from __future__ import annotations

import json
import logging
from typing import Any

from ..config import Settings
from .report import Report

__all__ = ["log", "log_report", "reasons"]

log = logging.getLogger("fictive.report")


def reasons(report: Report, settings: Settings) -> list[str]:
    """Which thresholds the report is above."""
    found = []
    if settings.report_slow is not None and report.database_seconds > settings.report_slow:
        found.append(f"{_ms(report.database_seconds)} in the database (limit {_ms(settings.report_slow)})")
    if settings.report_round_trips is not None and report.round_trips > settings.report_round_trips:
        found.append(f"{report.round_trips} round trips (limit {settings.report_round_trips})")
    if settings.report_idle is not None and report.idle_seconds > settings.report_idle:
        where = f", the longest time at {report.longest_idle.where}" if report.longest_idle else ""
        found.append(f"{_ms(report.idle_seconds)} idle in a transaction (limit {_ms(settings.report_idle)}){where}")
    return found


def log_report(report: Report, settings: Settings) -> bool:
    """Log the report of a request if it is above a threshold; returns whether it is.

    The record has the attribute `report`, the summary.
    """
    why = reasons(report, settings) if "path" in report.request else []
    if not why:
        return False
    summary = report.summary()
    if settings.report_json:
        log.warning(json.dumps({**summary, "reasons": why}, default=str), extra={"report": summary})
    else:
        log.warning("%s: %s", _what(report), "; ".join([*why, *map(str, report.findings)]), extra={"report": summary})
    return True


def _what(report: Report) -> str:
    request: Any = report.request
    named = ", ".join(f"{name} {request[name]}" for name in ("endpoint", "id") if request.get(name))
    return f"{request['method']} {request['path']}" + (f" ({named})" if named else "")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"

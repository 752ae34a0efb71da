"""Comments that say where a statement comes from, for the server's log and `pg_stat_activity` (SQLCommenter,
https://google.github.io/sqlcommenter/spec/)."""

from __future__ import annotations

import re
import sys
import urllib.parse
from typing import Any

import flask
import sqlalchemy as sa
from sqlalchemy import event

__all__ = ["comment", "tag_statements"]

_TRACE = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def tag_statements(engine: sa.Engine) -> None:
    """Append a comment with endpoint and trace id to each statement on `engine` that a request causes."""
    event.listen(engine, "before_cursor_execute", _tag, retval=True)


def comment(**tags: str | None) -> str:
    """The tags as an SQL comment, sorted, without those that have no value; empty without any."""
    quoted = (
        f"{urllib.parse.quote(name)}='{urllib.parse.quote(value)}'" for name, value in sorted(tags.items()) if value
    )
    text = ",".join(quoted)
    return f"/*{text}*/" if text else ""


def _tag(
    connection: sa.Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> tuple[str, Any]:
    if "/*" in statement and statement.rstrip(" ;").endswith("*/"):
        return statement, parameters  # somebody else's tags
    if not flask.has_request_context():
        return statement, parameters
    text = comment(route=flask.request.endpoint, traceparent=_trace())
    # a percent sign in what is quoted would be a placeholder's beginning
    if text and connection.dialect.paramstyle in ("format", "pyformat"):
        text = text.replace("%", "%%")
    return (f"{statement.rstrip(' ;')} {text}" if text else statement), parameters


def _trace() -> str | None:
    """The trace of OpenTelemetry's current span, or the one that the request came with."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is not None:
        found = trace.get_current_span().get_span_context()
        if found.is_valid:
            return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"
    given = flask.request.headers.get("traceparent", "")
    return given if _TRACE.fullmatch(given) else None

"""Who is connected to a PostgreSQL database, what they do, and who waits for whom (PostgreSQL documentation, "The
Cumulative Statistics System", "System Information Functions")."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from ..errors import UnsupportedDialect

__all__ = ["Row", "activity", "blocker_tree", "endpoint_of", "locks", "require_postgresql"]

Row = dict[str, Any]

_ACTIVITY = """
SELECT pid, usename AS user, application_name AS application, host(client_addr) AS address, state,
    nullif(concat_ws(':', wait_event_type, wait_event), '') AS waits_for,
    extract(epoch FROM clock_timestamp() - xact_start)::float8 AS transaction_seconds,
    extract(epoch FROM clock_timestamp() - state_change)::float8 AS state_seconds,
    pg_blocking_pids(pid) AS blocked_by, query
  FROM pg_catalog.pg_stat_activity
  WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
  ORDER BY xact_start NULLS LAST, pid
"""
_LOCKS = """
SELECT l.pid, a.usename AS user, a.application_name AS application, a.state, l.locktype AS type,
    CASE WHEN l.relation IS NOT NULL THEN l.relation::regclass::text
      WHEN l.locktype = 'advisory' THEN concat_ws(' ', 'key', l.classid, l.objid)
      WHEN l.locktype = 'transactionid' THEN 'transaction ' || l.transactionid END AS object,
    l.mode, l.granted, pg_blocking_pids(l.pid) AS blocked_by,
    extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, a.state_change))::float8 AS transaction_seconds,
    a.query
  FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
  WHERE (l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
      OR (l.database IS NULL AND l.locktype = 'transactionid' AND NOT l.granted))
    AND l.pid IS DISTINCT FROM pg_backend_pid() AND l.locktype <> 'virtualxid'
    AND (l.relation IS NULL OR l.relation >= 16384 OR NOT l.granted)
  ORDER BY l.granted, l.pid, object
"""
# https://google.github.io/sqlcommenter/spec/
_TAG = re.compile(r"\b(?:route|endpoint|controller)='([^']*)'")


def require_postgresql(engine: sa.Engine, what: str) -> None:
    """Raise `UnsupportedDialect` for another database."""
    if engine.dialect.name != "postgresql":
        raise UnsupportedDialect(f"{what} needs PostgreSQL, not {engine.dialect.name}.")


def activity(engine: sa.Engine) -> list[Row]:
    """A row for each other connection to the database, the oldest transaction first. One query."""
    return _with_endpoint(_rows(engine, _ACTIVITY))


def locks(engine: sa.Engine) -> list[Row]:
    """A row for each lock that others hold or wait for, those waited for first. One query."""
    return _with_endpoint(_rows(engine, _LOCKS))


def blocker_tree(rows: list[Row]) -> Iterator[Row]:
    """The rows of `activity` that block others or are blocked, each under whom it waits for, with its `depth`."""
    by_pid = {row["pid"]: row for row in rows}
    waiting: dict[int, list[int]] = {}
    for row in rows:
        for blocker in set(row["blocked_by"] or ()):
            waiting.setdefault(blocker, []).append(row["pid"])
    roots = [pid for pid in waiting if not (by_pid.get(pid) or {}).get("blocked_by")]
    seen: set[int] = set()

    def walk(pid: int, depth: int) -> Iterator[Row]:
        if pid in seen:
            return
        seen.add(pid)
        yield {**by_pid.get(pid, {"pid": pid, "query": "(not of this database, or a prepared transaction)"}),
               "depth": depth}  # fmt: skip
        for each in sorted(waiting.get(pid, ())):
            yield from walk(each, depth + 1)

    for pid in [*sorted(roots), *sorted(waiting)]:  # the latter only in a deadlock
        yield from walk(pid, 0)


def endpoint_of(query: str | None) -> str | None:
    """The endpoint in a statement's SQLCommenter tags (`FICTIVE_REPORT_TAGS`)."""
    match = _TAG.search(query or "")
    return urllib.parse.unquote(match[1]) if match else None


def _with_endpoint(rows: list[Row]) -> list[Row]:
    for row in rows:
        row["endpoint"] = endpoint_of(row["query"])
    return rows


def _rows(engine: sa.Engine, query: str) -> list[Row]:
    require_postgresql(engine, "this command")
    with engine.connect() as connection:
        return [dict(row) for row in connection.exec_driver_sql(query).mappings()]

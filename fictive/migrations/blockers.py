"""Who is in the way, in words."""

from __future__ import annotations

import re

import sqlalchemy as sa

from ..connection.engines import connection_in_autocommit
from ..locks.advisory import LockKey

__all__ = ["holders_of", "identity_of", "who_holds_tables"]

_MOST_QUERY = 200  # characters

_WHO = """
concat('pid ', l.pid, ' (', concat_ws(', ', a.usename, nullif(a.application_name, ''), host(a.client_addr), a.state,
  'for ' || date_trunc('second', clock_timestamp() - a.state_change)), ') ',
  CASE WHEN l.granted THEN 'holds ' ELSE 'waits for ' END"""
_FROM = "FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid"
_HERE = "l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = current_database())"


def identity_of(engine: sa.Engine) -> tuple[object, ...]:
    """What tells the engine's database from all others, whatever the URL. One round trip."""
    with connection_in_autocommit(engine) as connection:
        return tuple(connection.exec_driver_sql("SELECT current_database(), pg_postmaster_start_time()").one())


def holders_of(engine: sa.Engine, key: LockKey) -> list[str]:
    """Who holds the advisory lock. One round trip."""
    with connection_in_autocommit(engine) as connection:
        holders = connection.exec_driver_sql(
            f"SELECT {_WHO}, 'the lock') {_FROM} WHERE l.granted AND {_HERE} AND {key.in_pg_locks()}"
        )
        return list(holders.scalars())


def who_holds_tables(engine: sa.Engine, statement: str) -> list[str]:
    """Who holds locks on the tables that `statement` names, or on any where it names none that is locked. One query.

    The server says which statement could not have its lock, but not who was in the way.
    """
    with connection_in_autocommit(engine) as connection:
        rows = connection.exec_driver_sql(
            f"SELECT DISTINCT c.relname, {_WHO}, l.mode, ' on ', l.relation::regclass, '; its query: ',"
            f" left(a.query, {_MOST_QUERY})) {_FROM}"
            " JOIN pg_catalog.pg_class c ON c.oid = l.relation AND c.relkind IN ('r', 'p', 'v', 'm')"
            " AND c.relnamespace <> 'pg_catalog'::regnamespace"
            f" WHERE l.pid <> pg_backend_pid() AND {_HERE} ORDER BY 2"
        ).all()
    named = [who for relation, who in rows if re.search(rf"(?<!\w){re.escape(relation)}(?!\w)", statement)]
    return named or [who for _, who in rows]

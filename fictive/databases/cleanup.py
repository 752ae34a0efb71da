"""Emptying all tables between two tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.schema import sort_tables_and_constraints

from ..connection.engines import connection_in_autocommit
from ..connection.replicas import note_write
from ..drivers.base import dbapi_connection
from ..errors import UnsupportedDialect
from ..locks.server import Quoting, ServerBlock, lock_timeouts, waiting_block
from ..session.durations import Duration, timeout_in_ms
from ..session.given import commits_without_a_block, session_of, undone_on_error, write_on
from ..session.session import OptInSession

__all__ = ["cleanup_tables"]

SMALL = 1024 * 1024
"""Bytes of a table, dead rows included, up to which DELETE is used. TRUNCATE makes new files for it, its indexes and
all tables that refer to it: 10 ms for each, where DELETE of 5000 rows takes 100 (measured)."""


def cleanup_tables(
    session: sa_orm.Session | sa_orm.scoped_session[Any],
    base: Any,
    *,
    lock_timeout: Duration | None = "5s",
) -> None:
    """Empty all tables of `base`, a declarative base or a `MetaData`, and let their sequences begin anew.

    What TRUNCATE … RESTART IDENTITY CASCADE of all tables would do, and only where there is something to do: a table
    without rows, and a sequence that was not used, is not touched. Tables outside of `base` that refer to these by
    foreign keys are emptied too. Tables that are not in the database, and views, are passed over.

    In a block (`begin()`, `transaction()`) it is part of the transaction, and undone with it, sequences included.
    Where no block is open it is committed at once, also from a session that refuses writes. A transaction that a
    statement has begun by itself (on a plain session, or under `writes_outside="begin"`) is committed with it, after
    what is pending was flushed. Objects that the session has loaded are expired.

    Raises `LockTimeout`, and leaves the open transaction as it was, instead of waiting for longer than `lock_timeout`
    (`"5s"`, seconds or a timedelta; None: the server's own) for another session that uses the tables; the message
    names its process and its query. One that has written rows and not committed them is waited for, also where no row
    can be seen.

    1 round trip for each database that the tables are in, none without tables. In SQLite it is one transaction of
    DELETEs. For tests: every holder of a lock on a table that is not empty is waited for, and everything is gone.
    """
    session = session_of(session)
    metadata = _metadata_of(base)
    milliseconds = None if lock_timeout is None else timeout_in_ms(lock_timeout, "lock_timeout")
    databases: dict[sa.Engine | sa.Connection, list[sa.Table]] = {}
    for table in metadata.tables.values():
        databases.setdefault(session.get_bind(clause=write_on(table)), []).append(table)
    for bind in databases:
        if bind.dialect.name not in ("postgresql", "sqlite"):
            raise UnsupportedDialect(f"cleanup_tables() needs PostgreSQL or SQLite, not {bind.dialect.name}.")
    if not databases:
        return
    with commits_without_a_block(session):
        for bind, tables in databases.items():
            tables.sort(key=lambda table: (table.schema or "", table.name))
            if bind.dialect.name == "postgresql":
                _clean_postgresql(session, bind, tables, milliseconds)
            else:
                _clean_sqlite(session, bind, tables)
    session.expire_all()


def _metadata_of(base: Any) -> sa.MetaData:
    metadata = base if isinstance(base, sa.MetaData) else getattr(base, "metadata", None)
    # of a table or a model all the others would be emptied too
    is_one = isinstance(base, sa.FromClause) or isinstance(sa.inspect(base, raiseerr=False), sa_orm.Mapper)
    if not isinstance(metadata, sa.MetaData) or is_one:
        raise TypeError(f"cleanup_tables() takes a declarative base or a sqlalchemy.MetaData, not {base!r}.")
    return metadata


def _clean_postgresql(
    session: sa_orm.Session, bind: sa.Engine | sa.Connection, tables: Sequence[sa.Table], milliseconds: int | None
) -> None:
    statement = ServerBlock(lambda quoting: _cleanup_block(quoting, tables, milliseconds))
    where = {"clause": write_on(tables[0])}
    with lock_timeouts("cleanup_tables()"):
        if session.in_transaction():
            with undone_on_error(session, **where):
                session.execute(statement, bind_arguments=where)
        elif isinstance(bind, sa.Connection) and bind.in_transaction():  # somebody else's
            with bind.begin_nested():
                bind.execute(statement)
        elif isinstance(session, OptInSession) or isinstance(bind, sa.Connection):
            session.execute(statement, bind_arguments=where, execution_options=_ALONE)
            if isinstance(bind, sa.Engine):
                note_write(session.info, bind)
        else:
            with connection_in_autocommit(bind) as connection:
                connection.execute(statement)


# Outside, for the opt-in session: by itself, whatever it is told of writes outside. Emptying twice does no harm.
_ALONE = {"fictive_outside": True, "fictive_writes": False}

# What belongs to the tables, what is to do, then the doing.
#
# - Referring tables and partitions belong to them.
# - A table is dirty when it has rows, or when another session has a lock on it that writers take: its rows cannot be
#   seen yet. Without pages it has no rows, which costs next to nothing to find out.
# - Small tables are emptied by one statement with a DELETE for each: foreign keys are checked when it ends, so that no
#   order is wrong. Not those on which DELETE would run triggers or rules of the user's, or could leave rows that it
#   does not see, behind row security or newer than its snapshot.
# - Locks on the tables are taken before, in one order for all, so that nothing waits for a lock on a row.
_DECLARE = """  fictive_all oid[];
  fictive_used oid[];
  fictive_dirty oid[];
  fictive_big oid[];
  fictive_moved oid[];
  fictive_sequence oid;
  fictive_names text;
  fictive_small text;
  fictive_sql text;
"""
_WORK = """  WITH RECURSIVE bond(oid, whole) AS MATERIALIZED (
    SELECT c.conrelid, c.confrelid FROM pg_constraint c WHERE c.contype = 'f'
    UNION ALL SELECT i.inhrelid, i.inhparent FROM pg_inherits i
  ), belonging(oid) AS (
    SELECT to_regclass(n)::oid FROM unnest({names}) n WHERE to_regclass(n) IS NOT NULL
    UNION
    SELECT r.oid FROM belonging b JOIN bond r ON r.whole = b.oid
  )
  SELECT array_agg(b.oid) INTO fictive_all FROM belonging b;
  SELECT array_agg(l.relation) INTO fictive_used FROM pg_locks l
    WHERE l.locktype = 'relation' AND l.relation = ANY (fictive_all) AND l.granted
      AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
      AND l.pid IS DISTINCT FROM pg_backend_pid()
      AND l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock');
  SELECT array_agg(c.oid) FILTER (WHERE hidden), array_agg(c.oid) FILTER (WHERE hidden OR used),
      string_agg('SELECT ' || c.oid || '::oid WHERE EXISTS (SELECT FROM ONLY ' || c.oid::regclass || ')',
        ' UNION ALL ') FILTER (WHERE NOT hidden AND NOT used)
    INTO fictive_big, fictive_dirty, fictive_sql
    FROM pg_class c, LATERAL (SELECT
      c.relrowsecurity OR left(current_setting('transaction_isolation'), 4) <> 'read' AS hidden,
      coalesce(c.oid = ANY (fictive_used), false) AS used) of_it
    WHERE c.oid = ANY (fictive_all) AND c.relkind = 'r' AND (used OR pg_relation_size(c.oid) > 0);
  IF fictive_sql IS NOT NULL THEN
    EXECUTE 'SELECT array_agg(oid) || $1 FROM (' || fictive_sql || ') found' INTO fictive_dirty USING fictive_dirty;
  END IF;
  SELECT array_agg(oid) FILTER (WHERE big), string_agg(name, ', ') FILTER (WHERE big),
      string_agg('ONLY ' || name, ', ' ORDER BY name) FILTER (WHERE NOT big), 'WITH '
      || string_agg('fictive_' || oid || ' AS (DELETE FROM ONLY ' || name || ')', ', ') FILTER (WHERE NOT big)
      || ' SELECT'
    INTO fictive_big, fictive_names, fictive_small, fictive_sql
    FROM (SELECT c.oid, c.oid::regclass::text AS name, coalesce(c.oid = ANY (fictive_big), false)
        OR pg_relation_size(c.oid) > {small} OR c.relhasrules OR c.relhastriggers
        AND EXISTS (SELECT FROM pg_trigger t
          WHERE t.tgrelid = c.oid AND NOT t.tgisinternal AND t.tgtype & 8 <> 0) AS big
      FROM pg_class c WHERE c.oid = ANY (fictive_dirty)) dirty;
  IF fictive_names IS NOT NULL THEN
    EXECUTE 'TRUNCATE ' || fictive_names || ' CASCADE';
  END IF;
  IF fictive_small IS NOT NULL THEN
    EXECUTE 'LOCK TABLE ' || fictive_small || ' IN EXCLUSIVE MODE';
    EXECUTE fictive_sql;
  END IF;
  SELECT array_agg(s.seqrelid ORDER BY s.seqrelid) INTO fictive_moved
    FROM pg_depend d JOIN pg_sequence s ON s.seqrelid = d.objid
    WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass
      AND d.refobjid = ANY (fictive_all) AND d.refobjsubid > 0 AND d.deptype IN ('a', 'i')
      AND pg_sequence_last_value(s.seqrelid) IS NOT NULL;
  FOREACH fictive_sequence IN ARRAY coalesce(fictive_moved, '{}'::oid[]) LOOP
    EXECUTE 'ALTER SEQUENCE ' || fictive_sequence::regclass || ' RESTART';
  END LOOP;
"""
_IN_THE_WAY = """l.locktype = 'relation' AND l.relation = ANY (fictive_all || fictive_moved) AND (
        l.mode = 'AccessExclusiveLock' OR l.relation = ANY (fictive_big)
        OR l.mode <> 'AccessShareLock' AND l.relation = ANY (fictive_dirty || fictive_moved))"""


def _cleanup_block(quoting: Quoting, tables: Sequence[sa.Table], milliseconds: int | None) -> str:
    names = quoting.array(quoting.table(table) for table in tables)
    patience = f" within {milliseconds} ms" if milliseconds else " within lock_timeout"
    return waiting_block(
        _DECLARE,
        _WORK.replace("{small}", str(SMALL)).replace("{names}", names),
        milliseconds=milliseconds,
        complaint=quoting.text("the tables cannot be emptied" + patience),
        in_the_way=_IN_THE_WAY,
    )


def _clean_sqlite(session: sa_orm.Session, bind: sa.Engine | sa.Connection, tables: Sequence[sa.Table]) -> None:
    if session.in_transaction() or isinstance(bind, sa.Connection):
        _delete_all(session.connection(bind_arguments={"clause": write_on(tables[0])}), tables)
    else:
        with bind.begin() as connection:
            _delete_all(connection, tables)


def _delete_all(connection: sa.Connection, tables: Sequence[sa.Table]) -> None:
    dbapi = dbapi_connection(connection)
    if not dbapi.in_transaction:  # Python's module begins before INSERT, UPDATE and DELETE only, and only by default
        connection.exec_driver_sql("BEGIN")
    # foreign keys that go in circles are checked at COMMIT (SQLite documentation, "Foreign Key Support", 4.2)
    connection.exec_driver_sql("PRAGMA defer_foreign_keys = ON")
    by_schema: dict[str | None, set[str]] = {}
    for table in tables:
        if table.schema not in by_schema:
            master = sa.table("sqlite_master", sa.column("name"), sa.column("type"), schema=table.schema)
            by_schema[table.schema] = set(connection.scalars(sa.select(master.c.name).where(master.c.type == "table")))
    present = [table for table in tables if table.name in by_schema[table.schema]]
    in_order: Any = sort_tables_and_constraints(present)  # type: ignore[no-untyped-call]
    for table in [table for table, _ in in_order if table is not None][::-1]:
        connection.execute(sa.delete(table))
    for schema, names in by_schema.items():
        if "sqlite_sequence" in names:
            sequence = sa.table("sqlite_sequence", sa.column("name"), schema=schema)
            connection.execute(
                sa.delete(sequence).where(sequence.c.name.in_([t.name for t in present if t.schema == schema]))
            )

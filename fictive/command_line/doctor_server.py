"""What `doctor` finds in a PostgreSQL database: its catalogs, and who holds up whom at the moment.

PostgreSQL documentation: "System Catalogs", "Routine Database Maintenance Tasks", "The Cumulative Statistics System".
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy as sa

from .activity import Row, activity, blocker_tree
from .findings import Finding, Severity

__all__ = ["catalog_findings", "session_findings"]

LONG_TRANSACTION = 300.0
"""Seconds after which a transaction that is busy is called long."""
_MOST_QUERY = 120

_USER_SCHEMA = "n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast') AND n.nspname NOT LIKE 'pg\\_temp%%'"
_NOT_OF_EXTENSION = (
    "NOT EXISTS (SELECT FROM pg_depend e"
    " WHERE e.classid = 'pg_class'::regclass AND e.objid = c.oid AND e.deptype = 'e')"
)

_CHECKS: list[tuple[str, Severity, str, str, str]] = [
    (
        "foreign-key-index",
        Severity.WARNING,
        f"""
        SELECT c.oid::regclass AS tab, k.conname, k.confrelid::regclass AS target,
            (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY p.n)
              FROM unnest(k.conkey) WITH ORDINALITY p(num, n)
              JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = p.num) AS cols
          FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
          WHERE k.contype = 'f' AND k.conparentid = 0 AND {_USER_SCHEMA} AND NOT EXISTS (
            SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisvalid
              AND (i.indkey::int2[])[0:cardinality(k.conkey) - 1] @> k.conkey
              AND (i.indpred IS NULL OR pg_get_expr(i.indpred, i.indrelid) LIKE '%%IS NOT NULL%%'))
          ORDER BY 1, 2
        """,
        "{tab}({cols}) refers to {target} and has no index: each DELETE or key change there reads all of {tab}, "
        "and joins have no index to use.",
        "CREATE INDEX CONCURRENTLY ON {tab} ({cols}); in the model, index=True.",
    ),
    (
        "invalid-index",
        Severity.ERROR,
        f"""
        SELECT i.indexrelid::regclass AS idx, c.oid::regclass AS tab
          FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace
          WHERE NOT (i.indisvalid AND i.indisready) AND {_USER_SCHEMA} AND c.relkind <> 'p'
            AND NOT EXISTS (SELECT FROM pg_stat_progress_create_index g WHERE g.index_relid = i.indexrelid)
          ORDER BY 1
        """,
        "The index {idx} of {tab} is invalid: a CREATE INDEX CONCURRENTLY failed. Queries do not use it, writes pay "
        "for it, and a unique one may let duplicates through.",
        "DROP INDEX CONCURRENTLY {idx}, then create it again (or REINDEX INDEX CONCURRENTLY {idx}).",
    ),
    (
        "duplicate-index",
        Severity.WARNING,
        f"""
        SELECT c.oid::regclass AS tab, string_agg(i.indexrelid::regclass::text, ', ' ORDER BY i.indexrelid) AS idx
          FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace
          WHERE i.indisvalid AND {_USER_SCHEMA}
          GROUP BY c.oid, i.indkey::text, i.indclass::text, i.indcollation::text, i.indoption::text,
            coalesce(pg_get_expr(i.indexprs, i.indrelid), ''), coalesce(pg_get_expr(i.indpred, i.indrelid), ''),
            (SELECT relam FROM pg_class WHERE oid = i.indexrelid)
          HAVING count(*) > 1 ORDER BY 1
        """,
        "{tab} has the same index more than once: {idx}.",
        "Drop all but one; keep the one that is unique or belongs to a constraint.",
    ),
    (
        "not-valid",
        Severity.WARNING,
        f"""
        SELECT c.oid::regclass AS tab, quote_ident(k.conname) AS con
          FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
          WHERE NOT k.convalidated AND {_USER_SCHEMA} ORDER BY 1, 2
        """,
        "The constraint {con} of {tab} is NOT VALID: rows from before may break it, and the planner ignores it.",
        "ALTER TABLE {tab} VALIDATE CONSTRAINT {con};",
    ),
    (
        "primary-key",
        Severity.WARNING,
        f"""
        SELECT c.oid::regclass AS tab FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
          WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND {_USER_SCHEMA} AND {_NOT_OF_EXTENSION}
            AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary)
          ORDER BY 1
        """,
        "{tab} has no primary key: the same row can be there twice, and logical replication cannot change it.",
        "ALTER TABLE {tab} ADD PRIMARY KEY (...); for a link table its two foreign keys.",
    ),
    (
        "sequence",
        Severity.WARNING,
        """
        SELECT quote_ident(s.schemaname) || '.' || quote_ident(s.sequencename) AS seq, o.tab, o.col,
            round(100.0 * s.last_value / o.most) AS used
          FROM pg_sequences s, LATERAL (
            SELECT d.refobjid::regclass AS tab, quote_ident(a.attname) AS col,
                least(s.max_value, CASE a.atttypid WHEN 'int2'::regtype THEN 32767 WHEN 'int4'::regtype THEN 2147483647
                  ELSE 9223372036854775807 END) AS most
              FROM pg_depend d JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
              WHERE d.classid = 'pg_class'::regclass AND d.refobjsubid > 0 AND d.deptype IN ('a', 'i')
                AND d.objid = to_regclass(quote_ident(s.schemaname) || '.' || quote_ident(s.sequencename))) o
          WHERE s.last_value > 0.75 * o.most AND NOT s.cycle ORDER BY 1
        """,
        "The sequence {seq} has used {used} % of what {tab}.{col} can hold: inserts fail at the end of it.",
        "ALTER TABLE {tab} ALTER COLUMN {col} TYPE bigint (which rewrites the table), and the sequence AS bigint.",
    ),
    (
        "disabled-trigger",
        Severity.WARNING,
        f"""
        SELECT c.oid::regclass AS tab, quote_ident(t.tgname) AS trg
          FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
          WHERE t.tgenabled = 'D' AND {_USER_SCHEMA} ORDER BY 1, 2
        """,
        "The trigger {trg} of {tab} is disabled. (For one of a foreign key: the key is not checked.)",
        "ALTER TABLE {tab} ENABLE TRIGGER {trg}; and see that the rows written meanwhile are right.",
    ),
    (
        "prepared-transaction",
        Severity.ERROR,
        """
        SELECT gid, date_trunc('second', clock_timestamp() - prepared) AS age FROM pg_prepared_xacts
          WHERE database = current_database() AND prepared < clock_timestamp() - interval '{patience} seconds'
          ORDER BY prepared
        """,
        "The prepared transaction {gid!r} has waited for {age}: it holds its locks and keeps VACUUM from cleaning up.",
        "COMMIT PREPARED '{gid}' or ROLLBACK PREPARED '{gid}'.",
    ),
    (
        "wraparound",
        Severity.ERROR,
        "SELECT age(datfrozenxid) AS age FROM pg_database"
        " WHERE datname = current_database() AND age(datfrozenxid) > 1000000000",
        "The oldest transaction number is {age} transactions old; at 2 billion the server stops taking writes.",
        "Find what holds up VACUUM (long and prepared transactions, replication slots), then VACUUM FREEZE.",
    ),
    (
        "replication-slot",
        Severity.WARNING,
        "SELECT slot_name, pg_size_pretty(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)) AS kept"
        " FROM pg_replication_slots WHERE NOT active AND NOT pg_is_in_recovery() ORDER BY 1",
        "Nobody reads the replication slot {slot_name!r}; the server keeps {kept} of WAL for it, and more each day.",
        "Start its reader, or SELECT pg_drop_replication_slot('{slot_name}').",
    ),
    (
        "encoding",
        Severity.WARNING,
        "SELECT pg_encoding_to_char(encoding) AS encoding FROM pg_database"
        " WHERE datname = current_database() AND pg_encoding_to_char(encoding) = 'SQL_ASCII'",
        "The database's encoding is {encoding}: the server stores any bytes unchecked.",
        "Make a database with encoding UTF8, and copy the data there.",
    ),
]  # fmt: skip
_COLLATION = (
    "SELECT datcollversion AS was, pg_database_collation_actual_version(oid) AS now FROM pg_database"
    " WHERE datname = current_database() AND datcollversion <> pg_database_collation_actual_version(oid)"
)


def catalog_findings(engine: sa.Engine) -> Iterator[Finding]:
    """What is wrong with tables, indexes, constraints and the database itself. A query for each check, no locks."""
    with engine.connect() as connection:
        version = connection.exec_driver_sql("SELECT current_setting('server_version_num')::int").scalar_one()
        for check, severity, query, what, remedy in _CHECKS:
            query = query.replace("{patience}", "1")
            for row in connection.exec_driver_sql(query).mappings():
                yield Finding(check, severity, what.format(**row), remedy.format(**row))
        if version >= 150000:
            for row in connection.exec_driver_sql(_COLLATION).mappings():
                yield Finding(
                    "collation",
                    Severity.ERROR,
                    "The operating system's collations changed from version {was} to {now}: indexes on text may be "
                    "in the wrong order, so that rows are not found and duplicates get in.".format(**row),
                    "REINDEX DATABASE, then ALTER DATABASE ... REFRESH COLLATION VERSION.",
                )


def session_findings(engine: sa.Engine, *, patience: float) -> Iterator[Finding]:
    """Who is idle in a transaction, who blocks whom, and whose transaction is old.

    Two looks, `patience` seconds apart. What was as it is for less than `patience` seconds is not found: a busy
    server has such for moments all the time.
    """
    first = {row["pid"]: row for row in activity(engine)}
    rows = list(first.values())
    ages = [row["state_seconds"] or 0.0 for row in rows if row["blocked_by"] or _is_idle(row)]
    if ages:
        time.sleep(max(0.0, patience - min(ages)))
        rows = activity(engine)
    in_tree = {row["pid"] for row in blocker_tree(rows)}
    for row in rows:
        if _is_idle(row) and (row["state_seconds"] or 0.0) >= patience:
            yield Finding(
                "idle-in-transaction",
                Severity.WARNING,
                f"{_who(row)} is idle in a transaction for {row['state_seconds']:.0f} s"
                + (", blocks others" if row["pid"] in in_tree else "")
                + f"; its last statement: {_query(row)}",
                "Commit before calling anything slow; set idle_in_transaction_session_timeout. To end it: "
                f"SELECT pg_terminate_backend({row['pid']}).",
            )
        elif not _is_idle(row) and (row["transaction_seconds"] or 0.0) >= LONG_TRANSACTION:
            yield Finding(
                "long-transaction",
                Severity.WARNING,
                f"{_who(row)} is in a transaction for {row['transaction_seconds']:.0f} s: {_query(row)}",
                "VACUUM cannot remove what this transaction may see, and its locks are held.",
            )
    waited = {pid for pid, row in first.items() if row["blocked_by"]}
    yield from _blocked(rows, waited, patience)


def _blocked(rows: list[Row], waited: set[int], patience: float) -> Iterator[Finding]:
    tree = list(blocker_tree(rows))
    at = 0
    while at < len(tree):
        end = at + 1
        while end < len(tree) and tree[end]["depth"] > 0:
            end += 1
        part = tree[at:end]
        blocked = [row for row in part[1:] if row["pid"] in waited and (row.get("state_seconds") or 0.0) >= patience]
        if blocked:
            lines = "\n".join("  " * (row["depth"] + 1) + f"{_who(row)}: {_query(row)}" for row in part)
            others = f"{len(part) - 1} {'session' if len(part) == 2 else 'sessions'}"
            yield Finding(
                "blocked",
                Severity.WARNING,
                f"pid {part[0]['pid']} blocks {others}:\n{lines}",
                f"Let it end, or SELECT pg_terminate_backend({part[0]['pid']}).",
            )
        at = end


def _is_idle(row: Mapping[str, Any]) -> bool:
    return str(row["state"] or "").startswith("idle in transaction")


def _who(row: Mapping[str, Any]) -> str:
    known = [row.get(name) for name in ("user", "application", "address")]
    if endpoint := row.get("endpoint"):
        known.append(f"endpoint {endpoint}")
    parts = ", ".join(str(each) for each in known if each)
    return f"pid {row['pid']}" + (f" ({parts})" if parts else "")


def _query(row: Mapping[str, Any]) -> str:
    text = " ".join(str(row.get("query") or "").split())
    return text if len(text) <= _MOST_QUERY else text[: _MOST_QUERY - 1] + "…"

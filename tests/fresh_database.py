"""A database for each test that is like new: the worker's last one if a look at it says so, else a new clone.

A clone costs more than most tests do. So what a test leaves is looked at: when all system catalogs are as the clone
had them, to the last row version, only rows and sequences can differ, and emptying them makes it new. On any doubt the
database is dropped and cloned again.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import psycopg
from psycopg import sql
from pytest_postgresql.janitor import DatabaseJanitor

from fictive.testing import postgres

# How long a backend may take to go after its client went, or after it was told to, in seconds.
PATIENCE = 5.0

# What a test may not leave behind in its database. Backends whose clients have just gone are gone soon.
OWN = "select oid from pg_database where datname = current_database()"

# Who waits for a lock in it; the lock of a row, which is a transaction's, is of no database.
WAITING = """
select pid from pg_locks where not granted
and pid in (select pid from pg_stat_activity where datname = current_database())
"""

# What shows every change to a catalog: each row version has the transaction that made it, so the newest one changes
# or the number of rows does. age() spares the cast of xmin, 20,000 of them.
TRACE = "count(*), age('3'::xid) - nullif(min(age(xmin)), 2147483647)"  # that age is for ever

LEFT_BEHIND = f"""
select 'an advisory lock held by process ' || pid from pg_locks
where locktype = 'advisory' and database = ({OWN})
union all
select format('process %s, %s: %s', pid, state, query) from pg_stat_activity
where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'
and (state like 'idle in transaction%' or query ~* '^\\s*listen\\M')
union all
select 'prepared transaction ' || gid from pg_prepared_xacts where database = current_database()
"""

OTHERS = """
select pg_terminate_backend(pid) from pg_stat_activity
where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'
"""

# DISCARD ALL but for prepared statements: ours are to stay.
NOTHING_SET = """
set session authorization default; reset all; close all; unlisten *; select pg_advisory_unlock_all();
discard plans; discard temp; discard sequences
"""

CATALOGS = """
select oid::regclass::text from pg_class
where relnamespace = 'pg_catalog'::regnamespace and relkind = 'r' and not relisshared order by 1
"""

TABLES = "select format('%I.%I', schemaname, tablename) from pg_tables where schemaname = 'public' order by 1"
SEQUENCES = "select format('%I.%I', schemaname, sequencename) from pg_sequences where schemaname = 'public'"


class FreshDatabase:
    """One worker's database, cloned from `template` and handed to one test after the other."""

    def __init__(self, pg: postgres.Server, template: DatabaseJanitor, suffix: str = "") -> None:
        self._pg = pg
        self._janitor = Janitor(
            user=pg.user,
            host=pg.host,
            port=pg.port,
            dbname=template.dbname.replace("_template", "_test") + suffix,
            password=pg.password,
            template_dbname=template.dbname,
        )
        self._janitor.by_files = pg.version >= 150000
        self._connection: psycopg.Connection[Any] | None = None
        self._looks_new: dict[str, Any] | None = None
        self.clones = 0

    @property
    def name(self) -> str:
        return self._janitor.dbname

    @property
    def connection(self) -> psycopg.Connection[Any]:
        """The connection beside the test's own, in autocommit."""
        assert self._connection is not None
        return self._connection

    def ensure(self) -> None:
        """Clone it where there is none."""
        if self._looks_new is None:
            self.drop()
            self._janitor.init()
            self.clones += 1
            # never prepared by itself: a plan would outlive the tables of the test that it was made for
            self._connection = psycopg.connect(self._pg.url(self.name), autocommit=True, prepare_threshold=None)
            self._find_out()
            self._looks_new = self._catalogs()

    def left_behind(self, patience: float = PATIENCE) -> list[str]:
        """What the test left that it may not leave, in words. Price: one round trip when there is nothing."""
        deadline = time.monotonic() + patience
        while found := self._ask_left_behind():
            if time.monotonic() > deadline:
                return found
            time.sleep(0.01)
        return []

    def _ask_left_behind(self) -> list[str]:
        try:
            return [row[0] for row in self.connection.execute(LEFT_BEHIND)]
        except psycopg.OperationalError:  # the test ended all connections, or dropped the database
            pass
        with contextlib.suppress(psycopg.OperationalError):
            with psycopg.connect(self._pg.url(self.name), autocommit=True) as connection:
                return [row[0] for row in connection.execute(LEFT_BEHIND)]
        return []

    def renew(self) -> None:
        """Make it new again after a test, or see to it that the next test gets another."""
        expected, self._looks_new = self._looks_new or {}, None
        with contextlib.suppress(psycopg.Error, TimeoutError):  # in doubt: a new one
            self.connection.rollback()
            self.connection.execute(NOTHING_SET)
            self._end_others()
            if self._catalogs() == expected:
                self._looks_new = expected | self._empty()

    def drop(self) -> None:
        self._looks_new = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
            self._janitor.drop()

    def _find_out(self) -> None:
        """Write the query that is asked after each test; its names are those of this clone."""
        names = [row[0] for row in self.connection.execute(CATALOGS)]
        each = [f"select '{name}', {TRACE} from {name}" for name in names]
        each.append(f"select 'settings', {TRACE} from pg_db_role_setting where setdatabase in ({OWN})")
        each.append(f"select 'database', {TRACE} from pg_database where oid in ({OWN})")
        self._ask_catalogs = " union all ".join(each).encode()
        tables = [row[0] for row in self.connection.execute(TABLES)]
        self._ask_touched = " union all ".join(
            f"select '{name}' where pg_relation_size('{name}') > 0" for name in tables
        ).encode()
        sequences = [row[0] for row in self.connection.execute(SEQUENCES)]
        resets = ", ".join(f"setval('{name}', 1, false)" for name in sequences)
        self._reset = f"select {resets}".encode()

    def _catalogs(self) -> dict[str, Any]:
        return {name: trace for name, *trace in self.connection.execute(self._ask_catalogs, prepare=True)}

    def _end_others(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.connection.execute(OTHERS).fetchall():
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(0.002)

    def _empty(self) -> dict[str, Any]:
        """Empty all tables; return what that changed in the catalogs.

        Truncated, not deleted: rows then come out in the order they went in, as in a new table.
        """
        touched = [row[0] for row in self.connection.execute(self._ask_touched, prepare=True)]
        if touched:
            self.connection.execute(f"truncate {', '.join(touched)} cascade".encode())
        self.connection.execute(self._reset)
        if not touched:
            return {}
        row = self.connection.execute(f"select {TRACE} from pg_class").fetchone()
        return {"pg_class": list(row or ())}


class Janitor(DatabaseJanitor):
    """pytest-postgresql's, copying files where the server can: half the time of writing them into its log."""

    by_files = False

    def _build_create_database_sql(self) -> sql.Composed:
        query = super()._build_create_database_sql()
        return query + sql.SQL(" STRATEGY file_copy") if self.by_files else query

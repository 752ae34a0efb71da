"""Emptying 50 tables of which 3 have rows: `cleanup_tables()` against TRUNCATE and DELETE of all.

`python -m benchmarks.cleanup [--smoke]`
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import sqlalchemy as sa

from fictive.sqlalchemy import OptInSession, cleanup_tables, create_database, drop_database
from fictive.testing import postgres

TABLES = 50
DIRTY = 3


def schema(tables: int) -> sa.MetaData:
    """Tables with a sequence and an index each; every fifth refers to the one before it."""
    metadata = sa.MetaData()
    for number in range(tables):
        parts: list[sa.Column[int] | sa.Column[str]] = [
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("name", sa.Text, index=True),
        ]
        if number % 5 == 4:
            parts.append(sa.Column("parent_id", sa.ForeignKey(f"t{number - 1}.id"), index=True))
        sa.Table(f"t{number}", metadata, *parts)
    return metadata


def measure(session: OptInSession, metadata: sa.MetaData, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way, the shortest first, taking turns."""
    names = ", ".join(metadata.tables)
    deletes = [sa.delete(table) for table in reversed(metadata.sorted_tables)]

    def delete_all() -> None:
        with session.begin():
            for statement in deletes:
                session.execute(statement)

    ways: dict[str, Callable[[], object]] = {
        "cleanup_tables": lambda: cleanup_tables(session, metadata),
        "TRUNCATE of all": lambda: session.execute(sa.text(f"TRUNCATE {names} RESTART IDENTITY CASCADE")),
        "DELETE of each": delete_all,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    tables = list(metadata.tables.values())
    for number in range(rounds):
        for name, way in ways.items():
            with session.begin():
                for offset in range(DIRTY):
                    table = tables[(number * DIRTY + offset * 7) % len(tables)]
                    session.execute(sa.insert(table), [{"name": f"row {n}"} for n in range(10)])
            begun = time.perf_counter()
            way()
            times[name].append((time.perf_counter() - begun) * 1000)
    return {name: sorted(taken) for name, taken in times.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--driver", choices=("psycopg2", "psycopg"), default="psycopg2")
    parser.add_argument("--smoke", action="store_true", help="few tables, to see that it runs")
    options = parser.parse_args(arguments)
    tables, rounds = (6, 2) if options.smoke else (TABLES, 30)
    with postgres.server() if options.smoke else postgres.private_server() as server:
        name = "fictive_benchmark_cleanup"
        drop_database(name, server_url=server.url(), force=True, missing_ok=True)
        create_database(name, server_url=server.url())
        engine = sa.create_engine(server.url(name, driver=options.driver))
        try:
            metadata = schema(tables)
            metadata.create_all(engine)
            with OptInSession(engine) as session:
                found = measure(session, metadata, rounds)
        finally:
            engine.dispose()
            drop_database(name, server_url=server.url(), force=True)
    print(f"{tables} tables, {DIRTY} of them with 10 rows:")
    first = found["cleanup_tables"]
    for name, taken in found.items():
        median = statistics.median(taken)
        print(
            f"  {name:20} median {median:6.1f} ms, {median / statistics.median(first):5.1f} times;"
            f" fastest {taken[0]:6.1f} ms, {taken[0] / first[0]:5.1f} times"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

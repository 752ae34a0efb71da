"""BEGIN with the statement after it on psycopg 3, the ways it can be sent: `python docs/measure_psycopg.py`.

Needs the extras `psycopg` and `embedded`. Prints what docs/round-trips.rst shows. Timed is the wait for the row: from
the call until the row of the statement has been fetched and the connection is ready for the next one. The ROLLBACK
afterwards is not timed. The ways take turns within each round, so that whatever drifts meets all of them alike.
"""

from __future__ import annotations

import os
import platform
import select
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from psycopg import pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.proxy import delayed
from fictive.drivers.riding_psycopg import RidingConnection
from fictive.testing import postgres
from fictive.testing.wire import Wire

INSERT = "INSERT INTO note (owner, words) VALUES ({}, {}) RETURNING id", (7, "milk, bread")
JOIN = (
    "SELECT n.id, o.name, c.name FROM note n JOIN owner o ON o.id = n.owner JOIN city c ON c.id = o.city"
    " WHERE n.id = {} AND c.name <> {}",
    (3, "nowhere"),
)
WARM = 20  # psycopg prepares a statement on its sixth run
EACH = 20
Statement = tuple[str, tuple[object, ...]]


class AsItIs:
    title = "a  psycopg as it is"

    def __init__(self, url: str) -> None:
        self.connection: Any = psycopg.connect(url)

    def run(self, statement: Statement) -> Any:
        return self.connection.execute(statement[0].format("%s", "%s"), statement[1]).fetchone()

    def end(self) -> None:
        self.connection.rollback()


class OneMessage(AsItIs):
    title = "b  one simple message, values bound by the client"

    def __init__(self, url: str) -> None:
        self.connection = psycopg.connect(url, autocommit=True, cursor_factory=psycopg.ClientCursor)

    def run(self, statement: Statement) -> Any:
        cursor = self.connection.execute("BEGIN; " + statement[0].format("%s", "%s"), statement[1])
        cursor.nextset()
        return cursor.fetchone()

    def end(self) -> None:
        self.connection.execute("ROLLBACK")


class Pipeline(AsItIs):
    title = "c  pipeline mode, connection.pipeline()"

    def run(self, statement: Statement) -> Any:
        with self.connection.pipeline():
            return self.connection.execute(statement[0].format("%s", "%s"), statement[1]).fetchone()


class OneSync(AsItIs):
    """Without psycopg's conversions and checks: no less than what any code around it would take."""

    title = "d  pipeline mode, by pgconn, one sync"

    def __init__(self, url: str) -> None:
        self.connection = psycopg.connect(url, autocommit=True)
        self.poll = select.poll()
        self.poll.register(self.connection.fileno(), select.POLLIN)

    def run(self, statement: Statement) -> Any:
        server = self.connection.pgconn
        server.enter_pipeline_mode()
        server.send_query_params(b"BEGIN", None)
        values = [str(value).encode() for value in statement[1]]
        server.send_query_params(statement[0].format("$1", "$2").encode(), values)
        server.pipeline_sync()
        while server.flush():
            pass
        row = None
        while True:
            while server.is_busy():  # without waiting in libpq, which would keep the GIL
                self.poll.poll()
                server.consume_input()
            result = server.get_result()
            if result is None:
                continue  # the end of one statement's results
            if result.status == pq.ExecStatus.PIPELINE_SYNC:
                break
            if result.ntuples:
                row = [result.get_value(0, column) for column in range(result.nfields)]
        server.exit_pipeline_mode()
        return row

    def end(self) -> None:
        self.connection.execute("ROLLBACK")


class Fictive(AsItIs):
    title = "   fictive's connection, which does d"

    def __init__(self, url: str) -> None:
        self.connection = RidingConnection.connect(url)


WAYS: list[Callable[[str], Any]] = [AsItIs, OneMessage, Pipeline, OneSync, Fictive]


def main() -> None:
    with postgres.server() as pg:
        name = f"ways_{uuid.uuid4().hex[:8]}"
        with psycopg.connect(pg.url(), autocommit=True) as maintenance:
            maintenance.execute(f'CREATE DATABASE "{name}"')
            try:
                with psycopg.connect(pg.url(name)) as connection:
                    fill(connection)
                    (version,) = connection.execute("SHOW server_version").fetchone() or ("",)
                print(
                    f"Python {platform.python_version()}, psycopg {psycopg.__version__} ({pq.__impl__}), libpq "
                    f"{pq.version_pretty(pq.version())}, PostgreSQL {version.split()[0]}, {os.cpu_count()} cores"
                )
                measure(pg, pg.url(name))
            finally:
                maintenance.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def fill(connection: psycopg.Connection[Any]) -> None:
    connection.execute("CREATE TABLE city (id int PRIMARY KEY, name text)")
    connection.execute("CREATE TABLE owner (id int PRIMARY KEY, name text, city int REFERENCES city)")
    connection.execute("CREATE TABLE note (id serial PRIMARY KEY, owner int REFERENCES owner, words text)")
    connection.execute("INSERT INTO city SELECT n, 'city ' || n FROM generate_series(1, 100) n")
    connection.execute("INSERT INTO owner SELECT n, 'owner ' || n, n % 100 + 1 FROM generate_series(1, 1000) n")
    connection.execute("INSERT INTO note (owner, words) SELECT n % 1000 + 1, 'x' FROM generate_series(1, 10000) n")
    connection.commit()
    connection.autocommit = True
    connection.execute("ANALYZE")


def measure(pg: postgres.Server, url: str) -> None:
    with Wire(pg.host, pg.port) as wire:
        print("\nReadyForQuery messages from the server until the row is there")
        for make in WAYS:
            way = make(wire.url(url))
            for _ in range(WARM):
                way.run(INSERT)
                way.end()
            with wire.record() as log:
                way.run(INSERT)
            print(f"{way.title:<52}{log.round_trips:>3}")
            way.connection.close()
    for statement, what in (
        (INSERT, "BEGIN, INSERT … RETURNING"),
        (JOIN, "BEGIN, SELECT over a join of three tables"),
    ):
        time_all(url, statement, f"{what}, loopback", rounds=100)
        with delayed(url, 0.0005) as far:
            time_all(far.render_as_string(hide_password=False), statement, f"{what}, 0.5 ms each way", rounds=25)


def time_all(url: str, statement: Statement, title: str, rounds: int) -> None:
    ways = [make(url) for make in WAYS]
    for way in ways:
        for _ in range(WARM):
            way.run(statement)
            way.end()
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, times in zip(ways, taken, strict=True):
            for _ in range(EACH):
                start = time.perf_counter()
                way.run(statement)
                times.append(time.perf_counter() - start)
                way.end()
    for way in ways:
        way.connection.close()
    print(f"\n{title}: microseconds, of {rounds * EACH} each; how many times as fast as a")
    print(f"{'':<52}{'quartile':>9}{'median':>9}{'quartile':>9}{'':>9}")
    first = statistics.median(taken[0])
    for way, times in zip(ways, taken, strict=True):
        low, middle, high = (part * 1e6 for part in statistics.quantiles(times, n=4))
        print(f"{way.title:<52}{low:>9.0f}{middle:>9.0f}{high:>9.0f}{first * 1e6 / middle:>9.2f}")


if __name__ == "__main__":
    main()

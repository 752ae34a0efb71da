"""What isolating a test adds to it: the sandbox, `cleanup_tables()`, `create_all()` and `drop_all()`, Django's way.

A test of 4 statements on a database of 50 tables. The ways take turns, each compared with no isolation. Django's is
what pytest-django's `db` does, a class of one test, which connects anew. Also how long a copy of the template takes.

`python -m benchmarks.sandbox [--driver psycopg] [--tests 500] [--smoke]`
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import sqlalchemy as sa

from fictive.sqlalchemy import OptInSession, cleanup_tables, create_database, drop_database
from fictive.testing import postgres
from fictive.testing.sandbox import sandbox

from .cleanup import TABLES, schema

NAME = "fictive_benchmark_sandbox"
SLOW = 20  # how many of the tests are run with create_all() and drop_all()


def body(engine: sa.Engine, table: sa.Table) -> None:
    """The test: one statement outside, a block of two, a look."""
    with OptInSession(engine) as session:
        session.execute(sa.insert(table).values(name="outside"))
        with session.begin():
            session.execute(sa.insert(table).values(name="first"))
            session.execute(sa.insert(table).values(name="second"))
        session.execute(sa.select(table.c.name)).all()


def measure(engine: sa.Engine, metadata: sa.MetaData, tests: int, *, django: bool) -> dict[str, list[float]]:
    """Milliseconds of each test, by way."""
    table = next(iter(metadata.tables.values()))

    def in_sandbox() -> None:
        with sandbox(engine):
            body(engine, table)

    def cleaned() -> None:
        body(engine, table)
        with OptInSession(engine) as session:
            cleanup_tables(session, metadata)

    def made() -> None:
        metadata.create_all(engine)
        body(engine, table)
        metadata.drop_all(engine)

    before: dict[str, Callable[[], object]] = {}
    ways: dict[str, Callable[[], None]] = {
        "nothing": lambda: body(engine, table),
        "sandbox": in_sandbox,
        "cleanup_tables": cleaned,
    }
    if django:
        ways |= django_ways(engine, table)
        from django.db import connection

        before = {"Django, nothing": connection.ensure_connection, "Django's TestCase": connection.close}
    found: dict[str, list[float]] = {name: [] for name in [*ways, "create_all, drop_all"]}
    for number in range(tests + 1):
        for name, way in ways.items():
            before.get(name, int)()
            begun = time.perf_counter()
            way()
            if number:  # the first one prepares
                found[name].append((time.perf_counter() - begun) * 1000)
            if name != "cleanup_tables":
                with engine.begin() as emptying:
                    emptying.execute(sa.delete(table))
    metadata.drop_all(engine)
    for _ in range(min(SLOW, tests)):
        begun = time.perf_counter()
        made()
        found["create_all, drop_all"].append((time.perf_counter() - begun) * 1000)
    metadata.create_all(engine)
    return found


def django_ways(engine: sa.Engine, table: sa.Table) -> dict[str, Callable[[], None]]:
    """The same 4 statements by Django's cursor, without isolation and in a `TestCase`."""
    import django
    from django.conf import settings

    url = engine.url
    database = {"ENGINE": "django.db.backends.postgresql", "NAME": url.database, "USER": url.username,
                "PASSWORD": url.password, "HOST": url.host, "PORT": url.port}  # fmt: skip
    settings.configure(DATABASES={"default": database}, USE_TZ=True)
    django.setup()
    from django.db import connection, transaction
    from django.test import TestCase

    class One(TestCase):
        pass

    def django_body() -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"INSERT INTO {table.name} (name) VALUES ('outside')")
            with transaction.atomic():
                cursor.execute(f"INSERT INTO {table.name} (name) VALUES ('first')")
                cursor.execute(f"INSERT INTO {table.name} (name) VALUES ('second')")
            cursor.execute(f"SELECT name FROM {table.name}")
            cursor.fetchall()

    def in_test_case() -> None:  # as pytest-django's fixture `db`
        One.setUpClass()
        case = One(methodName="__init__")
        case._pre_setup()
        django_body()
        case._post_teardown()
        One.tearDownClass()
        One.doClassCleanups()

    return {"Django, nothing": django_body, "Django's TestCase": in_test_case}


def added_by(found: dict[str, list[float]], name: str, pick: Callable[[list[float]], float]) -> float:
    """What a way adds to the test: in the median, compared within each round, in which all take their turn."""
    base = found["Django, nothing" if name.startswith("Django") else "nothing"]
    taken = found[name]
    if pick is min or len(taken) != len(base):
        return pick(taken) - pick(base)
    return pick([one - other for one, other in zip(taken, base, strict=True)])


def copies(server_url: str, rounds: int) -> list[float]:
    """Milliseconds for a worker's database from the template."""
    found = []
    for _ in range(rounds):
        begun = time.perf_counter()
        create_database(f"{NAME}_copy", server_url=server_url, template=NAME)
        found.append((time.perf_counter() - begun) * 1000)
        drop_database(f"{NAME}_copy", server_url=server_url, force=True)
    return found


def import_of_the_plugin() -> float:
    """Milliseconds that pytest needs to load the plugin of a project that does not use it."""
    code = (
        "import pytest, time; t = time.perf_counter(); import fictive.testing.plugin; print(time.perf_counter() - t)"
    )
    done = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(3)]
    return min(map(float, done)) * 1000


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--driver", choices=("psycopg2", "psycopg"), default="psycopg2")
    parser.add_argument("--tests", type=int, default=500)
    parser.add_argument("--smoke", action="store_true", help="few tables, to see that it runs")
    options = parser.parse_args(arguments)
    tables, tests, rounds = (6, 3, 1) if options.smoke else (TABLES, options.tests, 10)
    with postgres.server() if options.smoke else postgres.private_server() as server:
        drop_database(NAME, server_url=server.url(), force=True, missing_ok=True)
        create_database(NAME, server_url=server.url())
        engine = sa.create_engine(server.url(NAME, driver=options.driver))
        try:
            metadata = schema(tables)
            metadata.create_all(engine)
            django = not options.smoke and importlib.util.find_spec("django") is not None
            found = measure(engine, metadata, tests, django=django)
            engine.dispose()
            if "Django, nothing" in found:
                from django.db import connection

                connection.close()
            copied = copies(server.url(), rounds)
        finally:
            engine.dispose()
            drop_database(NAME, server_url=server.url(), force=True)
    print(f"{tests} tests on {tables} tables, {options.driver}; milliseconds, and how many times the sandbox's:")
    print(f"  {'':22} {'median':>8} {'added':>8} {'times':>6} {'fastest':>8} {'added':>8} {'times':>6}")
    for name, taken in found.items():
        line = f"  {name:22}"
        for pick in (statistics.median, min):
            added, own = added_by(found, name, pick), added_by(found, "sandbox", pick)
            line += f" {pick(taken):8.2f} {added:8.2f} {added / own if own > 0 else math.inf:6.1f}"
        print(line)
    print(f"  a copy of the template {statistics.median(copied):7.1f}, slowest {max(copied):.1f}")
    print(f"  importing the plugin   {import_of_the_plugin():7.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

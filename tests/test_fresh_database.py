"""Tests are only as good as the database that they start with."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import psycopg
import pytest
from pytest_postgresql.janitor import DatabaseJanitor

from fictive.testing import postgres
from tests.conftest import threads_left
from tests.fresh_database import FreshDatabase

pytestmark = pytest.mark.any_sqlalchemy


@pytest.fixture(scope="module")
def one(pg: postgres.Server, template: DatabaseJanitor) -> Iterator[FreshDatabase]:
    """Beside the one that this worker's tests use."""
    found = FreshDatabase(pg, template, suffix="_ours")
    yield found
    found.drop()


@pytest.fixture
def fresh(one: FreshDatabase) -> Iterator[FreshDatabase]:
    one.ensure()
    yield one
    one.renew()


def of(fresh: FreshDatabase, query: str) -> list[tuple[object, ...]]:
    return fresh.connection.execute(query.encode()).fetchall()


INSERT = "insert into item (name) values ('a'), ('b') returning id"


def test_rows_and_sequences_are_as_in_a_new_one_without_a_new_one(fresh: FreshDatabase) -> None:
    clones = fresh.clones
    for _ in range(3):
        assert of(fresh, INSERT) == [(1,), (2,)]
        fresh.connection.execute("delete from item where id = 1")  # its place is not to be filled by the next test
        fresh.connection.execute("insert into booking (seat) values (1)")
        fresh.connection.execute("set search_path = pg_catalog")
        fresh.renew()
        fresh.ensure()
        assert of(fresh, "select (select count(*) from item), (select count(*) from booking)") == [(0, 0)]
        assert of(fresh, "select pg_relation_size('item')") == [(0,)]
    assert fresh.clones == clones


@pytest.mark.parametrize(
    "change",
    [
        "create table more ()",
        "drop table item_tag",
        "alter table item alter column note set default 'x'",
        "create index on item (note)",
        "create function f() returns int language sql as 'select 1'",
        "comment on table item is 'x'",
        "create schema more",
        "grant select on item to public",
        "truncate item cascade",
        "insert into item (name) values ('a'); analyze item",
        "alter sequence item_id_seq increment by 2",
        "select lo_create(0)",
        "do $$ begin execute format('alter database %I set work_mem = 999', current_database()); end $$",
        "do $$ begin execute format('alter database %I connection limit 3', current_database()); end $$",
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
        " where datname = current_database() and pid <> pg_backend_pid()",
    ],
)
def test_in_doubt_the_next_test_gets_a_new_one(fresh: FreshDatabase, pg: postgres.Server, change: str) -> None:
    clones = fresh.clones
    with psycopg.connect(pg.url(fresh.name), autocommit=True) as connection:
        connection.execute(change.encode())
    fresh.renew()
    fresh.ensure()
    assert fresh.clones == clones + 1
    assert of(fresh, INSERT) == [(1,), (2,)]


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ("select pg_advisory_lock(7)", "an advisory lock"),
        ("begin; select pg_advisory_xact_lock(7)", "an advisory lock"),
        ("begin; select 1", "idle in transaction"),
        ("listen news", "listen news"),
    ],
)
def test_what_is_left_behind_is_told_and_taken_away(
    fresh: FreshDatabase, pg: postgres.Server, left: str, said: str
) -> None:
    assert fresh.left_behind(0) == []
    with psycopg.connect(pg.url(fresh.name), autocommit=True) as connection:
        connection.execute(left.encode())
        assert any(said in found for found in fresh.left_behind(0))
        fresh.renew()
        assert fresh.left_behind(0) == []
        with pytest.raises(psycopg.OperationalError):
            connection.execute("select 1")


def test_it_is_told_when_the_connection_beside_is_gone(fresh: FreshDatabase, pg: postgres.Server) -> None:
    with psycopg.connect(pg.url(fresh.name)) as connection:
        fresh.connection.close()
        connection.execute("insert into item (name) values ('a')")
        connection.execute("prepare transaction 'left'")
    try:
        assert fresh.left_behind(0) == ["prepared transaction left"]
    finally:
        with psycopg.connect(pg.url(fresh.name), autocommit=True) as connection:
            connection.execute("rollback prepared 'left'")
    fresh.renew()
    fresh.ensure()
    assert of(fresh, INSERT) == [(1,), (2,)]


def test_a_thread_that_is_left_is_told() -> None:
    before = set(threading.enumerate())
    end = threading.Event()
    thread = threading.Thread(target=end.wait, args=(20,), name="mine")
    thread.start()
    assert threads_left(before, 0.01) == [thread]
    end.set()
    assert threads_left(before) == []

"""Two real nodes: a primary, and a streaming replica whose replay can be stopped. Started once, when asked for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from fictive.testing import postgres
from tests.fresh_database import PATIENCE
from tests.models import opt_in


class Nodes:
    """A primary, a replica, and what tests do with them."""

    def __init__(self, primary: postgres.Server, replica: postgres.Server) -> None:
        self.primary = primary
        self.replica = replica

    def on_primary(self, query: str, *args: Any) -> list[Any]:
        return _run(self.primary, query, args)

    def on_replica(self, query: str, *args: Any) -> list[Any]:
        return _run(self.replica, query, args)

    def pause(self) -> None:
        """From now on the replica replays nothing, and shows old rows."""
        self.on_replica("select pg_wal_replay_pause()")
        _until(lambda: self.on_replica("select pg_get_wal_replay_pause_state()") == [("paused",)])

    def resume(self) -> None:
        """End a `pause`, and wait until the replica has what the primary has."""
        self.on_replica("select pg_wal_replay_resume()")
        self.catch_up()

    def delay(self, milliseconds: int) -> None:
        """Let the replica replay each COMMIT so much later."""
        self.on_replica(f"alter system set recovery_min_apply_delay = {milliseconds}")
        self.on_replica("select pg_reload_conf()")
        shown = f"{milliseconds}ms" if milliseconds else "0"
        _until(lambda: self.on_replica("show recovery_min_apply_delay") == [(shown,)])

    def catch_up(self) -> None:
        """Wait until the replica has replayed all of the primary's log so far, also what is not flushed yet.

        That is the position which sessions remember. The end of the log may belong to a transaction of somebody else,
        such as autovacuum's, and is sent to the replica with the next commit: this makes one.
        """
        ((lsn,),) = self.on_primary("select pg_current_wal_insert_lsn()::text")
        self.on_primary("select pg_logical_emit_message(true, 'catch_up', '')")
        _until(lambda: self.on_replica("select pg_last_wal_replay_lsn() >= %s::pg_lsn", lsn) == [(True,)])

    @contextlib.contextmanager
    def database(self, name: str) -> Iterator[str]:
        """A database of that name on both, with the tables of `tests.models`."""
        self.on_primary(f"create database {name}")
        try:
            engine = sa.create_engine(self.primary.url(name, driver="psycopg"), poolclass=sa.NullPool)
            opt_in.db.metadata.create_all(engine)
            self.catch_up()
            yield name
        finally:
            self.resume()
            self.delay(0)
            self.on_primary(f"drop database {name} with (force)")


@contextlib.contextmanager
def started_nodes(**settings: postgres.Setting) -> Iterator[Nodes]:
    """Nodes of one's own, to be promoted or killed."""
    with (
        postgres.private_server(**{**postgres.PRIMARY, **settings}) as primary,
        postgres.standby_server(primary) as replica,
    ):
        yield Nodes(primary, replica)


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    """The two nodes of this worker; a test leaves both running and replaying."""
    with started_nodes() as nodes:
        yield nodes


@pytest.fixture
def node_database(nodes: Nodes) -> Iterator[str]:
    """The name of a database that is on both nodes, with the tables of `tests.models`."""
    with nodes.database("fictive_test") as name:
        yield name


def _run(server: postgres.Server, query: str, args: tuple[Any, ...]) -> list[Any]:
    with psycopg.connect(server.url(), autocommit=True) as connection:
        cursor = connection.execute(query.encode(), args or None)
        return cursor.fetchall() if cursor.description else []


def _until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the replica does not get there"
        time.sleep(0.005)

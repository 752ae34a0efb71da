"""The parts that the tests of several servers stand on: two nodes, and a pooler."""

from __future__ import annotations

import psycopg
import pytest

from fictive.testing import postgres
from tests.fix_nodes import Nodes, started_nodes
from tests.fix_pooler import Pooler

ITEMS = "select count(*) from item"


def test_a_replica_follows_and_can_be_held_back(nodes: Nodes, node_database: str) -> None:
    with (
        psycopg.connect(nodes.primary.url(node_database), autocommit=True) as primary,
        psycopg.connect(nodes.replica.url(node_database), autocommit=True) as replica,
    ):
        nodes.pause()
        primary.execute("insert into item (name) values ('a')")
        assert replica.execute(ITEMS).fetchone() == (0,)
        nodes.resume()
        assert replica.execute(ITEMS).fetchone() == (1,)
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            replica.execute("insert into item (name) values ('b')")


def test_catching_up_includes_what_the_primary_has_not_flushed(nodes: Nodes, node_database: str) -> None:
    with psycopg.connect(nodes.primary.url(node_database)) as other:
        other.execute("insert into item (name) values ('not committed')")
        ((remembered,),) = nodes.on_primary("select pg_current_wal_insert_lsn()::text")
        nodes.catch_up()
        assert nodes.on_replica("select pg_last_wal_replay_lsn() >= %s::pg_lsn", remembered) == [(True,)]


def test_a_synchronous_replica_takes_over() -> None:
    with started_nodes() as nodes:
        nodes.on_primary("alter system set synchronous_standby_names = 'standby'")
        nodes.on_primary("select pg_reload_conf()")
        nodes.on_primary("create table t (i int)")
        nodes.primary.stop("immediate")
        assert nodes.on_replica("select pg_promote()") == [(True,)]
        nodes.on_replica("insert into t values (1)")
        assert nodes.on_replica("select i from t") == [(1,)]
        nodes.primary.restart()
        assert nodes.on_primary("select count(*) from t") == [(0,)]


def test_a_primary_that_keeps_no_log_cannot_be_copied() -> None:
    with postgres.private_server() as primary, pytest.raises(postgres.EmbeddedServerError, match="PRIMARY"):
        with postgres.standby_server(primary):
            raise AssertionError


def test_the_pooler_hands_its_connections_round(pooler: Pooler, database_url: str) -> None:
    url = pooler.url(database_url).replace("+psycopg2", "").replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as one, psycopg.connect(url, autocommit=True) as two:
        ask = "select pg_backend_pid()"
        assert one.execute(ask).fetchone() == two.execute(ask).fetchone()
        with one.transaction():
            assert one.execute(ask).fetchone() != two.execute(ask).fetchone()
    assert {pool["pool_mode"] for pool in pooler.console("SHOW POOLS")} >= {"transaction"}

"""What `doctor` says of replicas, and of the way around a pooler."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from fictive.command_line.doctor import examine
from fictive.command_line.doctor_connection import connection_findings
from fictive.command_line.doctor_pooler import pooler_findings
from fictive.command_line.doctor_replicas import replica_findings
from fictive.command_line.findings import Severity
from fictive.command_line.target import Database, Target
from fictive.connection.replicas import set_replicas
from fictive.sqlalchemy import set_pooler
from fictive.testing import postgres
from tests.fix_nodes import Nodes
from tests.fix_pooler import Pooler, started_pooler


def test_l1_doctor_on_replicas(pg: postgres.Server, nodes: Nodes, node_database: str, driver: str) -> None:
    primary, replica, other, nobody = (
        sa.create_engine(url, connect_args={"connect_timeout": 3})
        for url in (
            nodes.primary.url(node_database, driver=driver),
            nodes.replica.url(node_database, driver=driver),
            pg.url(driver=driver),
            f"postgresql+{driver}://postgres@127.0.0.1:1/d",
        )
    )
    database = Database("default", primary)
    assert list(replica_findings(database)) == []
    set_replicas(primary, [replica, other, nobody, primary])
    found = [(each.severity.value, each.what) for each in replica_findings(database)]
    assert [severity for severity, _ in found] == ["info", "error", "error", "warning"]
    assert "bytes of log behind" in found[0][1]
    assert "no replica of this" in found[1][1]
    assert "cannot be used" in found[2][1]
    assert "is a primary" in found[3][1]
    checks = [each.check for each in connection_findings(Database("copy", replica), pooler_is_known=False)]
    assert "read-only" not in checks
    for engine in (primary, replica, other, nobody):
        engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_l1_a_standby_that_is_no_replica_is_an_error(nodes: Nodes, node_database: str, driver: str) -> None:
    engine = sa.create_engine(nodes.replica.url(node_database, driver=driver))
    checks = [each.check for each in connection_findings(Database("copy", engine), pooler_is_known=False)]
    assert "read-only" in checks
    engine.dispose()


def test_l4_doctor_on_the_way_around_a_pooler(
    pg: postgres.Server, pooler: Pooler, database_url: str, driver: str
) -> None:
    pooled = pooler.url(database_url)
    for direct, severity, what in (
        (database_url, None, ""),
        (pooled, "error", "through a pooler of transactions too"),
        (pg.url(driver=driver), "error", "another database"),
        (f"postgresql+{driver}://postgres@127.0.0.1:1/d", "error", "cannot be used"),
    ):
        engine = sa.create_engine(pooled)
        set_pooler(engine, direct_url=direct)
        found = {each.check: each for each in pooler_findings(engine, is_known=False)}
        engine.dispose()
        assert found["pooler"].severity.value == "info"
        assert found.keys() == ({"pooler"} if severity is None else {"pooler", "direct-url"})
        if severity is not None:
            assert (found["direct-url"].severity.value, what in found["direct-url"].what) == (severity, True)
    straight = sa.create_engine(database_url)
    set_pooler(straight)
    (finding,) = pooler_findings(straight, is_known=False)
    assert "no pooler is between" in finding.what
    straight.dispose()


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_l1_doctor_goes_on_where_a_replica_is_down(nodes: Nodes, node_database: str, driver: str) -> None:
    primary = sa.create_engine(nodes.primary.url(node_database, driver=driver))
    down = sa.create_engine(f"postgresql+{driver}://postgres@127.0.0.1:1/d")
    set_replicas(primary, [down])
    target = Target([Database("default", primary), Database("copy", down)])
    found = [each for each in examine(target) if each.check == "replica"]
    assert [(each.bind, each.severity.value) for each in found] == [("default", "error")]
    primary.dispose()
    down.dispose()


def test_l4_doctor_names_a_pooler_of_statements(pg: postgres.Server, database_url: str, driver: str) -> None:
    """Behind which there is no transaction, and so no app."""
    with started_pooler(pg, mode="statement") as pooler:
        engine = sa.create_engine(pooler.url(database_url))
        found = examine(Target([Database("default", engine)]))
        engine.dispose()
    (error,) = (each for each in found if each.severity is Severity.ERROR)
    assert "pools statements" in error.what

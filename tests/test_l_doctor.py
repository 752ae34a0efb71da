"""What `doctor` says of replicas."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from fictive.command_line.doctor_connection import connection_findings
from fictive.command_line.doctor_replicas import replica_findings
from fictive.command_line.target import Database
from fictive.connection.replicas import set_replicas
from fictive.testing import postgres
from tests.fix_nodes import Nodes


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

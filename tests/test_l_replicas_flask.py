"""L1, L2 in a Flask app: a replica that is late, users with cookies, jobs with tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from benchmarks import replicas
from examples.objects import replica_demo
from fictive.connection.replicas import replicas_of
from fictive.testing.wire import Wire
from tests.fix_nodes import Nodes
from tests.models import Item, opt_in

db = opt_in.db


class Site:
    """An app on both nodes, each behind a proxy."""

    def __init__(self, nodes: Nodes, database: str, driver: str, path: Any) -> None:
        self.primary = Wire(nodes.primary.host, nodes.primary.port)
        self.replica = Wire(nodes.replica.host, nodes.replica.port)
        self.app = Flask(__name__, instance_path=str(path))
        self.app.config.update(
            SECRET_KEY="secret",
            SQLALCHEMY_DATABASE_URI=self.primary.url(nodes.primary.url(database, driver=driver)),
            SQLALCHEMY_BINDS={"copy": self.replica.url(nodes.replica.url(database, driver=driver))},
            FICTIVE_REPLICAS=["copy"],
        )
        db.init_app(self.app)

        @self.app.get("/")
        def names() -> str:
            return ",".join(db.session.scalars(sa.select(Item.name).order_by(Item.id)))

        @self.app.post("/block/<name>")
        def block(name: str) -> str:
            with db.session.begin():
                db.session.add(Item(name=name))
            return names()

        @self.app.post("/bare/<name>")
        def bare(name: str) -> str:
            db.session.execute(sa.insert(Item).values(name=name))
            return names()

        @self.app.post("/job/<name>")
        def job(name: str) -> str:
            tokens: list[str] = []
            with db.session.begin():
                db.session.add(Item(name=name))
                db.on_commit(lambda: tokens.append(db.token()))
            return tokens[0]

        with self.app.app_context():
            for engine in db.engines.values():
                engine.connect().close()

    def close(self) -> None:
        with self.app.app_context():
            for engine in db.engines.values():
                assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
                engine.dispose()
        self.primary.close()
        self.replica.close()


@pytest.fixture
def site(nodes: Nodes, node_database: str, driver: str, tmp_path: Any) -> Iterator[Site]:
    site = Site(nodes, node_database, driver, tmp_path)
    yield site
    site.close()


@pytest.mark.parametrize("way", ["block", "bare"])
def test_l2_users_see_their_own_writes_and_others_read_on(site: Site, nodes: Nodes, way: str) -> None:
    ann, bob = site.app.test_client(), site.app.test_client()
    assert ann.get("/").text == ""
    nodes.pause()
    with site.primary.record() as primary, site.replica.record() as replica:
        assert ann.post(f"/{way}/a").text == "a"
    # a block: 2, and its read, which the replica could not answer; a bare write: 1, its read, and one look
    assert (primary.round_trips, replica.round_trips) == ((3, 1) if way == "block" else (3, 0))
    for _ in range(2):
        assert ann.get("/").text == "a"
    with site.primary.record() as primary, site.replica.record() as replica:
        assert bob.get("/").text == ""
    assert (primary.round_trips, replica.round_trips) == (0, 1)
    nodes.resume()
    assert ann.get("/").text == "a"
    with site.primary.record() as primary:
        assert bob.get("/").text == "a"
    assert primary.round_trips == 0


def test_l2_a_job_sees_what_its_request_wrote(site: Site, nodes: Nodes) -> None:
    nodes.pause()
    token = site.app.test_client().post("/job/a").text
    with site.app.app_context():
        with db.using_token(token):
            assert db.session.scalars(sa.select(Item.name)).all() == ["a"]
        assert db.session.scalars(sa.select(Item.name)).all() == []
        with db.primary():
            assert db.session.scalars(sa.select(Item.name)).all() == ["a"]
    nodes.resume()


def test_l1_a_replica_that_dies_fails_no_request(site: Site) -> None:
    client = site.app.test_client()
    assert client.post("/block/a").status_code == 200
    site.replica.refuse = True
    site.replica.reset()
    assert {client.get("/").text for _ in range(5)} == {"a"}


def test_h4_a_sandbox_around_a_session_that_has_read_from_a_replica(site: Site, nodes: Nodes) -> None:
    """It reads from none there, and does so again afterwards."""
    with site.app.app_context():
        found = replicas_of(db.engine)
        assert found is not None
        names = sa.select(Item.name).order_by(Item.id)
        assert db.session.scalars(names).all() == []
        with db.sandbox():
            db.session.add(Item(name="a"))
            db.session.commit()
            db.session.execute(sa.insert(Item).values(name="b"))
            assert db.session.scalars(names).all() == ["a", "b"]
        assert [state.reads for state in found.states()] == [1]
        assert db.session.scalars(names).all() == []
        assert [state.reads for state in found.states()] == [2]
        with db.primary():
            assert db.session.scalars(names).all() == []


@pytest.mark.any_sqlalchemy
def test_the_demo_of_replicas(driver: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert replica_demo.main(driver) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in lines if line.startswith("Ann reads: the replica is behind")] == [["1", "1"]]


@pytest.mark.any_sqlalchemy
def test_the_benchmark_of_replicas(driver: str) -> None:
    assert replicas.main(["--smoke", "--driver", driver]) == 0

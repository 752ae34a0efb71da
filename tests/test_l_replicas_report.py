"""L1: what a report says of reads on replicas, compared with what both servers saw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from flask import Flask

from fictive.report.watching import watching
from fictive.sqlalchemy import OptInSession
from tests.fix_nodes import Nodes
from tests.models import Item, opt_in
from tests.test_j_page import links
from tests.test_l_replicas import NAMES, Pair

TURNS = 8  # psycopg prepares what it has run five times


@pytest.fixture
def pair(nodes: Nodes, node_database: str, driver: str) -> Iterator[Pair]:
    pair = Pair(nodes, node_database, driver)
    pair.stop_clock()
    yield pair
    pair.close()


def test_l1_each_read_names_the_replica_that_answered(pair: Pair) -> None:
    with OptInSession(pair.engine) as session, watching(session) as watched:
        with pair.primary.record() as primary, pair.replica.record() as replica:
            for _ in range(TURNS):
                session.scalars(NAMES).all()
            with session.begin():
                session.scalars(NAMES).all()
    report = watched.report
    name = f"127.0.0.1:{pair.replica.port}"
    assert [each.replica for each in report.statements] == [name] * TURNS + [None]
    assert report.round_trips == primary.round_trips + replica.round_trips
    assert (report.replica_reads, report.replica_fallbacks) == (TURNS, ())
    assert (report.summary()["replica_reads"], report.summary()["replica_fallbacks"]) == (TURNS, 0)


def test_l1_a_read_that_came_back_costs_two_round_trips(pair: Pair, nodes: Nodes) -> None:
    nodes.pause()
    with OptInSession(pair.engine) as session, watching(session) as watched:
        with session.begin():
            session.add(Item(name="a"))
        with pair.primary.record() as primary, pair.replica.record() as replica:
            for _ in range(TURNS):
                session.scalars(NAMES).all()
    nodes.resume()
    assert replica.round_trips == 1
    statements = watched.report.statements[1:]
    assert [each.round_trips for each in statements[:2]] == [2, 1]
    assert sum(each.round_trips for each in statements) == primary.round_trips + replica.round_trips
    assert [each.replica for each in statements] == [None] * TURNS
    assert watched.report.replica_fallbacks == ((f"127.0.0.1:{pair.replica.port}", "behind"),)


@pytest.mark.any_sqlalchemy
def test_l1_a_replica_that_cannot_be_reached_is_named(pair: Pair) -> None:
    pair.replica.refuse = True
    pair.replica.reset()
    with OptInSession(pair.engine) as session, watching(session) as watched:
        for _ in range(3):
            session.scalars(NAMES).all()
    assert watched.report.replica_fallbacks == ((f"127.0.0.1:{pair.replica.port}", "unreachable"),)
    assert watched.report.replica_reads == 0


def test_l1_the_page_shows_them(pair: Pair, tmp_path: Path) -> None:
    app = Flask(__name__, instance_path=str(tmp_path))
    app.config.update(
        DEBUG=True,
        SECRET_KEY="secret",
        SQLALCHEMY_DATABASE_URI=pair.engine.url.render_as_string(hide_password=False),
        FICTIVE_REPLICAS=[pair.copy.url.render_as_string(hide_password=False)],
    )
    opt_in.db.init_app(app)

    @app.get("/")
    def index() -> str:
        return ",".join(opt_in.db.session.scalars(NAMES))

    client = app.test_client()
    client.get("/")
    (request,) = links(client.get("/_fictive/").text, r"/_fictive/\d+")
    page = client.get(request).text
    assert "<b>1</b> read on replicas" in page
    (statement,) = links(page, r"/_fictive/\d+/\d+")
    assert f"on the replica 127.0.0.1:{pair.replica.port}" in client.get(statement).text
    with app.app_context():
        for engine in opt_in.db.engines.values():
            engine.dispose()

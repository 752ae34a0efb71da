"""L3: the primary dies, its synchronous standby takes over, and the application goes on."""

from __future__ import annotations

import contextlib
import os
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from fictive.connection.replicas import set_replicas
from fictive.connection.servers import set_patience
from fictive.errors import CommitOutcomeUnknown
from fictive.sqlalchemy import OptInSession, set_pooler
from fictive.testing import postgres
from fictive.testing.wire import Wire
from tests.fix_nodes import Nodes, started_nodes
from tests.fix_pooler import started_pooler
from tests.models import opt_in
from tests.test_g_waiting import until

MakeApp = Callable[..., Flask]

THREADS = int(os.environ.get("FICTIVE_FAILOVER_THREADS", "8"))


@pytest.fixture
def pair() -> Iterator[Nodes]:
    with started_nodes() as pair:
        pair.on_primary("alter system set synchronous_standby_names = 'standby'")
        pair.on_primary("select pg_reload_conf()")
        pair.on_primary("create table entry (token text)")
        pair.catch_up()
        yield pair


def url_of(pair: Nodes, driver: str) -> str:
    """Both servers, and whichever takes writes."""
    hosts = [f"host={server.host}:{server.port}" for server in (pair.primary, pair.replica)]
    return f"postgresql+{driver}://postgres@/postgres?{'&'.join(hosts)}&target_session_attrs=read-write"


@pytest.mark.any_sqlalchemy
def test_l3_a_promotion_under_load(pair: Nodes, driver: str) -> None:
    engine = sa.create_engine(url_of(pair, driver), pool_size=THREADS)
    set_patience(engine, 60.0)
    ended = threading.Event()
    told: dict[str, str] = {}
    failed_reads: list[Exception] = []
    reads: Counter[int] = Counter()

    def work(number: int) -> None:
        with OptInSession(engine) as session:
            turn = 0
            while not ended.is_set():
                turn += 1
                token = f"{number}-{turn}"
                try:
                    with session.begin():
                        session.execute(sa.text("insert into entry values (:token)"), {"token": token})
                except CommitOutcomeUnknown:
                    told[token] = "unknown"
                except sa.exc.SQLAlchemyError:
                    told[token] = "failed"
                else:
                    told[token] = "committed"
                try:
                    session.scalar(sa.text("select count(*) from entry"))
                    reads[number] += 1
                except sa.exc.SQLAlchemyError as error:
                    failed_reads.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    while sum(reads.values()) < 200:
        ended.wait(0.01)
    pair.primary.stop("immediate")
    assert pair.on_replica("select pg_promote()") == [(True,)]
    pair.on_replica("alter system reset synchronous_standby_names")
    pair.on_replica("select pg_reload_conf()")
    after = sum(reads.values())
    while sum(reads.values()) < after + 200:
        ended.wait(0.01)
    ended.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    engine.dispose()
    there = {token for (token,) in pair.on_replica("select token from entry")}
    assert {token for token, what in told.items() if what == "committed"} <= there
    assert not {token for token, what in told.items() if what == "failed"} & there
    assert failed_reads == []
    _reads_its_own_writes(pair.replica.url(driver=driver))


def _reads_its_own_writes(url: str) -> None:
    """The node that took over may still be named as a replica: it has replayed nothing since, and has all."""
    engine, copy = sa.create_engine(url), sa.create_engine(url)
    found = set_replicas(engine, [copy])
    with OptInSession(engine) as session:
        with session.begin():
            session.execute(sa.text("insert into entry values ('later')"))
        assert session.scalar(sa.text("select count(*) from entry where token = 'later'")) == 1
    (state,) = found.states()
    assert (state.reads, state.behind) == (1, 0)
    engine.dispose()
    copy.dispose()


@pytest.mark.parametrize("block", [True, False], ids=["block", "bare"])
def test_l3_connections_to_a_demoted_primary_are_replaced(
    nodes: Nodes, node_database: str, driver: str, block: bool
) -> None:
    with Wire(nodes.replica.host, nodes.replica.port) as wire:
        engine = sa.create_engine(wire.url(nodes.primary.url(node_database, driver=driver)))

        def write() -> None:
            with session.begin() if block else contextlib.nullcontext():
                session.execute(sa.text("insert into item (name) values ('a')"))

        with OptInSession(engine) as session, OptInSession(engine) as other:
            with other.begin():
                other.scalar(sa.text("select 1"))
                session.scalar(sa.text("select 1"))
            with pytest.raises(sa.exc.InternalError, match="read-only"):
                write()
            wire.upstream = (nodes.primary.host, nodes.primary.port)
            for _ in range(2):
                session.scalar(sa.text("select 1"))
            write()
            with wire.record() as log:  # READ ONLY that was asked for says nothing of the server
                with pytest.raises(sa.exc.InternalError), session.begin():
                    session.execute(sa.text("set transaction read only"))
                    session.execute(sa.text("delete from item"))
                session.scalar(sa.text("select count(*) from item"))
            assert log.connections_opened == 0
        engine.dispose()


class Refusing:
    """Stands for `wire.refuse = True`, and counts who was refused."""

    def __init__(self) -> None:
        self.count = 0

    def __bool__(self) -> bool:
        self.count += 1
        return True


def test_l3_patience_is_a_setting(make_app: MakeApp, wire: Wire) -> None:
    db = opt_in.db
    refusing: Any = Refusing()

    def lose() -> None:
        db.session.scalar(sa.text("select 1"))
        wire.refuse = refusing
        wire.close_connections()

    app = make_app(FICTIVE_PATIENCE=0)
    with app.app_context():
        lose()
        with pytest.raises(sa.exc.OperationalError):
            db.session.scalar(sa.text("select 1"))
        with pytest.raises(sa.exc.OperationalError), db.engine.connect():
            raise AssertionError
    assert refusing.count <= 6  # the read is run again, and psycopg tries each address
    wire.refuse = False
    app = make_app(FICTIVE_PATIENCE="60s")
    with app.app_context():
        lose()
        found: list[Any] = []

        def read() -> None:
            with app.app_context():
                found.append(db.session.scalar(sa.text("select 1")))

        before = refusing.count
        reader = threading.Thread(target=read)
        reader.start()
        until(lambda: refusing.count - before >= 10)
        assert found == []
        wire.refuse = False
        reader.join(30)
        assert found == [1]


@pytest.mark.parametrize("block", [False, True], ids=["bare", "block"])
def test_l3_patience_behind_a_pooler(
    pg: postgres.Server, wire: Wire, database_url: str, driver: str, block: bool
) -> None:
    """It accepts connections while its server is away, and refuses what is sent on them."""
    refusing: Any = Refusing()
    found: list[Any] = []
    upstream = types.SimpleNamespace(host=wire.host, port=wire.port, user=pg.user)
    with started_pooler(upstream, size=4, retry=0.1) as pooler:
        engine = sa.create_engine(pooler.url(database_url))
        set_pooler(engine)

        def read() -> None:
            with OptInSession(engine) as session:
                try:
                    with session.begin() if block else contextlib.nullcontext():
                        found.append(session.scalar(sa.text("select 1")))
                except sa.exc.SQLAlchemyError as error:
                    found.append(error)

        read()
        wire.refuse = refusing
        wire.close_connections()
        readers = [threading.Thread(target=read) for _ in range(4)]
        for number, reader in enumerate(readers):
            reader.start()
            if number == 0:
                until(lambda: refusing.count >= 2)  # the pooler knows that its server is away
        until(lambda: refusing.count >= 8)
        wire.refuse = False
        for reader in readers:
            reader.join(30)
        engine.dispose()
    assert found == [1] * 5

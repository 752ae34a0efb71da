"""L1, L2: reads on a real replica, never old for who wrote."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from fictive.connection.pool import BorrowingPool
from fictive.connection.replicas import Positions, on_primary, positions_of, replicas_of, set_replicas, using_positions
from fictive.sqlalchemy import FindOrCreateDescriptor, OptInSession, advisory_lock, on_commit, wait_for_rows
from fictive.testing.wire import Wire
from tests.fix_nodes import Nodes
from tests.models import Item

NAMES = sa.select(Item.name).order_by(Item.id)


class Pair:
    """An engine with a replica, each behind a proxy of its own."""

    def __init__(self, nodes: Nodes, database: str, driver: str) -> None:
        self.primary = Wire(nodes.primary.host, nodes.primary.port)
        self.replica = Wire(nodes.replica.host, nodes.replica.port)
        self.engine = sa.create_engine(self.primary.url(nodes.primary.url(database, driver=driver)))
        self.copy = sa.create_engine(self.replica.url(nodes.replica.url(database, driver=driver)))
        set_replicas(self.engine, [self.copy])
        with OptInSession(self.engine) as session:  # SQLAlchemy asks a server a few things the first time
            session.scalar(sa.select(1))
            with on_primary():
                session.scalar(sa.select(1))

    def close(self) -> None:
        for engine, wire in ((self.engine, self.primary), (self.copy, self.replica)):
            engine.dispose()
            wire.close()

    def stop_clock(self) -> None:
        """What is remembered of the replica stays remembered, however slow the machine is."""
        found = replicas_of(self.engine)
        assert found is not None
        found._clock = found.members[0]._clock = lambda: 0.0

    @property
    def state(self) -> Any:
        found = replicas_of(self.engine)
        assert found is not None
        return found.states()[0]


@pytest.fixture
def pair(nodes: Nodes, node_database: str, driver: str) -> Iterator[Pair]:
    pair = Pair(nodes, node_database, driver)
    yield pair
    pair.close()


@pytest.fixture
def session(pair: Pair) -> Iterator[OptInSession]:
    with OptInSession(pair.engine) as session:
        yield session


def test_l1_reads_outside_go_to_the_replica_and_all_else_to_the_primary(pair: Pair, session: OptInSession) -> None:
    with pair.primary.record() as primary, pair.replica.record() as replica:
        assert session.scalars(NAMES).all() == []
        assert session.get(Item, 1) is None
        session.query(Item).count()
    assert (primary.round_trips, replica.round_trips) == (0, 3)
    with pair.primary.record() as primary, pair.replica.record() as replica:
        with session.begin():
            session.scalars(NAMES).all()
        with on_primary():
            session.scalars(NAMES).all()
        session.scalars(NAMES.execution_options(fictive_primary=True)).all()
        session.scalars(NAMES, execution_options={"fictive_primary": True}).all()
        assert session.scalar(sa.text("select nextval('item_id_seq')")) == 1
        session.execute(sa.text("select pg_notify('a', 'b')"))
        session.execute(sa.insert(Item).values(name="a"))
    assert not [text for text in replica.statements if "pg_notify" in text or "INSERT" in text]
    assert len([text for text in primary.statements if "item.name" in text]) == 4


def test_m1_settings_ride_with_a_read_on_a_replica_and_with_its_position(pair: Pair, nodes: Nodes) -> None:
    shown = sa.text("SELECT current_setting('app.tenant', true)")
    with OptInSession(pair.engine, local_settings=lambda: {"app.tenant": "a"}) as session:
        for name in ("x", "y"):  # the second time there is a position to have
            with pair.primary.record() as primary, pair.replica.record() as replica:
                assert session.scalar(shown) == "a"
            assert (primary.round_trips, replica.round_trips) == (0, 1)
            with session.begin():
                session.execute(sa.insert(Item).values(name=name))
            nodes.catch_up()
        assert any("pg_last_wal_replay_lsn" in text for text in replica.statements)
        with pair.copy.connect() as connection:
            assert connection.scalar(shown) in ("", None)


def test_l2_a_transaction_brings_its_position_back_in_its_own_message(pair: Pair, session: OptInSession) -> None:
    with pair.primary.record() as log:
        with session.begin():
            session.execute(sa.insert(Item).values(name="a"))
    assert log.round_trips == 2
    assert log.statements[-1] == "COMMIT; SELECT pg_catalog.pg_current_wal_insert_lsn()"
    assert positions_of(session.info)[pair.engine] > 0
    with pair.primary.record() as log:
        with session.begin():
            session.scalars(NAMES).all()  # writes nothing, and has no position
    assert log.statements[-1] == "COMMIT"


def test_l2_the_check_rides_with_the_read(pair: Pair, session: OptInSession, nodes: Nodes) -> None:
    session.add(Item(name="a"))
    session.commit()
    nodes.catch_up()
    with pair.primary.record() as primary, pair.replica.record() as replica:
        assert session.scalars(NAMES.where(Item.id > 0)).all() == ["a"]
    assert (primary.round_trips, replica.round_trips) == (0, 1)
    assert "pg_last_wal_replay_lsn" in replica.statements[0]


def test_l2_never_an_old_row_and_a_lag_is_paid_once(pair: Pair, session: OptInSession, nodes: Nodes) -> None:
    pair.stop_clock()
    nodes.pause()
    with session.begin():
        session.add(Item(name="a"))
    with pair.primary.record() as primary, pair.replica.record() as replica:
        for _ in range(3):
            assert session.scalars(NAMES).all() == ["a"]
    assert (primary.round_trips, replica.round_trips) == (3, 1)
    with OptInSession(pair.engine) as other, pair.replica.record() as replica:
        assert other.scalars(NAMES).all() == []  # who has not written reads what is there
    assert replica.round_trips == 1
    assert pair.state.behind == 1
    nodes.resume()


def test_l2_a_bare_write_is_seen_too(pair: Pair, session: OptInSession, nodes: Nodes) -> None:
    nodes.pause()
    with pair.primary.record() as log:
        session.execute(sa.insert(Item).values(name="a"))
    assert log.round_trips == 1
    with pair.replica.record() as replica:
        assert session.scalars(NAMES).all() == ["a"]
    assert replica.round_trips == 0
    nodes.resume()


def test_l2_positions_are_handed_on(pair: Pair, session: OptInSession, nodes: Nodes) -> None:
    nodes.pause()
    with session.begin():
        session.add(Item(name="a"))
    position = positions_of(session.info)[pair.engine]
    with OptInSession(pair.engine) as job:
        with using_positions(Positions({pair.engine: position})):
            assert job.scalars(NAMES).all() == ["a"]
        assert job.scalars(NAMES).all() == []
    nodes.resume()


def test_l1_savepoints_streams_and_refresh(pair: Pair, session: OptInSession, nodes: Nodes) -> None:
    with session.begin():
        session.add(Item(name="a"))
        with session.begin_nested():
            session.add(Item(name="b"))
    names = [row.name for row in session.execute(NAMES.execution_options(yield_per=1))]
    assert names == ["a", "b"]
    item = session.scalars(sa.select(Item).where(Item.name == "a")).one()
    session.refresh(item)
    assert item.children == []


def test_l1_errors_of_the_replica_never_come_out(pair: Pair, session: OptInSession, nodes: Nodes) -> None:
    nodes.pause()
    with pair.engine.begin() as connection:
        connection.execute(sa.text("create table fresh (i int)"))
    assert session.execute(sa.text("select * from fresh")).all() == []  # it is not there yet
    with pytest.raises(sa.exc.DataError):
        session.scalar(sa.text("select 1/0"))
    with pytest.raises(sa.exc.ProgrammingError, match="nowhere"):
        session.execute(sa.text("select * from nowhere"))
    nodes.resume()
    assert session.scalars(NAMES).all() == []


@pytest.mark.any_sqlalchemy
def test_l1_a_replica_that_is_down_costs_no_read(pair: Pair, session: OptInSession) -> None:
    pair.stop_clock()
    session.scalars(NAMES).all()
    pair.replica.refuse = True
    pair.replica.reset()
    for _ in range(5):
        assert session.scalars(NAMES).all() == []
    assert pair.state.is_down
    with pair.replica.record() as replica:
        session.scalars(NAMES).all()
    assert replica.connections_opened == 0


def test_l1_a_conflict_with_recovery_sends_it_to_the_primary(pair: Pair, session: OptInSession, nodes: Nodes) -> None:
    session.scalars(NAMES).all()
    nodes.on_replica(
        "select pg_cancel_backend(pid) from pg_stat_activity where query ~ 'item.name' and pid <> pg_backend_pid()"
    )
    assert session.scalars(NAMES).all() == []


def test_l1_many_threads_never_see_an_old_row(pair: Pair, nodes: Nodes) -> None:
    import threading

    nodes.delay(20)
    wrong: list[Any] = []

    def work(number: int) -> None:
        with OptInSession(pair.engine) as session:
            for turn in range(20):
                name = f"{number} {turn}"
                with session.begin():
                    session.add(Item(name=name))
                for _ in range(3):
                    if session.scalar(sa.select(Item.id).where(Item.name == name)) is None:
                        wrong.append(name)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_l1_what_must_see_everything_reads_on_the_primary(
    pair: Pair, session: OptInSession, nodes: Nodes, tmp_path: Any
) -> None:
    with OptInSession(pair.engine) as other:
        other.add(Item(name="a"))
        other.commit()
    nodes.catch_up()
    nodes.pause()
    with OptInSession(pair.engine) as other:
        other.execute(sa.update(Item).values(note="new"))
    finder = FindOrCreateDescriptor(lambda: session).__get__(None, Item)
    seen: list[Any] = []
    with pair.replica.record() as replica:
        assert finder(name="a").note == "new"
        session.expunge_all()
        with session.begin():
            session.execute(sa.text("select 1"))
            on_commit(session, lambda: seen.append(session.scalar(sa.select(Item.note))))
        assert seen == ["new"]
        with advisory_lock(session, "k"):
            pass
        wait_for_rows(session, sa.select(Item).where(Item.note == "new"))
        item = session.get(Item, 1)
    assert [text for text in replica.statements if "item" in text] == [replica.statements[-1]]
    assert item is not None
    nodes.resume()


def test_l1_no_replica_after_all(pair: Pair, session: OptInSession) -> None:
    set_replicas(pair.engine, [])
    with OptInSession(pair.engine) as other, pair.replica.record() as replica:
        other.scalars(NAMES).all()
    assert replica.round_trips == 0


def test_l1_listeners_of_a_replica_s_pool_are_told_of_each_read(pair: Pair, session: OptInSession) -> None:
    """What they set, say, is for whoever takes the connection."""
    taken: list[Any] = []
    copy = sa.create_engine(pair.copy.url, poolclass=BorrowingPool)
    set_replicas(pair.engine, [copy])
    with OptInSession(pair.engine) as session:
        session.scalars(NAMES).all()
        sa.event.listen(copy, "checkout", lambda dbapi, record, proxy: taken.append("out"))
        sa.event.listen(copy, "checkin", lambda dbapi, record: taken.append("in"))
        for _ in range(3):
            session.scalars(NAMES).all()
    copy.dispose()
    assert [each for each in taken if each == "out"] == ["out"] * 3
    assert pair.state.reads == 4


def test_l1_a_replica_s_pool_replaces_old_connections(pair: Pair, session: OptInSession) -> None:
    copy = sa.create_engine(pair.copy.url, pool_recycle=0, poolclass=BorrowingPool)
    set_replicas(pair.engine, [copy])
    with OptInSession(pair.engine) as session, pair.replica.record() as replica:
        for _ in range(3):
            session.scalars(NAMES).all()
    copy.dispose()
    assert replica.connections_opened >= 2


def test_l1_a_replica_that_is_restarted_is_not_waited_for(pair: Pair) -> None:
    """Not even by a pool that has found its connections lost: the primary is there."""
    refused: list[Any] = []

    class Refusing:
        def __bool__(self) -> bool:
            refused.append(True)
            return True

    with OptInSession(pair.engine) as session:
        session.scalars(NAMES).all()
        pair.replica.refuse = Refusing()  # type: ignore[assignment]
        pair.replica.close_connections()
        assert session.scalars(NAMES).all() == []
    assert len(refused) <= 4  # psycopg tries each address, and the pool may try once more


@pytest.mark.parametrize("poolclass", [BorrowingPool, sa.QueuePool])
def test_l1_a_replica_whose_pool_is_used_up_is_not_waited_for(pair: Pair, poolclass: type[sa.Pool]) -> None:
    """The primary has a pool of its own."""
    copy = sa.create_engine(pair.copy.url, poolclass=poolclass, pool_size=1, max_overflow=0, pool_timeout=3600)
    found = set_replicas(pair.engine, [copy])
    with OptInSession(pair.engine) as session:
        session.scalars(NAMES).all()
        with copy.connect():
            assert session.scalars(NAMES).all() == []
        session.scalars(NAMES).all()
    copy.dispose()
    (state,) = found.states()
    assert (state.reads, state.failures, state.is_down) == (2, 1, False)

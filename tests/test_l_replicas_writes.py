"""L1, L2: writes beside a replica that replays nothing: what was committed, or may be, is seen by who wrote it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import psycopg2.extensions
import pytest
import sqlalchemy as sa

from fictive.connection.replicas import COMMIT_POSITION, on_primary, replicas_of, set_replicas
from fictive.drivers import driver_for
from fictive.errors import CommitOutcomeUnknown, TransactionAborted
from fictive.sqlalchemy import OptInSession, cleanup_tables
from tests.fix_nodes import Nodes
from tests.models import Child, Item, opt_in
from tests.test_l_replicas import NAMES, Pair

INSERT = sa.insert(Item).values(name="a")


@pytest.fixture
def pair(nodes: Nodes, node_database: str, driver: str) -> Iterator[Pair]:
    pair = Pair(nodes, node_database, driver)
    nodes.pause()
    yield pair
    nodes.resume()
    pair.close()


def _by_text(session: OptInSession) -> None:
    session.execute(sa.text("COMMIT"))


def _by_a_text_that_fails(session: OptInSession) -> None:
    session.execute(sa.text("COMMIT; SELECT 1/0"))


def _on_the_session_s_connection(session: OptInSession) -> None:
    session.connection().connection.commit()


def _on_the_driver_s_connection(session: OptInSession) -> None:
    session.connection().connection.dbapi_connection.commit()  # type: ignore[union-attr]


def _and_leaves_the_block(session: OptInSession) -> None:
    _on_the_driver_s_connection(session)
    raise KeyError


WAYS = (
    _by_text,
    _by_a_text_that_fails,
    _on_the_session_s_connection,
    _on_the_driver_s_connection,
    _and_leaves_the_block,
)
LOST: list[tuple[str, str, dict[str, Any]]] = [
    ("bare", "INSERT", {}),
    ("with settings", "INSERT", {"local_settings": lambda: {"app.a": "b"}}),
    ("in two phases", "COMMIT PREPARED", {"twophase": True}),
]


def test_l2_what_was_committed_past_the_session_is_seen(pair: Pair) -> None:
    missed = []
    for commit in WAYS:
        _empty(pair)
        with OptInSession(pair.engine) as session:
            with pytest.raises((TransactionAborted, sa.exc.DataError, KeyError)), session.begin():
                session.execute(INSERT)
                commit(session)
            if session.scalars(NAMES).all() != ["a"]:
                missed.append(commit.__name__)
    assert missed == []


def test_l2_a_write_whose_answer_was_lost_is_seen(pair: Pair) -> None:
    """Who looks whether it was done, before doing it again, has to find it."""
    missed = []
    for way, lost, options in LOST:
        _empty(pair)
        with OptInSession(pair.engine, **options) as session:
            pair.primary.reset_when(lambda statement, lost=lost: lost in statement, "after")  # type: ignore[misc]
            block = session.begin() if lost == "COMMIT PREPARED" else contextlib.nullcontext()
            with pytest.raises(sa.exc.OperationalError), block:
                session.execute(INSERT)
            if session.scalars(NAMES).all() != ["a"]:
                missed.append(way)
    assert missed == []


def _empty(pair: Pair) -> None:
    with pair.engine.begin() as connection:
        connection.execute(sa.delete(Item))


def test_l1_what_is_merged_and_deleted_is_looked_up_on_the_primary(pair: Pair, nodes: Nodes) -> None:
    with pair.engine.begin() as connection:
        connection.execute(INSERT.values(id=1, note="old"))
    nodes.resume()
    nodes.pause()
    with pair.engine.begin() as connection:
        connection.execute(sa.update(Item).values(note="new"))
        connection.execute(INSERT.values(id=2, name="b"))
        connection.execute(sa.insert(Child).values(item_id=2))
    with OptInSession(pair.engine) as session:
        session.merge(Item(id=1, name="a", note="old"))  # which is what the replica has
        session.merge(Item(id=2, name="b", note="merged"))  # which it has not
        session.commit()
        query = sa.select(Item.note).order_by(Item.id)
        assert session.scalars(query).all() == ["old", "merged"]
    with OptInSession(pair.engine) as session:
        with on_primary():
            found = session.get_one(Item, 2)
        session.delete(found)  # and its children, of which the replica has none
        session.commit()
        assert session.scalars(NAMES).all() == ["a"]


def test_l2_emptied_tables_are_seen_empty(pair: Pair, nodes: Nodes) -> None:
    with pair.engine.begin() as connection:
        connection.execute(INSERT)
    nodes.resume()
    nodes.pause()
    with OptInSession(pair.engine) as session:
        assert session.scalars(NAMES).all() == ["a"]
        cleanup_tables(session, opt_in.db.Model)
        assert session.scalars(NAMES).all() == []


def test_l2_no_commit_fails_on_a_primary_that_tells_no_position(
    pair: Pair, nodes: Nodes, node_database: str, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The right to ask for it may be revoked, and some services do not support the question."""
    url = nodes.primary.url(node_database, driver=driver)
    owner = sa.create_engine(url, poolclass=sa.NullPool)
    with owner.begin() as connection:
        connection.exec_driver_sql(
            "create role untold login; grant all on all tables in schema public to untold;"
            " grant all on all sequences in schema public to untold;"
            " revoke execute on function pg_current_wal_insert_lsn() from public"
        )
    engine = sa.create_engine(sa.make_url(url).set(username="untold"))
    set_replicas(engine, [pair.copy])
    try:
        with OptInSession(engine) as session:
            with pytest.raises(CommitOutcomeUnknown), session.begin():
                session.add(Item(name="a"))
            assert session.scalars(NAMES).all() == ["a"]
            session.rollback()
            with session.begin():
                session.add(Item(name="b"))
            assert session.scalars(NAMES).all() == ["a", "b"]
        assert len([each for each in caplog.records if "position" in each.message]) == 1
    finally:
        engine.dispose()
        with owner.begin() as connection:
            connection.exec_driver_sql("drop owned by untold; drop role untold")


def test_l2_a_deferred_trigger_s_own_error_is_no_doubt(pair: Pair, nodes: Nodes) -> None:
    with pair.engine.begin() as connection:
        connection.exec_driver_sql(
            "create function refuse() returns trigger language plpgsql as $$ begin"
            " raise insufficient_privilege; end $$;"
            " create constraint trigger refuse after insert on item deferrable initially deferred"
            " for each row execute function refuse()"
        )
    with OptInSession(pair.engine) as session:
        with pytest.raises(sa.exc.ProgrammingError), session.begin():
            session.add(Item(name="a"))
    found = replicas_of(pair.engine)
    assert found is not None
    assert found.tell_position


def test_l1_the_option_of_an_engine_and_of_a_view_of_it(pair: Pair) -> None:
    with OptInSession(pair.engine) as session, session.begin():
        session.add(Item(name="a"))
    with OptInSession(pair.engine.execution_options(fictive_primary=True)) as session:
        assert session.scalars(NAMES).all() == ["a"]
        assert session.scalars(NAMES.execution_options(fictive_primary=False)).all() == []
    with OptInSession(pair.engine.execution_options(schema_translate_map={None: "public"})) as session:
        assert session.scalars(NAMES).all() == []
        with session.begin():
            session.add(Item(name="b"))
        assert session.scalars(NAMES).all() == ["a", "b"]


class Wrapper:
    """Around psycopg2's connection, as tools that trace put one there (wrapt)."""

    def __init__(self, wrapped: Any) -> None:
        self.__wrapped__ = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_j4_a_traced_connection_tells_its_position(pair: Pair) -> None:
    class Server:
        dbapi = Wrapper(None)

    with pair.engine.connect() as connection:
        Server.dbapi.__wrapped__ = connection.connection.dbapi_connection
        assert isinstance(Server.dbapi.__wrapped__, psycopg2.extensions.connection)
        assert "/" in driver_for(pair.engine.dialect).commit_and_ask(Server, [], COMMIT_POSITION)

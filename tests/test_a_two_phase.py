"""Contract A15, A18, A29: two-phase transactions of sessions, as on a plain one, and honest where plain is not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy import event

from fictive.connection.pool import BorrowingPool
from fictive.errors import CommitOutcomeUnknown, TransactionAborted
from fictive.sqlalchemy import OptInSession
from fictive.testing.wire import Wire
from tests.models import Child, Item, Tag

Look = Callable[..., list[Any]]


@pytest.fixture
def engine(database_url: str, wire: Wire) -> Iterator[sa.Engine]:
    engine = sa.create_engine(
        wire.url(database_url), poolclass=BorrowingPool, pool_size=1, max_overflow=0, pool_timeout=0.01
    )
    engine.connect().close()
    yield engine
    engine.dispose()


@pytest.fixture(autouse=True)
def no_prepared_transaction_is_left(look: Look) -> Iterator[None]:
    """Its locks would keep the next test waiting."""
    yield
    for gid in prepared(look):
        look(f"rollback prepared '{gid}'")


def prepared(look: Look) -> list[str]:
    return look("select gid from pg_prepared_xacts where database = current_database()")


def insert(session: sa_orm.Session, name: str = "a") -> None:
    session.execute(sa.insert(Item).values(name=name))


def fail(session: sa_orm.Session) -> None:
    raise ZeroDivisionError


def divide(session: sa_orm.Session) -> None:
    with contextlib.suppress(sa.exc.DataError):
        session.execute(sa.text("select 1 / 0"))


STEPS: dict[str, Callable[[Any], Any]] = {
    "insert": insert,
    "prepare": lambda session: session.prepare(),
    "commit": lambda session: session.commit(),
    "rollback": lambda session: session.rollback(),
    "close": lambda session: session.close(),
    "fail": fail,
    "divide": divide,
}
PROGRAMS: dict[str, tuple[list[str], type[Exception] | None]] = {
    "insert": (["a"], None),
    "insert commit": (["a"], None),
    "insert rollback": ([], None),
    "insert fail": ([], ZeroDivisionError),
    "insert close": ([], None),
    "insert prepare": ([], TransactionAborted),  # plain says nothing
    "insert prepare commit": (["a"], None),
    "insert prepare rollback": ([], None),
    "insert prepare fail": ([], ZeroDivisionError),
    "insert prepare close": ([], None),
    "insert divide": ([], TransactionAborted),
    "insert divide prepare": ([], TransactionAborted),
    "divide insert": ([], sa.exc.SQLAlchemyError),
    "": ([], None),
    "commit": ([], None),
}


def test_a29_a_session_goes_on_after_a_two_phase_transaction(engine: sa.Engine, look: Look) -> None:
    for program, (rows, error) in PROGRAMS.items():
        with OptInSession(engine, twophase=True) as session:
            with pytest.raises(error) if error else contextlib.nullcontext(), session.begin():
                for step in program.split():
                    STEPS[step](session)
            assert engine.pool.checkedout() == 0, program  # type: ignore[attr-defined]
            assert not session.in_transaction(), program
            assert (look("select name from item"), prepared(look)) == (rows, []), program
            assert session.scalar(sa.text("select 1")) == 1
            with session.begin():
                insert(session, "next")
            session.execute(sa.delete(Item))


def test_a18_a_two_phase_transaction_keeps_its_connection(engine: sa.Engine, wire: Wire) -> None:
    with wire.record() as log, OptInSession(engine, twophase=True) as session:
        for _ in range(3):
            with session.begin():
                insert(session)
                session.execute(sa.delete(Item))
    assert log.connections_opened == 0


def test_a15_a_commit_that_meets_a_lost_connection_is_in_doubt(engine: sa.Engine, wire: Wire, look: Look) -> None:
    with OptInSession(engine, twophase=True) as session:
        with pytest.raises(CommitOutcomeUnknown), session.begin():
            insert(session)
            session.prepare()
            wire.close_connections()
            session.commit()
        assert len(prepared(look)) == 1
        assert session.scalar(sa.text("select 1")) == 1
        look(f"commit prepared '{prepared(look)[0]}'")
        assert look("select name from item") == ["a"]


@pytest.mark.parametrize("how", ["before", "before prepare"])
def test_a15_a_connection_lost_before_prepare_is_a_rollback(
    how: str, engine: sa.Engine, wire: Wire, look: Look
) -> None:
    with OptInSession(engine, twophase=True) as session:
        with pytest.raises(sa.exc.OperationalError) as raised, session.begin():
            insert(session)
            wire.close_connections()
            if how == "before prepare":
                session.prepare()
        assert not isinstance(raised.value, CommitOutcomeUnknown)
        assert (look("select name from item"), prepared(look)) == ([], [])
        with session.begin():
            insert(session, "next")
    assert look("select name from item") == ["next"]


def test_a15_what_the_server_refuses_to_commit(engine: sa.Engine, look: Look) -> None:
    """Somebody has rolled it back meanwhile; the driver believes that it is still there."""
    with OptInSession(engine, twophase=True) as session:
        with pytest.raises(sa.exc.ProgrammingError), session.begin():
            insert(session)
            session.prepare()
            look(f"rollback prepared '{prepared(look)[0]}'")
            session.commit()
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        with session.begin():
            insert(session, "next")
    assert look("select name from item") == ["next"]


@pytest.mark.parametrize("text", ["create temp table t (n int)", "notify ch"])
def test_a15_what_the_server_refuses_to_prepare(text: str, engine: sa.Engine, look: Look) -> None:
    with OptInSession(engine, twophase=True) as session:
        with pytest.raises(sa.exc.NotSupportedError, match="PREPARE"), session.begin():
            insert(session)
            session.execute(sa.text(text))
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        with session.begin():
            insert(session, "next")
    assert look("select name from item") == ["next"]


def test_c1_it_begins_on_a_living_connection(engine: sa.Engine, wire: Wire, look: Look) -> None:
    with OptInSession(engine, twophase=True, retry_reads=True) as session:
        session.scalar(sa.text("select 1"))
        wire.close_connections()
        with session.begin():
            insert(session)
    assert look("select name from item") == ["a"]


@pytest.mark.filterwarnings("ignore:transaction already deassociated")  # by SQLAlchemy, of one that has committed
@pytest.mark.parametrize("at", ["prepare", "commit"])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_a19_two_databases_of_which_one_fails(
    at: str, last: bool, database_url: str, wire: Wire, look: Look, caplog: pytest.LogCaptureFixture
) -> None:
    """Both engines are on one database, which makes no difference to the session. What is prepared when the other one
    has committed stays, as on a plain session: it is for the code to commit."""
    done: list[sa.Engine] = []
    engines = [sa.create_engine(wire.url(database_url), pool_size=1, max_overflow=0) for _ in range(2)]

    def strike(connection: sa.Connection, *_: Any) -> None:
        done.append(connection.engine)
        if len(done) == 1 + last:
            raise ZeroDivisionError

    for engine in engines:
        event.listen(engine, f"{at}_twophase", strike)
    with OptInSession(binds={Item: engines[0], Child: engines[0], Tag: engines[1]}, twophase=True) as session:
        with pytest.raises(ZeroDivisionError), session.begin():
            session.add_all([Item(name="a"), Tag(label="b")])
        assert [engine.pool.checkedout() for engine in engines] == [0, 0]  # type: ignore[attr-defined]
        for model in (Item, Tag):
            session.scalar(sa.select(sa.func.count()).select_from(model))
    stored = len(look("select name from item union all select label from tag"))
    assert stored == (1 if at == "commit" and last else 0)
    assert len(prepared(look)) == (0 if at == "prepare" else 1)
    assert ("may be committed" in caplog.text) is (stored == 1)
    for engine in engines:
        engine.dispose()

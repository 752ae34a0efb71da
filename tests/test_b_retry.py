"""Contract B6: a transaction that lost a race is run again, as if the failed try had never been."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask

from fictive.drivers import sqlstate
from fictive.errors import (
    CommitOutcomeUnknown,
    ConfigurationError,
    HooksFailed,
    TransactionAlreadyBegun,
)
from fictive.sqlalchemy import Rollback, on_commit, on_rollback, run_transaction, transaction
from fictive.testing import postgres
from fictive.testing.wire import Wire
from tests.models import Item, Tag, db

Look = Callable[..., list[Any]]


@pytest.fixture
def session(session: Any, look: Look) -> Any:
    look("insert into item (name, note) values ('a', '0'), ('b', '0')")
    return session


def add_one(session: Any, name: str = "a") -> None:
    item = session.scalars(sa.select(Item).where(Item.name == name)).one()
    item.note = str(int(item.note) + 1)


class TestSerialization:
    """40001, staged by a second connection that commits between the read and the write."""

    def test_b6_the_failed_try_is_gone(self, session: Any, look: Look) -> None:
        tries: list[int] = []
        hooks: list[str] = []
        retried: list[tuple[int, str | None]] = []
        known = session.scalars(sa.select(Item).where(Item.name == "b")).one()
        session.commit()

        def work() -> str:
            tries.append(len(session.new) + sum(1 for each in session if each is not known))
            on_commit(session, lambda: hooks.append(f"commit {len(tries)}"))
            on_rollback(session, lambda: hooks.append(f"rollback {len(tries)}"))
            item = session.scalars(sa.select(Item).where(Item.name == "a")).one()
            before = f"{known.note}+"
            if len(tries) <= 2:
                look("update item set note = note::int + 10 where name = 'a'")
            known.note = before
            item.note = str(int(item.note) + 1)
            session.add(Tag(label="added"))
            session.flush()
            return "done"

        found = run_transaction(
            session,
            work,
            retries=2,
            isolation_level="REPEATABLE READ",
            before_retry=lambda number, error: retried.append((number, sqlstate(error))),
        )
        assert found == "done"
        assert tries == [0, 0, 0]
        assert retried == [(1, "40001"), (2, "40001")]
        assert hooks == ["rollback 1", "rollback 2", "commit 3"]
        assert look("select note from item order by name") == ["21", "0+"]
        assert look("select label from tag") == ["added"]
        assert known in session

    def test_b6_only_so_often(self, session: Any, look: Look) -> None:
        tries: list[int] = []

        @transaction(session, retries=2, isolation_level="REPEATABLE READ")
        def work() -> None:
            tries.append(1)
            add_one(session)
            look("update item set note = note::int + 10 where name = 'a'")

        with pytest.raises(sa.exc.OperationalError) as raised:
            work()
        assert sqlstate(raised.value) == "40001"
        assert len(tries) == 3
        assert not session.in_transaction()

    def test_b6_when_commit_reports_it(
        self, session: Any, look: Look, pg: postgres.Server, database_name: str
    ) -> None:
        """Write skew under SERIALIZABLE: each reads what the other writes, and the second COMMIT fails."""
        tries: list[int] = []

        def work() -> None:
            tries.append(1)
            session.scalar(sa.select(sa.func.count()).where(Item.note == "0"))
            session.execute(sa.update(Item).where(Item.name == "a").values(note="1"))
            if len(tries) == 1:
                with psycopg.connect(pg.url(database_name)) as other:
                    other.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
                    other.execute("select count(*) from item where note = '0'")
                    other.execute("update item set note = '2' where name = 'b'")

        run_transaction(session, work, retries=1, isolation_level="SERIALIZABLE")
        assert len(tries) == 2
        assert look("select note from item order by name") == ["1", "2"]

    def test_b6_an_error_that_the_code_caught(self, session: Any, look: Look) -> None:
        tries: list[int] = []

        def work() -> None:
            tries.append(1)
            try:
                add_one(session)
                if len(tries) == 1:
                    look("update item set note = note::int + 10 where name = 'a'")
                session.flush()
            except sa.exc.DBAPIError:
                pass

        run_transaction(session, work, retries=1, isolation_level="REPEATABLE READ")
        assert look("select note from item order by name") == ["11", "0"]


def test_b6_deadlock(app: Flask, look: Look) -> None:
    """40P01, of two sessions that lock two rows crosswise; the barrier is passed when each has its first lock."""
    look("insert into item (name, note) values ('a', '0'), ('b', '0')")
    barrier = threading.Barrier(2)
    errors: list[BaseException] = []
    tries: list[str] = []

    def work(first: str, second: str) -> None:
        tries.append(first)
        for name in (first, second):
            db.session.execute(sa.update(Item).where(Item.name == name).values(note=Item.note + first))
            if len(tries) <= 2 and name == first:
                barrier.wait(20)

    def run(first: str, second: str) -> None:
        with app.app_context():
            try:
                db.run_transaction(lambda: work(first, second), retries=3)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in (("a", "b"), ("b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert len(tries) >= 3
    assert [sorted(note) for note in look("select note from item")] == [["0", "a", "b"]] * 2


def test_b6_other_errors_are_not_retried(session: Any, wire: Wire, look: Look) -> None:
    tries: list[int] = []

    def count_and(work: Callable[[], Any]) -> Callable[[], Any]:
        tries.clear()

        def run() -> Any:
            tries.append(1)
            return work()

        return run

    with pytest.raises(sa.exc.DataError):
        run_transaction(session, count_and(lambda: session.execute(sa.text("select 1 / 0"))))
    assert len(tries) == 1
    with pytest.raises(ZeroDivisionError):
        run_transaction(session, count_and(lambda: 1 / 0))
    assert len(tries) == 1
    with pytest.raises(HooksFailed):
        run_transaction(session, count_and(lambda: on_commit(session, lambda: 1 / 0)))
    assert len(tries) == 1

    def roll_back() -> None:
        raise Rollback

    assert run_transaction(session, count_and(roll_back)) is None
    assert len(tries) == 1
    wire.reset_when(lambda statement: statement.rstrip("; ").endswith("COMMIT"), "after")
    with pytest.raises(CommitOutcomeUnknown):
        run_transaction(session, count_and(lambda: session.execute(sa.insert(Tag).values(label="once"))))
    assert len(tries) == 1
    assert look("select count(*) from tag") == [1]


def test_b6_refused(session: Any, look: Look) -> None:
    with transaction(session), pytest.raises(TransactionAlreadyBegun, match="outermost"):
        run_transaction(session, print)
    with pytest.raises(ConfigurationError, match=r"run_transaction"), transaction(session, retries=1):
        pass
    assert not session.in_transaction()
    if isinstance(session, sa_orm.scoped_session):  # adding begins a plain session's transaction
        session.add(Tag(label="pending"))
        with pytest.raises(ConfigurationError, match="Tag"):
            run_transaction(session, print)
        session.rollback()
    for wrong in (None, "text", lambda: (yield)):
        with pytest.raises(TypeError):
            run_transaction(session, wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError):
        run_transaction(session, print, retries=-1)

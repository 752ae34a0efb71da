"""Contract B5: on_commit and on_rollback, on opt-in and plain sessions; A15 for hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask

from fictive.errors import CommitOutcomeUnknown, HooksFailed, TransactionAborted, TransactionEnded
from fictive.sqlalchemy import OptInSession, Rollback, TransactionState, on_commit, on_rollback, transaction
from fictive.testing.wire import Wire
from tests.models import Booking, Item, Tag, db

Look = Callable[..., list[Any]]


class Ran:
    """What ran, in order."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.ran: list[str] = []

    def both(self, name: str) -> None:
        on_commit(self.session, lambda: self.ran.append(f"{name} committed"))
        on_rollback(self.session, lambda: self.ran.append(f"{name} rolled back"))

    def take(self) -> list[str]:
        ran, self.ran = self.ran, []
        return ran


@pytest.fixture
def ran(session: Any) -> Ran:
    return Ran(session)


def test_b5_they_follow_savepoints_exactly(session: Any, ran: Ran) -> None:
    with transaction(session):
        ran.both("1")
        with transaction(session):
            ran.both("2")
            with transaction(session):
                ran.both("3")
        with transaction(session):
            ran.both("4")
            with transaction(session):
                ran.both("5, released within")
            with session.begin_nested():
                ran.both("6, SQLAlchemy's own")
            assert ran.take() == []
            raise Rollback
        assert ran.take() == [
            "4 rolled back",
            "5, released within rolled back",
            "6, SQLAlchemy's own rolled back",
        ]
        with transaction(session, savepoint=False):
            ran.both("7, joined")
        ran.both("8")
        session.add(Item(name="a"))
        session.flush()
        with session.no_autoflush, contextlib.suppress(sa.exc.IntegrityError), session.begin_nested():
            session.execute(sa.insert(Item).values(name="a"))
        assert ran.take() == []
    assert ran.take() == [f"{name} committed" for name in ("1", "2", "3", "7, joined", "8")]
    with contextlib.suppress(ZeroDivisionError), transaction(session):
        ran.both("1")
        with transaction(session):
            ran.both("2")
        raise ZeroDivisionError
    assert ran.take() == ["1 rolled back", "2 rolled back"]


def test_b5_a_savepoint_open_when_the_whole_ends(session: Any, ran: Ran) -> None:
    for end in ("rollback", "commit", "close"):
        with contextlib.suppress(TransactionEnded), transaction(session):
            ran.both("1")
            session.begin_nested()
            ran.both("2")
            getattr(session, end)()
            how = "committed" if end == "commit" else "rolled back"
            assert sorted(ran.take()) == [f"1 {how}", f"2 {how}"]
    session.rollback()
    assert ran.take() == []


def test_b5_in_a_savepoint_whose_flush_failed(session: Any, ran: Ran) -> None:
    with transaction(session):
        session.add(Item(name="a"))
        session.flush()
        with contextlib.suppress(sa.exc.IntegrityError), transaction(session):
            ran.both("1")
            session.add(Item(name="a"))
            session.flush()
        assert ran.take() == ["1 rolled back"]
        ran.both("2")
    assert ran.take() == ["2 committed"]


@pytest.mark.parametrize("end", ["rollback", "commit", "close"])
def test_b5_only_in_a_savepoint_that_is_open_when_the_whole_ends(session: Any, ran: Ran, end: str) -> None:
    with contextlib.suppress(TransactionEnded), transaction(session):
        session.begin_nested()
        session.begin_nested()
        ran.both("1")
        session.begin_nested()
        getattr(session, end)()
        assert ran.take() == [f"1 {'committed' if end == 'commit' else 'rolled back'}"]


def test_b5_after_commit_a_hook_may_query_and_begin(session: Any, look: Look) -> None:
    seen: list[Any] = []

    def hook() -> None:
        assert not session.in_transaction()
        seen.append(look("select name from item"))
        with transaction(session):
            session.add(Tag(label="by a hook"))
            on_commit(session, lambda: seen.append("of its own"))
        on_commit(session, lambda: seen.append("outside"))
        seen.append(session.scalar(sa.select(Item.name)))
        session.rollback()

    with transaction(session) as block:
        session.add(Item(name="a"))
        on_commit(session, hook)
    assert block.state is TransactionState.COMMITTED
    assert seen == [["a"], "of its own", "outside", "a"]
    assert look("select label from tag") == ["by a hook"]
    assert not session.in_transaction()


def test_b5_ended_within_the_block(app: Flask) -> None:
    seen = []
    with contextlib.suppress(TransactionEnded), db.session.begin():
        db.on_commit(lambda: seen.append(db.session.scalar(sa.text("select 1"))))
        db.session.commit()
        assert seen == [1]
        with pytest.raises(TransactionEnded, match="committed at"):
            db.on_commit(print)
        db.session.execute(sa.text("select 1"))
    with db.session.begin() as block:
        db.on_rollback(lambda: seen.append(2))
        block.rollback()
    assert seen == [1, 2]


def test_b5_outside_runs_now(session: Any, ran: Ran) -> None:
    ran.both("1")
    assert ran.take() == ["1 committed"]
    with pytest.raises(ZeroDivisionError):
        on_commit(session, lambda: 1 / 0)


def test_b5_bad_hooks(session: Any) -> None:
    async def coroutine() -> None: ...

    for wrong in (None, 3, coroutine):
        for register in (on_commit, on_rollback):
            with pytest.raises(TypeError, match=r"hook|await"):
                register(session, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"db\.session"):
        on_commit("session", print)


def test_b5_all_run_and_failures_are_raised_together(session: Any, look: Look, ran: Ran) -> None:
    def fail(error: BaseException) -> None:
        raise error

    with pytest.raises(HooksFailed, match="2 of 4") as raised, transaction(session) as block:
        session.add(Item(name="a"))
        ran.both("1")
        on_commit(session, lambda: fail(ValueError("first")))
        on_commit(session, lambda: fail(KeyError("second")))
        ran.both("2")
    assert [type(each) for each in raised.value.exceptions] == [ValueError, KeyError]
    assert raised.value.__cause__ is raised.value.exceptions[0]
    assert block.state is TransactionState.COMMITTED
    assert ran.take() == ["1 committed", "2 committed"]
    assert look("select name from item") == ["a"]
    with pytest.raises(KeyboardInterrupt), transaction(session):
        on_commit(session, lambda: fail(KeyboardInterrupt()))
        on_commit(session, lambda: fail(ValueError("third")))
        ran.both("3")
    assert ran.take() == ["3 committed"]
    with pytest.raises(ZeroDivisionError), transaction(session):  # the user's error is the one to see
        on_rollback(session, lambda: fail(ValueError("logged")))
        raise ZeroDivisionError
    with pytest.raises(HooksFailed), transaction(session):
        on_rollback(session, lambda: fail(ValueError("nobody else's error")))
        raise Rollback
    with transaction(session):
        assert session.scalar(sa.text("select 1")) == 1


@pytest.mark.parametrize("how", ["deferred constraint", "aborted", "lost before"])
def test_b5_a_commit_that_fails(how: str, session: Any, ran: Ran, wire: Wire) -> None:
    with pytest.raises(TransactionAborted if how == "aborted" else sa.exc.DBAPIError), transaction(session):
        ran.both("1")
        with transaction(session):
            ran.both("2")
        if how == "deferred constraint":
            session.add_all([Booking(seat=1), Booking(seat=1)])
        elif how == "aborted":
            with contextlib.suppress(sa.exc.DBAPIError):
                session.execute(sa.text("select 1 / 0"))
        else:
            session.execute(sa.text("select pg_terminate_backend(pg_backend_pid())"))
    assert ran.take() == ["1 rolled back", "2 rolled back"]


@pytest.mark.parametrize("in_block", [True, False])
def test_b5_in_doubt_neither_kind_runs(in_block: bool, session: Any, ran: Ran, wire: Wire, caplog: Any) -> None:
    wire.reset_when(lambda statement: statement.rstrip("; ").endswith("COMMIT"), "after")
    if in_block:
        with pytest.raises(CommitOutcomeUnknown), transaction(session):
            session.add(Item(name="a"))
            ran.both("1")
    else:
        session.begin()
        session.add(Item(name="a"))
        ran.both("1")
        with pytest.raises(sa.exc.OperationalError):
            session.commit()
        session.rollback()
    assert ran.take() == []
    assert "2 hooks were not run" in caplog.text
    with transaction(session):
        ran.both("2")
    assert ran.take() == ["2 committed"]


def test_b5_on_a_plain_session_alone(app: Flask, ran: Ran) -> None:
    """No block of fictive's around: commit(), rollback(), close(), and an error in the session's own with block."""
    for pool in (None, sa.NullPool):
        engine = sa.create_engine(db.engine.url, poolclass=pool)
        for end, expected in (("commit", "committed"), ("rollback", "rolled back"), ("close", "rolled back")):
            with sa_orm.Session(engine) as session:
                ran.session = session
                session.execute(sa.insert(Tag).values(label=f"{end} {pool}"))
                ran.both("1")
                getattr(session, end)()
                assert ran.take() == [f"1 {expected}"]
        with sa_orm.Session(engine) as session, pytest.raises(sa.exc.IntegrityError):
            ran.session = session
            session.add_all([Booking(seat=1), Booking(seat=1)])
            ran.both("1")
            session.commit()
        assert ran.take() == ["1 rolled back"] or pool is sa.NullPool
        with sa_orm.Session(engine) as session:
            session.add(Tag(label=f"commit {pool}"))
            with pytest.raises(sa.exc.IntegrityError):
                session.flush()
        engine.dispose()


def test_b5_a_hook_may_query_and_begin_in_the_with_block_of_a_plain_session(app: Flask, look: Look) -> None:
    """SQLAlchemy's own block, in whose `__exit__` the hook runs, refuses statements until it has been left."""

    def write(name: str) -> None:
        with transaction(session):
            session.execute(sa.insert(Tag).values(label=name))

    with sa_orm.Session(db.engine) as session:
        for hook_of, label in ((on_commit, "after commit"), (on_rollback, "after rollback")):
            with contextlib.suppress(ZeroDivisionError), session.begin():
                session.execute(sa.insert(Tag).values(label=f"in the block, {label}"))
                hook_of(session, lambda label=label: write(label))
                if hook_of is on_rollback:
                    1 / 0  # noqa: B018
        with session.begin():
            with contextlib.suppress(ZeroDivisionError), session.begin_nested():
                on_rollback(session, lambda: write("after a savepoint"))
                1 / 0  # noqa: B018
            assert session.in_transaction()
    expected = ["in the block, after commit", "after commit", "after rollback", "after a savepoint"]
    assert look("select label from tag order by id") == expected


def test_b5_under_writes_outside_begin(app: Flask) -> None:
    ran = Ran(db.session)
    db.session.writes_outside = "begin"
    for end, expected in ((db.session.commit, "committed"), (db.session.rollback, "rolled back")):
        db.session.execute(sa.insert(Item).values(name=expected))
        ran.both("1")
        with db.session.begin_nested():
            ran.both("2")
        assert ran.take() == []
        end()
        assert ran.take() == [f"1 {expected}", f"2 {expected}"]
    db.session.execute(sa.insert(Item).values(name="b"))
    ran.both("1")
    db.session.remove()
    assert ran.take() == ["1 rolled back"]


def test_b5_registered_while_a_flush_outside_writes(app: Flask, look: Look) -> None:
    seen = []

    def after_insert(mapper: Any, connection: Any, target: Any) -> None:
        db.on_commit(lambda: seen.append(look("select name from item")))
        db.on_rollback(lambda: seen.append("rolled back"))

    sa.event.listen(Item, "after_insert", after_insert)
    try:
        db.session.add(Item(name="a"))
        db.session.commit()
        db.session.add(Item(name="b"))
        db.session.flush()
        assert seen == [["a"], ["a", "b"]]
        with pytest.raises(sa.exc.IntegrityError), db.session.begin_nested():
            db.session.add(Item(name="c"))
            db.session.flush()
            db.session.execute(sa.insert(Tag), [{"label": "x"}, {"label": "x"}])
        assert seen[2:] == ["rolled back"]
    finally:
        sa.event.remove(Item, "after_insert", after_insert)


def test_b5_another_session_is_not_concerned(app: Flask) -> None:
    seen: list[int] = []
    with OptInSession(db.engine) as other, db.session.begin():
        on_commit(db.session, lambda: seen.append(1))
        with other.begin():
            on_commit(other, lambda: seen.append(2))
        assert seen == [2]
    assert seen == [2, 1]


@pytest.mark.filterwarnings("ignore:transaction already deassociated:sqlalchemy.exc.SAWarning")  # of the other one
def test_b5_a_commit_of_which_a_part_is_stored_runs_no_hook(
    app: Flask, database_url: str, look: Look, caplog: pytest.LogCaptureFixture
) -> None:
    """Over two databases, of which the second to be committed refuses: which one that is, SQLAlchemy leaves open."""
    found = set()
    first, second = (sa.create_engine(database_url) for _ in range(2))
    look("insert into booking (seat) values (1)")
    for engines in [(first, second), (second, first)] * 5:
        ran: list[str] = []
        caplog.clear()
        with OptInSession(binds=dict(zip((Item, Booking), engines, strict=True))) as session:
            with pytest.raises(sa.exc.IntegrityError), session.begin() as tx:
                on_commit(session, lambda ran=ran: ran.append("committed"))
                on_rollback(session, lambda ran=ran: ran.append("rolled back"))
                session.add_all([Item(name="a"), Booking(seat=1)])
            assert session.scalar(sa.select(sa.func.count()).select_from(Booking)) == 1
        stored = look("select name from item") == ["a"]
        found.add(stored)
        if stored:
            assert (ran, tx.state) == ([], TransactionState.IN_DOUBT)
            assert "it may be committed at" in caplog.text
            look("delete from item")
        else:
            assert (ran, tx.state) == (["rolled back"], TransactionState.ROLLED_BACK)
    for engine in (first, second):
        engine.dispose()
    assert True in found

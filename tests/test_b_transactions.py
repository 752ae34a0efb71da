"""Contract B1 to B4: transaction() on opt-in and plain sessions, its options, nesting, Rollback."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask

from fictive.drivers import sqlstate
from fictive.errors import (
    CommitOutcomeUnknown,
    ConfigurationError,
    TransactionAborted,
    TransactionAlreadyBegun,
    TransactionEnded,
    TransactionOutOfOrder,
    UnsupportedDialect,
)
from fictive.sqlalchemy import (
    OptInSession,
    Rollback,
    TransactionState,
    get_transaction,
    transaction,
)
from fictive.testing.wire import Wire
from tests.models import Booking, Item, db
from tests.wirelog import messages, own_verbs

Look = Callable[..., list[Any]]


def names(look: Look) -> list[str]:
    return look("select name from item order by name")


class TestBlocks:
    def test_b1_outside_begins_and_inside_is_a_savepoint(self, session: Any, wire: Wire, look: Look) -> None:
        with wire.record() as log:
            with transaction(session) as outer:
                session.add(Item(name="a"))
                with contextlib.suppress(ZeroDivisionError), get_transaction(session) as inner:
                    assert inner.nested
                    session.add(Item(name="b"))
                    session.flush()
                    raise ZeroDivisionError
                assert inner.state is TransactionState.ROLLED_BACK
                assert outer.state is TransactionState.ACTIVE
                with transaction(session) as released:
                    session.add(Item(name="c"))
            assert not session.in_transaction()
        assert outer.state is released.state is TransactionState.COMMITTED
        assert log.statements[-1].endswith("COMMIT")
        assert names(look) == ["a", "c"]

    def test_b1_decorators(self, app: Flask, look: Look) -> None:
        @db.transaction
        def bare(name: str) -> str:
            """Adds."""
            assert db.session.in_transaction()
            db.session.add(Item(name=name))
            return name

        @db.transaction(isolation_level="SERIALIZABLE")
        def called() -> str:
            return str(db.session.scalar(sa.text("show transaction_isolation")))

        @transaction(db.session)
        def any_session() -> None:
            bare("nested")
            raise Rollback

        @db.get_transaction(savepoint=False)
        def fails() -> None:
            bare("lost")
            raise ZeroDivisionError

        assert bare.__name__ == "bare"
        assert bare.__doc__ == "Adds."
        assert bare("a") == "a"
        assert called() == "serializable"
        any_session()
        with pytest.raises(ZeroDivisionError):
            fails()
        assert names(look) == ["a"]

    def test_b1_what_cannot_be_decorated(self, app: Flask) -> None:
        async def coroutine() -> None: ...

        def generator() -> Iterator[int]:
            yield 1

        for wrong in (coroutine, generator, "text", 3):
            with pytest.raises(TypeError, match="transaction"):
                db.transaction(wrong)  # type: ignore[arg-type]
        block = db.transaction()
        with block, pytest.raises(TransactionAlreadyBegun, match="once more"), block:
            pass

    def test_b1_savepoint_false_joins(self, session: Any, wire: Wire, look: Look) -> None:
        with wire.record() as log:
            with transaction(session, savepoint=False) as outer:
                session.add(Item(name="a"))
                with transaction(session, savepoint=False) as joined:
                    session.add(Item(name="b"))
                    assert joined.state is TransactionState.ACTIVE
                    with pytest.raises(TransactionAlreadyBegun, match="joined"):
                        joined.commit()
            assert joined.state is outer.state is TransactionState.COMMITTED
        assert "SAVEPOINT" not in own_verbs(log)
        assert names(look) == ["a", "b"]

    @pytest.mark.parametrize("mode", ["begin", "refuse"])
    def test_b1_under_writes_outside(self, mode: str, app: Flask, look: Look) -> None:
        db.session.writes_outside = mode
        with db.transaction():
            db.session.add(Item(name="a"))
        assert names(look) == ["a"]
        if mode == "begin":
            db.session.execute(sa.insert(Item).values(name="b"))
            with db.transaction():
                db.session.add(Item(name="c"))
            with db.transaction(savepoint=False) as joined:
                db.session.add(Item(name="d"))
            assert joined.is_active
            assert names(look) == ["a"]
            with db.transaction(savepoint=False) as joined:
                raise Rollback
            assert not db.session.in_transaction()
            assert joined.state is TransactionState.ROLLED_BACK
            assert names(look) == ["a"]

    def test_b1_on_a_plain_session_that_has_begun_by_itself(self, app: Flask, look: Look) -> None:
        with sa_orm.Session(db.engine) as session:
            session.scalar(sa.text("select 1"))
            with transaction(session) as block:
                session.add(Item(name="a"))
            assert block.nested
            assert names(look) == []
            session.commit()
        assert names(look) == ["a"]

    def test_a15_an_honest_commit(self, session: Any) -> None:
        with pytest.raises(TransactionAborted), transaction(session) as block, contextlib.suppress(sa.exc.DBAPIError):
            session.execute(sa.text("select 1 / 0"))
        assert block.state is TransactionState.ROLLED_BACK
        assert session.scalar(sa.text("select 1")) == 1

    def test_b1_a_commit_in_doubt(self, session: Any, wire: Wire) -> None:
        with pytest.raises(CommitOutcomeUnknown), transaction(session) as block:
            session.execute(sa.insert(Item).values(name="a"))
            wire.reset_when(lambda statement: statement.rstrip("; ").endswith("COMMIT"), "after")
        assert block.state is TransactionState.IN_DOUBT
        assert "in doubt" in repr(block)

    def test_b1_a_session_on_a_connection_in_a_transaction(self, app: Flask, look: Look) -> None:
        """As in tests that put a transaction around the application."""
        with db.engine.connect() as connection, connection.begin() as outside:
            with OptInSession(connection, join_transaction_mode="create_savepoint") as session:
                with transaction(session, lock_timeout="3s", durable=True):
                    assert session.scalar(sa.text("show lock_timeout")) == "3s"
                    session.execute(sa.insert(Item).values(name="a"))
            assert connection.scalar(sa.text("show lock_timeout")) == "0"
            outside.rollback()
        assert names(look) == []


class TestOptions:
    def test_b2_timeouts_do_not_leak(self, session: Any) -> None:
        show = sa.text("select current_setting('lock_timeout'), current_setting('statement_timeout')")

        def shown() -> tuple[str, str]:
            return tuple(session.execute(show).one())  # type: ignore[return-value]

        with transaction(session, lock_timeout="5s"):
            assert shown() == ("5s", "0")
            with transaction(session, lock_timeout=1, statement_timeout=timedelta(minutes=1)):
                assert shown() == ("1s", "1min")
                with transaction(session, lock_timeout=2, savepoint=False):
                    assert shown() == ("2s", "1min")
                assert shown() == ("1s", "1min")
            assert shown() == ("5s", "0")
            with contextlib.suppress(ZeroDivisionError), transaction(session, lock_timeout=2):
                assert shown() == ("2s", "0")
                raise ZeroDivisionError
            with contextlib.suppress(ZeroDivisionError), transaction(session, lock_timeout=2, savepoint=False):
                raise ZeroDivisionError
            with contextlib.suppress(sa.exc.DBAPIError), transaction(session, statement_timeout=2):
                session.execute(sa.text("select 1 / 0"))
            assert shown() == ("5s", "0")
        with transaction(session):
            assert shown() == ("0", "0")

    def test_b2_a_savepoint_that_nobody_ended(self, app: Flask) -> None:
        with db.session.begin():
            with db.session.begin_nested():
                db.session.transaction(lock_timeout=1)
                assert db.session.scalar(sa.text("show lock_timeout")) == "1s"
            assert db.session.scalar(sa.text("show lock_timeout")) == "0"

    def test_b2_a_flush_at_the_end_is_within_the_timeout(self, app: Flask, look: Look) -> None:
        with db.session.begin():
            with pytest.raises(sa.exc.OperationalError) as raised, db.transaction(statement_timeout="100ms"):
                look("create function slow() returns trigger language plpgsql as"
                     " $$ begin perform pg_sleep(20); return new; end $$")  # fmt: skip
                look("create trigger slow before insert on item for each row execute function slow()")
                db.session.add(Item(name="a"))
            assert sqlstate(raised.value) == "57014"
            assert db.session.scalar(sa.text("show statement_timeout")) == "0"

    def test_k_serializable_with_timeouts_is_three_round_trips(self, app: Flask, wire: Wire) -> None:
        for _ in range(2):
            with wire.record() as log:
                with db.transaction(isolation_level="SERIALIZABLE", lock_timeout="1s", statement_timeout="2s"):
                    db.session.execute(sa.select(Item.id))
                    db.session.execute(sa.update(Item).values(note="x"))
            assert log.round_trips == 3
        assert messages(log)[1:] == ["UPDATE", "COMMIT"]
        with wire.record() as log, db.transaction(lock_timeout="1s"):
            pass
        assert not log.exchanges

    def test_b2_joining_with_another_level_raises(self, session: Any) -> None:
        with transaction(session, isolation_level="repeatable read"):
            assert session.scalar(sa.text("show transaction_isolation")) == "repeatable read"
            for savepoint in (True, False):
                with transaction(session, isolation_level="REPEATABLE READ", savepoint=savepoint):
                    pass
                for other in ({"isolation_level": "SERIALIZABLE"}, {"read_only": True}, {"deferrable": False}):
                    with pytest.raises(TransactionAlreadyBegun, match=next(iter(other))):
                        with transaction(session, savepoint=savepoint, **other):  # type: ignore[arg-type]
                            pass
        with transaction(session, read_only=True, deferrable=True, isolation_level="SERIALIZABLE"):
            assert session.scalar(sa.text("show transaction_read_only")) == "on"
            assert session.scalar(sa.text("show transaction_deferrable")) == "on"
        with transaction(session):
            assert session.scalar(sa.text("show transaction_isolation")) == "read committed"

    def test_b3_durable(self, session: Any, look: Look) -> None:
        with transaction(session, durable=True):
            session.add(Item(name="a"))
        with transaction(session) as outer:
            with pytest.raises(TransactionAlreadyBegun, match="durable"), transaction(session, durable=True):
                pass
            outer.is_sandbox = True
            with transaction(session, durable=True) as inner:
                assert inner.nested
                with pytest.raises(TransactionAlreadyBegun, match="durable"), transaction(session, durable=True):
                    pass
        assert names(look) == ["a"]

    @pytest.mark.parametrize(
        "options",
        [
            {"lock_timeout": 0}, {"lock_timeout": "5"}, {"statement_timeout": True}, {"statement_timeout": -1},
            {"isolation_level": 3}, {"read_only": "yes"}, {"deferrable": 1}, {"durable": 1}, {"savepoint": None},
            {"durable": True, "savepoint": False}, {"retries": -1}, {"retries": True}, {"retries": 1.5},
            {"before_retry": print}, {"retries": 1, "before_retry": 3},
        ],
    )  # fmt: skip
    def test_b2_bad_options_fail_at_the_call(self, options: dict[str, Any]) -> None:
        for call in (db.transaction, lambda **options: transaction(db.session, **options)):
            with pytest.raises(ConfigurationError):
                call(**options)
        with pytest.raises(TypeError, match="no_such"):
            db.transaction(no_such=1)  # type: ignore[call-overload]

    def test_b2_other_databases(self, lite: sa.Engine) -> None:
        shared = sa.create_engine("sqlite:///file::memory:?uri=true")
        for session in (OptInSession(shared), sa_orm.Session(lite)):
            with pytest.raises(UnsupportedDialect, match="lock_timeout"), transaction(session, lock_timeout=1):
                pass
            with transaction(session), transaction(session):
                assert session.scalar(sa.text("select 1")) == 1
            session.close()
        shared.dispose()


class TestRollback:
    def test_b4_ends_exactly_its_block(self, session: Any, look: Look) -> None:
        with transaction(session) as outer:
            session.add(Item(name="a"))
            with transaction(session) as inner:
                session.add(Item(name="b"))
                session.flush()
                raise Rollback
            assert inner.state is TransactionState.ROLLED_BACK
            session.add(Item(name="c"))
        assert outer.state is TransactionState.COMMITTED
        assert names(look) == ["a", "c"]
        with transaction(session):
            session.add(Item(name="d"))
            raise Rollback
        assert names(look) == ["a", "c"]

    def test_b4_names_an_outer_block(self, session: Any, look: Look) -> None:
        reached = []
        with transaction(session):
            session.add(Item(name="a"))
            with transaction(session) as middle:
                session.add(Item(name="b"))
                with transaction(session), transaction(session, savepoint=False):
                    raise Rollback(middle)
                reached.append("inner")
            reached.append("outer")
        assert reached == ["outer"]
        assert names(look) == ["a"]
        with pytest.raises(TransactionEnded):
            Rollback(middle)
        with pytest.raises(TypeError, match="with transaction"):
            Rollback("a reason")  # type: ignore[arg-type]

    @pytest.mark.parametrize("named", [False, True])
    def test_b4_in_a_joined_block_ends_what_it_joined(self, named: bool, session: Any, look: Look) -> None:
        with transaction(session):
            session.add(Item(name="a"))
            with transaction(session) as joined:
                session.add(Item(name="b"))
                with transaction(session, savepoint=False) as block:
                    raise Rollback(block if named else None)
            assert joined.state is TransactionState.ROLLED_BACK
            with transaction(session), transaction(session, savepoint=False) as block:
                session.add(Item(name="c"))
                block.rollback()
        assert names(look) == ["a"]

    def test_b4_in_other_blocks_and_in_none(self, app: Flask, look: Look) -> None:
        with db.session.begin() as outer, db.session.begin_nested():
            db.session.add(Item(name="a"))
            raise Rollback(outer)
        with db.session.begin_nested():
            db.session.add(Item(name="a"))
            raise Rollback
        assert names(look) == []
        with pytest.raises(Rollback, match="outside any block"):
            raise Rollback
        with pytest.raises(TransactionEnded, match="committed at"), db.session.begin():
            db.session.commit()
            raise Rollback
        with db.session.begin():
            db.session.rollback()
            raise Rollback

    @pytest.mark.parametrize("error", [None, ValueError("x")])
    def test_b4_leaving_out_of_order(self, error: Exception | None, session: Any, look: Look) -> None:
        outer, inner = transaction(session), transaction(session)
        outer.__enter__()
        session.add(Item(name="a"))
        block = inner.__enter__()
        session.add(Item(name="b"))
        if error is None:
            with pytest.raises(TransactionOutOfOrder, match="savepoint active"):
                outer.__exit__(None, None, None)
        else:
            assert not outer.__exit__(ValueError, error, None)
        assert block.state is TransactionState.ROLLED_BACK
        assert not inner.__exit__(None, None, None)
        assert not session.in_transaction()
        assert names(look) == []
        with transaction(session):
            session.add(Item(name="c"))
        assert names(look) == ["c"]

    def test_b4_ended_by_the_session(self, app: Flask, look: Look) -> None:
        with sa_orm.Session(db.engine) as session:
            with transaction(session, lock_timeout=1) as block:
                session.add(Item(name="a"))
                session.commit()
                assert block.state is TransactionState.COMMITTED
                assert "test_b4_ended_by_the_session" in str(block.ended_at)
                with pytest.raises(sa.exc.InvalidRequestError, match="context manager"), transaction(session):
                    pass  # as in a block of SQLAlchemy's own
            with transaction(session) as other:
                assert session.scalar(sa.text("show lock_timeout")) == "0"
                session.add(Item(name="b"))
            assert other.state is TransactionState.COMMITTED
            with transaction(session) as outer, transaction(session) as inner:
                session.rollback()
            assert outer.state is inner.state is TransactionState.ROLLED_BACK
            with pytest.raises(TransactionEnded, match="committed at"), transaction(session):
                session.commit()
                raise Rollback
            with transaction(session, lock_timeout=1) as block:
                session.close()
            assert block.state is TransactionState.ROLLED_BACK
            assert session.info["fictive.local_settings"] == 0
        assert names(look) == ["a", "b"]

    def test_b4_a_failing_commit(self, session: Any) -> None:
        with pytest.raises(sa.exc.IntegrityError), transaction(session) as block:
            session.add_all([Booking(seat=1), Booking(seat=1)])
        assert block.state is TransactionState.ROLLED_BACK
        assert not session.in_transaction()

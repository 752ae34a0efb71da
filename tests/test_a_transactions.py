"""Contract A, transactions: A4, A5, A6, A8, A9, A15, A17, A18."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from greenlet import GreenletExit

from fictive.errors import (
    AlreadyCommittedWarning,
    ConfigurationError,
    TransactionAborted,
    TransactionAlreadyBegun,
    TransactionEnded,
)
from fictive.sqlalchemy import OptInSession, TransactionState
from fictive.testing.wire import Wire
from tests.conftest import MakeApp
from tests.models import Booking, Child, Dog, Item, Tag, db, plain
from tests.wirelog import own_verbs, verbs

Look = Callable[..., list[Any]]

pytestmark = pytest.mark.usefixtures("app")


def kill_others(look: Look) -> None:
    """Terminate this database's other backends, and wait until they are gone."""
    look(
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
        " where datname = current_database() and pid <> pg_backend_pid()"
    )


class TestBlocks:
    def test_a4_begin_to_commit(self, wire: Wire, look: Look, backends: Callable[[], list[str]]) -> None:
        with wire.record() as log:
            with db.session.begin() as transaction:
                db.session.add(Item(name="a"))
                db.session.flush()
                assert look("select count(*) from item") == [0]
                assert backends() == ["idle in transaction"]
                db.session.add(Item(name="b"))
            assert transaction.state is TransactionState.COMMITTED
        assert verbs(log) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
        assert look("select count(*) from item") == [2]

    @pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), GreenletExit()])
    @pytest.mark.parametrize("begin", ["begin", "begin_nested", "transaction"])
    def test_a4_any_exception_rolls_back_and_comes_out_unchanged(
        self, error: BaseException, begin: str, wire: Wire, look: Look
    ) -> None:
        with wire.record() as log, pytest.raises(type(error)) as raised:
            with getattr(db.session, begin)() as transaction:
                db.session.add(Item(name="a"))
                db.session.flush()
                raise error
        assert raised.value is error
        assert raised.value.__cause__ is None
        assert transaction.state is TransactionState.ROLLED_BACK
        assert verbs(log) == ["BEGIN", "INSERT", "ROLLBACK"]
        assert look("select count(*) from item") == [0]
        assert not db.session.in_transaction()

    @pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
    @pytest.mark.parametrize("how", ["killed", "reset", "closed"])
    def test_a4_the_users_error_comes_out_when_the_rollback_fails(
        self, error: BaseException, how: str, wire: Wire, look: Look
    ) -> None:
        with pytest.raises(type(error)) as raised, db.session.begin():
            db.session.add(Item(name="a"))
            db.session.flush()
            {"killed": lambda: kill_others(look), "reset": wire.reset, "closed": wire.close_connections}[how]()
            raise error
        assert raised.value is error
        assert db.session.scalar(sa.select(sa.func.count()).select_from(Item)) == 0

    @pytest.mark.parametrize("leave", [None, ValueError])
    def test_a4_a_block_without_statements_sends_nothing(self, leave: type[Exception] | None, wire: Wire) -> None:
        with wire.record() as log, contextlib.suppress(ValueError):
            with db.session.begin(), db.session.begin_nested():
                if leave:
                    raise leave
        assert verbs(log) == []
        assert log.connections_opened == 0

    def test_a4_begin_without_with(self, wire: Wire, look: Look) -> None:
        with wire.record() as log:
            transaction = db.session.begin()
            db.session.add(Item(name="a"))
            transaction.commit()
            db.session.begin()
            db.session.add(Item(name="b"))
            db.session.commit()
            db.session.begin()
            db.session.add(Item(name="c"))
            db.session.flush()
            db.session.rollback()
            db.session.scalars(sa.select(Item)).all()
        assert verbs(log) == ["BEGIN", "INSERT", "COMMIT"] * 2 + ["BEGIN", "INSERT", "ROLLBACK", "SELECT"]
        assert look("select name from item order by name") == ["a", "b"]

    def test_a4_closing_the_session_inside_rolls_back(self, look: Look) -> None:
        with db.session.begin():
            db.session.add(Item(name="a"))
            db.session.flush()
            db.session.remove()
        assert look("select count(*) from item") == [0]
        assert not db.session.in_transaction()

    def test_a4_killed_inside(self, look: Look) -> None:
        with pytest.raises(sa.exc.OperationalError), db.session.begin():
            db.session.add(Item(name="a"))
            db.session.flush()
            kill_others(look)
            db.session.execute(sa.text("select 1"))
        assert look("select count(*) from item") == [0]
        assert db.session.scalar(sa.text("select 1")) == 1

    def test_a8_begin_inside_raises_and_names_what_to_call(self, wire: Wire) -> None:
        with db.session.begin():
            with wire.record() as log, pytest.raises(TransactionAlreadyBegun) as raised:
                db.session.begin()
            assert "transaction()" in str(raised.value)
            assert "begin_nested()" in str(raised.value)
            assert isinstance(raised.value, sa.exc.InvalidRequestError)
            assert verbs(log) == []
            assert db.session.in_transaction()

    def test_a8_begin_nested_inside_is_a_savepoint(self, wire: Wire, look: Look) -> None:
        with wire.record() as log, db.session.begin():
            db.session.add(Item(name="kept"))
            with contextlib.suppress(ZeroDivisionError), db.session.begin_nested():
                assert db.session.in_nested_transaction()
                db.session.add(Item(name="undone"))
                db.session.flush()
                _ = 1 / 0
            with db.session.transaction():
                db.session.add(Item(name="kept too"))
        assert verbs(log) == (
            ["BEGIN", "INSERT", "SAVEPOINT", "INSERT", "ROLLBACK", "SAVEPOINT", "INSERT", "RELEASE", "COMMIT"]
        )
        assert look("select name from item order by name") == ["kept", "kept too"]

    @pytest.mark.parametrize("begin", ["begin_nested", "transaction"])
    def test_a8_outside_it_is_a_transaction_that_ends_with_its_block(self, begin: str, wire: Wire, look: Look) -> None:
        with wire.record() as log:
            with getattr(db.session, begin)() as transaction:
                assert not transaction.nested
                db.session.add(Item(name="a"))
            db.session.scalars(sa.select(Item)).all()
        assert verbs(log) == ["BEGIN", "INSERT", "COMMIT", "SELECT"]
        assert look("select name from item") == ["a"]

    def test_a8_savepoints_nest(self, look: Look) -> None:
        with db.session.begin():
            for depth in range(3):
                with db.session.begin_nested():
                    db.session.add(Item(name=f"depth {depth}"))
                    with contextlib.suppress(ValueError), db.session.begin_nested():
                        db.session.add(Item(name="lost"))
                        raise ValueError
        assert look("select count(*) from item where name like 'depth%%'") == [3]
        assert look("select count(*) from item where name = 'lost'") == [0]


ENDINGS: dict[str, tuple[Callable[[Any], None], str]] = {
    "session.commit": (lambda transaction: db.session.commit(), "committed"),
    "session.rollback": (lambda transaction: db.session.rollback(), "rolled back"),
    "transaction.commit": (lambda transaction: transaction.commit(), "committed"),
    "transaction.rollback": (lambda transaction: transaction.rollback(), "rolled back"),
}


class TestEndedBlocks:
    @pytest.mark.parametrize(("end", "word"), ENDINGS.values(), ids=ENDINGS.keys())
    def test_a9_the_next_statement_raises_and_names_the_line(
        self, end: Callable[[Any], None], word: str, wire: Wire, look: Look
    ) -> None:
        statements: list[Callable[[], Any]] = [
            lambda: db.session.execute(sa.text("select 1")),
            lambda: db.session.scalar(sa.text("select 1")),
            lambda: db.session.get(Item, 1),
            lambda: Item.query.all(),
            lambda: db.session.connection(),
            lambda: db.session.begin(),
            lambda: db.session.begin_nested(),
            lambda: db.session.commit(),
            lambda: (db.session.add(Item(name="late")), db.session.flush()),
            lambda: db.session.bulk_save_objects([Item(name="late")]),
        ]
        with wire.record() as log:
            with db.session.begin() as transaction:
                db.session.add(Item(name="a"))
                db.session.flush()
                end(transaction)
                assert not db.session.in_transaction()
                for statement in statements:
                    with pytest.raises(TransactionEnded) as raised:
                        statement()
                    assert word in str(raised.value)
                    assert __file__ in str(raised.value)
                db.session.expunge_all()
        assert verbs(log) == ["BEGIN", "INSERT", "COMMIT" if word == "committed" else "ROLLBACK"]
        assert look("select count(*) from item") == [1 if word == "committed" else 0]
        assert db.session.scalar(sa.text("select 1")) == 1

    def test_a9_an_ended_savepoint_leaves_the_transaction_open(self, look: Look) -> None:
        with db.session.begin():
            db.session.add(Item(name="outer"))
            with db.session.begin_nested() as savepoint:
                db.session.add(Item(name="inner"))
                db.session.flush()
                savepoint.rollback()
                with pytest.raises(TransactionEnded, match="savepoint"):
                    db.session.execute(sa.text("select 1"))
            db.session.execute(sa.text("select 1"))
        assert look("select name from item") == ["outer"]

    def test_a9_commit_in_a_savepoint_ends_both(self, look: Look) -> None:
        with db.session.begin():
            with db.session.begin_nested():
                db.session.add(Item(name="a"))
                db.session.commit()
                with pytest.raises(TransactionEnded):
                    db.session.execute(sa.text("select 1"))
            with pytest.raises(TransactionEnded):
                db.session.execute(sa.text("select 1"))
        assert look("select name from item") == ["a"]

    def test_a9_an_exception_after_commit_comes_out(self, look: Look) -> None:
        with pytest.raises(ZeroDivisionError), db.session.begin():
            db.session.add(Item(name="a"))
            db.session.commit()
            _ = 1 / 0
        assert look("select name from item") == ["a"]

    def test_a9_a_transaction_cannot_be_ended_twice(self) -> None:
        with db.session.begin() as transaction:
            pass
        assert not transaction.is_active
        assert "committed" in repr(transaction)
        for again in (transaction.commit, transaction.rollback, transaction.__enter__):
            with pytest.raises(TransactionEnded):
                again()
        transaction.close()


ATOMIC: dict[str, tuple[Callable[[], Any], str]] = {
    "parent and child": (
        lambda: (db.session.add(Item(name="p", children=[Child(), Child(size=-1)])), db.session.flush()),
        "item",
    ),
    "joined inheritance": (
        lambda: (db.session.add_all([Dog(breed="x"), Dog(breed="x")]), db.session.flush()),
        "animal",
    ),
    "many to many": (
        lambda: (db.session.add(Item(name="p", tags=[Tag(label="t"), Tag(label="t")])), db.session.flush()),
        "item",
    ),
    "commit": (lambda: (db.session.add_all([Item(name="x"), Item(name="x")]), db.session.commit()), "item"),
    "execute many": (lambda: db.session.execute(sa.insert(Item), [{"name": "x"}, {"name": "x"}]), "item"),
    "execute many core": (
        lambda: db.session.execute(sa.insert(Item.__table__), [{"name": "x"}, {"name": "x"}]),
        "item",
    ),
    "execute many text": (
        lambda: db.session.execute(sa.text("insert into item (name) values (:name)"), [{"name": "x"}, {"name": "x"}]),
        "item",
    ),
    "execute many returning": (
        lambda: db.session.scalars(sa.insert(Item).returning(Item), [{"name": "x"}, {"name": "x"}]).all(),
        "item",
    ),
    "bulk_save_objects": (
        lambda: db.session.bulk_save_objects([Tag(label="a"), Item(name="x"), Item(name="x")]),
        "tag",
    ),
    "bulk_insert_mappings": (lambda: db.session.bulk_insert_mappings(Item, [{"name": "x"}, {"name": "x"}]), "item"),
    "deferred constraint": (
        lambda: (db.session.add_all([Booking(seat=1), Booking(seat=1)]), db.session.flush()),
        "booking",
    ),
}


class TestAtomicOutside:
    @pytest.mark.parametrize(("write", "table"), ATOMIC.values(), ids=ATOMIC.keys())
    def test_a5_all_or_nothing(self, write: Callable[[], Any], table: str, wire: Wire, look: Look) -> None:
        with wire.record() as log, pytest.raises(sa.exc.IntegrityError):
            write()
        assert verbs(log)[0] == "BEGIN"
        assert own_verbs(log)[-1] in ("ROLLBACK", "COMMIT")
        for name in (table, "item", "child", "tag", "animal", "dog", "item_tag", "booking"):
            assert look(f"select count(*) from {name}") == [0]
        assert db.engine.pool.checkedout() == 0
        assert not db.session.in_transaction()

    def test_a5_2501_rows_with_a_duplicate_last(self, look: Look) -> None:
        db.session.add_all([Item(name=f"n{i}") for i in range(2500)] + [Item(name="n0")])
        with pytest.raises(sa.exc.IntegrityError):
            db.session.flush()
        assert look("select count(*) from item") == [0]

    def test_a5_bulk_update_mappings(self, look: Look) -> None:
        look("insert into item (id, name) values (1, 'a'), (2, 'b')")
        with pytest.raises(sa.exc.IntegrityError):
            db.session.bulk_update_mappings(Item, [{"id": 1, "name": "c"}, {"id": 2, "name": "c"}])
        assert look("select name from item order by id") == ["a", "b"]

    def test_a5_cascaded_deletes_and_updates(self, wire: Wire, look: Look) -> None:
        item = Item(name="a", children=[Child(), Child()], tags=[Tag(label="t")])
        db.session.add(item)
        db.session.flush()
        db.session.delete(item)
        with wire.record() as log:
            db.session.flush()
        assert (verbs(log)[0], verbs(log)[-1]) == ("BEGIN", "COMMIT")
        assert look("select (select count(*) from child) + (select count(*) from item_tag)") == [0]

    def test_a5_a_partial_flush_leaves_the_rest_pending(self, look: Look) -> None:
        one, two = Item(name="one"), Item(name="two")
        db.session.add_all([one, two])
        with (
            contextlib.suppress(AttributeError),
            pytest.warns(sa.exc.SADeprecationWarning) if (sa.__version__ >= "2.1") else contextlib.nullcontext(),
        ):
            db.session.flush([one])
        assert look("select name from item") == ["one"]
        assert two in db.session.new
        db.session.commit()
        assert look("select count(*) from item") == [2]

    def test_a5_flush_expires_nothing(self, wire: Wire) -> None:
        db.session().expire_on_commit = True
        item = Item(name="a")
        db.session.add(item)
        db.session.flush()
        with wire.record() as log:
            assert item.name == "a"
        assert verbs(log) == []

    def test_a6_commit_writes_what_is_pending_in_one_transaction(self, wire: Wire, look: Look) -> None:
        db.session.add(Item(name="a"))
        db.session.add(Tag(label="t"))
        with wire.record() as log:
            db.session.commit()
            db.session.commit()
        assert verbs(log) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
        assert look("select (select count(*) from item) + (select count(*) from tag)") == [2]

    def test_a6_commit_and_rollback_cost_nothing_when_nothing_is_pending(self, wire: Wire) -> None:
        db.session.scalars(sa.select(Item)).all()
        with wire.record() as log:
            db.session.commit()
            db.session.rollback()
            db.session.flush()
        assert verbs(log) == []
        assert log.connections_opened == 0

    def test_a6_rollback_discards_what_is_pending(self, wire: Wire, look: Look) -> None:
        look("insert into item (id, name) values (1, 'a'), (2, 'b')")
        item, gone = db.session.get(Item, 1), db.session.get(Item, 2)
        new = Item(name="new")
        db.session.add(new)
        item.name = "changed"
        db.session.delete(gone)
        with wire.record() as log:
            db.session.rollback()
        assert verbs(log) == []
        assert new not in db.session
        assert gone in db.session
        assert item.name == "a"
        db.session.commit()
        assert look("select name from item order by id") == ["a", "b"]

    def test_a6_add_commit_code_as_for_flask_sqlalchemy(self, wire: Wire, look: Look) -> None:
        item = Item(name="a")
        db.session.add(item)
        db.session.commit()
        item.name = "b"
        db.session.commit()
        db.session.delete(item)
        with wire.record() as log:
            db.session.commit()
        assert verbs(log)[0] == "BEGIN"
        assert verbs(log)[-2:] == ["DELETE", "COMMIT"]
        assert look("select count(*) from item") == [0]


class TestHonestCommit:
    @pytest.fixture
    def swallowed(self) -> Callable[[], BaseException]:
        def swallow() -> BaseException:
            with pytest.raises(sa.exc.DBAPIError) as raised:
                db.session.execute(sa.text("select 1/0"))
            with contextlib.suppress(sa.exc.DBAPIError):
                db.session.execute(sa.text("select 1"))  # refused: the transaction is aborted
            return raised.value

        return swallow

    def test_a15_a_block_of_an_aborted_transaction_raises_from_the_first_error(
        self, swallowed: Callable[[], BaseException], wire: Wire, look: Look
    ) -> None:
        with wire.record() as log, pytest.raises(TransactionAborted) as raised, db.session.begin() as transaction:
            db.session.add(Item(name="a"))
            db.session.flush()
            first = swallowed()
            db.session.add(Item(name="pending at the end"))
        assert raised.value.__cause__ is first
        assert transaction.state is TransactionState.ROLLED_BACK
        assert verbs(log) == ["BEGIN", "INSERT", "SELECT", "SELECT", "ROLLBACK"]
        assert look("select count(*) from item") == [0]
        assert db.session.scalar(sa.text("select 1")) == 1

    @pytest.mark.parametrize("commit", [lambda transaction: transaction.commit(), lambda _: db.session.commit()])
    def test_a15_so_does_commit(self, commit: Callable[[Any], None], swallowed: Callable[[], BaseException]) -> None:
        transaction = db.session.begin()
        first = swallowed()
        with pytest.raises(TransactionAborted) as raised:
            commit(transaction)
        assert raised.value.__cause__ is first

    def test_a15_an_error_through_core_counts(self) -> None:
        with pytest.raises(TransactionAborted) as raised, db.session.begin():
            connection = db.session.connection()
            with pytest.raises(sa.exc.DBAPIError) as first:
                connection.execute(sa.text("select 1/0"))
        assert raised.value.__cause__ is first.value

    def test_a15_a_failed_flush_counts(self, look: Look) -> None:
        look("insert into item (name) values ('a')")
        with pytest.raises(TransactionAborted) as raised, db.session.begin():
            db.session.add(Item(name="a"))
            with pytest.raises(sa.exc.IntegrityError) as first:
                db.session.flush()
        assert raised.value.__cause__ is first.value

    def test_a15_a_savepoint_too(self, swallowed: Callable[[], BaseException], look: Look) -> None:
        with db.session.begin():
            db.session.add(Item(name="kept"))
            with pytest.raises(TransactionAborted) as raised, db.session.begin_nested():
                first = swallowed()
            assert raised.value.__cause__ is first
        assert look("select name from item") == ["kept"]

    def test_a15_a_savepoint_that_was_rolled_back_is_forgiven(self, look: Look) -> None:
        with db.session.begin():
            db.session.add(Item(name="kept"))
            with contextlib.suppress(sa.exc.DBAPIError), db.session.begin_nested():
                db.session.execute(sa.text("select 1/0"))
        assert look("select name from item") == ["kept"]

    def test_a15_an_error_that_never_reached_the_server_aborts_nothing(self, look: Look) -> None:
        with db.session.begin():
            with pytest.raises(sa.exc.SQLAlchemyError):
                db.session.execute(sa.text("select :a"), {"a": object()})
            db.session.add(Item(name="a"))
        assert look("select name from item") == ["a"]

    def test_a15_an_error_swallowed_in_a_listener_during_the_flush(self, look: Look) -> None:
        def swallow(session: Any, context: Any) -> None:
            with contextlib.suppress(sa.exc.DBAPIError):
                session.execute(sa.text("select 1/0"))

        session = db.session()
        sa.event.listen(session, "after_flush", swallow)
        with pytest.raises(TransactionAborted), db.session.begin():
            db.session.add(Item(name="a"))
        assert look("select count(*) from item") == [0]

    def test_a15_a_connection_lost_and_swallowed(self, look: Look) -> None:
        with pytest.raises(TransactionAborted) as raised, db.session.begin():
            db.session.add(Item(name="a"))
            db.session.flush()
            kill_others(look)
            with pytest.raises(sa.exc.OperationalError) as first:
                db.session.execute(sa.text("select 1"))
        assert raised.value.__cause__ is first.value
        assert look("select count(*) from item") == [0]

    def test_a15_a_failed_commit_raises_what_the_server_said(self, wire: Wire, look: Look) -> None:
        with wire.record() as log, pytest.raises(sa.exc.IntegrityError), db.session.begin() as transaction:
            db.session.add_all([Booking(seat=1), Booking(seat=1)])
        assert transaction.state is TransactionState.ROLLED_BACK
        assert verbs(log) == ["BEGIN", "INSERT", "COMMIT"]
        assert look("select count(*) from booking") == [0]


class TestLevels:
    @pytest.fixture
    def repeatable_by_default(self, app: Flask, look: Look) -> None:
        look(
            f'alter database "{look("select current_database()")[0]}" '
            "set default_transaction_isolation = 'repeatable read'"
        )
        db.engine.dispose()

    @pytest.mark.usefixtures("repeatable_by_default")
    def test_a17_the_servers_default_level_stays(self) -> None:
        db.session.execute(sa.text("select 1"))
        for _ in range(2):
            with db.session.begin():
                assert db.session.scalar(sa.text("show transaction_isolation")) == "repeatable read"
            with db.session.transaction(isolation_level="SERIALIZABLE"):
                assert db.session.scalar(sa.text("show transaction_isolation")) == "serializable"
            with db.engine.connect().execution_options(isolation_level="READ COMMITTED") as connection:
                assert connection.scalar(sa.text("show transaction_isolation")) == "read committed"
        with db.engine.begin() as connection:
            assert connection.scalar(sa.text("show transaction_isolation")) == "repeatable read"

    def test_a17_what_is_asked_for_goes_into_begin(self, wire: Wire, driver: str) -> None:
        with wire.record() as log:
            with db.session.transaction(isolation_level="SERIALIZABLE", read_only=True, deferrable=True):
                db.session.execute(sa.text("select 1"))
            with db.session.begin():
                db.session.execute(sa.text("select 1"))
        assert verbs(log) == ["BEGIN", "SELECT", "COMMIT"] * 2
        first, second = (text for text in log.statements if text.startswith("BEGIN"))
        assert all(word in first for word in ("ISOLATION LEVEL SERIALIZABLE", "READ ONLY", "DEFERRABLE"))
        assert second.partition(";")[0] == "BEGIN"

    def test_a17_sqlalchemys_own_way_to_ask(self, wire: Wire) -> None:
        with wire.record() as log, db.session.begin():
            db.session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            assert db.session.scalar(sa.text("show transaction_isolation")) == "repeatable read"
        assert verbs(log) == ["BEGIN", "SHOW", "COMMIT"]
        with wire.record() as log, db.session.begin():
            db.session.execute(sa.text("select 1"))
        assert log.statements[0].partition(";")[0] == "BEGIN"

    def test_a17_options_cannot_change_inside(self) -> None:
        with db.session.begin(), pytest.raises(TransactionAlreadyBegun):
            db.session.transaction(read_only=True)

    def test_a17_an_unknown_level(self) -> None:
        with pytest.raises(ConfigurationError, match=r"NO SUCH.*SERIALIZABLE"):
            db.session.transaction(isolation_level="NO SUCH")
        assert db.session.scalar(sa.text("select 1")) == 1


class TestPool:
    def modes(self) -> list[tuple[bool, int]]:
        """Autocommit and transaction status of every pooled connection, by taking them all."""
        raw = [db.engine.raw_connection() for _ in range(db.engine.pool.checkedin() or 1)]
        try:
            return [
                (
                    each.dbapi_connection.autocommit,  # type: ignore[union-attr]
                    int(each.dbapi_connection.info.transaction_status),  # type: ignore[union-attr]
                )
                for each in raw
            ]
        finally:
            for each in raw:
                each.close()

    def test_a18_after_100_cycles(self, wire: Wire) -> None:
        for _ in range(100):
            db.session.execute(sa.text("select 1"))
            with db.session.begin():
                db.session.execute(sa.text("select 1"))
        assert set(self.modes()) == {(False, 0)}
        with wire.record() as log, pytest.raises(ZeroDivisionError), db.engine.begin() as connection:
            connection.execute(sa.insert(Item).values(name="a"))
            _ = 1 / 0
        assert own_verbs(log) == ["BEGIN", "INSERT", "ROLLBACK"]

    @pytest.mark.parametrize("trouble", ["error outside", "error inside", "killed", "failed commit", "stream dropped"])
    def test_a18_after_trouble(self, trouble: str, look: Look) -> None:
        if trouble == "error outside":
            with pytest.raises(sa.exc.DBAPIError):
                db.session.execute(sa.text("select 1/0"))
        elif trouble == "error inside":
            with pytest.raises(sa.exc.DBAPIError), db.session.begin():
                db.session.execute(sa.text("select 1/0"))
        elif trouble == "killed":
            with pytest.raises(sa.exc.DBAPIError), db.session.begin():
                db.session.execute(sa.text("select 1"))
                kill_others(look)
                db.session.execute(sa.text("select 1"))
        elif trouble == "failed commit":
            with pytest.raises(sa.exc.IntegrityError), db.session.begin():
                db.session.add_all([Booking(seat=1), Booking(seat=1)])
        else:
            db.session.execute(sa.text("select generate_series(1, 1000)"), execution_options={"yield_per": 1}).first()
        assert set(self.modes()) == {(False, 0)}

    def test_a18_a_connection_left_in_a_transaction_is_closed(self, wire: Wire) -> None:
        raw = db.engine.raw_connection()
        raw.dbapi_connection.autocommit = True  # type: ignore[union-attr]
        raw.cursor().execute("begin")  # the driver's rollback() sends nothing in autocommit
        pid = raw.cursor().execute("select pg_backend_pid()") or None
        del pid
        raw.close()
        assert set(self.modes()) == {(False, 0)}
        with wire.record() as log:
            db.session.execute(sa.text("select 1"))
        assert verbs(log) == ["SELECT"]

    def test_a18_text_cannot_open_a_transaction_behind_the_back(self) -> None:
        for text in ("begin", "start transaction", "commit", "rollback", "savepoint x"):
            with pytest.raises(sa.exc.InvalidRequestError):
                db.session.execute(sa.text(text))


def test_the_peer_as_measured(make_app: MakeApp, wire: Wire) -> None:
    """What these rules are about: plain Flask-SQLAlchemy on the same case."""
    app: Flask = make_app(plain.db)
    with wire.record() as log, app.app_context():
        plain.db.session.get(plain.Item, 1)
    assert verbs(log) == ["BEGIN", "SELECT", "ROLLBACK"]


def test_a23_the_warning_of_commit_mode_is_not_given_for_blocks(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(ZeroDivisionError), db.session.begin():
        db.session.add(Item(name="a"))
        db.session.flush()
        _ = 1 / 0
    db.session.rollback()
    assert not [w for w in recwarn if issubclass(w.category, AlreadyCommittedWarning)]


def test_a18_an_engine_that_was_in_use_before_its_first_opt_in_session(database_url: str, wire: Wire) -> None:
    engine = sa.create_engine(wire.url(database_url))
    with engine.connect() as connection:
        connection.execute(sa.text("select 1"))
    with OptInSession(engine) as session:
        session.execute(sa.text("select 1"))
    with pytest.raises(ZeroDivisionError), engine.begin() as connection:
        connection.execute(sa.insert(Item).values(name="a"))
        _ = 1 / 0
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(Item)) == 0
    engine.dispose()


def test_a23_under_begin_a_write_in_pinned_lasts_until_commit(make_app: MakeApp, look: Look) -> None:
    look("insert into item (name) values ('a'), ('b')")
    app = make_app(FICTIVE_WRITES_OUTSIDE="begin")
    with app.app_context():
        with db.pinned():
            db.session.execute(sa.text("set work_mem = '5MB'"))
            db.session.execute(sa.update(Item).where(Item.name == "a").values(note="x"))
        assert db.session.in_transaction()
        db.session.get(Item, 2).note = "y"
        db.session.commit()
        assert db.engine.pool.checkedout() == 0
        assert db.session.scalar(sa.text("show work_mem")) != "5MB"
        assert look("select note from item order by name") == ["x", "y"]

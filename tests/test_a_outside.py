"""Contract A, outside a transaction: A1, A2, A3, A7, A10."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask

from fictive.testing.wire import Wire
from tests.conftest import MakeApp
from tests.models import Animal, Child, Dog, Item, Tag, db
from tests.wirelog import verbs

Look = Callable[..., list[Any]]

READS: dict[str, Callable[[], Any]] = {
    "execute": lambda: db.session.execute(sa.select(Item)).all(),
    "execute core": lambda: db.session.execute(sa.select(Item.__table__)).all(),
    "execute text": lambda: db.session.execute(sa.text("select 1")).all(),
    "scalars": lambda: db.session.scalars(sa.select(Item)).all(),
    "scalar": lambda: db.session.scalar(sa.select(Item)),
    "scalar core": lambda: db.session.scalar(sa.select(sa.func.count()).select_from(Item)),
    "get": lambda: db.session.get(Item, 1),
    "get_one": lambda: db.session.get_one(Item, 1),
    "get_or_404": lambda: db.get_or_404(Item, 1),
    "first_or_404": lambda: db.first_or_404(sa.select(Item)),
    "one_or_404": lambda: db.one_or_404(sa.select(Item).where(Item.id == 1)),
    "query all": lambda: Item.query.all(),
    "query first": lambda: Item.query.filter_by(name="one").first(),
    "query count": lambda: Item.query.count(),
    "query iterated": lambda: list(Item.query),
    "half read": lambda: db.session.execute(sa.select(Item)).first(),
    "not read": lambda: db.session.execute(sa.select(Item)),
    "joined eager load": lambda: (
        db.session.scalars(sa.select(Item).options(sa_orm.joinedload(Item.children))).unique().all()
    ),
    "lambda statement": lambda: db.session.scalars(sa.lambda_stmt(lambda: sa.select(Item))).all(),
    "union": lambda: db.session.execute(sa.union(sa.select(Item.id), sa.select(Tag.id))).all(),
    "from_statement": lambda: db.session.scalars(sa.select(Item).from_statement(sa.text("select * from item"))).all(),
}


@pytest.fixture
def two_items(app: Flask, look: Look) -> None:
    look("insert into item (name) values ('one'), ('two')")
    look("insert into child (item_id, size) values (1, 1), (1, 1), (2, 1)")


@pytest.mark.usefixtures("two_items")
class TestReads:
    @pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
    def test_a1_a_read_is_one_round_trip_with_nothing_around_it(
        self, read: Callable[[], Any], wire: Wire, backends: Callable[[], list[str]]
    ) -> None:
        with wire.record() as log:
            read()
        assert verbs(log) == ["SELECT"]
        assert log.time_in_transaction == 0
        assert db.engine.pool.checkedout() == 0
        assert backends() == ["idle"]
        assert not db.session.in_transaction()

    def test_a1_many_statements_are_as_many_round_trips(self, wire: Wire) -> None:
        with wire.record() as log:
            for _ in range(5):
                db.session.execute(sa.text("select 1"))
        assert verbs(log) == ["SELECT"] * 5

    def test_a2_paginate(self, wire: Wire) -> None:
        with wire.record() as log:
            page = db.paginate(sa.select(Item).order_by(Item.id), per_page=1, page=1)
        assert [item.name for item in page.items] == ["one"]
        assert page.total == 2
        assert verbs(log) == ["SELECT", "SELECT"]

    def test_a2_objects_stay_attached_and_load_lazily(self, wire: Wire) -> None:
        item = db.session.get(Item, 1)
        assert item in db.session
        with wire.record() as log:
            assert [child.size for child in item.children] == [1, 1]
        assert verbs(log) == ["SELECT"]
        with wire.record() as log:
            db.session.refresh(item)
        assert verbs(log) == ["SELECT"]
        db.session.expire(item)
        with wire.record() as log:
            assert item.name == "one"
        assert verbs(log) == ["SELECT"]
        assert db.engine.pool.checkedout() == 0

    @pytest.mark.parametrize("load", [sa_orm.selectinload, sa_orm.subqueryload])
    def test_a2_eager_loads_in_further_statements_need_no_second_connection(
        self, load: Any, make_app: MakeApp, wire: Wire
    ) -> None:
        app = make_app(db, SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 1, "max_overflow": 0, "pool_timeout": 1})
        with app.app_context(), wire.record() as log:
            items = db.session.scalars(sa.select(Item).options(load(Item.children))).all()
            assert sorted(len(item.children) for item in items) == [1, 2]
            # scalar() loads while its own statement is still under way
            assert db.session.scalar(sa.select(Item).options(load(Item.tags)).where(Item.id == 1)).tags == []
        assert verbs(log) == ["SELECT"] * 4

    def test_a2_a_result_can_be_read_after_its_connection_has_gone(self, look: Look) -> None:
        result = db.session.execute(sa.select(Item.name).order_by(Item.id))
        db.engine.dispose()
        look(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        assert result.keys() == ["name"]
        assert result.fetchone() == ("one",)
        assert result.all() == [("two",)]

    def test_a2_two_contexts_interleave_reads_on_one_connection(self, make_app: MakeApp) -> None:
        app = make_app(db, SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 1, "max_overflow": 0, "pool_timeout": 1})
        with app.app_context():
            one = db.session.get(Item, 1)
            with app.app_context():
                other = db.session.get(Item, 1)
                assert other is not one
                assert one.children != []
            assert len(db.session.scalars(sa.select(Item)).all()) == 2

    def test_a2_a_view_whose_teardown_never_runs_leaks_nothing(
        self, make_app: MakeApp, backends: Callable[[], list[str]]
    ) -> None:
        app = make_app(db, SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 1, "max_overflow": 0, "pool_timeout": 1})
        contexts = []
        for _ in range(3):
            context = app.app_context()
            context.push()
            contexts.append(context)  # never popped while the others run
            assert db.session.get(Item, 1).name == "one"
        assert db.engine.pool.checkedout() == 0
        for context in reversed(contexts):
            context.pop()

    def test_a2_drop_all_after_reads_does_not_wait_for_the_session(self, look: Look) -> None:
        look("alter database " + look("select current_database()")[0] + " set lock_timeout = '2s'")
        db.engine.dispose()
        assert db.session.get(Item, 1) is not None
        db.drop_all()
        assert look("select count(*) from pg_tables where schemaname = 'public'") == [0]

    def test_a2_fifty_threads_share_five_connections(self, make_app: MakeApp) -> None:
        app = make_app(db, SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 5, "max_overflow": 0})
        together = threading.Barrier(50)

        def view(_: int) -> tuple[str, int]:
            with app.app_context():
                item = db.session.get(Item, 1)
                together.wait(20)  # all fifty are between their reads, "calling an API", at once
                time.sleep(0.05)
                return item.name, len(item.children)

        with ThreadPoolExecutor(50) as threads:
            assert list(threads.map(view, range(50))) == [("one", 2)] * 50

    def test_a3_begin_works_after_any_number_of_statements(self, wire: Wire) -> None:
        for _ in range(3):
            db.session.scalars(sa.select(Item)).all()
            item = db.session.get(Item, 1)
            item.note = "changed outside"  # recorded, not sent
            assert not db.session.in_transaction()
            assert db.session.get_transaction() is None
            with wire.record() as log, db.session.begin():
                assert db.session.in_transaction()
                assert db.session.get_transaction() is not None
                item.name += "x"
            assert verbs(log) == ["BEGIN", "UPDATE", "COMMIT"]
            assert not db.session.in_transaction()

    def test_a3_changes_before_begin_are_part_of_it(self, look: Look) -> None:
        item = db.session.get(Item, 1)
        item.name = "changed before"
        with pytest.raises(ZeroDivisionError), db.session.begin():
            _ = 1 / 0
        assert item.name == "one"
        assert not db.session.unsaved()
        assert look("select name from item order by id") == ["one", "two"]

    def test_a7_no_autoflush_outside(self, wire: Wire, make_app: MakeApp) -> None:
        db.session.autoflush = True
        db.session.add(Item(name="pending"))
        with wire.record() as log:
            db.session.execute(sa.text("select 1"))
            assert Item.query.filter_by(name="pending").first() is None
            db.session.get(Item, 1).children  # noqa: B018
        assert verbs(log) == ["SELECT"] * 4
        db.session.rollback()

    @pytest.mark.parametrize("autoflush", [False, True])
    def test_a7_inside_autoflush_is_as_set(self, autoflush: bool) -> None:
        assert db.session.autoflush is False
        assert db.session().expire_on_commit is False
        db.session.autoflush = autoflush
        with db.session.begin():
            db.session.add(Item(name="pending"))
            found = db.session.scalar(sa.select(Item).where(Item.name == "pending"))
            assert (found is not None) == autoflush

    def test_a7_no_autoflush_block_gives_the_setting_back(self) -> None:
        db.session.autoflush = True
        with db.session.no_autoflush:
            db.session.get(Item, 1)
        assert db.session.autoflush is True

    def test_a7_expire_on_commit_can_be_set(self, wire: Wire) -> None:
        item = db.session.get(Item, 1)
        with db.session.begin():
            item.note = "a"
        with wire.record() as log:
            assert item.note == "a"
        assert verbs(log) == []
        db.session().expire_on_commit = True
        with db.session.begin():
            item.note = "b"
        with wire.record() as log:
            assert item.note == "b"
        assert verbs(log) == ["SELECT"]


FAILURES: dict[str, Callable[[], Any]] = {
    "syntax error": lambda: db.session.execute(sa.text("select from where")),
    "division by zero": lambda: db.session.execute(sa.text("select 1/0")),
    "violation": lambda: db.session.execute(sa.insert(Item).values(name="one")),
    "several rows": lambda: db.session.execute(sa.insert(Item), [{"name": "new"}, {"name": "one"}]),
    "failed flush": lambda: (db.session.add(Item(name="one")), db.session.flush()),
    "failed commit": lambda: (db.session.add(Item(name="one")), db.session.commit()),
    "deferred constraint": lambda: db.session.execute(sa.text("insert into booking (id, seat) values (1, 1), (2, 1)")),
    "driver refuses": lambda: db.session.execute(sa.text("select :a"), {"a": object()}),
    "wrong bind": lambda: db.session.execute(sa.text("select :a"), {}),
}


@pytest.mark.usefixtures("two_items")
class TestFailures:
    @pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES.keys())
    def test_a10_after_an_error_the_session_works_at_once(
        self, fail: Callable[[], Any], wire: Wire, look: Look
    ) -> None:
        kept = db.session.get(Item, 2)
        with pytest.raises(sa.exc.SQLAlchemyError):
            fail()
        assert db.engine.pool.checkedout() == 0
        with wire.record() as log:
            assert db.session.scalar(sa.select(Item.name).where(Item.id == 1)) == "one"
        assert verbs(log) == ["SELECT"]
        with db.session.begin():
            kept.note = "after"
        assert look("select note from item where id = 2") == ["after"]
        assert look("select count(*) from item") == [2]

    def test_a10_a_failed_statement_leaves_what_is_pending_alone(self, look: Look) -> None:
        pending = Item(name="pending")
        db.session.add(pending)
        changed = db.session.get(Item, 1)
        changed.note = "changed"
        for fail in ("division by zero", "violation", "several rows"):
            with pytest.raises(sa.exc.DBAPIError):
                FAILURES[fail]()
        assert pending in db.session.new
        assert changed.note == "changed"
        db.session.commit()
        assert look("select name from item where note = 'changed' or name = 'pending' order by 1") == [
            "one",
            "pending",
        ]

    @pytest.mark.parametrize("how", ["terminated", "reset", "closed"])
    def test_a10_after_a_lost_connection_the_session_works_at_once(self, how: str, wire: Wire, look: Look) -> None:
        item = db.session.get(Item, 1)
        raw = db.engine.raw_connection()
        _lose(how, wire, look)
        raw.close()
        # lost under a statement, which the check at checkout cannot see
        trigger = wire.reset_when(lambda sql: sql.startswith("UPDATE"))
        with pytest.raises(sa.exc.DBAPIError):
            db.session.execute(sa.update(Item).values(note="x"))
        assert trigger.fired == 1
        db.session.expire(item)
        assert item.name == "one"
        with db.session.begin():
            item.note = "written"
        assert look("select note from item where id = 1") == ["written"]


def _lose(how: str, wire: Wire, look: Look) -> None:
    if how == "terminated":
        look(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
    elif how == "reset":
        wire.reset()
    else:
        wire.close_connections()


@pytest.mark.usefixtures("app")
class TestWrites:
    def test_a1_a_write_is_one_round_trip(self, wire: Wire, look: Look) -> None:
        with wire.record() as log:
            db.session.execute(sa.insert(Item).values(name="core"))
            db.session.execute(sa.insert(Item), {"name": "orm"})
            db.session.execute(sa.insert(Item), [{"name": "list of one"}])
            db.session.execute(sa.insert(Item.__table__), {"name": "table"})
            db.session.execute(sa.update(Item).where(Item.name == "core").values(note="x"))
            db.session.execute(sa.delete(Item).where(Item.name == "orm"))
            db.session.execute(sa.text("update item set note = 'y' where name = 'table'"))
            Item.query.filter_by(name="core").update({"note": "z"})
            Item.query.filter_by(name="list of one").delete()
        assert verbs(log) == ["INSERT"] * 4 + ["UPDATE", "DELETE", "UPDATE", "UPDATE", "DELETE"]
        assert look("select name, note from item order by name") == [("core", "z"), ("table", "y")]
        assert db.engine.pool.checkedout() == 0

    def test_a1_a_single_insert_returns_what_plain_returns(self) -> None:
        item = db.session.scalars(sa.insert(Item).returning(Item), {"name": "returned"}).one()
        assert (item.id, item.name) == (1, "returned")
        assert item in db.session
        with pytest.raises(sa.exc.SQLAlchemyError):
            db.session.execute(sa.insert(Item), {"name": "x", "unknown": 1})

    def test_a5_insert_of_one_object_in_two_tables_is_atomic(self, wire: Wire, look: Look) -> None:
        db.session.execute(sa.insert(Dog), {"id": 1, "breed": "terrier"})
        with wire.record() as log, pytest.raises(sa.exc.IntegrityError):
            db.session.execute(sa.insert(Dog), {"id": 2, "breed": "terrier"})
        assert verbs(log) == ["BEGIN", "INSERT", "INSERT", "ROLLBACK"]
        assert look("select id from animal") == [1]
        assert db.session.scalars(sa.select(Animal)).one().breed == "terrier"

    def test_a2_children_of_an_unflushed_parent_load_nothing(self, wire: Wire) -> None:
        item = Item(name="new", children=[Child()])
        with wire.record() as log:
            db.session.add(item)
            assert len(item.children) == 1
        assert verbs(log) == []
        db.session.rollback()

"""A32, A33: what a SELECT brings is what the objects show. M3, A23, A27: listeners to BEGIN, reports of writes."""

from __future__ import annotations

import linecache
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask

from fictive.config import WritesOutside
from fictive.session import scope
from fictive.sqlalchemy import OptInSession, claim
from tests.conftest import MakeApp
from tests.models import Child, Item, db

Look = Callable[..., list[Any]]


@pytest.fixture
def item(app: Flask, look: Look) -> Item:
    look("insert into item (id, name, note) values (1, 'a', 'v0')")
    return db.session.scalars(sa.select(Item)).one()


READS: dict[str, Callable[[], Item]] = {
    "select": lambda: db.session.scalars(sa.select(Item)).one(),
    "query": lambda: db.session.query(Item).one(),
    "join": lambda: db.session.scalars(sa.select(Item).outerjoin(Child)).unique().one(),
    "aliased": lambda: db.session.scalars(sa.select(sa_orm.aliased(Item))).one(),
    "selectinload": lambda: db.session.scalars(sa.select(Item).options(sa_orm.selectinload(Item.children))).one(),
    "text": lambda: db.session.scalars(sa.select(Item).from_statement(sa.text("select * from item"))).one(),
    "text with columns": lambda: db.session.scalars(
        sa.select(Item).from_statement(sa.text("select id, note from item").columns(Item.id, Item.note))
    ).one(),
    "select in a select": lambda: db.session.scalars(sa.select(Item).from_statement(sa.select(Item))).one(),
    "union": lambda: db.session.scalars(
        sa.select(Item).from_statement(sa.union(sa.select(Item), sa.select(Item).where(Item.id == 1)))
    ).one(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a33_a_second_look_sees_what_others_committed(read: Callable[[], Item], item: Item, look: Look) -> None:
    look("update item set note = 'v1'")
    assert read() is item
    assert item.note == "v1"


def test_a33_nothing_is_sent_for_it_and_pending_changes_stay(item: Item, look: Look, wire: Any) -> None:
    item.name = "mine"
    look("update item set note = 'v1', name = 'theirs'")
    with wire.record() as log:
        db.session.scalars(sa.select(Item)).one()
        assert (item.name, item.note) == ("mine", "v1")
    assert log.round_trips == 1
    db.session.rollback()


def test_a33_rows_of_a_statement_that_writes(item: Item) -> None:
    update = sa.update(Item).values(note="v1").returning(Item)
    assert db.session.scalars(sa.select(Item).from_statement(update)).one() is item
    assert item.note == "v1"
    update = sa.update(Item).values(note="v2").returning(Item.id)
    db.session.execute(sa.select(Item.id).from_statement(update))
    assert item.note == "v2"


@pytest.mark.parametrize("attributes", [None, ["name"]], ids=["all", "one"])
def test_a32_refresh_with_a_lock_writes_what_is_pending(item: Item, look: Look, attributes: list[str] | None) -> None:
    look("update item set note = 'v1'")
    with db.session.begin():
        item.name = "mine"
        db.session.refresh(item, attributes, with_for_update=True)
        assert item.name == "mine"
    assert look("select name, note from item") == [("mine", "v1")]


def test_a32_a_lock_within_from_statement(item: Item, look: Look) -> None:
    with db.session.begin():
        db.session.scalars(sa.select(Item)).one()
        look("update item set note = 'v1'")
        item.name = "mine"
        db.session.scalars(sa.select(Item).from_statement(sa.select(Item).with_for_update())).one()
        assert (item.name, item.note) == ("mine", "v1")


def test_a32_a_locking_get_of_an_expired_object_is_one_statement(item: Item, wire: Any) -> None:
    with db.session.begin():
        db.session.expire(item)
        with wire.record() as log:
            assert db.session.get(Item, 1, with_for_update=True) is item
            assert item.note == "v0"
        assert log.round_trips == 1


def test_a33_attributes_that_the_row_does_not_bring_stay(item: Item, look: Look) -> None:
    children = item.children
    look("update item set note = 'v1', name = 'b'")
    db.session.scalars(sa.select(Item).options(sa_orm.load_only(Item.name))).one()
    assert (item.name, item.__dict__["note"]) == ("b", "v0")
    assert item.__dict__["children"] is children


LOOKUPS: dict[str, Callable[[], Any]] = {
    "get": lambda: db.session.get(Item, 1),
    "many-to-one": lambda: db.session.get(Child, 1).item,  # type: ignore[union-attr]
    "immediateload": lambda: db.session.scalars(
        sa.select(Child).where(Child.id == 1).options(sa_orm.immediateload(Child.item))
    ).one(),
    "merge": lambda: db.session.merge(Item(id=1)),
    "identity map": lambda: db.session.identity_map.get(sa_orm.util.identity_key(Item, 1)),
}


@pytest.mark.parametrize("lookup", LOOKUPS.values(), ids=LOOKUPS)
def test_a33_an_object_that_is_in_no_result_is_not_touched(
    lookup: Callable[[], Any], item: Item, look: Look, wire: Any
) -> None:
    """Another object of its class was read, and then it is looked up in the session: nothing is sent for it."""
    look("insert into item (id, name) values (2, 'b')")
    look("insert into child (id, item_id, size) values (1, 1, 1), (2, 2, 1)")
    child = db.session.scalars(sa.select(Child).where(Child.id == 1)).one()
    db.session.scalars(sa.select(Item).where(Item.id == 2)).one()
    with wire.record() as log:
        assert lookup() in (item, child)
        assert (item.id, item.name, item.note) == (1, "a", "v0")
    assert log.round_trips == (1 if lookup is LOOKUPS["immediateload"] else 0)


def test_a33_results_are_read_in_another_order_than_asked_for(item: Item, look: Look) -> None:
    look("insert into item (id, name) values (2, 'b')")
    look("insert into child (id, item_id, size) values (1, 1, 1)")
    child = db.session.scalars(sa.select(Child)).one()
    look("update item set note = 'v1'")
    look("update child set size = 2")
    items = db.session.scalars(sa.select(Item).order_by(Item.id))
    children = db.session.scalars(sa.select(Child))
    assert [each.note for each in items] == ["v1", "v1"]
    assert [each.size for each in children] == [2]
    look("update item set note = 'v2'")
    older = db.session.scalars(sa.select(Item).where(Item.id == 1))
    look("update item set note = 'v3'")
    newer = db.session.scalars(sa.select(Item).where(Item.id == 1))
    assert newer.one() is item
    assert item.note == "v3"
    assert older.one().note == "v3"
    assert child.size == 2


def test_a33_in_a_block_what_was_loaded_before_it(item: Item, look: Look) -> None:
    look("update item set note = 'v1'")
    with db.session.begin():
        assert db.session.scalars(sa.select(Item)).one().note == "v1"
        look("update item set note = 'v2'")
        assert db.session.scalars(sa.select(Item)).one().note == "v1"  # loaded in this block


LOCKING: dict[str, Callable[[], Any]] = {
    "select": lambda: db.session.scalars(sa.select(Item).with_for_update()).one(),
    "claim": lambda: db.session.scalars(claim(sa.select(Item))).one(),
    "get": lambda: db.session.get(Item, 1, with_for_update=True),
    "query": lambda: db.session.query(Item).with_for_update().one(),
}


@pytest.mark.parametrize("lock", LOCKING.values(), ids=LOCKING)
def test_a32_a_locking_read_shows_the_row_as_it_is_locked(lock: Callable[[], Any], item: Item, look: Look) -> None:
    for n in (1, 2):
        look(f"update item set note = 'v{n}'")
        with db.session.begin():
            if n == 2:
                db.session.scalars(sa.select(Item)).one()  # read in this block already
                item.name = "mine"
            assert lock() is item
            assert item.note == f"v{n}"
    assert look("select name from item") == ["mine"]


def test_m3_statements_outside_have_the_transaction_that_listeners_count_on(app: Flask, wire: Any) -> None:
    def tenant(session: Any, transaction: Any, connection: Any) -> None:
        connection.execute(sa.text("select set_config('app.tenant', 'a', true)"))

    shown = sa.text("select current_setting('app.tenant', true)")
    session = db.session()
    sa.event.listen(session, "after_begin", tenant)
    assert session.scalar(shown) == "a"
    assert session.execute(shown, execution_options={"yield_per": 1}).scalar() == "a"
    session.add(Item(name="x"))
    session.commit()
    sa.event.remove(session, "after_begin", tenant)
    assert session.scalar(shown) in ("", None)
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_m3_an_error_in_the_short_transaction_leaves_the_session_usable(app: Flask) -> None:
    sa.event.listen(db.session(), "after_begin", lambda *_: None)
    with pytest.raises(sa.exc.DBAPIError):
        db.session.execute(sa.text("select 1/0"))
    assert db.session.scalar(sa.text("select 1")) == 1
    assert not db.session.in_transaction()


def test_a23_report_is_begin_and_names_each_line_once(
    app: Flask, look: Look, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scope, "_reported", set())  # of the process
    with OptInSession(db.engine, writes_outside="report") as session, caplog.at_level(logging.WARNING):
        assert session.writes_outside is WritesOutside.REPORT
        for name in ("a", "b"):
            session.execute(sa.insert(Item).values(name=name))
            session.rollback()
    assert look("select count(*) from item") == [0]
    found = [each for each in caplog.records if each.name == "fictive.writes_outside"]
    assert len(found) == 1
    assert "test_a_reading.py" in found[0].getMessage()


def test_a27_lost_changes_are_a_log_record_with_the_request(make_app: MakeApp, caplog: Any) -> None:
    app = make_app(db, FICTIVE_UNSAVED_CHANGES="warn")
    app.add_url_rule("/lose", "lose", lambda: (db.session.add(Item(name="x")), "ok")[1])
    with pytest.warns(UserWarning, match="lost"):
        app.test_client().get("/lose")
    (found,) = [each for each in caplog.records if each.name == "fictive.unsaved"]
    assert "GET /lose, endpoint lose" in found.getMessage()


@pytest.mark.parametrize("policy", ["commit", "begin", "report", "refuse"])
@pytest.mark.parametrize("way", ["add", "add_all", "after a flush", "by a cascade"])
def test_a27_lost_changes_name_the_line_where_an_object_was_added(make_app: MakeApp, way: str, policy: str) -> None:
    app = make_app(db, FICTIVE_UNSAVED_CHANGES="ignore", FICTIVE_WRITES_OUTSIDE=policy)
    with app.app_context():
        if way == "after a flush":
            with db.session.begin():
                db.session.add(Item(name="written"))
        if way == "add_all":
            db.session.add_all([Item(name="x")])
        elif way == "by a cascade":
            parent = Item(name="parent")
            with db.session.begin():
                db.session.add(parent)
            parent.children.append(Child())
        else:
            db.session.add(Item(name="x"))
        unsaved = db.session.unsaved()
    if way == "by a cascade":  # from another object, which was not added here
        assert unsaved[0] == "Child (new)"
    else:
        (new,) = unsaved
        assert re.fullmatch(r"Item \(new, added at \S+test_a_reading\.py:\d+ in test_a27_lost_changes\w+\)", new)
        assert linecache.getline(__file__, int(new.split(":")[1].split()[0])).strip().startswith("db.session.add")


DML: dict[str, Callable[[], Any]] = {
    "update": lambda: db.session.execute(sa.update(Item).where(Item.id == 1).values(name="new")),
    "update in Python": lambda: db.session.execute(
        sa.update(Item).where(Item.id == 1).values(name="new"), execution_options={"synchronize_session": "evaluate"}
    ),
    "update returning": lambda: db.session.execute(
        sa.update(Item).where(Item.id == 1).values(name="new").returning(Item.id)
    ),
    "query.update": lambda: db.session.query(Item).where(Item.id == 1).update({"name": "new"}),
    "delete of another": lambda: db.session.execute(sa.delete(Item).where(Item.id == 99)),
    "query.delete of another": lambda: db.session.query(Item).where(Item.id == 99).delete(),
}


@pytest.mark.parametrize("mode", ["commit", "begin", "refuse"])
@pytest.mark.parametrize("change", DML)
def test_a27_an_orm_update_in_a_block_loses_nothing_that_is_pending(
    mode: str, change: str, item: Item, look: Look
) -> None:
    """SQLAlchemy expires the attributes that the UPDATE sets, those with a pending change too."""
    db.session.writes_outside = WritesOutside(mode)
    with db.session.begin():
        item.name, item.note = "pending", "pending"
        db.session.add(Item(id=2, name="added"))
        DML[change]()
        assert look("select count(*) from item") == [1]
    name = "pending" if "delete" in change else "new"
    assert look("select name, note from item order by id") == [(name, "pending"), ("added", None)]


def test_a27_a_listener_that_fails_before_the_update_is_heard(item: Item, look: Look) -> None:
    @sa.event.listens_for(db.session(), "before_flush", once=True)
    def fails(*_: Any) -> None:
        raise AttributeError("the listener's")

    with pytest.raises(AttributeError, match="the listener's"), db.session.begin():
        item.note = "pending"
        DML["update"]()
    assert look("select name, note from item") == [("a", "v0")]


@pytest.mark.parametrize("change", ["update", "update in Python", "query.update"])
def test_a7_outside_an_orm_update_writes_nothing_that_is_pending(change: str, item: Item, look: Look) -> None:
    item.note = "pending"
    DML[change]()
    assert look("select name, note from item") == [("new", "v0")]
    db.session.commit()
    assert look("select note from item") == ["pending"]

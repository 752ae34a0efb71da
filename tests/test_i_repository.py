"""Repositories and their pages (rule I3)."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import re
import uuid
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fictive.errors import ConfigurationError, InvalidCursor, NotFoundError, TransactionRequired, UnknownAttribute
from fictive.models import Repository, SoftDeleteMixin, hide_deleted, keyset
from fictive.testing.wire import Wire
from tests.models import Booking, Child, Dog, Item, db
from tests.wirelog import verbs


class Items(Repository[Item]):
    def named_like(self, text: str) -> list[Item]:
        return self.list(Item.name.contains(text), order_by=Item.name)


@pytest.fixture
def items(app: Flask) -> Items:
    """Six items a to f, of which note is x for every second."""
    db.session.execute(
        sa.insert(Item), [{"name": name, "note": "x" if at % 2 else None} for at, name in enumerate("abcdef")]
    )
    return Items(db.session)


def names(found: Any) -> str:
    return "".join(item.name for item in found)


def test_i3_reading_is_one_query_each(items: Items, wire: Wire) -> None:
    first = items.list(name="a")[0].id
    calls = {
        "get": (lambda: items.get_or_raise(first).name, "a"),
        "none": (lambda: items.get(0), None),
        "all": (lambda: names(items.list(order_by=Item.name)), "abcdef"),
        "filter": (lambda: names(items.list(Item.name > "b", note="x", order_by=Item.name.desc())), "fd"),
        "limit": (lambda: names(items.list(order_by=[Item.note, Item.name.desc()], limit=2, offset=1)), "db"),
        "first": (lambda: items.first(order_by=Item.name.desc()).name, "f"),
        "no first": (lambda: items.first(name="z"), None),
        "count": (lambda: items.count(Item.name != "a"), 5),
        "exists": (lambda: items.exists(name="a"), True),
        "not": (lambda: items.exists(name="z"), False),
        "own": (lambda: names(items.named_like("c")), "c"),
        "page": (lambda: names(items.page(2, 4, order_by=Item.name).items), "ef"),
        "keyset": (lambda: names(items.keyset_page(2, order_by=Item.name.desc()).items), "fe"),
    }
    db.session.expunge_all()
    for name, (call, expected) in calls.items():
        with wire.record() as log:
            assert call() == expected, name
        assert verbs(log) == ["SELECT"], name
        db.session.expunge_all()


def test_i3_writing_is_one_query_each(items: Items, wire: Wire, look: Any) -> None:
    with wire.record() as log:
        created = items.create(name="g", note="n")
    assert verbs(log) == ["BEGIN", "INSERT", "COMMIT"]
    with wire.record() as log:
        assert items.update(created, note="m") is created
    assert verbs(log) == ["BEGIN", "UPDATE", "COMMIT"]
    key = created.id
    with wire.record() as log:
        assert items.update(key, note="by key") is created
        assert created.note == "by key"
        assert not items.delete(0)
        assert items.delete(key)
    assert verbs(log) == ["UPDATE", "DELETE", "DELETE"]
    db.session.expunge_all()
    other = items.list(name="a")[0]
    with wire.record() as log:
        assert items.delete(other)
    assert verbs(log)[-2:] == ["DELETE", "COMMIT"]
    assert look("select string_agg(name, '' order by name) from item") == ["bcdef"]
    with db.session.begin():
        items.create(name="undone")
        db.session.rollback()
    assert not items.exists(name="undone")


def test_i3_writing_under_writes_outside(items: Items, look: Any) -> None:
    item = items.list(name="a")[0]
    with pytest.raises(UnknownAttribute):
        items.update(item, note="half", nope="done")
    db.session.writes_outside = "refuse"
    for method, arguments in (("create", ()), ("update", (item,)), ("delete", (item,))):
        with pytest.raises(TransactionRequired, match=rf"Items\.{method}\(\) outside a transaction"):
            getattr(items, method)(*arguments, **({} if method == "delete" else {"name": "refused"}))
    assert [*db.session.new, *db.session.dirty, *db.session.deleted] == []  # nothing that begin() would write
    with db.session.begin():
        items.update(items.create(name="g"), note="m")
        assert items.delete(item)
    db.session.writes_outside = "begin"
    items.update(items.create(name="undone").id, note="m")
    assert items.count() == 7
    db.session.rollback()
    assert look("select string_agg(name, '' order by name) from item") == ["bcdefg"]


def test_i3_many_rows(items: Items) -> None:
    assert items.insert_many({"name": name} for name in "gh") == 2
    changed = items.upsert_many([{"name": "h", "note": "new"}, {"name": "i", "note": None}], key="name")
    assert (changed.inserted, changed.updated) == (1, 1)
    assert (items.count(), names(items.list(note="new"))) == (9, "h")


def test_i3_numbered_pages(items: Items) -> None:
    pages = [items.page(number, 4) for number in (1, 2, 3)]
    assert [names(page.items) for page in pages] == ["abcd", "ef", ""]
    assert [(page.total, page.pages, page.has_previous, page.has_next) for page in pages] == [
        (6, 2, False, True), (6, 2, True, False), (6, 2, True, False)
    ]  # fmt: skip
    page = items.page(1, 2, Item.note == "x", order_by=Item.name.desc())
    assert (names(page.items), page.total) == ("fd", 3)
    assert items.page(name="z").total == 0
    assert Repository[Dog](db.session).page().items == []


@pytest.mark.parametrize("order", ["name", "-name", "size, -name", "-size"])
def test_i3_keyset_pages_forth_and_back(items: Items, order: str) -> None:
    for at, item in enumerate(items.list(order_by=Item.name)):
        db.session.add(Child(item=item, size=1 + at // 2))
    db.session.commit()
    children = Repository[Child](db.session)
    order_by = {
        "name": Child.item_id, "-name": Child.item_id.desc(), "size, -name": [Child.size, Child.item_id.desc()],
        "-size": Child.size.desc(),
    }[order]  # fmt: skip
    everything = [child.id for child in children.list(order_by=[*_several(order_by), Child.id.desc()])]
    forth, page = [], children.keyset_page(4, order_by=order_by)
    assert page.previous is None
    while True:
        forth.append([child.id for child in page.items])
        if page.next is None:
            break
        page = children.keyset_page(4, after=page.next, order_by=order_by)
    assert [len(each) for each in forth] == [4, 2]
    assert forth[0] + forth[1] == everything
    back = children.keyset_page(4, before=page.previous, order_by=order_by)
    assert [child.id for child in back.items] == forth[0]
    assert back.previous is None
    again = children.keyset_page(4, after=back.next, order_by=order_by)
    assert [child.id for child in again.items] == forth[1]


def _several(order_by: Any) -> list[Any]:
    return order_by if isinstance(order_by, list) else [order_by]


def test_i3_a_keyset_page_shows_nothing_twice(items: Items) -> None:
    page = items.keyset_page(3, order_by=Item.name)
    items.create(name="aa")
    items.delete(page.items[2])
    assert names(items.keyset_page(3, after=page.next, order_by=Item.name).items) == "def"


def test_i3_an_index_answers_a_keyset_page(items: Items, look: Any) -> None:
    order = keyset.order_of(sa.inspect(Item), [Item.name])
    condition = order.beyond(db.engine.dialect, backwards=False)
    statement = sa.select(Item.id).where(condition).order_by(*order.order_by(backwards=False))
    found = re.search(r"WHERE (.*)", str(statement.compile(db.engine)))
    assert found
    assert re.sub(r"%\((\w+)\)s(::\w+)?", r"\1", found[1]) == (
        "(item.name, item.id) > (fictive_after_0, fictive_after_1) ORDER BY item.name ASC, item.id ASC"
    )


# What JSON can say and the columns of the order, a text and the key, cannot be compared with.
NO_CURSORS = [
    ["a\0", "1"],
    ["\ud800", "1"],
    ["a", "9" * 30],
    ["a", str(2**31)],
    ["a", "1", "2"],
    ["a", None],
    [[], "1"],
]


def test_i3_bad_input_sends_nothing(app: Flask, wire: Wire) -> None:
    items = Repository[Item](db.session)
    with wire.record() as log:
        for wrong in (lambda: items.list(nam="a"), lambda: items.update(1, nam="a")):
            with pytest.raises(UnknownAttribute, match="did you mean 'name'"):
                wrong()
        for wrong in (lambda: items.page(0), lambda: items.keyset_page(0), lambda: items.delete((1, 2))):
            with pytest.raises(ValueError, match=r"begin|1 columns"):
                wrong()
        with pytest.raises(ValueError, match="one or the other"):
            items.keyset_page(after="x", before="y")
        for cursor in (
            "x",
            "",
            "=",
            base64.urlsafe_b64encode(b'["a"]').decode(),
            base64.urlsafe_b64encode(b"7").decode(),
            *(base64.urlsafe_b64encode(json.dumps(values).encode()).decode() for values in NO_CURSORS),
        ):
            with pytest.raises(InvalidCursor, match="not a cursor"):
                items.keyset_page(after=cursor, order_by=Item.name)
        for order, message in ((Item.note, "may be NULL"), (sa.func.lower(Item.name), "cannot be ordered by lower")):
            with pytest.raises(ConfigurationError, match=message):
                items.keyset_page(order_by=order)
        for wrong in (lambda: items.list(order_by="name"), lambda: items.keyset_page(order_by="name")):
            with pytest.raises(TypeError, match="expected a column"):
                wrong()
        with pytest.raises(ConfigurationError, match=r"Repository of what"):
            Repository(db.session)
        with pytest.raises(TypeError, match="session"):
            Repository[Item](db)
        with pytest.raises(TypeError, match="not a mapped class"):
            Repository[int]
    assert not log.exchanges
    with pytest.raises(NotFoundError, match="no Item with the key 0"):
        items.get_or_raise(0)
    with pytest.raises(NotFoundError, match="no Item with the key 0"):
        items.update(0, name="x")
    assert Repository[Item] is Repository[Item]
    assert Repository[Booking] is not Repository[Item]


class _Base(DeclarativeBase):
    pass


class Event(SoftDeleteMixin, _Base):
    """Keys of every type that a cursor can hold."""

    __tablename__ = "event"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime.datetime] = mapped_column(sa.DateTime(timezone=True))
    day: Mapped[datetime.date]
    price: Mapped[decimal.Decimal]
    ratio: Mapped[float]
    blob: Mapped[bytes]


def test_i3_cursors_of_every_type(database_url: str) -> None:
    engine = sa.create_engine(database_url)
    _Base.metadata.create_all(engine)
    moment = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
    with sa_orm.Session(engine) as session:
        hide_deleted(session)
        events = Repository[Event](session)
        for at in range(4):
            values = {"id": uuid.UUID(int=at // 2), "number": at, "ratio": at / 3, "price": at, "blob": b""}
            events.create(**values, at=moment, day=moment.date())
        order = [Event.at, Event.day, Event.price, Event.ratio]
        page = events.keyset_page(3, order_by=order)
        assert [event.number for event in events.keyset_page(3, after=page.next, order_by=order).items] == [3]
        events.update(page.items[0], deleted_at=moment)
        session.expire_all()
        assert [event.number for event in events.page(1, 2).items] == [1, 2]
        assert events.page(1, 2).total == events.count() == 3
        assert events.get((uuid.UUID(int=1), 3)).number == 3
        assert events.delete((uuid.UUID(int=1), 3))
        with pytest.raises(ConfigurationError, match=r"Event\.blob.*no text form"):
            events.keyset_page(order_by=Event.blob)
    engine.dispose()

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
from fictive.sqlalchemy import OptInSession
from fictive.testing.wire import Wire
from tests.models import Booking, Child, Dog, Item, Tag, db
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


def test_i3_an_unsaved_change_moves_no_cursor(items: Items) -> None:
    """The last object of the page was changed and not saved: the next page is the one after its row."""
    page = items.keyset_page(3, order_by=Item.name)
    page.items[-1].name = "z"
    again = items.keyset_page(3, order_by=Item.name)
    assert again.next == page.next
    db.session.expire_all()


def test_i3_a_cursor_is_of_the_row_and_not_of_an_object_loaded_before(items: Items) -> None:
    """In a transaction an object that is loaded keeps its values, which other SQL may have changed in its row."""
    with db.session.begin():
        loaded = items.list(order_by=Item.name)
        db.session.execute(sa.text("UPDATE item SET name = upper(name) || name"))
        seen, after = "", None
        for _ in range(4):
            page = items.keyset_page(2, after=after, order_by=Item.name)
            seen, after = seen + names(page.items), page.next
            if after is None:
                break
        assert (seen, loaded[0].name) == ("abcdef", "a")
        back = items.keyset_page(2, before=page.previous, order_by=Item.name)
        assert names(items.keyset_page(2, before=back.previous, order_by=Item.name).items) == "ab"


def test_i3_an_index_answers_a_keyset_page(items: Items, look: Any) -> None:
    order = keyset.order_of(sa.inspect(Item), [Item.name], db.engine.dialect)
    statement = order.page(3, has_cursor=True, backwards=False)
    found = re.search(r"WHERE (.*?)\n? LIMIT", str(statement.compile(db.engine)))
    assert found
    assert re.sub(r"%\((\w+)\)s(::\w+)?", r"\1", found[1]) == (
        "(item.name, item.id) > (fictive_after_0, fictive_after_1) ORDER BY item.name ASC, item.id ASC "
    )
    assert order.page(3, has_cursor=True, backwards=False) is statement
    for size in range(1_000):  # sizes come from a URL
        order.page(size, has_cursor=False, backwards=False)
    assert len(order._statements) <= 100


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


class Ticket(_Base):
    """Keys of which not every text, and not every number, is a value."""

    __tablename__ = "ticket"
    id: Mapped[int] = mapped_column(sa.Integer().with_variant(sa.BigInteger(), "postgresql"), primary_key=True)
    state: Mapped[str] = mapped_column(sa.Enum("open", "shut", name="ticket_state"))
    token: Mapped[str] = mapped_column(sa.Uuid(as_uuid=False))
    price: Mapped[decimal.Decimal] = mapped_column(sa.Numeric(10, 2), default=decimal.Decimal(1))
    sold: Mapped[datetime.datetime] = mapped_column(
        sa.DateTime(timezone=True), default=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    )
    ratio: Mapped[float] = mapped_column(sa.REAL, default=0)
    made: Mapped[datetime.datetime] = mapped_column(sa.DateTime(timezone=True), default=datetime.datetime.now)


def test_i3_a_cursor_of_a_number_that_is_too_large_for_its_column(database_url: str) -> None:
    engine = sa.create_engine(database_url)
    Ticket.__table__.create(engine)  # type: ignore[attr-defined]
    with sa_orm.Session(engine) as session:
        tickets = Repository[Ticket](session)
        for order, text in (
            (Ticket.price, "1e20"),
            (Ticket.price, "1e999999"),
            (Ticket.ratio, "1e300"),
            (Ticket.made, "2020-01-01T00:00:00-15:59:59.5" if engine.driver == "psycopg2" else "x"),
        ):
            cursor = base64.urlsafe_b64encode(json.dumps([text, "1"]).encode()).decode()
            with pytest.raises(InvalidCursor):
                tickets.keyset_page(after=cursor, order_by=order)
            session.rollback()
        with pytest.raises(sa.exc.DataError):  # no cursor's
            tickets.keyset_page(5, sa.cast("x", sa.Integer) == 1)
    engine.dispose()


def test_i3_a_cursor_of_a_value_that_the_column_cannot_have(database_url: str) -> None:
    for engine in (sa.create_engine(database_url), sa.create_engine("sqlite://")):
        Ticket.__table__.create(engine)  # type: ignore[attr-defined]
        with sa_orm.Session(engine) as session:
            tickets = Repository[Ticket](session)
            for at in range(3):
                tickets.create(id=2**40 + at, state="open", token=str(uuid.UUID(int=at)))
            for order in (Ticket.id, Ticket.state, Ticket.token):
                page = tickets.keyset_page(1, order_by=order)
                assert [each.id for each in tickets.keyset_page(1, after=page.next, order_by=order).items] == [
                    2**40 + 1
                ]
            for order, values in (
                (Ticket.state, ["lost", "1"]),
                (Ticket.token, ["x", "1"]),
                (Ticket.id, [str(2**63)]),
                *((Ticket.price, [price, "1"]) for price in ("sNaN", "nan7", "1e200000", "1e-20000")),
                (Ticket.sold, ["2026-01-01T00:00:00+23:59", "1"]),
            ):
                cursor = base64.urlsafe_b64encode(json.dumps(values).encode()).decode()
                with pytest.raises(InvalidCursor):
                    tickets.keyset_page(after=cursor, order_by=order)
        engine.dispose()


# -- options, locks, joins, and other ways of calling -----------------------------------------------------------------


@pytest.fixture
def family(app: Flask) -> None:
    """Items a, b and c; a and b have children of the sizes 1, 2 and 3, 4, c has none; a has the tags x and y."""
    for at, name in enumerate("abc"):
        db.session.add(item := Item(name=name))
        item.children = [Child(size=2 * at + size) for size in (1, 2)] if name != "c" else []
        item.tags = [Tag(label=label) for label in "xy"] if name == "a" else []
    db.session.add_all([Dog(breed="pug"), Booking(seat=1)])
    db.session.commit()
    db.session.remove()


@pytest.mark.parametrize("load", [sa_orm.selectinload, sa_orm.joinedload])
def test_i3_options_load_along(load: Any, family: None, session: Any, wire: Wire) -> None:
    items = Repository[Item](session)
    options = [load(Item.children)]
    ways: list[tuple[Any, str]] = [
        (lambda: [items.get(1, options=options)], "a"),
        (lambda: [items.get_or_raise(1, options=options)], "a"),
        (lambda: items.list(order_by=Item.name, options=options), "abc"),
        (lambda: items.get_all(order_by=Item.name, limit=2, options=options), "ab"),
        (lambda: [items.first(order_by=Item.name.desc(), options=options)], "c"),
        (lambda: items.page(1, 2, order_by=Item.name.desc(), options=options).items, "cb"),
        (lambda: items.page(2, 2, order_by=Item.name.desc(), options=options).items, "a"),
        (lambda: items.keyset_page(2, order_by=Item.name, options=options).items, "ab"),
    ]
    for way, expected in ways:
        session.rollback()
        session.expunge_all()
        found = way()
        assert names(found) == expected
        with wire.record() as log:
            assert [len(item.children) for item in found] == [0 if item.name == "c" else 2 for item in found]
        assert log.round_trips == 0
    page = items.page(9, 2, options=[sa_orm.joinedload(Item.children)])
    assert (page.items, page.total) == ([], 3)


def test_i3_rows_are_locked(family: None, session: Any, look: Any) -> None:
    def locked(table: str) -> list[int]:
        every = set(look(f"select id from {table}"))
        return sorted(every - set(look(f"select id from {table} for update skip locked")))

    items, children, dogs = Repository[Item](session), Repository[Child](session), Repository[Dog](session)
    with session.begin():
        items.get(1, with_for_update=True)
        assert locked("item") == [1]
        items.get_or_raise(1, with_for_update={"nowait": True}, options=[sa_orm.joinedload(Item.children)])
        items.list(Item.id > 2, with_for_update=True)
        assert locked("item") == [1, 3]
        # of the model alone, though other tables take part
        assert children.first(Item.name == "a", join=Child.item, order_by=Child.size, with_for_update=True)
        items.list(Child.size == 3, join=Item.children, with_for_update={"key_share": True})
        assert (locked("item"), locked("child")) == ([1, 2, 3], [1])
        assert dogs.list(with_for_update=True)  # joined inheritance: both tables
        assert locked("animal") == [1]
    assert locked("item") == []
    if isinstance(session, OptInSession):
        for outside in (lambda: items.get(1, with_for_update=True), lambda: items.first(with_for_update=True)):
            with pytest.raises(TransactionRequired):
                outside()
    for wrong in ("yes", 1, [True]):
        with pytest.raises(TypeError, match="with_for_update"):
            items.get(1, with_for_update=wrong)


def test_i3_a_row_that_somebody_holds(family: None, session: Any) -> None:
    items = Repository[Item](session)
    with sa_orm.Session(db.engine) as other:
        other.execute(sa.select(Item).where(Item.id == 1).with_for_update())
        with session.begin():
            assert names(items.list(order_by=Item.id, with_for_update={"skip_locked": True})) == "bc"
        with pytest.raises(sa.exc.OperationalError), session.begin():
            items.get(1, with_for_update={"nowait": True})


def test_i3_conditions_and_orders_of_other_models(family: None, session: Any, wire: Wire) -> None:
    items, children = Repository[Item](session), Repository[Child](session)
    with wire.record() as log:
        assert names(items.list(Child.size > 0, join=Item.children, order_by=Item.name.desc())) == "ba"
        assert names(items.list(Child.size > 0, join=Item.children, order_by=Item.name, limit=1)) == "a"
        assert items.count(Child.size > 1, join=Item.children) == 2
        assert items.exists(Child.size == 4, join=[Item.children])
        assert not items.exists(Child.size == 5, join=[Item.children])
        assert names(items.list(Tag.label.in_(["x", "y"]), join=Item.tags)) == "a"
        page = items.page(1, 1, Child.size > 0, join=Item.children, order_by=Item.name.desc())
        assert (names(page.items), page.total) == ("b", 2)
        keyset_page = items.keyset_page(1, Child.size > 0, join=Item.children, order_by=Item.name)
        assert (names(keyset_page.items), keyset_page.next is None) == ("a", False)
        sizes = [child.size for child in children.list(join=Child.item, order_by=[Item.name.desc(), Child.size])]
        assert sizes == [3, 4, 1, 2]
        assert children.count(Item.name == "b", join=Child.item) == 2
        found = children.page(2, 1, Item.name == "b", join=Child.item, order_by=[Item.name, Child.size.desc()])
        assert ([child.size for child in found.items], found.total) == ([3], 2)
        path = children.list(Tag.label == "x", join=[Child.item, Item.tags], order_by=Child.size)
        assert [child.size for child in path] == [1, 2]
    assert len([each for each in verbs(log) if each == "SELECT"]) == 12
    for wrong in (Item.name, "children", Child, [Item.children, "tags"]):
        with pytest.raises(TypeError, match="join"):
            items.list(join=wrong)


def test_i3_an_order_loses_no_row_without_a_related_one(app: Flask, look: Any) -> None:
    class Base(DeclarativeBase):
        pass

    class Owner(SoftDeleteMixin, Base):
        __tablename__ = "owner"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    class Pet(Base):
        __tablename__ = "pet"
        id: Mapped[int] = mapped_column(primary_key=True)
        owner_id: Mapped[int | None] = mapped_column(sa.ForeignKey("owner.id"))
        owner: Mapped[Owner | None] = sa_orm.relationship()

    Base.metadata.create_all(db.engine)
    with OptInSession(db.engine) as session:
        session.add_all([Pet(id=1), Pet(id=2, owner=Owner(name="b")), Pet(id=3, owner=Owner(name="a"))])
        session.add(Pet(id=4, owner=(gone := Owner(name="0"))))
        gone.soft_delete()
        session.commit()
        pets = Repository(session, Pet)
        assert [pet.id for pet in pets.list(join=Pet.owner, order_by=[Owner.name, Pet.id])] == [3, 2, 1, 4]
        assert pets.page(join=Pet.owner, order_by=Owner.name).total == 4
        assert pets.count(Owner.name == "0", join=Pet.owner) == 0  # hidden


def test_i3_hidden_rows_are_not_written(app: Flask, look: Any) -> None:
    class Base(DeclarativeBase):
        pass

    class Note(SoftDeleteMixin, Base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]

    Base.metadata.create_all(db.engine)
    hiding = sa_orm.sessionmaker(db.engine)
    hide_deleted(hiding)
    for make in (OptInSession, lambda engine: OptInSession(engine, writes_outside="begin"), lambda engine: hiding()):
        with make(db.engine) as session:
            notes = Repository(session, Note)
            note = notes.create(text="a")
            key = note.id
            note.soft_delete()
            session.commit()
            session.expunge_all()
            with pytest.raises(NotFoundError):
                notes.update(key, text="b")
            assert notes.delete(key) is False
            assert notes.get(key) is None
            session.commit()
        assert look("select text from note") == ["a"]
        look("delete from note")


def test_i3_other_ways_of_calling(app: Flask, look: Any) -> None:
    items = Repository(db.session, Item)
    assert items.create(Item(name="a")).id
    assert items.create(name="b").id
    assert names(items.get_all(order_by=Item.name)) == "ab"
    assert Repository[Item](db.session, Item).count() == 2
    for wrong, error in (
        (lambda: Repository(db.session), ConfigurationError),
        (lambda: Repository(db.session, db.Model), TypeError),
        (lambda: Items(db.session, Child), ConfigurationError),  # type: ignore[arg-type]
        (lambda: items.create(Child()), TypeError),  # type: ignore[arg-type]
        (lambda: items.create(Item(name="c"), name="d"), TypeError),
        (lambda: items.create(Item), TypeError),  # type: ignore[arg-type]
    ):
        with pytest.raises(error):
            wrong()
    assert look("select count(*) from item") == [2]
    assert not db.session.new

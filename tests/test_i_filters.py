"""Filters, search and order from `request.args`, against an allow list."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import enum
import uuid
from collections.abc import Iterator
from typing import Any

import flask
import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from werkzeug.datastructures import MultiDict

from fictive.errors import ConfigurationError, InvalidFilter
from fictive.models import FilterSet, Repository
from fictive.sqlalchemy import OptInSession
from fictive.testing.wire import Wire
from tests.conftest import MakeApp
from tests.models import Item, db


class Base(DeclarativeBase):
    pass


class Kind(enum.Enum):
    CAR = "a car"
    DOLL = "a doll"


class Shop(Base):
    __tablename__ = "shop"
    id: Mapped[int] = mapped_column(primary_key=True)
    city: Mapped[str]


class Toy(Base):
    __tablename__ = "toy"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column("the_name")
    color: Mapped[str | None]
    size: Mapped[int]
    price: Mapped[decimal.Decimal]
    weight: Mapped[float]
    kind: Mapped[Kind]
    new: Mapped[bool]
    code: Mapped[uuid.UUID]
    made: Mapped[datetime.date]
    sold: Mapped[datetime.datetime | None] = mapped_column(sa.DateTime(timezone=True))
    data: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON)
    shop_id: Mapped[int] = mapped_column(sa.ForeignKey("shop.id"))
    shop: Mapped[Shop] = sa_orm.relationship()


class Toys(FilterSet):
    filters = [
        Toy.name, Toy.color, Toy.size, Toy.price, Toy.weight, Toy.kind, Toy.new, Toy.code, Toy.made, Toy.sold, Toy.data
    ]  # fmt: skip
    search = [Toy.name, Toy.color]
    order = [Toy.name, Toy.size, Toy.made]


class ToysOfShops(FilterSet):
    filters = {"name": Toy.name, "city": Shop.city}
    order = {"city": Shop.city, "number": Toy.id}
    join = Toy.shop


CODES = [uuid.UUID(int=number) for number in (1, 2, 3)]


@pytest.fixture(params=[OptInSession, sa_orm.Session], ids=["opt-in", "plain"])
def toys(request: pytest.FixtureRequest, wire: Wire, database_url: str) -> Iterator[Repository[Toy]]:
    engine = sa.create_engine(wire.url(database_url))
    Base.metadata.create_all(engine)
    with request.param(engine) as session:
        cities = [Shop(city="Rome"), Shop(city="Oslo")]
        rows: list[Any] = [
            ("Red car 100%", "red", 1, "1.50", 0.5, Kind.CAR, True, "2026-01-01", None, 0),
            ("blue_doll", "blue", 2, "2.50", 1.5, Kind.DOLL, False, "2026-01-02", "2026-01-31T12:00+00:00", 1),
            ("old car", None, 3, "3.50", 2.5, Kind.CAR, False, "2026-01-03", None, 0),
        ]
        for at, (name, color, size, price, weight, kind, new, made, sold, city) in enumerate(rows):
            toy = Toy(
                name=name, color=color, size=size, price=decimal.Decimal(price), weight=weight, kind=kind, new=new,
                made=datetime.date.fromisoformat(made), sold=sold and datetime.datetime.fromisoformat(sold),
                code=CODES[at], shop=cities[city],
            )  # fmt: skip
            session.add(toy)
        session.commit()
        yield Repository(session, Toy)
    engine.dispose()


FOUND: dict[str, str] = {
    "": "123",
    "color=red": "1",
    "color=red&color=blue": "12",
    "color__ne=red": "23",
    "color__isnull=true": "3",
    "color__isnull=false": "12",
    "name=old car": "3",
    "name__contains=CAR": "13",
    "name__contains=100%25": "1",
    "name__contains=e_d": "2",
    "name__contains=%25": "1",
    "name__startswith=RED": "1",
    "size=2": "2",
    "size=-1": "",
    "size__gt=1&size__lt=3": "2",
    "size__ge=2": "23",
    "size__le=2": "12",
    "price=1.5": "1",
    "price__gt=2": "23",
    "weight=2.5": "3",
    "kind=CAR": "13",
    "kind__ne=CAR": "2",
    "new=true": "1",
    "new=0": "23",
    "code=00000000-0000-0000-0000-000000000002": "2",
    "made=2026-01-03": "3",
    "made__le=2026-01-02": "12",
    "sold=2026-01-31T13:00%2B01:00": "2",
    "sold__isnull=1": "13",
    "q=car": "13",
    "q=CAR red": "1",
    "q=_": "2",
    "q=": "123",
    "order=-size": "321",
    "order=made": "123",
    "order=-size,name": "321",
    "order=size&page=3&size__gt=0": "123",
    "after=x&limit=3&order=": "123",
}
REFUSED: dict[str, tuple[str, ...]] = {
    "colour=red": ("colour", "Did you mean color?"),
    "a=1&b=2": ("No such filter: a, b", "There are: name, color, size"),
    "shop_id=1": ("shop_id",),
    "id=1": ("id",),
    "size=two": ("size: expected a whole number",),
    "size=": ("size",),
    "size=2147483648": ("size",),
    "size__gt=1&size__gt=2": ("size__gt: expected once",),
    "size__contains=1": ("size__contains: expected one of ne, lt",),
    "size__=1": ("size__",),
    "size__drop table=1": ("size__drop table",),
    "color__contains__x=1": ("color__contains__x",),
    "color__isnull=maybe": ("color__isnull: expected true or false",),
    "color=%00": ("color: expected a text without zero bytes",),
    "q=%00": ("q: expected a text",),
    "price=secret": ("price: expected a number",),
    "weight=x": ("weight: expected a number",),
    "kind=a car": ("kind: expected one of CAR, DOLL",),
    "new=yes": ("new: expected true or false",),
    "code=secret": ("code: expected a UUID",),
    "made=2026-13-01": ("made: expected a date",),
    "sold=never": ("sold: expected a date and time",),
    "data=1": ("data: cannot be compared",),
    "order=color": ("order: cannot order by color", "There are: name, size, made"),
    "order=-nam": ("order", "Did you mean name?"),
}


def args(query: str) -> Any:
    return flask.Request.from_values(query_string=query).args


def test_what_is_allowed_is_found(toys: Repository[Toy], wire: Wire) -> None:
    for query, expected in FOUND.items():
        filters = Toys(args(query))
        found = "".join(str(toy.id) for toy in toys.list(filters, order_by=() if "order=" in query else Toy.id))
        assert found == expected, query
        assert toys.count(filters) == len(expected), query
    page = toys.page(1, 2, Toys(args("order=-size&color__isnull=false&size=2&size=1")))
    assert ([toy.size for toy in page.items], page.total) == ([2, 1], 2)
    assert [toy.size for toy in toys.keyset_page(2, Toys(args("order=-size"))).items] == [3, 2]
    assert [toy.size for toy in toys.list(Toys(args("order=-size")), order_by=Toy.size)] == [1, 2, 3]
    assert toys.exists(Toys({"color": "red"}), Toy.size == 1, name="Red car 100%")
    assert toys.exists(Toys({"color": ["red", "blue"]}))


def test_what_is_not_is_refused_by_name_and_without_the_value(toys: Repository[Toy], wire: Wire) -> None:
    with wire.record() as log:
        for query, parts in REFUSED.items():
            with pytest.raises(InvalidFilter) as caught:
                toys.list(Toys(args(query)))
            for part in parts:
                assert part in str(caught.value), query
            assert "secret" not in str(caught.value)
            assert isinstance(caught.value, ValueError)
    assert log.round_trips == 0
    for query in (
        "size=99999999999999999999", "weight=nan", "price=NaN", "q=%ud800", "name=%F0%90", "price=sNaN", "price=nan7",
        "price=1e200000", "price=1e-20000", "sold=2026-01-01T00:00%2B23:59", "sold__lt=0001-01-01T00:00%2B15:59",
    ):  # fmt: skip
        with contextlib.suppress(InvalidFilter):  # ours, and never the driver's
            toys.list(Toys(args(query)))


def test_columns_of_other_models(toys: Repository[Toy]) -> None:
    assert [toy.id for toy in toys.list(ToysOfShops({"city": "Rome", "order": "-number"}))] == [3, 1]
    assert [toy.id for toy in toys.list(ToysOfShops({"order": "city,-number"}))] == [2, 3, 1]
    assert toys.count(ToysOfShops({"city__startswith": "os"})) == 1
    assert toys.page(1, 1, ToysOfShops({"city": "Rome"})).total == 2


def test_in_a_view_it_is_400(make_app: MakeApp) -> None:
    class Items(FilterSet):
        filters = [Item.name]

    app, items = make_app(), Repository[Item](db.session)
    app.add_url_rule("/", view_func=lambda: {"found": len(items.list(Items(flask.request.args)))})
    client = app.test_client()
    assert client.get("/?name=a").json == {"found": 0}
    response = client.get("/?<b>=1")
    assert response.status_code == 400
    assert "No such filter: &lt;b&gt;" in response.text


def test_bad_classes_raise_where_they_are_made() -> None:
    wrong: list[dict[str, Any]] = [
        {"filters": ["name"]},
        {"filters": [Item]},
        {"filters": [Item.children]},
        {"filters": {"tags": Item.tags}},
        {"order": [Item.__table__.c.name]},
        {"order": [Item.name.desc()]},
        {"search": [Item.id]},
        {"search": ["name"]},
        {"join": "shop"},
        {"join": [Toy.name]},
    ]
    for body in wrong:
        with pytest.raises(ConfigurationError, match=rf"Wrong\.{next(iter(body))}"):
            type("Wrong", (FilterSet,), body)

    class Inherited(Toys):
        filters = [Toy.size]

    assert len(Inherited(MultiDict({"size": "1", "q": "a b"})).where) == 3
    with pytest.raises(InvalidFilter):
        Inherited({"color": "red"})
    with pytest.raises(TypeError, match="size"):
        Inherited({"size": 1})
    with pytest.raises(InvalidFilter, match=r"No such filter: a\.$"):
        FilterSet({"a": "b"})

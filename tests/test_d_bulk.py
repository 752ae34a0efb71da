"""insert_many, upsert_many, update_many (rule D8)."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import itertools
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fictive.errors import (
    ConfigurationError,
    DuplicateRows,
    RowsDiffer,
    TransactionAlreadyBegun,
    TransactionRequired,
    UnknownAttribute,
    UnsupportedDialect,
)
from fictive.flask_sqlalchemy import BulkMixin, OptInTransactionMixin
from fictive.sqlalchemy import (
    InsertManyDescriptor,
    OptInSession,
    Upserted,
    insert_many,
    sessionmaker,
    update_many,
    upsert_many,
)
from fictive.testing.wire import Wire
from tests.fresh_database import WAITING
from tests.wirelog import messages, own_verbs


class DB(OptInTransactionMixin, BulkMixin, SQLAlchemy):
    pass


class Base(DeclarativeBase):
    pass


db = DB(model_class=Base)


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


class Shouted(sa.types.TypeDecorator[str]):
    impl = sa.String(50)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        return None if value is None else value.upper()


class Thing(db.Model):  # type: ignore[misc]
    """Names that must be quoted, a schema of its own, and a column of each kind."""

    __tablename__ = "Some 100% thing"
    __table_args__ = (
        sa.Index("open_tag", "% of it", unique=True, postgresql_where=sa.text("open")),
        {"schema": "a schema"},
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    code: Mapped[str] = mapped_column("select", unique=True)
    tag: Mapped[int | None] = mapped_column("% of it")
    open: Mapped[bool] = mapped_column(default=True)
    shouted: Mapped[str | None] = mapped_column(Shouted)
    colour: Mapped[Colour | None]
    price: Mapped[decimal.Decimal | None] = mapped_column(sa.Numeric(10, 2))
    ratio: Mapped[float | None]
    made_at: Mapped[dt.datetime | None] = mapped_column(sa.DateTime(timezone=True))
    day: Mapped[dt.date | None]
    span: Mapped[dt.timedelta | None] = mapped_column(postgresql.INTERVAL)
    raw: Mapped[bytes | None]
    data: Mapped[Any] = mapped_column(postgresql.JSONB, nullable=True)
    words: Mapped[list[str] | None] = mapped_column(postgresql.ARRAY(sa.Text))
    token: Mapped[uuid.UUID] = mapped_column(default=uuid.uuid4)
    size: Mapped[int] = mapped_column(server_default="7")
    doubled: Mapped[int] = mapped_column(sa.Computed("size * 2"))
    short: Mapped[str | None] = mapped_column(sa.String(3))


class Page(db.Model):  # type: ignore[misc]
    """Every kind of default, a version, and a time that moves with changes."""

    id: Mapped[int] = mapped_column(primary_key=True)
    slug: Mapped[str] = mapped_column(unique=True)
    title: Mapped[str | None]
    version: Mapped[int] = mapped_column()
    changes: Mapped[int] = mapped_column(default=0, onupdate=sa.text("page.changes + 1"))
    kind: Mapped[str] = mapped_column()
    __mapper_args__ = {"version_id_col": version, "polymorphic_on": kind, "polymorphic_identity": "page"}


class Post(Page):
    __mapper_args__ = {"polymorphic_identity": "post"}


class Stamp(db.Model):  # type: ignore[misc]
    """Defaults that only an INSERT of SQLAlchemy's can have."""

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    made_at: Mapped[dt.datetime] = mapped_column(sa.DateTime(timezone=True), default=sa.func.now())
    low: Mapped[str] = mapped_column(default=lambda context: context.get_current_parameters()["name"].lower())


class Animal(db.Model):  # type: ignore[misc]
    __tablename__ = "creature"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}


class Dog(Animal):
    __tablename__ = "hound"
    id: Mapped[int] = mapped_column(sa.ForeignKey("creature.id"), primary_key=True)
    breed: Mapped[str] = mapped_column(unique=True)
    __mapper_args__ = {"polymorphic_identity": "dog"}


class Node(db.Model):  # type: ignore[misc]
    """Two columns are the key, and one may be NULL in a unique constraint."""

    a: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    b: Mapped[str] = mapped_column(primary_key=True)
    maybe: Mapped[int | None] = mapped_column(unique=True)
    extra: Mapped[Any] = mapped_column(sa.JSON, nullable=True)


Look = Callable[..., list[Any]]


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Iterator[Flask]:
    app = make_app(db)
    with app.app_context():
        with db.engine.begin() as connection:
            connection.execute(sa.text('CREATE SCHEMA "a schema"'))
        db.create_all()
        yield app


def _pages(count: int, title: str = "t", first: int = 0) -> list[dict[str, Any]]:
    return [{"slug": f"s{number:05}", "title": title} for number in range(first, first + count)]


# insert_many


def test_d8_values_of_every_type_are_those_of_a_flush(app: Flask, look: Look) -> None:
    values = {
        "tag": 3,
        "open": False,
        "shouted": "loud\\",
        "colour": Colour.BLUE,
        "price": decimal.Decimal("12.50"),
        "ratio": 0.1,
        "made_at": dt.datetime(2024, 2, 29, 12, 30, 1, 5, dt.timezone(dt.timedelta(hours=2))),
        "day": dt.date(1999, 12, 31),
        "span": dt.timedelta(days=-3, seconds=1.5),
        "raw": b"\0\\x\xff\n",
        "data": {"a": [1, None, "\t\n\\"], "b": "é"},
        "words": ["a,b", None, '"q"\\', "NULL", ""],
        "token": uuid.UUID(int=7),
        "short": "é\t\\",
    }
    nothing = dict.fromkeys(values, None) | {"token": uuid.UUID(int=7), "open": False}
    del nothing["data"]  # None there is JSON's null
    by_name = {sa.inspect(Thing).columns[name].name: name for name in values}
    columns = ", ".join(f'"{name}"' for name in by_name)
    for number, row in enumerate((values, nothing)):
        db.session.add(Thing(code=f"flushed {number}", **row))
        db.session.commit()
        assert Thing.insert_many({"code": f"copied {number} {n}", **row} for n in range(150)) == 150
        assert Thing.insert_many([Thing(code=f"sent {number}", **row)]) == 1
        rows = [{"code": f"copied {number} {n}", **row, "size": 8} for n in range(600)]
        assert Thing.upsert_many(rows, key="code") == Upserted(450, 150, 0)
        # twice the same: nothing has changed
        assert Thing.upsert_many(rows, key="code") == Upserted(0, 0, 600)
        statement = f'select count(distinct row({columns})::text), count(*) from "a schema"."Some 100% thing" '
        assert look(f"""{statement} where split_part("select", ' ', 2) = '{number}'""") == [(1, 602)]
        assert look('select count(*) from "a schema"."Some 100% thing" where size = 8 and doubled = 16') == [
            600 * (number + 1)
        ]
    assert db.session.scalar(sa.select(Thing.data).where(Thing.code == "copied 0 1")) == values["data"]
    with pytest.raises(sa.exc.DataError, match="too long"):
        Thing.insert_many({"code": f"{n}", "short": "long"} for n in range(150))
    with pytest.raises(sa.exc.DataError, match="too long"):
        Thing.update_many([{"code": f"copied 0 {n}", "short": "long"} for n in range(9)], key="code")


def test_d8_a_staging_table_does_not_cost_the_connection(app: Flask, wire: Wire) -> None:
    """It goes with its transaction, so the connection stays in the pool (rule A18 closes it for what stays)."""
    Page.insert_many(_pages(3))
    with wire.record() as log:
        Page.upsert_many(_pages(600), key="slug")
        Page.update_many([{**row, "title": "x"} for row in _pages(600)], key="slug")
        with db.session.begin():
            Page.upsert_many(_pages(600), key="slug")
        db.session.scalar(sa.text("select 1"))
    assert log.connections_opened == 0


def test_d8_what_is_sent(app: Flask, wire: Wire, look: Look, driver: str) -> None:
    def sent(work: Callable[[], object]) -> list[str]:
        with wire.record() as log:
            work()
        return [each for each in messages(log) if each != "DEALLOCATE"]

    assert sent(lambda: Page.insert_many([])) == []
    assert sent(lambda: Page.upsert_many(iter(()), key="slug")) == []
    assert sent(lambda: Page.update_many(())) == []
    assert sent(lambda: Page.insert_many(_pages(9))) == ["BEGIN+INSERT", "COMMIT"]
    assert sent(lambda: Page.insert_many(_pages(19, first=900_000))) == ["BEGIN+INSERT", "COMMIT"]  # on both drivers
    Page.insert_many(_pages(90, first=9))
    copied = ["BEGIN+SELECT", "COPY", "COMMIT"]  # what kind of relation it is comes with BEGIN
    assert sent(lambda: Page.insert_many(_pages(12_000, first=1000))) == copied
    assert sent(lambda: Page.insert_many(iter(_pages(12_000, first=20_000)))) == copied
    assert sent(lambda: Page.upsert_many(_pages(300, "new"), key="slug")) == ["BEGIN+INSERT", "COMMIT"]
    assert sent(lambda: Page.upsert_many(_pages(700, "newer"), key="slug")) == [
        "BEGIN+CREATE",
        "COPY",
        "WITH",
        "COMMIT",
    ]
    assert sent(lambda: Page.update_many([{"id": 1, "title": "u"}])) == ["BEGIN+UPDATE", "COMMIT"]
    many = [{"id": number, "title": "v"} for number in range(1, 50)]
    assert sent(lambda: Page.update_many(many)) == ["BEGIN+CREATE", "COPY", "WITH", "COMMIT"]
    assert look("select count(*) from page") == [24_719]
    assert look("select count(*) from pg_class where relname like 'fictive%'") == [0]


def test_d8_returning_keys_and_objects(app: Flask, wire: Wire) -> None:
    keys = Page.insert_many(_pages(3), returning="keys")
    assert [db.session.get(Page, key).slug for key in keys] == ["s00000", "s00001", "s00002"]
    objects = Post.insert_many(iter(_pages(120, first=3)), returning="objects", batch_size=50)
    assert [post.slug for post in objects] == [f"s{number:05}" for number in range(3, 123)]
    assert {(type(post), post.version, post.changes) for post in objects} == {(Post, 1, 0)}
    with wire.record() as log:
        objects[0].title  # noqa: B018
    assert not log.exchanges
    assert Node.insert_many([{"a": 1, "b": "x"}], returning="keys") == [(1, "x")]
    assert Node.insert_many([], returning="keys") == []
    with pytest.raises(ValueError, match="returning='rows'"):
        Node.insert_many([], returning="rows")


def test_d8_defaults_are_those_of_a_flush(app: Flask, look: Look) -> None:
    Post.insert_many(_pages(2))
    Post.insert_many(_pages(200, first=2))
    assert look("select kind, version, changes, count(*) from page group by 1, 2, 3") == [("post", 1, 0, 202)]
    names = [{"name": f"N{number}"} for number in range(700)]
    Stamp.insert_many(names[:200])
    assert Stamp.upsert_many(names, key="name", update=[]) == Upserted(500, 0, 200)
    assert look("select count(*) from stamp where made_at > now() - interval '1 hour' and low = lower(name)") == [700]
    assert Animal.insert_many([{"name": "a"}] * 120) == 120
    assert look('select count(distinct token) from "a schema"."Some 100% thing"') == [0]
    Thing.insert_many({"code": f"{number}"} for number in range(120))
    assert look('select count(distinct token) from "a schema"."Some 100% thing" where size = 7 and open') == [120]


def test_d8_joined_inheritance_is_both_tables_or_refused(app: Flask, look: Look) -> None:
    assert Dog.insert_many({"name": "x", "breed": f"b{number}"} for number in range(150)) == 150
    assert look("select count(*) from creature join hound using (id) where kind = 'dog'") == [150]
    assert Dog.update_many([{"id": 1, "name": "y", "breed": "z"}]) == 1
    assert look("select name, breed from creature join hound using (id) where id = 1") == [("y", "z")]
    with pytest.raises(TypeError, match=r"upsert_many\(\): a Dog is rows of several tables \(creature, hound\)"):
        Dog.upsert_many([{"breed": "b1", "name": "n"}], key="breed")
    with pytest.raises(TypeError, match="several tables"):
        Dog.update_many([{"breed": "b1", "name": "n"}], key="breed")


def test_d8_memory_is_that_of_a_few_batches(app: Flask) -> None:
    alive = most = 0

    class Title(str):
        def __new__(cls, text: str) -> Title:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return super().__new__(cls, text)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def rows(count: int) -> Iterator[dict[str, Any]]:
        return ({"slug": f"{number}", "title": Title("t")} for number in range(count))

    told: list[Any] = []
    Page.insert_many(rows(4000), batch_size=200, progress=lambda *args: told.append(args))
    Page.upsert_many(rows(4000), key="slug", batch_size=200)
    assert most <= 600
    assert told == [(done, None) for done in range(200, 4001, 200)]
    told.clear()
    Page.update_many([{"slug": "1", "title": "u"}], key="slug", progress=lambda *args: told.append(args))
    assert told == [(1, 1)]


# Where a transaction is


class Oops(Exception):
    pass


def _failing(rows: list[dict[str, Any]], error: BaseException | None = None) -> Iterator[dict[str, Any]]:
    yield from rows
    raise error or Oops("half way")


WORKS: dict[str, Callable[..., Any]] = {
    "insert": lambda rows, **options: Page.insert_many(rows, **options),
    "upsert": lambda rows, **options: Page.upsert_many(rows, key="slug", **options),
    "returning": lambda rows, **options: Page.insert_many(rows, returning="keys", **options),
}


@pytest.mark.parametrize("work", WORKS.values(), ids=list(WORKS))
def test_d8_rows_that_raise_half_way_leave_nothing(app: Flask, look: Look, work: Callable[..., Any]) -> None:
    with pytest.raises(Oops) as caught:
        work(_failing(_pages(700)), batch_size=100)
    assert not getattr(caught.value, "__notes__", [])
    with pytest.raises(KeyboardInterrupt):
        work(_failing(_pages(700), KeyboardInterrupt()), batch_size=100)
    assert look("select count(*) from page") == [0]
    with db.session.begin():
        db.session.add(Page(slug="mine"))
        db.session.flush()
        with pytest.raises(Oops):
            work(_failing(_pages(700)), batch_size=100)
        with pytest.raises(RowsDiffer):
            work([*_pages(700), {"slug": "x"}], batch_size=100)
        with pytest.raises(sa.exc.IntegrityError):
            work([*_pages(700), {"slug": None, "title": "x"}], batch_size=100)
        work(iter(_pages(3)))  # the transaction goes on
    assert look("select count(*) from page") == [4]
    assert db.session.scalar(sa.select(sa.func.count(Page.id))) == 4


def test_d8_commit_every_says_what_stays(app: Flask, look: Look, wire: Wire) -> None:
    for work, stays in ((WORKS["insert"], 250), (WORKS["upsert"], 500)):
        with pytest.raises(Oops) as caught:
            work(_failing(_pages(600, first=0 if stays == 250 else 10_000)), commit_every=250, batch_size=100)
        assert str(caught.value) == "half way"
        notes = caught.value.__notes__
        assert "500 rows in 2 transactions had been committed and stay" in notes[0]
    assert look("select count(*) from page") == [1000]
    with wire.record() as log:
        assert Page.insert_many(_pages(300, first=20_000), commit_every=200) == 300
    assert own_verbs(log) == ["BEGIN", "SELECT", "COPY", "COMMIT"] * 2
    with db.session.begin(), pytest.raises(TransactionAlreadyBegun, match="commit_every=5"):
        Page.insert_many(_pages(1), commit_every=5)
    session = sa_orm.Session(db.engine)
    with pytest.raises(Oops):
        insert_many(session, Page, _failing(_pages(30, first=30_000)), commit_every=10)
    session.close()
    assert look("select count(*) from page where slug >= 's30000'") == [30]


def test_d8_rows_may_come_from_the_same_connection(app: Flask, look: Look) -> None:
    """A generator that reads, and writes, through the session while COPY is under way."""
    Page.insert_many(_pages(1000))

    def rows(statement: Any) -> Iterator[dict[str, Any]]:
        for number, page in enumerate(db.session.scalars(statement)):
            if number % 300 == 299:
                copy = db.session.scalar(sa.select(Page.title).where(Page.id == page.id))
                db.session.execute(sa.update(Page).where(Page.id == page.id).values(title="seen"))
                assert copy == "t"
            yield {"name": page.slug}

    statement = sa.select(Page).order_by(Page.id)
    assert Animal.insert_many(rows(statement), batch_size=100) == 1000
    assert Animal.insert_many(rows(statement.where(Page.title == "t").execution_options(yield_per=50))) == 997
    with db.session.begin():
        streamed = statement.where(Page.title == "t").execution_options(yield_per=50)
        assert Animal.insert_many(rows(streamed), batch_size=100) == 994
    assert look("select count(*) from creature") == [1000 + 997 + 994]

    # an error in the COPY, met by the generator's statement, is the COPY's
    def bad() -> Iterator[dict[str, Any]]:
        yield from [{"slug": "same", "title": "t"}] * 200
        db.session.execute(sa.text("select 1"))
        yield {"slug": "other", "title": "t"}

    with pytest.raises(sa.exc.IntegrityError):
        Page.insert_many(bad(), batch_size=100)
    assert db.session.scalar(sa.select(sa.func.count(Page.id))) == 1000


def test_d8_a_batch_that_copy_cannot_take_goes_by_insert(app: Flask, look: Look, driver: str) -> None:
    class Odd:
        """Neither driver knows it; the type does, for psycopg2 in a way only the driver can send."""

    with pytest.raises((sa.exc.ProgrammingError, sa.exc.StatementError)):
        Page.insert_many([{"slug": f"{n}", "title": Odd()} for n in range(200)])
    for many in (50, 200):
        with pytest.raises(TypeError, match=r"Page\.title is given an SQL expression"):
            Page.insert_many([{"slug": f"{n}", "title": sa.func.now()} for n in range(many)])
    with pytest.raises((ValueError, sa.exc.DataError), match="NUL"):  # as in a flush on either driver
        Page.insert_many([{"slug": f"{n}", "title": "a\0b"} for n in range(200)])
    assert look("select count(*) from page") == [0]
    table = sa.Table("spans", sa.MetaData(), sa.Column("id", sa.Integer), sa.Column("span", postgresql.INT4RANGE))
    table.create(db.engine)

    class Spans(DeclarativeBase):
        insert_many = InsertManyDescriptor(lambda: db.session)

    class Span(Spans):
        __table__ = table
        __mapper_args__ = {"primary_key": [table.c.id]}

    spans = [{"id": n, "span": None if n < 150 else postgresql.Range(n, n + 2)} for n in range(300)]
    assert Span.insert_many(spans, batch_size=100) == 300
    assert look("select count(*), count(span), max(upper(span)) from spans") == [(300, 150, 301)]


def test_a23_bulk_work_outside(app: Flask, look: Look, wire: Wire) -> None:
    db.session.writes_outside = "refuse"
    with wire.record() as log, pytest.raises(TransactionRequired, match=r"insert_many\(\) of Page outside"):
        Page.insert_many(_pages(200))
    assert not log.exchanges
    db.session.writes_outside = "begin"
    Page.insert_many(_pages(200))
    Page.upsert_many(_pages(600), key="slug")
    assert db.session.in_transaction()
    db.session.rollback()
    assert look("select count(*) from page") == [0]


def test_d8_a_plain_session_is_its_owners(app: Flask, look: Look) -> None:
    with sa_orm.Session(db.engine) as session:
        assert insert_many(session, Page, iter(_pages(200))) == 200
        assert upsert_many(session, Page, iter(_pages(600, "new")), key="slug") == Upserted(400, 200, 0)
        with pytest.raises(Oops):
            insert_many(session, Page, _failing(_pages(300, first=5000)))
        assert update_many(session, Page, [{"slug": "s00001", "title": "x"}], key="slug") == 1
        assert look("select count(*) from page") == [0]
        session.commit()
    assert look("select title, count(*) from page group by 1 order by 2") == [("x", 1), ("new", 599)]


# upsert_many


@pytest.mark.parametrize("more", [0, 600], ids=["values", "staged"])
def test_d8_upsert(app: Flask, look: Look, wire: Wire, more: int) -> None:
    """The same from values in the statement and from a staging table."""
    extra = _pages(more, first=50_000)
    Page.insert_many(_pages(3))
    first, second, _ = pages = db.session.scalars(sa.select(Page).order_by(Page.slug)).all()
    second.title = "pending"
    third_kept = pages[2]
    rows = [{"slug": "s00000", "title": "new"}, {"slug": "s00002", "title": "t"}, {"slug": "s00009", "title": "n"}]
    assert Page.upsert_many(rows + extra, key=Page.slug) == Upserted(1 + more, 1, 1)
    # what is loaded is loaded again, what is pending stays
    assert (first.title, first.version, first.changes) == ("new", 2, 1)
    assert (second.title, third_kept.title, third_kept.version) == ("pending", "t", 1)
    db.session.expire(second)
    # only what `update` names; nothing; a new row is whole
    rows = [{"slug": "s00000", "title": "x", "changes": 9}, {"slug": f"w{more}", "title": "w", "changes": 9}]
    extra = [{**row, "changes": 9} for row in extra]
    assert Page.upsert_many(rows + extra, key=["slug"], update=["title"]) == Upserted(1, 1, more)
    assert look("select title, changes from page where slug = 's00000'") == [("x", 2)]
    assert look(f"select title, changes from page where slug = 'w{more}'") == [("w", 9)]
    rows = [{"slug": "s00000", "title": "y"}, {"slug": "z", "title": "z"}]
    extra = [{"slug": row["slug"], "title": "y"} for row in extra]
    assert Page.upsert_many(rows + extra, key="slug", update=[]) == Upserted(1, 0, 1 + more)
    assert look("select count(*) from page where title = 'y'") == [0]
    # a conflict over another constraint is an error
    with pytest.raises(sa.exc.IntegrityError):
        Page.upsert_many([{"id": 1, "slug": "s00001", "title": "x"}, *({"id": n, **r} for n, r in enumerate(
            _pages(more, first=90_000), 5000))], key="id")  # fmt: skip
    # a partial unique index, a type without equality, NULL in the key
    tags = [{"code": f"c{n}", "tag": n, "open": True} for n in range(more + 5)]
    assert Thing.upsert_many(tags, key="tag") == Upserted(more + 5, 0, 0)
    assert Thing.upsert_many([{**row, "code": f"d{row['tag']}"} for row in tags], key="tag") == Upserted(
        0, more + 5, 0
    )
    nodes = [{"a": n, "b": "b", "maybe": None, "extra": {"n": n}} for n in range(more + 5)]
    assert Node.upsert_many(nodes, key="maybe", duplicates="last") == Upserted(more + 5, 0, 0)
    assert Node.upsert_many(nodes, key=["a", "b"]) == Upserted(0, 0, more + 5)


@pytest.mark.parametrize("count", [3, 700], ids=["values", "staged"])
def test_d8_duplicates_of_a_key(app: Flask, look: Look, count: int) -> None:
    rows = _pages(count)
    near = [*rows, {"slug": "s00001", "title": "last"}]
    with pytest.raises(DuplicateRows, match="slug='s00001'"):
        Page.upsert_many(near, key="slug")
    assert Page.upsert_many(near, key="slug", duplicates="last") == Upserted(count, 0, 1)
    assert look("select title from page where slug = 's00001'") == ["last"]
    assert look("select count(*) from page") == [count]
    if count == 700:  # in batches apart
        assert Page.upsert_many(near, key="slug", batch_size=600, duplicates="last") == Upserted(0, 0, 701)
        with pytest.raises(DuplicateRows, match="two rows have the same key"):
            Page.upsert_many(near, key="slug", batch_size=600)
        with pytest.raises(DuplicateRows, match="slug='s00001'"):
            Page.upsert_many(near, key="slug", batch_size=600, update=[])
        with pytest.raises(DuplicateRows, match="slug='s00001'"):
            Page.update_many(near, key="slug", batch_size=600)
        assert (
            Page.update_many(
                [*near, {"slug": "s00001", "title": "very"}], key="slug", batch_size=600, duplicates="last"
            )
            == 700
        )
        assert look("select title from page where slug = 's00001'") == ["very"]
        assert look("select count(*) from page where version = 2") == [1]  # the others got the values they had


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_d8_two_upserts_at_once_wait_for_each_other(app: Flask, look: Look) -> None:
    """In opposite order, the first one holding the first key of both: no deadlock."""
    engine = db.engine
    rows = _pages(600)
    with sessionmaker(engine)() as one, one.begin():
        upsert_many(one, Page, rows[300:], key="slug")
        found: list[Any] = []

        def other() -> None:
            with sessionmaker(engine)() as two:
                found.append(upsert_many(two, Page, reversed(rows), key="slug"))

        thread = threading.Thread(target=other)
        thread.start()
        while not look(WAITING):
            assert thread.is_alive()
        # the other one has written what comes before, and waits; this one needs none of what it holds
        upsert_many(one, Page, [{"slug": "s00300", "title": "again"}], key="slug")
    thread.join(20)
    assert found == [Upserted(300, 1, 299)]


# update_many


def test_d8_update(app: Flask, look: Look) -> None:
    Page.insert_many(_pages(50))
    page = db.session.scalar(sa.select(Page).where(Page.slug == "s00007"))
    ids = {page.slug: page.id for page in db.session.scalars(sa.select(Page))}
    rows = [{"id": id_, "title": slug} for slug, id_ in ids.items()]
    assert Page.update_many([*rows, {"id": 0, "title": "nobody"}]) == 50
    assert (page.title, page.version, page.changes) == ("s00007", 2, 1)
    assert look("select count(*) from page where title = slug and version = 2 and changes = 1") == [50]
    assert Page.update_many([{"slug": "s00007", "title": None}, {"slug": "no", "title": ""}], key="slug") == 1
    assert (page.title, page.version) == (None, 3)
    objects = [Page(id=page.id, title="from an object")]
    assert Page.update_many(objects) == 1
    assert page.title == "from an object"
    assert objects[0] not in db.session


# Bad input


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_d8_bad_input_raises_before_anything_is_sent(app: Flask, wire: Wire) -> None:
    rows = _pages(3)
    wrong: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (UnknownAttribute, "did you mean 'title'", lambda: Page.insert_many([{"slug": "a", "titel": "b"}])),
        (UnknownAttribute, "did you mean 'slug'", lambda: Page.upsert_many(rows, key="slugs")),
        (UnknownAttribute, "'nothing'", lambda: Page.upsert_many(rows, key="slug", update=["nothing"])),
        (RowsDiffer, "Row 2 .* lacks title", lambda: Page.insert_many([*rows[:1], {"slug": "b"}])),
        (DuplicateRows, "slug='s00000'", lambda: Page.upsert_many([*rows, rows[0]], key="slug")),
        (ValueError, "have no id, which key=", lambda: Page.update_many(rows)),
        (ValueError, "have no id, which key=", lambda: Page.upsert_many(rows, key="id")),
        (ValueError, "have no kind, which update=", lambda: Page.upsert_many(rows, key="slug", update=["kind"])),
        (ValueError, "slug is in key", lambda: Page.upsert_many(rows, key="slug", update=["slug"])),
        (ValueError, "key names no attribute", lambda: Page.upsert_many(rows, key=[])),
        (ValueError, "nothing to set", lambda: Page.update_many([{"id": 1}])),
        (ValueError, "batch_size=0", lambda: Page.insert_many(rows, batch_size=0)),
        (ValueError, "commit_every='all'", lambda: Page.insert_many(rows, commit_every="all")),
        (ValueError, "duplicates='first'", lambda: Page.upsert_many(rows, key="slug", duplicates="first")),
        (TypeError, "iterable of dicts or of Page", lambda: Page.insert_many(rows[0])),
        (TypeError, "neither a dict nor a Page", lambda: Page.insert_many([Animal()])),
        (TypeError, "not a mapped class", lambda: insert_many(db.session, Base, rows)),
        (TypeError, r"db\.session", lambda: insert_many(db, Page, rows)),
    ]  # fmt: skip
    with wire.record() as log:
        for error, message, work in wrong:
            with pytest.raises(error, match=message):
                work()
    # a transaction may have been opened, and has nothing in it
    assert set(own_verbs(log)) <= {"BEGIN", "ROLLBACK"}
    assert db.session.scalar(sa.select(sa.func.count(Page.id))) == 0


# Elsewhere


def test_d8_sqlite() -> None:
    engine = sa.create_engine("sqlite://", poolclass=__import__("fictive.sqlalchemy").sqlalchemy.TakeTurnsPool)
    Base.metadata.create_all(engine, tables=[Page.__table__, Node.__table__, Animal.__table__, Dog.__table__])
    with OptInSession(engine) as session:
        count = sa.select(sa.func.count(Page.id))
        assert insert_many(session, Page, iter(_pages(300)), batch_size=100) == 300
        with pytest.raises(Oops):
            insert_many(session, Page, _failing(_pages(300, first=1000)), batch_size=100)
        assert session.scalar(count) == 300
        rows = _pages(320, "new", first=290)
        assert upsert_many(session, Page, rows, key="slug", batch_size=100) == Upserted(310, 10, 0)
        assert upsert_many(session, Page, rows, key="slug", update=[]) == Upserted(0, 0, 320)
        with pytest.raises(DuplicateRows, match="slug='s00290'"):
            upsert_many(session, Page, [*rows, rows[0]], key="slug", batch_size=100)
        assert upsert_many(session, Page, [*rows, rows[0]], key="slug", duplicates="last").updated
        assert update_many(session, Page, [{"slug": row["slug"], "title": "u"} for row in rows], key="slug") == 320
        assert session.scalar(count.where(Page.title == "u", Page.changes > 0)) == 320
        assert insert_many(session, Dog, [{"name": "x", "breed": "y"}], returning="keys") == [1]
        with session.begin():
            with pytest.raises(Oops):
                insert_many(session, Page, _failing(_pages(300, first=1000)), batch_size=100)
            assert insert_many(session, Page, _pages(1, first=1000)) == 1
        assert session.scalar(count) == 611
    with sa_orm.Session(engine) as session:
        insert_many(session, Page, _pages(5, first=2000))
        session.rollback()
        assert session.scalar(count) == 611
    engine.dispose()


def test_d8_a_driver_without_copy(app: Flask, look: Look) -> None:
    """Rows are staged by INSERT. And psycopg2 while it is green refuses COPY."""
    url = sa.make_url(str(db.engine.url.render_as_string(hide_password=False))).set(drivername="postgresql+pg8000")
    engine = sa.create_engine(url)
    with sessionmaker(engine)() as session:
        assert insert_many(session, Page, iter(_pages(150))) == 150
        assert upsert_many(session, Page, iter(_pages(600, "new")), key="slug") == Upserted(450, 150, 0)
        assert update_many(session, Page, [{"slug": row["slug"], "title": "u"} for row in _pages(9)], key="slug") == 9
    engine.dispose()
    assert look("select title, count(*) from page group by 1 order by 2") == [("u", 9), ("new", 591)]


def test_upsert_needs_a_database_that_has_it() -> None:
    session = sa_orm.Session(sa.create_mock_engine("mysql+pymysql://", lambda *_: None))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedDialect, match=r"upsert_many\(\) needs PostgreSQL or SQLite"):
        upsert_many(session, Page, itertools.repeat({"slug": "a"}), key="slug")


def test_the_mixin_goes_before_the_class_and_leaves_names_alone() -> None:
    with pytest.raises(ConfigurationError, match="BulkMixin comes after SQLAlchemy in the bases of Wrong"):
        type("Wrong", (SQLAlchemy, BulkMixin), {})

    class Own(DeclarativeBase):
        insert_many = "its own"

    class Plain(BulkMixin, SQLAlchemy):
        pass

    model = Plain(model_class=Own).Model
    assert model.insert_many == "its own"
    assert callable(model.upsert_many)

"""Rules A30, A31 and D where neither a type nor a relation is the point: models, sessions, defaults, names, locks."""

from __future__ import annotations

import datetime as dt
import decimal
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.ext.declarative import ConcreteBase
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fictive.errors import ConfigurationError, DuplicateRows
from fictive.models import Repository
from fictive.rows.bulk import Upserted, insert_many, update_many, upsert_many
from fictive.rows.find_or_create import get_or_create, update_or_create
from fictive.rows.many_to_many import m2m_add, m2m_remove, m2m_set
from fictive.session.session import OptInSession

Look = Callable[..., list[Any]]


@dataclass
class Point:
    x: int
    y: int


def _slug(context: Any) -> str:
    return "slug-" + str(context.get_current_parameters().get("title"))


class NeverNone(sa.types.TypeDecorator[str]):
    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return "none" if value is None else value


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "contract_row"
    id: Mapped[int] = mapped_column(primary_key=True)
    k: Mapped[int] = mapped_column(unique=True)
    title: Mapped[str | None]
    slug: Mapped[str | None] = mapped_column(default="new", onupdate=_slug)
    made: Mapped[str | None] = mapped_column(default=lambda c: f"of {c.get_current_parameters()['k']}")
    sure: Mapped[str] = mapped_column(NeverNone)
    data: Mapped[Any] = mapped_column(sa.JSON, nullable=True)
    point: Mapped[Point] = sa_orm.composite(mapped_column("px", nullable=True), mapped_column("py", nullable=True))


class Swapped(Base):
    __tablename__ = "contract_swapped"
    id: Mapped[int] = mapped_column(primary_key=True)
    a: Mapped[int] = mapped_column("b")
    b: Mapped[int] = mapped_column("a")
    real: Mapped[float] = mapped_column(sa.REAL, server_default="0")


class Person(Base):
    __tablename__ = "contract_person"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str] = mapped_column(unique=True)
    y: Mapped[int | None]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}


class Child(Person):
    toys: Mapped[int | None]
    __mapper_args__ = {"polymorphic_identity": "child"}


class Other(Person):
    __mapper_args__ = {"polymorphic_identity": "other"}


links = sa.Table(
    "contract_link", Base.metadata,
    sa.Column("left", sa.ForeignKey("contract_left.id"), primary_key=True),
    sa.Column("right", sa.ForeignKey("contract_row.id"), primary_key=True),
    sa.Column("note", sa.Text, default=lambda c: "to {right}".format(**c.get_current_parameters())),
)  # fmt: skip


class Left(Base):
    __tablename__ = "contract_left"
    id: Mapped[int] = mapped_column(primary_key=True)
    rows: Mapped[list[Row]] = sa_orm.relationship(secondary=links)


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(database_url, pool_size=3, max_overflow=0, pool_timeout=5)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def db(engine: sa.Engine) -> Iterator[OptInSession]:
    with OptInSession(engine) as session:
        yield session


def _rows(count: int, first: int = 0, **values: Any) -> list[dict[str, Any]]:
    return [{"k": k, **values} for k in range(first, first + count)]


def test_a31_defaults_see_their_row_on_every_way(db: OptInSession, look: Look) -> None:
    ways: dict[str, tuple[int, Callable[[list[dict[str, Any]]], object]]] = {
        "update()": (1, lambda rows: db.execute(sa.update(Row).where(Row.k == rows[0]["k"]).values(title="t"))),
        "update_or_create": (1, lambda rows: update_or_create(db, Row, {"k": rows[0]["k"]}, {"title": "t"})),
        "upsert 1": (1, lambda rows: upsert_many(db, Row, rows, key="k", update=["title"])),
        "upsert 600": (600, lambda rows: upsert_many(db, Row, rows, key="k", update=["title"])),
        "update 1": (1, lambda rows: update_many(db, Row, rows, key="k")),
        "update 10": (10, lambda rows: update_many(db, Row, rows, key="k")),
    }
    for number, (name, (count, write)) in enumerate(ways.items()):
        first = number * 1000
        insert_many(db, Row, _rows(count, first, sure="s", title="old"))
        write(_rows(count, first, sure="s", title="t"))
        found = look("select distinct slug, made = 'of ' || k from contract_row where k between %s and %s",
                     first, first + count)  # fmt: skip
        assert found == [("slug-t", True)], name
    many = [{"k": k, "sure": "s", "title": f"t{k % 3}"} for k in range(3000, 3600)]  # one onupdate for each title
    assert upsert_many(db, Row, many, key="k") == Upserted(0, 600, 0)
    assert look("select count(*) from contract_row where k >= 3000 and k < 3600 and slug = 'slug-' || title") == [600]


def test_a31_none_is_asked_of_its_type(db: OptInSession, look: Look) -> None:
    get_or_create(db, Row, {"k": 1}, {"sure": None, "data": None})
    update_or_create(db, Row, {"k": 2}, {"sure": None, "data": sa.null()})
    insert_many(db, Row, _rows(1, 3, sure=None, data=None))
    insert_many(db, Row, _rows(30, 4, sure=None, data=None))
    insert_many(db, Row, [{"k": 100, "sure": "s", "data": sa.null()}, {"k": 101, "sure": "s", "data": [1]}])
    upsert_many(db, Row, [*_rows(600, 200, sure="s", data={}), {"k": 999, "sure": "s", "data": sa.null()}], key="k")
    assert look("select distinct sure, data::text from contract_row where k < 100 order by 2") == [
        ("none", "null"), ("none", None)]  # fmt: skip
    assert look("select k from contract_row where data is null order by k") == [2, 100, 999]


def test_d6_a_dataclass_composite_is_found(db: OptInSession) -> None:
    ids = {get_or_create(db, Row, {"point": Point(1, 2)}, {"k": 1, "sure": "s"})[0].id for _ in range(2)}
    assert len(ids) == 1


def test_d5_none_for_a_type_without_a_hash(db: OptInSession, engine: sa.Engine) -> None:
    class Odd(DeclarativeBase):
        pass

    class Thing(Odd):
        __tablename__ = "contract_odd"
        id: Mapped[int] = mapped_column(primary_key=True)
        bits: Mapped[Any] = mapped_column(pg.BIT(3), nullable=True)
        span: Mapped[Any] = mapped_column(pg.TSVECTOR, nullable=True)

    Odd.metadata.create_all(engine)
    for lookup in ({"bits": None}, {"span": None, "bits": "101"}):
        assert [get_or_create(db, Thing, lookup)[1] for _ in range(2)][1] is False


def test_a31_a_subclass_writes_rows_of_its_own(db: OptInSession, look: Look) -> None:
    with db.begin():
        db.add_all([Child(name="c", y=1), Other(name="o", y=1)])
    for more in (0, 30, 600):
        rows = [{"name": "o", "y": 9}, {"name": "c", "y": more}, *({"name": f"z{n}", "y": 9} for n in range(more))]
        if more < 600:
            assert update_many(db, Child, rows, key="name") == 1
        upsert_many(db, Child, rows, key="name")
        assert look("select kind, y from contract_person where name in ('c', 'o') order by 1") == [
            ("child", more), ("other", 1)]  # fmt: skip
    assert insert_many(db, Person, [Child(name="x", toys=3)]) == 1
    assert insert_many(db, Person, [Child(name=f"x{n}", toys=3) for n in range(30)]) == 30
    assert look("select distinct kind, toys from contract_person where name like 'x%%'") == [("child", 3)]


def test_i3_keyset_pages_go_by_the_attribute_and_as_stored(db: OptInSession) -> None:
    insert_many(db, Swapped, [{"a": n, "b": n * 7 % 60, "real": (0.1, 0.2, 1 / 3)[n % 3]} for n in range(60)])
    pages = Repository[Swapped](db)  # type: ignore[misc]
    assert [row.a for row in pages.keyset_page(60, order_by=[Swapped.a.desc()]).items] == list(range(59, -1, -1))
    for order in ([Swapped.real], [Swapped.real.desc()], [Swapped.real, Swapped.b.desc()]):
        seen, after = [], None
        while len(seen) < 100:
            page = pages.keyset_page(7, order_by=order, after=after)
            seen += [row.id for row in page.items]
            if not (after := page.next):
                break
        assert (len(seen), len(set(seen))) == (60, 60)


def test_d2_d7_a_model_with_a_composite_is_written_by_one_statement(db: OptInSession, engine: sa.Engine) -> None:
    sent: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *args: sent.append(args[2].split()[0]))
    row, _ = get_or_create(db, Row, {"k": 1}, {"sure": "s", "point": Point(1, 2)})
    assert (row.point, sent) == (Point(1, 2), ["SELECT", "INSERT"])
    sent.clear()
    assert update_or_create(db, Row, {"k": 1}, {"sure": "s", "point": Point(3, 4)}) == (row, False)
    assert (row.point, sent) == (Point(3, 4), ["WITH"])


def test_d2_d7_an_insert_that_a_trigger_cancels_is_the_error_of_a_flush(db: OptInSession, look: Look) -> None:
    look("create function cancel() returns trigger language plpgsql as 'begin return null; end'")
    look("create trigger cancelled before insert on contract_row for each row execute function cancel()")
    for create in (get_or_create, update_or_create):
        for lookup in ({"k": 1}, {"title": "no key"}):
            with pytest.raises(sa_orm.exc.FlushError, match=r"or_create\(\): .* no Row\. .*trigger"):
                create(db, Row, lookup, {"sure": "s"} if "k" in lookup else {"sure": "s", "k": 1})
    assert look("select count(*) from contract_row") == [0]


def test_d8_a_key_that_is_not_unique_is_named(db: OptInSession) -> None:
    with pytest.raises(ConfigurationError, match=r"upsert_many\(\): .* \(title\) on .* no unique .*\(k\)"):
        upsert_many(db, Row, _rows(2, sure="s", title="t"), key="title", duplicates="last")


def test_d8_a_class_of_a_join_is_refused_by_insert_many(db: OptInSession) -> None:
    class Whole(DeclarativeBase):
        pass

    class Joined(Whole):
        __table__ = sa.join(Left.__table__, links)
        id = sa_orm.column_property(Left.__table__.c.id, links.c.left)
        right = links.c.right

    class Selected(Whole):
        __table__ = sa.select(Left.__table__).subquery()

    for model in (Joined, Selected):
        for returning in (None, "keys"):
            for rows in ([{"id": 1}], [model(id=1)]):
                with pytest.raises(TypeError, match=rf"insert_many\(\): a {model.__name__} is mapped to a join"):
                    insert_many(db, model, rows, returning=returning)


@pytest.mark.parametrize("count", [1, 5, 600])
def test_d7_d8_a_column_may_have_the_name_of_a_parameter(db: OptInSession, engine: sa.Engine, count: int) -> None:
    class Whole(DeclarativeBase):
        pass

    class Parameter(Whole):
        __tablename__ = "contract_parameter"
        id: Mapped[int] = mapped_column(primary_key=True)
        param_1: Mapped[str | None]
        param_2: Mapped[str | None] = mapped_column(onupdate="moved")

    Whole.metadata.create_all(engine)
    rows = [{"id": id, "param_1": "a"} for id in range(1, count + 1)]
    insert_many(db, Parameter, rows)
    assert update_many(db, Parameter, [{**row, "param_1": "b"} for row in rows]) == count
    assert upsert_many(db, Parameter, [{**row, "param_1": "c"} for row in rows], key="id") == Upserted(0, count, 0)
    assert update_or_create(db, Parameter, {"id": count}, {"param_1": "d"})[1] is False
    assert update_or_create(db, Parameter, {"param_1": "d"}, {"param_2": "x"})[1] is False
    last = db.get_one(Parameter, count)
    assert (last.param_1, last.param_2) == ("d", "x")


@pytest.mark.parametrize("count", [1, 6])
def test_d8_null_is_a_key_where_nulls_are_not_distinct(db: OptInSession, engine: sa.Engine, count: int) -> None:
    class Whole(DeclarativeBase):
        pass

    class Same(Whole):
        __tablename__ = "contract_same"
        id: Mapped[int] = mapped_column(primary_key=True)
        a: Mapped[str | None] = mapped_column(sa.String(5))
        b: Mapped[int | None]
        c: Mapped[int]
        v: Mapped[str | None]
        __table_args__ = (sa.UniqueConstraint("a", "b", "c", postgresql_nulls_not_distinct=True),)

    Whole.metadata.create_all(engine)
    rows = [{"a": a, "b": b, "c": c, "v": "x"} for a in (None, "a") for b in (None, 1) for c in (1, 2)]
    insert_many(db, Same, rows)
    key = ["a", "b", "c"]
    assert update_many(db, Same, [{**row, "v": "y"} for row in rows[:count]], key=key) == count
    assert upsert_many(db, Same, [{**row, "v": "y"} for row in rows], key=key) == Upserted(0, 8 - count, count)
    twice = [{**rows[0], "v": "z"}] * 2
    with pytest.raises(DuplicateRows):
        update_many(db, Same, twice, key=key)
    assert update_many(db, Same, twice, key=key, duplicates="last") == 1


@pytest.mark.parametrize("count", [1, 600])
def test_d8_a_key_that_is_deferrable_is_named(db: OptInSession, engine: sa.Engine, count: int) -> None:
    class Whole(DeclarativeBase):
        pass

    class Place(Whole):
        __tablename__ = "contract_place"
        id: Mapped[int] = mapped_column(primary_key=True)
        k: Mapped[int] = mapped_column()
        v: Mapped[str | None]
        __table_args__ = (sa.UniqueConstraint("k", deferrable=True),)

    Whole.metadata.create_all(engine)
    with pytest.raises(ConfigurationError, match=r"upsert_many\(\): .* \(k\) on .*these keys for it: \(id\)\. "):
        upsert_many(db, Place, [{"k": k, "v": "x"} for k in range(count)], key="k")
    assert get_or_create(db, Place, {"k": 1})[1] is True  # by the lock


def test_a30_a_moment_is_one_however_it_is_written(db: OptInSession, engine: sa.Engine, look: Look) -> None:
    class Whole(DeclarativeBase):
        pass

    class Moment(Whole):
        __tablename__ = "contract_moment"
        id: Mapped[int] = mapped_column(primary_key=True)
        at: Mapped[Any] = mapped_column(pg.TIMESTAMP(precision=0), unique=True)
        price: Mapped[Any] = mapped_column(sa.Numeric(5, 2), nullable=True)

    Whole.metadata.create_all(engine)
    at, price = dt.datetime(2026, 1, 1, 0, 0, 0, 600_000), decimal.Decimal("1.005")
    assert [get_or_create(db, Moment, {"at": at})[1] for _ in range(2)] == [True, False]
    assert [get_or_create(db, Moment, {"price": price}, {"at": dt.datetime(2027, 1, 1)})[1] for _ in range(2)] == [
        True, False]  # fmt: skip
    before = look("select xmin::text from contract_moment order by id")
    update_or_create(db, Moment, {"at": at}, {"price": price})
    changed = look("select xmin::text from contract_moment order by id")
    update_or_create(db, Moment, {"at": at}, {"price": price})
    assert (changed != before, look("select xmin::text from contract_moment order by id")) == (True, changed)


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)  # on psycopg SQLAlchemy writes a cast, in INSERT too
def test_a30_bytes_are_no_number(db: OptInSession, engine: sa.Engine) -> None:
    """PostgreSQL 18 makes one of them where a cast asks for it, and not for an INSERT."""

    class Whole(DeclarativeBase):
        pass

    class Number(Whole):
        __tablename__ = "contract_number"
        id: Mapped[int] = mapped_column(primary_key=True)
        v: Mapped[Any] = mapped_column(sa.SmallInteger, unique=True)

    Whole.metadata.create_all(engine)
    insert_many(db, Number, [{"v": 5}])
    for value in (b"\x05", bytearray(b"\x05"), b"\x05" * 9):
        with pytest.raises(sa.exc.ProgrammingError):
            get_or_create(db, Number, {"v": value})


def test_a30_keys_that_are_one_in_the_database(db: OptInSession, engine: sa.Engine, look: Look) -> None:
    class Keys(DeclarativeBase):
        pass

    class Priced(Keys):
        __tablename__ = "contract_priced"
        id: Mapped[int] = mapped_column(primary_key=True)
        price: Mapped[Any] = mapped_column(sa.Numeric(5, 2), unique=True, nullable=True)
        name: Mapped[str | None]
        n: Mapped[int | None]

    sa.Index("contract_priced_name", sa.func.lower(Priced.name), unique=True)
    Keys.metadata.create_all(engine)
    rows = [{"price": decimal.Decimal(price), "n": n} for n, price in enumerate(("1.006", "1.01", "2"))]
    with pytest.raises(DuplicateRows):
        upsert_many(db, Priced, rows, key="price")
    assert upsert_many(db, Priced, rows, key="price", duplicates="last") == Upserted(2, 0, 1)
    assert look("select price, n from contract_priced order by price") == [(decimal.Decimal("1.01"), 1), (2, 2)]
    # an index on an expression keeps rows apart that the lookup does not take for one
    assert update_or_create(db, Priced, {"name": "x"}, {"n": 7})[1] is True
    with pytest.raises(sa.exc.IntegrityError):
        update_or_create(db, Priced, {"name": "X"}, {"n": 8})
    assert look("select n from contract_priced where name = 'x'") == [7]


@pytest.mark.parametrize("count", [2, 7, 600])
def test_a30_two_keys_that_are_one_in_the_database(db: OptInSession, engine: sa.Engine, count: int) -> None:
    """1.001 and 1.002 of two places are one key, however many rows there are and whatever the way."""

    class Keys(DeclarativeBase):
        pass

    class Priced(Keys):
        __tablename__ = "contract_priced"
        id: Mapped[int] = mapped_column(primary_key=True)
        price: Mapped[decimal.Decimal] = mapped_column(sa.Numeric(5, 2), unique=True)
        v: Mapped[str]

    Keys.metadata.create_all(engine)
    more = [{"price": decimal.Decimal(10 + n), "v": "m"} for n in range(count - 2)]
    same = [{"price": decimal.Decimal(text), "v": v} for text, v in (("1.001", "a"), ("1.002", "b"))]
    for update in (None, []):
        with pytest.raises(DuplicateRows):
            upsert_many(db, Priced, same + more, key="price", update=update)
    assert upsert_many(db, Priced, same + more, key="price", duplicates="last") == Upserted(count - 1, 0, 1)
    with pytest.raises(DuplicateRows):
        update_many(db, Priced, same + more, key="price")
    assert update_many(db, Priced, same[::-1] + more, key="price", duplicates="last") >= count - 1
    assert db.scalar(sa.select(Priced.v).where(Priced.price == decimal.Decimal("1"))) == "a"


class Folded(sa.types.TypeDecorator[Any]):
    """Two values that Python tells apart are one in the database."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else ",".join(value).lower()

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value.split(",")


@pytest.mark.parametrize("count", [2, 600])
@pytest.mark.parametrize("key", [["tags"], ["a", "b"]])
def test_d8_keys_that_only_the_database_compares(
    db: OptInSession, engine: sa.Engine, key: list[str], count: int
) -> None:
    """By a decorator's type, of lists besides, and by a key in which NULLs are one."""

    class Keys(DeclarativeBase):
        pass

    class Tagged(Keys):
        __tablename__ = "contract_tagged"
        id: Mapped[int] = mapped_column(primary_key=True)
        tags: Mapped[Any] = mapped_column(Folded, unique=True, nullable=True)
        a: Mapped[int | None]
        b: Mapped[int | None]
        v: Mapped[str]
        __table_args__ = (sa.UniqueConstraint("a", "b", postgresql_nulls_not_distinct=True),)

    Keys.metadata.create_all(engine)
    rows = [{"tags": [str(n)], "a": n, "b": n, "v": "m"} for n in range(count - 2)]
    rows += [{"tags": ["X"], "a": -1, "b": None, "v": "1"}, {"tags": ["x"], "a": -1, "b": None, "v": "2"}]
    if key == ["a", "b"]:
        rows = [{**row, "tags": None} for row in rows]
    else:
        rows = [{**row, "a": n, "b": n} for n, row in enumerate(rows)]
    for update in (None, []):
        with pytest.raises(DuplicateRows):
            upsert_many(db, Tagged, rows, key=key, update=update)
    assert upsert_many(db, Tagged, rows, key=key, duplicates="last") == Upserted(count - 1, 0, 1)
    assert db.scalars(sa.select(Tagged.v).where(Tagged.v != "m")).all() == ["2"]
    if key == ["tags"]:
        for given, wanted in ((rows, "2"), (rows[::-1], "1")):
            update_many(db, Tagged, given, key=key, duplicates="last")
            assert db.scalars(sa.select(Tagged.v).where(Tagged.v != "m")).all() == [wanted]
        with pytest.raises(DuplicateRows):
            update_many(db, Tagged, rows, key=key)


def test_a31_writes_go_where_a_routing_session_writes(engine: sa.Engine, look: Look) -> None:
    replica = sa.create_engine(engine.url.update_query_dict({"options": "-c default_transaction_read_only=on"}))

    class Routing(OptInSession):
        def get_bind(self, mapper: Any = None, clause: Any = None, **kwargs: Any) -> Any:
            return engine if self._flushing or isinstance(clause, (sa.Update, sa.Delete)) else replica

    with Routing() as session:
        insert_many(session, Row, _rows(3, sure="s"))
        insert_many(session, Row, _rows(30, 10, sure="s"))
        insert_many(session, Row, _rows(2, 50, sure="s"), returning="keys")
        upsert_many(session, Row, _rows(600, sure="s", title="u"), key="k")
        update_many(session, Row, _rows(9, title="v"), key="k")
        get_or_create(session, Row, {"k": 1000}, {"sure": "s"})
        get_or_create(session, Row, {"title": "none such"}, {"k": 1001, "sure": "s"})
        update_or_create(session, Row, {"k": 1000}, {"title": "w"})
        with session.begin():
            left = Left()
            session.add(left)
        rows = session.scalars(sa.select(Row).limit(3)).all()
        m2m_add(session, left, Left.rows, *rows)
        m2m_set(session, left, Left.rows, rows[0])
    replica.dispose()
    assert look("select count(*), count(title) from contract_row") == [(602, 602)]
    assert look("select note = 'to ' || \"right\" from contract_link") == [True]


def test_d8_two_update_many_in_opposite_order_do_not_deadlock(engine: sa.Engine, look: Look) -> None:
    with OptInSession(engine) as session:
        insert_many(session, Row, _rows(400, sure="s"))
    failed: list[BaseException] = []
    start = threading.Barrier(2)

    def work(rows: list[dict[str, Any]]) -> None:
        try:
            with OptInSession(engine) as session:
                for number in range(5):
                    start.wait(30)
                    update_many(session, Row, [{**row, "title": f"{number}"} for row in rows], key="k")
        except BaseException as error:
            failed.append(error)
            start.abort()

    for rows in (_rows(400), _rows(4)):
        threads = [threading.Thread(target=work, args=(each,)) for each in (rows, rows[::-1])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []
    assert look("select deadlocks from pg_stat_database where datname = current_database()") == [0]


def test_a31_row_security_that_is_enabled_later(db: OptInSession, look: Look) -> None:
    """Inside, what kind of relation it is was asked before; another role has taken over since."""
    insert_many(db, Row, _rows(30, sure="s"))
    role = f"rows_later_{uuid.uuid4().hex[:8]}"
    look(f"create role {role}")
    try:
        look("alter table contract_row enable row level security")
        look("create policy p on contract_row using (true)")
        look(f"grant all on all tables in schema public to {role}")
        look(f"grant all on all sequences in schema public to {role}")
        look(f"grant usage on schema public to {role}")
        with db.begin():
            db.execute(sa.text(f"set local role {role}"))
            assert insert_many(db, Row, _rows(30, 100, sure="s")) == 30
        assert look("select count(*) from contract_row") == [60]
    finally:
        look(f"drop owned by {role}")
        look(f"drop role {role}")


@pytest.mark.parametrize("count", [2, 30])
def test_a18_a_value_that_the_driver_refuses_costs_no_connection(
    db: OptInSession, engine: sa.Engine, count: int
) -> None:
    class Bytes(DeclarativeBase):
        pass

    class Blob(Bytes):
        __tablename__ = "contract_blob"
        id: Mapped[int] = mapped_column(primary_key=True)
        k: Mapped[int] = mapped_column(unique=True)
        body: Mapped[bytes]

    Bytes.metadata.create_all(engine)
    for write in (insert_many, lambda *given: upsert_many(*given, key="k")):
        with pytest.raises((TypeError, sa.exc.StatementError)):
            write(db, Blob, _rows(count, body="text"))
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_d7_columns_of_any_name(db: OptInSession, engine: sa.Engine) -> None:
    """As long as PostgreSQL's may be, and called as one of our own."""

    class Named(DeclarativeBase):
        pass

    class Long(Named):
        __tablename__ = "contract_long"
        id: Mapped[int] = mapped_column(primary_key=True)
        k: Mapped[int] = mapped_column("k" * 63, unique=True)
        v: Mapped[str] = mapped_column("fictive_created")

    Named.metadata.create_all(engine)
    found = [update_or_create(db, Long, {"k": 1}, {"v": v}) for v in "aabb"]
    assert [created for _, created in found] == [True, False, False, False]
    assert (found[0][0].k, found[0][0].v) == (1, "b")


def test_d6_a_class_that_an_expression_tells(db: OptInSession, engine: sa.Engine) -> None:
    """The discriminator is no column of the table: CASE, or a literal of a union."""

    class Kinds(DeclarativeBase):
        pass

    class Shape(Kinds):
        __tablename__ = "contract_shape"
        id: Mapped[int] = mapped_column(primary_key=True)
        k: Mapped[int] = mapped_column(unique=True)
        v: Mapped[str]
        round: Mapped[bool] = mapped_column(default=False)
        __mapper_args__ = {
            "polymorphic_on": sa.case((round, "circle"), else_="shape"), "polymorphic_identity": "shape"
        }  # fmt: skip

    class Circle(Shape):
        __mapper_args__ = {"polymorphic_identity": "circle"}

    class Part(ConcreteBase, Kinds):
        __tablename__ = "contract_part"
        id: Mapped[int] = mapped_column(primary_key=True)
        k: Mapped[int] = mapped_column(unique=True)
        v: Mapped[str]
        __mapper_args__ = {"polymorphic_identity": "part", "concrete": True}

    class Wheel(Part):
        __tablename__ = "contract_wheel"
        id: Mapped[int] = mapped_column(primary_key=True)
        k: Mapped[int] = mapped_column(unique=True)
        v: Mapped[str]
        __mapper_args__ = {"polymorphic_identity": "wheel", "concrete": True}

    Kinds.metadata.create_all(engine)
    for model, given in ((Shape, {}), (Circle, {"round": True}), (Part, {}), (Wheel, {})):
        k = 2 if model is Circle else 1
        assert [get_or_create(db, model, {"k": k}, {"v": "a", **given})[1] for _ in range(2)] == [True, False]
        found, created = get_or_create(db, model, {"v": "b"}, {"k": k + 10, **given})
        assert (type(found), created) == (model, True)
        if model is not Part:  # whose SELECT is a union, which cannot be locked
            changes = [{"v": v, **given} for v in "cd"]
            updated = [update_or_create(db, model, {"k": k + 20}, each) for each in changes]
            assert [(each.v, created) for each, created in updated] == [("d", True), ("d", False)]


def test_d7_a_hierarchy_that_loads_its_subclasses(db: OptInSession, engine: sa.Engine) -> None:
    """`with_polymorphic="*"` joins their tables, whose rows are not locked."""

    class Kinds(DeclarativeBase):
        pass

    class Staff(Kinds):
        __tablename__ = "contract_staff"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str]
        k: Mapped[int]
        v: Mapped[str]
        __mapper_args__ = {
            "polymorphic_on": "kind", "polymorphic_identity": "staff", "with_polymorphic": "*"
        }  # fmt: skip

    class Cook(Staff):
        __tablename__ = "contract_cook"
        id: Mapped[int] = mapped_column(sa.ForeignKey(Staff.id), primary_key=True)
        w: Mapped[str | None]
        __mapper_args__ = {"polymorphic_identity": "cook"}

    Kinds.metadata.create_all(engine)
    assert [update_or_create(db, Staff, {"k": 1}, {"v": v})[1] for v in "ab"] == [True, False]
    assert [update_or_create(db, Cook, {"k": 2}, {"v": v, "w": v})[1] for v in "ab"] == [True, False]
    cook, created = update_or_create(db, Staff, {"k": 2}, {"v": "c"})
    assert (type(cook), cook.v, cook.w, created) == (Cook, "c", "b", False)


def test_d7_an_update_that_a_trigger_cancels(db: OptInSession, look: Look) -> None:
    """The row after it is still one that was inserted, in the same statement and in a later one."""
    look("create function contract_cancel() returns trigger language plpgsql as 'begin return null; end'")
    look(
        "create trigger cancel before update on contract_person for each row when (new.y = 0)"
        " execute function contract_cancel()"
    )
    try:
        for count in (1, 600):
            names = [f"{count} {n:04}" for n in range(2 * count)]
            insert_many(db, Person, [{"name": name, "y": 1} for name in names[:count]])
            rows = [{"name": name, "y": 0} for name in names]
            assert upsert_many(db, Person, rows, key="name") == Upserted(count, 0, count)
        with db.begin():
            made = [update_or_create(db, Person, {"name": name}, {"y": 0})[1] for name in ("1 0000", "a", "b")]
            made.append(update_or_create(db, Person, {"name": "b"}, {"y": 2})[1])
            assert made == [False, True, True, False]
        with db.begin():  # the same key of another table
            db.add(Person(name="7", y=1))
            db.flush()
            assert upsert_many(db, Person, [{"name": "7", "y": 0}], key="name") == Upserted(0, 0, 1)
            assert update_or_create(db, Row, {"k": 7}, {"sure": "s"})[1] is True
    finally:
        look("drop function contract_cancel() cascade")


class Reversed(sa.types.TypeDecorator[str]):
    """Stored as an SQL function makes it, as with encryption on the server."""

    impl = sa.Text
    cache_ok = True

    def bind_expression(self, bindparam: Any) -> Any:
        return sa.func.reverse(bindparam)

    def column_expression(self, column: Any) -> Any:
        return sa.func.reverse(column)


def test_e3_keys_that_sql_makes(db: OptInSession, engine: sa.Engine, look: Look) -> None:
    class Sides(DeclarativeBase):
        pass

    links = sa.Table(
        "contract_words", Sides.metadata,
        sa.Column("one", sa.ForeignKey("contract_word.name"), primary_key=True),
        sa.Column("other", sa.ForeignKey("contract_word.name"), primary_key=True),
        sa.Column("note", Reversed, default=lambda: "made"),
    )  # fmt: skip

    class Word(Sides):
        __tablename__ = "contract_word"
        name: Mapped[str] = mapped_column(Reversed, primary_key=True)
        others: Mapped[list["Word"]] = sa_orm.relationship(  # noqa: UP037
            secondary=links,
            primaryjoin=lambda: Word.name == links.c.one,
            secondaryjoin=lambda: Word.name == links.c.other,
        )

    Sides.metadata.create_all(engine)
    words = [Word(name=name) for name in ("ab", "cd", "ef")]
    db.add_all(words)
    db.commit()
    assert set(m2m_add(db, words[0], Word.others, "ab", words[1])) == {"ab", "cd"}
    assert look("select one, other, note from contract_words order by 2") == [
        ("ba", "ba", "edam"),
        ("ba", "dc", "edam"),
    ]
    changes = m2m_set(db, words[0], Word.others, "cd", "ef")
    assert (changes.added, changes.removed) == (("ef",), ("ab",))
    assert m2m_remove(db, words[0], Word.others, "ef", "ab") == ("ef",)
    assert words[0].others == [words[1]]

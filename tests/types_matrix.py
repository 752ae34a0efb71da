"""Every type by every value by every way of writing: what a row has afterwards, compared with what a flush stores.

A cell is a type, a value and a way. It is right when the stored value, read back as text, is the flush's, or when the
error is of the class that the flush raises. `python -m tests.types_matrix` prints the cells that differ.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import decimal
import enum
import ipaddress
import logging
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.dialects import postgresql as pg

from fictive.rows.bulk import insert_many, update_many, upsert_many
from fictive.rows.find_or_create import get_or_create, update_or_create
from fictive.session.session import OptInSession

D = decimal.Decimal
EAST = dt.timezone(dt.timedelta(hours=5))

SETUP = """
create type citext;
create function citext_in(cstring) returns citext language internal immutable strict as 'textin';
create function citext_out(citext) returns cstring language internal immutable strict as 'textout';
create type citext (input = citext_in, output = citext_out, like = text, category = 'S');
create cast (citext as text) without function as implicit;
create cast (text as citext) without function as assignment;
create cast (varchar as citext) without function as assignment;
create function citext_eq(citext, citext) returns bool language sql immutable strict
  as 'select lower($1::text) = lower($2::text)';
create operator = (leftarg = citext, rightarg = citext, function = citext_eq, hashes, merges);
create domain positive as integer check (value > 0);
create domain money_like as numeric(10, 2);
create type pair as (a integer, b text);
"""


class Named(sa.types.UserDefinedType[Any]):
    """A type of the server's by its name, whose values are what the driver makes of them."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        return self.name


class NeverNone(sa.types.TypeDecorator[str]):
    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return "none" if value is None else value


class Cents(sa.types.TypeDecorator[Any]):
    impl = sa.Integer
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else round(value * 100)


class JSONText(sa.types.TypeDecorator[Any]):
    """As sqlalchemy_utils.JSONType: text for Python, json on PostgreSQL."""

    impl = sa.UnicodeText
    cache_ok = True

    def load_dialect_impl(self, dialect: Any) -> Any:
        return dialect.type_descriptor(sa.JSON() if dialect.name == "postgresql" else self.impl)


class Upper(sa.types.TypeDecorator[str]):
    """An SQL function around the value."""

    impl = sa.Text
    cache_ok = True

    def bind_expression(self, bindvalue: Any) -> Any:
        return sa.func.upper(bindvalue, type_=sa.Text())


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


class Word(str):
    pass


TYPES: dict[str, Callable[[], Any]] = {
    "Integer": sa.Integer, "SmallInteger": sa.SmallInteger, "BigInteger": sa.BigInteger, "Boolean": sa.Boolean,
    "Numeric": sa.Numeric, "Numeric(10,2)": lambda: sa.Numeric(10, 2), "Numeric(3,0)": lambda: sa.Numeric(3, 0),
    "Numeric(asdecimal=False)": lambda: sa.Numeric(10, 4, asdecimal=False), "Float": sa.Float, "REAL": sa.REAL,
    "Float(10)": lambda: sa.Float(10), "Double": sa.Double, "String": sa.String, "String(5)": lambda: sa.String(5),
    "CHAR(5)": lambda: sa.CHAR(5), "CHAR": sa.CHAR, "Text": sa.Text, "Unicode": sa.Unicode,
    "LargeBinary": sa.LargeBinary, "PickleType": sa.PickleType,
    "Date": sa.Date, "DateTime": sa.DateTime, "DateTime tz": lambda: sa.DateTime(timezone=True),
    "TIMESTAMP(0)": lambda: pg.TIMESTAMP(precision=0),
    "TIMESTAMP(3) tz": lambda: pg.TIMESTAMP(precision=3, timezone=True), "Time": sa.Time,
    "Time tz": lambda: sa.Time(timezone=True), "TIME(0)": lambda: pg.TIME(precision=0), "Interval": sa.Interval,
    "INTERVAL": pg.INTERVAL, "INTERVAL(0)": lambda: pg.INTERVAL(precision=0),
    "INTERVAL DAY TO SECOND": lambda: pg.INTERVAL(fields="DAY TO SECOND"), "Uuid": sa.Uuid,
    "Uuid str": lambda: sa.Uuid(as_uuid=False), "Uuid char": lambda: sa.Uuid(native_uuid=False),
    "UUID": pg.UUID, "JSON": sa.JSON, "JSON none_as_null": lambda: sa.JSON(none_as_null=True), "JSONB": pg.JSONB,
    "Enum": lambda: sa.Enum("red", "blue", name="hue"), "Enum class": lambda: sa.Enum(Color, name="color"),
    "Enum text": lambda: sa.Enum("red", "blue", native_enum=False), "INET": pg.INET, "CIDR": pg.CIDR,
    "MACADDR": pg.MACADDR, "MACADDR8": pg.MACADDR8, "MONEY": pg.MONEY, "BIT(3)": lambda: pg.BIT(3),
    "VARBIT": lambda: pg.BIT(varying=True), "BYTEA": pg.BYTEA, "OID": pg.OID, "REGCLASS": pg.REGCLASS,
    "TSVECTOR": pg.TSVECTOR, "TSQUERY": pg.TSQUERY, "JSONPATH": pg.JSONPATH, "CITEXT": pg.CITEXT,
    "INT4RANGE": pg.INT4RANGE, "NUMRANGE": pg.NUMRANGE, "DATERANGE": pg.DATERANGE, "TSTZRANGE": pg.TSTZRANGE,
    "INT4MULTIRANGE": pg.INT4MULTIRANGE, "xml": lambda: Named("xml"), "point": lambda: Named("point"),
    "pair": lambda: Named("pair"), "timetz": lambda: Named("timetz"), "positive": lambda: Named("positive"),
    "DOMAIN": lambda: pg.DOMAIN("money_like", sa.Numeric(10, 2), create_type=False),
    "ARRAY(Integer)": lambda: sa.ARRAY(sa.Integer), "ARRAY(Text)": lambda: sa.ARRAY(sa.Text),
    "ARRAY(String(3))": lambda: sa.ARRAY(sa.String(3)), "ARRAY(Numeric(5,1))": lambda: sa.ARRAY(sa.Numeric(5, 1)),
    "ARRAY(REAL)": lambda: sa.ARRAY(sa.REAL), "ARRAY(Float)": lambda: sa.ARRAY(sa.Float),
    "ARRAY(Boolean)": lambda: sa.ARRAY(sa.Boolean), "ARRAY(Date)": lambda: sa.ARRAY(sa.Date),
    "ARRAY(DateTime)": lambda: sa.ARRAY(sa.DateTime), "ARRAY(Uuid)": lambda: sa.ARRAY(sa.Uuid),
    "ARRAY(JSON)": lambda: sa.ARRAY(sa.JSON), "ARRAY(JSONB)": lambda: sa.ARRAY(pg.JSONB),
    "ARRAY(LargeBinary)": lambda: sa.ARRAY(sa.LargeBinary), "ARRAY(Enum)": lambda: sa.ARRAY(sa.Enum("red", name="h2")),
    "ARRAY(2)": lambda: sa.ARRAY(sa.Integer, dimensions=2), "NeverNone": NeverNone, "Cents": Cents,
    "JSONText": JSONText, "Upper": Upper,
    "variant": lambda: sa.String().with_variant(pg.CITEXT(), "postgresql"), "NullType": sa.types.NullType,
}  # fmt: skip

VALUES: dict[str, Any] = {
    "None": None, "sql null": sa.null(), "JSON.NULL": sa.JSON.NULL, "1": 1, "0": 0, "-7": -7, "2**40": 2**40,
    "2**70": 2**70, "True": True, "False": False, "2.0": 2.0, "2.5": 2.5, "-0.0": -0.0, "0.1": 0.1,
    "0.1+0.2": 0.1 + 0.2, "1/3": 1 / 3, "16777217.0": 16777217.0, "1e39": 1e39, "5e-324": 5e-324,
    "nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "D1.005": D("1.005"), "D2.0": D("2.0"),
    "D1.500": D("1.500"), "D-0": D("-0"), "DNaN": D("NaN"), "DInf": D("Infinity"), "D1E+3": D("1E+3"),
    "D12345678901234567.1234": D("12345678901234567.1234"), "''": "", "'a'": "a", "'red'": "red", "'1'": "1",
    "'01'": "01", "'2.50'": "2.50", "'true'": "true", "'bob '": "bob ", "'abc     '": "abc     ",
    "'abcdefgh'": "abcdefgh", "escapes": "a\\b\n\t\r\\N\\.'\"", "'\\.'": "\\.", "'\\N'": "\\N", "NUL": "a\0b",
    "surrogate": "\ud800", "emoji": "\U0001f600", "'101'": "101", "'2026-01-02'": "2026-01-02",
    "'10.0.0.1'": "10.0.0.1", "'08:00:2b:01:02:03'": "08:00:2b:01:02:03", "'$1.50'": "$1.50", "'(1,b)'": "(1,b)",
    "'$.a'": "$.a", "'{1,2}'": "{1,2}", "'[1,5)'": "[1,5)", "'cat'": "cat", "'pg_class'": "pg_class", "'<a/>'": "<a/>",
    "word": Word("bob"), "level": Level.LOW, "color": Color.RED, "b''": b"", "b'a\\0\\xff'": b"a\0\xff\\",
    "bytearray": bytearray(b"x"),
    "memoryview": memoryview(b"y"), "date": dt.date(2026, 1, 2), "date.min": dt.date.min,
    "datetime": dt.datetime(2026, 1, 2, 3, 4, 5, 678901), "datetime 0.6": dt.datetime(2026, 1, 2, 0, 0, 0, 600000),
    "datetime aware": dt.datetime(2026, 1, 2, 3, tzinfo=EAST), "datetime.max": dt.datetime.max,
    "datetime utc": dt.datetime(2026, 1, 2, 3, tzinfo=dt.timezone.utc), "time": dt.time(1, 2, 3, 600000),
    "time aware": dt.time(1, 2, 3, tzinfo=EAST), "timedelta": dt.timedelta(seconds=1.6),
    "timedelta -": dt.timedelta(days=-1, seconds=5), "uuid": uuid.UUID(int=5), "'uuid'": str(uuid.UUID(int=5)),
    "'UUID'": str(uuid.UUID(int=0xABC)).upper(), "{}": {}, "{b, a}": {"b": 1, "a": [None, 1.5, "x"]},
    "{d}": {"d": D(1)},
    "{nul}": {"a": "\0"}, "[]": [], "[1, 2]": [1, 2], "[1, None]": [1, None], "[None]": [None], "[1.0]": [1.0],
    "[0.1]": [0.1], "[True]": [True], "['a']": ["a"], "['NULL', '', ' ']": ["NULL", "", " ", 'q"\\'],
    "['abcdef']": ["abcdef"], "['red']": ["red"], "[[1], [2]]": [[1], [2]], "[[1], [2, 3]]": [[1], [2, 3]],
    "[[1], None]": [[1], None], "[[]]": [[]], "[D]": [D("1.05")], "[date]": [dt.date(2026, 1, 2)],
    "[datetime]": [dt.datetime(2026, 1, 2, 3)], "[datetime aware]": [dt.datetime(2026, 1, 2, 3, tzinfo=EAST)],
    "[uuid]": [uuid.UUID(int=7)], "[{}]": [{"a": 1}], "[b]": [b"a\0"], "(1, 2)": (1, 2), "{1}": {1},
    "Range": pg.Range(1, 5), "Range empty": pg.Range(empty=True), "Range dates": pg.Range(dt.date(2026, 1, 2), None),
    "[Range]": [pg.Range(1, 3)], "ip": ipaddress.ip_address("10.0.0.1"), "object": object(),
}  # fmt: skip

Way = Callable[[sa_orm.Session, Any, Any], object]


def _rows(n: int, value: Any) -> list[dict[str, Any]]:
    return [{"k": k, "v": value} for k in range(n)]


def _insert(n: int) -> Way:
    return lambda session, model, value: insert_many(session, model, _rows(n, value))


def _insert_objects(n: int) -> Way:
    return lambda session, model, value: insert_many(session, model, [model(k=k, v=value) for k in range(n)])


def _upsert(n: int) -> Way:
    return lambda session, model, value: upsert_many(session, model, _rows(n, value), key="k")


def _upsert_over_null(n: int) -> Way:
    def way(session: sa_orm.Session, model: Any, value: Any) -> None:
        _nulls(session, model, n)
        upsert_many(session, model, _rows(n, value), key="k")

    return way


def _upsert_twice(n: int) -> Way:
    def way(session: sa_orm.Session, model: Any, value: Any) -> None:
        upsert_many(session, model, _rows(n, value), key="k")
        done = upsert_many(session, model, _rows(n, value), key="k")
        assert done == (0, 0, n), f"the second upsert was {done}"

    return way


def _update(n: int) -> Way:
    def way(session: sa_orm.Session, model: Any, value: Any) -> None:
        _nulls(session, model, n)
        update_many(session, model, _rows(n, value), key="k")

    return way


def _nulls(session: sa_orm.Session, model: Any, n: int) -> None:
    table = model.__table__
    session.execute(sa.text(f"insert into {table.name} (k) select generate_series(0, {n - 1})"))


def _update_or_create_over_null(session: sa_orm.Session, model: Any, value: Any) -> None:
    _nulls(session, model, 1)
    update_or_create(session, model, {"k": 0}, {"v": value})


def _update_or_create_twice(session: sa_orm.Session, model: Any, value: Any) -> None:
    created = [update_or_create(session, model, {"k": 0}, {"v": value})[1] for _ in range(2)]
    assert created == [True, False], f"created: {created}"


def _update_or_create_else(session: sa_orm.Session, model: Any, value: Any) -> None:
    """What is set differs from what is created."""
    for _ in range(3):
        update_or_create(session, model, {"k": 0}, {"v": value}, {"v": None})


WAYS: dict[str, Way] = {
    "insert().values": lambda session, model, value: session.execute(sa.insert(model).values(k=0, v=value)),
    "find_or_create": lambda session, model, value: get_or_create(session, model, {"k": 0}, {"v": value}),
    "update_or_create": lambda session, model, value: update_or_create(session, model, {"k": 0}, {"v": value}),
    "update_or_create over NULL": _update_or_create_over_null, "update_or_create twice": _update_or_create_twice,
    "update_or_create else": _update_or_create_else, "insert 1": _insert(1), "insert 19": _insert(19),
    "insert 20": _insert(20), "insert 600": _insert(600), "insert 1 object": _insert_objects(1),
    "insert 20 objects": _insert_objects(20), "upsert 1": _upsert(1), "upsert 600": _upsert(600),
    "upsert 1 over NULL": _upsert_over_null(1), "upsert 500 over NULL": _upsert_over_null(500),
    "upsert 1 twice": _upsert_twice(1), "upsert 500 twice": _upsert_twice(500), "update 1": _update(1),
    "update 5": _update(5), "update 600": _update(600),
}  # fmt: skip

BY_VALUE = "find_or_create by value"
WITHOUT_EQUALITY = frozenset(
    {"JSON", "JSON none_as_null", "JSONPATH", "JSONText", "ARRAY(JSON)", "xml", "point", "NullType"}
)
"""Types by whose values nothing can be found; without a type PostgreSQL compares what it is given as it comes."""
LEFT_OUT = frozenset({("JSONPATH", "None", "find_or_create")})
"""Cells where a flush fails by a fault of SQLAlchemy's, which makes `{}` of None: no path. Here it is NULL."""
RETURNING_OBJECTS = frozenset({BY_VALUE, *(way for way in WAYS if "or_create" in way)})
"""Ways that fail where no object can be made of the row: a year 10,000, a text that is none of an enumeration's."""


class Matrix:
    """The tables of some types in one database, and the cells over them."""

    def __init__(self, engine: sa.Engine, types: Iterable[str]) -> None:
        self.engine = engine
        self._beside: sa.Connection | None = None
        self.models: dict[str, Any] = {}
        registry = sa_orm.registry()
        for number, name in enumerate(types):
            type_ = TYPES[name]()
            body = {
                "__tablename__": f"m{number}",
                "id": sa_orm.mapped_column(sa.Integer, primary_key=True),
                "k": sa_orm.mapped_column(sa.Integer, unique=True),
                "v": sa.Column(type_),
            }
            self.models[name] = registry.mapped(type(f"M{number}", (), body))
        with engine.begin() as connection:
            for statement in SETUP.split(";")[:-1]:
                connection.exec_driver_sql(statement)
            for name, model in self.models.items():
                if name == "NullType":
                    columns = "(id serial primary key, k int unique, v text)"
                    connection.execute(sa.text(f"create table {model.__table__.name} {columns}"))
                else:
                    model.__table__.create(connection)

    def stored(self, model: Any) -> list[Any]:
        return self._run(f"select distinct v::text from {model.__table__.name}").scalars().all()

    def _run(self, text: str) -> Any:
        """On a connection that stays, in autocommit: it is done twice for each cell."""
        if self._beside is None:
            self._beside = self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        return self._beside.exec_driver_sql(text)

    def close(self) -> None:
        if self._beside is not None:
            self._beside.close()

    def outcome(self, model: Any, write: Callable[[], object]) -> Any:
        self._run(f"delete from {model.__table__.name}")
        try:
            with warnings.catch_warnings():  # of what was committed before the error
                warnings.simplefilter("ignore")
                write()
        except AssertionError as error:
            return "assertion", str(error)
        except Exception as error:
            return "error", type(error).__name__
        return "stored", self.stored(model)

    def flushed(self, name: str, value: Any) -> Any:
        model = self.models[name]

        def write() -> None:
            with sa_orm.Session(self.engine) as session, session.begin():
                session.add(model(k=0, v=value))

        return self.outcome(model, write)

    def is_readable(self, name: str) -> bool:
        """Whether objects can be made of what is stored."""
        try:
            with sa_orm.Session(self.engine) as session:
                session.scalars(sa.select(self.models[name])).all()
        except Exception:
            return False
        return True

    def written(self, name: str, value: Any, way: Way) -> Any:
        model = self.models[name]

        def write() -> None:
            with OptInSession(self.engine) as session:
                way(session, model, value)

        return self.outcome(model, write)

    def by_value(self, name: str, value: Any) -> Any:
        """Three calls with the value as the lookup: one row, which has what a flush stores."""
        model = self.models[name]
        ids: set[int] = set()

        def write() -> None:
            with OptInSession(self.engine) as session:
                for _ in range(3):
                    ids.add(get_or_create(session, model, {"v": value})[0].id)
                    session.expunge_all()

        found = self.outcome(model, write)
        return found if found[0] == "error" or len(ids) == 1 else ("rows", len(ids))

    def cells(self, name: str, values: Iterable[str], ways: Iterable[str]) -> Iterator[tuple[str, str, Any, Any]]:
        """For each value and way: what was got, and what a flush stores."""
        for shown in values:
            expected = self.flushed(name, VALUES[shown])
            is_readable = expected[0] == "error" or self.is_readable(name)
            for way in ways:
                if (way in RETURNING_OBJECTS and not is_readable) or (name, shown, way) in LEFT_OUT:
                    continue
                if way == BY_VALUE and name in WITHOUT_EQUALITY | ({"JSONB"} if VALUES[shown] is None else set()):
                    continue  # None asks for SQL's NULL
                if way == BY_VALUE:
                    yield shown, way, self.by_value(name, VALUES[shown]), expected
                else:
                    yield shown, way, self.written(name, VALUES[shown], WAYS[way]), expected


def main() -> None:
    import argparse

    from fictive.testing import postgres

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("driver")
    parser.add_argument("--types", help="names, with semicolons between")
    parser.add_argument("--values")
    parser.add_argument("--ways")
    chosen = parser.parse_args()
    types, values, ways = (
        given.split(";") if given else list(known)
        for given, known in ((chosen.types, TYPES), (chosen.values, VALUES), (chosen.ways, [*WAYS, BY_VALUE]))
    )
    name, wrong = f"matrix_{os.getpid()}", 0
    with postgres.server() as server:
        admin = sa.create_engine(server.url("postgres", driver="psycopg2"), isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.exec_driver_sql(f"create database {name}")
        engine = sa.create_engine(server.url(name, driver=chosen.driver))
        logging.disable()  # of what was committed before the error
        try:
            matrix = Matrix(engine, types)
            for type_ in types:
                for value, way, got, expected in matrix.cells(type_, values, ways):
                    if got != expected:
                        wrong += 1
                        print(f"{type_}\t{value}\t{way}\t{got}\t{expected}", flush=True)
            matrix.close()
        finally:
            engine.dispose()
            with contextlib.suppress(Exception), admin.connect() as connection:
                connection.exec_driver_sql(f"drop database {name} with (force)")
            admin.dispose()
    print(f"{wrong} of {len(types) * len(values) * len(ways)} cells differ", file=sys.stderr)


if __name__ == "__main__":
    main()

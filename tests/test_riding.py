"""Control statements ride along, and all else stays as the drivers document it.

Most tests do the same on a connection of fictive's and on a stock one, and compare what is seen: rows, errors with
position and SQL, transaction status, notices.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import io
import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psycopg
import psycopg.rows
import psycopg.sql
import psycopg.types.hstore
import psycopg.types.json
import psycopg.types.range
import psycopg2
import psycopg2.extensions as ext
import psycopg2.extras
import psycopg2.sql
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from fictive.drivers import TransactionStatus, driver_for, riding
from fictive.session.engines import prepare, status_of
from fictive.testing import postgres
from fictive.testing.wire import Wire
from tests.wirelog import messages, verbs

Look = Callable[..., list[Any]]
TABLE = "create table riding (id int primary key, v int check (v < 90), n text not null default 'n')"


# -- side by side -----------------------------------------------------------------------------------------------------


class Watch:
    """A driver's connection, and what was seen of it."""

    def __init__(self, conn: Any, driver: str) -> None:
        self.conn = conn
        self.driver = driver
        self.seen: list[Any] = []

    def do(self, query: Any, params: Any = None, cursor: Any = None) -> Any:
        """Run a statement; note its rows or its error, and the transaction status."""
        cursor = cursor or self.conn.cursor()

        def run() -> Any:
            cursor.execute(query, params) if params is not None else cursor.execute(query)
            return cursor.statusmessage, cursor.rowcount, cursor.fetchall() if cursor.description else None

        self.note(query, self.outcome(run, cursor), self.status())
        return cursor

    def control(self, query: str) -> None:
        """SAVEPOINT, RELEASE or ROLLBACK TO. When it reaches the server is not compared."""
        self.note(query, self.outcome(lambda: self.conn.cursor().execute(query) and None))

    def call(self, run: Callable[[], Any]) -> None:
        self.note(self.outcome(run), self.status())

    def note(self, *values: Any) -> None:
        self.seen.append(values)

    def outcome(self, run: Callable[[], Any], cursor: Any = None) -> Any:
        try:
            return run()
        except Exception as error:
            return described(error, cursor)

    def status(self) -> Any:
        if self.driver == "psycopg2":
            return self.conn.get_transaction_status(), self.conn.status, self.conn.closed
        return self.conn.info.transaction_status, self.conn.closed, self.conn.broken


_DIAGNOSTICS = (
    "severity sqlstate message_primary message_detail message_hint statement_position internal_position"
    " internal_query context schema_name table_name column_name datatype_name constraint_name"
).split()


def described(error: BaseException, cursor: Any = None) -> dict[str, Any]:
    """All that a driver's error says."""
    diag = getattr(error, "diag", None)
    found: dict[str, Any] = {"type": type(error), "text": str(error), "pgerror": getattr(error, "pgerror", None)}
    if getattr(diag, "sqlstate", None) is None:
        return {"type": type(error)}  # the driver's own, whose wording is not promised
    found |= {name: getattr(diag, name) for name in _DIAGNOSTICS if getattr(diag, name, None) is not None}
    if cursor is not None and isinstance(cursor, ext.cursor) and found.get("sqlstate"):
        found["query"] = cursor.query
    return found


Observe = Callable[[Watch], Any]
Connect = Callable[[bool], Any]


@pytest.fixture
def engine_of(database_url: str) -> Iterator[Callable[..., sa.Engine]]:
    """`engine_of(True)` is prepared by fictive, `engine_of(False)` is not."""
    made: list[sa.Engine] = []

    def make(ours: bool, url: str = database_url, **options: Any) -> sa.Engine:
        engine = sa.create_engine(url, **options)
        if ours:
            prepare(engine)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.dispose()


@pytest.fixture
def connect(engine_of: Callable[..., sa.Engine]) -> Iterator[Connect]:
    """`connect(True)`: a driver connection as an engine that fictive prepared makes it; `connect(False)`: stock."""
    made: list[Any] = []

    def make(ours: bool) -> Any:
        made.append(engine_of(ours).raw_connection())
        return made[-1].driver_connection

    yield make
    for connection in made:
        connection.invalidate()


@pytest.fixture
def same(connect: Connect, look: Look, driver: str) -> Callable[[Observe], Any]:
    """`same(observe)`: what `observe` sees is the same on both kinds of connection; returns it."""

    def run(observe: Observe) -> Any:
        found = {}
        for ours in (False, True):
            look("drop table if exists riding")
            look(TABLE)
            watch = Watch(connect(ours), driver)
            returned = observe(watch)
            rows = look("select * from riding order by id") if watch.driver else None
            found[ours] = [*watch.seen, ("returned", returned)], rows
            watch.conn.close()
        for number, (mine, stock) in enumerate(zip(found[True][0], found[False][0], strict=True)):
            assert mine == stock, f"step {number}"
        assert found[True][1] == found[False][1], "rows saved"
        return found[False][0][-1][1]

    return run


@pytest.fixture
def cursor(connect: Connect) -> Any:
    return connect(True).cursor()


both = pytest.mark.parametrize("driver", ["psycopg2", "psycopg"], indirect=True)
psycopg2_only = pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
psycopg_only = pytest.mark.parametrize("driver", ["psycopg"], indirect=True)


# -- errors -----------------------------------------------------------------------------------------------------------

ERRORS = {
    "syntax": "selec 1",
    "syntax at the end": "select 1 from",
    "syntax in the second line": "select 1\n  form riding",
    "undefined table": "select * from nowhere",
    "undefined column": "select\n nothing from riding",
    "undefined function": "select nofunction(1)",
    "invalid input": "select 'x'::int",
    "invalid input in insert": "insert into riding values (1, 'x')",
    "invalid input at run time": "select n::int from riding",
    "division by zero": "select 1 / v from (values (0)) as t (v)",
    "ambiguous": "select id from riding a, riding b",
    "unique": "insert into riding values (1, 1)",
    "check": "insert into riding values (2, 99)",
    "not null": "insert into riding values (2, 2, null)",
    "in a function": "do $$ begin execute 'selec 2'; end $$",
    "raised": "do $$ begin raise exception 'mine' using hint = 'h', detail = 'd', errcode = 'XX123'; end $$",
    "two statements, the second wrong": "insert into riding values (5, 5); select nothing",
    "two statements, the second refused": "insert into riding values (5, 5); insert into riding values (1, 1)",
    "two statements, the second misspelt": "insert into riding values (5, 5); selec",
    "umlauts": "select 'äöü€' as ü, nothing",
    "not in a transaction": "vacuum riding",
    "control that fails": "ROLLBACK TO SAVEPOINT nowhere",
    "begin twice": "BEGIN",
}


@pytest.mark.parametrize("query", ERRORS.values(), ids=ERRORS.keys())
@pytest.mark.any_sqlalchemy
class TestErrors:
    """The class, the SQLSTATE, the position and the SQL of an error are those of the user's statement."""

    def prepared(self, w: Watch) -> None:
        w.do("insert into riding values (1, 1, 'one')")
        w.call(w.conn.commit)

    def aftermath(self, w: Watch) -> None:
        w.do("select 1")
        w.do("selec 2")
        w.call(w.conn.rollback)
        w.do("select id from riding order by id")
        w.call(w.conn.commit)

    def test_first_in_a_transaction(self, query: str, same: Callable[[Observe], Any]) -> None:
        def observe(w: Watch) -> None:
            self.prepared(w)
            w.do(query)
            self.aftermath(w)

        same(observe)

    def test_first_in_a_transaction_with_options(self, query: str, same: Callable[[Observe], Any]) -> None:
        def observe(w: Watch) -> None:
            self.prepared(w)
            if w.driver == "psycopg2":
                w.conn.set_session("SERIALIZABLE", deferrable=True)
            else:
                w.conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
                w.conn.deferrable = True
            w.do(query)
            w.call(w.conn.rollback)
            w.do("show transaction_isolation")

        same(observe)

    @pytest.mark.parametrize("end", ["ROLLBACK TO SAVEPOINT a", "RELEASE SAVEPOINT a"])
    def test_first_in_a_savepoint(self, query: str, end: str, same: Callable[[Observe], Any]) -> None:
        """BEGIN and SAVEPOINT both ride with it."""

        def observe(w: Watch) -> None:
            self.prepared(w)
            w.control("SAVEPOINT a")
            w.do(query)
            w.control(end)
            self.aftermath(w)

        same(observe)

    def test_first_in_two_savepoints(self, query: str, same: Callable[[Observe], Any]) -> None:
        def observe(w: Watch) -> None:
            self.prepared(w)
            w.control("SAVEPOINT a")
            w.control("SAVEPOINT b")
            w.do(query)
            w.control("ROLLBACK TO SAVEPOINT b")
            w.do("insert into riding values (7, 7)")
            w.control("ROLLBACK TO SAVEPOINT a")
            w.do("insert into riding values (8, 8)")
            w.call(w.conn.commit)
            self.aftermath(w)

        same(observe)

    @pytest.mark.parametrize("seen", [False, True], ids=["never parsed", "parsed before"])
    def test_in_a_savepoint_of_a_transaction(self, query: str, seen: bool, same: Callable[[Observe], Any]) -> None:
        def observe(w: Watch) -> None:
            riding._parsed.clear()
            self.prepared(w)
            if seen:
                w.do(query)
                w.call(w.conn.rollback)
            w.do("insert into riding values (3, 3)")
            w.control("SAVEPOINT a")
            w.do(query)
            w.do("select 1")
            w.control("ROLLBACK TO SAVEPOINT a")
            w.do("select id from riding order by id")
            w.control("SAVEPOINT b")
            w.do("insert into riding values (4, 4)")
            w.control("RELEASE SAVEPOINT b")
            w.do(query)
            w.control("ROLLBACK TO SAVEPOINT a")
            w.do("select id from riding order by id")
            w.call(w.conn.commit)
            self.aftermath(w)

        same(observe)

    def test_within_a_transaction(self, query: str, same: Callable[[Observe], Any]) -> None:
        def observe(w: Watch) -> None:
            self.prepared(w)
            w.do("insert into riding values (3, 3)")
            w.do(query)
            w.call(w.conn.commit)  # of an aborted transaction: ROLLBACK
            self.aftermath(w)

        same(observe)


def test_an_error_by_value_is_the_users(same: Callable[[Observe], Any]) -> None:
    """A text whose first run is right and whose second run, in a savepoint, is not."""

    def observe(w: Watch) -> None:
        query = "insert into riding values (%s, %s)"
        w.do(query, (1, 1))
        w.control("SAVEPOINT a")
        w.do(query, (1, 1))
        w.control("ROLLBACK TO SAVEPOINT a")
        w.do(query, (2, 2))
        w.control("SAVEPOINT a")
        w.do("select %s::text::int", ("1",))
        w.control("SAVEPOINT b")
        w.do("select %s::text::int", ("x",))
        w.control("ROLLBACK TO SAVEPOINT b")
        w.call(w.conn.commit)

    same(observe)


@psycopg2_only
@pytest.mark.parametrize("value", [(), ext.AsIs("(")], ids=["empty tuple", "AsIs"])
def test_a_value_that_breaks_the_grammar(value: Any, same: Callable[[Observe], Any]) -> None:
    """psycopg2 merges `IN ()` from an empty tuple: the text was parsed before, and is refused whole all the same."""

    def observe(w: Watch) -> None:
        query = "select id from riding where id in %s"
        w.do(query, ((1,),))
        w.do("insert into riding values (1, 1)")
        w.control("SAVEPOINT a")
        w.do(query, (value,))
        w.control("ROLLBACK TO SAVEPOINT a")
        w.do("insert into riding values (2, 2)")
        w.call(w.conn.commit)

    same(observe)


class Unadaptable:
    pass


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("query", "params"),
    [("select %s", (Unadaptable(),)), ("select %s", ()), ("select %s, %s", (1,)), ("select %(a)s", {"b": 1})],
    ids=["no adapter", "none given", "too few", "not there"],
)
def test_a_value_that_the_driver_refuses(query: str, params: Any, first: bool, same: Callable[[Observe], Any]) -> None:
    """Nothing was sent, and the savepoint is still to come."""

    def observe(w: Watch) -> None:
        if not first:
            w.do("insert into riding values (1, 1)")
        w.control("SAVEPOINT a")
        try:
            w.conn.cursor().execute(query, params)
        except Exception as error:
            w.note(type(error), str(error).split(" using ")[0])
        w.control("ROLLBACK TO SAVEPOINT a")
        w.do("insert into riding values (2, 2)")
        w.call(w.conn.commit)

    same(observe)


@both
def test_sqlalchemy_savepoint_after_a_value_that_the_driver_refuses(
    engine_of: Callable[..., sa.Engine], look: Look
) -> None:
    """The same as an application meets it."""
    look(TABLE)
    with engine_of(True).begin() as connection:
        with pytest.raises(sa.exc.ProgrammingError, match="adapt"), connection.begin_nested():
            connection.execute(sa.text("select :x"), {"x": Unadaptable()})
        connection.execute(sa.text("insert into riding values (1, 1)"))
    assert look("select id from riding") == [1]


@pytest.mark.parametrize(
    "query",
    [
        "insert into riding values ((select count(*) from riding), 1); commit; select nothing",
        "insert into riding values ((select count(*) from riding), 1); commit; select 1/0",
        "insert into riding values ((select count(*) from riding), 1); rollback; select 1/0",
    ],
)
def test_a_text_that_commits_and_then_fails_is_not_done_twice(query: str, same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        w.do(query)
        w.call(w.conn.rollback)

    same(observe)


@pytest.mark.parametrize("query", ["", "  ", ";", "-- nothing", "/* nothing */"])
def test_an_empty_statement(query: str, same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        w.do(query)
        w.do("select 1")
        w.call(w.conn.commit)

    same(observe)


@pytest.mark.parametrize(
    "steps",
    [
        ["insert 1", "SAVEPOINT s", "insert 2", "SAVEPOINT s", "insert 3", "RELEASE SAVEPOINT s",
         "ROLLBACK TO SAVEPOINT s"],
        ["insert 1", "SAVEPOINT s", "insert 2", "SAVEPOINT s", "insert 3", "RELEASE SAVEPOINT s", "fail",
         "ROLLBACK TO SAVEPOINT s"],
        ["SAVEPOINT s", "insert 1", "RELEASE SAVEPOINT s", "SAVEPOINT s", "insert 2", "ROLLBACK TO SAVEPOINT s"],
        ["SAVEPOINT s", "insert 1", "ROLLBACK TO SAVEPOINT s", "insert 2", "ROLLBACK TO SAVEPOINT s"],
        ["SAVEPOINT s", "ROLLBACK TO SAVEPOINT s", "insert 2", "fail", "ROLLBACK TO SAVEPOINT s"],
        ["insert 1", "SAVEPOINT a", "SAVEPOINT b", "insert 2", "RELEASE SAVEPOINT a"],
        ["insert 1", "SAVEPOINT a", "insert 2", "SAVEPOINT b", "RELEASE SAVEPOINT a", "fail"],
        ["insert 1", "SAVEPOINT a", "insert 2", "SAVEPOINT b", "insert 3", "RELEASE SAVEPOINT b",
         "rollback to savepoint a"],
        ["insert 1", "SAVEPOINT a", "insert 2", "SAVEPOINT b", "insert 3", "RELEASE SAVEPOINT b",
         "rollback to a", "insert 4"],
        ["savepoint a", "insert 1", "SAVEPOINT b", "insert 2", "rollback to a", "insert 3"],
        ['SAVEPOINT "A b"', "insert 1", 'ROLLBACK TO SAVEPOINT "A b"', 'RELEASE SAVEPOINT "A b"', "insert 2"],
        ["SAVEPOINT A", "insert 1", "ROLLBACK TO SAVEPOINT a", "insert 2"],
        ["SAVEPOINT a", "insert 1", "RELEASE SAVEPOINT a", "ROLLBACK TO SAVEPOINT a"],
        ["SAVEPOINT a", "insert 1", "RELEASE SAVEPOINT a", "COMMIT", "insert 2"],
        ["SAVEPOINT a", "insert 1", "RELEASE SAVEPOINT a", "ROLLBACK", "insert 2"],
        ["SAVEPOINT a", "insert 1", "RELEASE SAVEPOINT a", "END", "insert 2"],
        ["SAVEPOINT a", "insert 1", "RELEASE SAVEPOINT a", "COMMIT AND CHAIN", "insert 2"],
        ["insert 1", "SAVEPOINT a", "COMMIT", "insert 2", "fail"],
        ["SAVEPOINT a", "ROLLBACK", "insert 2", "ROLLBACK TO SAVEPOINT a"],
    ],
    ids="/".join,
)  # fmt: skip
def test_savepoints_by_hand(steps: list[str], same: Callable[[Observe], Any]) -> None:
    """Rows and errors at the end; where an error is met may differ, since a RELEASE waits."""

    def observe(w: Watch) -> Any:
        failed = False
        for step in steps:
            verb, *rest = step.split()
            query = {"insert": f"insert into riding values ({rest[-1] if rest else 0}, 1)", "fail": "select 1/0"}
            try:
                w.conn.cursor().execute(query.get(verb, step))
            except (psycopg.Error, psycopg2.Error) as error:
                failed = failed or getattr(error, "sqlstate", None) or error.pgcode != "22012"
        cursor = w.conn.cursor()
        try:
            cursor.execute("select id from riding order by id")
            rows = cursor.fetchall()
        except (psycopg.Error, psycopg2.Error) as error:
            rows = type(error)
        with contextlib.suppress(psycopg.Error, psycopg2.Error):
            w.conn.commit()
        return rows, bool(failed)

    same(observe)


# -- values -----------------------------------------------------------------------------------------------------------


def values(driver: str) -> dict[str, Any]:
    now = datetime.datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=datetime.timezone.utc)
    common: dict[str, Any] = {
        "small": 1, "int": 2**31, "big": 2**40, "huge": 2**70, "negative": -5, "bool": True, "none": None,
        "float": 1.5, "float 0.1": 0.1, "nan": float("nan"), "inf": float("-inf"),
        "numeric": decimal.Decimal("1.10"), "numeric negative": decimal.Decimal("-1e-10"),
        "numeric nan": decimal.Decimal("NaN"), "numeric exponent": decimal.Decimal("1E+5"),
        "text": "x", "quotes": "it's \"q\" \\ %s %% ; -- /*", "umlauts": "äöü€😀", "empty": "",
        "bytes": b"\x00\xff'\\", "memoryview": memoryview(b"\x01\x00"), "bytearray": bytearray(b"ab"),
        "date": now.date(), "time": now.time(), "timetz": now.timetz(), "datetime": now.replace(tzinfo=None),
        "datetimetz": now, "interval": datetime.timedelta(days=-1, seconds=3, microseconds=5),
        "list": [1, 2, 3], "list of text": ["a", "b'c", None], "list of lists": [[1, 2], [3, 4]],
        "list of floats": [1.5, 2.5], "list of dates": [now.date()], "empty list": [],
    }  # fmt: skip
    if driver == "psycopg2":
        common |= {
            "json": psycopg2.extras.Json({"a": [1, None, "%s"]}),
            "numeric range": psycopg2.extras.NumericRange(1, 5, "[)"),
            "datetz range": psycopg2.extras.DateTimeTZRange(now, None),
            "tuple": (1, 2), "binary": psycopg2.Binary(b"\x00x"),
        }  # fmt: skip
    else:
        common |= {
            "uuid": uuid.UUID(int=7),
            "json": psycopg.types.json.Json({"a": [1, None, "%s"]}),
            "jsonb": psycopg.types.json.Jsonb({"a": [1, None, "'"]}),
            "range": psycopg.types.range.Range(1, 5), "empty range": psycopg.types.range.Range(empty=True),
            "range of times": psycopg.types.range.TimestamptzRange(now, None),
            "tuple": (1, "x"),
        }  # fmt: skip
    return common


NAMES = sorted({*values("psycopg2"), *values("psycopg")})
PLACES = {
    "given back": "select %s as it",
    "in an array": "select array[%s]",
    "compared": "select %s = %s",
    "coalesced": "select coalesce(%s, null)",
    "in VALUES": "select * from (values (%s)) as t (it)",
}


@pytest.mark.parametrize("name", NAMES)
def test_values_are_adapted_alike(name: str, same: Callable[[Observe], Any], driver: str) -> None:
    """In a statement that carries BEGIN, one that carries SAVEPOINT and one that carries nothing."""
    if name not in values(driver):
        pytest.skip(f"no such type in {driver}")
    value = values(driver)[name]
    found: dict[Any, Any] = {}

    def observe(w: Watch) -> None:
        def run(query: str) -> Any:
            cursor = w.conn.cursor()
            cursor.execute(query, (value,) * query.count("%s"))
            return [(type(row[0]), _plain(row[0])) for row in cursor.fetchall()]

        def short(query: str) -> Any:
            try:
                return run(query)
            except Exception as error:
                return type(error)

        def note(*key: str) -> None:
            # what the server cannot type by itself it may as a literal: that more works is no harm
            result = short(PLACES[key[0]])
            if isinstance(found.setdefault(key, result), list):
                assert repr(result) == repr(found[key]), key  # NaN is not equal to itself

        for place in PLACES:
            note(place, "first")
            w.conn.rollback()
            w.conn.cursor().execute("select 1")
            note(place, "second")
            w.conn.rollback()
            w.conn.cursor().execute("select 1")
            w.conn.cursor().execute("SAVEPOINT a")
            note(place, "in a savepoint")
            w.conn.rollback()

    same(observe)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, memoryview):  # whose repr is its address
        return bytes(value)
    return repr(value) if value != value else value  # NaN


ARITHMETIC = [
    ("select %s + %s", (300, 300)),
    ("select %s / %s", (7, 2)),
    ("select %s || 'x'", ("a",)),
    ("select %s::jsonb", ('{"a": 1}',)),
    ("select jsonb_build_object('a', %s)", (1,)),
    ("select to_json(%s)", (1.5,)),
    ("select %s::date - %s::date", (datetime.date(2024, 3, 1), datetime.date(2024, 2, 1))),
    ("select %s - %s", (datetime.date(2024, 3, 1), datetime.date(2024, 2, 1))),
    ("select round(%s, 1)", (decimal.Decimal("1.25"),)),
    ("select sum(x) from (values (%s), (%s)) as t (x)", (0.1, 0.2)),
    ("select 1 where 3 = any(%s)", ([1, 3],)),
    ("select n from riding limit %s offset %s", (1, 0)),
    ("select 'a%%b', %s", (1,)),
    ("select '%%'", ()),
    ("select 'a%b'", None),
    ("select generate_series(1, %s)", (3,)),
    ("select %(a)s, %(b)s, %(a)s", {"a": 1, "b": "x"}),
    ("insert into riding values (%s, %s, %s) returning *", (1, None, "ü")),
    ("select 1; select 2", None),
    ("create table made (a int default 1); select 1", None),
    ("select E'\\\\x', %s", ("\\",)),
    ("select $$a;b$$, %s", (1,)),
]


@pytest.mark.parametrize(("query", "params"), ARITHMETIC, ids=[str(query) for query, _ in ARITHMETIC])
def test_statements_with_values(query: str, params: Any, same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        for carried in ([], ["SAVEPOINT a"]):
            for each in carried:
                w.conn.cursor().execute(each)
            cursor = w.conn.cursor()
            try:
                cursor.execute(query, params)
                names = [column[0] for column in cursor.description] if cursor.description else None
                rows = cursor.fetchall() if names else None
                w.note(names, rows, rows and [list(map(type, row)) for row in rows], cursor.rowcount)
            except Exception as error:
                w.note(described(error))
            w.note(w.status())
            w.conn.rollback()

    same(observe)


@pytest.mark.parametrize("carries", [True, False])
def test_sqlalchemy_types(carries: bool, engine_of: Callable[..., sa.Engine], look: Look) -> None:
    """NUMERIC, JSON, JSONB, hstore, ranges, arrays, bytea, dates and enums through SQLAlchemy, there and back."""
    with_hstore = has_hstore(look)
    table = sa.Table(
        "typed",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("numeric", sa.Numeric(10, 2)),
        sa.Column("float", sa.Float),
        sa.Column("double", sa.Double),
        sa.Column("json", sa.JSON),
        sa.Column("jsonb", postgresql.JSONB),
        sa.Column("hstore", postgresql.HSTORE if with_hstore else postgresql.JSONB),
        sa.Column("span", postgresql.INT4RANGE),
        sa.Column("period", postgresql.TSTZRANGE),
        sa.Column("array", postgresql.ARRAY(sa.Text)),
        sa.Column("bytea", sa.LargeBinary),
        sa.Column("day", sa.Date),
        sa.Column("moment", sa.DateTime(timezone=True)),
        sa.Column("span_of_time", sa.Interval),
        sa.Column("uuid", sa.Uuid),
        sa.Column("kind", sa.Enum("a", "b", name="kind")),
        sa.Column("big", sa.BigInteger),
        sa.Column("flag", sa.Boolean),
    )
    now = datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.timezone.utc)
    row = {
        "id": 1, "numeric": decimal.Decimal("12.30"), "float": 0.1, "double": 1e-300, "json": {"a": [None, "'%s"]},
        "jsonb": [1, {"b": "ü"}], "hstore": {"k": "v", "none": None}, "span": postgresql.Range(1, 5),
        "period": postgresql.Range(now, None), "array": ["a", "b,'c", None], "bytea": b"\x00\xff%s'",
        "day": now.date(), "moment": now, "span_of_time": datetime.timedelta(days=1, seconds=1),
        "uuid": uuid.UUID(int=7), "kind": "b", "big": 2**40, "flag": True,
    }  # fmt: skip
    engine = engine_of(True)
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        if not carries:
            connection.execute(sa.text("select 1"))
        connection.execute(sa.insert(table), row)
    with engine.begin() as connection:
        if not carries:
            connection.execute(sa.text("select 1"))
        conditions = [table.c[name] == row[name] for name in row if name not in ("json", "float")]
        found = connection.execute(sa.select(table).where(*conditions)).mappings().one()
    assert {name: type(value) for name, value in found.items()} == {name: type(value) for name, value in row.items()}
    assert dict(found) == row


@both
def test_text_with_a_float_has_the_type_it_has_elsewhere(engine_of: Callable[..., sa.Engine]) -> None:
    found = {}
    for ours in (False, True):
        with engine_of(ours).begin() as connection:
            found[ours] = type(connection.scalar(sa.text("select :x"), {"x": 1.5}))
            assert type(connection.scalar(sa.text("select :x"), {"x": 1.5})) is found[ours], "first and second differ"
    assert found[True] is found[False]


def has_hstore(look: Look) -> bool:
    """Install hstore where the server has it; the embedded one comes without."""
    if not look("select 1 from pg_available_extensions where name = 'hstore'"):
        return False
    look("create extension if not exists hstore")
    return True


def test_values_of_hstore(same: Callable[[Observe], Any], look: Look) -> None:
    if not has_hstore(look):
        pytest.skip("this server has no hstore")

    def observe(w: Watch) -> Any:
        found = []
        for _ in range(2):
            cursor = w.conn.cursor()
            if w.driver == "psycopg2":
                cursor.execute("select %s, 'a=>1'::hstore", ({"k": "v'"},))
            else:
                info = psycopg.types.hstore.TypeInfo.fetch(w.conn, "hstore")
                assert info is not None
                psycopg.types.hstore.register_hstore(info, w.conn)
                w.conn.rollback()
                cursor.execute("select %s, 'a=>1'::hstore", ({"k": "v'"},))
            found.append(cursor.fetchall())
        return found

    same(observe)


# -- ways to run statements -------------------------------------------------------------------------------------------


def test_executemany(same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        for rows in ([(1, 1), (2, 2)], [(3, 3), (1, 1)], [(4, 4), ("x", 5)]):
            w.control("SAVEPOINT a")
            cursor = w.conn.cursor()
            w.call(lambda rows=rows, cursor=cursor: cursor.executemany("insert into riding values (%s, %s)", rows))
            w.control("ROLLBACK TO SAVEPOINT a")
            w.do("select count(*) from riding")
            w.call(w.conn.commit)
        cursor = w.conn.cursor()
        w.call(lambda: cursor.executemany("insert into riding values (%s, %s)", [(5, 5), (6, 6)]))
        w.note(cursor.rowcount)
        w.call(w.conn.commit)

    same(observe)


@both
@pytest.mark.parametrize("way", ["executemany", "insertmanyvalues"])
@pytest.mark.parametrize("end", ["release", "rollback"])
def test_many_rows_in_a_savepoint(way: str, end: str, engine_of: Callable[..., sa.Engine], look: Look) -> None:
    look(TABLE)
    table = sa.table("riding", sa.column("id"), sa.column("v"))
    statement = sa.insert(table)
    if way == "insertmanyvalues":
        statement = statement.returning(table.c.id)
    rows = [{"id": number, "v": 1} for number in range(2500)]
    with engine_of(True).begin() as connection:
        savepoint = connection.begin_nested()
        connection.execute(statement, rows)
        savepoint.commit() if end == "release" else savepoint.rollback()
        connection.execute(sa.insert(table), {"id": -1, "v": 1})
        with pytest.raises(sa.exc.IntegrityError), connection.begin_nested():
            connection.execute(statement, [{"id": -2, "v": 1}, {"id": -1, "v": 1}])
    assert look("select count(*) from riding") == [2501 if end == "release" else 1]


@pytest.mark.parametrize("hold", [False, True], ids=["", "with hold"])
def test_server_side_cursors(hold: bool, same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        w.do("insert into riding select g, 1 from generate_series(1, 50) g")
        w.call(w.conn.commit)
        for before in (None, "select 1", "SAVEPOINT a"):
            if before:
                w.conn.cursor().execute(before)
            cursor = w.conn.cursor("named", withhold=hold)
            cursor.itersize = 7
            w.call(lambda cursor=cursor: cursor.execute("select id from riding order by id") and None)
            w.note(cursor.fetchmany(3), cursor.fetchone())
            w.call(lambda: w.conn.commit() if hold else None)
            w.note(list(cursor)[-2:])
            w.call(cursor.close)
            w.call(w.conn.commit)
            w.do("insert into riding select max(id) + 1 from riding")
            w.call(w.conn.rollback)

    same(observe)


def test_a_server_side_cursor_whose_statement_fails(same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        for before in (None, "select 1"):
            if before:
                w.do(before)
            cursor = w.conn.cursor("named")
            w.call(lambda cursor=cursor: cursor.execute("select nothing"))
            w.do("select 1")
            w.call(w.conn.rollback)
            w.call(cursor.close)
            w.do("select 2")
            w.call(w.conn.commit)

    same(observe)


def test_a_server_side_cursor_in_an_aborted_transaction(same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        w.do("select 1/0")
        cursor = w.conn.cursor("named")
        w.call(lambda: cursor.execute("select 1"))
        w.do("selec")
        w.call(w.conn.rollback)
        w.call(cursor.close)
        w.do("select 1")

    same(observe)


def test_a_server_side_cursor_made_before_the_transaction_ends(same: Callable[[Observe], Any]) -> None:
    """It is an object like any other until it is executed, and can be executed again."""

    def observe(w: Watch) -> None:
        cursor = w.conn.cursor("named")
        w.call(w.conn.commit)
        for _ in range(2):
            w.call(lambda: cursor.execute("select 1") and None)
            w.call(cursor.fetchall)
            w.call(w.conn.rollback)
            w.do("insert into riding values (1, 1)")
            w.call(w.conn.rollback)
        w.call(cursor.close)

    same(observe)


@psycopg2_only
def test_a_server_side_cursor_leaves_no_warning(same: Callable[[Observe], Any]) -> None:
    """In a transaction that has begun there is nothing to begin."""

    def observe(w: Watch) -> None:
        w.do("select 1")
        cursor = w.conn.cursor("named")
        w.call(lambda: cursor.execute("select 1"))
        w.note(list(w.conn.notices))

    same(observe)


@psycopg2_only
def test_a_server_side_cursor_of_another_means(same: Callable[[Observe], Any]) -> None:
    """One that a text has declared, and one that is never executed (psycopg2 documentation, "Server side cursors")."""

    def observe(w: Watch) -> None:
        w.do("declare stolen cursor for select generate_series(1, 5)")
        cursor = w.conn.cursor("stolen")
        w.note(cursor.name, cursor.withhold, cursor.scrollable, cursor.query)
        w.call(cursor.fetchone)
        cursor.itersize = 2
        w.note(next(cursor), cursor.rownumber, cursor.rowcount, [*cursor])
        w.call(cursor.close)
        w.do("select name from pg_cursors")
        w.call(w.conn.cursor("never").close)
        w.call(w.conn.commit)
        w.call(w.conn.cursor("nowhere").fetchone)
        w.call(w.conn.rollback)

    same(observe)


@psycopg2_only
def test_a_server_side_cursor_scrolls(same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        cursor = w.conn.cursor("named", scrollable=True)
        w.call(lambda: cursor.execute("select generate_series(1, %s)", (9,)) and None)
        w.note(cursor.query)
        for step in ((3,), (-2,), (7, "absolute")):
            w.call(lambda step=step: cursor.scroll(*step))
            w.call(cursor.fetchone)
        w.call(lambda: cursor.executemany("select 1", [()]))
        w.call(lambda: cursor.callproc("now"))
        w.call(lambda: cursor.execute("select 2"))
        w.call(w.conn.rollback)
        for run in (cursor.fetchall, partial(cursor.scroll, 1), partial(next, cursor), cursor.close):
            w.call(run)
        w.conn.autocommit = True
        w.call(lambda: w.conn.cursor("autocommit").execute("select 1"))
        with w.conn.cursor("held", withhold=True) as held:
            held.execute("select generate_series(1, 3)")
            w.note(held.fetchall(), w.status())

    same(observe)


@psycopg2_only
@pytest.mark.parametrize("begun", [False, True])
def test_a_server_side_cursor_of_another_class(begun: bool, same: Callable[[Observe], Any]) -> None:
    """psycopg2's own transaction takes over, with what was done and what waits."""

    def observe(w: Watch) -> None:
        if begun:
            w.do("insert into riding values (1, 1)")
        w.control("SAVEPOINT a")
        cursor = w.conn.cursor("named", cursor_factory=psycopg2.extras.DictCursor)
        cursor.itersize = 2
        w.call(lambda: cursor.execute("select generate_series(1, 3) as n") and None)
        w.note([row["n"] for row in cursor], list(w.conn.notices))
        w.do("insert into riding values (2, 2)")
        w.control("ROLLBACK TO SAVEPOINT a")
        w.call(w.conn.commit)
        w.call(cursor.fetchone)
        w.do("insert into riding values (3, 3)")
        w.call(w.conn.rollback)
        stale = w.conn.cursor("stale", cursor_factory=psycopg2.extras.DictCursor)
        w.do("select 1/0")
        w.call(lambda: w.conn.cursor("b", cursor_factory=psycopg2.extras.DictCursor).execute("select 1"))
        w.call(w.conn.rollback)
        w.call(lambda: stale.execute("select 1"))
        w.do("select 1")

    same(observe)


@both
@pytest.mark.parametrize("before", [None, "select 1"])
def test_stream_results_in_a_transaction(before: str | None, engine_of: Callable[..., sa.Engine], look: Look) -> None:
    look(TABLE)
    look("insert into riding select g, 1 from generate_series(1, 500) g")
    engine = engine_of(True)
    with engine.begin() as connection:
        if before:
            connection.execute(sa.text(before))
        with connection.begin_nested():
            statement = sa.text("select id from riding order by id")
            result = connection.execute(statement.execution_options(stream_results=True, max_row_buffer=10))
            assert result.fetchone() == (1,)
            connection.execute(sa.text("update riding set v = 2 where id = 500"))
            assert len(result.fetchall()) == 499
    assert look("select count(*) from riding where v = 2") == [1]
    with engine.connect() as connection:
        assert status_of(connection) is TransactionStatus.IDLE
        connection.execute(sa.text("insert into riding values (0, 0)"))
        connection.commit()
    assert look("select count(*) from riding") == [501]


def copy_in(conn: Any, text: str) -> None:
    if isinstance(conn, ext.connection):
        conn.cursor().copy_expert("copy riding from stdin", io.StringIO(text))
    else:
        with conn.cursor() as cursor, cursor.copy("copy riding from stdin") as copy:
            copy.write(text)


def copy_out(conn: Any) -> bytes:
    if isinstance(conn, ext.connection):
        out = io.BytesIO()
        conn.cursor().copy_expert("copy (select * from riding order by id) to stdout", out)
        return out.getvalue()
    with conn.cursor() as cursor, cursor.copy("copy (select * from riding order by id) to stdout") as copy:
        return b"".join(bytes(piece) for piece in copy)


def test_copy_both_ways(same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        w.call(lambda: copy_in(w.conn, "1\t1\ta\n2\t\\N\tb\n"))
        w.call(lambda: copy_out(w.conn))
        w.call(w.conn.commit)
        w.call(lambda: copy_out(w.conn))
        w.call(w.conn.rollback)
        for before in (None, "select 1"):
            if before:
                w.do(before)
            w.control("SAVEPOINT a")
            w.call(lambda: copy_in(w.conn, "3\t3\tc\n"))
            w.control("ROLLBACK TO SAVEPOINT a")
            w.control("SAVEPOINT b")
            w.call(lambda: copy_in(w.conn, "4\t99\td\n"))
            w.control("ROLLBACK TO SAVEPOINT b")
            w.control("SAVEPOINT c")
            w.call(lambda: copy_in(w.conn, "x\n"))
            w.call(w.conn.rollback)
        w.do("select id from riding order by id")

    same(observe)


@pytest.mark.parametrize("query", ["copy riding to stdout", "copy riding from stdin"])
def test_copy_by_execute(query: str, same: Callable[[Observe], Any]) -> None:
    """Both drivers refuse it."""
    same(lambda w: w.do(query) and None)


@psycopg2_only
def test_copy_from_and_copy_to(same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        out = io.StringIO()
        w.call(lambda: w.conn.cursor().copy_from(io.StringIO("1\t1\ta\n"), "riding"))
        w.call(w.conn.rollback)
        w.call(lambda: w.conn.cursor().copy_from(io.StringIO("2\t1\ta\n"), "riding"))
        w.call(w.conn.commit)
        w.call(lambda: w.conn.cursor().copy_to(out, "riding"))
        w.note(out.getvalue())

    same(observe)


@psycopg2_only
def test_callproc(same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        for before in (None, "SAVEPOINT a"):
            if before:
                w.control(before)
            cursor = w.conn.cursor()
            w.call(lambda cursor=cursor: cursor.callproc("repeat", ["ab", 2]))
            w.note(cursor.fetchall(), cursor.query)
            w.call(lambda cursor=cursor: cursor.callproc("nofunction", {"a": 1}))
            w.call(w.conn.rollback)

    same(observe)


# -- two phases -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared_server() -> Iterator[postgres.Server]:
    with postgres.private_server(max_prepared_transactions=10, lock_timeout="10s") as server:
        yield server


@pytest.fixture
def two_phase_server(prepared_server: postgres.Server) -> Iterator[postgres.Server]:
    """Without what earlier tests may have left: a prepared transaction keeps its locks for ever."""
    yield prepared_server
    with psycopg.connect(prepared_server.url(), autocommit=True) as connection:
        for (name,) in connection.execute("select gid from pg_prepared_xacts").fetchall():
            connection.execute(psycopg.sql.SQL("rollback prepared {}").format(psycopg.sql.Literal(name)))


@both
@pytest.mark.parametrize("end", ["commit", "rollback"])
@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("savepoint", ["none", "released", "rolled back", "released, then a statement"])
def test_two_phase(
    end: str, prepared: bool, savepoint: str, two_phase_server: postgres.Server, driver: str,
    engine_of: Callable[..., sa.Engine],
) -> None:  # fmt: skip
    engine = engine_of(True, two_phase_server.url(driver=driver), pool_size=2, max_overflow=0)
    with engine.begin() as connection:
        connection.execute(sa.text("drop table if exists riding"))
        connection.execute(sa.text(TABLE))
    insert = sa.text("insert into riding values (:id, 1)")
    with engine.connect() as connection:
        transaction = connection.begin_twophase()
        connection.execute(insert, {"id": 1})
        if savepoint != "none":
            nested = connection.begin_nested()
            connection.execute(insert, {"id": 2})
            nested.rollback() if savepoint == "rolled back" else nested.commit()
            if "then" in savepoint:
                connection.execute(insert, {"id": 3})
        if prepared:
            transaction.prepare()
            with engine.connect() as other:
                assert transaction.xid in other.recover_twophase()
        getattr(transaction, end)()
    for _ in range(2):
        with engine.begin() as connection:
            found = connection.scalars(sa.text("select id from riding order by id")).all()
            assert connection.execute(sa.text("select gid from pg_prepared_xacts")).all() == []
    expected = {"none": [1], "released": [1, 2], "rolled back": [1], "released, then a statement": [1, 2, 3]}
    assert found == (expected[savepoint] if end == "commit" else [])


@both
def test_two_phase_of_the_driver(
    two_phase_server: postgres.Server, driver: str, engine_of: Callable[..., sa.Engine]
) -> None:
    found = {}
    for ours in (False, True):
        engine = engine_of(ours, two_phase_server.url(driver=driver), poolclass=sa.NullPool)
        raw, other = engine.raw_connection(), engine.raw_connection()
        w = Watch(raw.driver_connection, driver)
        w.do("drop table if exists riding")
        w.do(TABLE)
        w.call(w.conn.commit)
        for name, ends in {
            "a": ["tpc_commit"],
            "b": ["tpc_rollback"],
            "c": ["tpc_prepare", "tpc_commit"],
            "d": ["tpc_prepare", "tpc_rollback"],
            "e": ["tpc_prepare", "other"] if driver == "psycopg2" else ["tpc_commit"],
            "f": ["commit", "rollback", "tpc_rollback"],
        }.items():
            xid = w.conn.xid(1, name, "branch")
            w.call(partial(w.conn.tpc_begin, xid))
            w.do("insert into riding select coalesce(max(id), 0) + 1, 1 from riding")
            w.call(partial(setattr, w.conn, "autocommit", True))
            for end in ends:
                if end == "other":
                    w.call(w.conn.reset)
                    second = Watch(other.driver_connection, driver)
                    second.call(lambda second=second: [each.gtrid for each in second.conn.tpc_recover()])
                    second.call(lambda xid=xid, second=second: second.conn.tpc_commit(xid))
                    w.note(*second.seen)
                else:
                    w.call(getattr(w.conn, end))
            w.do("select id from riding order by id")
            w.call(w.conn.rollback)
        found[ours] = w.seen
        for each in (w.conn, raw, other):
            each.close()
    for mine, stock in zip(found[True], found[False], strict=True):
        assert mine == stock


# -- what psycopg2 tells of a statement -------------------------------------------------------------------------------


@psycopg2_only
def test_query_and_mogrify(same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        cursor = w.conn.cursor()
        w.note(cursor.query, cursor.mogrify("select %s, %s", (1, "x'")))
        for before in ([], ["select 1"], ["select 1", "SAVEPOINT a"]):
            for each in before:
                w.conn.cursor().execute(each)
            cursor.execute("select %s", ("ü",))
            w.note(cursor.query, cursor.statusmessage, cursor.rowcount, cursor.rownumber)
            w.conn.rollback()

    same(observe)


@psycopg2_only
@pytest.mark.parametrize("then", ["executemany", "callproc", "copy", "second execute", "failing"])
def test_query_is_that_of_the_last_statement(then: str, same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> Any:
        cursor = w.conn.cursor()
        cursor.execute("select 1")  # carries BEGIN
        if then == "executemany":
            cursor.executemany("insert into riding values (%s, 1)", [(1,), (2,)])
        elif then == "callproc":
            cursor.callproc("repeat", ["ab", 2])
        elif then == "copy":
            cursor.copy_expert("copy riding to stdout", io.BytesIO())
        elif then == "second execute":
            cursor.execute("select 2")
        else:
            with contextlib.suppress(psycopg2.Error):
                cursor.execute("select nothing")
        return cursor.query

    same(observe)


def test_notices(same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> Any:
        said: list[Any] = []
        if w.driver == "psycopg":
            w.conn.add_notice_handler(lambda diag: said.append((diag.severity, diag.message_primary)))
        else:
            said = w.conn.notices
            del said[:]
        raises = "do $$ begin raise notice 'a'; raise warning 'b'; end $$"
        w.do(raises)
        w.do(raises)
        w.control("SAVEPOINT a")
        w.do(raises)
        w.control("RELEASE SAVEPOINT a")
        w.do("drop table if exists nowhere")
        w.call(w.conn.commit)
        return list(said)

    same(observe)


@psycopg2_only
@pytest.mark.parametrize("name", ["DictCursor", "RealDictCursor", "NamedTupleCursor"])
def test_extras_cursors(name: str, same: Callable[[Observe], Any]) -> None:
    factory = getattr(psycopg2.extras, name)

    def observe(w: Watch) -> None:
        for before in (None, "SAVEPOINT a"):
            cursor = w.conn.cursor(cursor_factory=factory)
            assert isinstance(cursor, factory)
            if before:
                cursor.execute(before)
            cursor.execute("select 1 as a, %s as b", ("x",))
            w.note(repr(cursor.fetchone()))
            cursor.execute("select 1 as c union select 2 order by c")
            w.note([repr(row) for row in cursor])
            w.do("select nothing", cursor=cursor)
            w.call(w.conn.rollback)
        with w.conn.cursor("named", cursor_factory=factory) as cursor:
            cursor.execute("select 1 as a")
            w.note(repr(cursor.fetchall()))
        w.call(w.conn.commit)

    same(observe)


@psycopg2_only
@pytest.mark.parametrize("name", ["execute_values", "execute_batch"])
def test_extras_helpers(name: str, same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        rows = [(number, 1) for number in range(250)]
        place = "values %s" if name == "execute_values" else "values (%s, %s)"
        helper = getattr(psycopg2.extras, name)
        for before in (None, "select 1"):
            if before:
                w.do(before)
            w.control("SAVEPOINT a")
            w.call(lambda: helper(w.conn.cursor(), f"insert into riding {place}", rows, page_size=100))
            w.control("SAVEPOINT b")
            w.call(lambda: helper(w.conn.cursor(), f"insert into riding {place}", rows))
            w.control("ROLLBACK TO SAVEPOINT b")
            w.do("select count(*) from riding")
            w.control("ROLLBACK TO SAVEPOINT a")
            w.do("select count(*) from riding")
            w.call(w.conn.commit)
        if name == "execute_values":
            w.call(lambda: helper(w.conn.cursor(), f"insert into riding {place} returning id", rows[:3], fetch=True))
            w.call(w.conn.commit)

    same(observe)


@psycopg2_only
def test_composed_sql(same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        query = psycopg2.sql.SQL("select {} from {} where {} = %s").format(
            *map(psycopg2.sql.Identifier, ("id", "riding", "v"))
        )
        w.do(query, (1,))
        w.control("SAVEPOINT a")
        w.do(query, (1,))
        w.do(psycopg2.sql.SQL("selec {}").format(psycopg2.sql.Literal(1)))
        w.control("ROLLBACK TO SAVEPOINT a")
        w.do(psycopg2.sql.SQL("SAVEPOINT {}").format(psycopg2.sql.Identifier("b")))
        w.do("insert into riding values (1, 1)")
        w.do(psycopg2.sql.SQL("ROLLBACK TO {}").format(psycopg2.sql.Identifier("b")))
        w.do(b"insert into riding values (2, 2)")
        w.call(w.conn.commit)

    same(observe)


# -- psycopg's ways ---------------------------------------------------------------------------------------------------


@psycopg_only
@pytest.mark.parametrize("name", ["dict_row", "namedtuple_row", "scalar_row"])
def test_row_factories(name: str, same: Callable[[Observe], Any]) -> None:
    factory = getattr(psycopg.rows, name)

    def observe(w: Watch) -> None:
        for _ in range(2):
            with w.conn.cursor(row_factory=factory) as cursor:
                w.note(repr(cursor.execute("select %s as a, 2 as b", (1,)).fetchall()))
        w.conn.rollback()
        w.conn.row_factory = factory
        w.note(repr(w.conn.execute("select 1 as a").fetchone()))
        w.conn.rollback()
        with w.conn.cursor("named") as cursor:
            w.note(repr(cursor.execute("select 1 as a").fetchall()))

    same(observe)


@psycopg_only
@pytest.mark.parametrize("name", ["ClientCursor", "RawCursor", "Cursor"])
@pytest.mark.parametrize("how", ["made", "factory"])
def test_other_cursors(name: str, how: str, same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        kind = getattr(psycopg, name)
        if how == "factory":
            w.conn.cursor_factory = kind
        cursor = w.conn.cursor() if how == "factory" else kind(w.conn)
        one = "$1" if name == "RawCursor" else "%s"
        for _ in range(2):
            w.conn.cursor().execute("SAVEPOINT a")
            w.do(f"insert into riding values ({one}, 1)", (1,), cursor)
            cursor.execute("ROLLBACK TO SAVEPOINT a")
            w.do("select count(*) from riding", None, cursor)
            w.conn.cursor().execute("RELEASE SAVEPOINT a")
            w.do("selec", None, cursor)
            w.call(w.conn.rollback)

    same(observe)


@psycopg_only
@pytest.mark.parametrize("waiting", ["nothing", "begin", "savepoint", "released"])
def test_pipeline(waiting: str, same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        cursor = w.conn.cursor()
        if waiting != "nothing":
            cursor.execute("insert into riding values (1, 1)") if waiting != "begin" else None
            cursor.execute("SAVEPOINT a")
        if waiting == "released":
            cursor.execute("insert into riding values (9, 1)")
            cursor.execute("RELEASE SAVEPOINT a")
        with w.conn.pipeline() as pipeline:
            cursor.execute("insert into riding values (2, 2)")
            cursor.execute("SAVEPOINT b")
            cursor.execute("insert into riding values (3, 3)")
            pipeline.sync()
            cursor.execute("ROLLBACK TO SAVEPOINT b")
            w.note(w.conn.execute("select id from riding order by id").fetchall())
        w.note(w.status())
        if waiting in ("begin", "savepoint"):
            cursor.execute("ROLLBACK TO SAVEPOINT a")
        w.do("select id from riding order by id")
        w.call(w.conn.commit)
        with w.conn.pipeline():
            w.conn.execute("insert into riding values (7, 7)")
            w.conn.commit()
        w.note(w.status())
        try:
            with w.conn.pipeline():
                w.conn.execute("selec")
        except psycopg.Error as error:
            w.note(type(error))
        w.call(w.conn.rollback)
        w.do("select 1")

    same(observe)


@psycopg_only
def test_transaction_of_psycopg(same: Callable[[Observe], Any]) -> None:
    """The outermost `conn.transaction()` commits at its end."""

    def observe(w: Watch) -> None:
        with w.conn.transaction():
            w.do("insert into riding values (1, 1)")
        w.note("after the outermost", w.status())
        with contextlib.suppress(ZeroDivisionError), w.conn.transaction():
            w.do("insert into riding values (2, 2)")
            raise ZeroDivisionError
        w.note("after a rollback", w.status())
        with w.conn.transaction(), w.conn.transaction() as inner:
            w.do("insert into riding values (3, 3)")
            raise psycopg.Rollback(inner)
        w.note("after Rollback", w.status())
        with w.conn.transaction("named"):
            pass
        w.note("after nothing", w.status())
        with w.conn.transaction(force_rollback=True):
            w.do("insert into riding values (4, 4)")
        w.do("insert into riding values (5, 5)")
        with w.conn.transaction():  # a savepoint
            w.do("insert into riding values (6, 6)")
        w.note("after a savepoint", w.status())
        w.call(w.conn.rollback)

    same(observe)


@psycopg_only
@pytest.mark.parametrize("how", ["RELEASE SAVEPOINT a", "ROLLBACK TO SAVEPOINT a", "select 1"])
def test_transaction_of_psycopg_around_a_savepoint(how: str, same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        with w.conn.transaction():
            w.control("SAVEPOINT a")
            w.do("insert into riding values (1, 1)")
            w.control(how)
        w.note(w.status())
        w.do("select id from riding")
        w.call(w.conn.rollback)

    same(observe)


@psycopg_only
def test_transaction_of_psycopg_in_autocommit(same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        w.conn.autocommit = True
        with w.conn.transaction():
            w.do("insert into riding values (1, 1)")
            w.control("SAVEPOINT a")
            w.do("insert into riding values (2, 2)")
            w.control("ROLLBACK TO SAVEPOINT a")
        w.note(w.status())

    same(observe)


@psycopg_only
def test_results_of_several_statements(same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        for _ in range(2):
            cursor = w.conn.execute("select 1; insert into riding values (1, 1); select 3")
            w.note(cursor.fetchall(), cursor.nextset(), cursor.statusmessage, cursor.nextset(), cursor.fetchall())
            w.note(cursor.nextset())
            w.conn.rollback()
        for _ in range(2):
            cursor = w.conn.execute("select 1; select 2; select 3")
            if hasattr(cursor, "results"):
                w.note([each.fetchall() for each in cursor.results()])
        w.conn.rollback()
        for _ in range(2):
            cursor = w.conn.execute("select 1; select 2; select 3")
            if hasattr(cursor, "set_result"):
                cursor.set_result(1)
                w.note(cursor.fetchall())
                cursor.set_result(-1)
                w.note(cursor.fetchall())

    same(observe)


@psycopg_only
@pytest.mark.parametrize("options", [{"prepare": True}, {"prepare": False}, {"binary": True}])
def test_execute_options(options: dict[str, Any], same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        for _ in range(2):
            cursor = w.conn.cursor()
            cursor.execute("SAVEPOINT a")
            cursor.execute("select %s::int, %b::text, %t::int", (1, "x", 2), **options)
            w.note(cursor.fetchall(), cursor.description[0].type_code)
            w.note([row[0] for row in w.conn.execute("select statement from pg_prepared_statements order by 1")])
            w.call(w.conn.rollback)

    same(observe)


@psycopg_only
def test_prepared_by_psycopg_on_the_sixth_run(connect: Connect) -> None:
    conn = connect(True)
    for _ in range(8):
        conn.execute("select 1")  # carries nothing
        assert conn.execute("select %s::int", (1,)).fetchall() == [(1,)]
        conn.commit()
    found = conn.execute("select count(*) from pg_prepared_statements where statement like 'select $1%'").fetchone()
    assert found == (1,)


@both
def test_several_threads_on_one_connection(connect: Connect, look: Look, driver: str) -> None:
    """Both drivers' connections may be shared by threads (psycopg documentation, "Concurrent operations"; psycopg2
    documentation, "Thread and process safety"). One of them begins."""
    look(TABLE)
    conn = connect(True)
    for attempt in range(30):
        barrier = threading.Barrier(4)
        errors: list[BaseException] = []

        def insert(number: int, barrier: threading.Barrier = barrier, errors: Any = errors) -> None:
            try:
                barrier.wait()
                conn.cursor().execute("insert into riding values (%s, 1)", (number,))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=insert, args=(attempt * 4 + number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        conn.rollback()
        if driver == "psycopg2":
            assert conn.notices == [], "begun once"
        assert look("select count(*) from riding") == [0]


# -- modes ------------------------------------------------------------------------------------------------------------

SHOW = "select current_setting('transaction_isolation'), current_setting('transaction_read_only'),"
SHOW += " current_setting('transaction_deferrable')"


def modes(w: Watch) -> Any:
    if w.driver == "psycopg2":
        return w.conn.autocommit, w.conn.isolation_level, w.conn.readonly, w.conn.deferrable
    return w.conn.autocommit, w.conn.isolation_level, w.conn.read_only, w.conn.deferrable


PSYCOPG2_MODES: dict[str, Callable[[Any], Any]] = {
    "autocommit": lambda c: setattr(c, "autocommit", True),
    "autocommit off": lambda c: setattr(c, "autocommit", False),
    "serializable": lambda c: setattr(c, "isolation_level", "SERIALIZABLE"),
    "by number": lambda c: setattr(c, "isolation_level", ext.ISOLATION_LEVEL_REPEATABLE_READ),
    "lower case": lambda c: setattr(c, "isolation_level", "read uncommitted"),
    "default": lambda c: setattr(c, "isolation_level", "DEFAULT"),
    "none": lambda c: setattr(c, "isolation_level", None),
    "unknown": lambda c: setattr(c, "isolation_level", "UNHEARD OF"),
    "number 0": lambda c: setattr(c, "isolation_level", 0),
    "number 9": lambda c: setattr(c, "isolation_level", 9),
    "readonly": lambda c: setattr(c, "readonly", True),
    "readonly off": lambda c: setattr(c, "readonly", False),
    "readonly default": lambda c: setattr(c, "readonly", "default"),
    "deferrable": lambda c: setattr(c, "deferrable", True),
    "set_session": lambda c: c.set_session("SERIALIZABLE", True, True),
    "set_session autocommit": lambda c: c.set_session(autocommit=True),
    "set_session readonly autocommit": lambda c: c.set_session(readonly=True, autocommit=True),
    "set_session serializable autocommit": lambda c: c.set_session("SERIALIZABLE", autocommit=True),
    "set_session default": lambda c: c.set_session("DEFAULT", "DEFAULT", "DEFAULT"),
    "set_session wrong": lambda c: c.set_session("WRONG"),
    "set_isolation_level": lambda c: c.set_isolation_level(ext.ISOLATION_LEVEL_SERIALIZABLE),
    "set_isolation_level autocommit": lambda c: c.set_isolation_level(ext.ISOLATION_LEVEL_AUTOCOMMIT),
    "set_isolation_level default": lambda c: c.set_isolation_level(ext.ISOLATION_LEVEL_DEFAULT),
    "set_isolation_level none": lambda c: c.set_isolation_level(None),
    "set_isolation_level wrong": lambda c: c.set_isolation_level(42),
    "set_client_encoding": lambda c: c.set_client_encoding("LATIN1"),
    "reset": lambda c: c.reset(),
    "cancel": lambda c: c.cancel(),
}
PSYCOPG_MODES: dict[str, Callable[[Any], Any]] = {
    "autocommit": lambda c: setattr(c, "autocommit", True),
    "autocommit off": lambda c: setattr(c, "autocommit", False),
    "serializable": lambda c: setattr(c, "isolation_level", psycopg.IsolationLevel.SERIALIZABLE),
    "by number": lambda c: setattr(c, "isolation_level", 3),
    "unknown": lambda c: setattr(c, "isolation_level", 9),
    "none": lambda c: setattr(c, "isolation_level", None),
    "readonly": lambda c: setattr(c, "read_only", True),
    "readonly off": lambda c: setattr(c, "read_only", False),
    "deferrable": lambda c: setattr(c, "deferrable", True),
    "set_autocommit": lambda c: c.set_autocommit(True),
    "set_isolation_level": lambda c: c.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ),
    "cancel": lambda c: c.cancel(),
}
MODES = [("psycopg2", name) for name in PSYCOPG2_MODES] + [("psycopg", name) for name in PSYCOPG_MODES]


@pytest.mark.parametrize("when", ["idle", "in a transaction", "aborted"])
@pytest.mark.parametrize(("driver", "name"), MODES, indirect=["driver"])
def test_modes(driver: str, name: str, when: str, same: Callable[[Observe], Any]) -> None:
    """What a connection is asked for, what it says of it, and what the server then does."""
    change = {"psycopg2": PSYCOPG2_MODES, "psycopg": PSYCOPG_MODES}[driver][name]

    def observe(w: Watch) -> None:
        w.note(modes(w))
        if when != "idle":
            w.do("insert into riding values (1, 1)")
        if when == "aborted":
            w.do("select 1/0")
        w.call(lambda: change(w.conn))
        w.note(modes(w))
        w.do(SHOW)
        w.do("insert into riding values (2, 2)")
        w.call(w.conn.commit)
        w.note(modes(w))
        w.do(SHOW)
        w.call(w.conn.rollback)
        w.call(lambda: change(w.conn))
        w.do("insert into riding values (3, 3)")
        w.call(w.conn.rollback)

    same(observe)


@psycopg2_only
@pytest.mark.parametrize("first", ["readonly", "serializable", "deferrable"])
def test_characteristics_hold_in_autocommit_too(first: str, same: Callable[[Observe], Any]) -> None:
    """A read-only connection stays read-only when it goes into autocommit, and when it comes back."""

    def observe(w: Watch) -> None:
        PSYCOPG2_MODES[first](w.conn)
        w.conn.autocommit = True
        w.do(SHOW)
        w.do("insert into riding values (1, 1)")
        w.conn.autocommit = False
        w.do(SHOW)
        w.call(w.conn.rollback)
        PSYCOPG2_MODES["set_session default"](w.conn)
        w.do(SHOW)

    same(observe)


@both
def test_read_only_autocommit_of_sqlalchemy(engine_of: Callable[..., sa.Engine], look: Look, driver: str) -> None:
    """SQLAlchemy documents `postgresql_readonly` together with any isolation level."""
    look(TABLE)
    found = {}
    for ours in (False, True):
        with engine_of(ours).connect() as connection:
            connection = connection.execution_options(postgresql_readonly=True, isolation_level="AUTOCOMMIT")
            try:
                connection.execute(sa.text(f"insert into riding values ({int(ours)}, 1)"))
                found[ours] = None
            except sa.exc.DBAPIError as error:
                found[ours] = type(error.orig)
    assert found[True] == found[False]


@both
def test_isolation_levels_of_sqlalchemy(engine_of: Callable[..., sa.Engine], driver: str) -> None:
    engine = engine_of(True, pool_size=1, max_overflow=0)
    for level in ("SERIALIZABLE", "READ COMMITTED", "REPEATABLE READ", "READ UNCOMMITTED", "AUTOCOMMIT"):
        with engine.connect().execution_options(isolation_level=level) as connection:
            if level != "AUTOCOMMIT":
                assert connection.get_isolation_level() == level
                assert connection.scalar(sa.text("show transaction_isolation")) == level.lower()
        with engine.connect() as connection:
            assert connection.scalar(sa.text("show transaction_isolation")) == "read committed"
            assert status_of(connection) is TransactionStatus.IN_TRANSACTION
    options = {"postgresql_readonly": True, "postgresql_deferrable": True}
    with engine.connect().execution_options(isolation_level="SERIALIZABLE", **options) as connection:
        assert connection.execute(sa.text(SHOW)).one() == ("serializable", "on", "on")
    with engine.connect() as connection:
        assert connection.execute(sa.text(SHOW)).one() == ("read committed", "off", "off")


@both
def test_with_connection(same: Callable[[Observe], Any]) -> None:
    """`with conn:`: psycopg2 ends the transaction, psycopg closes the connection too."""

    def observe(w: Watch) -> None:
        with w.conn:
            w.do("insert into riding values (1, 1)")
        w.note(w.status())
        if w.driver == "psycopg":
            return
        with contextlib.suppress(ZeroDivisionError), w.conn:
            w.do("insert into riding values (2, 2)")
            raise ZeroDivisionError
        w.note(w.status(), list(w.conn.notices))
        with contextlib.suppress(psycopg2.Error), w.conn:
            w.do("insert into riding values (1, 1)")
        w.note(w.status())
        with w.conn, w.conn.cursor() as cursor:
            cursor.execute("SAVEPOINT a")
            cursor.execute("insert into riding values (3, 3)")
            cursor.execute("ROLLBACK TO SAVEPOINT a")
            cursor.execute("insert into riding values (4, 4)")
        w.note(w.status())
        with w.conn:
            w.call(w.conn.__enter__)
        w.do("select 1")
        w.call(w.conn.rollback)

    same(observe)


@psycopg2_only
@pytest.mark.parametrize("then", ["named", "lobject", "tpc", "modes", "autocommit"])
def test_after_with_connection(then: str, same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        with w.conn:
            w.do("insert into riding values (1, 1)")
        w.note(w.status())
        if then == "named":
            cursor = w.conn.cursor("named")
            w.call(lambda: cursor.execute("select 1"))
            w.call(cursor.fetchall)
        elif then == "lobject":
            w.call(lambda: w.conn.lobject(0, "wb").write(b"x"))
        elif then == "tpc":
            w.call(lambda: w.conn.tpc_begin(w.conn.xid(1, "after", "with")))
            w.call(w.conn.tpc_rollback)
        elif then == "modes":
            w.call(lambda: w.conn.set_session("SERIALIZABLE"))
            with w.conn:
                w.do(SHOW)
        else:
            w.conn.autocommit = True
            with w.conn:
                w.do("insert into riding values (2, 2)")
            w.do("insert into riding values (3, 3)")
        w.call(w.conn.rollback)

    same(observe)


@psycopg2_only
def test_with_connection_costs_no_more_than_stock(
    engine_of: Callable[..., sa.Engine], wire: Wire, database_url: str, look: Look
) -> None:
    look(TABLE)
    counts = {}
    for ours in (False, True):
        raw = engine_of(ours, wire.url(database_url)).raw_connection()
        with wire.record() as log, raw.driver_connection as conn, conn.cursor() as cursor:
            cursor.execute("insert into riding values (%s, 1)", (int(ours),))
        counts[ours] = log.round_trips
        raw.invalidate()
    assert counts[True] <= counts[False], counts


def test_status_and_info(same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        def tell() -> None:
            info = w.conn.info
            w.note(w.status(), info.transaction_status, info.dbname, info.server_version, info.status)

        tell()
        w.do("select 1")
        tell()
        w.do("select 1/0")
        tell()
        w.call(w.conn.commit)
        tell()
        w.conn.autocommit = True
        w.do("begin")
        tell()
        w.do("select 1")
        tell()
        w.do("rollback")
        tell()
        w.conn.autocommit = False
        w.conn.close()
        w.call(w.conn.commit)
        w.call(w.conn.rollback)
        w.call(lambda: w.conn.cursor())
        w.note(w.conn.closed)

    same(observe)


@psycopg2_only
def test_large_objects(same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        for before in (None, "select 1", "SAVEPOINT a"):
            if before:
                w.conn.cursor().execute(before)
            large = w.conn.lobject(0, "wb")
            large.write(b"abc")
            number = large.oid
            large.close()
            w.call(w.conn.commit)
            w.note(w.conn.lobject(number, "rb").read())
            w.call(w.conn.rollback)
            w.conn.lobject(number).unlink()
            w.call(w.conn.rollback)
            w.note(w.conn.lobject(number, "rb").read())
            w.call(w.conn.rollback)
            w.do("insert into riding values (1, 1)")
            w.call(w.conn.rollback)

    same(observe)


# -- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("carried", [[], ["SAVEPOINT a"], ["select 1"], ["select 1", "SAVEPOINT a"]], ids=" ".join)
def test_statement_timeout(carried: list[str], same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        w.do("set statement_timeout = '200ms'")
        w.call(w.conn.commit)
        for each in carried:
            w.conn.cursor().execute(each)
        w.do("select pg_sleep(30)")
        if "SAVEPOINT a" in carried:
            w.control("ROLLBACK TO SAVEPOINT a")
            w.do("insert into riding values (1, 1)")
        w.call(w.conn.commit)
        w.do("select 1")

    same(observe)


@pytest.mark.parametrize("carried", [[], ["SAVEPOINT a"], ["select 1"]], ids=" ".join)
def test_cancel(carried: list[str], same: Callable[[Observe], Any], look: Look) -> None:
    def observe(w: Watch) -> None:
        for each in carried:
            w.conn.cursor().execute(each)
        pid = w.conn.info.backend_pid

        def cancel() -> None:
            while not look("select 1 from pg_stat_activity where pid = %s and wait_event = 'PgSleep'", pid):
                pass
            w.conn.cancel()

        thread = threading.Thread(target=cancel)
        thread.start()
        w.do("select pg_sleep(30)")
        thread.join()
        if "SAVEPOINT a" in carried:
            w.control("ROLLBACK TO SAVEPOINT a")
            w.do("insert into riding values (1, 1)")
        w.call(w.conn.commit)
        w.do("select 1")

    same(observe)


def test_listen(same: Callable[[Observe], Any], look: Look) -> None:
    def observe(w: Watch) -> Any:
        w.do("listen channel")
        w.call(w.conn.commit)
        look("select pg_notify('channel', 'first')")
        if w.driver == "psycopg2":
            while not w.conn.notifies:
                w.conn.poll()
            return [(each.channel, each.payload) for each in w.conn.notifies]
        return [(each.channel, each.payload) for each in w.conn.notifies(timeout=10, stop_after=1)]

    same(observe)


def test_sql_level_prepare(same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> None:
        w.do("prepare p as insert into riding values ($1, 1)")
        w.do("execute p(1)")
        w.control("SAVEPOINT a")
        w.do("execute p(1)")
        w.control("ROLLBACK TO SAVEPOINT a")
        w.do("execute p(2)")
        w.call(w.conn.commit)
        w.do("execute p(3)")
        w.do("deallocate p")
        w.call(w.conn.commit)

    same(observe)


# -- under SQLAlchemy -------------------------------------------------------------------------------------------------


@both
def test_initialisation(engine_of: Callable[..., sa.Engine], look: Look, driver: str) -> None:
    """What SQLAlchemy asks of the first connection, the oids of hstore among it."""
    with_hstore = has_hstore(look)
    for ours in (False, True):
        engine = engine_of(ours)
        with engine.connect() as connection:
            if with_hstore:
                assert connection.scalar(sa.text("select 'a=>1'::hstore")) == {"a": "1"}
            assert connection.scalar(sa.text("select '{\"a\": 1}'::jsonb")) == {"a": 1}
        assert engine.dialect.server_version_info >= (12,)
        assert engine.dialect.default_schema_name == "public"
        assert engine.dialect.default_isolation_level == "READ COMMITTED"


@both
def test_initialisation_costs_no_more_than_stock(
    engine_of: Callable[..., sa.Engine], wire: Wire, database_url: str
) -> None:
    counts = {}
    for ours in (False, True):
        with wire.record() as log:
            engine_of(ours, wire.url(database_url)).connect().close()
        counts[ours] = log.round_trips
    assert counts[True] <= counts[False], counts


@both
def test_echo(engine_of: Callable[..., sa.Engine], look: Look, caplog: pytest.LogCaptureFixture) -> None:
    """The log of SQLAlchemy is the same, line by line, but for times."""
    look(TABLE)
    said = {}
    for ours in (False, True):
        caplog.clear()
        engine = engine_of(ours)
        engine.connect().close()
        with caplog.at_level(logging.INFO, "sqlalchemy.engine"):
            with engine.begin() as connection:
                connection.execute(sa.text("insert into riding values (:id, 1)"), {"id": int(ours)})
                with contextlib.suppress(sa.exc.DBAPIError), connection.begin_nested():
                    connection.execute(sa.text("select nothing"))
                with connection.begin_nested():
                    connection.execute(sa.text("select 1"))
        said[ours] = [
            record.getMessage().replace(f"'id': {int(ours)}", "'id': ?").split(" in ")[0]
            for record in caplog.records
            if not record.getMessage().startswith("[")
        ]
    assert said[True] == said[False]
    assert "SAVEPOINT sa_savepoint_1" in said[True]


@both
def test_errors_of_sqlalchemy_show_the_users_statement(engine_of: Callable[..., sa.Engine], look: Look) -> None:
    look(TABLE)
    texts = {}
    for ours in (False, True):
        with engine_of(ours).connect() as connection:
            for nested in (False, True):
                with pytest.raises(sa.exc.ProgrammingError) as raised, connection.begin():
                    with connection.begin_nested() if nested else contextlib.nullcontext():
                        connection.execute(sa.text("select nothing, :x from riding"), {"x": 1})
                texts[ours, nested] = str(raised.value)
                assert "BEGIN" not in texts[ours, nested]
                assert "SAVEPOINT" not in texts[ours, nested]
    assert texts[True, False] == texts[False, False]
    assert texts[True, True] == texts[False, True]


@both
def test_pool_pre_ping_works_all_the_same(engine_of: Callable[..., sa.Engine], look: Look) -> None:
    engine = engine_of(True, pool_pre_ping=True, pool_size=1, max_overflow=0)
    for _ in range(3):
        with engine.begin() as connection:
            assert connection.scalar(sa.text("select 1")) == 1
        look("select pg_terminate_backend(pid, 5000) from pg_stat_activity where datname = current_database()"
             " and pid <> pg_backend_pid()")  # fmt: skip


@both
def test_what_was_left_waiting_does_not_reach_the_next_user(engine_of: Callable[..., sa.Engine], wire: Wire) -> None:
    engine = engine_of(True, pool_size=1, max_overflow=0)
    for leave in ("SAVEPOINT a", "RELEASE SAVEPOINT a"):
        raw = engine.raw_connection()
        cursor = raw.cursor()
        if leave.startswith("RELEASE"):
            cursor.execute("SAVEPOINT a")
            cursor.execute("select 1")
        cursor.execute(leave)
        raw.close()
        with engine.connect() as connection:
            assert connection.scalar(sa.text("select 1")) == 1
            connection.commit()
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            assert connection.scalar(sa.text("select 1")) == 1


@psycopg2_only
def test_nothing_is_begun_where_nothing_is_sent(same: Callable[[Observe], Any]) -> None:
    """By executemany of no rows, values that cannot be adapted, a closed cursor; and a savepoint waits on."""
    insert = "insert into riding values (%s, 1)"

    def observe(w: Watch) -> None:
        for before in ([], ["SAVEPOINT a"]):
            for each in before:
                w.conn.cursor().execute(each)
            closed = w.conn.cursor()
            closed.close()
            w.note(
                w.outcome(lambda: w.conn.cursor().executemany(insert, [])),
                w.outcome(lambda: w.conn.cursor().executemany(insert, 1)),
                w.outcome(lambda: w.conn.cursor().executemany(insert, [(Unadaptable(),)]))["type"],
                w.outcome(lambda closed=closed: closed.execute("select 1")),
                w.outcome(lambda closed=closed: closed.executemany(insert, [(1,)])),
                w.outcome(lambda: setattr(w.conn, "autocommit", False)),
                w.conn.status,
            )
        w.do("insert into riding values (1, 1)")
        w.do("ROLLBACK TO SAVEPOINT a")
        w.call(w.conn.commit)

    same(observe)


@psycopg2_only
def test_a_cursor_class_of_the_users_sees_his_own_texts(same: Callable[[Observe], Any]) -> None:
    seen: list[Any] = []

    class Seeing(ext.cursor):
        def execute(self, query: Any, vars: Any = None) -> Any:
            seen.append(query)
            super().execute(query, vars)
            return self

    def observe(w: Watch) -> Any:
        del seen[:]
        for _ in range(2):
            w.conn.cursor().execute("SAVEPOINT a")
            w.note(w.conn.cursor(cursor_factory=Seeing).execute("select %s", (1,)).fetchall())
        w.conn.cursor(cursor_factory=Seeing).execute("SAVEPOINT b")
        w.do("insert into riding values (1, 1)")
        w.conn.cursor(cursor_factory=Seeing).execute("ROLLBACK TO SAVEPOINT b")
        w.call(w.conn.commit)
        return list(seen)

    assert same(observe) == ["select %s", "select %s", "SAVEPOINT b", "ROLLBACK TO SAVEPOINT b"]


@psycopg2_only
def test_a_commit_by_text_does_not_reach_the_next_user(engine_of: Callable[..., sa.Engine], look: Look) -> None:
    """psycopg2's status is then still that of a transaction, in which it would send no BEGIN."""
    look(TABLE)
    engine = engine_of(True, pool_size=1, max_overflow=0, pool_reset_on_return=None)
    raw = engine.raw_connection()
    raw.cursor().execute("select 1")
    raw.cursor().execute("commit")
    raw.close()
    with contextlib.suppress(ZeroDivisionError), engine.begin() as connection:
        connection.execute(sa.text("insert into riding values (1, 1)"))
        raise ZeroDivisionError
    assert look("select id from riding") == []


def test_what_waits_is_gone_in_autocommit(same: Callable[[Observe], Any]) -> None:
    def observe(w: Watch) -> Any:
        w.conn.cursor().execute("SAVEPOINT a")
        w.conn.rollback()
        w.conn.autocommit = True
        w.do("insert into riding values (1, 1)")
        w.conn.autocommit = False
        w.do("insert into riding values (2, 2)")
        w.do("ROLLBACK TO SAVEPOINT a")
        w.call(w.conn.rollback)

    same(observe)


@psycopg2_only
def test_the_limits_that_docs_state(connect: Connect, look: Look) -> None:
    """docs/connections.rst, "On psycopg2"."""
    look(TABLE)
    conn = connect(True)
    conn.cursor().execute("SAVEPOINT a")
    assert (conn.get_transaction_status(), conn.status) == (ext.TRANSACTION_STATUS_IDLE, ext.STATUS_BEGIN)
    conn.rollback()
    ext.cursor(conn).execute("insert into riding values (1, 1)")
    conn.rollback()
    conn.cursor().execute("insert into riding values (2, 2)")
    ext.cursor(conn).execute("insert into riding values (3, 3)")
    conn.lobject(0, "wb").write(b"x")
    assert conn.notices == [], "the log of the server only"
    conn.rollback()
    assert look("select id from riding") == [1]
    assert conn.get_transaction_status() == ext.TRANSACTION_STATUS_IDLE


# -- connections of the user's own ------------------------------------------------------------------------------------


class OwnConnection(ext.connection):
    pass


class OwnCursor(ext.cursor):
    """As many a cursor class does, it looks at the text of the statement."""

    def execute(self, query: Any, vars: Any = None) -> Any:
        assert isinstance(query, str)
        assert not query.startswith(("BEGIN", "COMMIT"))
        return super().execute(query.strip(), vars)


class OwnPsycopgCursor(psycopg.Cursor[Any]):
    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        assert isinstance(query, str)
        assert not query.startswith(("BEGIN", "COMMIT"))
        return super().execute(query.strip(), params, **options)


OWN = [
    ("psycopg2", "creator"),
    ("psycopg2", "connection_factory"),
    ("psycopg2", "cursor_factory"),
    ("psycopg", "creator"),
    ("psycopg", "cursor_factory"),
]


def own(driver: str, what: str, url: str) -> dict[str, Any]:
    if what == "creator":
        dsn = sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        return {"creator": lambda: psycopg2.connect(dsn) if driver == "psycopg2" else psycopg.connect(dsn)}
    value = {"connection_factory": OwnConnection, "cursor_factory": OwnCursor}[what]
    return {"connect_args": {what: OwnPsycopgCursor if driver == "psycopg" else value}}


@pytest.mark.parametrize(("driver", "what"), OWN, indirect=["driver"])
def test_own_connections_work_unaccelerated(
    driver: str, what: str, engine_of: Callable[..., sa.Engine], wire: Wire, database_url: str, look: Look,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    look(TABLE)
    url = wire.url(database_url)
    with caplog.at_level(logging.INFO, "fictive.engines"):
        engine = engine_of(True, url, **own(driver, what, url))
        for _ in range(2):
            engine.connect().close()
        others = [engine.connect() for _ in range(3)]
        for other in others:
            other.close()
    said = [record for record in caplog.records if record.name == "fictive.engines"]
    assert [record.levelno for record in said] == [logging.INFO], "said once"
    with wire.record() as log, engine.begin() as connection:
        connection.execute(sa.text("insert into riding values (1, 1)"))
        with pytest.raises(sa.exc.IntegrityError), connection.begin_nested():
            connection.execute(sa.text("insert into riding values (1, 1)"))
        with connection.begin_nested():
            connection.execute(sa.text("insert into riding values (2, 2)"))
    assert verbs(log)[0] == "BEGIN"
    assert "BEGIN+INSERT" not in messages(log)
    assert look("select id from riding order by id") == [1, 2]
    with engine.connect() as connection:
        assert isinstance(connection.connection.cursor(), OwnCursor | OwnPsycopgCursor) or "cursor" not in what
        assert isinstance(connection.connection.dbapi_connection, OwnConnection) or what != "connection_factory"


@both
def test_nothing_is_said_of_connections_that_carry(
    engine_of: Callable[..., sa.Engine], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fictive.engines"):
        engine_of(True).connect().close()
    assert caplog.records == []


@both
@pytest.mark.parametrize("creator", [False, True])
def test_connections_made_before_are_replaced(
    creator: bool, driver: str, engine_of: Callable[..., sa.Engine], wire: Wire, database_url: str, look: Look,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Those in the pool and those that are out. With a creator it is done once, and said once."""
    look(TABLE)
    url = wire.url(database_url)
    engine = engine_of(False, url, pool_size=2, max_overflow=0, **(own(driver, "creator", url) if creator else {}))
    first, second = engine.connect(), engine.connect()
    second.close()
    old = {first.connection.dbapi_connection}
    with caplog.at_level(logging.INFO, "fictive.engines"):
        prepare(engine)
        assert first.scalar(sa.text("select 1")) == 1, "what is out goes on"
        first.close()
        for _ in range(2):
            with engine.connect() as one, engine.connect() as other:
                assert not old & {one.connection.dbapi_connection, other.connection.dbapi_connection}
                found = {one.connection.dbapi_connection, other.connection.dbapi_connection}
    assert len([record for record in caplog.records if record.name == "fictive.engines"]) == int(creator)
    with wire.record() as log, engine.begin() as connection:
        connection.execute(sa.text("insert into riding values (1, 1)"))
        assert connection.connection.dbapi_connection in found, "replaced once"
    assert log.round_trips == (3 if creator else 2)
    assert look("select id from riding") == [1]


def test_pg8000_is_left_alone(
    pg: postgres.Server, database_name: str, look: Look, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("pg8000")
    look(TABLE)
    engine = sa.create_engine(pg.url(database_name, driver="pg8000"))
    prepare(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("insert into riding values (1, 1)"))
        with pytest.raises(sa.exc.DBAPIError), connection.begin_nested():
            connection.execute(sa.text("select nothing"))
        dbapi = connection.connection.dbapi_connection
        assert type(dbapi).__module__.startswith("pg8000")
        assert driver_for(engine.dialect).is_accelerated(dbapi) is None
    engine.dispose()
    assert look("select id from riding") == [1]


# -- riding.py by itself ----------------------------------------------------------------------------------------------


@pytest.fixture
def clean() -> Iterator[None]:
    before = set(riding._parsed)
    riding._parsed.clear()
    yield
    riding._parsed.clear()
    riding._parsed.update(before)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("SAVEPOINT a", ("SAVEPOINT", "a")),
        ("SAVEPOINT sa_savepoint_1", ("SAVEPOINT", "sa_savepoint_1")),
        ('SAVEPOINT "a b"', ("SAVEPOINT", '"a b"')),
        ('SAVEPOINT "a""b"', ("SAVEPOINT", '"a""b"')),
        ("RELEASE SAVEPOINT a", ("RELEASE", "a")),
        ("RELEASE a", ("RELEASE", "a")),
        ("ROLLBACK TO SAVEPOINT a", ("ROLLBACK TO", "a")),
        ("ROLLBACK TO a", ("ROLLBACK TO", "a")),
        ("ROLLBACK", None),
        ("ROLLBACK TO SAVEPOINT a; select 1", None),
        ("SAVEPOINT a; insert into t values (1)", None),
        ("SAVEPOINT", None),
        ("SELECT 1", None),
        ("REINDEX TABLE a", None),
        ("", None),
        (b"SAVEPOINT a", None),
        (None, None),
        (psycopg2.sql.SQL("SAVEPOINT a"), None),
    ],
)
def test_parse_control(query: Any, expected: Any) -> None:
    assert riding.parse_control(query) == expected


@pytest.mark.parametrize(
    ("text", "alone"),
    [
        ("", True), (" ; -- x", True), ("/* a */ -- b\n;", True), ("/* a /* b */ c */ select 1", True),
        ("/* a */ select 1", False), ("-- a\nselect 1", False), ("select 1;", False), ("- 1", True),
        ("commit", True), ("/* x */ End", True), ("prepare p as select 1", True), ("committed", False),
        ("select case when true then 1 end", False), ("select 1; commit", True), ("select 1; select 2", False),
        ("select ';' || 'the end'", True), ("/* unclosed", True), ("rollback to a", True),
        ("DO $a$begin; end$a$", False), ("DO $$begin; end$$; commit; DO $$begin; end$$", True),
        ("DO $a$begin; end$a$; commit", True), ("do $a$begin; end$a$ -- ; commit\n", True),
    ],
)  # fmt: skip
def test_goes_alone(text: str, alone: bool) -> None:
    assert riding.goes_alone(text) is alone


@pytest.mark.usefixtures("clean")
class TestWaiting:
    def waiting(self, *commands: str) -> riding.Waiting:
        waiting = riding.Waiting()
        for command in commands:
            waiting.add(command)
        return waiting

    def test_nothing(self) -> None:
        waiting = riding.Waiting()
        assert not waiting
        assert waiting.riders(None, "select 1") == ([], [])
        assert waiting.riders("BEGIN", "select 1") == ([], ["BEGIN"])
        assert waiting.with_commit() == []
        assert waiting.all(None) == []
        assert waiting.all("BEGIN") == ["BEGIN"]

    def test_with_begin_all_rides_with_any_statement(self) -> None:
        waiting = self.waiting("SAVEPOINT a", "SAVEPOINT b")
        assert waiting.riders("BEGIN", "never seen") == ([], ["BEGIN", "SAVEPOINT a", "SAVEPOINT b"])
        assert not waiting

    def test_within_a_transaction_a_savepoint_rides_with_what_was_parsed(self) -> None:
        assert self.waiting("SAVEPOINT a").riders(None, "never seen") == (["SAVEPOINT a"], [])
        riding.parsed("seen")
        assert self.waiting("SAVEPOINT a").riders(None, "seen") == ([], ["SAVEPOINT a"])
        assert self.waiting("SAVEPOINT a").riders(None, b"seen") == (["SAVEPOINT a"], [])

    def test_release_waits_for_a_savepoint_or_commit(self) -> None:
        waiting = riding.Waiting()
        waiting.sent(["BEGIN", "SAVEPOINT sa_savepoint_1"])
        assert waiting.release("sa_savepoint_1") is False
        assert waiting
        assert waiting.riders(None, "select 1") == ([], [])
        assert waiting
        riding.parsed("select 1")
        assert waiting.riders(None, "select 1") == ([], [])
        waiting.add("SAVEPOINT sa_savepoint_2")
        before, together = waiting.riders(None, "select 1")
        assert (before, together) == ([], ["RELEASE SAVEPOINT sa_savepoint_1", "SAVEPOINT sa_savepoint_2"])
        waiting.sent(together)
        assert waiting.release("sa_savepoint_2") is False
        assert waiting.with_commit() == ["RELEASE SAVEPOINT sa_savepoint_2"]
        assert not waiting

    def test_a_name_of_the_users_is_released_at_once(self) -> None:
        waiting = riding.Waiting()
        waiting.sent(["SAVEPOINT a"])
        assert waiting.release("a") is True
        assert waiting.release("unknown") is True

    def test_a_savepoint_never_sent_is_never_released(self) -> None:
        waiting = self.waiting("SAVEPOINT a", "SAVEPOINT b")
        waiting.release("a")
        assert not waiting

    def test_an_inner_one_never_sent(self) -> None:
        waiting = self.waiting("SAVEPOINT a", "SAVEPOINT b")
        waiting.release("b")
        assert waiting.all(None) == ["SAVEPOINT a"]

    @pytest.mark.parametrize(("name", "left"), [("a", ["SAVEPOINT a"]), ("sa_savepoint_1", [])])
    def test_roll_back_to_one_never_sent(self, name: str, left: list[str]) -> None:
        waiting = self.waiting(f"SAVEPOINT {name}", "SAVEPOINT inner")
        assert waiting.roll_back_to(name) is False
        assert waiting.all(None) == left

    def test_roll_back_to_one_that_was_sent(self) -> None:
        waiting = self.waiting("SAVEPOINT inner")
        waiting.sent(["SAVEPOINT sent"])
        assert waiting.roll_back_to("unknown") is True
        assert waiting
        assert waiting.roll_back_to("sent") is True
        assert not waiting

    def test_commit_forgets_savepoints_in_which_nothing_was_done(self) -> None:
        waiting = self.waiting("SET LOCAL lock_timeout = '5s'", "SAVEPOINT a")
        assert waiting.with_commit() == []
        assert not waiting

    def test_clear(self) -> None:
        waiting = self.waiting("SAVEPOINT a")
        waiting.clear()
        assert not waiting

    def test_the_innermost_of_two_of_one_name_is_meant(self) -> None:
        waiting = self.waiting("SAVEPOINT a", "SAVEPOINT a")
        waiting.release("a")
        assert waiting.all(None) == ["SAVEPOINT a"]

    def test_set_local_waits_for_the_next_statement_behind_a_release(self) -> None:
        waiting = riding.Waiting()
        waiting.sent(["SAVEPOINT sa_savepoint_1"])
        waiting.release("sa_savepoint_1")
        waiting.add("SET LOCAL lock_timeout = '5s'")
        before = ["RELEASE SAVEPOINT sa_savepoint_1", "SET LOCAL lock_timeout = '5s'"]
        assert waiting.riders(None, "new") == (before, [])

    def test_again(self) -> None:
        begin = ["BEGIN", "SAVEPOINT a"]
        assert riding.again(begin, idle=True, has_position=True) == begin
        assert riding.again(begin, idle=False, has_position=True) == ["ROLLBACK", *begin]
        assert riding.again(begin, idle=False, has_position=False) is None
        inside = ["RELEASE SAVEPOINT x", "SAVEPOINT a", "SAVEPOINT b"]
        assert riding.again(inside, idle=False, has_position=True) == ["ROLLBACK TO SAVEPOINT a", "SAVEPOINT b"]
        assert riding.again(inside, idle=False, has_position=False) is None
        assert riding.again(["SET LOCAL a = 1"], idle=False, has_position=True) is None

    def test_what_is_remembered_is_bounded(self) -> None:
        for number in range(riding._MOST_PARSED + 5):
            riding.parsed(str(number))
        assert len(riding._parsed) <= riding._MOST_PARSED
        assert riding.is_parsed(str(riding._MOST_PARSED + 4))

"""The names of constraints and indexes are those that PostgreSQL gives (rule I2)."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.schema import CreateIndex

from fictive.errors import ConfigurationError
from fictive.models import check_names, naming_convention

Look = Callable[..., list[Any]]
C = Callable[[Any], Any]

EXPRESSIONS: dict[str, C] = {
    "a function": lambda c: sa.func.lower(c.email),
    "in capitals": lambda c: sa.func.LOWER(c.email),
    "of a schema": lambda c: sa.func.pg_catalog.lower(c.email),
    "of a function": lambda c: sa.func.lower(sa.func.btrim(c.email)),
    "with an argument": lambda c: sa.func.left(c.email, 3),
    "coalesce": lambda c: sa.func.coalesce(c.email, ""),
    "nullif": lambda c: sa.func.nullif(c.email, ""),
    "greatest": lambda c: sa.func.greatest(c.n, 3),
    "trim": lambda c: sa.func.trim(c.email),
    "ltrim": lambda c: sa.func.ltrim(c.email),
    "substring": lambda c: sa.func.substring(c.email, 1, 2),
    "extract": lambda c: sa.extract("year", c.at),
    "date_part": lambda c: sa.func.date_part("year", c.at),
    "date_trunc": lambda c: sa.func.date_trunc("day", c.at),
    "timezone": lambda c: c.zoned.op("AT TIME ZONE")("UTC"),
    "descending": lambda c: c.email.desc(),
    "nulls first": lambda c: sa.func.lower(c.email).desc().nulls_first(),
    "collation": lambda c: c.email.collate("C"),
    "collation of a function": lambda c: sa.func.lower(c.email).collate("C"),
    "concatenation": lambda c: c.email + "x",
    "sum": lambda c: c.n + 1,
    "negative": lambda c: -c.n,
    "not": lambda c: ~c.flag,
    "is null": lambda c: c.email.is_(None),
    "and": lambda c: sa.and_(c.flag, c.n > 3),
    "comparison": lambda c: c.n > 3,
    "in": lambda c: c.n.in_([1, 2]),
    "json": lambda c: c.data["k"].astext,
    "json object": lambda c: c.json["k"].astext,
    "json path": lambda c: c.data[("a", "b")].astext,
    "json cast": lambda c: c.data["k"].astext.cast(sa.Integer),
    "array": lambda c: c.tags[1],
    "array constructor": lambda c: pg.array([c.n, c.n]),
    "cast of a column": lambda c: sa.cast(c.n, sa.BigInteger),
    "cast of a sum": lambda c: sa.cast(c.n + 1, sa.BigInteger),
    "cast to integer": lambda c: sa.cast(c.n + 1, sa.Integer),
    "cast to numeric": lambda c: sa.cast(c.n + 1, sa.Numeric(10, 2)),
    "cast to float": lambda c: sa.cast(c.n + 1, sa.Float),
    "cast to double": lambda c: sa.cast(c.n + 1, sa.Double),
    "cast to text": lambda c: sa.cast(c.n + 1, sa.Text),
    "cast to varchar": lambda c: sa.cast(c.n + 1, sa.String(10)),
    "cast to char": lambda c: sa.cast(c.n + 1, sa.CHAR(10)),
    "cast to boolean": lambda c: sa.cast(c.n + 1, sa.Boolean),
    "cast to uuid": lambda c: sa.cast(c.data["k"].astext, sa.Uuid),
    "cast to jsonb": lambda c: sa.cast(c.data["k"].astext, pg.JSONB),
    "cast to an array": lambda c: sa.cast(c.tags + c.tags, pg.ARRAY(sa.BigInteger)),
    "cast of a function": lambda c: sa.cast(sa.func.lower(c.email), sa.String(3)),
    "type_coerce": lambda c: sa.type_coerce(c.email, sa.Text),
    "type_coerce of a function": lambda c: sa.type_coerce(sa.func.lower(c.email), sa.Text),
    "case": lambda c: sa.case((c.flag, 1), else_=2),
    "case with a column": lambda c: sa.case((c.flag, 1), else_=c.n),
    "case without else": lambda c: sa.case((c.flag, 1)),
    "text: column": lambda c: sa.text("email"),
    "text: quoted column": lambda c: sa.text('"Mixed Case" DESC'),
    "text: function": lambda c: sa.text("lower(email)"),
    "text: function and ending": lambda c: sa.text("lower(email) text_pattern_ops DESC NULLS LAST"),
    "text: bracket": lambda c: sa.text("(lower(email))"),
    "text: sum": lambda c: sa.text("(n + 1)"),
    "text: two functions": lambda c: sa.text("(lower(email) || upper(email))"),
    "text: brackets within": lambda c: sa.text("coalesce(lower(email), ')')"),
    "text: cast": lambda c: sa.text("((n + 1)::bigint)"),
    "text: cast of a column": lambda c: sa.text("(n::bigint)"),
    "text: cast function": lambda c: sa.text("(cast(n + 1 as double precision))"),
    "text: case": lambda c: sa.text("(case when flag then 1 else 2 end)"),
    "text: case with a column": lambda c: sa.text("(case when flag then 1 else n end)"),
    "text: case without else": lambda c: sa.text("(case when flag then 1 end)"),
    "text: array": lambda c: sa.text("(ARRAY[n, n])"),
    "text: not": lambda c: sa.text("(not flag)"),
    "text: json": lambda c: sa.text("(data ->> 'k')"),
    "literal_column": lambda c: sa.literal_column("lower(email)"),
}


@pytest.fixture(scope="module")
def engine(pg_: Any) -> Iterator[sa.Engine]:
    engine = sa.create_engine(pg_, poolclass=sa.NullPool)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def pg_(pg: Any) -> str:
    return str(pg.url("postgres", driver="psycopg2"))


def columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("email", sa.Text), sa.Column("n", sa.Integer), sa.Column("flag", sa.Boolean),
        sa.Column("at", sa.DateTime), sa.Column("zoned", sa.DateTime(timezone=True)), sa.Column("data", pg.JSONB),
        sa.Column("json", pg.JSON), sa.Column("tags", pg.ARRAY(sa.Integer)), sa.Column("Mixed Case", sa.Text),
    ]  # fmt: skip


def _attached(index: sa.Index, table: sa.Table) -> sa.Index:
    """Of text alone SQLAlchemy does not see the table."""
    if index.table is None:
        table.append_constraint(index)  # type: ignore[arg-type]
    return index


def both(engine: sa.Engine, table: str, add: Callable[[sa.Table], list[sa.Index]]) -> tuple[list[str], list[str]]:
    """The names of the indexes that we give, and those that PostgreSQL does, in the order in which they are made."""
    named = sa.Table(table, sa.MetaData(naming_convention=naming_convention("postgresql")), *columns())
    ours = [str(_attached(index, named).name) for index in add(named)]
    with engine.connect() as connection, connection.begin() as transaction:
        made = sa.Table(table, sa.MetaData(), *columns(), prefixes=["TEMPORARY"])
        made.create(connection)
        theirs: list[str] = []
        for number, index in enumerate(add(made)):
            _attached(index, made).name = f"unnamed_{number}"
            sql = str(CreateIndex(index).compile(connection)).replace(f"unnamed_{number} ", "")
            if re.search(r"\((NOT|CASE|ARRAY)\b", sql):  # which SQLAlchemy leaves without the brackets they need
                sql = sql.replace("(", "((", 1) + ")"
            connection.exec_driver_sql(sql)
            found = connection.scalars(
                sa.text("select relname from pg_class where relkind = 'i' and oid in"
                        " (select indexrelid from pg_index where indrelid = cast(:name as regclass)) order by oid"),
                {"name": f'"{table}"'},
            ).all()  # fmt: skip
            theirs = list(found)
        transaction.rollback()
    return ours, theirs


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_i2_an_index_on_an_expression(name: str, engine: sa.Engine) -> None:
    ours, theirs = both(engine, "i_users", lambda table: [sa.Index(None, EXPRESSIONS[name](table.c))])
    assert ours == theirs


lower = sa.func.lower
LONG = "a_table_whose_name_is_so_long_that_something_has_to_be_left_out"


@pytest.mark.parametrize(
    ("table", "add"),
    [
        ("i_users", lambda t: [sa.Index(None, t.c.email), sa.Index(None, t.c.email, postgresql_where=t.c.flag)]),
        ("i_users", lambda t: [sa.Index(None, lower(t.c.email)), sa.Index(None, lower(t.c["Mixed Case"]))]),
        ("i_users", lambda t: [sa.Index(None, lower(t.c.email), lower(t.c["Mixed Case"]), t.c.n + 1, t.c.n + 2)]),
        ("i_users", lambda t: [sa.Index(None, t.c.email, postgresql_include=["n", "flag"])]),
        ("i_users", lambda t: [sa.Index(None, t.c.email, unique=True), sa.Index(None, t.c.email, lower(t.c.email))]),
        (LONG, lambda t: [sa.Index(None, t.c.email), sa.Index(None, t.c.email), sa.Index(None, lower(t.c.email))]),
        (LONG[:40], lambda t: [sa.Index(None, t.c.email, t.c["Mixed Case"], t.c.flag, t.c.data, t.c.zoned)]),
        ("t" + "ü" * 31, lambda t: [sa.Index(None, t.c.email)]),
        ("Order Lines", lambda t: [sa.Index(None, t.c["Mixed Case"])]),
    ],
)  # fmt: skip
def test_i2_several_indexes_and_long_names(table: str, add: Any, engine: sa.Engine) -> None:
    ours, theirs = both(engine, table, add)
    assert ours == theirs
    assert len(set(ours)) == len(ours)


def schema(metadata: sa.MetaData) -> None:
    sa.Table(
        LONG, metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("email", sa.Text, unique=True),
        sa.Column("other", sa.ForeignKey(f"{LONG}.id")), sa.Column("span", pg.INT4RANGE),
        sa.UniqueConstraint("email", "other"),
        sa.ForeignKeyConstraint(["other"], [f"{LONG}.id"]),
        pg.ExcludeConstraint(("span", "&&")),
    )  # fmt: skip
    sa.Table(
        "i_short", metadata, sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("email", sa.Text, unique=True), sa.UniqueConstraint("email", postgresql_include=["id"]),
        pg.ExcludeConstraint((sa.func.int4range(0, sa.column("id"), type_=pg.INT4RANGE), "&&")),
    )  # fmt: skip


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_i2_constraints(database_url: str, look: Look) -> None:
    engine = sa.create_engine(database_url, poolclass=sa.NullPool)
    found = []
    for metadata in (sa.MetaData(), sa.MetaData(naming_convention=naming_convention("postgresql"))):
        schema(metadata)
        metadata.create_all(engine)
        found.append(look(
            "select c.relname, k.conname from pg_constraint k join pg_class c on c.oid = k.conrelid"
            " where k.contype <> 'n' and c.relname ~ 'i_short|a_table' order by 1, 2"
        ))  # fmt: skip
        metadata.drop_all(engine)
    assert found[0] == found[1]
    check_names(metadata)


def test_i2_the_convention_can_be_copied_and_pickled() -> None:
    metadata = sa.MetaData(naming_convention=naming_convention("postgresql"))
    schema(metadata)
    copied = sa.MetaData(naming_convention=copy.copy(metadata.naming_convention))
    for table in metadata.tables.values():
        table.to_metadata(copied)
    check_names(copied)
    assert pickle.loads(pickle.dumps(metadata)).tables.keys() == metadata.tables.keys()


def test_i2_two_of_one_name_are_found() -> None:
    metadata = sa.MetaData(naming_convention=naming_convention("postgresql"))
    sa.Table("a", metadata, sa.Column("b_c", sa.Integer, index=True))
    sa.Table("a_b", metadata, sa.Column("c", sa.Integer, index=True))
    sa.Table("x", metadata, sa.Column("b_c", sa.Integer, index=True), schema="other")
    with pytest.raises(
        ConfigurationError, match=r"a_b_c_idx is the name of several: a: Index\(b_c\); a_b: Index\(c\)"
    ):
        check_names(metadata)
    metadata = sa.MetaData(naming_convention=naming_convention("prefixed"))
    table = sa.Table("t", metadata, sa.Column("n", sa.Integer, index=True), sa.Column("ix_t_n", sa.Integer))
    sa.Index(None, sa.func.abs(table.c.n))
    sa.Table("ix_t_n", metadata, sa.Column("n", sa.Integer))
    with pytest.raises(ConfigurationError, match=r"ix_t_n is the name of several: ix_t_n: Table; t: Index\(n\); t: I"):
        check_names(metadata)
    metadata = sa.MetaData()
    sa.Table(
        "t", metadata, sa.Column("n", sa.Integer), sa.CheckConstraint("n > 0", name="a"),
        sa.CheckConstraint(sa.column("n") > 1, name="a"), sa.UniqueConstraint("n", name="u"),
    )  # fmt: skip
    sa.Table("u", metadata, sa.Column("n", sa.Integer), sa.CheckConstraint("n > 0", name="a"))
    with pytest.raises(ConfigurationError) as caught:
        check_names(metadata)
    assert "a is the name of several: t: CheckConstraint(); t: CheckConstraint(n)" in str(caught.value)
    assert "u is the name of several: t: UniqueConstraint(n); u: Table" in str(caught.value)

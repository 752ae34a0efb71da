"""Which unique key a lookup goes by (rules D4, D5, D6), and the statements that follow. Nothing is sent."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import DeclarativeBase, Mapped, composite, mapped_column, relationship, synonym

from fictive.errors import UnknownAttribute, UnsavedObject
from fictive.rows import lookups
from fictive.rows.get_or_create_sql import insert_unless_there, lock_lookup, upsert
from fictive.rows.lookups import Lookup
from fictive.rows.new_objects import check_names
from fictive.rows.unique_keys import UniqueKey

PARTIAL = sa.text("deleted_at IS NULL")


DIALECT = postgresql.dialect()


class Base(DeclarativeBase):
    pass


def lookup_of(mapper: Any, filter_by: dict[str, Any]) -> Lookup:
    return lookups.lookup_of(mapper, filter_by, DIALECT)


def key_for(lookup: Lookup) -> UniqueKey | None:
    return lookup.key("postgresql")


class Point:
    def __init__(self, x: int | None, y: int | None) -> None:
        self.x, self.y = x, y

    def __repr__(self) -> str:
        return f"Point({self.x}, {self.y})"

    def __composite_values__(self) -> tuple[int | None, int | None]:
        return self.x, self.y


class Place(Base):
    __tablename__ = "place"
    id: Mapped[int] = mapped_column(primary_key=True)
    code: Mapped[str | None] = mapped_column("the code", unique=True)
    a: Mapped[int | None]
    b: Mapped[int | None]
    c: Mapped[int | None]
    booked: Mapped[int] = mapped_column()
    active: Mapped[bool]
    state: Mapped[str | None]
    deleted_at: Mapped[str | None]
    word: Mapped[str | None]
    title: Mapped[str | None]
    x: Mapped[int]
    y: Mapped[int]
    big: Mapped[int] = mapped_column(sa.Computed("a * 2"))
    at: Mapped[Point] = composite("x", "y")
    other_id: Mapped[int | None] = mapped_column(sa.ForeignKey("place.id"))
    other: Mapped[Place | None] = relationship(remote_side=[id], back_populates="others")
    others: Mapped[list[Place]] = relationship(back_populates="other")
    name = synonym("code")

    @hybrid_property
    def folded(self) -> str:
        return (self.word or "").lower()

    @folded.inplace.expression
    @classmethod
    def _folded(cls) -> Any:
        return sa.func.lower(cls.word)

    @hybrid_property
    def alias(self) -> str | None:
        return self.code

    @property
    def shown(self) -> str:
        return "x"

    __table_args__ = (
        sa.UniqueConstraint("a", "b"),
        sa.UniqueConstraint("c", postgresql_nulls_not_distinct=True),
        sa.UniqueConstraint("booked", deferrable=True, initially="DEFERRED"),
        sa.UniqueConstraint("x", "y", "other_id"),
        sa.Index("ux_word", sa.text("lower(word) desc"), unique=True),
        sa.Index("ux_opaque", sa.text("upper(title)"), unique=True),
        sa.Index("not_unique", "active"),
    )


table = Place.__table__
sa.Index("ux_title_live", table.c.title, unique=True, postgresql_where=PARTIAL)
sa.Index("ux_title_active", table.c.title, unique=True, postgresql_where=table.c.active)
sa.Index("ux_title_gone", table.c.title, unique=True, postgresql_where=~table.c.active & (table.c.a >= 10))
sa.Index("ux_title_state", table.c.title, unique=True, postgresql_where=table.c.state.in_(["new", "old"]))
sa.Index("ux_z_state", sa.func.coalesce(table.c.state, ""), table.c.title, unique=True)


def target(**lookup: Any) -> list[str] | None:
    """The conflict target of a lookup, as SQL."""
    key = key_for(lookup_of(sa.inspect(Place), lookup))
    plan = lookups.plan_of(sa.inspect(Place), lookup, DIALECT)
    assert plan is None or plan.key(lookup) == key
    if key is None:
        return None
    parts = [*key.elements, *([] if key.where is None else [key.where])]
    options = {"literal_binds": True, "include_table": False}
    return [str(part.compile(dialect=postgresql.dialect(), compile_kwargs=options)) for part in parts]


@pytest.mark.parametrize(
    ("lookup", "found"),
    [
        ({"id": 1}, ["id"]),
        ({"code": "x"}, ['"the code"']),
        ({"name": "x"}, ['"the code"']),  # a synonym
        ({"alias": "x"}, ['"the code"']),  # a hybrid that is a column
        ({"code": "x", "title": "y"}, ['"the code"']),
        ({"code": None}, None),  # NULLs are distinct
        ({"a": 1, "b": 2}, ["a", "b"]),
        ({"a": 1}, None),
        ({"a": 1, "b": None}, None),
        ({"c": 1}, ["c"]),
        ({"c": None}, ["c"]),  # NULLS NOT DISTINCT
        ({"booked": 1}, None),  # deferrable
        ({"active": True}, None),  # an index, and not unique
        ({"at": Point(1, 2), "other_id": 3}, ["x", "y", "other_id"]),
        ({"title": "t"}, None),
        ({"title": "t", "deleted_at": None}, ["title", "deleted_at IS NULL"]),
        ({"title": "t", "deleted_at": "now"}, None),
        ({"title": "t", "active": True}, ["title", "active"]),
        ({"title": "t", "active": False}, None),
        ({"title": "t", "active": False, "a": 10}, ["title", "NOT active AND a >= 10"]),
        ({"title": "t", "active": False, "a": 9}, None),
        ({"title": "t", "state": "old"}, ["title", "state IN ('new', 'old')"]),
        ({"title": None, "state": "old"}, None),
        ({"title": "t", "state": None}, ["coalesce(state, '')", "title"]),
    ],
    ids=str,
)
def test_d4_the_key_of_a_lookup(lookup: dict[str, Any], found: list[str] | None) -> None:
    assert target(**lookup) == found


def test_d4_an_expression() -> None:
    class Named(Base):
        __tablename__ = "named"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

        @hybrid_property
        def folded(self) -> str:
            return self.name.lower()

        @folded.inplace.expression
        @classmethod
        def _folded(cls) -> Any:
            return sa.func.lower(cls.name)

    mapper = sa.inspect(Named)
    sa.Index("ux_named", sa.func.lower(Named.__table__.c.name).desc(), unique=True)
    for lookup in ({"name": "X"}, {"folded": "x"}):
        key = key_for(lookup_of(mapper, lookup))
        assert key is not None
        statement = insert_unless_there(mapper, {Named.__table__.c.name: "X"}, key, "postgresql")
        assert "ON CONFLICT ((lower(name))) DO NOTHING" in str(statement.compile(dialect=postgresql.dialect()))
    sa.Index("ux_nullif", sa.func.nullif(Named.__table__.c.name, ""), unique=True)  # NULL may come of it
    Named.__table__.indexes = {index for index in Named.__table__.indexes if index.name == "ux_nullif"}
    assert key_for(lookup_of(mapper, {"name": "X"})) is None


def test_d4_values_in_the_target_are_in_the_text() -> None:
    mapper = sa.inspect(Place)
    lookup = lookup_of(mapper, {"title": "t", "state": None})
    key = key_for(lookup)
    assert key is not None
    statement = insert_unless_there(mapper, {table.c.title: "t"}, key, "postgresql")
    text = str(statement.compile(dialect=postgresql.dialect()))
    assert "ON CONFLICT ((coalesce(state, '')), title) DO NOTHING RETURNING" in text


def test_d7_key_columns_are_not_set() -> None:
    lookup = lookup_of(sa.inspect(Place), {"code": "x"})
    key = key_for(lookup)
    assert key is not None
    values = {table.c["the code"]: "x", table.c.a: 1}
    text = str(upsert(lookup, values, {table.c.a: 1}, key, DIALECT).compile(dialect=postgresql.dialect()))
    setting = text.split("DO UPDATE SET ")[1].split(" WHERE ")[0]
    assert setting == "a = excluded.a"


def test_d5_the_lock_is_of_the_table_and_the_names() -> None:
    def lock(**lookup: Any) -> str:
        statement = lock_lookup(lookup_of(sa.inspect(Place), lookup), DIALECT)
        return str(statement.compile(dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True}))

    assert lock(a=1, b=2) == lock(b=2, a=1)
    assert lock(a=1) != lock(b=1)
    assert "hash_record_extended(row(CAST(1 AS INTEGER), CAST(2 AS INTEGER))" in lock(a=1, b=2)


@pytest.mark.parametrize(
    ("lookup", "message"),
    [
        ({"cod": "x"}, "no attribute 'cod', which the lookup names; did you mean 'code'"),
        ({"zzz": 1}, "It has: .* active, alias,"),
        ({"shown": "x"}, "Place.shown in the lookup is not a mapped column"),
        ({"others": []}, "Place.others in the lookup is not a mapped column"),
        ({"metadata": 1}, "not a mapped column"),
    ],
    ids=str,
)
def test_d6_names_that_cannot_be_looked_up(lookup: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownAttribute, match=message):
        lookup_of(sa.inspect(Place), lookup)


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"titel": "x"}, "defaults names; did you mean 'title'"),
        ({"folded": "x"}, "Place.folded in defaults is not a mapped column"),
        ({"others": []}, "Place.others in defaults is a collection"),
        ({"big": 1}, "Place.big in defaults is a generated column"),
        ({"code": "y"}, "Place.code is in the lookup"),
    ],
    ids=str,
)
def test_d6_names_that_cannot_be_stored(defaults: dict[str, Any], message: str) -> None:
    lookup = lookup_of(sa.inspect(Place), {"code": "x"})
    with pytest.raises(UnknownAttribute, match=message):
        check_names(lookup.mapper, defaults, "defaults", ["code"])


def test_d6_related_objects() -> None:
    mapper = sa.inspect(Place)
    with pytest.raises(UnsavedObject, match=r"Place\.other in the lookup is a Place that is not saved"):
        lookup_of(mapper, {"other": Place()})
    with pytest.raises(TypeError, match=r"Place\.other in the lookup is a Place, not 3"):
        lookup_of(mapper, {"other": 3})
    assert lookup_of(mapper, {"other": None}).columns == {table.c.other_id: None}
    with pytest.raises(TypeError, match="at least one attribute"):
        lookup_of(mapper, {})

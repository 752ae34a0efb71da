"""Rule A31: every way of writing works on every kind of relation that takes it, and writes where it should."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fictive.errors import ConfigurationError
from fictive.rows.bulk import Upserted, insert_many, update_many, upsert_many
from fictive.rows.find_or_create import get_or_create, update_or_create
from fictive.session.session import OptInSession

Look = Callable[..., list[Any]]
COLUMNS = "id serial primary key, k int not null unique, v text, n int default 0"
PARTS = "id serial, k int not null unique, v text, n int default 0"
RANGE = "for values from (-1000000) to (1000000)"
# the statements that make a relation called r; `role` stands for one that owns nothing
RELATIONS: dict[str, str] = {
    "plain": f"create table r ({COLUMNS})",
    "partitioned": f"create table r ({PARTS}) partition by range (k); create table r1 partition of r {RANGE}",
    "partition": f"create table p ({PARTS}) partition by range (k); create table r partition of p {RANGE}",
    "view": f"create table t ({COLUMNS}); create view r as select * from t; alter view r alter n set default 0",
    "row security": f"create table r ({COLUMNS}); alter table r enable row level security;"
    "create policy p on r using (k > -1000); grant all on all tables in schema public to role;"
    "grant all on all sequences in schema public to role",
    "inherits": f"create table p ({COLUMNS}); create table r () inherits (p); create unique index on r (k)",
    "inherited": f"create table r ({COLUMNS}); create table c () inherits (r)",
    "privileges on columns": f"create table r ({COLUMNS}); grant usage on sequence r_id_seq to role;"
    "grant select (id, k, v, n), insert (k, v, n), update (v, n) on r to role",
    "without temporary": f"create table r ({COLUMNS}); grant all on r, r_id_seq to role;"
    "revoke temporary on database current from public",
    "unlogged": f"create unlogged table r ({COLUMNS})",
    "in another schema": f"create schema ten1; create table ten1.r ({COLUMNS}); create table r (id int)",
    "translated": f"create schema ten1; create table ten1.r ({COLUMNS}); create table r ({COLUMNS})",
    "on the search path": f"create schema ten1; create table ten1.r ({COLUMNS}); create table r ({COLUMNS})",
    "temporary": f"create temporary table r ({COLUMNS})",
    "with rules": f"create table r ({COLUMNS}); create rule u as on delete to r where old.k = 999 do also select 1",
    "with a trigger": f"create table r ({COLUMNS}); create function f() returns trigger language plpgsql as"
    " 'begin return new; end'; create trigger g before insert or update on r for each row execute function f()",
}


@pytest.fixture
def role(look: Look) -> Iterator[str]:
    name = f"rows_{uuid.uuid4().hex[:8]}"
    look(f"create role {name}")
    look(f"grant usage on schema public to {name}")
    yield name
    look(f"drop owned by {name}")
    look(f"drop role {name}")


def _model(schema: str | None, unique: bool | None = True) -> Any:
    class Base(DeclarativeBase):
        pass

    class R(Base):
        __tablename__ = "r"
        __table_args__ = {"schema": schema}
        id: Mapped[int] = mapped_column(primary_key=True)
        k: Mapped[int] = mapped_column(unique=unique)
        v: Mapped[str | None]
        n: Mapped[int] = mapped_column(default=0)

    R.__table__.c.n.onupdate = sa.ColumnDefault(R.__table__.c.n + 1, for_update=True)  # type: ignore[attr-defined]
    return R


def _rows(count: int, v: str, first: int = 0) -> list[dict[str, Any]]:
    return [{"k": k, "v": v} for k in range(first, first + count)]


@pytest.mark.parametrize("kind", RELATIONS)
def test_a31_every_way_on_every_relation(kind: str, database_url: str, look: Look, role: str) -> None:
    R = _model("ten1" if kind == "in another schema" else None)
    made = RELATIONS[kind].replace("to role", f"to {role}")
    made = made.replace("database current", f'database "{look("select current_database()")[0]}"')
    if kind != "temporary":
        look(made)
    url = sa.make_url(database_url)
    if f"to {role}" in made:
        url = url.update_query_dict({"options": f"-c role={role}"})
    if kind == "on the search path":
        url = url.update_query_dict({"options": "-c search_path=ten1"})
    translated = {"schema_translate_map": {None: "ten1"}} if kind == "translated" else {}
    engine = sa.create_engine(url, execution_options=translated)
    read = sa.select(sa.func.count(), sa.func.sum(R.n)).select_from(R)
    with engine.connect() as connection:
        if kind == "temporary":
            connection.execute(sa.text(made))
            connection.commit()
        with OptInSession(connection if kind == "temporary" else engine) as session:
            _write(session, R)
            assert session.execute(read).one() == (632, 3 + 3 + 10 + 1)
        if kind == "temporary":
            connection.rollback()
    engine.dispose()
    if kind in ("translated", "on the search path"):
        assert look("select (select count(*) from public.r), (select count(*) from ten1.r)") == [(0, 632)]


def _write(session: sa_orm.Session, R: Any) -> None:
    assert insert_many(session, R, _rows(3, "a")) == 3
    assert insert_many(session, R, _rows(27, "a", first=3)) == 27
    with session.begin():
        assert insert_many(session, R, _rows(30, "a", first=1000)) == 30
    assert upsert_many(session, R, _rows(3, "a"), key="k") == Upserted(0, 0, 3)
    assert upsert_many(session, R, _rows(4, "b", first=27), key="k") == Upserted(1, 3, 0)
    assert upsert_many(session, R, [*_rows(31, "a")[:27], *_rows(4, "b", first=27), *_rows(569, "a", first=31)],
                       key="k") == Upserted(569, 0, 31)  # fmt: skip
    assert update_many(session, R, [*_rows(3, "c"), *_rows(1, "c", first=5000)], key="k") == 3
    assert update_many(session, R, [*_rows(10, "d", first=10), *_rows(1, "d", first=5000)], key="k") == 10
    assert get_or_create(session, R, {"k": 0})[1] is False
    assert get_or_create(session, R, {"k": 600}, {"v": "e"})[1] is True
    found = [update_or_create(session, R, {"k": 601}, {"v": v}) for v in ("f", "f", "g")]
    assert [created for _, created in found] == [True, False, False]
    assert found[-1][0].v == "g"


WITHOUT_CONFLICTS: dict[str, tuple[str, str]] = {
    "rules": (
        f"create table r ({COLUMNS}); create rule u as on insert to r do also notify r",
        "INSERT or UPDATE rules",
    ),
    "a view": (
        f"create table t ({COLUMNS}); create view r as select id, k, v || '' as v, n from t;"
        "create function f() returns trigger language plpgsql as"
        " 'begin insert into t (k, v, n) values (new.k, new.v, 0) returning id into new.id; return new; end';"
        "create trigger g instead of insert on r for each row execute function f()",
        "no unique",
    ),
}


@pytest.mark.parametrize("kind", WITHOUT_CONFLICTS)
def test_d2_d7_where_postgresql_takes_no_on_conflict(kind: str, database_url: str, look: Look) -> None:
    made, why = WITHOUT_CONFLICTS[kind]
    look(made)
    R, engine = _model(None), sa.create_engine(database_url)
    wanted = rf"or_create\(\): .* \(k\) on r.*{why}.*unique=True"
    with OptInSession(engine) as session:
        for create in (get_or_create, update_or_create):
            with pytest.raises(ConfigurationError, match=wanted) as caught:
                create(session, R, {"k": 1}, {"v": "x"})
            assert isinstance(caught.value.__cause__, sa.exc.DBAPIError)
        with pytest.raises(ConfigurationError, match=f"^upsert_many.*{why}"):
            upsert_many(session, R, _rows(1, "x"), key="k")
        without_key = _model(None, unique=None)
        assert [get_or_create(session, without_key, {"k": 1}, {"v": "x"})[1] for _ in range(2)] == [True, False]
        assert update_or_create(session, without_key, {"k": 2}, {"v": "x"})[1] is True
    engine.dispose()

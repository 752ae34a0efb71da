"""Rules A31, D8 and E4: what an object, None and NULL say in a row; and in which order rows take their locks."""

from __future__ import annotations

import contextlib
import enum
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from fictive.errors import DuplicateRows, UnsavedObject
from fictive.rows.bulk import Upserted, insert_many, update_many, upsert_many
from fictive.rows.many_to_many import m2m_add, m2m_set
from fictive.session.session import OptInSession
from fictive.sqlalchemy import TakeTurnsPool
from tests.fresh_database import WAITING

Look = Callable[..., list[Any]]


class Color(enum.Enum):
    """By its labels in another order than by its members."""

    red = 1
    blue = 2


class Base(DeclarativeBase):
    pass


links = sa.Table(
    "objects_link", Base.metadata,
    sa.Column("owner", sa.ForeignKey("objects_owner.id"), primary_key=True),
    sa.Column("thing", sa.ForeignKey("objects_thing.id"), primary_key=True),
)  # fmt: skip


class Owner(Base):
    __tablename__ = "objects_owner"
    id: Mapped[int] = mapped_column(primary_key=True)
    things: Mapped[list[Thing]] = relationship(secondary=links)


class Thing(Base):
    __tablename__ = "objects_thing"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(sa.Text)
    k: Mapped[int] = mapped_column(unique=True)
    note: Mapped[str | None] = mapped_column(default="note")
    state: Mapped[str | None] = mapped_column(server_default="state")
    data: Mapped[Any] = mapped_column(sa.JSON, default={}, nullable=True)
    twice: Mapped[int] = mapped_column(sa.Computed("k * 2"))
    touched: Mapped[int | None] = mapped_column(onupdate=7)
    version: Mapped[int] = mapped_column()
    owner_id: Mapped[int | None] = mapped_column(sa.ForeignKey("objects_owner.id"))
    owner: Mapped[Owner | None] = relationship()
    __mapper_args__ = {"version_id_col": version, "polymorphic_on": kind, "polymorphic_identity": "thing"}


class Box(Thing):
    __tablename__ = "objects_box"
    id: Mapped[int] = mapped_column(sa.ForeignKey("objects_thing.id"), primary_key=True)
    size: Mapped[int | None] = mapped_column(default=3)
    __mapper_args__ = {"polymorphic_identity": "box"}


class Painted(Base):
    __tablename__ = "objects_painted"
    id: Mapped[int] = mapped_column(primary_key=True)
    color: Mapped[Color]
    number: Mapped[int | None]
    title: Mapped[str | None]
    shown: Mapped[str | None] = mapped_column(onupdate=lambda context: context.get_current_parameters()["title"])
    __table_args__ = (sa.UniqueConstraint("color", "number"),)


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(database_url, pool_size=3, max_overflow=0, pool_timeout=5)
    Base.metadata.create_all(engine)
    yield engine
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    engine.dispose()


@pytest.fixture
def db(engine: sa.Engine) -> Iterator[OptInSession]:
    with OptInSession(engine) as session:
        yield session


def _stored(look: Look) -> list[Any]:
    found = look(
        "select k, kind, note, state, data::text, version, owner_id, size from objects_thing"
        " left join objects_box using (id) order by k"
    )
    look("truncate objects_thing, objects_box, objects_link")
    return found


@pytest.mark.parametrize("model", [Thing, Box])
@pytest.mark.parametrize("count", [2, 30])
def test_a31_none_and_null_in_a_new_row_are_those_of_a_flush(model: Any, count: int, db: Any, look: Look) -> None:
    """None stands for a default, and `sa.null()` for NULL: by COPY, by INSERT and by what returns something."""
    null = sa.null()

    def rows() -> list[dict[str, Any]]:
        values = [None, "x", null]
        size = {"size": None} if model is Box else {}
        return [
            {"id": None, "k": k, "note": values[k % 3], "state": values[k // 3 % 3], "data": values[k % 2 * 2]} | size
            for k in range(count)
        ]

    with db.begin():
        db.add_all([model(**row) for row in rows()])
    wanted = _stored(look)
    assert len(wanted) == count
    ways: list[Callable[[], Any]] = [
        lambda: insert_many(db, model, rows()),
        lambda: insert_many(db, model, iter(rows())),
        lambda: insert_many(db, model, [{**row, "id": k + 1} for k, row in enumerate(rows())]),
        lambda: insert_many(db, model, rows(), returning="keys"),
    ]
    for number, way in enumerate(ways):
        way()
        assert _stored(look) == wanted, number
    found = insert_many(db, model, rows(), returning="objects")
    assert [each.k for each in found] == [*range(count)]
    db.expunge_all()
    assert _stored(look) == wanted
    assert insert_many(db, model, [model(**row) for row in rows() if row["note"] is null]) == count // 3
    assert _stored(look) == [row for row in wanted if row[0] % 3 == 2]


@pytest.mark.parametrize("count", [1, 30])
def test_a31_a_row_of_an_object_has_the_key_of_what_it_is_related_to(count: int, db: Any, look: Look) -> None:
    owners = insert_many(db, Owner, [{}, {}], returning="objects")
    things = [Thing(k=k, owner=owners[k % 2]) for k in range(count)]
    assert insert_many(db, Thing, things) == count
    assert look("select k from objects_thing where owner_id is distinct from 1 + k % 2") == []
    moved = [Thing(k=k, owner=owners[1] if k else None) for k in range(count)]
    assert upsert_many(db, Thing, moved, key="k").inserted == 0
    assert look("select k from objects_thing where owner_id is distinct from case when k > 0 then 2 end") == []
    with pytest.raises(UnsavedObject, match=r"Thing\.owner"):
        insert_many(db, Thing, [Thing(k=-1, owner=Owner())])


@pytest.mark.parametrize("count", [2, 30])
def test_d8_an_object_that_was_loaded_moves_its_version(count: int, db: Any, look: Look) -> None:
    """What the ORM and the database make of a row is left to them: the version, `onupdate`, a generated column."""
    insert_many(db, Thing, [{"k": k} for k in range(count)])
    things = db.scalars(sa.select(Thing)).all()
    db.expunge_all()
    for thing in things:
        thing.note = f"new {thing.k % 2}"
    assert update_many(db, Thing, things) == count
    assert look("select distinct version, touched, note from objects_thing order by 3") == [
        (2, 7, "new 0"), (2, 7, "new 1"),
    ]  # fmt: skip
    things = db.scalars(sa.select(Thing).order_by(Thing.k)).all()
    db.expunge_all()
    things[0].note = "newer"
    assert upsert_many(db, Thing, things, key="k") == Upserted(0, 1, count - 1)
    assert look("select version, note from objects_thing where version > 2") == [(3, "newer")]
    look("truncate objects_thing cascade")
    assert insert_many(db, Thing, things) == count  # as a flush of new objects does
    assert look("select distinct version from objects_thing") == [1]


@pytest.mark.parametrize("size", [2, 100])
def test_d8_a_key_that_comes_again_in_another_batch(size: int, db: Any, look: Look) -> None:
    """On the ways without a staging table as well: several tables, an `onupdate` that looks at its row, SQLite."""
    keys = [1, 2, 3, 1]
    lite = sa.create_engine("sqlite://", poolclass=TakeTurnsPool)
    Base.metadata.create_all(lite)
    with OptInSession(lite) as other:
        for session in (db, other):
            with pytest.raises(DuplicateRows, match=r"color=.*number=1"):
                rows = [{"color": Color.red, "number": number, "title": "t"} for number in keys]
                upsert_many(session, Painted, rows, key=("color", "number"), batch_size=size)
            insert_many(session, Box, [{"id": number, "k": number} for number in range(1, 4)])
            with pytest.raises(DuplicateRows, match="id=1"):
                update_many(
                    session, Box, [{"id": number, "size": 0, "version": 1} for number in keys], batch_size=size
                )
            assert session.scalar(sa.select(sa.func.count()).select_from(Painted)) == 0
            assert session.scalars(sa.select(Box.size).distinct()).all() == [3]
        with pytest.raises(DuplicateRows, match="id=1"):
            update_many(other, Thing, [{"id": number, "note": "n"} for number in keys], batch_size=size)
    lite.dispose()


def test_d8_several_tables_and_a_version(db: Any, look: Look) -> None:
    """SQLAlchemy compares the version, as it does in a flush."""
    insert_many(db, Box, [{"k": k} for k in range(3)])
    boxes = db.scalars(sa.select(Box)).all()
    db.expunge_all()
    for box in boxes:
        box.note, box.size = "new", 5
    with pytest.raises(ValueError, match="have no version"):
        update_many(db, Box, [{"id": box.id, "size": 4} for box in boxes])
    assert update_many(db, Box, boxes) == 3
    assert {row[2:] for row in look("select k, id, note, version from objects_thing")} == {("new", 2)}
    with pytest.raises(sa_orm.exc.StaleDataError):
        update_many(db, Box, boxes)


def test_d8_rows_that_a_trigger_cancels_have_no_keys(db: Any, look: Look) -> None:
    look(
        "create function objects_none() returns trigger language plpgsql as 'begin return null; end';"
        "create trigger t before insert on objects_thing for each row when (new.k = 2) execute function objects_none()"
    )
    with pytest.raises(sa_orm.exc.FlushError, match=r"inserted 2 of 3 rows.*trigger on objects_thing"):
        insert_many(db, Thing, [{"k": k} for k in range(3)], returning="keys")
    assert look("select count(*) from objects_thing") == [0]


@pytest.mark.parametrize("count", [1, 30])
def test_a31_a_view_that_cannot_be_locked_is_updated(count: int, db: Any, look: Look) -> None:
    look(
        "create view objects_view as select distinct id, color, number, title from objects_painted;"
        "create function objects_put() returns trigger language plpgsql as"
        " 'begin update objects_painted set title = new.title where id = new.id; return new; end';"
        "create trigger t instead of update on objects_view for each row execute function objects_put()"
    )

    class View(DeclarativeBase):
        pass

    class Seen(View):
        __tablename__ = "objects_view"
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str | None]

    insert_many(db, Painted, [{"color": Color.red, "number": number} for number in range(count)])
    assert update_many(db, Seen, [{"id": key, "title": "t"} for (key,) in db.execute(sa.select(Painted.id))]) == count
    assert look("select count(*) from objects_painted where title = 't'") == [count]


# -- locks ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _another(engine: sa.Engine, look: Look, work: Callable[[Any], Any]) -> Iterator[Callable[[], None]]:
    """Another session does `work`; the function that it gives waits until that waits for a lock."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with OptInSession(engine) as session:
                work(session)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)

    def start() -> None:
        thread.start()
        while not look(WAITING):
            assert thread.is_alive(), failed

    yield start
    thread.join(20)
    assert failed == []


@pytest.mark.parametrize("write", [upsert_many, update_many])
@pytest.mark.parametrize("others", [2, 600])
def test_d8_keys_of_an_enum_are_locked_in_one_order(write: Any, others: int, engine: Any, look: Look) -> None:
    numbers = [1, 2, *range(3, others + 1)]
    rows = [{"color": color, "number": number} for number in numbers for color in (Color.red, Color.blue)]
    key = ("color", "number")
    with (
        _another(
            engine, look, lambda other: write(other, Painted, [{**row, "title": "b"} for row in rows], key=key)
        ) as run,
        OptInSession(engine) as session,
    ):
        insert_many(session, Painted, rows)
        with session.begin():
            for color in (Color.blue, Color.red):
                write(session, Painted, [{"color": color, "number": 1, "title": "a"}], key=key)
                if color is Color.blue:
                    run()


@pytest.mark.parametrize("link", [lambda *args: m2m_add(*args, ignore_conflicts=True), m2m_set])
def test_e4_links_are_made_in_one_order(link: Any, engine: sa.Engine, look: Look) -> None:
    def all_of_them(other: OptInSession) -> None:
        link(other, other.get(Owner, 1), Owner.things, *range(9, 0, -1))

    with _another(engine, look, all_of_them) as run, OptInSession(engine) as session:
        insert_many(session, Owner, [{"id": 1}])
        insert_many(session, Thing, [{"id": k, "k": k} for k in range(1, 10)])
        with session.begin():
            owner = session.get(Owner, 1)
            m2m_add(session, owner, Owner.things, 1)
            run()
            m2m_add(session, owner, Owner.things, *range(2, 10))
    assert look("select count(*) from objects_link") == [9]

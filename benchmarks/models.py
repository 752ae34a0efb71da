"""What the pieces of `fictive.models` cost, each against the same done without it, on the same kind of session."""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.orm import Mapped, mapped_column, relationship, selectinload

from fictive.models import Repository, SoftDeleteMixin, TimestampMixin, VersionMixin, set_lazy_loads
from fictive.sqlalchemy import BorrowingPool, OptInSession

from .peers import PLAIN
from .results import BATCH, BY_HAND, DETECTOR, KEYSET, LOOPBACK, NO_COLUMNS, Case, Result
from .timing import interleave, seconds_each

if TYPE_CHECKING:
    from .measurements import Bench

__all__ = ["models"]

_PARENTS, _CHILDREN, _STATEMENTS, _PAGE = 100, 10, 50, 20


class Base(sa_orm.DeclarativeBase):
    pass


class Mixed(SoftDeleteMixin, VersionMixin, TimestampMixin, Base):
    __tablename__ = "mixed"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class ByHand(Base):
    """The columns of the mixins, written out."""

    __tablename__ = "by_hand"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    deleted_at: Mapped[dt.datetime | None] = mapped_column(sa.DateTime(timezone=True))
    version: Mapped[int] = mapped_column(server_default="1")
    created_at: Mapped[dt.datetime] = mapped_column(sa.DateTime(timezone=True), server_default=sa.func.now())
    updated_at: Mapped[dt.datetime] = mapped_column(
        sa.DateTime(timezone=True), server_default=sa.func.now(), onupdate=sa.func.now()
    )
    __mapper_args__ = {"version_id_col": version}


class Narrow(Base):
    __tablename__ = "narrow"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Parent(Base):
    __tablename__ = "parent"
    id: Mapped[int] = mapped_column(primary_key=True)
    children: Mapped[list[Child]] = relationship(back_populates="parent")


class Child(Base):
    __tablename__ = "child"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int] = mapped_column(sa.ForeignKey("parent.id"), index=True)
    parent: Mapped[Parent] = relationship(back_populates="children")


class Entry(Base):
    __tablename__ = "entry"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


def models(bench: Bench) -> Result:
    rows, entries = bench.scale.objects, bench.scale.entries
    result = Result(
        "models",
        "What the pieces of fictive.models cost",
        "ms",
        higher_is_better=False,
        what=f"Flushing {rows:,} new objects of a model with the mixins for times, versions and soft delete, against "
        "the same columns written out, and against none. "
        f"{_PARENTS} objects and the {_CHILDREN} children of each, loaded as they are touched, in batches, against "
        f"selectinload. {_STATEMENTS} statements, half of them lazy loads, with the detector of N+1 loads on, against "
        f"off. Page {_page_number(entries):,} of {entries:,} rows by keyset, against page 1.",
        digits=2,
        titles={PLAIN: "without", "fictive": "with"},
    )
    with _database(bench) as engine:
        _fill(engine, entries)
        for label, works in (
            (BY_HAND, (_flush(engine, ByHand, rows), _flush(engine, Mixed, rows))),
            (NO_COLUMNS, (_flush(engine, Narrow, rows), _flush(engine, Mixed, rows))),
            (BATCH, (_selectin(engine), _batch(engine))),
            (DETECTOR, (_statements(engine, "off"), _statements(engine, "warn"))),
            (KEYSET, (_pages(engine, 1), _pages(engine, _page_number(entries)))),
        ):
            taken = [[work() for _ in range(bench.scale.warm)][-1] for work in works]
            count = max(1, round(bench.scale.seconds * 1000 / taken[0]))
            jobs = {name: _mean(work, count) for name, work in zip((PLAIN, "fictive"), works, strict=True)}
            found = interleave(jobs, bench.scale.rounds, bench.told(label))
            result.cases.append(Case(label, LOOPBACK, found))
    return result


def _mean(work: Callable[[], float], count: int) -> Callable[[], float]:
    return lambda: sum(work() for _ in range(count)) / count


@contextlib.contextmanager
def _database(bench: Bench) -> Iterator[sa.Engine]:
    at = bench.ways[LOOPBACK]
    url = sa.make_url(bench.databases.url("models")).set(
        host=at.host, port=at.port, drivername=f"postgresql+{bench.driver}"
    )
    engine = sa.create_engine(url, poolclass=BorrowingPool)
    try:
        yield engine
    finally:
        engine.dispose()


def _fill(engine: sa.Engine, entries: int) -> None:
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        for statement in (
            f"insert into parent select n from generate_series(1, {_PARENTS}) n",
            f"insert into child select n, 1 + n % {_PARENTS} from generate_series(1, {_PARENTS * _CHILDREN}) n",
            f"insert into entry select n, 'entry ' || n from generate_series(1, {entries}) n",
        ):
            connection.execute(sa.text(statement))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("vacuum analyze parent, child, entry"))


def _flush(engine: sa.Engine, model: Any, rows: int) -> Callable[[], float]:
    def job() -> float:
        made = [model(name=f"name {number}") for number in range(rows)]
        with OptInSession(engine) as session, session.begin():
            session.add_all(made)
            start = time.perf_counter()
            session.flush()
            taken = time.perf_counter() - start
            session.rollback()
        return taken * 1000

    return job


def _in_session(engine: sa.Engine, work: Callable[[sa_orm.Session], object], **lazy_loads: Any) -> Callable[[], float]:
    """Milliseconds of `work`, whose objects are gone each time."""

    def job() -> float:
        with OptInSession(engine) as session:
            if lazy_loads:
                set_lazy_loads(session, **lazy_loads)
            session.scalar(sa.select(1))  # connects
            return seconds_each(lambda: work(session), 1) * 1000

    return job


def _selectin(engine: sa.Engine) -> Callable[[], float]:
    statement = sa.select(Parent).options(selectinload(Parent.children))
    return _in_session(engine, lambda session: _touch(session, statement))


def _batch(engine: sa.Engine) -> Callable[[], float]:
    return _in_session(engine, lambda session: _touch(session, sa.select(Parent)), lazy_loads="batch")


def _touch(session: sa_orm.Session, statement: sa.Select[Any]) -> None:
    parents = session.scalars(statement).all()
    assert sum(len(parent.children) for parent in parents) == _PARENTS * _CHILDREN


def _statements(engine: sa.Engine, n_plus_one: str) -> Callable[[], float]:
    def work(session: sa_orm.Session) -> None:
        # Each of a query of its own, so there is nothing to warn of; and a parent of its own, so that it is loaded.
        for number in range(1, _STATEMENTS // 2 + 1):
            assert session.get_one(Child, number).parent.id == 1 + number % _PARENTS

    return _in_session(engine, work, n_plus_one=n_plus_one) if n_plus_one != "off" else _in_session(engine, work)


def _page_number(entries: int) -> int:
    return min(1000, entries // _PAGE)


def _pages(engine: sa.Engine, number: int) -> Callable[[], float]:
    after: str | None = None
    if number > 1:
        with OptInSession(engine) as session:
            after = Repository[Entry](session).keyset_page((number - 1) * _PAGE).next

    def work(session: sa_orm.Session) -> None:
        page = Repository[Entry](session).keyset_page(_PAGE, after=after)
        assert [page.items[0].id, page.items[-1].id] == [(number - 1) * _PAGE + 1, number * _PAGE]

    return _in_session(engine, work)

"""Contract A29: transactions ended through SQLAlchemy's own objects, as on a plain session.

Random programs, the same for each run, are run on a plain session and on the opt-in session: the same steps have to
fail, with errors of plain's class or a subclass of it, and the same rows have to be there at the end. `--programs`
says how many; the one difference is A15, where plain commits an aborted transaction in silence.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from fictive.config import WritesOutside
from fictive.errors import AbortedTransactionStatement, TransactionAborted
from fictive.sqlalchemy import OptInSession

Step = tuple[Any, ...]
Program = list[Step]


class Base(sa_orm.DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "handles_row"
    id: sa_orm.Mapped[int] = sa_orm.mapped_column(primary_key=True)
    k: sa_orm.Mapped[int] = sa_orm.mapped_column(unique=True)


PLAIN_STEPS = ("add", "add", "add", "flush", "insert", "insert", "read", "change")
FAILURES = ("duplicate", "failing flush", "failing insert")
ENDS = ("commit", "rollback", "close")
ENDED = ("handle", "handle", "handle", "root", "nested", "session", "session")


def program(dice: random.Random, length: int, depth: int = 0) -> Program:
    steps: Program = []
    for _ in range(dice.randint(1, length)):
        chance = dice.random()
        if chance < 0.42:
            steps.append((dice.choice(PLAIN_STEPS),))
        elif chance < 0.52:
            steps.append((dice.choice(FAILURES),))
        elif chance < 0.64:
            steps.append(("begin_nested",))
        elif chance < 0.74 and depth < 2:
            steps.append(("with", dice.random() < 0.25, program(dice, 4, depth + 1)))
        else:
            steps.append(("end", dice.choice(ENDED), dice.choice(ENDS), dice.randint(0, 3)))
    return steps


def is_honest(error: type[BaseException] | None) -> bool:
    """Whether it is the one difference, A15."""
    return (
        error is not None
        and issubclass(error, TransactionAborted)
        and not issubclass(error, AbortedTransactionStatement)
    )


class Raised(Exception):
    """By the program itself, in a block."""


class Run:
    """A program that is run, and what came of it."""

    def __init__(self, session: Any, *, only_inside: bool) -> None:
        self.session = session
        self.only_inside = only_inside
        self.handles: list[Any] = []
        self.objects: list[Any] = []
        self.outcomes: list[tuple[Step, type[BaseException] | None, str]] = []
        self.k = 0
        self.over = False
        self.leaked = False

    def steps(self, steps: Program) -> None:
        for step in steps:
            if self.over:
                return
            error: BaseException | None = None
            try:
                self.step(step)
            except Exception as raised:
                error = raised
            self.outcomes.append((step, error and type(error), str(error)[:200]))  # type: ignore[arg-type]
            if is_honest(error and type(error)) or (self.only_inside and not self.session.in_transaction()):
                self.over = True

    def step(self, step: Step) -> None:
        session, what = self.session, step[0]
        if what in ("add", "duplicate", "failing flush"):
            self.k += 1
            row = Row(k=self.k if what == "add" else 0)
            self.objects.append(row)
            session.add(row)
            if what == "failing flush":
                session.flush()
        elif what == "flush":
            session.flush()
        elif what in ("insert", "failing insert"):
            self.k += 1
            session.execute(sa.insert(Row).values(k=self.k if what == "insert" else 0))
        elif what == "read":
            session.execute(sa.select(Row.k)).all()
        elif what == "change":
            if self.objects:
                self.k += 1
                self.objects[-1].k = self.k
        elif what == "begin_nested":
            self.handles.append(session.begin_nested())
        elif what == "with":
            self.block(step)
        else:
            self.end(*step[1:])

    def block(self, step: Step) -> None:
        _, raises, body = step
        try:
            with self.session.begin_nested() as handle:
                self.handles.append(handle)
                self.steps(body)
                if raises:
                    raise Raised
        except Raised:
            pass

    def end(self, whose: str, how: str, index: int) -> None:
        found: Any = self.session
        if whose == "handle":
            found = self.handles[-1 - index % len(self.handles)] if self.handles else None
        elif whose == "root":
            found = self.session.get_transaction()
        elif whose == "nested":
            found = self.session.get_nested_transaction()
        around_others = found is not self.session and found is not innermost_of(self.session)
        if found is not None and not (how == "close" and around_others):  # which breaks a plain session
            getattr(found, how)()

    def states(self) -> list[str]:
        names = ("transient", "pending", "persistent", "deleted", "detached")
        return [next(n for n in names if getattr(sa.inspect(each), n)) for each in self.objects]


def innermost_of(session: Any) -> Any:
    return session.get_nested_transaction() or session.get_transaction()


class Peer:
    """The two engines and a look at the rows."""

    def __init__(self, url: str) -> None:
        self.plain = sa.create_engine(url)
        self.ours = sa.create_engine(url)
        Base.metadata.create_all(self.plain)
        self.watcher = self.plain.connect().execution_options(isolation_level="AUTOCOMMIT")
        self.watcher.execute(sa.text("set lock_timeout = '3s'"))  # a transaction that a run left open

    def rows(self) -> list[int]:
        return sorted(self.watcher.scalars(sa.select(Row.k).where(Row.k != 0)))

    def clear(self) -> None:
        self.watcher.execute(sa.text("truncate handles_row; insert into handles_row(id, k) values (-1, 0)"))

    def run(self, steps: Program, session: Any, *, around: bool) -> tuple[Run, list[int]]:
        engine = session.bind
        self.clear()
        run = Run(session, only_inside=around)
        try:
            if around:
                run.handles.append(session.begin())
            run.steps(steps)
        finally:
            try:
                session.close()
            except sa.exc.SQLAlchemyError:
                run.leaked = True
            run.session, run.handles = None, []
            run.leaked |= engine.pool.checkedout() > (engine is self.plain)  # type: ignore[attr-defined]
            if run.leaked:
                del session
                gc.collect()
        return run, self.rows()

    def difference(self, steps: Program, mode: WritesOutside) -> str | None:
        """What differs; None where nothing does."""
        around = mode is not WritesOutside.BEGIN
        plain, plain_rows = self.run(steps, sa_orm.Session(self.plain), around=around)
        session = OptInSession(self.ours, writes_outside=mode, autoflush=True, expire_on_commit=True)
        ours, our_rows = self.run(steps, session, around=around)
        if ours.leaked:
            return "a connection was not given back"
        if plain.leaked:  # what plain does there is no measure
            return None
        for before, after in zip(plain.outcomes, ours.outcomes, strict=False):
            if before[1] is AssertionError:  # in SQLAlchemy itself
                return None
            if before[1] is None and is_honest(after[1]):
                return None if set(our_rows) <= set(plain_rows) else f"A15, rows {plain_rows} {our_rows}"
            if (before[1] is None) != (after[1] is None) or (before[1] and not issubclass(after[1], before[1])):
                return f"{before[0]}: plain {before[1]} {before[2]!r}, ours {after[1]} {after[2]!r}"
        if len(plain.outcomes) != len(ours.outcomes):
            return f"{len(plain.outcomes)} steps on plain, {len(ours.outcomes)} on ours"
        if plain_rows != our_rows:
            return f"rows: plain {plain_rows}, ours {our_rows}"
        return None

    def close(self) -> None:
        self.watcher.close()
        self.plain.dispose()
        self.ours.dispose()


def smallest(steps: Program, differs: Callable[[Program], bool]) -> Program:
    """Leave steps out for as long as it still differs."""
    found = True
    while found:
        found = False
        for shorter in shorter_ones(steps):
            if differs(shorter):
                steps, found = shorter, True
                break
    return steps


def shorter_ones(steps: Program) -> Iterator[Program]:
    for index, step in enumerate(steps):
        yield steps[:index] + steps[index + 1 :]
        if step[0] == "with":
            for body in shorter_ones(step[2]):
                yield [*steps[:index], (*step[:2], body), *steps[index + 1 :]]


@pytest.fixture
def peer(database_url: str) -> Iterator[Peer]:
    peer = Peer(database_url)
    yield peer
    peer.close()


@pytest.mark.parametrize("mode", list(WritesOutside))
@pytest.mark.parametrize("seed", range(4))
def test_a29_as_on_a_plain_session(seed: int, mode: WritesOutside, peer: Peer, pytestconfig: pytest.Config) -> None:
    dice = random.Random(seed)
    for _ in range(pytestconfig.getoption("programs") // 24):
        steps = program(dice, 9)
        if peer.difference(steps, mode) is not None:
            steps = smallest(steps, lambda each: peer.difference(each, mode) is not None)
            pytest.fail(f"{peer.difference(steps, mode)}\nin {steps}")

"""Contract A29: transactions ended through SQLAlchemy's own objects, as on a plain session.

Random programs, the same for each run, are run on a plain session and on the opt-in session: the same steps have to
fail, with errors of plain's class or a subclass of it; after each step the objects have to be in the same states, with
the same attributes loaded, and the handles active or not; and the same rows have to be there at the end. `--programs`
says how many; the one difference is A15, where plain commits an aborted transaction in silence.
"""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from fictive.config import WritesOutside
from fictive.errors import AbortedTransactionStatement, TransactionAborted, TransactionAlreadyBegun
from fictive.sqlalchemy import OptInSession

Step = tuple[Any, ...]
Program = list[Step]


class Base(sa_orm.DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "handles_row"
    id: sa_orm.Mapped[int] = sa_orm.mapped_column(primary_key=True)
    k: sa_orm.Mapped[int] = sa_orm.mapped_column(unique=True)
    d: sa_orm.Mapped[int | None]
    __table_args__ = (sa.UniqueConstraint("d", deferrable=True, initially="DEFERRED"),)


PLAIN_STEPS = (
    *("add", "add", "add", "add", "flush", "flush", "insert", "insert", "read", "read", "change", "change"),
    *(
        "delete",
        "expunge",
        "merge",
        "refresh",
        "expire",
        "kill",
        "savepoint s",
        "rollback to savepoint s",
        "release s",
    ),
)
FAILURES = ("duplicate", "failing flush", "failing insert", "failing commit")
WAYS_OUT = ("end", "end", "end", "exception", "generator")
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
            what = dice.choice(("savepoint", "savepoint", "savepoint", "no_autoflush"))
            steps.append(("with", what, dice.choice(WAYS_OUT), program(dice, 4, depth + 1)))
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
        self.outcomes: list[tuple[Step, type[BaseException] | None, str, dict[str, Any]]] = []
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
            self.outcomes.append((step, error and type(error), str(error)[:200], self.shown()))  # type: ignore[arg-type]
            if is_honest(error and type(error)) or (self.only_inside and not self.session.in_transaction()):
                self.over = True

    def step(self, step: Step) -> None:
        session, what = self.session, step[0]
        if what in ("add", "duplicate", "failing flush"):
            self.k += 1
            row = Row(id=self.k, k=self.k if what == "add" else 0)
            self.objects.append(row)
            session.add(row)
            if what == "failing flush":
                session.flush()
        elif what == "flush":
            session.flush()
        elif what in ("insert", "failing insert", "failing commit"):
            self.k += 1
            k = 0 if what == "failing insert" else self.k
            session.execute(sa.insert(Row).values(id=self.k, k=k, d=0 if what == "failing commit" else None))
        elif what == "read":
            for row in session.scalars(sa.select(Row).order_by(Row.id)):
                if not any(row is each for each in self.objects):
                    self.objects.append(row)
        elif what == "change":
            if self.objects:
                self.k += 1
                self.objects[-1].k = self.k
        elif what in ("delete", "expunge", "merge", "refresh", "expire"):
            if self.objects:
                getattr(session, what)(self.objects[-1])
        elif what == "kill":
            session.execute(sa.text("select pg_terminate_backend(pg_backend_pid())"))
        elif what in ("savepoint s", "rollback to savepoint s", "release s"):
            session.execute(sa.text(what))
        elif what == "begin_nested":
            self.handles.append(session.begin_nested())
        elif what == "with":
            self.block(step)
        else:
            self.end(*step[1:])

    def block(self, step: Step) -> None:
        _, what, way_out, body = step
        if what == "savepoint":
            self.handles.append(around := self.session.begin_nested())
        else:
            around = self.session.no_autoflush

        def run() -> Iterator[None]:
            with around:
                self.steps(body)
                yield
                raise Raised

        if way_out == "end":
            with around:
                self.steps(body)
        else:
            generator = run()
            next(generator)
            if way_out == "generator":
                generator.close()  # type: ignore[attr-defined]
            else:
                with contextlib.suppress(Raised):
                    next(generator)

    def end(self, whose: str, how: str, index: int) -> None:
        found: Any = self.session
        if whose == "handle":
            found = self.handles[-1 - index % len(self.handles)] if self.handles else None
        elif whose == "root":
            found = self.session.get_transaction()
        elif whose == "nested":
            found = self.session.get_nested_transaction()
        if found is not self.session and how == "close":
            if found is not innermost_of(self.session):  # which breaks a plain session
                return
            if self.session.new:  # which stay in a plain session without a transaction, and a read begins one
                return
        if found is not None:
            getattr(found, how)()

    def shown(self) -> dict[str, Any]:
        return {
            "is_active": self.session.is_active,
            "in_nested_transaction": self.session.in_nested_transaction(),
            "handles": [each.is_active for each in self.handles],
            "objects": [shown(each) for each in self.objects],
        }


def shown(row: Row) -> tuple[str, dict[str, Any], bool]:
    """Its state, what is loaded of it, and whether a change of it is pending. Sends nothing."""
    state: Any = sa.inspect(row)
    names = ("transient", "pending", "persistent", "deleted", "detached")
    loaded = {key: value for key, value in state.dict.items() if key in ("id", "k", "d")}
    return next(name for name in names if getattr(state, name)), loaded, state.modified


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
        self.watcher.execute(sa.text("truncate handles_row; insert into handles_row(id, k, d) values (-1, 0, 0)"))

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
            if is_honest(after[1]):
                return None if set(our_rows) <= set(plain_rows) else f"A15, rows {plain_rows} {our_rows}"
            if before[0][:3:2] == ("with", "exception") and before[1] and after[1] is None:
                return None  # A4: of two errors, that of the block comes out, and not that of the ROLLBACK TO
            if (before[1] is None) != (after[1] is None) or (before[1] and not issubclass(after[1], before[1])):
                return f"{before[0]}: plain {before[1]} {before[2]!r}, ours {after[1]} {after[2]!r}"
            for name, value in before[3].items():
                if after[3][name] != value:
                    return f"after {before[0]}, {name}: plain {value}, ours {after[3][name]}"
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
            for body in shorter_ones(step[3]):
                yield [*steps[:index], (*step[:3], body), *steps[index + 1 :]]


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


@pytest.mark.parametrize("failure", ["failing commit", "duplicate"])
def test_a29_closed_after_a_commit_that_failed(failure: str, peer: Peer) -> None:
    for session in (sa_orm.Session(peer.plain), OptInSession(peer.ours, writes_outside="begin")):
        with session:
            peer.clear()
            run = Run(session, only_inside=False)
            run.step((failure,))
            with pytest.raises(sa.exc.IntegrityError):
                session.commit()
            run.end("root", "close", 0)
            session.expunge_all()
            run.step(("insert",))
            session.commit()
            assert len(peer.rows()) == 1


def test_a29_what_is_pending_without_a_transaction_is_flushed_before_a_statement(peer: Peer) -> None:
    for session in (sa_orm.Session(peer.plain), OptInSession(peer.ours, writes_outside="begin")):
        with session:
            peer.clear()
            session.add(Row(id=1, k=1))
            root = session.get_transaction()
            assert root is not None
            root.close()
            session.execute(sa.delete(Row))
            session.commit()
            assert peer.rows() == []


@pytest.mark.parametrize("between", [False, True])
def test_a29_a_block_that_is_entered_twice(between: bool, peer: Peer) -> None:
    """On a plain session it leaves a session in which no statement can run again."""
    with OptInSession(peer.ours) as session, session.begin() as block:
        with session.begin_nested() if between else contextlib.nullcontext():
            with pytest.raises(TransactionAlreadyBegun, match="entered already"), block:
                pass
            session.add(Row(id=1, k=1))
        assert not block.is_left()
    assert peer.rows() == [1]
    assert not session.in_transaction()

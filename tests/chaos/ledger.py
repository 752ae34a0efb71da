"""What operations were told, and whether the database agrees."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from .models import ACCOUNTS, BALANCE


class Outcome(enum.Enum):
    STARTED = "started"
    COMMITTED = "committed"
    FAILED = "failed"
    UNKNOWN = "unknown"
    INTERRUPTED = "interrupted"
    """By an exception from outside, which may have come after the commit."""


@dataclasses.dataclass
class Operation:
    """One unit of work: all `parts` rows with its token are there, or none."""

    token: str
    kind: str
    outcome: Outcome = Outcome.STARTED
    parts: int = 0
    created: str | None = None
    """The name for which it was told that it made the row."""
    error: BaseException | None = None
    committed_hooks: int = 0
    rolled_back_hooks: int = 0
    has_hooks: bool = False
    commits_by_itself: bool = False
    """It sends a COMMIT of its own, so that a part of it may stay."""

    def part(self) -> dict[str, Any]:
        """The values of one more row."""
        self.parts += 1
        return {"token": self.token, "kind": self.kind}


class Ledger:
    """All operations of a run, and what was seen while it ran."""

    def __init__(self, is_unknown: Callable[[Operation, Exception], bool]) -> None:
        self.operations: list[Operation] = []
        self.seen: Counter[str] = Counter()
        """What must never be seen, by its name."""
        self.examples: dict[str, str] = {}
        self.reads: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.holders: list[tuple[str, float, float]] = []
        self._is_unknown = is_unknown
        self._numbers = itertools.count(1)

    def saw(self, what: str, example: object = "") -> None:
        """Note something that must not be."""
        self.seen[what] += 1
        self.examples.setdefault(what, str(example)[:600])

    @contextlib.contextmanager
    def operation(self, kind: str) -> Iterator[Operation]:
        """Enter what the body was told. Expected errors end here; an interrupt goes on."""
        op = Operation(f"{kind}-{next(self._numbers)}", kind)
        self.operations.append(op)
        try:
            yield op
        except Exception as error:
            op.error = error
            op.outcome = Outcome.UNKNOWN if self._is_unknown(op, error) else Outcome.FAILED
            self.errors[f"{kind}: {type(error).__name__}"] += 1
        except BaseException as error:
            op.error = error
            op.outcome = Outcome.INTERRUPTED
            raise
        else:
            op.outcome = Outcome.COMMITTED

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def audit(self, ask: Callable[[str], list[Any]]) -> None:
        """Compare with the database, once everything has ended."""
        rows: Counter[str] = Counter(dict(ask("select token, count(*) from entry group by token")))
        for op in self.operations:
            self._audit_rows(op, rows.pop(op.token, 0))
        for token in rows:
            self.saw("rows of no operation", token)
        self._audit_sums(ask)
        self._audit_keys(ask)
        self._audit_holders()

    def _audit_rows(self, op: Operation, found: int) -> None:
        present = found > 0
        if op.commits_by_itself and op.outcome is not Outcome.COMMITTED:
            return
        if found not in (0, op.parts):
            self.saw("torn", f"{op}: {found} rows of {op.parts}")
        if op.outcome is Outcome.COMMITTED and found < op.parts:
            self.saw("lost", f"{op}: {found} rows of {op.parts}")
        if op.outcome is Outcome.FAILED and present:
            self.saw("phantom", f"{op}: {found} rows; {op.error!r}")
        if op.outcome is Outcome.STARTED:
            self.saw("never ended", op)
        if op.committed_hooks > 1 or op.rolled_back_hooks > 1:
            self.saw("hook twice", op)
        if op.committed_hooks and op.parts and not present:
            self.saw("hook without its commit", op)
        if op.rolled_back_hooks and present:
            interrupted = "n interrupted" if op.outcome is Outcome.INTERRUPTED else ""
            self.saw(f"rollback hook of a{interrupted} commit", op)
        if op.has_hooks and op.outcome is Outcome.COMMITTED and not op.committed_hooks:
            self.saw("commit without its hook", op)
        if op.outcome in (Outcome.UNKNOWN, Outcome.INTERRUPTED):
            self.reads[f"{op.outcome.value}, {'there' if present else 'not there'}"] += 1

    def _audit_sums(self, ask: Callable[[str], list[Any]]) -> None:
        if ask("select sum(balance) from account") != [(ACCOUNTS * BALANCE,)]:
            self.saw("the sum of all accounts")
        for name, query in {
            "an account": f"select a.id, a.balance, {BALANCE} + coalesce(sum(e.amount), 0) from account a"
            " left join entry e on e.about = a.id and e.kind like 'transfer%' group by a.id",
            "a job's tries": "select j.id, j.tries, count(e.id) from job j left join entry e on e.about = j.id"
            " and e.kind like 'claim%' group by j.id",
            "the counter": "select c.id, c.value, count(e.id) from counter c left join entry e on e.about = c.id"
            " and e.kind = 'count' group by c.id",
        }.items():
            for key, value, expected in ask(query):
                if value != expected:
                    self.saw(name, f"{key}: {value}, by its entries {expected}")

    def _audit_keys(self, ask: Callable[[str], list[Any]]) -> None:
        for table in ("key", "loose"):
            for name, count in ask(f"select name, count(*) from {table} group by name having count(*) > 1"):
                self.saw(f"{count} rows in {table}", name)
        made = Counter(op.created for op in self.operations if op.created and op.outcome is Outcome.COMMITTED)
        for name, count in made.items():
            if count > 1:
                self.saw("created twice", f"{name}: {count}")

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(op.outcome.value for op in self.operations)

    def held(self, key: str, since: float, until: float) -> None:
        """Somebody was told that they alone held `key` during that time, and not that they lost it."""
        self.holders.append((key, since, until))

    def _audit_holders(self) -> None:
        for (key, _, until), (other, since, _) in itertools.pairwise(sorted(self.holders)):
            if key == other and since < until:
                self.saw("two holders at once", f"{key}: {until - since} s")

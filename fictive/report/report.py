"""What happened, derived from a collector's events. Pure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from .collector import BEGAN, COMMAND, ENDED, HOOK, LOST, REPLICA, RETRY, STATEMENT, WAITED, Event
from .lines import Line, line_of

__all__ = ["Command", "Finding", "Idle", "Report", "Statement", "Transaction", "transaction_report"]

IDENTICAL = 2
"""So many reads with the same SQL and the same parameters are a finding."""
SIMILAR = 3
"""So many statements from one line with the same SQL and other parameters are a finding."""
MOST_SQL = 1000
"""Characters of a statement that are kept in a finding."""

_COMMENT = re.compile(r"\s*(?:/\*.*?\*/|--[^\n]*\n)", re.DOTALL)
_READS = frozenset({"SELECT", "SHOW", "EXPLAIN", "VALUES", "TABLE", "FETCH"})
_CONTROL = frozenset({"BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE", "SET", "DEALLOCATE", "LISTEN"})


@dataclasses.dataclass(frozen=True)
class Statement:
    """A statement, as the driver's cursor got it. Times are of `time.perf_counter`."""

    number: int
    sql: str
    parameters: Any
    started: float
    ended: float
    rows: int
    round_trips: int
    carried: tuple[str, ...]
    transaction: int | None
    error: str | None
    line: Line | None
    replica: str | None = None
    """The replica that answered, `"host:port"`; None for the primary."""

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @cached_property
    def kind(self) -> str:
        """`"read"`, `"write"` or `"control"`, by its first word."""
        return kind_of(self.sql)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of the session's own that travelled alone."""

    sql: str
    started: float
    ended: float
    round_trips: int
    transaction: int | None

    kind = "control"


@dataclasses.dataclass(frozen=True)
class Idle:
    """A time in which a transaction was open and nothing ran in it."""

    transaction: int
    started: float
    ended: float
    after: Line | None
    """Where the last statement before it was run."""
    before: Line | None
    """Where the next one was run, or the transaction ended."""

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def where(self) -> str:
        """Between which lines the time passed."""
        if self.after is None or self.before is None:
            return str(self.after or self.before or "an unknown line")
        if self.after == self.before:
            return f"{self.after}, from one round to the next"
        if (self.after.file, self.after.function) == (self.before.file, self.before.function):
            if self.before.number < self.after.number:
                return f"{self.after}, until the end of the block at line {self.before.number}"
            return f"{self.after.short}:{self.after.number} to {self.before.number} in {self.after.function}"
        return f"{self.after} to {self.before}"


@dataclasses.dataclass(frozen=True)
class Transaction:
    number: int
    started: float
    """When it was open on the server: when the message with its BEGIN was sent. Without statements, when it began."""
    ended: float | None
    outcome: str
    """`"committed"`, `"rolled back"`, `"aborted"`, `"in doubt"`, or `"open"`."""
    statements: int
    round_trips: int
    idle: tuple[Idle, ...]
    line: Line | None
    """The line that began it."""
    ending_seconds: float = 0.0
    """How long its COMMIT or ROLLBACK took."""
    retries: int = 0
    """How many tries before this one failed."""

    @property
    def seconds(self) -> float:
        return (self.ended if self.ended is not None else self.started) - self.started

    @property
    def idle_seconds(self) -> float:
        return sum(idle.seconds for idle in self.idle)


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that a request should not do. The same for log, panel and page, and for tests."""

    kind: str
    """`"n+1"` or `"duplicate"`."""
    count: int
    line: Line | None
    sql: str
    hint: str

    def __str__(self) -> str:
        verb = self.sql.split(None, 1)[0].upper() if self.sql.strip() else "statement"
        what = "identical" if self.kind == "duplicate" else "similar"
        return f"{self.count} {what} {verb}s from {self.line or 'an unknown line'}: {self.hint}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What one request, or another piece of work, did with its databases."""

    number: int
    started: float
    started_wall: float
    """The same as seconds since 1970."""
    ended: float
    statements: tuple[Statement, ...]
    commands: tuple[Command, ...]
    transactions: tuple[Transaction, ...]
    pool_waits: tuple[tuple[float, float], ...]
    hooks: tuple[tuple[str, float, float, str | None], ...]
    """Kind, from when, until when, and the error."""
    retries: tuple[tuple[int, str], ...]
    lost: int
    """How many connections were lost."""
    replica_fallbacks: tuple[tuple[str, str], ...] = ()
    """Each read that went to a replica and had to be answered by the primary: the replica, and `"behind"`,
    `"unreachable"` or `"failed"`."""
    request: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of a request: `method`, `path`, `endpoint`, `status`, `id`."""
    relationships: Callable[[str], list[str]] | None = dataclasses.field(default=None, compare=False, repr=False)
    """Which relationships of the app's models a lazy load may be for, by its SQL."""

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @cached_property
    def sent(self) -> tuple[Statement | Command, ...]:
        """Statements and commands, in the order in which they were sent."""
        both: list[Statement | Command] = [*self.statements, *self.commands]
        return tuple(sorted(both, key=_when))

    @cached_property
    def round_trips(self) -> int:
        """As the server counts them."""
        return sum(each.round_trips for each in self.sent) + sum(each.round_trips for each in self.transactions)

    @cached_property
    def rows(self) -> int:
        return sum(max(each.rows, 0) for each in self.statements)

    @cached_property
    def replica_reads(self) -> int:
        """How many statements a replica answered."""
        return sum(each.replica is not None for each in self.statements)

    @cached_property
    def database_seconds(self) -> float:
        """The time in which the database was waited for: statements, commands, COMMIT and ROLLBACK."""
        return sum(each.ended - each.started for each in self.sent) + sum(
            each.ending_seconds for each in self.transactions
        )

    @cached_property
    def pool_seconds(self) -> float:
        """The time in which a connection was waited for."""
        return sum(until - since for since, until in self.pool_waits)

    @cached_property
    def idle_seconds(self) -> float:
        """The time in which a transaction was open and idle."""
        return sum(each.idle_seconds for each in self.transactions)

    @cached_property
    def held_seconds(self) -> float:
        """The time in which a connection was held: each statement in autocommit, each transaction."""
        alone = sum(each.seconds for each in self.statements if each.transaction is None)
        return alone + sum(each.seconds for each in self.transactions)

    @cached_property
    def longest_idle(self) -> Idle | None:
        idle = [idle for each in self.transactions for idle in each.idle]
        return max(idle, key=lambda each: each.seconds, default=None)

    @cached_property
    def errors(self) -> int:
        return sum(each.error is not None for each in self.statements)

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """Statements that are repeated, the most frequent first."""
        return tuple(sorted(_repeated(self.statements, self.relationships), key=lambda each: -each.count))

    def summary(self) -> dict[str, Any]:
        """The numbers, flat and fit for JSON; seconds are rounded to microseconds."""
        found: dict[str, Any] = {
            **self.request,
            "statements": len(self.statements),
            "round_trips": self.round_trips,
            "rows": self.rows,
            "transactions": len(self.transactions),
            "seconds": self.seconds,
            "database_seconds": self.database_seconds,
            "pool_seconds": self.pool_seconds,
            "idle_seconds": self.idle_seconds,
            "held_seconds": self.held_seconds,
            "hooks": len(self.hooks),
            "retries": len(self.retries),
            "lost": self.lost,
            "replica_reads": self.replica_reads,
            "replica_fallbacks": len(self.replica_fallbacks),
            "errors": self.errors,
            "findings": [str(each) for each in self.findings],
        }
        if self.longest_idle is not None:
            found["idle_where"] = self.longest_idle.where
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in found.items()}

    @classmethod
    def of(
        cls,
        events: Iterable[Event],
        *,
        number: int = 0,
        started: float,
        started_wall: float = 0.0,
        ended: float,
        request: Mapping[str, Any] | None = None,
        relationships: Callable[[str], list[str]] | None = None,
    ) -> Report:
        """Derive it from a collector's events."""
        by_kind: dict[int, list[Event]] = {kind: [] for kind in range(9)}
        tries: dict[int, int] = {}  # by transaction
        failed = 0
        answered: str | None = None
        replicas: list[str | None] = []  # by statement
        for event in events:
            by_kind[event[0]].append(event)
            if event[0] == STATEMENT:
                replicas.append(answered)
                answered = None
            elif event[0] == REPLICA:
                answered = event[3] if event[4] == "answered" else None
            elif event[0] == RETRY:
                failed = event[3]
            elif event[0] == BEGAN:
                tries[event[3]], failed = failed, 0
        statements = tuple(
            Statement(index, sql, parameters, since, until, rows, trips, tuple(carried), transaction, error,
                      line_of(place), replica)
            for index, (event, replica) in enumerate(zip(by_kind[STATEMENT], replicas, strict=True), 1)
            for _, since, until, sql, parameters, rows, trips, carried, transaction, error, place in [event]
        )  # fmt: skip
        commands = tuple(
            Command(sql, since, until, trips, transaction)
            for _, since, until, sql, trips, transaction in by_kind[COMMAND]
        )
        retries = tuple((number, error) for _, _, _, number, error in by_kind[RETRY])
        return cls(
            number,
            started,
            started_wall,
            ended,
            statements,
            commands,
            tuple(_transactions(by_kind[BEGAN], by_kind[ENDED], statements, commands, tries)),
            tuple((since, until) for _, since, until in by_kind[WAITED]),
            tuple((kind, since, until, error) for _, since, until, kind, error in by_kind[HOOK]),
            retries,
            len(by_kind[LOST]),
            tuple((name, outcome) for _, _, _, name, outcome in by_kind[REPLICA] if outcome != "answered"),
            request or {},
            relationships,
        )


def _when(sent: Statement | Command) -> tuple[float, float]:
    """Of two that began together, such as a BEGIN of the driver's and its statement, the one that ended first."""
    return sent.started, sent.ended


def transaction_report(events: Iterable[Event], number: int) -> Transaction | None:
    """The transaction with that number, from a collector's events."""
    report = Report.of(events, started=0.0, ended=0.0)
    return next((each for each in report.transactions if each.number == number), None)


def kind_of(sql: str) -> str:
    """`"read"`, `"write"` or `"control"`, by the first word; good enough for a colour."""
    while match := _COMMENT.match(sql):
        sql = sql[match.end() :]
    word = sql.lstrip(" \n\t(").split(None, 1)[:1]
    first = word[0].upper().rstrip(";") if word else ""
    if first in _CONTROL:
        return "control"
    if first == "WITH":
        return "write" if re.search(r"\b(INSERT|UPDATE|DELETE|MERGE)\b", sql, re.IGNORECASE) else "read"
    return "read" if first in _READS else "write"


def _transactions(
    began: Sequence[Event],
    ended: Sequence[Event],
    statements: Sequence[Statement],
    commands: Sequence[Command],
    tries: Mapping[int, int],
) -> Iterable[Transaction]:
    starts = {number: (since, place) for _, since, _, number, place in began}
    ends = {event[3]: event for event in ended}
    within: dict[int, list[Statement | Command]] = {number: [] for number in {**starts, **ends}}
    both: list[Statement | Command] = [*statements, *commands]
    for each in both:
        if each.transaction is not None:
            within.setdefault(each.transaction, []).append(each)
    for number, sent in within.items():
        sent.sort(key=_when)
        end = ends.get(number)
        since, place = starts.get(number, (0.0 if end is None else end[1], None))
        if sent:
            since = sent[0].started
        if place is None and sent and isinstance(sent[0], Statement):
            line = sent[0].line
        else:
            line = line_of(place)
        yield Transaction(
            number,
            since,
            None if end is None else end[2],
            "open" if end is None else end[4],
            sum(isinstance(each, Statement) for each in sent),
            0 if end is None else end[5],
            tuple(_idle(number, sent, end)),
            line,
            0.0 if end is None else end[2] - end[1],
            tries.get(number, 0),
        )


def _idle(number: int, sent: Sequence[Statement | Command], end: Event | None) -> Iterable[Idle]:
    """The gaps. None before the first statement, since nothing is open before it."""
    after = None
    until: float | None = None
    for each in sent:
        line = each.line if isinstance(each, Statement) else after
        if until is not None and each.started > until:
            yield Idle(number, until, each.started, after, line)
        until, after = each.ended, line
    if end is not None and until is not None and end[1] > until:
        yield Idle(number, until, end[1], after, line_of(end[6]))


def _repeated(statements: Sequence[Statement], relationships: Callable[[str], list[str]] | None) -> Iterable[Finding]:
    """Reads that are run again with the same parameters, and statements that one line runs with others each time."""
    identical: dict[tuple[str, str], list[Statement]] = {}
    for each in statements:
        if each.kind == "read":
            identical.setdefault((each.sql, repr(each.parameters)), []).append(each)
    found: set[int] = set()
    for same in identical.values():
        if len(same) >= IDENTICAL:
            found |= {each.number for each in same}
            hint = "run it once and keep the result"
            yield Finding("duplicate", len(same), same[0].line, same[0].sql[:MOST_SQL], hint)
    similar: dict[tuple[Line | None, str], list[Statement]] = {}
    for each in statements:
        if each.kind != "control" and each.number not in found:
            similar.setdefault((each.line, each.sql), []).append(each)
    for (line, sql), same in similar.items():
        if len(same) >= SIMILAR:
            hint = _hint(sql, relationships) if same[0].kind == "read" else _WRITES
            yield Finding("n+1", len(same), line, sql[:MOST_SQL], hint)


_WRITES = "write them in one statement (insert_many, update_many)"


def _hint(sql: str, relationships: Callable[[str], list[str]] | None) -> str:
    found = relationships(sql) if relationships is not None else []
    if found and len(found) <= 3:
        return "load them with their parents: " + " or ".join(f"selectinload({each})" for each in found)
    return "load them with their parents (selectinload), or all at once (IN)"

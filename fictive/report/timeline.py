"""From a report to bars on a time axis, and to the rows of its list. The templates say how they look."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from .report import Command, Finding, Idle, Report, Statement

__all__ = ["MOST_ROWS", "Axis", "Bar", "Fold", "Lane", "Shown", "axis_of", "lanes", "marks", "ms", "rows", "shortened"]

NOTICED_IDLE = 0.001
"""Seconds of idle time from which on a list mentions it."""
FOLDED = 3
"""So many of the same statements in a row, or more, are one row of a list."""
MOST_ROWS = 120
MOST_BARS = 150
_MOST_CHARACTERS = 15_000
_SHORT = 100


@dataclasses.dataclass(frozen=True)
class Axis:
    """From 0 to `end` seconds."""

    end: float

    def percent(self, seconds: float) -> float:
        return round(100 * seconds / self.end, 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Position in percent and label in milliseconds, of about five ticks."""
        power = 10 ** math.floor(math.log10(self.end / 5))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 6 >= self.end)
        return [
            (self.percent(number * step), f"{number * step * 1000:g}") for number in range(int(self.end / step) + 1)
        ]


@dataclasses.dataclass(frozen=True)
class Bar:
    """`left` and `width` are in percent of the axis."""

    kind: str
    left: float
    width: float
    title: str


@dataclasses.dataclass
class Lane:
    label: str
    kind: str
    bars: list[Bar] = dataclasses.field(default_factory=list)


def ms(seconds: float) -> str:
    """`"12 ms"`, `"1.2 ms"`; the space does not break."""
    return f"{seconds * 1000:.0f}\u00a0ms" if seconds >= 0.01 else f"{seconds * 1000:.1f}\u00a0ms"


def axis_of(report: Report) -> Axis:
    return Axis(max(report.seconds, 1e-6) * 1.02)


def lanes(report: Report) -> list[Lane]:
    """A lane for the request, and one for its database."""
    axis = axis_of(report)

    def bar(kind: str, since: float, until: float, title: str) -> Bar:
        start = max(since - report.started, 0.0)
        return Bar(kind, axis.percent(start), axis.percent(until - since), f"{title}, {ms(until - since)}")

    request = Lane("request", "request", [bar("request", report.started, report.ended, "the request")])
    for since, until in report.pool_waits:
        if until - since >= NOTICED_IDLE:
            request.bars.append(bar("wait", since, until, "waits for a connection"))
    for kind, since, until, error in report.hooks:
        request.bars.append(bar("hook", since, until, f"on_{kind} hook" + (f", {error}" if error else "")))
    database = Lane("database" if report.sent else "nothing sent", "connection")
    for each in report.transactions:
        if each.statements:
            end = report.ended if each.ended is None else each.ended
            database.bars.append(bar("transaction", each.started, end, f"a transaction, {each.outcome}"))
            database.bars += [
                bar("idle", idle.started, idle.ended, f"idle in the transaction, {idle.where}")
                for idle in each.idle
                if idle.seconds >= NOTICED_IDLE
            ]
            if each.ended is not None and each.round_trips:
                database.bars.append(bar("control", each.ended - each.ending_seconds, each.ended, each.outcome))
    for one in report.sent:
        where = f"{one.line}: " if isinstance(one, Statement) and one.line else ""
        database.bars.append(bar(one.kind, one.started, one.ended, where + shortened(one.sql, _SHORT)))
    del database.bars[MOST_BARS:]
    return [request, database]


def marks(report: Report, *, most: int = 60) -> dict[str, str]:
    """The database's lane as SVG paths by kind, on a box of 1000 by 10: for a small picture."""
    axis = axis_of(report)
    found: dict[str, str] = {}

    def add(kind: str, since: float, until: float, top: int, height: int) -> None:
        left = round(axis.percent(max(since - report.started, 0.0)) * 10)
        width = max(round(axis.percent(until - since) * 10), 3)
        found[kind] = f"{found.get(kind, '')}M{left} {top}h{width}v{height}h-{width}z"

    for each in report.transactions[:most]:
        if each.statements:
            add("transaction", each.started, report.ended if each.ended is None else each.ended, 0, 10)
            for idle in each.idle:
                if idle.seconds >= NOTICED_IDLE:
                    add("idle", idle.started, idle.ended, 0, 10)
    for one in report.sent[:most]:
        add(one.kind, one.started, one.ended, 2, 6)
    return found


@dataclasses.dataclass(frozen=True)
class Shown:
    """A row: a statement, a command, an idle time, the end of a transaction, or something else that happened."""

    at: float
    took: float
    kind: str
    text: str
    line: str = ""
    number: int | None = None
    """Of the statement."""
    inside: bool = False
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Fold:
    """Several rows with the same text from the same line, one after the other."""

    rows: tuple[Shown, ...]
    finding: Finding | None

    @property
    def first(self) -> Shown:
        return self.rows[0]

    @property
    def took(self) -> float:
        return sum(each.took for each in self.rows)


def rows(report: Report) -> Iterator[Fold]:
    """What happened, in order, with repeated statements folded."""
    shown = sorted(_rows(report), key=lambda each: each.at)[:MOST_ROWS]
    by_statement = {(str(each.line or ""), each.sql): each for each in report.findings}
    at = 0
    characters = 0
    while at < len(shown):
        end = at + 1
        while end < len(shown) and shown[at].number and _alike(shown[at], shown[end]):
            end += 1
        if end - at < FOLDED:
            end = at + 1
        group = shown[at:end]
        full = report.statements[group[0].number - 1].sql if group[0].number else ""
        finding = by_statement.get((group[0].line, full[:1000])) if full else None
        characters += len(group[0].text)
        if characters > _MOST_CHARACTERS:
            group = [dataclasses.replace(each, text=shortened(each.text, _SHORT)) for each in group]
        yield Fold(tuple(group), finding)
        at = end


def _alike(one: Shown, other: Shown) -> bool:
    return (one.text, one.line, one.kind, one.inside) == (other.text, other.line, other.kind, other.inside)


def _rows(report: Report) -> Iterator[Shown]:
    start = report.started
    for one in report.sent:
        yield _sent(one, start)
    for each in report.transactions:
        for idle in each.idle:
            if idle.seconds >= NOTICED_IDLE:
                yield _idle(idle, start)
        if each.ended is not None and each.round_trips:
            word = {"committed": "COMMIT", "rolled back": "ROLLBACK"}.get(each.outcome, each.outcome)
            since = each.ended - each.ending_seconds
            yield Shown(since - start, each.ending_seconds, "control", word, inside=True)
    for since, until in report.pool_waits:
        if until - since >= NOTICED_IDLE:
            yield Shown(since - start, until - since, "wait", "waits for a connection of the pool")
    for kind, since, until, error in report.hooks:
        yield Shown(since - start, until - since, "hook", f"on_{kind} hook", note=error or "")


def _sent(one: Statement | Command, start: float) -> Shown:
    text = " ".join(one.sql.split())
    if isinstance(one, Command):
        return Shown(one.started - start, one.ended - one.started, "control", text, inside=True)
    text = shortened("; ".join((*one.carried, text)), 2000)
    note = one.error or ("" if one.rows < 0 else f"{one.rows} row{'' if one.rows == 1 else 's'}")
    return Shown(
        one.started - start, one.seconds, one.kind, text, str(one.line or ""), one.number, one.transaction is not None,
        note,
    )  # fmt: skip


def _idle(idle: Idle, start: float) -> Shown:
    return Shown(idle.started - start, idle.seconds, "idle", "idle in the transaction", idle.where, inside=True)


def shortened(sql: str, most: int) -> str:
    """`sql` on one line, and not longer than `most`."""
    text = " ".join(sql.split())
    return text if len(text) <= most else text[: most - 1] + "…"

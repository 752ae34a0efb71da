"""From a measurement to bars on a time axis: what is drawn where. The page's template says how it looks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fictive.testing.wire import Exchange

from .sides import Measurement, Wait, one_line, shortened

_CONTROL = {"BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE", "DEALLOCATE"}


@dataclass(frozen=True)
class Bar:
    """`left` and `width` are in percent of the axis."""

    kind: str
    left: float
    width: float
    title: str


@dataclass
class Lane:
    label: str
    kind: str
    bars: list[Bar] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """A round trip, or a wait, in the list of what happened."""

    at: float
    took: float
    kind: str
    text: str
    full: str
    connection: int | None
    inside: bool


@dataclass(frozen=True)
class Axis:
    """From 0 to `end` seconds."""

    end: float

    @classmethod
    def for_all(cls, measurements: list[Measurement]) -> Axis:
        return cls(max(measurement.seconds for measurement in measurements) * 1.02)

    def percent(self, seconds: float) -> float:
        return round(100 * seconds / self.end, 3)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Position in percent and label of about five ticks."""
        power = 10 ** math.floor(math.log10(self.end / 5))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 6 >= self.end)
        return [
            (self.percent(number * step), f"{number * step * 1000:g}") for number in range(int(self.end / step) + 1)
        ]


def lanes(measurement: Measurement, axis: Axis) -> list[Lane]:
    """A lane for each request, and one for each connection that was used."""
    start = measurement.start

    def bar(kind: str, since: float, until: float, title: str) -> Bar:
        return Bar(kind, axis.percent(since - start), axis.percent(until - since), f"{title}, {ms(until - since)}")

    found = []
    for number, answer in enumerate(measurement.answers, 1):
        lane = Lane("request" if len(measurement.answers) == 1 else f"request {number}", "request")
        lane.bars.append(bar("request", answer.start, answer.end, f"the request, {answer.status}"))
        lane.bars += [
            bar("wait", wait.start, wait.end, f"waits for the insurer, {_held(wait)}") for wait in answer.waits
        ]
        found.append(lane)
    for number, exchanges in _by_connection(measurement).items():
        lane = Lane(f"connection {number}", "connection")
        lane.bars += [bar("transaction", since, until, "a transaction") for since, until in _transactions(exchanges)]
        lane.bars += [bar(_kind(one), one.start, one.end, one_line(one)) for one in exchanges]
        found.append(lane)
    if not measurement.exchanges:
        found.append(Lane("no connection", "connection"))
    return found


def lines(measurement: Measurement) -> list[Line]:
    """Every round trip and every wait, in order."""
    start = measurement.start
    found = []
    transactions = []
    for number, exchanges in _by_connection(measurement).items():
        transactions += _transactions(exchanges)
        for one in exchanges:
            inside = any(since <= one.start and one.end <= until for since, until in _transactions(exchanges))
            found.append(
                Line(one.start - start, one.end - one.start, _kind(one), shortened(one), one_line(one), number, inside)
            )
    for wait in measurement.waits:
        text = f"waits for the insurer, {_held(wait)}"
        inside = any(since <= wait.start < until for since, until in transactions)
        found.append(Line(wait.start - start, wait.end - wait.start, "wait", text, text, None, inside))
    return sorted(found, key=lambda line: line.at)


def _transactions(exchanges: list[Exchange]) -> list[tuple[float, float]]:
    """From when until when one connection was in a transaction."""
    found = []
    since: float | None = None
    for exchange in exchanges:
        if exchange.status != "I" and since is None:
            since = exchange.start
        elif exchange.status == "I" and since is not None:
            found.append((since, exchange.end))
            since = None
    return found


def _held(wait: Wait) -> str:
    return f"{wait.held or 'no'} connection{'' if wait.held == 1 else 's'} held"


def ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"


def _by_connection(measurement: Measurement) -> dict[int, list[Exchange]]:
    """The round trips of each connection; connections are numbered from 1 in the order of their first use."""
    numbers: dict[int, int] = {}
    found: dict[int, list[Exchange]] = {}
    for exchange in measurement.exchanges:
        number = numbers.setdefault(exchange.connection, len(numbers) + 1)
        found.setdefault(number, []).append(exchange)
    return found


def _kind(exchange: Exchange) -> str:
    word = one_line(exchange).partition(" ")[0].upper()
    if word in _CONTROL:
        return "control"
    return "read" if word == "SELECT" else "write"

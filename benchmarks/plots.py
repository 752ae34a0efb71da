"""The plots: an SVG writer of just what they need.

Colours are set by classes in the file, for light and dark by the reader's system. Each has its own background, so that
it can be read where a page's theme and the system differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .peers import PLAIN, title
from .results import WAYS, Result, Run
from .timing import Spread

_STYLE = """
svg { font: 13px system-ui, sans-serif }
.back { fill: #ffffff } text { fill: #24292f } .dim { fill: #57606a }
.grid { stroke: #d0d7de } .one { stroke: #57606a }
.whisker { stroke: #24292f; stroke-width: 1.2 } .line { fill: none; stroke-width: 2.2 } .strong { font-weight: 600 }
.plain { --c: #8c959f } .lite { --c: #bf8700 } .django { --c: #1a7f37 } .raw { --c: #8250df } .fictive { --c: #0969da }
.bar { fill: var(--c) } .line { stroke: var(--c) } .dot { fill: var(--c) }
.thin { stroke: var(--c); stroke-width: 1.2 }
@media (prefers-color-scheme: dark) {
.back { fill: #161b22 } text { fill: #e6edf3 } .dim { fill: #9da7b3 }
.grid { stroke: #30363d } .one { stroke: #9da7b3 }
.whisker { stroke: #e6edf3 }
.plain { --c: #8b949e } .lite { --c: #d29922 } .django { --c: #3fb950 } .raw { --c: #a371f7 } .fictive { --c: #58a6ff }
}
""".strip()

WIDTH = 720
TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Mark:
    """One value of one contender."""

    peer: str
    spread: Spread


@dataclass(frozen=True)
class Group:
    label: str
    marks: list[Mark]


def captions(run: Run) -> dict[str, dict[str, str]]:
    """For each measurement the plots that `draw` makes of it: their names and what they show."""
    found: dict[str, dict[str, str]] = {}
    for result in run.results:
        if result.name == "memory" or result.titles:
            continue  # few numbers, or of contenders that have no colour; the table says it
        several = len(result.ways()) > 1
        found[result.name] = {
            f"{result.name}-{way}" if several else result.name: _caption(result, way) for way in result.ways()
        }
    return found


def draw(run: Run) -> dict[str, str]:
    """The SVG of each plot by its name."""
    found = {}
    for result in run.results:
        for (name, caption), way in zip(captions(run).get(result.name, {}).items(), result.ways(), strict=False):
            if result.name == "views":
                found[name] = lines(caption, _ratio_groups(result, way, run.peers), run.driver)
            else:
                found[name] = bars(caption, _groups(result, way, run.peers), run.driver, result.digits)
    return found


def _caption(result: Result, way: str) -> str:
    if result.name == "views":
        return f"Requests per second, times those of {title(PLAIN)}, {WAYS[way]}"
    less = "" if result.higher_is_better else ", less is better"
    return f"{result.title}: {result.unit}{less}; {WAYS[way]}"


def _groups(result: Result, way: str, peers: Sequence[str]) -> list[Group]:
    return [
        Group(case.label, [Mark(peer, case.spread(peer)) for peer in peers if peer in case.samples])
        for case in result.cases
        if case.way == way
    ]


def _ratio_groups(result: Result, way: str, peers: Sequence[str]) -> list[Group]:
    return [
        Group(case.label, [Mark(peer, ratio) for peer in peers if (ratio := result.ratio(case, peer))])
        for case in result.cases
        if case.way == way
    ]


def bars(caption: str, groups: Sequence[Group], driver: str, digits: int) -> str:
    """Horizontal bars from zero, with a line from quartile to quartile."""
    left, right, bar, gap, top = 170, 90, 17, 16, 44
    highest = max((mark.spread.high for group in groups for mark in group.marks), default=1) or 1
    scale = (WIDTH - left - right) / highest
    parts: list[str] = []
    y = top
    for group in groups:
        if len(groups) > 1:
            parts.append(_text(12, y + 12, group.label, "strong"))
            y += 20
        for mark in group.marks:
            spread = mark.spread
            middle = y + bar / 2
            parts.append(_text(left - 8, middle + 4.5, title(mark.peer, driver), _emphasis(mark.peer), "end"))
            parts.append(
                f'<rect class="bar {mark.peer}" x="{left}" y="{y + 1}" width="{spread.median * scale:.1f}"'
                f' height="{bar - 2}" rx="2"/>'
            )
            parts.append(_line(left + spread.low * scale, middle, left + spread.high * scale, middle, "whisker"))
            end = left + max(spread.high, spread.median) * scale
            parts.append(_text(end + 7, middle + 4.5, f"{spread.median:,.{digits}f}", _emphasis(mark.peer)))
            y += bar + 3
        y += gap
    return _svg(caption, y, parts)


def lines(caption: str, groups: Sequence[Group], driver: str) -> str:
    """A line for each contender over the groups, with a line from quartile to quartile at each point."""
    left, right, top, height, bottom = 52, 150, 50, 260, 40
    peers = list(dict.fromkeys(mark.peer for group in groups for mark in group.marks))
    highest = max((mark.spread.high for group in groups for mark in group.marks), default=1)
    step = _step(highest)
    top_value = step * (int(highest / step) + 1)
    base = top + height

    def y_of(value: float) -> float:
        return base - value / top_value * height

    def x_of(index: int) -> float:
        return left + 30 + index * (WIDTH - left - right - 60) / max(1, len(groups) - 1)

    parts: list[str] = []
    for number in range(round(top_value / step) + 1):
        value = number * step
        parts.append(_line(left, y_of(value), WIDTH - right, y_of(value), "one" if value == 1 else "grid"))
        parts.append(_text(left - 8, y_of(value) + 4.5, f"{value:g}{TIMES}", "dim", "end"))
    for index, group in enumerate(groups):
        parts.append(_text(x_of(index), base + 22, group.label, "dim", "middle"))
    ends: dict[str, float] = {}
    for peer in sorted(peers, key=lambda peer: peer == "fictive"):  # fictive's on top
        points = [
            (x_of(index), mark.spread)
            for index, group in enumerate(groups)
            for mark in group.marks
            if mark.peer == peer
        ]
        path = " ".join(f"{x:.1f},{y_of(spread.median):.1f}" for x, spread in points)
        parts.append(f'<polyline class="line {peer}" points="{path}"/>')
        for x, spread in points:
            parts.append(_line(x, y_of(spread.low), x, y_of(spread.high), f"thin {peer}"))
            parts.append(f'<circle class="dot {peer}" cx="{x:.1f}" cy="{y_of(spread.median):.1f}" r="3.5"/>')
        ends[peer] = y_of(points[-1][1].median)
    for peer, y in _apart(ends, 17).items():
        parts.append(f'<circle class="dot {peer}" cx="{WIDTH - right + 14}" cy="{y:.1f}" r="4.5"/>')
        parts.append(_text(WIDTH - right + 24, y + 4.5, title(peer, driver), _emphasis(peer)))
    return _svg(caption, base + bottom, parts)


def _step(highest: float) -> float:
    return next((step for step in (0.25, 0.5, 1, 2, 5) if highest / step <= 7), 10)


def _apart(places: dict[str, float], distance: float) -> dict[str, float]:
    """The places moved down as far as it takes for labels not to overlap."""
    found: dict[str, float] = {}
    last = -distance
    for name, place in sorted(places.items(), key=lambda pair: pair[1]):
        last = found[name] = max(place, last + distance)
    return found


def _emphasis(peer: str) -> str:
    return "strong" if peer == "fictive" else ""


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _svg(caption: str, height: float, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}"'
            f' height="{height:.0f}" role="img">',
            f"<title>{escape(caption)}</title>",
            f"<style>\n{_STYLE}\n</style>",
            f'<rect class="back" width="{WIDTH}" height="{height:.0f}" rx="8"/>',
            _text(12, 24, caption, "strong"),
            *parts,
            "</svg>\n",
        ]
    )

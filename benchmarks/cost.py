"""What work costs with plain and with fictive, on each driver, and by which functions where that is too much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from . import calls, instructions
from .peers import PLAIN
from .results import CALLS, INSTRUCTIONS, Cost

if TYPE_CHECKING:
    from .measurements import Bench

_FUNCTIONS = 10  # of a row, those that make most of it


def count_calls(bench: Bench, python: str, drivers: Sequence[str]) -> Cost:
    cost = Cost(CALLS, {}, {})
    found = {}
    for driver in drivers:
        bench.progress.detail(driver)
        found[driver] = calls.measure(bench.databases, driver, python=python, repeats=bench.scale.call_repeats)
        cost.versions = found[driver].versions
        _add(cost, driver, found[driver].rows())
    for label, driver in cost.short():
        cost.profiles[label, driver] = _more(found[driver].functions[label])
    return cost


def count_instructions(bench: Bench, python: str, drivers: Sequence[str]) -> Cost:
    cost = Cost(INSTRUCTIONS, {}, {})
    for driver in drivers:
        cost.versions, rows = instructions.measure(
            bench.databases,
            driver,
            python=python,
            repeats=bench.scale.instruction_repeats,
            labels=bench.scale.instruction_work,
            told=lambda text, driver=driver: bench.progress.detail(f"{driver} · {text}"),  # type: ignore[misc]
        )
        _add(cost, driver, rows)
    for driver in drivers:
        if labels := [label for label, on in cost.short() if on == driver]:
            # callgrind sees the interpreter's functions, not Python's: those are told by their calls.
            found = calls.measure(
                bench.databases, driver, python=python, repeats=bench.scale.call_repeats, labels=labels
            )
            for label in labels:
                cost.profiles[label, driver] = _more(found.functions[label])
    return cost


def _add(cost: Cost, driver: str, rows: dict[str, dict[str, float]]) -> None:
    for label, row in rows.items():
        cost.rows.setdefault(label, {})[driver] = row


def _more(row: dict[str, calls.Functions]) -> list[tuple[str, float, float]]:
    """The functions that fictive calls more often than plain, most first, with both numbers."""
    plain, fictive = row[PLAIN], row["fictive"]
    both = [(name, plain.get(name, 0.0), number) for name, number in fictive.items()]
    both.sort(key=lambda one: (one[1] - one[2], one[0]))
    return [one for one in both[:_FUNCTIONS] if one[2] > one[1]]


COSTS: dict[str, Callable[[Bench, str, Sequence[str]], Cost]] = {
    CALLS: count_calls,
    INSTRUCTIONS: count_instructions,
}

"""What a run found: plain data, which `report.py` shows and `--json` writes down."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .peers import PLAIN
from .timing import Spread, ratios
from .work import WORK

LOOPBACK = "loopback"
DELAYED = "delayed"
CORE = "insert().on_conflict_do_update()"  # how plain upserts
MERGE = "session.merge()"
FOUND, MADE = "found", "made"
# What the pieces of fictive.models are compared with.
BY_HAND = "mixins, against columns by hand"
NO_COLUMNS = "mixins, against no such columns"
BATCH = "lazy loads in batches, against selectinload"
DETECTOR = "N+1 detector, against none"
KEYSET = "a far page by keyset, against page 1"
# What work costs the client, in units that no load of the machine changes.
CALLS, INSTRUCTIONS = "calls", "instructions"
UNITS = {CALLS: "Function calls", INSTRUCTIONS: "Instructions"}
WAYS = {LOOPBACK: "on loopback", DELAYED: "with 0.5 ms each way"}


@dataclass
class Case:
    """One thing measured, by contender: a sample a round. Contenders that cannot do it are missing."""

    label: str
    way: str
    samples: dict[str, list[float]]

    def spread(self, peer: str) -> Spread:
        return Spread.of(self.samples[peer])


@dataclass
class Result:
    """One measurement, of several cases."""

    name: str
    title: str
    unit: str
    higher_is_better: bool
    what: str
    digits: int = 0
    cases: list[Case] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    titles: dict[str, str] = field(default_factory=dict)
    """What the contenders are called, where they are others than elsewhere."""

    def ratio(self, case: Case, peer: str) -> Spread | None:
        """How many times as good as plain; None where one of them is missing."""
        if peer not in case.samples or PLAIN not in case.samples:
            return None
        return ratios(case.samples[peer], case.samples[PLAIN], higher_is_better=self.higher_is_better)

    def find(self, label: str, way: str) -> Case | None:
        return next((case for case in self.cases if (case.label, case.way) == (label, way)), None)

    def ways(self) -> list[str]:
        return list(dict.fromkeys(case.way for case in self.cases))


@dataclass
class Counts:
    """Round trips: by work, driver and contender, as text ("3", "-")."""

    rows: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Cost:
    """What each piece of work costs with plain and with fictive, on one SQLAlchemy: calls, or instructions."""

    name: str
    versions: dict[str, str]
    rows: dict[str, dict[str, dict[str, float]]]
    """By work, driver and contender."""
    profiles: dict[tuple[str, str], list[tuple[str, float, float]]] = field(default_factory=dict)
    """Of each work and driver in `short()`: functions, with plain's calls and fictive's."""

    def ratio(self, label: str, driver: str) -> float:
        """How many times plain's cost is fictive's."""
        row = self.rows[label][driver]
        return row[PLAIN] / row["fictive"]

    def short(self) -> list[tuple[str, str]]:
        """Works and drivers where plain costs less than is aimed at, in whole per cent."""
        least = {work.label: 1.3 if work.by_key and self.name == INSTRUCTIONS else 1 for work in WORK}
        return [
            (label, driver)
            for label, row in self.rows.items()
            for driver in row
            if round(self.ratio(label, driver), 2) < least[label]
        ]


@dataclass
class Run:
    """All that one run found, and where."""

    smoke: bool
    driver: str
    rounds: int
    machine: dict[str, str]
    versions: dict[str, str]
    peers: list[str]
    counts: Counts | None = None
    costs: list[Cost] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def result(self, name: str) -> Result | None:
        return next((result for result in self.results if result.name == name), None)

    def measured(self) -> bool:
        """Whether anything but costs was measured."""
        return bool(self.counts or self.results)

    def to_json(self) -> dict[str, Any]:
        costs = [{**dataclasses.asdict(cost), "profiles": _by_name(cost.profiles)} for cost in self.costs]
        return {
            **dataclasses.asdict(self),
            "costs": costs,
            "targets": [dataclasses.asdict(target) for target in targets(self)],
        }


def _by_name(profiles: dict[tuple[str, str], Any]) -> dict[str, Any]:
    return {f"{label}, {driver}": profile for (label, driver), profile in profiles.items()}


@dataclass(frozen=True)
class Target:
    """What was aimed at, and what came of it; `met` is None where it was not measured."""

    text: str
    found: tuple[str, ...]
    met: bool | None


_AIMS = [
    # text, measurement, case, way, at least this ratio to plain
    ("view with 1 SELECT on loopback: at least 1.4 times plain", "views", "1 SELECT", LOOPBACK, 1.4),
    ("view with 5 SELECTs on loopback: within 15 % of plain", "views", "5 SELECTs", LOOPBACK, 0.85),
    ("50 threads on a pool of 5: at least 8 times plain", "slow", "50 threads", LOOPBACK, 8.0),
    ("view with 1 SELECT, 0.5 ms each way: at least 2.3 times plain", "views", "1 SELECT", DELAYED, 2.3),
    ("INSERT in a transaction, 0.5 ms each way: at least 1.35 times plain", "transactions", "INSERT", DELAYED, 1.35),
    ("INSERT in a savepoint, 0.5 ms each way: at least 2 times plain", "transactions", "savepoint INSERT", DELAYED, 2),
    ("10,000 links set: at least 20 times plain", "links", "by key", LOOPBACK, 20),
    ("rows upserted: at least 5 times session.merge()", "upsert_rows", f"plain by {MERGE}", LOOPBACK, 5),
    ("rows upserted, without merge(): at least 1.5 times plain", "upsert_rows", f"plain by {CORE}", LOOPBACK, 1.5),
    ("mixins: under 2 % of a flush", "models", BY_HAND, LOOPBACK, 0.98),
    ("lazy loads in batches: within 10 % of selectinload", "models", BATCH, LOOPBACK, 0.91),
    ("N+1 detector: under 5 % of 50 statements", "models", DETECTOR, LOOPBACK, 0.95),
    ("page 1,000 by keyset: within 5 % of page 1", "models", KEYSET, LOOPBACK, 0.95),
]
# What "nothing slower than plain on loopback" is about. A statement by itself is compared with plain's held
# connection to show its price, and is not in it.
_NEVER_SLOWER = ("views", "slow", "latency", "transactions")


def targets(run: Run) -> list[Target]:
    """What fictive was to reach, on this run's numbers."""
    found = [_judged(run, *aim) for aim in _AIMS]
    found += [_insert_of_copy(run), _never_slower(run)]
    found += [_cheap(run, CALLS, "at most plain's")]
    found += [_cheap(run, INSTRUCTIONS, "at most plain's; plain's at least 1.3 times those of a read by key")]
    return found


def _cheap(run: Run, name: str, aim: str) -> Target:
    text = f"{UNITS[name].lower()}: {aim}"
    costs = [cost for cost in run.costs if cost.name == name]
    if not costs:
        return Target(text, ("not measured",), None)
    short = [
        f"{label}, {driver}, SQLAlchemy {cost.versions['SQLAlchemy']}: {cost.ratio(label, driver):.2f}"
        for cost in costs
        for label, driver in cost.short()
    ]
    return Target(text, tuple(short) or ("in each row",), not short)


def _insert_of_copy(run: Run) -> Target:
    text = "rows inserted: at least 0.6 times the driver's own COPY"
    result = run.result("insert_rows")
    case = result.cases[0] if result and result.cases else None
    if case is None or not {"raw", "fictive"} <= case.samples.keys():
        return Target(text, ("not measured",), None)
    ratio = ratios(case.samples["fictive"], case.samples["raw"], higher_is_better=True)
    return Target(text, (_shown(ratio),), round(ratio.median, 2) >= 0.6)


def _judged(run: Run, text: str, name: str, label: str, way: str, least: float) -> Target:
    result = run.result(name)
    case = result.find(label, way) if result else None
    ratio = result.ratio(case, "fictive") if result and case else None
    if ratio is None:
        return Target(text, ("not measured",), None)
    return Target(text, (_shown(ratio),), round(ratio.median, 2) >= least)


def _never_slower(run: Run) -> Target:
    text = "nothing slower than plain on loopback"
    compared = [
        (f"{result.name}, {case.label}", ratio)
        for result in run.results
        for case in result.cases
        if result.name in _NEVER_SLOWER and case.way == LOOPBACK and (ratio := result.ratio(case, "fictive"))
    ]
    if not compared:
        return Target(text, ("not measured",), None)
    slower = [pair for pair in compared if round(pair[1].median, 2) < 1]
    shown = slower or [min(compared, key=lambda pair: pair[1].median)]
    return Target(text, tuple(f"{label}: {_shown(ratio)}" for label, ratio in shown), not slower)


def _shown(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"

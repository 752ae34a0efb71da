"""Showing what a run found: tables for the terminal, and reST and plots for the docs. No number is made here."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import plots
from .peers import PLAIN, title
from .proxy import ROOT
from .results import UNITS, WAYS, Case, Cost, Counts, Result, Run, Target, targets
from .work import PEERS

DOCS = ROOT / "docs" / "benchmarks"
TABLES = "results.inc"  # not .rst, which Sphinx would take for a page
_TO = "\N{EN DASH}"


@dataclass(frozen=True)
class Table:
    """A title and cells, each of one line or more; the first row is the head."""

    title: str
    rows: list[list[list[str]]]


def machine() -> dict[str, str]:
    """What it runs on, and how busy that was before it began."""
    found = {
        "CPU": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "system": f"{platform.system()} {platform.release()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
    }
    if hasattr(os, "getloadavg"):
        found["load at the start"] = f"{os.getloadavg()[0]:.1f}"
    return found


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def versions(postgresql: str) -> dict[str, str]:
    found = {"PostgreSQL": postgresql}
    for name in ("SQLAlchemy", "Flask", "Flask-SQLAlchemy", "Flask-SQLAlchemy-Lite", "Django", "psycopg2", "psycopg"):
        for package in (name, f"{name}-binary"):
            try:
                found[name] = version(package)
                break
            except PackageNotFoundError:
                continue
    return {**found, "fictive": _own_version()}


def _own_version() -> str:
    """The commit, with a + where files differ from it."""
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
        )
    except OSError:
        return "?"
    return asked.stdout.strip() or "?"


# Tables


def tables(run: Run) -> list[Table]:
    found = [_counts_table(run.counts, run)] if run.counts else []
    found += [table for cost in run.costs for table in _cost_tables(cost)]
    found += [table for result in run.results for table in _result_tables(result, run)]
    return found


def _counts_table(counts: Counts, run: Run) -> Table:
    drivers = list(dict.fromkeys(driver for row in counts.rows.values() for driver in row))
    head = ["", *(title(peer) for peer in run.peers)]
    rows = [[[cell] for cell in head]]
    for label, row in counts.rows.items():
        cells = []
        for peer in run.peers:
            # Where the drivers agree, once.
            every = [row.get(driver, {}).get(peer, "-") for driver in drivers]
            cells.append([" / ".join(every)] if len(set(every)) > 1 else every[:1])
        rows.append([[label], *cells])
    by = f"{' / '.join(drivers)} where they differ" if len(drivers) > 1 else drivers[0]
    return Table(f"Round trips ({by})", rows)


def _cost_tables(cost: Cost) -> list[Table]:
    """All rows; then for each where plain costs less than is aimed at, the functions that fictive calls more often."""
    on = f"SQLAlchemy {cost.versions['SQLAlchemy']}"
    drivers = list(next(iter(cost.rows.values())))
    head = [f"{driver}: {name}" for driver in drivers for name in (*map(title, PEERS), "ratio")]
    rows = [[[cell] for cell in ("", *head)]]
    for label, row in cost.rows.items():
        cells = []
        for driver in drivers:
            cells += [[f"{row[driver][peer]:,.0f}"] for peer in PEERS]
            cells.append([f"{cost.ratio(label, driver):.2f}"])
        rows.append([[label], *cells])
    found = [Table(f"{UNITS[cost.name]}, {on}", rows)]
    if cost.profiles:
        lines = [[["work"], ["function, and how often plain and fictive call it"]]]
        lines += [
            [[f"{label}, {driver}"], [f"{name}: {plain:.0f}, {fictive:.0f}" for name, plain, fictive in functions]]
            for (label, driver), functions in cost.profiles.items()
        ]
        found.append(Table(f"{UNITS[cost.name]}, {on}: where plain is ahead, what fictive calls more often", lines))
    return found


def _result_tables(result: Result, run: Run) -> list[Table]:
    found = []
    for way in result.ways():
        cases = [case for case in result.cases if case.way == way]
        present = [peer for peer in run.peers if any(peer in case.samples for case in cases)]
        rows = [[[""], *([result.titles.get(peer) or title(peer, run.driver)] for peer in present)]]
        rows += [[[case.label], *(_cell(result, case, peer) for peer in present)] for case in cases]
        found.append(Table(f"{result.title}: {result.unit}, {WAYS[way]}", rows))
    return found


def _cell(result: Result, case: Case, peer: str) -> list[str]:
    """Median, quartiles, and the same of the ratio to plain."""
    if peer not in case.samples:
        return ["-"]
    spread = case.spread(peer)
    low, median, high = (f"{value:.{result.digits}f}" for value in (spread.low, spread.median, spread.high))
    lines = [median, f"{low}{_TO}{high}"]
    ratio = result.ratio(case, peer)
    if ratio is not None and peer != PLAIN:
        lines.append(f"{plots.TIMES}{ratio.median:.2f} ({ratio.low:.2f}{_TO}{ratio.high:.2f})")
    return lines


def as_text(run: Run) -> str:
    """Everything, for a terminal."""
    parts = ["\n".join(about(run))]
    if run.counts:
        parts += [_text_table(_counts_table(run.counts, run)), "\n".join(run.counts.notes)]
    parts += [_text_table(table) for cost in run.costs for table in _cost_tables(cost)]
    for result in run.results:
        parts += [_text_table(table) for table in _result_tables(result, run)]
        parts.append("\n".join([result.what, *result.notes]))
    parts.append(_text_table(Table("Targets", target_rows(run, all_of_them=run.measured()))))
    parts += [f"FAILED: {failure}" for failure in run.failures]
    return "\n\n".join(parts)


def about(run: Run) -> list[str]:
    """What the numbers are of, a line each."""
    lines = [", ".join(f"{name} {value}" for name, value in part.items()) for part in (run.machine, run.versions)]
    lines.append(
        f"Timed on {run.driver}, {run.rounds} rounds, the contenders taking turns in each; median, quartiles, and "
        f"behind {plots.TIMES} the ratio to {title(PLAIN)} in the same round: more than 1 is better."
    )
    if run.smoke:
        lines.append("A SMOKE RUN: it shows that everything runs, and its times mean nothing.")
    return lines


def target_rows(run: Run, *, all_of_them: bool = True) -> list[list[list[str]]]:
    rows = [[["aimed at"], ["found"], [""]]]
    shown = [target for target in targets(run) if all_of_them or target.met is not None]
    return rows + [[[target.text], list(target.found), [verdict(target)]] for target in shown]


def verdict(target: Target) -> str:
    return {True: "pass", False: "MISS", None: "-"}[target.met]


def _text_table(table: Table) -> str:
    columns = len(table.rows[0])
    widths = [max(len(line) for row in table.rows for line in row[column]) for column in range(columns)]
    tall = any(len(cell) > 1 for row in table.rows for cell in row)
    lines = [table.title, "=" * len(table.title)]
    for number, row in enumerate(table.rows):
        for index in range(max(map(len, row))):
            cells = [cell[index] if index < len(cell) else "" for cell in row]
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
        if number == 0:
            lines.append("-" * (sum(widths) + 2 * (columns - 1)))
        elif tall and number + 1 < len(table.rows):
            lines.append("")
    return "\n".join(lines)


# The docs


def write(run: Run, directory: Path = DOCS) -> list[Path]:
    """Write what docs/benchmarks.rst includes; return the files. Plots that only an earlier run has are removed.

    A run of costs alone leaves the times as they are.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files = {f"{name}.inc": costs_as_rst(run, name) for name in dict.fromkeys(cost.name for cost in run.costs)}
    if run.measured():
        drawn = {f"{name}.svg": text for name, text in plots.draw(run).items()}
        for old in directory.glob("*.svg"):
            if old.name not in drawn:
                old.unlink()
        files |= {**drawn, TABLES: as_rst(run)}
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in files]


def as_rst(run: Run) -> str:
    plotted = plots.captions(run)
    lines = [".. Written by `./run bench --write`. Changes here are lost.", ""]
    if len(short := in_short(run)) > 1:
        lines += ["In short", "--------", ""]
        lines += _rst_table(Table("Speed in relation to Flask-SQLAlchemy", short), header=1)
    if run.counts:
        lines += ["Round trips", "-----------", ""]
        lines += _rst_table(_counts_table(run.counts, run), header=1)
        lines += [f"* {_escaped(note)}" for note in run.counts.notes] + [""]
    for result in run.results:
        lines += [result.title, "-" * len(result.title), "", _escaped(" ".join([result.what, *result.notes])), ""]
        for name, caption in plotted.get(result.name, {}).items():
            lines += [f".. image:: benchmarks/{name}.svg", f"   :alt: {caption}", ""]
        for table in _result_tables(result, run):
            lines += _rst_table(table, header=1)
    lines += ["The run", "-------", ""]
    for line in about(run):
        lines += [_escaped(line), ""]
    lines += _rst_table(Table("What fictive aims at", target_rows(run)), header=1)
    return "\n".join(lines)


def costs_as_rst(run: Run, name: str) -> str:
    """What names no machine, since none of it depends on one."""
    costs = [cost for cost in run.costs if cost.name == name]
    lines = [f".. Written by `./run bench {name} --write`. Changes here are lost.", ""]
    with_python = [", ".join(f"{part} {number}" for part, number in cost.versions.items()) for cost in costs]
    lines += [f"Counted on {dt.date.today()} with {'; and with '.join(with_python)}.", ""]
    for cost in costs:
        for table in _cost_tables(cost):
            lines += _rst_table(table, header=1)
    return "\n".join(lines)


def in_short(run: Run) -> list[list[list[str]]]:
    """What was compared with Flask-SQLAlchemy, and how many times as fast it was."""
    rows = [[["work"], ["times as fast; below 1 slower (quartiles)"]]]
    for aim, found, _ in target_rows(run)[1:]:
        work, _, than = aim[0].partition(": ")
        if than.endswith("plain") and len(found) == 1:
            rows.append([[work], found])
    return rows


def _rst_table(table: Table, header: int) -> list[str]:
    lines = [f".. list-table:: {_escaped(table.title)}", f"   :header-rows: {header}", ""]
    for row in table.rows:
        for index, cell in enumerate(row):
            start = "   * - " if index == 0 else "     - "
            # A line block keeps the lines apart.
            texts = [f"| {_escaped(line)}" for line in cell] if len(cell) > 1 else [_escaped(cell[0])]
            lines.append((start + texts[0]).rstrip())
            lines += [f"       {text}" for text in texts[1:]]
    return [*lines, ""]


def _escaped(text: str) -> str:
    return re.sub(r"(^[-+*]|[*`|\\]|_(?=\W|$))", r"\\\1", text)


def as_json(run: Run) -> str:
    return json.dumps(run.to_json(), indent=1, ensure_ascii=False)

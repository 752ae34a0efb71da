"""Where a view's work is done: the bytecode instructions that Python executes for it, by package. Within one per cent
the same on every machine.

`python -m benchmarks.bytecodes --driver psycopg2`
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from fictive.testing import postgres

from . import peers
from .calls import in_child, warm
from .peers import Setup
from .proxy import ROOT
from .schema import Databases

REPEATS = 2
_OURS = ("fictive", "benchmarks")


def count(work: Callable[[], object], repeats: int = REPEATS) -> Counter[str]:
    """By package, the instructions of a piece of work; what is written in C is not seen."""
    found: Counter[str] = Counter()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            found[_package(frame.f_code.co_filename)] += 1
        return trace

    with warm(work):
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            for _ in range(repeats):
                work()
        finally:
            sys.settrace(before)
    return Counter({package: round(number / repeats) for package, number in found.items()})


def _package(file: str) -> str:
    """That of a function's file: `sqlalchemy`; `Python` for the standard library."""
    path = Path(file)
    if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in _OURS:
        return path.relative_to(ROOT).parts[0]
    parts = path.parts
    return parts[parts.index("site-packages") + 1] if "site-packages" in parts else "Python"


def measure(
    databases: Databases, driver: str, selects: Sequence[int], *, soft_deleting: bool = False
) -> dict[str, dict[str, int]]:
    """By contender and view, with so many SELECTs, the instructions by package. In a process of its own: listeners on
    classes, which somebody else has left, would be called on each statement."""
    arguments = ["--driver", driver, "--selects", *map(str, selects)]
    if soft_deleting:
        arguments.append("--soft-deleting")
    return in_child("benchmarks.bytecodes", arguments, databases)  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--driver", choices=["psycopg2", "psycopg"], default="psycopg2")
    parser.add_argument("--selects", type=int, nargs="+", default=[1, 5, 20], help="of each view (default: 1 5 20)")
    parser.add_argument(
        "--soft-deleting",
        action="store_true",
        help="beside a model with SoftDeleteMixin, for which all SELECTs are looked at",
    )
    options = parser.parse_args()
    if "BENCHMARKS_URLS" in os.environ:
        found: dict[str, Counter[str]] = {}
        if options.soft_deleting:
            importlib.import_module(f"{__package__}.models")
        for name, url in json.loads(os.environ["BENCHMARKS_URLS"]).items():
            with contextlib.closing(peers.load(name)(Setup(url, options.driver))) as peer:
                for number in options.selects:
                    found[f"{name}, {number}"] = count(functools.partial(peer.request, f"/selects/{number}"))
        json.dump(found, sys.stdout)
        return
    with postgres.private_server() as server, Databases(server.url(), options.driver) as databases:
        measured = measure(databases, options.driver, options.selects, soft_deleting=options.soft_deleting)
        for view, by_package in measured.items():
            shown = ", ".join(f"{package} {size:,}" for package, size in Counter(by_package).most_common())
            print(f"{view} SELECTs: {sum(by_package.values()):,} ({shown})")


if __name__ == "__main__":
    main()

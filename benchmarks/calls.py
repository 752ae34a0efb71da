"""Function calls of a piece of work, by cProfile: exact, and the same on every machine.

`BENCHMARKS_URLS='{"plain": URL, ...}' python -m benchmarks.calls DRIVER REPEATS [LABEL ...]` prints JSON. In a process
of its own, because listeners on classes, which somebody else has left, would be called on each statement.
"""

from __future__ import annotations

import contextlib
import cProfile
import dataclasses
import gc
import json
import os
import platform
import pstats
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import peers
from .peers import Setup
from .proxy import ROOT, child_environment
from .schema import Databases
from .work import PEERS, chosen

WARM = 12  # psycopg prepares a statement on its sixth run
REPEATS = 20

_C = "~"  # the file of functions that are not Python's

Functions = dict[str, float]


@dataclass(frozen=True)
class Found:
    """By work and contender, the calls of each function and by it of functions in C, on one driver."""

    versions: dict[str, str]
    functions: dict[str, dict[str, Functions]]

    def rows(self) -> dict[str, dict[str, float]]:
        """By work and contender, all calls."""
        return {
            label: {name: sum(functions.values()) for name, functions in row.items()}
            for label, row in self.functions.items()
        }


def measure(
    databases: Databases,
    driver: str,
    *,
    python: str = sys.executable,
    repeats: int = REPEATS,
    labels: Sequence[str] = (),
) -> Found:
    """Count in a child process that `python` runs: it may be another environment's."""
    return Found(**in_child("benchmarks.calls", [driver, str(repeats), *labels], databases, python))


def in_child(module: str, arguments: Sequence[str], databases: Databases, python: str = sys.executable) -> Any:
    """What a module prints as JSON about contenders, each on a new database."""
    with new_urls(databases) as urls:
        done = subprocess.run(
            [python, "-m", module, *arguments],
            cwd=ROOT,
            # In the environment rather than among the arguments, which others on the machine can read.
            env={**child_environment(), "PYTHONHASHSEED": "0", "BENCHMARKS_URLS": json.dumps(urls)},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"counting by {python} -m {module} {' '.join(arguments)} failed; its error is above")
    return json.loads(done.stdout)


@contextlib.contextmanager
def new_urls(databases: Databases) -> Iterator[dict[str, str]]:
    """A new database for each contender: what it is to make must not be there already."""
    purposes = {name: f"cost_{name}" for name in PEERS}
    try:
        yield {name: databases.url(purpose) for name, purpose in purposes.items()}
    finally:
        for purpose in purposes.values():
            databases.drop(purpose)


@contextlib.contextmanager
def warm(work: Callable[[], object]) -> Iterator[None]:
    """`work` was done until nothing is new in it, and for the block there is no garbage collection: finalizers of what
    earlier work left are not this work's."""
    for _ in range(WARM):
        work()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def count(work: Callable[[], None], repeats: int) -> Functions:
    """Calls of each Python function, and by it of functions in C, a piece of work."""
    profile = cProfile.Profile()
    with warm(work):
        profile.enable()
        for _ in range(repeats):
            work()
        profile.disable()
    found: Functions = {}
    for where, (_, calls, _, _, callers) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if where[0] == _C:
            for caller, (_, from_it, _, _) in callers.items():
                found[_name(caller)] = found.get(_name(caller), 0) + from_it / repeats
        else:
            found[_name(where)] = found.get(_name(where), 0) + calls / repeats
    return found


def _name(where: tuple[str, int, str]) -> str:
    """`package/module.py: function`, without the line: functions of the same name count together."""
    file, _, function = where
    return function if file == _C else f"{'/'.join(Path(file).parts[-2:])}: {function}"


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in ("SQLAlchemy", "Flask-SQLAlchemy", "psycopg2-binary", "psycopg"):
        with contextlib.suppress(PackageNotFoundError):
            found[package.removesuffix("-binary")] = version(package)
    return found


def main() -> None:
    driver, repeats, *labels = sys.argv[1:]
    found = Found(versions(), {work.label: {} for work in chosen(labels)})
    for name, url in json.loads(os.environ["BENCHMARKS_URLS"]).items():
        with contextlib.closing(peers.load(name)(Setup(url, driver))) as peer:
            for work in chosen(labels):
                found.functions[work.label][name] = count(work.on(peer), int(repeats))
    json.dump(dataclasses.asdict(found), sys.stdout)


if __name__ == "__main__":
    main()

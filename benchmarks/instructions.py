"""Machine instructions of a piece of work, by valgrind: within some per cent the same on every machine.

`BENCHMARKS_URL=URL python -m benchmarks.instructions DRIVER PEER` is the child, which valgrind runs: it reads what is
to be done from standard input. Counting is switched on for the repetitions alone, so that starting and warming up
take seconds, not minutes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from . import calls, peers
from .peers import Setup
from .proxy import ROOT, child_environment
from .schema import Databases
from .work import WORK, chosen

REPEATS = 10
_NOTHING = "nothing"


class ValgrindMissing(RuntimeError):
    """Instructions are counted by valgrind, which no Python package brings."""

    def __init__(self) -> None:
        super().__init__("instructions are counted by valgrind: install the Debian package valgrind")


def available() -> bool:
    return all(map(shutil.which, ("valgrind", "callgrind_control")))


def measure(
    databases: Databases,
    driver: str,
    *,
    python: str = sys.executable,
    repeats: int = REPEATS,
    labels: Sequence[str] = (),
    told: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """The versions, and by work and contender the instructions of one; each contender in a process of its own."""
    if not available():
        raise ValgrindMissing
    rows: dict[str, dict[str, float]] = {work.label: {} for work in chosen(labels)}
    with calls.new_urls(databases) as urls:
        for name, url in urls.items():
            with Child(python, driver, name, url) as child:
                for label, row in rows.items():
                    told(f"{name}: {label}")
                    row[name] = child.instructions(label, repeats)
            versions = child.versions
    return versions, rows


class Child:
    """A process under valgrind that does a contender's work when it is told to."""

    versions: dict[str, str]
    """Of what is installed for its Python."""

    def __init__(self, python: str, driver: str, name: str, url: str) -> None:
        self._command = [python, "-m", "benchmarks.instructions", driver, name]
        self._environment = {**child_environment(), "PYTHONHASHSEED": "0", "BENCHMARKS_URL": url}
        self._dumps = 0

    def __enter__(self) -> Child:
        with contextlib.ExitStack() as stack:
            self._directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="instructions-")))
            valgrind = ["valgrind", "--quiet", "--tool=callgrind", "--instr-atstart=no", self._pipes()]
            self._process = subprocess.Popen(
                [*valgrind, f"--callgrind-out-file={self._directory}/out", *self._command],
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(self._ending())
            self.versions = json.loads(self._heard())
            self._nothing: dict[int, int] = {}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        with self._process:
            try:
                yield
                self._process.communicate(timeout=60)  # closes its input, which is its sign to end
            finally:
                self._process.kill()

    def instructions(self, label: str, repeats: int) -> float:
        """Of one piece of work, after warming up; those of being told to do it, and of the loop, are taken off."""
        if repeats not in self._nothing:
            self._nothing[repeats] = self._count(_NOTHING, repeats)
        return (self._count(label, repeats) - self._nothing[repeats]) / repeats

    def _count(self, label: str, repeats: int) -> int:
        self._say(label)
        self._heard()
        self._control("--instr=on")
        self._say(str(repeats))
        self._heard()
        self._control("--dump")
        self._control("--instr=off")
        self._dumps += 1
        text = (self._directory / f"out.{self._dumps}").read_text(encoding="utf-8")
        found = re.search(r"^totals: (\d+)", text, re.MULTILINE)
        if found is None:
            raise RuntimeError("callgrind wrote no total")
        return int(found[1])

    def _pipes(self) -> str:
        """Where valgrind's pipes are: they go with the directory, even when the child is killed."""
        return f"--vgdb-prefix={self._directory}/vgdb"

    def _control(self, what: str) -> None:
        command = ["callgrind_control", self._pipes(), what, str(self._process.pid)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or "OK" not in done.stdout:
            raise RuntimeError(f"callgrind_control {what} failed: {done.stdout}{done.stderr}")

    def _say(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n")
        self._process.stdin.flush()

    def _heard(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"{' '.join(self._command)} under valgrind ended; its error is above")
        return line


def main() -> None:
    """The child: it says its versions, then for each label that it reads "warm", and after a number "done"."""
    driver, name = sys.argv[1:]
    with contextlib.closing(peers.load(name)(Setup(os.environ["BENCHMARKS_URL"], driver))) as peer:
        works = {_NOTHING: lambda: None, **{work.label: work.on(peer) for work in WORK}}
        print(json.dumps(calls.versions()), flush=True)
        for line in iter(sys.stdin.readline, ""):
            work = works[line.strip()]
            for _ in range(calls.WARM):
                work()
            gc.collect()
            gc.disable()
            print("warm", flush=True)
            for _ in range(int(sys.stdin.readline())):
                work()
            print("done", flush=True)
            gc.enable()


if __name__ == "__main__":
    main()

"""`./run test --sandbox`: the tests once more, each app of theirs in a sandbox (contract H4).

Only tests with the fixture `put_in_sandbox`, which `make_app` uses, are run. `look` looks from within the sandbox, and
`wire.record()` is the sandbox's own record. Tests that cannot pass are listed in `not_in_sandbox.txt` with the reason.
They are run as well, unless their line ends with "!", since they hang or leave something behind. A line whose tests
have passed, or are gone, fails the run.
"""

from __future__ import annotations

import contextlib
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from fictive.testing.sandbox import Sandbox, sandbox
from fictive.testing.shared_connection import Recording, SharedConnection
from fictive.testing.wire import Wire

LIST = Path(__file__).with_name("not_in_sandbox.txt")


class Sandboxes(contextlib.ExitStack):
    """Those of one test."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes: list[Sandbox] = []

    def put_around(self, engines: Iterable[sa.Engine]) -> None:
        found = [engine for engine in engines if engine.dialect.name == "postgresql"]
        if found:
            self.boxes.append(self.enter_context(sandbox(*found, patience="2s")))

    def close(self) -> None:
        self.boxes.clear()
        super().close()

    def look(self, query: str, arguments: Any) -> Any:
        """A cursor with the answer, as another connection in the sandbox has it."""
        connection = self.boxes[0]._outer[0].connect()
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute(query, arguments)
        return cursor


class SandboxLog:
    """A recording as tests read the log of a `Wire`."""

    connections_opened = 0

    def __init__(self, recording: Recording, shared: SharedConnection) -> None:
        self._recording = recording
        self._shared = shared

    @property
    def statements(self) -> list[str]:
        return self._recording.messages

    @property
    def round_trips(self) -> int:
        return self._recording.round_trips

    @property
    def exchanges(self) -> list[types.SimpleNamespace]:
        """`status` is that of now, so only the last one's is right."""
        status = "T" if self._shared.frames else "I"
        return [types.SimpleNamespace(statements=[message], status=status) for message in self._recording.messages]


class SandboxWire(Wire):
    """Records what the app sends, and not what the sandbox makes of it."""

    sandboxes: Sandboxes

    @contextlib.contextmanager
    def record(self) -> Iterator[Any]:
        if not self.sandboxes.boxes:
            with super().record() as log:
                yield log
            return
        box = self.sandboxes.boxes[0]
        with box.record() as recording:
            yield SandboxLog(recording, box._outer[0])


# -- the tests that cannot -------------------------------------------------------------------------------------------


class Exceptions:
    """The lines of the list, and a pytest plugin that sees whether they are right."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self.never_run: set[str] = set()
        reason = ""
        for line in LIST.read_text().splitlines():
            if line.startswith("# "):
                reason = line[2:]
            elif line:
                name = line.removesuffix(" !")
                self.reasons[name] = reason
                if name != line:
                    self.never_run.add(name)
        self.outcomes: defaultdict[str, set[str]] = defaultdict(set)
        self.collected: set[str] = set()

    def choose(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what uses no app, and mark what is expected to fail."""
        others = [item for item in items if "put_in_sandbox" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if "put_in_sandbox" in getattr(item, "fixturenames", ())]
        for item in items:
            # a test that is expected to fail leaves connections open, which a later one collects
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))
            name = function_of(item.nodeid)
            while name and name not in self.reasons:
                name = name.rpartition("::")[0]  # its class, its file
            if name:
                runs = name not in self.never_run
                item.add_marker(pytest.mark.xfail(reason=self.reasons[name], run=runs, strict=False))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = function_of(report.nodeid)
        self.collected.add(name)
        if report.when == "call":
            self.outcomes[name].add("failed" if hasattr(report, "wasxfail") and report.skipped else report.outcome)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and (stale := self.stale()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            session.config.stash[STALE] = stale

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        for name in config.stash.get(STALE, []):
            terminalreporter.write_line(f"{LIST.name}: {name} passes, or is gone: take it off the list", red=True)

    def stale(self) -> list[str]:
        """Lines whose tests all passed, or that no test of a file that was run has."""
        files = {name.partition("::")[0] for name in self.collected}
        stale = []
        for name in self.reasons:
            if "::" not in name or name in self.never_run:
                continue
            if (name in self.collected and self.outcomes[name] == {"passed"}) or (
                name not in self.collected and name.partition("::")[0] in files and self.is_whole
            ):
                stale.append(name)
        return stale

    is_whole = False
    """Whether whole files are run, so that a test that was not seen is gone."""


STALE = pytest.StashKey[list[str]]()


def function_of(nodeid: str) -> str:
    return nodeid.partition("[")[0]

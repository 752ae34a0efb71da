"""Tools that watch (rule J4): round trips as without them, the user's SQL in their spans, and nothing of ours."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fictive.testing import postgres
from fictive.testing.wire import Wire
from tests.compat.watching_program import TOOLS

ROOT = Path(__file__).parents[2]
VIEWS = {"read": 1, "write": 2, "nested": 2}
PACKAGES = {
    "OpenTelemetry SQLAlchemy": "opentelemetry.instrumentation.sqlalchemy",
    "OpenTelemetry psycopg2": "opentelemetry.instrumentation.psycopg2",
    "OpenTelemetry psycopg": "opentelemetry.instrumentation.psycopg",
    "Sentry": "sentry_sdk",
    "Datadog": "ddtrace",
    "New Relic": "newrelic",
    "Flask-DebugToolbar": "flask_debugtoolbar",
}
COMBINATIONS = [
    (tool, driver)
    for tool in TOOLS
    for driver in ("psycopg2", "psycopg")
    if tool != "none" and not ("psycopg2" in tool and driver == "psycopg")
    and not (re.search(r"psycopg\b(?!2)", tool) and driver == "psycopg2")
]  # fmt: skip


@pytest.fixture(scope="session")
def template(pg: postgres.Server) -> Any:
    """The tables of `tests.models`, as for the tests above this directory."""
    from tests.conftest import template

    yield from template.__wrapped__(pg, "_watching")  # type: ignore[attr-defined]


def run(tool: str, kind: str, url: str, wire: Wire) -> dict[str, tuple[int, list[str]]]:
    """By view: the round trips, and what the tool saw."""
    command = [sys.executable, "-m", "tests.compat.watching_program", tool, kind, wire.url(url)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DD_DBM_PROPAGATION_MODE": "full",
                   "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false", "DD_REMOTE_CONFIGURATION_ENABLED": "false",
                   "DD_TRACE_AGENT_URL": "http://127.0.0.1:1", "DD_SERVICE": "x"}  # fmt: skip
    found = {}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert line == "ready\n", line + process.stderr.read()
        for view in VIEWS:
            with wire.record() as log:
                process.stdin.write(f"{view}\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            assert answer, process.stderr.read()
            found[view] = log.round_trips, [bare(text) for text in json.loads(answer)]
        process.stdin.close()
        process.wait()
    return found


def bare(text: str) -> str:
    """The statement without comments and on one line."""
    return " ".join(re.sub(r"/\*.*?\*/", "", text).split())


@pytest.mark.parametrize(("tool", "driver"), COMBINATIONS, indirect=["driver"])
def test_j4_tools_that_watch(
    tool: str, driver: str, database_url: str, wire: Wire, look: Callable[..., list[Any]]
) -> None:
    pytest.importorskip(PACKAGES[tool.partition(",")[0]])
    plain = run(tool, "plain", database_url, wire)
    look("delete from item")
    ours = run(tool, "fictive", database_url, wire)
    look("delete from item")
    for view, trips in VIEWS.items():
        assert ours[view][0] == trips, (view, ours[view])
        assert without_savepoints(plain[view][1]), "the tool sees nothing"
        assert without_savepoints(ours[view][1]) == without_savepoints(plain[view][1]), view


def without_savepoints(texts: list[str]) -> list[str]:
    """Tools at SQLAlchemy's events see the commands of a savepoint; those at the driver do not: they travel along."""
    return [text for text in texts if not text.startswith(("SAVEPOINT", "RELEASE", "(connect)"))]

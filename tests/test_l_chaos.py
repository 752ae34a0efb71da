"""The ledger in miniature (`python -m tests.chaos` for hours of it), and that it finds what it looks for."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.chaos.ledger import Ledger
from tests.chaos.run import run


@pytest.mark.any_sqlalchemy
@pytest.mark.filterwarnings("ignore")
def test_a15_a18_c1_no_promise_is_broken_under_faults(driver: str) -> None:
    report = run("fictive", driver, seconds=8, threads=20, rate=10)
    assert not report.faulty, str(report)
    assert report.operations["committed"] > 100, str(report)


def test_the_ledger_finds_what_is_wrong() -> None:
    ledger = Ledger(lambda op, error: False)
    with ledger.operation("bare") as lost:
        lost.part()
    with ledger.operation("bare") as phantom:
        phantom.part()
        raise ValueError
    with ledger.operation("bare") as torn:
        torn.part(), torn.part()
    ledger.held("a", 1, 3)
    ledger.held("a", 2, 4)
    ledger.held("b", 2, 4)
    answers: dict[str, list[Any]] = {
        "select token": [(phantom.token, 1), (torn.token, 1), ("other", 1)],
        "select sum": [(1,)],
        "select a.id": [(1, 5, 6)],
        "select name, count(*) from key": [("a", 2)],
    }

    def ask(query: str) -> list[Any]:
        return next((rows for start, rows in answers.items() if query.startswith(start)), [])

    ledger.audit(ask)
    assert set(ledger.seen) == {
        "lost",
        "phantom",
        "torn",
        "rows of no operation",
        "the sum of all accounts",
        "an account",
        "2 rows in key",
        "two holders at once",
    }
    assert ledger.seen["two holders at once"] == 1


@pytest.mark.any_sqlalchemy
def test_each_job_of_an_outbox_is_done_once_under_kill_9(driver: str) -> None:
    arguments = ["--workers", "6", "--jobs", "500", "--kills", "8", "--driver", driver]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.chaos.outbox", *arguments], capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert (found["done"], found["different"], found["died"]) == (500, 500, 0)

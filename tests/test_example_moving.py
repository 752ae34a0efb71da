"""The app that docs/moving-over.rst moves over: the same answers and rows at each step, and what each step sends."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from fictive.command_line.doctor_code import code_findings
from fictive.testing.wire import Wire

pytestmark = pytest.mark.any_sqlalchemy

ROOT = Path(__file__).parent.parent
STEPS = ("plain", "begin", "done")
PAGE = ROOT / "docs" / "moving-over.rst"


@contextlib.contextmanager
def library(step: str, url: str, look: Callable[..., list[Any]]) -> Iterator[tuple[Flask, Any, list[Any]]]:
    """The app with a reader and a book, its module, and what it saw of its own connections while a password was
    checked and a mail was sent."""
    module = importlib.import_module(f"examples.moving.{step}")
    seen: list[Any] = []

    def elsewhere(*_: str) -> bool:
        seen.extend(look("select state from pg_stat_activity where datname = current_database() and "
                         "pid <> pg_backend_pid() and backend_type = 'client backend'"))  # fmt: skip
        return True

    app = module.create_app(url, check_password=elsewhere, send=elsewhere)
    with app.app_context():
        module.db.create_all()
        module.db.session.execute(module.db.text("SELECT 1"))
        module.db.session.rollback()
        with module.db.engine.begin() as connection:
            connection.execute(module.db.insert(module.User).values(name="ann"))
            connection.execute(module.db.insert(module.Book).values(title="Emma", copies=2))
    try:
        yield app, module, seen
    finally:
        with app.app_context():
            module.db.session.remove()
            module.db.drop_all()
            module.db.engine.dispose()


def story(app: Flask, wire: Wire) -> tuple[list[Any], dict[str, int]]:
    """What the app answers, and how many round trips each request takes."""
    client = app.test_client()
    answers, trips = [], {}

    def ask(what: str, method: str, path: str, **body: Any) -> None:
        with wire.record() as log:
            response = client.open(path, method=method, json=body or None)
        answers.append((response.status_code, response.get_json(silent=True)))
        trips.setdefault(what, log.round_trips)

    ask("log in", "POST", "/login", name="ann", password="x")
    ask("replace the token", "POST", "/token", value="one")
    ask("list the books", "GET", "/books")
    for _ in range(3):
        ask("lend a book", "POST", "/books/1/loans")
        ask("list the books again", "GET", "/books")
    answers.append(app.test_cli_runner().invoke(args=["send-mails"]).exit_code)
    return answers, trips


@pytest.mark.parametrize("step", STEPS)
def test_each_step_answers_alike(
    step: str, database_url: str, wire: Wire, look: Callable[..., list[Any]], driver: str
) -> None:
    with library(step, wire.url(database_url), look) as (app, _, seen):
        answers, trips = story(app, wire)
        assert answers == [
            (200, {"logins": 1}), (204, None), (200, {"Emma": 2}),
            (200, {"left": 1}), (200, {"Emma": 1}), (200, {"left": 0}), (200, {"Emma": 0}),
            (409, None), (200, {"Emma": 0}), 0,
        ]  # fmt: skip
        assert look("select count(*) from loan") == [2]
        assert look("select value from token") == ["one"]
        assert look("select sent from mail") == [True, True]
    assert seen[0] == ("idle in transaction" if step == "plain" else "idle")
    if driver == "psycopg2":
        assert round_trips_on_the_page(step) == trips


def round_trips_on_the_page(step: str) -> dict[str, int]:
    table = PAGE.read_text(encoding="utf-8").partition(":name: round-trips-of-the-library")[2].partition("\n\n.. ")[0]
    rows = re.findall(r"   \* - (.+)\n     - (\d+)\n     - (\d+)\n     - (\d+)", table)
    return {row[0]: int(row[1 + STEPS.index(step)]) for row in rows}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_leaves_nothing(
    step: str, database_url: str, look: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with library(step, database_url, look) as (app, module, _):
        client = app.test_client()
        client.post("/login", json={"name": "ann", "password": "x"})
        client.post("/token", json={"value": "kept"})
        assert client.post("/token", json={"value": None}).status_code == 500
        assert look("select value from token") == ["kept"]
        monkeypatch.setattr(module, "Mail", lambda loan_id: module.Token(user_id=0, value="refused"))
        assert client.post("/books/1/loans").status_code == 500
        assert look("select copies from book") == [2]
        assert look("select count(*) from loan") == [0]


def test_the_first_step_changes_a_few_lines() -> None:
    plain, begin = ((ROOT / "examples" / "moving" / f"{name}.py").read_text().splitlines() for name in STEPS[:2])
    changed = [line for line in difflib.ndiff(plain[1:], begin[1:]) if line[0] in "+-" and line[2:].strip()]
    assert len([line for line in changed if line[0] == "-"]) == 1
    assert len(changed) <= 6


def test_doctor_finds_what_the_last_step_changed() -> None:
    moving = ROOT / "examples" / "moving"
    found = {step: [each.check for each in code_findings(moving / f"{step}.py")] for step in STEPS}
    assert found["plain"] == ["split-writes", "split-writes", "commit-in-view", "listener"]
    assert found["begin"] == found["plain"]
    assert found["done"] == []

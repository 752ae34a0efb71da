"""K: work done in Python for a piece of work, in function calls (cProfile, warm): at most plain Flask-SQLAlchemy's.

Exact, and the same on every machine, unlike times. `./run bench calls` shows the numbers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks import bytecodes, calls
from benchmarks.schema import Databases
from benchmarks.work import WORK
from fictive.flask_sqlalchemy import OptInTransactionMixin
from fictive.models import Repository
from fictive.testing.postgres import Server

# Where plain's calls are not 1.0 times fictive's at least.
LEAST = {
    "get": 1.15,
    "get x 5": 1.15,
    "get x 20": 1.15,
    "get_or_404": 1.15,
    "find_or_create, found": 1.1,
}


def test_k_calls_at_most_plains(pg: Server, driver: str) -> None:
    with Databases(pg.url(), driver) as databases:
        rows = calls.measure(databases, driver, repeats=5).rows()
    ratios = {label: row["plain"] / row["fictive"] for label, row in rows.items()}
    assert list(ratios) == [work.label for work in WORK]
    assert not {label: rows[label] for label, ratio in ratios.items() if ratio < LEAST.get(label, 1)}


def test_k_a_view_executes_less_bytecode_than_plains(pg: Server, driver: str) -> None:
    with Databases(pg.url(), driver) as databases:
        found = bytecodes.measure(databases, driver, [1, 5])
    assert [view for view, by_package in found.items() if "fictive" in by_package] == ["fictive, 1", "fictive, 5"]
    size = {view: sum(by_package.values()) for view, by_package in found.items()}
    assert size["fictive, 1"] < size["plain, 1"]
    assert size["fictive, 5"] < size["plain, 5"]


def test_k_a_model_with_soft_delete_costs_views_on_others_nothing(pg: Server, driver: str) -> None:
    with Databases(pg.url(), driver) as databases:
        found = bytecodes.measure(databases, driver, [5])["fictive, 5"]
        beside = bytecodes.measure(databases, driver, [5], soft_deleting=True)["fictive, 5"]
    assert sum(beside.values()) < 1.03 * sum(found.values())


def test_k_calls_of_a_far_keyset_page_are_those_of_the_first(database_url: str) -> None:
    """In a process of its own: listeners on classes, which other tests leave, are called on each statement."""
    program = subprocess.run(
        [sys.executable, "-m", "tests.test_k_calls", database_url],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
    )
    assert program.returncode == 0, program.stderr
    pages = json.loads(program.stdout)
    assert pages["far of 0"] / pages["first of 0"] < 1.05, pages
    assert pages["far of 1"] / pages["first of 1"] < 1.05, pages


class _DB(OptInTransactionMixin, SQLAlchemy):
    pass


def _measure_pages(url: str) -> dict[str, float]:
    """The first keyset page, and one that begins after a row, by the key and by a text before it."""
    app = Flask("pages")
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    db: Any = _DB(app, model_class=type("Base", (DeclarativeBase,), {}))

    class Thing(db.Model):  # type: ignore[misc]
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    found = {}
    with app.app_context():
        db.create_all()
        things: Repository[Any] = Repository(db.session, Thing)
        things.insert_many({"name": f"{n:05}"} for n in range(300))
        for order in ((), (Thing.name,)):
            after = things.keyset_page(250, order_by=order).next
            for what, cursor in (("first", None), ("far", after)):

                def page(cursor: str | None = cursor, order: Any = order) -> None:
                    db.session.remove()
                    assert len(things.keyset_page(20, after=cursor, order_by=order).items) == 20

                found[f"{what} of {len(order)}"] = sum(calls.count(page, 20).values())
        db.session.remove()
        db.engine.dispose()
    return found


if __name__ == "__main__":
    print(json.dumps(_measure_pages(sys.argv[1])))

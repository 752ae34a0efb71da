"""K: work done in Python for a piece of work, in function calls (cProfile, warm): at most plain Flask-SQLAlchemy's.

Exact, and the same on every machine, unlike times. Views around it would add Flask's own calls to both sides.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fictive.flask_sqlalchemy import OptInTransactionMixin
from fictive.models import Repository

Work = Callable[[Any, Any, Any], None]


def _begin(db: Any) -> Any:
    return db.session.begin()


def _commits(db: Any, work: Callable[[], None]) -> None:
    if isinstance(db, OptInTransactionMixin):
        with db.session.begin():
            work()
    else:
        work()
        db.session.commit()


def selects(db: Any, thing: Any, n: int) -> None:
    for i in range(1, n + 1):
        found = db.session.execute(sa.select(thing).where(thing.id == i)).scalar_one()  # noqa: F841 - as a view keeps it


def gets(db: Any, thing: Any, n: int) -> None:
    for i in range(1, n + 1):
        found = db.session.get(thing, i)  # noqa: F841


def queries(db: Any, thing: Any, n: int) -> None:
    for i in range(1, n + 1):
        found = thing.query.filter_by(id=i).one()  # noqa: F841


def inserts(db: Any, thing: Any, n: int) -> None:
    _commits(db, lambda: db.session.add(thing(name="x")))


def updates(db: Any, thing: Any, n: int) -> None:
    def work() -> None:
        found = db.session.get(thing, 1)
        found.name = "b" if found.name == "a" else "a"

    _commits(db, work)


def savepoints(db: Any, thing: Any, n: int) -> None:
    def work() -> None:
        with db.session.begin_nested():
            db.session.add(thing(name="x"))

    _commits(db, work)


WORK: dict[str, tuple[Work, int, float]] = {
    "select 1": (selects, 1, 1.0),
    "select 20": (selects, 20, 1.0),
    "query 5": (queries, 5, 1.0),
    "get 1": (gets, 1, 1.1),
    "get 20": (gets, 20, 1.15),
    "insert": (inserts, 1, 1.0),
    "update": (updates, 1, 1.0),
    "savepoint": (savepoints, 1, 1.0),
}


def _app(kind: type[SQLAlchemy], url: str) -> tuple[Flask, Any, Any]:
    class Base(DeclarativeBase):
        pass

    db = kind(model_class=Base)

    class Thing(db.Model):  # type: ignore[misc,name-defined]
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    app = Flask(kind.__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    if "psycopg:" in url:  # which prepares a statement on its sixth run
        app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"connect_args": {"prepare_threshold": None}}
    db.init_app(app)
    return app, db, Thing


def _calls(app: Flask, db: Any, thing: Any, work: Work, n: int) -> float:
    def once() -> None:
        with app.app_context():
            work(db, thing, n)

    return _calls_of(once)


def _calls_of(once: Callable[[], object]) -> float:
    for _ in range(30):
        once()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(20):
        once()
    profile.disable()
    return pstats.Stats(profile).total_calls / 20  # type: ignore[attr-defined,no-any-return]


class Ours(OptInTransactionMixin, SQLAlchemy):
    pass


def _measure(name: str, url: str) -> dict[str, float]:
    work, n, _ = WORK[name]
    calls = {}
    for kind in (SQLAlchemy, Ours):
        app, db, thing = _app(kind, url)
        with app.app_context():
            db.create_all()
            with db.engine.begin() as connection:
                connection.execute(sa.delete(thing))
                connection.execute(sa.insert(thing), [{"id": i, "name": "a"} for i in range(1, 21)])
                connection.execute(sa.text("select setval('thing_id_seq', 100)"))
            calls[kind.__name__] = _calls(app, db, thing, work, n)
            db.engine.dispose()
    return calls


def _measure_pages(url: str) -> dict[str, float]:
    """The first keyset page, and one that begins after a row, by the key and by a text before it."""
    app, db, thing = _app(Ours, url)
    calls = {}
    with app.app_context():
        db.create_all()
        things: Repository[Any] = Repository(db.session, thing)
        things.insert_many({"name": f"{n:05}"} for n in range(300))
        for order in ((), (thing.name,)):
            after = things.keyset_page(250, order_by=order).next
            for what, cursor in (("first", None), ("far", after)):

                def page(cursor: str | None = cursor, order: Any = order) -> None:
                    db.session.remove()
                    assert len(things.keyset_page(20, after=cursor, order_by=order).items) == 20

                calls[f"{what} of {len(order)}"] = _calls_of(page)
        db.session.remove()
        db.engine.dispose()
    return calls


def _in_a_process(*arguments: str) -> dict[str, float]:
    """In a process of its own: listeners on classes, which other tests leave, are called on each statement."""
    program = subprocess.run(
        [sys.executable, "-m", "tests.test_k_calls", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
    )
    assert program.returncode == 0, program.stderr
    found: dict[str, float] = json.loads(program.stdout)
    return found


@pytest.mark.parametrize("name", WORK)
def test_k_calls_at_most_plains(name: str, database_url: str) -> None:
    calls = _in_a_process(name, database_url)
    assert calls["SQLAlchemy"] / calls["Ours"] >= WORK[name][2], calls


def test_k_calls_of_a_far_keyset_page_are_those_of_the_first(database_url: str) -> None:
    calls = _in_a_process("keyset pages", database_url)
    assert calls["far of 0"] / calls["first of 0"] < 1.05, calls
    assert calls["far of 1"] / calls["first of 1"] < 1.05, calls


if __name__ == "__main__":
    name, url = sys.argv[1:]
    print(json.dumps(_measure_pages(url) if name == "keyset pages" else _measure(name, url)))

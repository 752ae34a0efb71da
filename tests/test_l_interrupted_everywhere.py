"""An interrupt at any place of fictive's code leaves nothing behind (C1, A18, A15).

A sample of the places; all of them with `INTERRUPT_EVERY=1`, each bytecode with `INTERRUPT_AT=opcode` (promises.rst).
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from fictive.connection.replicas import wants_primary
from tests.fresh_database import PATIENCE
from tests.interrupts import OURS, Interrupt, Striker
from tests.models import Item, opt_in

EVERY = int(os.environ.get("INTERRUPT_EVERY", "13"))
AT = os.environ.get("INTERRUPT_AT", "line")

LOCKS = """
select 1 from pg_locks join pg_database on pg_database.oid = database
where locktype = 'advisory' and datname = current_database()
"""
Look = Callable[..., list[Any]]
db = opt_in.db


def insert(name: str) -> None:
    db.session.execute(sa.insert(Item).values(name=name))


def with_hooks(ran: list[str]) -> None:
    db.on_commit(lambda: ran.append("commit"))
    db.on_rollback(lambda: ran.append("rollback"))


def block(ran: list[str]) -> None:
    with db.session.begin():
        with_hooks(ran)
        db.session.add(Item(name="a"))
        with db.session.begin_nested():
            insert("b")


def failing_block(ran: list[str]) -> None:
    with contextlib.suppress(ZeroDivisionError), db.session.begin():
        with_hooks(ran)
        insert("a")
        raise ZeroDivisionError


def outside(ran: list[str]) -> None:
    db.session.scalars(sa.select(Item)).all()
    insert("a")
    db.session.add(Item(name="b"))
    db.session.commit()


def pinned(ran: list[str]) -> None:
    with db.pinned():
        db.session.execute(sa.text("set lock_timeout = 5"))
        db.session.execute(sa.text("select pg_advisory_lock(5)"))


def pinned_block(ran: list[str]) -> None:
    with db.pinned():
        db.session.execute(sa.text("set lock_timeout = 5"))
        db.session.commit()
        with db.session.begin():
            db.session.execute(sa.text("select 1"))


def with_settings(ran: list[str]) -> None:
    db.local_settings(tenant)
    db.session.scalars(sa.select(Item)).all()
    insert("a")
    db.session.commit()
    with db.session.begin():
        insert("b")


def tenant() -> dict[str, str]:
    return {"app.tenant": "a"}


@pytest.fixture(params=["commit", "begin"])
def app(make_app: Callable[..., Flask], request: pytest.FixtureRequest) -> Iterator[Flask]:
    """Under both policies that let writes outside be."""
    options = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 1}
    app = make_app(
        SQLALCHEMY_ENGINE_OPTIONS=options, FICTIVE_UNSAVED_CHANGES="ignore", FICTIVE_WRITES_OUTSIDE=request.param
    )
    with app.app_context():
        db.session.execute(sa.text("select 1"))
    yield app
    db._settings_source.function = None


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::fictive.errors.AlreadyCommittedWarning")
@pytest.mark.filterwarnings("ignore::fictive.errors.NotEnteredWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("program", [block, failing_block, outside, pinned, pinned_block, with_settings])
def test_a15_a18_c1_an_interrupt_anywhere_leaves_nothing_behind(
    app: Flask, look: Look, program: Callable[[list[str]], None]
) -> None:
    faults: list[str] = []
    at = 0
    while True:
        striker, ran = Striker({OURS: AT}, at), []
        found = [*_interrupted(app, program, striker, ran), *_left(app, look)]
        rows = look("select name from item order by name")
        if program in (block, failing_block):
            found += [f"rows {rows}"] if rows not in ([], ["a", "b"]) else []
            found += (
                [f"hooks {ran}, rows {rows}"] if (ran == ["commit"] and not rows) or (ran and len(ran) > 1) else []
            )
            found += [f"hooks {ran}, rows {rows}"] if ran == ["rollback"] and rows else []
        faults += [f"{fault} after an interrupt at {striker.struck}" for fault in found]
        if rows:
            look("truncate item cascade")
        if striker.struck is None:
            break
        at += EVERY
    gc.collect()  # drivers' connections that were interrupted while they were made
    assert at > 20 * EVERY
    assert faults == []


def _interrupted(app: Flask, program: Any, striker: Striker, ran: list[str]) -> Iterator[str]:
    with app.app_context():
        try:
            with striker():
                program(ran)
        except Interrupt:
            pass
        else:
            if striker.struck is not None:
                yield "no error"
        try:
            db.session.rollback()
            assert db.session.execute(sa.text("select 7")).scalar() == 7
            with db.session.begin():
                db.session.execute(sa.text("select 7"))
        except Exception as error:
            yield f"a session that raises {error!r}"


def _left(app: Flask, look: Look) -> Iterator[str]:
    if wants_primary():
        yield "reads that go to the primary"
    with app.app_context(), contextlib.ExitStack() as stack:
        pool: Any = db.engine.pool
        if pool.checkedout():
            yield f"a connection that is out of the pool ({pool.status()})"
        for _ in range(2):
            try:
                connection = stack.enter_context(db.engine.connect())
            except sa.exc.TimeoutError:
                yield "a smaller pool"
                db.engine.dispose()
            else:
                if (timeout := connection.exec_driver_sql("show lock_timeout").scalar()) != "0":
                    yield f"lock_timeout = {timeout}"
    deadline = time.monotonic() + PATIENCE
    while look(LOCKS):  # the server has yet to notice a closed socket
        if time.monotonic() > deadline:
            yield "a lock"
            break
        time.sleep(0.01)

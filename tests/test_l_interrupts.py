"""An interrupt that strikes while COMMIT is under way, or right before a COPY."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from fictive.drivers import driver_for
from fictive.errors import TransactionAborted
from fictive.sqlalchemy import insert_many
from fictive.testing.wire import Wire
from tests.chaos.faults import Interrupt, raise_in
from tests.models import Item, opt_in

Look = Callable[..., list[Any]]


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupt])
@pytest.mark.parametrize("sent", ["COMMIT", "INSERT"])
def test_b5_an_interrupted_commit_runs_no_hook(app: Flask, wire: Wire, look: Look, error: Any, sent: str) -> None:
    db, ran, me = opt_in.db, [], threading.current_thread()

    def strike(text: str) -> bool:
        if sent in text:
            raise_in(me, error)  # it comes out at the next bytecode, once the driver has the answer
        return False

    with pytest.raises(error):
        with db.session.begin():
            db.on_commit(lambda: ran.append("commit"))
            db.on_rollback(lambda: ran.append("rollback"))
            trigger = wire.reset_when(strike, times=None)
            db.session.execute(sa.insert(Item).values(name="a"))
    trigger.remove()
    if sent == "COMMIT":  # which may have been done
        assert ran == []
    else:
        assert (look("select name from item"), ran) == ([], ["rollback"])
    db.session.execute(sa.insert(Item).values(name="b"))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("leaves", ["by its end", "by an error", "by a statement"])
def test_c3_a_child_cannot_end_the_block_it_inherits(app: Flask, look: Look, tmp_path: Any, leaves: str) -> None:
    db, ran = opt_in.db, tmp_path / "ran"

    def note(kind: str) -> None:
        with ran.open("a") as file:
            file.write(f"{kind} {os.getpid()}\n")

    child = -1
    raised: BaseException | None = None
    try:
        with db.session.begin():
            db.on_commit(lambda: note("commit"))
            db.on_rollback(lambda: note("rollback"))
            db.session.execute(sa.insert(Item).values(name="a"))
            child = os.fork()
            if child == 0:
                if leaves == "by an error":
                    raise ZeroDivisionError
                if leaves == "by a statement":
                    db.session.execute(sa.insert(Item).values(name="child"))
            else:
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            db.session.execute(sa.insert(Item).values(name="b")) if child else None
    except BaseException as error:
        raised = error
    finally:
        if child == 0:
            expected = ZeroDivisionError if leaves == "by an error" else TransactionAborted
            os._exit(0 if isinstance(raised, expected) else 1)
    assert raised is None
    assert look("select name from item order by id") == ["a", "b"]
    assert ran.read_text() == f"commit {os.getpid()}\n"


def test_a2_an_interrupt_right_before_a_copy_leaves_nothing(
    app: Flask, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No thread either: the fixtures see to that, and that the pool is whole."""
    rows = [{"name": str(number)} for number in range(1000)]
    driver_class = type(driver_for(opt_in.db.engine.dialect))
    make = driver_class.copy_writer

    def interrupted(self: Any, cursor: Any, statement: str) -> Any:
        make(self, cursor, statement)
        raise KeyboardInterrupt

    monkeypatch.setattr(driver_class, "copy_writer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        insert_many(opt_in.db.session, Item, rows)
    monkeypatch.undo()
    insert_many(opt_in.db.session, Item, rows)
    assert look("select count(*) from item") == [1000]

"""A context manager that is dropped without `with` says so (rule A28); tests/test_f_locks.py has the locks."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import flask
import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask

from fictive.errors import ConfigurationError, NotEnteredWarning
from fictive.models import allow_lazy_loads
from fictive.sqlalchemy import create_db_context, get_transaction, run_transaction, sessionmaker, transaction
from tests.models import Item, db

FORGOTTEN: dict[str, Callable[[], Any]] = {
    "db.transaction": lambda: db.transaction(),
    "db.get_transaction": lambda: db.get_transaction(isolation_level="SERIALIZABLE"),
    "db.transaction with retries": lambda: db.transaction(retries=3),
    "of a session": lambda: transaction(db.session),
    "by its other name": lambda: get_transaction(db.session, savepoint=False),
    "pinned": lambda: db.pinned(),
    "pinned, of the session": lambda: db.session().pinned(),
    "primary": lambda: db.primary(),
    "an app context": lambda: db.context(flask.current_app),
    "a context": lambda: create_db_context(sessionmaker(db.engine))(),
    "lazy loads": lambda: allow_lazy_loads(),
}


@pytest.mark.parametrize("call", FORGOTTEN.values(), ids=FORGOTTEN)
def test_a28_it_is_told(call: Callable[[], Any], app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(NotEnteredWarning, match="was called without `with`, and did nothing") as warned:
        call()
    gc.collect()
    assert [each.filename for each in warned] == [__file__]
    assert [record.name for record in caplog.records] == ["fictive.unentered"]
    assert __file__ in caplog.text
    assert not db.session.in_transaction()


def test_a28_nothing_is_told_of_what_is_used(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with db.transaction(), db.transaction(savepoint=False):
            pass
        with db.pinned() as session, db.pinned():
            session.execute(sa.text("select 1"))
        with db.primary(), allow_lazy_loads(), create_db_context(sessionmaker(db.engine))():
            pass

        @allow_lazy_loads()
        @db.primary()
        @db.pinned()
        @db.lock_tables([Item])
        def decorated(number: int) -> int:
            assert db.session.in_transaction()
            return number

        assert [decorated(1), decorated(number=2)] == [1, 2]
        db.transaction()(lambda: None)
        db.transaction(lambda: None)()
        db.transactional(lambda: "")  # never served
        db.transactional(retries=3)
        transaction(db.session).begin().rollback()
        run_transaction(db.session, lambda: None)
        with sa_orm.Session(db.engine) as plain, transaction(plain):
            plain.add(Item(name="a"))
        for wrong in (
            lambda: db.transaction(isolation_level=1),  # type: ignore[call-overload]
            lambda: db.transaction(read_only="yes"),  # type: ignore[call-overload]
            lambda: db.transaction(retries=3).__enter__(),
        ):
            with pytest.raises(ConfigurationError):
                wrong()
        gc.collect()
    assert [str(each.message) for each in warned] == []
    assert not caplog.records

"""Contract B2 and F3: SET LOCAL holds for a block and not past it, and rides with the statements."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask

from fictive.drivers import sqlstate
from fictive.session.blocks import transaction
from fictive.session.local_settings import LocalSettings
from fictive.session.transaction import innermost
from fictive.testing.wire import Wire
from tests.models import Item, db

_LOCK_TIMEOUT = sa.text("SELECT current_setting('lock_timeout')")


@contextlib.contextmanager
def local_settings(session: sa_orm.Session, values: dict[str, int]) -> Iterator[None]:
    settings = LocalSettings(innermost(session), values)
    try:
        yield
    finally:
        settings.end()


@pytest.fixture(params=["opt-in", "plain", "stock"])
def session(request: pytest.FixtureRequest, app: Flask, database_url: str) -> Iterator[sa_orm.Session]:
    """An opt-in session, a plain one on the same engine, and a plain one on an engine that fictive never saw."""
    if request.param == "opt-in":
        yield db.session()
    elif request.param == "plain":
        with sa_orm.Session(db.engine) as session:
            yield session
    else:
        engine = sa.create_engine(database_url)
        with sa_orm.Session(engine) as session:
            yield session
        engine.dispose()


def test_f3_a_setting_is_put_back_whatever_it_was(session: sa_orm.Session) -> None:
    seen: list[str] = []

    def look() -> None:
        seen.append(session.scalar(_LOCK_TIMEOUT))

    with session.begin():
        with local_settings(session, {"lock_timeout": 1000}):
            look()
        look()
        session.execute(sa.text("SET LOCAL lock_timeout = '7s'"))
        with local_settings(session, {"lock_timeout": 2000, "statement_timeout": 9000}):
            look()
            with session.begin_nested(), local_settings(session, {"lock_timeout": 3000}):
                look()
            look()
            with contextlib.suppress(ZeroDivisionError), local_settings(session, {"lock_timeout": 4000}):
                look()
                raise ZeroDivisionError
            with contextlib.suppress(sa.exc.DBAPIError), session.begin_nested():
                with local_settings(session, {"lock_timeout": 5000}):
                    session.execute(sa.text("SELECT 1 / 0"))
            look()
        look()
        assert session.scalar(sa.text("SELECT current_setting('statement_timeout')")) == "0"
    with session.begin():
        look()
    assert seen == ["1s", "0", "2s", "3s", "2s", "4s", "2s", "7s", "0"]


def test_f3_a_transaction_that_ends_in_the_block(session: sa_orm.Session) -> None:
    for end in ("commit", "rollback", "close"):
        session.begin()
        with local_settings(session, {"lock_timeout": 1000}):
            assert session.scalar(_LOCK_TIMEOUT) == "1s"
            getattr(session, end)()
        with session.begin():
            assert session.scalar(_LOCK_TIMEOUT) == "0"


def test_b2_a_timeout_rides(app: Flask, wire: Wire) -> None:
    with db.session.begin():  # the texts are known to the server afterwards
        db.session.execute(sa.select(Item.id))
        db.session.execute(sa.update(Item).values(note="x"))
    with wire.record() as log, db.session.begin():
        with local_settings(db.session(), {"lock_timeout": 1000}):
            db.session.execute(sa.select(Item.id))
        db.session.execute(sa.text(f"UPDATE item SET note = 'never sent before {id(log)}'"))
    assert log.round_trips == 3
    with wire.record() as log, db.session.begin():
        db.session.execute(sa.select(Item.id))
        with db.session.begin_nested(), local_settings(db.session(), {"lock_timeout": 1000}):
            db.session.execute(sa.select(Item.id))
        db.session.execute(sa.update(Item).values(note="x"))
    assert log.round_trips == 4
    with wire.record() as log:
        with db.session.begin(), local_settings(db.session(), {"lock_timeout": 1000}):
            pass
        with db.session.begin():
            with local_settings(db.session(), {"lock_timeout": 1000}):
                db.session.execute(sa.select(Item.id))
    assert log.round_trips == 2, "restoring at the end of the transaction is left out"


def test_b2_a_statement_timeout_counts_for_the_statement_it_rides_with(app: Flask) -> None:
    with pytest.raises(sa.exc.OperationalError) as raised, db.session.begin():
        with local_settings(db.session(), {"statement_timeout": 50}):
            db.session.execute(sa.text("SELECT pg_sleep(20)"))
    assert sqlstate(raised.value) == "57014"


def test_b2_in_a_transaction_with_a_named_cursor(app: Flask) -> None:
    """psycopg2 is left to itself then, and nothing can ride."""
    with db.session.begin():
        db.session.connection().connection.dbapi_connection.cursor("by_hand").close()
        with local_settings(db.session(), {"lock_timeout": 1000}):
            assert db.session.scalar(_LOCK_TIMEOUT) == "1s"
        assert db.session.scalar(_LOCK_TIMEOUT) == "0"


def test_f3_where_nothing_can_be_put_back_the_error_of_the_block_comes_out(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = sa.create_engine(database_url)  # nothing rides on its connections
    with sa_orm.Session(engine) as session, pytest.raises(ZeroDivisionError), transaction(session):
        pid = session.scalar(sa.text("SELECT pg_backend_pid()"))
        with transaction(session, savepoint=False, lock_timeout="1s"):
            with engine.connect() as other:
                assert other.scalar(sa.select(sa.func.pg_terminate_backend(pid, 10_000)))
            raise ZeroDivisionError
    assert "restoring lock_timeout failed" in caplog.text
    engine.dispose()


@pytest.mark.parametrize("driver", ["sqlite"], indirect=True)
def test_f3_other_databases_are_left_alone(driver: str, lite: sa.Engine) -> None:
    with sa_orm.Session(lite) as session, session.begin(), local_settings(session, {"lock_timeout": 1}):
        assert session.scalar(sa.text("select 1")) == 1

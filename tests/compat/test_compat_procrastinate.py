"""procrastinate: a job in the same transaction as what it is about, by `configure(connection=...)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import procrastinate
import pytest
import sqlalchemy as sa
from flask import Flask
from procrastinate.contrib.sqlalchemy import SQLAlchemyPsycopg2Connector

from tests.compat.ways import Way

AppOf = Callable[..., Flask]
Look = Callable[..., list[Any]]

JOBS = "select task_name, args->>'order_id', status::text from procrastinate_jobs order by id"


@pytest.fixture
def way() -> Way:
    return Way("commit")


@pytest.fixture
def db(way: Way, app_of: AppOf, look: Look) -> Iterator[Any]:
    db = way.db_class()
    app = app_of(db)
    look("create table orders (id int primary key)")
    with app.app_context():
        yield db


@pytest.fixture
def queue(db: Any, driver: str, database_url: str, look: Look) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """A task, and what it is handed as connection."""
    url = sa.make_url(database_url)
    if driver == "psycopg2":
        app = procrastinate.App(connector=SQLAlchemyPsycopg2Connector(dsn=url.render_as_string(False)))
    else:
        conninfo = url.set(drivername="postgresql").render_as_string(False)
        app = procrastinate.App(
            connector=procrastinate.SyncPsycopgConnector(conninfo=conninfo, min_size=1, max_size=1)
        )

    @app.task(name="send")
    def send(order_id: int) -> None: ...

    def connection() -> Any:
        found = db.session.connection()
        return found if driver == "psycopg2" else found.connection.dbapi_connection

    with app.open():
        look(app.schema_manager.get_schema())  # through SQLAlchemy it doubles the percent signs in it
        yield send, connection


def test_a_job_is_there_with_its_order(db: Any, queue: Any, look: Look) -> None:
    send, connection = queue
    with db.session.begin():
        send.configure(connection=connection()).defer(order_id=1)
        db.session.execute(sa.text("insert into orders values (1)"))
        assert look(JOBS) == []
    assert look(JOBS) == [("send", "1", "todo")]
    assert look("select id from orders") == [1]


def test_no_job_without_its_order(db: Any, queue: Any, look: Look) -> None:
    send, connection = queue
    with pytest.raises(ZeroDivisionError):
        with db.session.begin():
            db.session.execute(sa.text("insert into orders values (1)"))
            send.configure(connection=connection()).defer(order_id=1)
            raise ZeroDivisionError
    with db.session.begin():
        db.session.execute(sa.text("insert into orders values (2)"))
        with pytest.raises(ZeroDivisionError):
            with db.session.begin_nested():
                send.configure(connection=connection()).defer(order_id=2)
                raise ZeroDivisionError
    assert look(JOBS) == []
    assert look("select id from orders") == [2]


def test_many_jobs_at_once(db: Any, queue: Any, look: Look) -> None:
    send, connection = queue
    with db.transaction():
        send.configure(connection=connection()).batch_defer({"order_id": 1}, {"order_id": 2})
    assert [row[1] for row in look(JOBS)] == ["1", "2"]

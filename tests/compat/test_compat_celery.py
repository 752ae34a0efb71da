"""Celery: a task is sent after the commit, by `on_commit`, and not at all after a rollback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import celery
import pytest
import sqlalchemy as sa
from flask import Flask

from tests.compat.ways import Way

AppOf = Callable[..., Flask]
Look = Callable[..., list[Any]]


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


class Broker:
    """An application on a broker in memory, and what was sent to it."""

    def __init__(self) -> None:
        self.app = celery.Celery("shop", broker="memory://", backend="cache+memory://")

        @self.app.task(name="send")
        def send(order_id: int) -> None: ...

        self.send = send

    def sent(self) -> list[Any]:
        found = []
        with self.app.connection_for_read() as connection, connection.SimpleQueue("celery") as queue:
            while queue.qsize():
                message = queue.get(block=False)
                found.append(message.payload[1]["order_id"])
                message.ack()
        return found


@pytest.fixture
def broker() -> Iterator[Broker]:
    broker = Broker()
    yield broker
    broker.sent()
    broker.app.close()


def test_a_task_is_sent_when_its_order_can_be_seen(db: Any, broker: Broker, look: Look) -> None:
    with db.session.begin():
        db.session.execute(sa.text("insert into orders values (1)"))
        db.on_commit(lambda: broker.send.delay(order_id=1))
        assert broker.sent() == []
    assert broker.sent() == [1]
    assert look("select id from orders") == [1]


def test_nothing_is_sent_for_what_was_rolled_back(db: Any, broker: Broker) -> None:
    with pytest.raises(ZeroDivisionError):
        with db.session.begin():
            db.on_commit(lambda: broker.send.delay(order_id=1))
            raise ZeroDivisionError
    with db.session.begin():
        db.on_commit(lambda: broker.send.delay(order_id=2))
        with pytest.raises(ZeroDivisionError):
            with db.session.begin_nested():
                db.on_commit(lambda: broker.send.delay(order_id=3))
                raise ZeroDivisionError
    assert broker.sent() == [2]


def test_nothing_is_sent_when_the_commit_fails(db: Any, broker: Broker, look: Look) -> None:
    look("alter table orders add unique (id) deferrable initially deferred")
    look("alter table orders drop constraint orders_pkey")
    with pytest.raises(sa.exc.IntegrityError):
        with db.session.begin():
            db.session.execute(sa.text("insert into orders values (1), (1)"))
            db.on_commit(lambda: broker.send.delay(order_id=1))
    assert broker.sent() == []


def test_outside_it_is_sent_at_once(db: Any, broker: Broker) -> None:
    db.on_commit(lambda: broker.send.delay(order_id=1))
    assert broker.sent() == [1]

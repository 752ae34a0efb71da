"""What several connections do to each other, so no sandbox: `db_clean` empties the tables afterwards."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from examples.tickets import worker
from examples.tickets.app import add_concert
from examples.tickets.models import Order, Seat, db
from examples.tickets.selling import SoldOut, buy

WAITERS = sa.text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


@pytest.fixture
def context(db_clean, db_app):
    with db_app.app_context():
        yield


@pytest.fixture
def elsewhere(context, db_app):
    """Call a function in a thread of its own, with an app context and so a session of its own."""

    def call(function, *arguments):
        with db_app.app_context():
            return function(*arguments)

    with ThreadPoolExecutor() as threads:
        yield lambda *arguments: threads.submit(call, *arguments)


def wait_until_somebody_waits_for_a_lock():
    with db.engine.connect() as connection:
        while not connection.scalar(WAITERS):
            connection.rollback()  # pg_stat_activity stays the same within a transaction
            time.sleep(0.01)


def test_two_buyers_for_the_last_seat(elsewhere):
    concert = add_concert("Winterreise", seats=1)
    barrier = threading.Barrier(2)

    def buy_with_the_other():
        barrier.wait()
        return buy(concert, "somebody")

    outcomes = [future.exception() for future in [elsewhere(buy_with_the_other), elsewhere(buy_with_the_other)]]
    assert sorted(map(repr, outcomes)) == ["None", "SoldOut()"]
    assert db.session.scalar(sa.select(sa.func.count(Order.id))) == 1


@pytest.mark.parametrize("fails", [True, False])
def test_the_second_buyer_waits_for_what_the_first_one_does(elsewhere, fails):
    concert = add_concert("Winterreise", seats=1)
    with db.transaction() as transaction:
        seat = db.session.scalar(db.claim(sa.select(Seat)))
        second = elsewhere(buy, concert, "Ben")
        wait_until_somebody_waits_for_a_lock()
        if fails:
            transaction.rollback()
        else:
            seat.sold = True
    if fails:
        assert second.result().buyer == "Ben"
    else:
        assert isinstance(second.exception(), SoldOut)


def test_workers_print_each_ticket_once(elsewhere):
    concert = add_concert("Winterreise", seats=20)
    for number in range(20):
        buy(concert, f"buyer {number}")
    with db.session.begin():
        taken = db.session.scalars(db.claim(worker.WAITING, limit=5, of=Order)).all()  # another worker is at these
        printed = [elsewhere(worker.print_some, 10) for _ in range(2)]
        assert sum(each.result() for each in printed) == 15
        assert {order.ticket for order in taken} == {None}
    assert worker.print_some() == 5
    assert worker.print_some() == 0


def test_the_page_is_told_when_the_ticket_is_printed(db_clean, db_app):
    with db_app.app_context():
        key = buy(add_concert("Winterreise", seats=1), "Ann").id
    with ThreadPoolExecutor() as threads:  # in a context the request would share its session
        events = threads.submit(lambda: db_app.test_client().get(f"/orders/{key}/events").text)
        with db_app.app_context():
            assert worker.print_some() == 1
        assert events.result().endswith("data: seat 1, Ann\n\n")


def test_a_worker_is_woken_by_an_order(elsewhere):
    concert = add_concert("Winterreise", seats=1)
    worker_waits = elsewhere(db.wait_for_rows, db.claim(worker.WAITING, of=Order))
    assert not worker_waits.done()
    buy(concert, "Ann")
    assert worker_waits.result() is None

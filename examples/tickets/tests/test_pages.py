"""The pages. Each test runs in a sandbox: whatever the app writes is rolled back."""

import pytest

from examples.tickets import worker
from examples.tickets.app import add_concert


@pytest.fixture
def client(db_sandbox, db_app):
    with db_app.app_context():
        add_concert("Winterreise", seats=2)
    return db_app.test_client()


@pytest.fixture
def path(client):
    """The path of the only concert, whose key is the next of its sequence."""
    return client.get("/").text.partition('<li><a href="')[2].partition('"')[0]


def test_a_ticket_from_the_first_page_to_the_last(client, path, db_app):
    assert "Winterreise</a>: 2 left" in client.get("/").text
    bought = client.post(f"{path}/orders", data={"buyer": "Ann"})
    assert bought.status_code == 303
    assert "being printed" in client.get(bought.location).text
    with db_app.app_context():
        assert worker.print_some() == 1
    assert "Ticket: seat 1, Ann" in client.get(bought.location).text
    assert "seat 1: sold" in client.get(path).text
    assert client.get(f"{bought.location}/events").text == "data: seat 1, Ann\n\n"


def test_round_trips(client, path, assert_round_trips):
    with assert_round_trips(1):
        client.get("/")
    with assert_round_trips(5):  # the concert; the claim, which takes BEGIN along; UPDATE, INSERT, COMMIT
        client.post(f"{path}/orders", data={"buyer": "Ann"})


def test_sold_out(client, path):
    for buyer in ("Ann", "Ben"):
        client.post(f"{path}/orders", data={"buyer": buyer})
    answer = client.post(f"{path}/orders", data={"buyer": "Cid"})
    assert (answer.status_code, "Sold out" in answer.text) == (409, True)
    assert "Winterreise</a>: 0 left" in client.get("/").text


def test_what_is_not_there(client, path):
    assert client.post(f"{path}/orders", data={"buyer": " "}).status_code == 400
    assert client.post("/concerts/0/orders", data={"buyer": "Ann"}).status_code == 404
    assert client.get("/orders/00000000-0000-0000-0000-000000000000/events").status_code == 404

"""The example shop: its views, its commands, what they send, and its migrations."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flask_migrate
import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from examples.shop import importing, jobs
from examples.shop.app import create_app
from examples.shop.database import db
from examples.shop.models import AuditEntry, Job, Product, Stock
from examples.shop.ordering import order_placed
from fictive.models import check_names
from fictive.sqlalchemy import OptInSession, advisory_lock
from fictive.testing.postgres import Server
from fictive.testing.wire import Wire
from tests.fix_sandbox import Sandboxes, SandboxWire
from tests.wirelog import messages

pytestmark = pytest.mark.any_sqlalchemy

ROOT = Path(__file__).parent.parent
CATALOGUE = "sku,name,price_cents\nb-1,Bell,900\na-1,Anchor,5000\nc-1,Compass,2500\n"
ANN = {"email": "ann@example.com", "name": "Ann"}


@contextlib.contextmanager
def new_database(pg: Server, driver: str) -> Iterator[str]:
    server = sa.create_engine(pg.url(driver="psycopg2"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    name = f"shop_{uuid.uuid4().hex}"
    with server.connect() as connection:
        connection.execute(sa.text(f"create database {name}"))
    yield pg.url(name, driver=driver)
    with server.connect() as connection:
        connection.execute(sa.text(f"drop database {name} with (force)"))


@contextlib.contextmanager
def shop_on(url: str, **config: Any) -> Iterator[Flask]:
    app = create_app(SQLALCHEMY_DATABASE_URI=url, TESTING=True, **config)
    yield app
    with app.app_context():
        assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        db.engine.dispose()


@pytest.fixture(scope="module", params=["psycopg2", "psycopg"])
def shop(request: pytest.FixtureRequest, pg: Server) -> Iterator[tuple[Flask, Wire]]:
    """The app on a database that its migrations have made and the tests of this module share."""
    proxy = (SandboxWire if request.config.getoption("--sandbox") else Wire)(pg.host, pg.port)
    with new_database(pg, request.param) as url, proxy as wire, shop_on(wire.url(url)) as app:
        with app.app_context():
            flask_migrate.upgrade()
        yield app, wire


@pytest.fixture
def app(
    shop: tuple[Flask, Wire], sandboxes: Sandboxes | None, put_in_sandbox: Callable[[Any], None]
) -> Iterator[Flask]:
    """With three products, five of each in stock, and nothing else."""
    app, wire = shop
    if isinstance(wire, SandboxWire) and sandboxes is not None:
        wire.sandboxes = sandboxes
    with app.app_context():
        put_in_sandbox(db.engines.values())
        db.cleanup_tables()
        importing.import_products(CATALOGUE.splitlines())
        db.session.execute(sa.update(Stock).values(on_hand=5))
    carrier = app.config["CARRIER"]
    yield app
    app.config["CARRIER"] = carrier
    if sandboxes is not None:
        sandboxes.close()
    with app.app_context():
        db.engine.dispose()  # a connection through the wire has threads


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def wire(shop: tuple[Flask, Wire]) -> Wire:
    return shop[1]


def rows(app: Flask, *columns: Any, order_by: Any = None) -> list[Any]:
    """What a connection of its own sees."""
    with app.app_context(), db.engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.select(*columns).order_by(order_by))]


def audit(app: Flask) -> list[str]:
    return [what for (what,) in rows(app, AuditEntry.what, order_by=AuditEntry.id)][1:]  # without the import


def product_ids(client: FlaskClient) -> dict[str, str]:
    return {each["name"]: each["id"] for each in answer(client.get("/products"))["products"]}


def answer(response: TestResponse, status: int = 200) -> Any:
    assert response.status_code == status, response.text
    return response.json


def order(client: FlaskClient, status: int = 201, **quantities: int) -> Any:
    ids = product_ids(client)
    lines = [{"product": ids[name], "quantity": quantity} for name, quantity in quantities.items()]
    return answer(client.post("/orders", json={"customer": ANN, "lines": lines}), status)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread is about to do; the limit is for a test that fails."""
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit, "it never happened"
        time.sleep(0.005)


# Products


def test_the_catalogue_in_pages_and_by_tag(app: Flask, client: FlaskClient, wire: Wire) -> None:
    with app.app_context():
        importing.import_products(["sku,name,price_cents", *(f"z-{n:02},Zither {n:02},1" for n in range(19))])
    with wire.record() as log:
        first = answer(client.get("/products"))
    second = answer(client.get("/products", query_string={"after": first["next"]}))
    zither = second["products"][0]["id"]
    answer(client.put(f"/products/{zither}/tags", json={"tags": ["music"]}))

    assert messages(log) == ["SELECT", "SELECT"]
    assert [each["name"] for each in first["products"][:4]] == ["Anchor", "Bell", "Compass", "Zither 00"]
    assert len(first["products"]) == 20
    assert [each["name"] for each in second["products"]] == ["Zither 17", "Zither 18"]
    assert second["next"] is None
    tagged = answer(client.get("/products?tag=music"))["products"]
    assert [(each["name"], each["tags"]) for each in tagged] == [("Zither 17", ["music"])]
    assert answer(client.get("/products?tag=none"))["products"] == []
    assert "error" in answer(client.get("/products?after=tampered"), 400)


def test_tags_are_made_once_and_links_that_stay_are_left_alone(app: Flask, client: FlaskClient, wire: Wire) -> None:
    bell = f"/products/{product_ids(client)['Bell']}"
    assert answer(client.put(f"{bell}/tags", json={"tags": ["brass", "loud"]}))["tags"] == ["brass", "loud"]
    with wire.record() as log:
        again = answer(client.put(f"{bell}/tags", json={"tags": ["loud", "brass", "loud"]}))

    assert again["tags"] == ["brass", "loud"]
    assert messages(log) == ["BEGIN+SELECT", "SELECT", "SELECT", "WITH", "SELECT", "INSERT", "COMMIT"]
    assert answer(client.put(f"{bell}/tags", json={"tags": []}))["tags"] == []
    assert audit(app) == ["product.tagged"] * 3


def test_two_editors_of_one_product(app: Flask, client: FlaskClient) -> None:
    """The form of the second is older than the change of the first: 409, and then it is read again."""
    bell = f"/products/{product_ids(client)['Bell']}"
    ann, ben = app.test_client(), app.test_client()
    seen_by_ann, seen_by_ben = answer(ann.get(bell)), answer(ben.get(bell))

    first = answer(ann.patch(bell, json={"version": seen_by_ann["version"], "price_cents": 950}))
    refused = answer(ben.patch(bell, json={"version": seen_by_ben["version"], "name": "Ship's bell"}), 409)

    assert "Read it again" in refused["error"]
    assert answer(client.get(bell)) == first | {"price_cents": 950, "name": "Bell"}
    again = answer(ben.patch(bell, json={"version": answer(ben.get(bell))["version"], "name": "Ship's bell"}))
    assert (again["name"], again["price_cents"], again["version"]) == ("Ship's bell", 950, 3)
    assert audit(app) == ["product.changed"] * 2


def test_two_editors_at_the_same_moment(app: Flask, client: FlaskClient) -> None:
    """Both have read the same version and passed the comparison; their UPDATEs meet at the row. One wins, the other
    one writes nothing, and does not overwrite."""
    bell = f"/products/{product_ids(client)['Bell']}"
    waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"

    def edit(change: dict[str, Any]) -> tuple[int, Any]:
        response = app.test_client().patch(bell, json={"version": 1, **change})
        return response.status_code, response.json

    with app.app_context():
        engine = db.engine
    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")  # else it would see one moment for ever
    with ThreadPoolExecutor(2) as threads, engine.connect() as third, autocommit.connect() as look:
        third.execute(sa.select(Product.id).where(Product.name == "Bell").with_for_update())
        editors = [threads.submit(edit, {"price_cents": 1}), threads.submit(edit, {"name": "Gong"})]
        wait_until(lambda: look.scalar(sa.text(waiting)) == 2)
        third.rollback()
        answers = [editor.result(30) for editor in editors]

    assert sorted(status for status, _ in answers) == [200, 409]
    (won,) = [body for status, body in answers if status == 200]
    assert (won["name"], won["price_cents"]) in {("Bell", 1), ("Gong", 900)}
    assert answer(client.get(bell)) == won
    assert audit(app) == ["product.changed"]


def test_an_edit_is_a_read_and_one_short_transaction(client: FlaskClient, wire: Wire) -> None:
    bell = f"/products/{product_ids(client)['Bell']}"
    with wire.record() as log:
        answer(client.patch(bell, json={"version": 1, "price_cents": 1}))

    assert messages(log) == ["SELECT", "BEGIN+INSERT", "UPDATE", "COMMIT", "SELECT"]  # the last one: its tags


# Orders


def test_an_order_and_all_that_belongs_to_it(app: Flask, client: FlaskClient, wire: Wire) -> None:
    seen: list[tuple[uuid.UUID, list[Any]]] = []

    def listener(sender: Flask, order_id: uuid.UUID) -> None:
        seen.append((order_id, rows(app, Job.order_id)))

    with order_placed.connected_to(listener):
        placed = order(client, Bell=2, Anchor=1)
    with wire.record() as log:
        shown = answer(client.get(f"/orders/{placed['id']}"))

    assert messages(log) == ["SELECT"]
    assert shown == placed
    assert placed["total_cents"] == 2 * 900 + 5000
    assert placed["customer"]["name"] == "Ann"
    assert {line["product"]: line["quantity"] for line in placed["lines"]} == {"Bell": 2, "Anchor": 1}
    assert sorted(left for (left,) in rows(app, Stock.on_hand)) == [3, 4, 5]
    assert seen == [(uuid.UUID(placed["id"]), [(uuid.UUID(placed["id"]),)])]  # after the COMMIT
    assert audit(app) == ["order.placed"]


def test_an_order_that_cannot_be_leaves_nothing(app: Flask, client: FlaskClient) -> None:
    seen: list[Any] = []

    def listener(sender: Flask, order_id: uuid.UUID) -> None:
        seen.append(order_id)

    unknown = [{"product": str(uuid.uuid4()), "quantity": 1}]
    with order_placed.connected_to(listener):
        assert "there are 5 left" in order(client, 409, Anchor=1, Bell=6)["error"]
        assert "No such" in answer(client.post("/orders", json={"customer": ANN, "lines": unknown}), 409)["error"]

    assert (seen, audit(app), rows(app, Job.id)) == ([], [], [])
    assert {left for (left,) in rows(app, Stock.on_hand)} == {5}
    assert answer(client.put("/customers", json=ANN), 201)  # who was not made either


def test_four_buy_what_is_enough_for_two(app: Flask, client: FlaskClient) -> None:
    together = threading.Barrier(4)
    ids = product_ids(client)

    def buy(names: list[str]) -> int:
        lines = [{"product": ids[name], "quantity": 2} for name in names]
        together.wait(30)
        return app.test_client().post("/orders", json={"customer": ANN, "lines": lines}).status_code

    orders = [["Anchor", "Bell"], ["Bell", "Anchor"]] * 2  # in both orders: nobody may deadlock
    with ThreadPoolExecutor(4) as threads:
        statuses = list(threads.map(buy, orders))

    assert sorted(statuses) == [201, 201, 409, 409]
    assert sorted(left for (left,) in rows(app, Stock.on_hand)) == [1, 1, 5]


def test_canceling_puts_back_and_only_what_is_not_packed(app: Flask, client: FlaskClient) -> None:
    first, second = order(client, Bell=2), order(client, Bell=1)
    assert answer(client.delete(f"/orders/{first['id']}"))["state"] == "canceled"
    assert "canceled" in answer(client.delete(f"/orders/{first['id']}"), 409)["error"]
    with app.app_context():
        assert jobs.work() == 2
        assert jobs.work() == 0

    assert "packed" in answer(client.delete(f"/orders/{second['id']}"), 409)["error"]
    assert sorted(left for (left,) in rows(app, Stock.on_hand)) == [4, 5, 5]
    assert audit(app) == ["order.placed", "order.placed", "order.canceled", "order.packed"]


def test_a_note_on_an_order(client: FlaskClient) -> None:
    placed = order(client, Bell=1)
    path = f"/orders/{placed['id']}"
    assert answer(client.patch(path, json={"version": placed["version"], "note": "ring"}))["note"] == "ring"
    assert answer(client.patch(path, json={"version": placed["version"], "note": "knock"}), 409)
    assert answer(client.get(path))["note"] == "ring"


# Customers


def test_a_closed_account(app: Flask, client: FlaskClient) -> None:
    """The orders stay, whoever asks for them by number sees whose they were, and the address is free again."""
    placed = order(client, Bell=1)
    customer = placed["customer"]["id"]
    assert answer(client.put("/customers", json=ANN | {"name": "Anne"}))["id"] == customer
    assert client.delete(f"/customers/{customer}").status_code == 204

    assert answer(client.get(f"/customers/{customer}/orders"), 404)
    assert answer(client.delete(f"/customers/{customer}"), 404)
    assert answer(client.get(f"/orders/{placed['id']}"))["customer"]["name"] == "Anne"
    assert answer(client.put("/customers", json=ANN), 201)["id"] != customer
    assert audit(app) == ["order.placed", "customer.saved", "customer.closed", "customer.created"]


def test_a_customers_orders_newest_first(client: FlaskClient, wire: Wire) -> None:
    placed = [order(client, Bell=1) for _ in range(3)]
    with wire.record() as log:
        page = answer(client.get(f"/customers/{placed[0]['customer']['id']}/orders"))

    assert answer(client.get(f"/customers/{placed[0]['customer']['id']}/orders?after=tampered"), 400)
    assert messages(log) == ["SELECT", "SELECT"]
    assert [each["id"] for each in page["orders"]] == [each["id"] for each in reversed(placed)]
    assert page["next"] is None


@pytest.mark.parametrize(
    ("method", "path", "body", "said"),
    [
        ("PUT", "/customers", None, "the body"),
        ("PUT", "/customers", {"email": "ann", "name": "Ann"}, "email"),
        ("PUT", "/customers", {"email": "a@b", "name": "A\0nn"}, "name"),
        ("PUT", "/customers", {"email": "a@b", "name": "\ud800"}, "body"),
        ("POST", "/orders", {"customer": ANN, "lines": []}, "lines"),
        ("POST", "/orders", {"customer": ANN, "lines": [{"product": "x", "quantity": 1}]}, "lines.0.product"),
        ("PATCH", f"/products/{uuid.UUID(int=1)}", {"version": 1, "price_cents": -1}, "price_cents"),
        ("PATCH", f"/products/{uuid.UUID(int=1)}", {"version": 1, "colour": "red"}, "colour"),
    ],
)
def test_bad_input(client: FlaskClient, method: str, path: str, body: Any, said: str) -> None:
    assert said in answer(client.open(path, method=method, json=body), 400)["error"]


def test_nothing_there(client: FlaskClient) -> None:
    missing = uuid.UUID(int=1)
    for method, path, body in [
        ("GET", f"/products/{missing}", None),
        ("PATCH", f"/products/{missing}", {"version": 1}),
        ("PUT", f"/products/{missing}/tags", {"tags": []}),
        ("POST", f"/products/{missing}/deliveries", {"quantity": 1}),
        ("GET", f"/orders/{missing}", None),
        ("DELETE", f"/orders/{missing}", None),
    ]:
        assert answer(client.open(path, method=method, json=body), 404)


# The commands


@pytest.mark.parametrize(
    ("path", "statements", "shown"),
    [
        ("", 2, ["Anchor", "50.00", ">brass</a>"]),
        ("?tag=brass", 2, ["Bell"]),
        ("orders", 2, ["Ann", "new", "18.00"]),
        ("customers", 1, ["ann@example.com", "<td>1</td>"]),
        ("queue", 1, ["pack", "waiting"]),
        ("tags", 1, ["brass</a>: 1"]),
    ],
)
def test_the_pages(app: Flask, client: FlaskClient, wire: Wire, path: str, statements: int, shown: list[str]) -> None:
    answer(client.put(f"/products/{product_ids(client)['Bell']}/tags", json={"tags": ["brass"]}))
    order(client, Bell=2)
    with wire.record() as log:
        found = client.get(f"/pages/{path}")
    assert found.status_code == 200
    assert [text for text in shown if text not in found.text] == []
    assert messages(log) == ["SELECT"] * statements


def test_the_pages_in_a_browser(pg: Server) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium")
    command = [sys.executable, "-m", "examples.shop.serve", "--port", "0"]
    environment = {**os.environ, "FICTIVE_TEST_DATABASE_URL": pg.url()}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as serve:
        try:
            assert serve.stdout is not None
            serve.stdout.readline()
            url = serve.stdout.readline().rpartition(" ")[2].strip()
            with playwright.sync_playwright() as started:
                browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                page = browser.new_page()
                page.goto(url)
                for title in ("Orders", "Customers", "Queue", "Tags", "Products"):
                    page.click(f"nav >> text={title}")
                    assert page.inner_text("h1") == title
                    assert "This page sent" in page.inner_text("footer")
                    assert page.locator(".lane .bar.read").count() >= 1
                    assert axe.Axe().run(page).response["violations"] == []
                browser.close()
        finally:
            serve.send_signal(signal.SIGINT)
            assert serve.wait(60) in (0, 130)


def test_the_server_that_run_shop_starts(pg: Server) -> None:
    command = [sys.executable, "-m", "examples.shop.serve", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as serve:
        try:
            assert serve.stdout is not None
            url = serve.stdout.readline().removeprefix("curl ").strip()
            with urllib.request.urlopen(url, timeout=30) as response:
                assert [each["name"] for each in json.load(response)["products"]] == ["Anchor", "Bell", "Compass"]
            with urllib.request.urlopen(url.replace("/products", "/_fictive/"), timeout=30) as response:
                assert "GET /products" in response.read().decode()
            worker = [serve.stdout.readline() for _ in range(3)][-1]
            done = subprocess.run(
                f"env {worker}", shell=True, cwd=ROOT, env=environment, capture_output=True, text=True
            )
            assert done.stdout == "0 jobs\n", done.stderr
            serve.send_signal(signal.SIGINT)
            assert serve.wait(60) in (0, 130)
        finally:
            if serve.poll() is None:
                serve.kill()


def test_an_import(app: Flask, client: FlaskClient, tmp_path: Path) -> None:
    bell = f"/products/{product_ids(client)['Bell']}"
    file = tmp_path / "products.csv"
    file.write_text("sku,name,price_cents\na-1,Anchor,5000\nb-1,Bell,901\nd-1,Drum,1\n", encoding="utf-8")
    imported = app.test_cli_runner().invoke(args=["shop", "import-products", str(file)])

    assert imported.exit_code == 0, imported.output
    assert "1 new, 1 changed, 1 as they were" in imported.output
    assert answer(client.get(bell))["version"] == 2
    assert answer(client.patch(bell, json={"version": 1, "price_cents": 1}), 409)  # read before the import
    drum = product_ids(client)["Drum"]
    assert answer(client.post(f"/products/{drum}/deliveries", json={"quantity": 7})) == {"on_hand": 7}

    file.write_text("sku,name,price_cents\ne-1,Ebony,1\nf-1,Flute,cheap\n", encoding="utf-8")
    refused = app.test_cli_runner().invoke(args=["shop", "import-products", str(file)])
    assert refused.exit_code == 1
    assert "line 3: price_cents" in refused.output
    assert "Ebony" not in product_ids(client)

    with app.app_context():
        engine = db.engine
    with OptInSession(engine) as other, advisory_lock(other, "shop: import of products"):
        busy = app.test_cli_runner().invoke(args=["shop", "import-products", str(file)])
    assert (busy.exit_code, "Another import is running" in busy.output) == (1, True)


def test_jobs_are_done_once_by_many_workers_and_failures_are_noted(app: Flask, client: FlaskClient) -> None:
    placed = [order(client, Bell=1)["id"] for _ in range(5)]
    parcels: list[str] = []

    def carrier(order_id: uuid.UUID) -> str:
        parcels.append(str(order_id))
        if str(order_id) == placed[2]:
            raise ConnectionError("no answer")
        return "parcel"

    app.config["CARRIER"] = carrier
    with ThreadPoolExecutor(2) as threads:
        outputs = list(
            threads.map(lambda _: app.test_cli_runner().invoke(args=["shop", "work", "--at-a-time", "1"]), range(2))
        )

    assert [output.exit_code for output in outputs] == [0, 0]
    assert sorted(parcels) == sorted([*placed, placed[2], placed[2]])
    states = {each: answer(client.get(f"/orders/{each}"))["state"] for each in placed}
    assert states == {each: "new" if each == placed[2] else "packed" for each in placed}
    failed = rows(app, Job.tries, Job.error, Job.done_at, order_by=Job.id)[2]
    assert failed == (3, "ConnectionError: no answer", None)


def test_what_a_job_sends(app: Flask, client: FlaskClient, wire: Wire) -> None:
    for _ in "12":  # a savepoint rides with a statement that has run before
        order(client, Bell=1)
        with app.app_context(), wire.record() as log:
            assert jobs.work() == 1

    assert len(log.exchanges) == 6  # the RELEASE rides with the UPDATE of the job, or with the COMMIT
    assert messages(log)[:3] == ["BEGIN+SELECT", "SAVEPOINT+SELECT", "INSERT"]
    assert "FOR UPDATE SKIP LOCKED" in log.exchanges[0].statements[-1]


# The schema


def test_the_migrations_make_the_schema_of_the_models_and_take_it_back(pg: Server) -> None:
    check_names(db.metadata)
    with new_database(pg, "psycopg") as url, shop_on(url) as app, app.app_context():
        flask_migrate.upgrade()
        for change, undo in (
            ("drop constraint stock_on_hand_check", "add constraint stock_on_hand_check check (on_hand >= 0)"),
            ("alter on_hand drop not null", "alter on_hand set not null"),
        ):
            flask_migrate.check()
            db.session.execute(sa.text(f"alter table stock {change}"))
            with pytest.raises(SystemExit):
                flask_migrate.check()
            db.session.execute(sa.text(f"alter table stock {undo}"))
        flask_migrate.check()
        flask_migrate.downgrade(revision="base")
        assert sa.inspect(db.engine).get_table_names() == ["alembic_version"]


def test_the_database_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql+psycopg2://shop:secret@db.example/shop")
    monkeypatch.setenv("DB_STATEMENT_TIMEOUT", "30s")
    app = create_app()
    shown = app.test_cli_runner().invoke(args=["fictive", "settings"]).output

    assert "db.example" in shown
    assert "30000ms" in shown
    assert "secret" not in shown
    with app.app_context():
        db.engine.dispose()


def test_doctor_finds_nothing(app: Flask) -> None:
    result = app.test_cli_runner().invoke(args=["fictive", "doctor"])
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "Nothing is wrong."), result.output

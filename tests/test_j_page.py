"""The page `/_fictive/` (rule J1), by requests to it and in a headless Chromium."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from werkzeug.serving import make_server

from fictive.report.explain import explain
from tests.conftest import MakeApp
from tests.models import opt_in

db, Item, Child = opt_in.db, opt_in.Item, opt_in.Child

MOST_BYTES = 100_000


@pytest.fixture
def debug_app(make_app: MakeApp) -> Flask:
    """An app in debug mode whose views do what there is to see."""
    app = make_app(DEBUG=True)

    @app.get("/items")
    def items() -> Any:
        return {item.id: len(item.children) for item in db.session.scalars(sa.select(Item))}

    @app.post("/slow")
    def slow() -> Any:
        with db.session.begin():
            item = db.session.get(Item, 1)
            threading.Event().wait(0.03)
            item.note = "changed"
        return {}

    @app.get("/many/<int:n>")
    def many(n: int) -> Any:
        for number in range(n):
            db.session.execute(sa.text(f"select '{'x' * 300}' as c{number % 40}, :n"), {"n": number})
        return {}

    with app.app_context():
        db.session.add_all([Item(id=n, name=f"item <b>{n}</b>", children=[Child()]) for n in range(1, 8)])
        db.session.commit()
    return app


def links(text: str, pattern: str) -> list[str]:
    return re.findall(rf'href="({pattern})"', text)


def test_j1_page_lists_requests_and_what_each_did(debug_app: Flask) -> None:
    client = debug_app.test_client()
    client.get("/items")
    client.post("/slow")
    answer = client.get("/_fictive/")
    assert answer.status_code == 200
    first, second = links(answer.text, r"/_fictive/\d+")[:2]
    slow = client.get(first).text
    assert "POST /slow" in slow
    assert "idle in the transaction" in slow
    assert re.search(r"test_j_page\.py:\d+ in slow, until the end of the block at line \d+", slow)
    many = client.get(second).text
    assert "7 similar SELECTs from " in many
    assert "<b>7 " in many
    assert "selectinload" in many
    assert len(links(client.get("/_fictive/").text, r"/_fictive/\d+")) == 3, "the page does not report itself"


def test_j1_plans_are_behind_a_confirmation(debug_app: Flask) -> None:
    client = debug_app.test_client()
    client.get("/items")
    client.post("/slow")
    slow, items = links(client.get("/_fictive/").text, r"/_fictive/\d+")[:2]
    statement = links(client.get(items).text, r"/_fictive/\d+/\d+")[0]
    page = client.get(statement).text
    token = re.search(r'name="token" value="([^"]+)"', page)[1]  # type: ignore[index]
    assert client.post(statement, data={"plan": "explain"}).status_code == 400
    assert "Seq Scan on item" in client.post(statement, data={"plan": "explain", "token": token}).text
    assert client.post(statement, data={"plan": "analyze", "token": token}).status_code == 400
    assert "actual time" in client.post(statement, data={"plan": "analyze", "token": token, "again": "on"}).text
    update = links(client.get(slow).text, r"/_fictive/\d+/\d+")[-1]
    page = client.get(update).text
    assert "UPDATE item" in page
    assert "EXPLAIN ANALYZE" not in page
    assert "Update on item" in client.post(update, data={"plan": "explain", "token": token}).text
    assert client.post(update, data={"plan": "analyze", "token": token, "again": "on"}).status_code == 400


def test_j1_explain_writes_nothing(app: Flask, look: Callable[..., list[Any]]) -> None:
    with pytest.raises(ValueError, match="for reads only"):
        explain(db.engine, "insert into tag (label) values ('x')", None, analyze=True)
    with pytest.raises(sa.exc.DBAPIError, match="read-only"):
        explain(db.engine, "select nextval('tag_id_seq')", None, analyze=True)
    assert "Insert on tag" in explain(db.engine, "insert into tag (label) values ('x')", None)
    assert look("select count(*) from tag") == [0]


def test_j1_explain_on_sqlite(lite: sa.Engine) -> None:
    assert "SCAN" in explain(lite, "select * from sqlite_master", None)


def test_j1_pages_stay_small(debug_app: Flask) -> None:
    client = debug_app.test_client()
    for _ in range(210):
        client.get("/many/5")
    client.get("/many/1000")
    index = client.get("/_fictive/")
    assert len(index.data) < MOST_BYTES
    assert "The last 200 requests" in index.text
    largest = links(index.text, r"/_fictive/\d+")[0]
    assert len(client.get(largest).data) < MOST_BYTES
    assert "and 880 more" in client.get(largest).text
    assert len(links(client.get("/_fictive/?page=4").text, r"/_fictive/\d+")) == 50


def test_j1_page_is_for_debug_mode_and_known_hosts(debug_app: Flask, make_app: MakeApp) -> None:
    client = debug_app.test_client()
    for host, status in {
        "localhost": 200, "127.0.0.1:5000": 200, "[::1]:5000": 200, "10.1.2.3": 200, "app.localhost:80": 200,
        "evil.example": 400,
    }.items():  # fmt: skip
        assert client.get("/_fictive/", headers={"Host": host}).status_code == status, host
    debug_app.config["TRUSTED_HOSTS"] = ["dev.example"]
    assert client.get("/_fictive/", headers={"Host": "dev.example"}).status_code == 200
    debug_app.config["TRUSTED_HOSTS"] = None
    debug_app.debug = False
    assert client.get("/_fictive/").status_code == 404
    assert make_app(FICTIVE_REPORT=True).test_client().get("/_fictive/").status_code == 404


def test_j1_names_and_values_are_escaped(debug_app: Flask) -> None:
    client = debug_app.test_client()
    client.get("/<script>alert(1)</script>")
    with debug_app.app_context():
        pass
    text = client.get("/_fictive/").text
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


# -- Flask-DebugToolbar -----------------------------------------------------------------------------------------------


def test_j1_panel_of_the_debug_toolbar(make_app: MakeApp) -> None:
    flask_debugtoolbar = pytest.importorskip("flask_debugtoolbar")
    panel = "fictive.report.toolbar.FictivePanel"
    app = make_app(DEBUG=True, SECRET_KEY="x", DEBUG_TB_PANELS=[panel], DEBUG_TB_INTERCEPT_REDIRECTS=False)
    flask_debugtoolbar.DebugToolbarExtension(app)

    @app.get("/")
    def index() -> str:
        with db.session.begin():
            db.session.execute(sa.text("select 'in the panel'"))
        return "<html><body></body></html>"

    text = app.test_client().get("/").text
    assert "2 round trips, " in text
    assert 'srcdoc="&lt;!doctype html&gt;' in text
    assert "in the panel" in text
    assert "srcdoc" not in app.test_client().get("/_fictive/").text


# -- in a browser -----------------------------------------------------------------------------------------------------

CHROMIUM = os.environ.get("FICTIVE_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        if os.environ.get("CI"):
            pytest.fail("no Chromium: apt-get install chromium, or set FICTIVE_TEST_CHROMIUM")
        pytest.skip("no Chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def served(debug_app: Flask) -> Iterator[str]:
    """The app on a port of this machine."""
    server = make_server("127.0.0.1", 0, debug_app, threaded=False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    thread.join()
    server.server_close()


SIZES = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_j1_in_a_browser(width: int, scheme: str, browser: Any, served: str, debug_app: Flask) -> None:
    client = debug_app.test_client()
    client.get("/items")
    client.post("/slow")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked, problems = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    keep = os.environ.get("FICTIVE_TEST_SCREENSHOTS")
    try:
        page.goto(f"{served}/_fictive/")
        check(page, keep and f"{keep}/monitoring-list-{width}-{scheme}.png")
        page.keyboard.press("Tab")  # the first request
        page.keyboard.press("Enter")
        page.wait_for_selector("h1:has-text('POST /slow')")
        check(page, keep and f"{keep}/monitoring-idle-{width}-{scheme}.png")
        red = page.locator(".bar.idle").first
        share = float(re.findall(r"width:\s*([\d.]+)%", red.get_attribute("style"))[0])
        whole = red.locator("..").bounding_box()["width"]
        assert red.bounding_box()["width"] == pytest.approx(whole * share / 100, abs=2)
        assert whole > width / 2
        page.go_back()
        page.get_by_role("link", name="GET /items").click()
        check(page, keep and f"{keep}/monitoring-request-{width}-{scheme}.png")
        page.locator("summary").first.click()
        page.get_by_role("link", name="SELECT child.id").first.click()
        page.get_by_role("button", name="EXPLAIN ANALYZE").click()
        assert page.locator("#plan").count() == 0, "the browser asks for the box to be ticked"
        page.get_by_label("Run the statement again").check()
        page.get_by_role("button", name="EXPLAIN ANALYZE").click()
        assert "actual time" in page.locator("#plan").inner_text()
        check(page, keep and f"{keep}/monitoring-plan-{width}-{scheme}.png")
    finally:
        page.close()
    assert problems == []
    assert {url.split("/_fictive")[0] for url in asked} == {served}, "nothing comes from elsewhere"


def check(page: Any, screenshot: str | None) -> None:
    """Nothing is wider than the window, and text can be told from what is behind it."""
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, f"{page.url} is {wide} px too wide"
    assert page.evaluate(CONTRAST) >= 4.5
    if screenshot:
        box = page.locator("body").bounding_box()
        clip = {"x": 0, "y": 0, "width": box["width"], "height": min(box["height"], 900)}
        Path(screenshot).write_bytes(page.screenshot(clip=clip))


CONTRAST = """() => {
  const light = (c) => { const [r, g, b] = c.match(/[0-9.]+/g).map(Number).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b }
  const behind = (e) => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)|transparent|color/.test(c)) return c }
    return 'rgb(255,255,255)' }
  return Math.min(...[...document.querySelectorAll('h1, p, a, code, b, td, .meta, .soft, button')]
    .filter(e => e.offsetParent && e.innerText.trim()).map(e => {
      const a = light(getComputedStyle(e).color), b = light(behind(e))
      return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) }))
}"""

"""The example app on both database classes and drivers; the demo and the page as one starts them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from flask_sqlalchemy import SQLAlchemy

from examples.objects import data, demo, sides
from examples.objects.app import create_app
from examples.objects.database import DB
from examples.objects.insurer import Insurer
from examples.objects.models import MOVING
from fictive.testing.postgres import Server

pytestmark = pytest.mark.any_sqlalchemy

ROOT = Path(__file__).parent.parent


@pytest.fixture(
    scope="module",
    params=[(SQLAlchemy, "psycopg2"), (DB, "psycopg2"), (DB, "psycopg")],
    ids=["plain-psycopg2", "fictive-psycopg2", "fictive-psycopg"],
)
def shared_app(request: pytest.FixtureRequest, pg: Server) -> Iterator[Flask]:
    """The app on a database that the tests of this module share; making one takes longer than all they do with it."""
    database_class, driver = request.param
    server = sa.create_engine(pg.url(driver="psycopg2"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    name = f"example_{uuid.uuid4().hex}"
    with server.connect() as connection:
        connection.execute(sa.text(f"create database {name}"))
    app = create_app(database_class, pg.url(name, driver=driver), TESTING=True)
    yield app
    engine_of(app).dispose()
    with server.connect() as connection:
        connection.execute(sa.text(f"drop database {name} with (force)"))


@pytest.fixture
def app(shared_app: Flask) -> Flask:
    """With the sample data and nothing else."""
    shared_app.config["INSURER"] = Insurer(0)
    data.fill(engine_of(shared_app))
    return shared_app


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


def engine_of(app: Flask) -> sa.Engine:
    with app.app_context():
        engine: sa.Engine = app.extensions["sqlalchemy"].engine
    return engine


def state_and_notes(app: Flask, id: int) -> tuple[str, list[str]]:
    """What a connection of its own sees."""
    with engine_of(app).connect() as connection:
        state = connection.execute(sa.text("select state from objects where id = :id"), {"id": id}).scalar_one()
        notes = connection.execute(sa.text("select note from moves where object_id = :id order by id"), {"id": id})
        return state, list(notes.scalars())


# Reading


def test_an_object_with_its_tags(client: FlaskClient) -> None:
    response = client.get("/objects/3")

    assert response.status_code == 200
    body = response.json
    assert body is not None
    assert body.pop("updated_at")
    assert body == {"id": 3, "name": "Celestial globe", "state": "shown", "tags": ["instrument", "paper"]}


@pytest.mark.parametrize("id", ["404", "0", "99999999999", "x"])
def test_no_such_object(client: FlaskClient, id: str) -> None:
    response = client.get(f"/objects/{id}")

    assert response.status_code == 404
    assert response.json is not None
    assert response.json["status"] == "Not Found"


def test_insurance_tells_offer_and_logbook(client: FlaskClient) -> None:
    body = client.get("/objects/3/insurance").json

    assert body is not None
    assert body["offer"] == Insurer(0)("Celestial globe")
    assert body["moves"] == [{"note": "joins the collection", "insured_for": 3000}]


def test_pages(client: FlaskClient) -> None:
    body = client.get("/objects?page=3&per_page=5").json

    assert body is not None
    assert [obj["name"] for obj in body["objects"]] == ["Kayak", "Lighthouse lens"]
    assert (body["page"], body["pages"], body["total"]) == (3, 3, 12)


def test_a_page_after_the_last_is_empty(client: FlaskClient) -> None:
    body = client.get("/objects?page=1000000").json

    assert body is not None
    assert body["objects"] == []


def test_objects_in_one_state(client: FlaskClient) -> None:
    body = client.get("/objects?state=lent").json

    assert body is not None
    assert [obj["name"] for obj in body["objects"]] == ["Diving helmet", "Jade pendant"]


def test_overview(client: FlaskClient) -> None:
    assert client.get("/overview").json == {"objects": {"lent": 2, "shown": 5, "stored": 5}}


# Writing


def test_a_new_object_and_its_new_tag(client: FlaskClient) -> None:
    response = client.post("/objects", json={"name": " Magic lantern ", "tags": ["light", "brass", "light"]})

    assert response.status_code == 201
    assert response.json is not None
    assert (response.json["id"], response.json["name"], response.json["state"]) == (13, "Magic lantern", "stored")
    assert response.json["tags"] == ["brass", "light"]
    assert client.get(response.headers["Location"]).json == response.json


def test_a_name_that_is_taken_leaves_nothing_not_even_its_tag(client: FlaskClient, app: Flask) -> None:
    before = data.dump(engine_of(app))

    response = client.post("/objects", json={"name": "Kayak", "tags": ["quite new"]})

    assert response.status_code == 409
    assert data.dump(engine_of(app)) == before
    assert client.get("/overview").status_code == 200


def test_a_move_and_its_logbook(client: FlaskClient, app: Flask) -> None:
    before = client.get("/objects/3").json

    response = client.patch("/objects/3", json={"state": "lent"})

    assert response.status_code == 200
    assert before is not None
    assert response.json is not None
    assert response.json["state"] == "lent"
    assert response.json["updated_at"] > before["updated_at"]
    assert state_and_notes(app, 3) == ("lent", ["joins the collection", "leaves: shown", "arrives: lent"])


def test_others_see_the_first_step_while_the_insurer_is_asked(client: FlaskClient, app: Flask) -> None:
    seen: list[Any] = []

    def insurer(name: str) -> int:
        seen.append(state_and_notes(app, 3))
        seen.append(client.application.test_client().patch("/objects/3", json={"state": "stored"}).status_code)
        return 1

    app.config["INSURER"] = insurer
    assert client.patch("/objects/3", json={"state": "lent"}).status_code == 200

    assert seen == [(MOVING, ["joins the collection", "leaves: shown"]), 409]
    assert state_and_notes(app, 3) == ("lent", ["joins the collection", "leaves: shown", "arrives: lent"])


def test_a_step_that_fails_leaves_nothing_of_itself(client: FlaskClient, app: Flask) -> None:
    """The second step's log line cannot be written: the object stays where the first step left it."""
    app.config["INSURER"] = lambda name: 2**40

    with pytest.raises(sa.exc.DataError):
        client.patch("/objects/3", json={"state": "lent"})

    assert state_and_notes(app, 3) == (MOVING, ["joins the collection", "leaves: shown"])
    assert client.get("/objects/3").status_code == 200


def test_moving_what_is_not_there(client: FlaskClient) -> None:
    assert client.patch("/objects/404", json={"state": "lent"}).status_code == 404


# Input that cannot be right


@pytest.mark.parametrize(
    ("method", "path", "body", "said"),
    [
        ("POST", "/objects", None, "JSON object"),
        ("POST", "/objects", [], "JSON object"),
        ("POST", "/objects", {}, "'name'"),
        ("POST", "/objects", {"name": "  "}, "'name'"),
        ("POST", "/objects", {"name": 3}, "'name'"),
        ("POST", "/objects", {"name": "n" * 101}, "100"),
        ("POST", "/objects", {"name": "a\0b"}, "'name'"),
        ("POST", "/objects", {"name": "\ud800"}, "'name'"),
        ("POST", "/objects", {"name": "N", "tags": "brass"}, "'tags'"),
        ("POST", "/objects", {"name": "N", "tags": [None]}, "'tags'"),
        ("POST", "/objects", {"name": "N", "tags": ["t"] * 11}, "10"),
        ("POST", "/objects", {"name": "N", "colour": "red"}, "'colour'"),
        ("PATCH", "/objects/3", {"state": "lost"}, "stored, shown, lent"),
        ("PATCH", "/objects/3", {"state": MOVING}, "stored, shown, lent"),
        ("PATCH", "/objects/3", {"state": ["lent"]}, "stored, shown, lent"),
        ("PATCH", "/objects/3", {}, "stored, shown, lent"),
        ("GET", "/objects?page=0", None, "'page'"),
        ("GET", "/objects?page=-1", None, "'page'"),
        ("GET", "/objects?page=1000001", None, "'page'"),
        ("GET", "/objects?page=%C2%B2", None, "'page'"),
        ("GET", "/objects?per_page=many", None, "'per_page'"),
        ("GET", "/objects?state=lost", None, "'state'"),
    ],
)
def test_input_that_cannot_be_right(client: FlaskClient, method: str, path: str, body: Any, said: str) -> None:
    response = client.open(path, method=method, json=body)

    assert response.status_code == 400
    assert response.json is not None
    assert said in response.json["error"]


# The commands


def start(module: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"examples.objects.{module}", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"} | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_the_demo(pg: Server, driver: str) -> None:
    with start("demo", "--driver", driver, "--api-ms", "20", "--latency-ms", "0") as demo:
        out, err = demo.communicate(timeout=90)

    assert (demo.returncode, err) == (0, "")
    assert out.index("Summary") < out.index("\nGET /objects/3\n")
    assert re.search(r"^GET /objects/3 +3 \u2192 1 ", out, re.MULTILINE)
    one_select = out[out.index("\nGET /objects/3\n") : out.index("\nGET /objects/3/insurance\n")]
    assert "3 round trips" in one_select
    assert re.search(r" 1 round trip$", one_select, re.MULTILINE)
    assert "the same rows are in both databases" in out
    assert "DIFFERENT" not in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_demo_fails_when_the_answers_differ(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    @contextlib.contextmanager
    def one_row_differs(*args: Any, **kwargs: Any) -> Iterator[tuple[sides.Side, sides.Side]]:
        with sides.both_sides(*args, **kwargs) as (plain, fictive):
            fictive.measure(sides.Call("PATCH", "/objects/3", {"state": "stored"}))
            yield plain, fictive

    monkeypatch.setattr("examples.objects.demo.both_sides", one_row_differs)
    monkeypatch.setattr("examples.objects.demo.CALLS", sides.CALLS[:1])

    assert demo.compare("psycopg2", api_seconds=0, latency=0) == 1
    out = capsys.readouterr().out
    assert "DIFFERENT: GET /objects/3: the answers differ" in out
    assert "DIFFERENT: the rows in the two databases differ" in out


@pytest.mark.parametrize("module", ["demo", "serve"])
def test_help(module: str) -> None:
    with start(module, "--help") as command:
        out, err = command.communicate(timeout=60)

    assert (command.returncode, err) == (0, "")
    assert "--driver" in out


def fetch(url: str, form: dict[str, str] | None = None) -> str:
    sent = urllib.parse.urlencode(form).encode() if form else None
    with urllib.request.urlopen(url, sent, timeout=30) as response:
        text: str = response.read().decode()
    return text


def test_the_page(pg: Server) -> None:
    with start("serve", "--port", "0", "--api-ms", "20") as serve:
        try:
            assert serve.stdout is not None
            lines = []
            for line in serve.stdout:
                lines.append(line)
                if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                    break
            else:
                pytest.fail(f"{''.join(lines)}{serve.stderr.read() if serve.stderr else ''}")
            url = found[0]

            page = fetch(url)
            assert "3 \u2192 <b>1</b> round trips" in page
            assert "<script" not in page
            assert not re.search(r"(src|href)=.?(https?:)?//", page)

            page = fetch(f"{url}send", {"call": "move", "id": "4", "state": "shown"})
            assert "PATCH /objects/4" in page
            assert "the same from both" in page
            page = fetch(f"{url}send", {"call": "create", "name": "<script>alert(1)</script>"})
            assert "<script" not in page

            assert '"state":"shown"' in fetch(f"{url}fictive/objects/4")
            with pytest.raises(urllib.error.HTTPError) as caught:
                fetch(f"{url}plain/objects/404")
            assert caught.value.code == 404
            caught.value.close()

            with start("serve", "--port", url.split(":")[-1].strip("/")) as second:
                _, err = second.communicate(timeout=60)
            assert second.returncode == 1
            assert "in use" in err
            assert "Traceback" not in err

            serve.send_signal(signal.SIGINT)
            _, err = serve.communicate(timeout=60)
            assert serve.returncode in (0, 130)
            assert err == ""
        finally:
            if serve.poll() is None:
                serve.kill()

    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(url.split(":")[-1].strip("/")))) != 0

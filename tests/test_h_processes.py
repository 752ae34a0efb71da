"""A sandbox that others join (contract H4): a live server, a browser, and by its token another process."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from werkzeug.serving import make_server

from fictive import errors
from fictive.testing.join import HEADER, SandboxMiddleware, join
from fictive.testing.remote import RemoteConnection
from fictive.testing.sandbox import Sandbox, place_of, sandbox
from tests.models import opt_in
from tests.test_h_sandbox import block, names, nothing_remains

__all__ = ["nothing_remains"]  # a fixture

db = opt_in.db
Item = opt_in.Item
Look = Callable[..., list[Any]]
CHROMIUM = os.environ.get("FICTIVE_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
CHILD = [sys.executable, "-m", "tests.sandbox_child"]
pytestmark = [pytest.mark.usefixtures("nothing_remains"), pytest.mark.any_sqlalchemy]


def child(app: Flask, token: str, name: str) -> None:
    environment = {**os.environ, "URL": app.config["SQLALCHEMY_DATABASE_URI"], "SANDBOX": token}
    done = subprocess.run(
        [*CHILD, name], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_h4_a_child_process_joins_by_the_token(app: Flask, look: Look) -> None:
    with db.sandbox() as box:
        db.session.execute(sa.insert(Item).values(name="of the test"))
        with db.sandbox() as inner:
            child(app, inner.token(), "add")
            assert names() == ["of the child", "of the test"]
            assert look("select count(*) from item") == [0]
        assert names() == ["of the test"]
        child(app, box.token(), "add")
        assert names() == ["of the child", "of the test"]
    assert names() == []


def test_h4_the_apps_ways_work_in_a_child(app: Flask) -> None:
    with db.sandbox() as box:
        child(app, box.token(), "all_ways")
        assert names() == []


def remote(box: Sandbox) -> RemoteConnection:
    """What another process has, in this one."""
    return RemoteConnection(box.token(), place_of(db.engine), None)


def test_h4_another_process_takes_turns(app: Flask) -> None:
    with db.sandbox(patience=0.1) as box:
        connection = remote(box)
        with db.session.begin():
            db.session.execute(sa.insert(Item).values(name="x"))
            with pytest.raises(errors.SandboxError, match="has a transaction open in the sandbox"):
                connection.cursor().execute("INSERT INTO item (name) VALUES ('z')")
            connection.rollback()
        connection.cursor().execute("INSERT INTO item (name) VALUES ('y')")
        with pytest.raises(errors.SandboxError, match="A thread of process"):
            db.session.execute(sa.insert(Item).values(name="z"))
        connection.commit()
        assert names() == ["x", "y"]


def test_h4_transactions_of_one_thread_of_another_process_nest(app: Flask) -> None:
    with db.sandbox(patience=0.1) as box:
        outer, inner = remote(box), remote(box)
        for connection, name in ((outer, "x"), (inner, "y")):
            connection.cursor().execute("INSERT INTO item (name) VALUES (%s)", (name,))
        inner.commit()
        outer.commit()
        assert names() == ["x", "y"]


def test_h4_what_a_dead_process_had_open_is_rolled_back(app: Flask) -> None:
    with db.sandbox() as box:
        connection = remote(box)
        connection.cursor().execute("INSERT INTO item (name) VALUES ('lost')")
        connection._client.close()
        block()
        assert names() == ["x"]


def in_a_fork(run: Callable[[], object]) -> str:
    """What a forked child raises, in words."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = "nothing"
        try:
            run()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(writing, said.encode())
            os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as file:
        return file.read()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_h4_a_forked_child_needs_the_token(app: Flask) -> None:
    with db.sandbox() as box:
        names()
        token = box.token()
        assert "sandbox.token()" in in_a_fork(names)
        assert "sandbox.token()" in in_a_fork(lambda: db.sandbox().__enter__())

        def joins() -> None:
            with join(token, db.engine):
                block()
                assert names() == ["x"]
            names()

        assert "sandbox.token()" in in_a_fork(joins)  # after the block, as before it
        assert names() == ["x"]


def test_h4_a_token_is_for_its_sandbox(app: Flask, database_url: str) -> None:
    with pytest.raises(errors.ConfigurationError, match="no token"), join("what?", db.engine):
        pass
    with db.sandbox() as box:
        token = box.token()
        assert box.token() == token
        with join(token, db.engine):  # this process is in it already
            block()
        assert names() == ["x"]
        assert token not in repr(box)
        place = place_of(db.engine)
        with pytest.raises(errors.ConfigurationError, match="no database"):
            RemoteConnection(token, (*place[:2], "other", place[3]), None)
        with pytest.raises(errors.SandboxError):
            RemoteConnection(token[:-1] + ("0" if token[-1] != "0" else "1"), place, None)
        connection = remote(box)
        with pytest.raises(AttributeError):
            connection.no_such_thing  # noqa: B018
        with pytest.raises(errors.SandboxError, match="pickled"):
            connection.cursor().execute("SELECT 1", [lambda: None])
        cursor = connection.cursor()
        cursor.execute("INSERT INTO item (name) VALUES ('open')")
        assert not connection.closed
    assert connection.closed
    with pytest.raises(errors.SandboxError, match="has ended"):
        cursor.execute("SELECT 1")
    with pytest.raises(errors.SandboxError, match="has ended"):
        RemoteConnection(token, place, None)
    connection.close()
    assert names() == []


def test_h4_the_end_waits_for_no_child_that_waits(app: Flask) -> None:
    """A process that waits for its turn when the sandbox ends is told at once."""
    caught: list[BaseException] = []

    def run(connection: Any) -> None:
        try:
            connection.cursor().execute("INSERT INTO item (name) VALUES ('y')")
        except BaseException as error:
            caught.append(error)

    with db.sandbox(patience="60s") as box:
        db.session.begin()
        db.session.execute(sa.insert(Item).values(name="x"))
        connection = remote(box)
        thread = threading.Thread(target=run, args=(connection,))
        thread.start()
        shared = box._outer[0]
        while not shared._turn._waiters:  # type: ignore[attr-defined]
            threading.Event().wait(0.005)
    thread.join()
    assert isinstance(caught[0], errors.SandboxError)


# -- a live server ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def live_server(app: Flask) -> Iterator[str]:
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def child_server(app: Flask) -> Iterator[str]:
    """In a child process, with `SandboxMiddleware`."""
    environment = {**os.environ, "URL": app.config["SQLALCHEMY_DATABASE_URI"]}
    with subprocess.Popen(
        [*CHILD, "serve"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.stdin.close()


def get(url: str, token: str | None = None, data: bytes | None = None) -> str:
    request = urllib.request.Request(url, headers={HEADER: token} if token else {}, data=data)
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(response.read().decode())


def test_h4_a_live_server_in_a_thread(app: Flask, look: Look) -> None:
    @app.get("/")
    def index() -> str:
        return ", ".join(names())

    @app.post("/items/<name>")
    def add(name: str) -> str:
        with db.session.begin():
            db.session.add(Item(name=name))
        return "ok"

    with live_server(app) as url, db.sandbox():
        block()
        assert get(url) == "x"
        threads = [threading.Thread(target=get, args=(f"{url}/items/{n}", None, b"")) for n in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert names() == ["0", "1", "2", "3", "4", "x"]
        assert look("select count(*) from item") == [0]


def test_h4_a_live_server_in_a_child_takes_the_token_from_a_header(app: Flask) -> None:
    with child_server(app) as url:
        for _ in range(2):
            with db.sandbox() as box:
                block()
                assert get(url, box.token()).endswith("</form>x")
                get(f"{url}/items", box.token(), b"name=y")
                assert names() == ["x", "y"]
                assert get(url).endswith("</form>")  # without it
        with pytest.raises(urllib.error.HTTPError):
            get(url, box.token())
        assert get(url).endswith("</form>")


@pytest.fixture
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("driver", ["psycopg"], indirect=True)
def test_h4_a_browser_in_the_sandbox(app: Flask, browser: Any) -> None:
    with child_server(app) as url, db.sandbox() as box:
        block()
        page = browser.new_page(extra_http_headers={HEADER: box.token()})
        page.goto(url)
        page.fill("input", "typed")
        page.click("button")
        page.wait_for_function("document.body.innerText.includes('typed, x')")
        assert names() == ["typed", "x"]
        page.close()


def test_h4_the_middleware_passes_errors_on(app: Flask) -> None:
    """Requests of the process that has the sandbox are in it anyway; what the app raises ends the request."""
    closed: list[str] = []

    class Answer:
        def __iter__(self) -> Iterator[bytes]:
            yield b"ok"

        def close(self) -> None:
            closed.append("answer")

    def wsgi_app(environ: dict[str, Any], start_response: Any) -> Any:
        if environ.get("fails"):
            raise ZeroDivisionError
        return Answer()

    middleware = SandboxMiddleware(wsgi_app, db.engine)
    engine = db.engine
    with sandbox(engine) as box:
        header = {"HTTP_FICTIVE_SANDBOX": box.token()}
        with pytest.raises(ZeroDivisionError):
            middleware({**header, "fails": True}, None)
        answer: Any = middleware(header, None)
        assert list(answer) == [b"ok"]
        answer.close()
        assert closed == ["answer"]
        assert list(middleware({}, None)) == [b"ok"]

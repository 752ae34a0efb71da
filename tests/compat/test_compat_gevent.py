"""A gunicorn with gevent's workers (C3, "Deployment"): greenlets wait for the database side by side."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fresh_database import OWN
from tests.test_g_waiting import until

HERE = Path(__file__).parent
MANY = 10
WAITING = f"select count(*) from pg_locks where locktype = 'advisory' and not granted and database = ({OWN})"
Look = Callable[..., list[Any]]


class Site:
    """The app in a gunicorn of one worker."""

    def __init__(self, url: str, log: Path) -> None:
        self._log = log
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(MANY)
            self.port = listening.getsockname()[1]
            number = listening.fileno()
            with log.open("wb") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "gunicorn", "-c", str(HERE / "gunicorn_gevent.conf.py"),
                     "-b", f"fd://{number}", "--no-control-socket", "--chdir", str(HERE), "gevent_app:app"],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "DATABASE_URL": url},
                    pass_fds=[number], stdout=output, stderr=output,
                )  # fmt: skip

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return str(answer.read().decode())

    def close(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(30)

    def __repr__(self) -> str:
        return self._log.read_text(errors="replace")


@pytest.fixture
def site(database_url: str, tmp_path: Path) -> Iterator[Site]:
    site = Site(database_url, tmp_path / "log")
    yield site
    site.close()


def test_greenlets_wait_side_by_side(site: Site, look: Look) -> None:
    answers: list[str] = []

    def ask(path: str) -> None:
        answers.append(site.get(path))

    assert json.loads(site.get("/state")) == {"names": [], "checked out": 0, "in transactions": 0}, site
    look("select pg_advisory_lock(1)")
    paths = ["/outside", "/block"] * (MANY // 2)
    requests = [threading.Thread(target=ask, args=(path,)) for path in paths]
    for each in requests:
        each.start()
    until(lambda: look(WAITING) == [MANY])  # each in a connection of its own, in one process without threads
    assert site.get("/timeout") == "done"  # while they wait
    look("select pg_advisory_unlock(1)")
    for each in requests:
        each.join()
    assert answers == ["done"] * MANY
    expected = {"names": ["block"] * (MANY // 2), "checked out": 0, "in transactions": 0}
    assert json.loads(site.get("/state")) == expected
    listener = threading.Thread(target=ask, args=("/new",))
    listener.start()
    until(lambda: bool(look("insert into item (name) values ('new')")) or len(answers) > MANY)  # until one wakes it
    listener.join()
    assert answers[-1] == "done"

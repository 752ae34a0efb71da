"""The app twice, on plain Flask-SQLAlchemy and on fictive, each with a database and a wire of its own.

The demo and the page send the same requests to both and look at what went over the two wires.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from flask import Flask, current_app, request
from flask_sqlalchemy import SQLAlchemy

from fictive.testing import postgres
from fictive.testing.wire import Exchange, Wire

from . import data
from .app import create_app
from .database import DB
from .insurer import Insurer

POOL_SIZE = 2
AT_ONCE = 6


@dataclass(frozen=True)
class Call:
    """A request, sent `times` times at once."""

    method: str
    path: str
    json: Any = None
    what: str = ""
    times: int = 1

    @property
    def title(self) -> str:
        return (f"{self.times} \u00d7 " if self.times > 1 else "") + f"{self.method} {self.path}"


CALLS = [
    Call("GET", "/objects/3", what="one SELECT"),
    Call("GET", "/objects/3/insurance", what="a SELECT, somebody else's API, another SELECT"),
    Call(
        "GET",
        "/objects/3/insurance",
        what=f"{AT_ONCE} people at once, {POOL_SIZE} connections in the pool",
        times=AT_ONCE,
    ),
    Call("GET", "/objects?page=2", what="pagination: the page, its tags, the total"),
    Call("GET", "/overview", what="how many objects are where"),
    Call("POST", "/objects", {"name": "Magic lantern", "tags": ["brass", "light"]}, "add() and commit()"),
    Call("PATCH", "/objects/3", {"state": "lent"}, "an atomic step, somebody else's API, another atomic step"),
    Call("GET", "/objects/404", what="an object that is not there"),
    Call("PATCH", "/objects/3", {"state": "lost"}, "input that cannot be right"),
]


@dataclass(frozen=True)
class Wait:
    """The time an app spent waiting for the insurer; `held` connections of its pool were taken meanwhile."""

    start: float
    end: float
    held: int


@dataclass
class Answer:
    """What came back, when, and what was waited for. Times are `time.monotonic`'s."""

    start: float
    waits: list[Wait] = field(default_factory=list)
    end: float = 0.0
    status: str = ""
    body: Any = None
    location: str | None = None


@dataclass
class Measurement:
    """One call on one side: its answers, and what went over the wire until the last of them was complete."""

    side: str
    call: Call
    answers: list[Answer]
    exchanges: list[Exchange]
    in_transaction: float
    idle_in_transaction: float
    connections_opened: int

    @property
    def start(self) -> float:
        return min(answer.start for answer in self.answers)

    @property
    def seconds(self) -> float:
        return max(answer.end for answer in self.answers) - self.start

    @property
    def round_trips(self) -> int:
        return len(self.exchanges)

    @property
    def waits(self) -> list[Wait]:
        return [wait for answer in self.answers for wait in answer.waits]

    @property
    def held(self) -> int | None:
        """Most connections held at once while waiting for the insurer; None if nothing waited."""
        return max((wait.held for wait in self.waits), default=None)


class _WatchedInsurer(Insurer):
    """Notes each wait, and how many connections the app's pool has lent out when it begins."""

    def __call__(self, name: str) -> int:
        pool = current_app.extensions["sqlalchemy"].engine.pool
        start, held = time.monotonic(), pool.checkedout()
        offer = super().__call__(name)
        request.environ["objects.waits"].append(Wait(start, time.monotonic(), held))
        return offer


class Side:
    """The app on one database class, reached through a wire that is watched."""

    def __init__(self, name: str, title: str, app: Flask, wire: Wire, direct: sa.Engine, insurer: Insurer) -> None:
        self.name = name
        self.title = title
        self.app = app
        self.insurer = insurer
        self._wire = wire
        self._direct = direct
        self._lock = threading.Lock()

    def start_over(self) -> None:
        """Put the sample data in place of whatever is there."""
        data.fill(self._direct)

    def rows(self) -> dict[str, list[tuple[Any, ...]]]:
        """All rows of all tables, but for times."""
        return data.dump(self._direct)

    def measure(self, call: Call) -> Measurement:
        """Send `call` and watch the wire. One at a time: a wire cannot tell whose round trip is whose."""
        with self._lock, self._wire.record() as log:
            if call.times == 1:
                answers = [self._send(call)]
            else:
                with ThreadPoolExecutor(call.times) as threads:
                    answers = list(threads.map(self._send, [call] * call.times))
        return Measurement(
            self.name,
            call,
            answers,
            sorted(log.exchanges, key=lambda exchange: exchange.start),
            log.time_in_transaction,
            log.idle_in_transaction,
            log.connections_opened,
        )

    def warm_up(self) -> None:
        """Send every call until nothing is left that is done once only, then put the sample data back.

        Such are connecting, what SQLAlchemy asks a server first, and the round trip by which psycopg prepares a
        statement on its sixth run. That is once for each connection, so each has its turn while the others are
        kept away. No time is lost on network and insurer meanwhile.
        """
        delay, seconds = self._wire.delay, self.insurer.seconds
        self._wire.delay = self.insurer.seconds = 0
        with self.app.app_context():
            engine: sa.Engine = self.app.extensions["sqlalchemy"].engine
        try:
            with contextlib.ExitStack() as kept:
                for _ in range(POOL_SIZE):
                    for _ in range(7):
                        self.start_over()
                        for call in CALLS:
                            if call.times == 1:
                                self.measure(call)
                    kept.enter_context(engine.connect())
        finally:
            self._wire.delay, self.insurer.seconds = delay, seconds
        self.start_over()

    def _send(self, call: Call) -> Answer:
        answer = Answer(time.monotonic())
        # As from a browser: the response is complete only after the app has put away its session.
        with self.app.test_client() as client:
            response = client.open(
                call.path, method=call.method, json=call.json, environ_overrides={"objects.waits": answer.waits}
            )
        answer.end = time.monotonic()
        answer.status = response.status
        answer.body = response.get_json(silent=True)
        answer.location = response.headers.get("Location")
        return answer


@contextlib.contextmanager
def both_sides(driver: str, *, insurer_seconds: float, latency: float) -> Iterator[tuple[Side, Side]]:
    """Yield the app on plain Flask-SQLAlchemy and on fictive, filled with sample data, warmed up.

    Each way of a round trip takes `latency` seconds longer than loopback does. The server is the embedded one, or
    that of `FICTIVE_TEST_DATABASE_URL`; the databases made on it are dropped at the end.
    """
    with contextlib.ExitStack() as stack:
        pg = stack.enter_context(postgres.server())
        sides = []
        classes: list[tuple[str, str, type[SQLAlchemy]]] = [
            ("plain", "plain Flask-SQLAlchemy", SQLAlchemy),
            ("fictive", "fictive", DB),
        ]
        for name, title, database_class in classes:
            url = stack.enter_context(_database(pg, f"objects_{name}_{os.getpid()}", driver))
            wire = stack.enter_context(Wire(pg.host, pg.port))
            direct = sa.create_engine(url)
            stack.callback(direct.dispose)
            insurer = _WatchedInsurer(insurer_seconds)
            # The last connection given back is the next one taken, so that requests one by one use one connection.
            options = {"pool_size": POOL_SIZE, "max_overflow": 0, "pool_use_lifo": True}
            app = create_app(database_class, wire.url(url), SQLALCHEMY_ENGINE_OPTIONS=options, INSURER=insurer)
            stack.callback(_dispose, app)
            wire.delay = latency
            side = Side(name, title, app, wire, direct, insurer)
            side.warm_up()
            sides.append(side)
        yield sides[0], sides[1]


@contextlib.contextmanager
def _database(pg: postgres.Server, name: str, driver: str) -> Iterator[str]:
    maintenance = sa.create_engine(pg.url(driver=driver), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with maintenance.connect() as connection:
        connection.execute(sa.text(f'create database "{name}"'))
    try:
        yield pg.url(name, driver=driver)
    finally:
        with maintenance.connect() as connection:
            connection.execute(sa.text(f'drop database "{name}" with (force)'))


def _dispose(app: Flask) -> None:
    with app.app_context():
        app.extensions["sqlalchemy"].engine.dispose()


def answers_as_compared(measurement: Measurement) -> list[tuple[str, Any, str | None]]:
    """Status, body and location of each answer. Times are blanked: the two apps answer one after the other."""
    return [(answer.status, _without_times(answer.body), answer.location) for answer in measurement.answers]


def _without_times(body: Any) -> Any:
    if isinstance(body, dict):
        return {
            key: "(a time)" if key == "updated_at" and isinstance(value, str) else _without_times(value)
            for key, value in body.items()
        }
    return [_without_times(value) for value in body] if isinstance(body, list) else body


# SQL for human eyes

_COLUMNS = re.compile(r"SELECT [^()]{25,}? FROM ")
_JOINS = re.compile(r" (LEFT OUTER )?JOIN .*?(?= WHERE | GROUP BY | ORDER BY | LIMIT |$)")
_CASTS = re.compile(r"(\$\d+)::\w+")


def one_line(exchange: Exchange) -> str:
    """The statements of a round trip on one line."""
    return " ".join("; ".join(exchange.statements).split())


def shortened(exchange: Exchange) -> str:
    """`one_line` with long column lists, joins and casts left out."""
    text = _COLUMNS.sub("SELECT \u2026 FROM ", one_line(exchange))
    text = _JOINS.sub(lambda match: f" {match[1] or ''}JOIN \u2026", text)
    return _CASTS.sub(r"\1", text)

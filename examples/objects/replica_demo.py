"""`./run demo --replica`: which of two real servers answers each request of two users, while one of them is late."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flask
import psycopg
import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fictive.flask_sqlalchemy import OptInTransactionMixin
from fictive.testing import postgres
from fictive.testing.wire import Wire


class DB(OptInTransactionMixin, SQLAlchemy):
    pass


@dataclass(frozen=True)
class Servers:
    """A primary and its replica, each behind a proxy that counts."""

    primary: Wire
    replica: Wire
    replica_url: str

    def replay(self, *, stop: bool) -> None:
        with psycopg.connect(self.replica_url, autocommit=True) as connection:
            connection.execute(f"select pg_wal_replay_{'pause' if stop else 'resume'}()".encode())


def main(driver: str) -> int:
    """Print a line for each request; 1 if somebody did not see their own write."""
    failed = 0
    with _servers() as servers:
        app, db = _make(servers, driver)
        ann, bob = app.test_client(), app.test_client()
        print(f"{driver}; each line is one request, with the round trips to each server\n")
        print(f"{'request':34} {'answer':8} {'primary':>8} {'replica':>8}")
        for title, user, path, stop in (
            ("Ann reads", ann, "/", None),
            ("the replica stops replaying", None, "", True),
            ("Ann adds a vase, in a transaction", ann, "/add/vase", None),
            ("Ann reads: the replica is behind", ann, "/", None),
            ("Ann reads again: it is not asked", ann, "/", None),
            ("Bob reads: he has written nothing", bob, "/", None),
            ("the replica goes on", None, "", False),
            ("Ann reads", ann, "/", None),
        ):
            if user is None:
                servers.replay(stop=bool(stop))
                time.sleep(0.5)
                print(f"  {title}")
                continue
            with servers.primary.record() as primary, servers.replica.record() as replica:
                answer = (user.post if path != "/" else user.get)(path).text
            print(f"{title:34} {answer:8} {primary.round_trips:8} {replica.round_trips:8}", flush=True)
            if user is ann and path == "/" and title != "Ann reads" and answer != "vase":
                failed = 1
        with app.app_context():
            for engine in db.engines.values():
                engine.dispose()
    print("\nAnn's cookie says how far she must see; Bob's reads stay on the replica." if not failed else "\nSTALE")
    return failed


def _make(servers: Servers, driver: str) -> tuple[flask.Flask, Any]:
    app = flask.Flask("replica_demo")
    db = DB(model_class=type("Base", (DeclarativeBase,), {}))

    class Thing(db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    app.config.update(
        SECRET_KEY="secret",
        SQLALCHEMY_DATABASE_URI=servers.primary.url(f"postgresql+{driver}://postgres@/postgres"),
        FICTIVE_REPLICAS=[servers.replica.url(f"postgresql+{driver}://postgres@/postgres")],
    )
    db.init_app(app)

    @app.get("/")
    def names() -> str:
        return ", ".join(db.session.scalars(sa.select(Thing.name))) or "nothing"

    @app.post("/add/<name>")
    def add(name: str) -> str:
        with db.session.begin():
            db.session.add(Thing(name=name))
        return "added"

    with app.app_context():
        db.create_all()
        for engine in db.engines.values():
            engine.connect().close()
    time.sleep(0.5)  # the replica gets the table
    return app, db


@contextlib.contextmanager
def _servers() -> Iterator[Servers]:
    with (
        postgres.private_server(**postgres.PRIMARY) as primary,
        postgres.standby_server(primary) as replica,
        Wire(primary.host, primary.port) as to_primary,
        Wire(replica.host, replica.port) as to_replica,
    ):
        yield Servers(to_primary, to_replica, replica.url())

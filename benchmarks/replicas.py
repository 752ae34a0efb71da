"""Users who write and read their own rows, on a primary and a late replica: `python -m benchmarks.replicas [--smoke]`.

Three ways: fictive's tokens; reads stick to the primary for two seconds after a write, as is usual; all reads go to
the replica. A read is stale when it brings less than what the same user wrote before.
"""

from __future__ import annotations

import argparse
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import flask
import psycopg
import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fictive.connection.replicas import replicas_of
from fictive.flask_sqlalchemy import OptInTransactionMixin
from fictive.testing import postgres

STICKY = 2.0  # seconds
READS_PER_WRITE = 10


class Base(DeclarativeBase):
    pass


class DB(OptInTransactionMixin, SQLAlchemy):
    pass


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one way with one delay."""

    way: str
    driver: str
    delay: int
    """Milliseconds by which the replica replays a commit later."""
    reads: int
    stale: int
    on_replica: int
    behind: int
    """Reads that the replica could not answer, and that cost a round trip more."""

    def __str__(self) -> str:
        share = 100 * self.on_replica / self.reads
        return (
            f"{self.driver:9} {self.delay:4} ms  {self.way:7} {self.reads:6} reads, {self.stale:5} stale"
            f" ({100 * self.stale / self.reads:.1f} %), {share:5.1f} % on the replica, {self.behind} asked it in vain"
        )


class Users:
    """Threads, each a user with a row and a browser of their own."""

    def __init__(self, client: Callable[[], Any], users: int, reads: int) -> None:
        self._client = client
        self._users = users
        self._reads = reads // users
        self._lock = threading.Lock()
        self.reads = self.stale = 0

    def run(self) -> None:
        threads = [threading.Thread(target=self._use, args=(number,)) for number in range(1, self._users + 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _use(self, number: int) -> None:
        client = self._client()
        value = stale = reads = 0
        while reads < self._reads:
            value += 1
            client.write(number, value)
            for _ in range(READS_PER_WRITE):
                stale += client.read(number) < value
                reads += 1
        with self._lock:
            self.reads += reads
            self.stale += stale


class _Browser:
    """Requests to the app on fictive, with cookies."""

    def __init__(self, app: flask.Flask) -> None:
        self._client = app.test_client()

    def write(self, number: int, value: int) -> None:
        assert self._client.post(f"/{number}/{value}").status_code == 200

    def read(self, number: int) -> int:
        return int(self._client.get(f"/{number}").text)


class _ByHand:
    """Two engines and a rule."""

    on_replica = 0

    def __init__(self, primary: sa.Engine, replica: sa.Engine, sticky: float) -> None:
        self._primary, self._replica, self._sticky = primary, replica, sticky
        self._wrote = -1e9

    def write(self, number: int, value: int) -> None:
        with self._primary.begin() as connection:
            connection.execute(sa.text("update user_row set value = :v where id = :n"), {"v": value, "n": number})
        self._wrote = time.monotonic()

    def read(self, number: int) -> int:
        sticks = time.monotonic() - self._wrote < self._sticky
        if not sticks:
            _ByHand.on_replica += 1
        with (self._primary if sticks else self._replica).connect() as connection:
            return int(connection.scalar(sa.text("select value from user_row where id = :n"), {"n": number}) or 0)


def make_app(primary: str, replica: str, users: int) -> tuple[flask.Flask, Any]:
    app = flask.Flask("replicas")
    db = DB(model_class=type("Base", (DeclarativeBase,), {}))

    class UserRow(db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[int]

    options = {"pool_size": users, "max_overflow": 0}
    app.config.update(
        SECRET_KEY="secret",
        SQLALCHEMY_DATABASE_URI=primary,
        SQLALCHEMY_ENGINE_OPTIONS=options,
        SQLALCHEMY_BINDS={"replica": replica},
        FICTIVE_REPLICAS=["replica"],
    )
    db.init_app(app)

    @app.get("/<int:number>")
    def read(number: int) -> str:
        return str(db.session.scalar(sa.select(UserRow.value).where(UserRow.id == number)))

    @app.post("/<int:number>/<int:value>")
    def write(number: int, value: int) -> str:
        with db.session.begin():
            db.session.execute(sa.update(UserRow).where(UserRow.id == number).values(value=value))
        return ""

    return app, db


def measure(
    primary: postgres.Server, replica: postgres.Server, driver: str, delay: int, users: int, reads: int
) -> list[Outcome]:
    """The three ways, one after the other."""
    with psycopg.connect(replica.url(), autocommit=True) as connection:
        connection.execute(f"alter system set recovery_min_apply_delay = {delay}".encode())
        connection.execute("select pg_reload_conf()")
    with psycopg.connect(primary.url(), autocommit=True) as connection:
        connection.execute("drop table if exists user_row")
        connection.execute("create table user_row (id int primary key, value int not null)")
        connection.execute("insert into user_row select n, 0 from generate_series(1, %s) n", [users])
    time.sleep(delay / 1000 + 0.5)
    found = []
    app, db = make_app(primary.url(driver=driver), replica.url(driver=driver), users)
    work = Users(lambda: _Browser(app), users, reads)
    work.run()
    with app.app_context():
        replicas = replicas_of(db.engine)
        assert replicas is not None
        (state,) = replicas.states()
        for engine in db.engines.values():
            engine.dispose()
    found.append(Outcome("tokens", driver, delay, work.reads, work.stale, state.reads, state.behind))
    for way, sticky in (("sticky", STICKY), ("none", 0.0)):
        engines = [
            sa.create_engine(server.url(driver=driver), pool_size=users, isolation_level="AUTOCOMMIT")
            for server in (primary, replica)
        ]
        _reset(primary)
        time.sleep(delay / 1000 + 0.5)
        _ByHand.on_replica = 0
        work = Users(lambda sticky=sticky, engines=engines: _ByHand(*engines, sticky), users, reads)  # type: ignore[misc]
        work.run()
        found.append(Outcome(way, driver, delay, work.reads, work.stale, _ByHand.on_replica, 0))
        for engine in engines:
            engine.dispose()
    return found


def _reset(primary: postgres.Server) -> None:
    with psycopg.connect(primary.url(), autocommit=True) as connection:
        connection.execute("update user_row set value = 0")


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where a read through fictive was stale."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replicas")
    parser.add_argument("--smoke", action="store_true", help="only see that it runs")
    parser.add_argument("--driver", action="append", choices=["psycopg2", "psycopg"])
    options = parser.parse_args(arguments)
    users, reads = (4, 200) if options.smoke else (20, 10_000)
    stale = 0
    with (
        postgres.private_server(**postgres.PRIMARY) as primary,
        postgres.standby_server(primary) as replica,
    ):
        for driver in options.driver or ["psycopg2", "psycopg"]:
            for delay in (0, 20) if options.smoke else (0, 20, 300):
                for outcome in measure(primary, replica, driver, delay, users, reads):
                    print(outcome, flush=True)
                    stale += outcome.stale if outcome.way == "tokens" else 0
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())

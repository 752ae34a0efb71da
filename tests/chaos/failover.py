"""Failovers behind HAProxy, under an application that reads and writes; what it was told, against what is there.

    python -m tests.chaos.failover --rounds 20              two nodes, promoted by hand
    python -m tests.chaos.failover --patroni --rounds 10    Patroni and etcd decide

Needs Debian's haproxy, and for the second patroni, python3-etcd and etcd-server. The configurations are those of the
page "Deployment", with other addresses.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import http.server
import itertools
import json
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fictive.errors import CommitOutcomeUnknown
from fictive.flask_sqlalchemy import OptInTransactionMixin
from fictive.testing import places, postgres

HERE = Path(__file__).parent
PATIENCE = 120  # seconds, for whatever has to happen
TABLE = "create table entry (id serial primary key, token text)"


class Base(DeclarativeBase):
    pass


class DB(OptInTransactionMixin, SQLAlchemy):
    pass


class Entry(Base):
    __tablename__ = "entry"
    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[str]


# -- the application --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Found:
    """What came of all rounds."""

    rounds: int = 0
    reads: int = 0
    failed_reads: int = 0
    writes: Counter[str] = dataclasses.field(default_factory=Counter)
    lost: int = 0
    phantom: int = 0
    pauses: list[float] = dataclasses.field(default_factory=list)
    """Of each round, for how long no write was acknowledged."""
    errors: Counter[str] = dataclasses.field(default_factory=Counter)

    def __str__(self) -> str:
        told = ", ".join(f"{what} {count}" for what, count in self.writes.most_common())
        return (
            f"{self.rounds} failovers: {self.reads} reads, {self.failed_reads} failed; writes: {told}; "
            f"{self.lost} acknowledged and lost, {self.phantom} failed and there; "
            f"no write for {min(self.pauses):.1f} to {max(self.pauses):.1f} s"
        )


class Load:
    """Threads that write a row in a transaction and count the rows outside of one."""

    def __init__(self, driver: str, host: str, port: int, patience: str, threads: int) -> None:
        self.db = DB(model_class=Base, disable_autonaming=True)
        self.app = Flask("failover")
        self.app.config.update(
            SQLALCHEMY_DATABASE_URI=f"postgresql+{driver}://postgres@{host}:{port}/postgres",
            SQLALCHEMY_ENGINE_OPTIONS={"pool_size": threads, "connect_args": {"connect_timeout": 3}},
            FICTIVE_PATIENCE=patience,
        )
        self.db.init_app(self.app)
        with self.app.app_context():
            self.engine = self.db.engine
        self.told: dict[str, str] = {}
        self.acknowledged: list[float] = []
        self.reads = 0
        self.failed_reads: list[str] = []
        self.errors: Counter[str] = Counter()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self.engine.dispose()

    def wait(self, writes: int = 200) -> None:
        """Until so many more writes were acknowledged."""
        expected = len(self.acknowledged) + writes
        until(lambda: len(self.acknowledged) >= expected, "acknowledged writes")

    def _work(self, number: int) -> None:
        turn = 0
        while not self._ended.is_set():
            turn += 1
            with self.app.app_context():
                self._one(f"{id(self)}-{number}-{turn}")

    def _one(self, token: str) -> None:
        session = self.db.session
        try:
            with session.begin():
                session.add(Entry(token=token))
        except CommitOutcomeUnknown:
            self.told[token] = "unknown"
        except sa.exc.SQLAlchemyError as error:
            self.told[token] = "failed"
            self.errors[f"write: {_shown(error)}"] += 1
            session.expunge_all()
        else:
            self.told[token] = "committed"
            self.acknowledged.append(time.monotonic())
        try:
            session.scalar(sa.select(sa.func.max(Entry.id)))
            self.reads += 1
        except sa.exc.SQLAlchemyError as error:
            self.failed_reads.append(repr(error))
            self.errors[f"read: {_shown(error)}"] += 1

    def audit(self, there: set[str], found: Found) -> None:
        found.rounds += 1
        found.reads += self.reads
        found.failed_reads += len(self.failed_reads)
        found.writes.update(self.told.values())
        found.lost += sum(what == "committed" and token not in there for token, what in self.told.items())
        found.phantom += sum(what == "failed" and token in there for token, what in self.told.items())
        times = sorted(self.acknowledged)
        found.pauses.append(max(later - sooner for sooner, later in itertools.pairwise(times)))
        found.errors.update(self.errors)


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:150]


def until(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(psycopg.Error, OSError, urllib.error.URLError, LookupError):
            if found := condition():
                return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited in vain for {what}")
        time.sleep(0.05)


def ask(port: int, query: str) -> list[Any]:
    with psycopg.connect(f"postgresql://postgres@127.0.0.1:{port}/postgres?connect_timeout=3", autocommit=True) as one:
        cursor = one.execute(query.encode())
        return cursor.fetchall() if cursor.description else []


def tokens(port: int) -> set[str]:
    return {token for (token,) in ask(port, "select token from entry")}


# -- programs ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def program(*command: str, log: Path, account: pwd.struct_passwd | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process, ended with the block."""
    options: dict[str, Any] = {}
    if account is not None:
        options = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    executable = shutil.which(command[0], path=os.environ.get("PATH", os.defpath) + ":/usr/sbin")
    if executable is None:
        raise SystemExit(f"{command[0]} is not installed; see the head of {__file__}")
    with log.open("ab") as output:
        process = subprocess.Popen([executable, *command[1:]], stdout=output, stderr=output, cwd="/", **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def replaced(text: str, changes: dict[str, str]) -> str:
    """A configuration of the documentation's, for this machine."""
    for old, new in changes.items():
        if old not in text:
            raise LookupError(f"{old} is not in the configuration")
        text = text.replace(old, new)
    return text


@contextlib.contextmanager
def haproxy(directory: Path, nodes: list[tuple[int, int]]) -> Iterator[int]:
    """HAProxy before nodes of a PostgreSQL's port and a health check's; the port on which it leads to the primary."""
    port, replicas = postgres._free_port(), postgres._free_port()
    text = (HERE / "haproxy.cfg").read_text(encoding="utf-8")
    changes = {"0.0.0.0:5000": f"127.0.0.1:{port}", "0.0.0.0:5001": f"127.0.0.1:{replicas}"}
    for number, (own, check) in enumerate(nodes, 1):
        changes[f"db{number}.example.com:5432 check port 8008"] = f"127.0.0.1:{own} check port {check}"
    file = directory / "haproxy.cfg"
    file.write_text(replaced(text, changes), encoding="utf-8")
    with program("haproxy", "-db", "-f", str(file), log=directory / "haproxy.log"):
        # until its first checks have failed it takes every node for the primary
        is_primary = "select not pg_is_in_recovery()"
        until(lambda: all(ask(port, is_primary) == [(True,)] for _ in range(6)), "HAProxy")
        yield port


# -- by hand ----------------------------------------------------------------------------------------------------------


class Health:
    """Answers as Patroni's REST interface does whether a server is the primary."""

    def __init__(self, server: postgres.Server) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                try:
                    ((recovering,),) = ask(server.port, "select pg_is_in_recovery()")
                    fits = recovering is (self.path != "/primary")
                except psycopg.Error:
                    fits = False
                self.send_response(200 if fits else 503)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.1,))
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def by_hand(options: argparse.Namespace, directory: Path, found: Found) -> None:
    """Each round a new pair: the primary is stopped without a word, and its synchronous standby promoted."""
    for _ in range(options.rounds):
        with contextlib.ExitStack() as stack:
            primary = stack.enter_context(postgres.private_server(**postgres.PRIMARY))
            standby = stack.enter_context(postgres.standby_server(primary))
            ask(primary.port, "alter system set synchronous_standby_names = 'standby'")
            ask(primary.port, "select pg_reload_conf()")
            ports = []
            for server in (primary, standby):
                health = Health(server)
                stack.callback(health.close)
                ports.append((server.port, health.port))
            port = stack.enter_context(haproxy(directory, ports))
            ask(port, TABLE)
            with Load(options.driver, "127.0.0.1", port, options.patience, options.threads) as load:
                load.wait()
                primary.stop("immediate")
                ask(standby.port, "select pg_promote()")
                ask(standby.port, "alter system reset synchronous_standby_names")
                ask(standby.port, "select pg_reload_conf()")
                load.wait()
            load.audit(tokens(standby.port), found)
            print(found, flush=True)


# -- Patroni ----------------------------------------------------------------------------------------------------------


class Node:
    """One Patroni and its PostgreSQL."""

    def __init__(self, number: int, directory: Path, programs: Path, etcd: int, account: Any) -> None:
        self.name = f"db{number}"
        self.port, self.rest = postgres._free_port(), postgres._free_port()
        self.home = directory / self.name
        self.home.mkdir()
        self.account = account
        if account is not None:
            os.chown(self.home, account.pw_uid, account.pw_gid)
        self.log = directory / f"{self.name}.log"
        text = (HERE / "patroni.yml").read_text(encoding="utf-8")
        changes = {
            "name: db1": f"name: {self.name}",
            "listen: 0.0.0.0:8008": f"listen: 127.0.0.1:{self.rest}",
            "db1.example.com:8008": f"127.0.0.1:{self.rest}",
            "etcd.example.com:2379": f"127.0.0.1:{etcd}",
            "listen: 0.0.0.0:5432": f"listen: 127.0.0.1:{self.port}",
            "db1.example.com:5432": f"127.0.0.1:{self.port}",
            "/var/lib/postgresql/data": str(self.home / "data"),
            "/var/lib/postgresql/pgpass": str(self.home / "pgpass"),
            "/usr/lib/postgresql/bin": str(programs),
        }
        text = replaced(text, changes) + f"  parameters: {{unix_socket_directories: {self.home}}}\n"
        self.file = directory / f"{self.name}.yml"
        self.file.write_text(text, encoding="utf-8")
        self._running = contextlib.ExitStack()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = self._running.enter_context(
            program("patroni", str(self.file), log=self.log, account=self.account)
        )

    def kill(self) -> None:
        """As the machine's loss would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        lines = (self.home / "data" / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        # not one by one: each of the postmaster's children would be waited for by it
        for child in _children(int(lines[0])):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        os.kill(int(lines[0]), signal.SIGKILL)
        self._running.close()

    def close(self) -> None:
        self._running.close()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.rest}{path}", timeout=5) as answer:
            return json.load(answer)


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def members(nodes: list[Node]) -> dict[str, str]:
    """The role of each member that runs, by its name."""
    for node in nodes:
        with contextlib.suppress(OSError, urllib.error.URLError):
            return {
                each["name"]: each["role"]
                for each in node.get("/cluster")["members"]
                if each["state"] in ("running", "streaming")
            }
    return {}


def leads(node: Node) -> bool:
    return members([node]).get(node.name) == "leader"


def by_patroni(options: argparse.Namespace, directory: Path, found: Found) -> None:
    """One pair for all rounds: in turn the primary is killed with its Patroni, and a switchover is asked for."""
    account = places.server_account()
    etcd, peer = postgres._free_port(), postgres._free_port()
    with contextlib.ExitStack() as stack:
        # where the wheel's programs are out of the account's reach, this server has copied them
        programs = stack.enter_context(postgres.private_server()).bin_directory
        assert programs is not None
        stack.enter_context(
            program(
                "etcd", "--name", "one", "--data-dir", str(directory / "etcd"),
                "--listen-client-urls", f"http://127.0.0.1:{etcd}",
                "--advertise-client-urls", f"http://127.0.0.1:{etcd}",
                "--listen-peer-urls", f"http://127.0.0.1:{peer}",
                "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
                "--initial-cluster", f"one=http://127.0.0.1:{peer}",
                log=directory / "etcd.log",
            )
        )  # fmt: skip
        nodes = [Node(number, directory, programs, etcd, account) for number in (1, 2)]
        for node in nodes:
            stack.callback(node.close)
            node.start()
        until(lambda: "leader" in members(nodes).values(), "a leader")
        port = stack.enter_context(haproxy(directory, [(node.port, node.rest) for node in nodes]))
        ask(port, TABLE)
        for number in range(options.rounds):
            until(lambda: sorted(members(nodes).values()) == ["leader", "sync_standby"], "a synchronous standby")
            (leader,) = (node for node in nodes if leads(node))
            (other,) = (node for node in nodes if node is not leader)
            with Load(options.driver, "127.0.0.1", port, options.patience, options.threads) as load:
                load.wait()
                if number % 2:
                    switch(leader, other)
                else:
                    leader.kill()
                until(functools.partial(leads, other), "the new leader")
                load.wait()
            load.audit(tokens(other.port), found)
            kind = "switchover" if number % 2 else "kill -9"
            print(f"{kind}: no write for {found.pauses[-1]:.1f} s\n{found}", flush=True)
            if not number % 2:
                leader.start()


def switch(leader: Node, other: Node) -> None:
    body = json.dumps({"leader": leader.name, "candidate": other.name}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{leader.rest}/switchover", body, {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=120).close()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.failover", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--patroni", action="store_true")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=20)
    parser.add_argument("--patience", help="FICTIVE_PATIENCE; default: 10s, and with --patroni 60s")
    parser.add_argument("--driver", default="psycopg", choices=["psycopg2", "psycopg"])
    options = parser.parse_args()
    options.patience = options.patience or ("60s" if options.patroni else "10s")
    found = Found()
    parent = places.parent_directory(places.server_account())
    with tempfile.TemporaryDirectory(prefix="fictive-failover-", dir=parent) as name:
        directory = Path(name)
        directory.chmod(0o755)
        try:
            (by_patroni if options.patroni else by_hand)(options, directory, found)
        except BaseException:
            for log in sorted(directory.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
            raise
        finally:
            for what, count in found.errors.most_common(20):
                print(f"  {count:6} {what}")
    return 1 if found.lost or found.phantom or found.failed_reads else 0


if __name__ == "__main__":
    raise SystemExit(main())

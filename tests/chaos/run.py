"""One run: a server of its own, threads that work, faults, and the audit."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import random
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from typing import Any

import psycopg
import sqlalchemy as sa
from flask import Flask

from fictive.testing import postgres
from fictive.testing.wire import Wire

from . import models, work_django, work_fictive, work_plain
from .faults import KINDS, Faults, Interrupt
from .ledger import Ledger

PEERS: dict[str, Any] = {"fictive": work_fictive, "plain": work_plain, "django": work_django}
POOL = {"pool_size": 6, "max_overflow": 4, "pool_timeout": 2}


@dataclasses.dataclass
class Report:
    """What came of a run."""

    peer: str
    driver: str
    operations: Counter[str]
    by_kind: Counter[str]
    faults: Counter[str]
    faulty: Counter[str]
    """What must never be; empty when every promise was kept."""
    examples: dict[str, str]
    notes: Counter[str]
    errors: Counter[str]

    def __str__(self) -> str:
        lines = [
            f"{self.peer}, {self.driver}: {sum(self.operations.values())} operations"
            f" ({_listed(self.operations)}), {sum(self.faults.values())} faults ({_listed(self.faults)})",
            f"  of unknown outcome: {_listed(self.notes) or 'none'}",
            f"  broken promises: {_listed(self.faulty) or 'none'}",
            *(f"    {what}: {example}" for what, example in self.examples.items()),
        ]
        return "\n".join(lines)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{what} {count}" for what, count in counts.most_common())


def run(
    peer: str = "fictive",
    driver: str = "psycopg",
    *,
    seconds: float = 10,
    threads: int = 20,
    rate: float = 8,
    seed: int | None = None,
    kinds: list[str] | None = None,
    forks: bool = True,
    config: dict[str, Any] | None = None,
    only: list[str] | None = None,
    without: list[str] | None = None,
) -> Report:
    """Work for `seconds` with about `rate` faults a second, then compare."""
    seed = random.randrange(10**6) if seed is None else seed
    with postgres.private_server(deadlock_timeout="200ms") as server:
        _sql(server, "postgres", "create database ledger")
        _sql(server, "ledger", "create role ledger_other; grant all on schema public to ledger_other")
        with Wire(server.host, server.port) as wire:
            url = wire.url(server.url("ledger", driver=driver))
            return _Run(PEERS[peer], server, wire, url, peer, driver, config or {}).go(
                seconds, threads, rate, seed, KINDS if kinds is None else kinds, forks, only, without or []
            )


class _Run:
    def __init__(
        self,
        module: Any,
        server: postgres.Server,
        wire: Wire,
        url: str,
        peer: str,
        driver: str,
        config: dict[str, Any],
    ) -> None:
        self.server = server
        self.wire = wire
        self.peer = peer
        self.driver = driver
        self.made = module.make()
        self.app = Flask("ledger")
        connect = {"connect_timeout": 5}
        self.app.config.update(
            SQLALCHEMY_DATABASE_URI=url, SQLALCHEMY_ENGINE_OPTIONS={**POOL, "connect_args": connect}, **config
        )
        self.made.db.init_app(self.app)
        self.ledger = Ledger(module.is_unknown)
        self.work = module.Work(self.app, self.made, self.ledger)
        self.ending = threading.Event()

    def go(
        self,
        seconds: float,
        threads: int,
        rate: float,
        seed: int,
        kinds: list[str],
        forks: bool,
        only: list[str] | None,
        without: list[str],
    ) -> Report:
        with self.app.app_context():
            models.fill(self.made.db.engine, self.made)
        before = set(threading.enumerate())
        operations = self.work.operations(forks)
        operations = [
            each for each in operations if each.__name__ not in without and each.__name__ in (only or [each.__name__])
        ]
        workers = [
            threading.Thread(
                target=self._worker, args=(operations, seed + number), name=f"chaos-{number}", daemon=True
            )
            for number in range(threads)
        ]
        faults = Faults(self.server, self.wire, workers, seed, rate, kinds)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # forks of a process with threads; what a failed block loses
            switching = sys.getswitchinterval()
            sys.setswitchinterval(0.0005)
            try:
                for worker in workers:
                    worker.start()
                faults.start()
                self.ending.wait(seconds)
            finally:
                faults.stop()
                self.ending.set()
                deadline = time.monotonic() + 20
                for worker in workers:
                    worker.join(max(0.0, deadline - time.monotonic()))
                sys.setswitchinterval(switching)
        for worker in workers:
            if worker.is_alive():
                self.ledger.saw("a worker that hangs", _where(worker))
        # in whatever the server has half finished
        self.ledger.audit(lambda query: _sql(self.server, "ledger", query))
        self._audit_pool()
        with self.app.app_context():
            self.made.db.engine.dispose()
        left = [thread for thread in threading.enumerate() if thread not in before and "wire" not in thread.name]
        for thread in left:
            thread.join(5)
            if thread.is_alive() and thread not in workers:
                self.ledger.saw("a thread left", thread)
        return Report(
            self.peer,
            self.driver,
            self.ledger.outcomes,
            Counter(f"{op.kind} {op.outcome.value}" for op in self.ledger.operations),
            faults.done + Counter({"fork": self.work.forks}),
            self.ledger.seen,
            self.ledger.examples,
            self.ledger.reads,
            self.ledger.errors,
        )

    def _worker(self, operations: list[Any], seed: int) -> None:
        rng = random.Random(seed)
        while not self.ending.is_set():
            # an interrupt may strike anywhere, here too
            with contextlib.suppress(KeyboardInterrupt, Interrupt):
                while not self.ending.is_set():
                    # a context of its own, so that an interrupt in Flask's teardown reaches no other operation
                    contextvars.Context().run(self._one, rng.choice(operations), rng)

    def _one(self, operation: Any, rng: random.Random) -> None:
        try:
            with self.app.app_context():
                operation(rng)
        except Exception as error:  # those of the operation are in the ledger
            self.ledger.saw("an error at the end of a context", repr(error))

    def _audit_pool(self) -> None:
        """The pool has as many connections as ever, and each is as a new one."""
        with self.app.app_context():
            engine = self.made.db.engine
            if isinstance(engine.pool, sa.NullPool):  # of a peer whose connections are not SQLAlchemy's
                return
            if engine.pool.checkedout():
                self.ledger.saw("connections not in the pool", engine.pool.status())
            with contextlib.ExitStack() as stack:
                for number in range(POOL["pool_size"] + POOL["max_overflow"]):
                    try:
                        connection = stack.enter_context(engine.connect())
                        row = connection.execute(sa.text(STATE)).one()
                    except sa.exc.SQLAlchemyError as error:
                        self.ledger.saw("a pool that shrank", f"{number} connections; {error!r}")
                        break
                    if tuple(row) != (True, 0, 0, "read committed", "off"):
                        self.ledger.saw("left on a pooled connection", tuple(row))
        deadline = time.monotonic() + 10
        while found := _sql(self.server, "ledger", LEFT):
            if time.monotonic() > deadline:
                self.ledger.saw("left on the server", found)
                break
            time.sleep(0.05)


STATE = """
select current_user = session_user,
 (select count(*) from pg_settings where source = 'session'
  and name not in ('client_encoding', 'standard_conforming_strings')),
 (select count(*) from pg_locks where pid = pg_backend_pid() and locktype = 'advisory'),
 current_setting('transaction_isolation'), current_setting('transaction_read_only')
"""
LEFT = """
select pid, state, query from pg_stat_activity where datname = 'ledger' and pid <> pg_backend_pid()
 and backend_type = 'client backend' and state like 'idle in transaction%'
union all
select pid, mode, locktype from pg_locks where locktype = 'advisory'
"""


def _where(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame, limit=12)) if frame else thread.name


def _sql(server: postgres.Server, database: str, query: str) -> list[Any]:
    with psycopg.connect(server.url(database), autocommit=True, application_name="audit") as connection:
        cursor = connection.execute(query.encode())
        return cursor.fetchall() if cursor.description else []

"""The operations, as an application on fictive writes them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from flask import Flask

from fictive.errors import (
    CommitOutcomeUnknown,
    LockTimeout,
    TransactionAborted,
    TransactionEnded,
)
from fictive.flask_sqlalchemy import BulkMixin, FilterByOrCreateMixin, OptInTransactionMixin

from . import models
from .ledger import Ledger, Operation


def make() -> Any:
    """The models on an opt-in database object."""
    from flask_sqlalchemy import SQLAlchemy

    class DB(OptInTransactionMixin, FilterByOrCreateMixin, BulkMixin, SQLAlchemy):
        pass

    return models.define(DB)


def is_unknown(op: Operation, error: Exception) -> bool:
    """Whether the application was told that it cannot know."""
    if isinstance(error, CommitOutcomeUnknown):
        return True
    # a statement that commits by itself, and whose connection was lost under it
    return op.kind in ("bare", "upsert", "update_or_create", "get_or_create", "loose") and (
        isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated
    )


class Work:
    """Each method but those that begin with an underscore is one operation."""

    def __init__(self, app: Flask, made: Any, ledger: Ledger) -> None:
        self.app = app
        self.m = made
        self.ledger = ledger
        self.forks = 0

    def operations(self, forks: bool) -> list[Callable[[random.Random], None]]:
        names = [name for name in vars(Work) if not name.startswith("_") and name not in ("operations", "fork")]
        weights = {"transfer": 4, "claim": 3, "count": 2}
        found = [getattr(self, name) for name in names for _ in range(weights.get(name, 1))]
        return [*found, self.fork] if forks else found

    def _hooks(self, op: Operation) -> None:
        def committed() -> None:
            op.committed_hooks += 1

        def rolled_back() -> None:
            op.rolled_back_hooks += 1

        op.has_hooks = True
        self.m.db.on_commit(committed)
        self.m.db.on_rollback(rolled_back)

    def _add(self, op: Operation, **values: Any) -> None:
        self.m.db.session.execute(sa.insert(self.m.Entry).values(**op.part(), **values))

    # -- transactions ----------------------------------------------------------------------------------------------

    def transfer(self, rng: random.Random) -> None:
        """Two accounts, locked in order, objects changed and flushed by the end of the block."""
        session, Account, Entry = self.m.db.session, self.m.Account, self.m.Entry
        one, other = sorted(rng.sample(range(1, models.ACCOUNTS + 1), 2))
        amount = rng.randint(-50, 50)
        with self.ledger.operation("transfer") as op, session.begin():
            self._hooks(op)
            rows = session.scalars(
                sa.select(Account).where(Account.id.in_([one, other])).order_by(Account.id).with_for_update()
            ).all()
            rows[0].balance -= amount
            rows[1].balance += amount
            session.add_all(
                [Entry(**op.part(), about=one, amount=-amount), Entry(**op.part(), about=other, amount=amount)]
            )

    def transfer_retried(self, rng: random.Random) -> None:
        """Locked in any order, so that some deadlock and are tried again."""
        db, Account = self.m.db, self.m.Account
        ids = rng.sample(range(1, models.ACCOUNTS + 1), 2)
        amount = rng.randint(1, 50)
        with self.ledger.operation("transfer retried") as op:

            @db.transaction(retries=3)
            def run() -> None:
                op.parts = op.rolled_back_hooks = 0  # of the try before
                self._hooks(op)
                for id, change in zip(ids, (-amount, amount), strict=True):
                    account = db.session.get(Account, id, with_for_update=True)
                    account.balance += change
                    self._add(op, about=id, amount=change)

            run()

    def transfer_statements(self, rng: random.Random) -> None:
        """UPDATE by expression, in a decorated block with timeouts."""
        db, Account = self.m.db, self.m.Account
        one, other = sorted(rng.sample(range(1, models.ACCOUNTS + 1), 2))
        with self.ledger.operation("transfer statements") as op:
            with db.transaction(lock_timeout="3s", statement_timeout="5s"):
                self._hooks(op)
                for id, change in ((one, -1), (other, 1)):
                    db.session.execute(
                        sa.update(Account).where(Account.id == id).values(balance=Account.balance + change)
                    )
                    self._add(op, about=id, amount=change)

    def claim(self, rng: random.Random) -> None:
        """A job read before, that others may have had meanwhile."""
        session, Job = self.m.db.session, self.m.Job
        with self.ledger.operation("claim") as op:
            held = session.scalars(sa.select(Job)).all()
            with session.begin():
                self._hooks(op)
                for job in session.scalars(self.m.db.claim(sa.select(Job).order_by(sa.func.random()), limit=1)):
                    job.tries += 1
                    self._add(op, about=job.id)
            del held

    def count(self, rng: random.Random) -> None:
        """A counter under an advisory lock of the transaction."""
        session, Counter = self.m.db.session, self.m.Counter
        with self.ledger.operation("count") as op, session.begin():
            self._hooks(op)
            with self.m.db.advisory_lock("counter"):
                counter = session.get(Counter, 1, populate_existing=True)
                counter.value += 1
                self._add(op, about=1)

    def savepoint(self, rng: random.Random) -> None:
        """A savepoint that fails is left behind; the rest is committed."""
        session = self.m.db.session
        with self.ledger.operation("savepoint") as op, session.begin():
            self._hooks(op)
            self._add(op)
            try:
                with session.begin_nested():
                    session.execute(sa.insert(self.m.Entry).values(token=op.token, kind="undone"))
                    session.execute(sa.text("select 1/0"))
            except sa.exc.DataError:
                pass
            self._add(op)

    def caught(self, rng: random.Random) -> None:
        """A block that catches the error of a statement must not end as committed."""
        session = self.m.db.session
        with self.ledger.operation("caught") as op:
            try:
                with session.begin():
                    self._hooks(op)
                    self._add(op)
                    with contextlib.suppress(sa.exc.SQLAlchemyError):
                        session.execute(sa.text("select 1/0"))
                    with contextlib.suppress(sa.exc.SQLAlchemyError):
                        self._add(op)
            except TransactionAborted:
                raise
            self.ledger.saw("false commit", op)

    def caught_any(self, rng: random.Random) -> None:
        """A block that catches whatever its statements raise: a lost connection, a pool that is used up."""
        session = self.m.db.session
        failed = False
        with self.ledger.operation("caught any") as op:
            with session.begin():
                self._hooks(op)
                for _ in range(3):
                    try:
                        self._add(op)
                    except sa.exc.SQLAlchemyError:
                        failed = True
            if failed:
                self.ledger.saw("false commit", op)

    def ended(self, rng: random.Random) -> None:
        """A block whose transaction its own SQL ended must not end as committed."""
        session = self.m.db.session
        text = rng.choice(["rollback", "commit", "/* x */ ROLLBACK"])
        with self.ledger.operation("ended") as op:
            op.commits_by_itself = text == "commit"
            with session.begin():
                self._add(op)
                session.execute(sa.text(text))
                self._add(op)
            self.ledger.saw("false commit", op)

    # -- in autocommit ---------------------------------------------------------------------------------------------

    def bare(self, rng: random.Random) -> None:
        with self.ledger.operation("bare") as op:
            self._add(op)

    def flush(self, rng: random.Random) -> None:
        session, Entry = self.m.db.session, self.m.Entry
        with self.ledger.operation("flush") as op:
            session.add_all([Entry(**op.part()), Entry(**op.part())])
            session.commit()

    def insert_many(self, rng: random.Random) -> None:
        with self.ledger.operation("insert many") as op:
            self.m.Entry.insert_many([op.part() for _ in range(20)])

    def update_or_create(self, rng: random.Random) -> None:
        with self.ledger.operation("update_or_create") as op:
            self.m.Key.update_or_create({"token": op.token}, name=f"key {rng.randrange(models.KEYS)}")

    def upsert(self, rng: random.Random) -> None:
        with self.ledger.operation("upsert") as op:
            name = f"s{rng.randrange(10)}"
            self.m.Setting.upsert_many([{"name": name, "token": op.token}], key=["name"])

    def get_or_create(self, rng: random.Random) -> None:
        name = f"key {time.monotonic():.1f} {rng.randrange(3)}"
        with self.ledger.operation("get_or_create") as op:
            _, created = self.m.Key.get_or_create(name=name)
            op.created = name if created else None

    def loose(self, rng: random.Random) -> None:
        name = f"loose {time.monotonic():.1f} {rng.randrange(3)}"
        with self.ledger.operation("loose") as op:
            _, created = self.m.Loose.get_or_create(name=name)
            op.created = name if created else None

    def lock_outside(self, rng: random.Random) -> None:
        key = f"lock {rng.randrange(3)}"
        with self.ledger.operation("lock outside"):
            try:
                with self.m.db.advisory_lock(key, timeout="1s"):
                    since = time.monotonic()
                    self.m.db.session.scalar(sa.text("select 1"))
                    until = time.monotonic()
            except LockTimeout:
                return
            self.ledger.held(key, since, until)

    def total(self, rng: random.Random) -> None:
        """What everybody may see at any time."""
        with self.ledger.operation("total"):
            found = self.m.db.session.scalar(sa.select(sa.func.sum(self.m.Account.balance)))
            if found != models.ACCOUNTS * models.BALANCE:
                self.ledger.saw("a sum in between", found)

    def stream(self, rng: random.Random) -> None:
        with self.ledger.operation("stream"):
            found = 0
            for row in self.m.db.session.execute(sa.select(self.m.Account.balance).execution_options(yield_per=5)):
                found += row.balance
            if found != models.ACCOUNTS * models.BALANCE:
                self.ledger.saw("a sum in between", found)

    # -- what one leaves, and another finds --------------------------------------------------------------------------

    def leave_settings(self, rng: random.Random) -> None:
        """SQL that changes the connection, in a block."""
        session = self.m.db.session
        text = rng.choice(
            [
                "set statement_timeout = '77s'",
                "set role ledger_other",
                "select set_config('search_path', 'nowhere', false)",
                "select pg_try_advisory_lock(4711)",
                "create temporary table if not exists left_behind (i int)",
            ]
        )
        with self.ledger.operation("leave settings"), session.begin():
            session.execute(sa.text(text), execution_options={"fictive_outside": True})

    def pinned(self, rng: random.Random) -> None:
        with self.ledger.operation("pinned"), self.m.db.pinned() as session:
            session.execute(sa.text("set role ledger_other"))
            session.scalar(sa.text("select 1"))

    def probe(self, rng: random.Random) -> None:
        """What the next user of a connection finds."""
        with self.ledger.operation("probe"):
            row = self.m.db.session.execute(
                sa.text(
                    "select current_user, session_user, current_setting('statement_timeout'),"
                    " current_setting('search_path'), to_regclass('pg_temp.left_behind') is not null,"
                    " exists (select from pg_locks where pid = pg_backend_pid() and locktype = 'advisory'),"
                    " current_setting('transaction_read_only')"
                )
            ).one()
            if row[0] != row[1] or tuple(row[2:]) != ("0", '"$user", public', False, False, "off"):
                self.ledger.saw("left on a connection", tuple(row))

    def fork(self, rng: random.Random) -> None:
        """A child in the middle of a block can neither go on with it nor end it."""
        session = self.m.db.session
        with self.ledger.operation("fork") as op:
            status = None
            with session.begin():
                self._hooks(op)
                self._add(op)
                child = os.fork()
                if child == 0:
                    self._in_child(op)
                status = _wait(child)
                self._add(op)
            self.forks += 1
            if status not in (0, None):
                self.ledger.saw("a child that went on", f"{op}: {status}")

    def _in_child(self, op: Operation) -> None:
        signal.alarm(10)
        status = 1
        try:
            try:
                self.m.db.session.execute(
                    sa.text("insert into entry (token, kind, amount) values ('child', 'child', 0)")
                )
            except (TransactionEnded, TransactionAborted, sa.exc.SQLAlchemyError):
                status = 0
        finally:
            os._exit(status)


def _wait(child: int) -> int | None:
    """Its exit status; None where it had to be ended: a fork of a process with threads may hang."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) if not os.WIFSIGNALED(status) else None
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None

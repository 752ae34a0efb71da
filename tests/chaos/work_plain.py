"""The same operations, as an application on Flask-SQLAlchemy alone writes them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import sqlalchemy as sa
from flask import Flask

from . import models
from .ledger import Ledger, Operation


class CommitFailed(Exception):
    """`commit()` raised for want of a connection, so that its caller cannot know."""


def make() -> Any:
    from flask_sqlalchemy import SQLAlchemy

    return models.define(SQLAlchemy)


def is_unknown(op: Operation, error: Exception) -> bool:
    return isinstance(error, CommitFailed)


class Work:
    """Each method but those that begin with an underscore is one operation."""

    def __init__(self, app: Flask, made: Any, ledger: Ledger) -> None:
        self.app = app
        self.m = made
        self.ledger = ledger
        self.forks = 0

    def operations(self, forks: bool) -> list[Callable[[random.Random], None]]:
        names = [name for name in vars(Work) if not name.startswith("_") and name != "operations"]
        return [getattr(self, name) for name in names]

    @contextmanager
    def _committed(self, op: Operation) -> Iterator[None]:
        """The usual try, commit, except, rollback, raise; hooks are what follows the commit."""
        session = self.m.db.session
        op.has_hooks = True
        try:
            yield
            try:
                session.commit()
            except sa.exc.DBAPIError as error:
                if error.connection_invalidated:
                    raise CommitFailed from error
                raise
        except BaseException:
            session.rollback()
            raise
        op.committed_hooks += 1

    def _add(self, op: Operation, **values: Any) -> None:
        self.m.db.session.execute(sa.insert(self.m.Entry).values(**op.part(), **values))

    def transfer(self, rng: random.Random) -> None:
        session, Account, Entry = self.m.db.session, self.m.Account, self.m.Entry
        one, other = sorted(rng.sample(range(1, models.ACCOUNTS + 1), 2))
        amount = rng.randint(-50, 50)
        with self.ledger.operation("transfer") as op, self._committed(op):
            rows = session.scalars(
                sa.select(Account).where(Account.id.in_([one, other])).order_by(Account.id).with_for_update()
            ).all()
            rows[0].balance -= amount
            rows[1].balance += amount
            session.add_all(
                [Entry(**op.part(), about=one, amount=-amount), Entry(**op.part(), about=other, amount=amount)]
            )

    def claim(self, rng: random.Random) -> None:
        session, Job = self.m.db.session, self.m.Job
        with self.ledger.operation("claim") as op:
            held = session.scalars(sa.select(Job)).all()
            with self._committed(op):
                query = sa.select(Job).order_by(sa.func.random()).limit(1).with_for_update(skip_locked=True)
                for job in session.scalars(query):
                    job.tries += 1
                    self._add(op, about=job.id)
            del held

    def count(self, rng: random.Random) -> None:
        session, Counter = self.m.db.session, self.m.Counter
        with self.ledger.operation("count") as op, self._committed(op):
            session.execute(sa.text("select pg_advisory_xact_lock(1)"))
            counter = session.get(Counter, 1, populate_existing=True)
            counter.value += 1
            self._add(op, about=1)

    def caught(self, rng: random.Random) -> None:
        session = self.m.db.session
        with self.ledger.operation("caught") as op:
            with self._committed(op):
                self._add(op)
                with suppress(sa.exc.SQLAlchemyError):
                    session.execute(sa.text("select 1/0"))
            self.ledger.saw("false commit", op)

    def caught_any(self, rng: random.Random) -> None:
        failed = False
        with self.ledger.operation("caught any") as op:
            with self._committed(op):
                for _ in range(3):
                    try:
                        self._add(op)
                    except sa.exc.SQLAlchemyError:
                        failed = True
            if failed:
                self.ledger.saw("false commit", op)

    def ended(self, rng: random.Random) -> None:
        session = self.m.db.session
        with self.ledger.operation("ended") as op:
            with self._committed(op):
                self._add(op)
                session.execute(sa.text(rng.choice(["rollback", "commit"])))
                self._add(op)
            self.ledger.saw("false commit", op)

    def flush(self, rng: random.Random) -> None:
        with self.ledger.operation("flush") as op, self._committed(op):
            self.m.db.session.add_all([self.m.Entry(**op.part()), self.m.Entry(**op.part())])

    def total(self, rng: random.Random) -> None:
        with self.ledger.operation("total"):
            found = self.m.db.session.scalar(sa.select(sa.func.sum(self.m.Account.balance)))
            if found != models.ACCOUNTS * models.BALANCE:
                self.ledger.saw("a sum in between", found)

    def leave_settings(self, rng: random.Random) -> None:
        text = rng.choice(
            ["set statement_timeout = '77s'", "set role ledger_other", "select pg_try_advisory_lock(4711)"]
        )
        with self.ledger.operation("leave settings") as op, self._committed(op):
            self.m.db.session.execute(sa.text(text))

    def probe(self, rng: random.Random) -> None:
        with self.ledger.operation("probe"):
            row = self.m.db.session.execute(
                sa.text(
                    "select current_user, session_user, current_setting('statement_timeout'),"
                    " exists (select from pg_locks where pid = pg_backend_pid() and locktype = 'advisory')"
                )
            ).one()
            if row[0] != row[1] or tuple(row[2:]) != ("0", False):
                self.ledger.saw("left on a connection", tuple(row))

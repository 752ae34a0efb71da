"""The same operations, as an application on Django's database layer writes them."""

from __future__ import annotations

import random
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import sqlalchemy as sa

from . import models, work_plain
from .ledger import Ledger, Operation


class Database:
    """Stands where the others have a Flask-SQLAlchemy object: Django's settings are the process's."""

    def __init__(self, metadata: sa.MetaData) -> None:
        self.metadata = metadata

    def init_app(self, app: Any) -> None:
        import django
        from django.conf import settings

        url = sa.make_url(app.config["SQLALCHEMY_DATABASE_URI"])
        self.engine = sa.create_engine(url, poolclass=sa.NullPool)  # for the audit
        default = {
            "ENGINE": "django.db.backends.postgresql",
            "HOST": url.host,
            "PORT": url.port,
            "USER": url.username,
            "NAME": url.database,
            "CONN_MAX_AGE": None,
            "CONN_HEALTH_CHECKS": True,
        }
        if settings.configured:
            raise RuntimeError("Django reads its settings once: one run for each process")
        settings.configure(DATABASES={"default": default}, USE_TZ=True)
        django.setup()
        app.teardown_appcontext(self._end_of_request)

    @staticmethod
    def _end_of_request(error: BaseException | None) -> None:
        from django.db import close_old_connections

        close_old_connections()


def make() -> types.SimpleNamespace:
    return types.SimpleNamespace(db=Database(work_plain.make().db.metadata), **_plain_models())


def _plain_models() -> dict[str, Any]:
    made = vars(work_plain.make()).copy()
    made.pop("db")
    return made


class CommitFailed(Exception):
    """COMMIT raised for want of a connection, so that its caller cannot know."""


def is_unknown(op: Operation, error: Exception) -> bool:
    return isinstance(error, CommitFailed)


class Work:
    """Each method but those that begin with an underscore is one operation."""

    def __init__(self, app: Any, made: Any, ledger: Ledger) -> None:
        self.ledger = ledger
        self.forks = 0

    def operations(self, forks: bool) -> list[Callable[[random.Random], None]]:
        names = [name for name in vars(Work) if not name.startswith("_") and name != "operations"]
        return [getattr(self, name) for name in names]

    @contextmanager
    def _atomic(self, op: Operation) -> Iterator[Any]:
        from django.db import OperationalError, connection, transaction

        def committed() -> None:
            op.committed_hooks += 1

        op.has_hooks = True
        ended = False
        connection.close_if_unusable_or_obsolete()
        try:
            with transaction.atomic(), connection.cursor() as cursor:
                transaction.on_commit(committed)
                yield cursor
                ended = True
        except OperationalError as error:
            if ended:
                raise CommitFailed from error
            raise

    def _add(self, cursor: Any, op: Operation, about: int | None = None, amount: int = 0) -> None:
        op.part()
        cursor.execute(
            "insert into entry (token, kind, about, amount) values (%s, %s, %s, %s)",
            [op.token, op.kind, about, amount],
        )

    def transfer(self, rng: random.Random) -> None:
        one, other = sorted(rng.sample(range(1, models.ACCOUNTS + 1), 2))
        amount = rng.randint(-50, 50)
        with self.ledger.operation("transfer") as op, self._atomic(op) as cursor:
            cursor.execute("select id from account where id in (%s, %s) order by id for update", [one, other])
            for id, change in ((one, -amount), (other, amount)):
                cursor.execute("update account set balance = balance + %s where id = %s", [change, id])
                self._add(cursor, op, id, change)

    def claim(self, rng: random.Random) -> None:
        with self.ledger.operation("claim") as op, self._atomic(op) as cursor:
            cursor.execute("select id, tries from job order by random() limit 1 for update skip locked")
            for id, tries in cursor.fetchall():
                cursor.execute("update job set tries = %s where id = %s", [tries + 1, id])
                self._add(cursor, op, id)

    def caught(self, rng: random.Random) -> None:
        from django.db import Error

        with self.ledger.operation("caught") as op:
            with self._atomic(op) as cursor:
                self._add(cursor, op)
                with suppress(Error):
                    cursor.execute("select 1/0")
            self.ledger.saw("false commit", op)

    def caught_any(self, rng: random.Random) -> None:
        from django.db import Error

        failed = False
        with self.ledger.operation("caught any") as op:
            with self._atomic(op) as cursor:
                for _ in range(3):
                    try:
                        self._add(cursor, op)
                    except Error:
                        failed = True
            if failed:
                self.ledger.saw("false commit", op)

    def ended(self, rng: random.Random) -> None:
        with self.ledger.operation("ended") as op:
            with self._atomic(op) as cursor:
                self._add(cursor, op)
                cursor.execute(rng.choice(["rollback", "commit"]))
                self._add(cursor, op)
            self.ledger.saw("false commit", op)

    def total(self, rng: random.Random) -> None:
        from django.db import connection

        with self.ledger.operation("total"), connection.cursor() as cursor:
            cursor.execute("select sum(balance) from account")
            found = cursor.fetchone()[0]
            if found != models.ACCOUNTS * models.BALANCE:
                self.ledger.saw("a sum in between", found)

    def leave_settings(self, rng: random.Random) -> None:
        text = rng.choice(
            ["set statement_timeout = '77s'", "set role ledger_other", "select pg_try_advisory_lock(4711)"]
        )
        with self.ledger.operation("leave settings") as op, self._atomic(op) as cursor:
            cursor.execute(text)

    def probe(self, rng: random.Random) -> None:
        from django.db import connection

        with self.ledger.operation("probe"), connection.cursor() as cursor:
            cursor.execute(
                "select current_user = session_user, current_setting('statement_timeout'),"
                " exists (select from pg_locks where pid = pg_backend_pid() and locktype = 'advisory')"
            )
            row = cursor.fetchone()
            if row != (True, "0", False):
                self.ledger.saw("left on a connection", row)

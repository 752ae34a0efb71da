"""Waiting until a query finds rows, or a table gets new ones."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..connection.engines import connection_in_autocommit
from ..errors import ConfigurationError, RowChangeTimeout, SnapshotIsFixed, UnsupportedDialect
from ..rows.attributes import mapper_of
from ..session.durations import Duration, timeout_in_ms
from ..session.given import session_of, write_on
from ..session.session import OptInSession
from .listener import State, Waiter, listen
from .notify_triggers import announces_inserts

__all__ = ["wait_for_rows"]

# A row that is looked at under FOR UPDATE SKIP LOCKED is free again at once, which is what is asked here.
_LOOKS = {"fictive_writes": False, "fictive_outside": True, "fictive_primary": True}
_FIXED = ("repeatable read", "serializable")


def wait_for_rows(
    session: object, rows: type[Any] | sa.Select[Any], *, interval: Duration = 5, timeout: Duration | None = None
) -> None:
    """Wait until a query finds rows, or until a model's table gets new ones.

    `rows` is a `select()` of a model: it is run, for one row, and again when a transaction that inserted rows into the
    model's table commits, and every `interval`; the call returns when a row is found. Nothing is missed, since the
    listener is there before the first look. With `claim(select(...))` rows that others work on do not count, so it is
    what workers of a queue wait with between two claims. Or `rows` is the model itself: the call returns when a
    transaction that inserts rows commits after it began to listen, and sends no query.

    What wakes it is the trigger of `notify_changes(Model, inserts=True)`. Without it a `select()` is run every
    `interval`, by default 5 seconds, and a model raises `ConfigurationError`. The listener's connection is one for
    each process and engine. `interval` also bounds how long rows are overlooked of which no INSERT tells: those that
    a worker's rollback or an UPDATE makes free.

    Durations are seconds, text such as `"100ms"`, or timedeltas. After `timeout` `RowChangeTimeout`, a `TimeoutError`,
    is raised. Price: one round trip for each look, with nothing in between. No connection is held between looks, but
    that of a transaction that is open, whose isolation level must be READ COMMITTED (`SnapshotIsFixed`).
    `UnsupportedDialect` on another database than PostgreSQL for a model.
    """
    session = session_of(session)
    seconds = timeout_in_ms(interval, "interval") / 1000
    deadline = math.inf if timeout is None else time.monotonic() + timeout_in_ms(timeout, "timeout") / 1000

    def sleep(waiter: Waiter, longest: float | None) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise RowChangeTimeout(f"wait_for_rows(): no new row within {timeout!r}.")
        most = left if longest is None else min(left, longest)
        waiter.woken.wait(None if most == math.inf else most)

    if isinstance(rows, sa.Select):
        poller = RowPoller(session, rows)
        with poller.waiter() as waiter:
            if poller.is_announced:
                waiter.answered.wait(max(0.0, min(seconds, deadline - time.monotonic())))
            while True:
                waiter.woken.clear()
                if poller.finds_rows():
                    return
                sleep(waiter, seconds)
    mapper = mapper_of(rows)
    engine = _engine(session, mapper)
    if engine.dialect.name != "postgresql":
        raise UnsupportedDialect(f"wait_for_rows() needs PostgreSQL; this session is on {engine.dialect.name}.")
    if not _is_announced(mapper):
        raise ConfigurationError(_NOT_TOLD.format(mapper.class_.__name__))
    with listen(engine, [_table(mapper)], inserts=True) as waiter:
        was_live = False
        while True:
            waiter.woken.clear()
            # after the connection was lost nobody knows what was missed
            if waiter.notified or (was_live and waiter.state is State.NEW):
                return
            if waiter.state is State.POLLING:
                raise ConfigurationError(_NOT_TOLD.format(mapper.class_.__name__))
            was_live = waiter.state is State.LIVE
            sleep(waiter, None)


_NOT_TOLD = (
    "wait_for_rows(): the database does not tell of new rows of {0}. Call notify_changes({0}, inserts=True) where the "
    "model is defined, and install its trigger by op.create_notify_changes(..., inserts=True) in a migration or by "
    "notify_changes({0}, db.session, inserts=True). Behind a pooler of transactions it needs FICTIVE_DIRECT_URL. Or "
    "give a select(), which is run again and again."
)


def _engine(session: sa_orm.Session, mapper: sa_orm.Mapper[Any]) -> sa.Engine:
    """The engine of the server that is written on: a replica takes no LISTEN."""
    bind = session.get_bind(mapper, clause=write_on(mapper.local_table))
    return bind.engine if isinstance(bind, sa.Connection) else bind


def _table(mapper: sa_orm.Mapper[Any]) -> sa.Table:
    """The table that each new row of the model goes into, and no row of a parent model."""
    assert isinstance(mapper.local_table, sa.Table)
    return mapper.local_table


def _is_announced(mapper: sa_orm.Mapper[Any]) -> bool:
    return isinstance(mapper.local_table, sa.Table) and announces_inserts(mapper.local_table)


class RowPoller:
    """A query that is run until it finds something."""

    def __init__(self, session: sa_orm.Session, statement: sa.Select[Any]) -> None:
        entity = statement.column_descriptions[0].get("entity")
        if entity is None:
            raise TypeError(f"wait_for_rows(): expected a select() of a model, not {statement}.")
        self._session = session
        self._mapper = mapper_of(entity)
        self._statement = statement.with_only_columns(sa.literal(1), maintain_column_froms=True).limit(1)
        self._first = True
        self._bind = _engine(session, self._mapper)
        self.is_announced = self._bind.dialect.name == "postgresql" and _is_announced(self._mapper)

    @contextlib.contextmanager
    def waiter(self) -> Iterator[Waiter]:
        """Told of new rows where the model's table has the trigger; else one that polls."""
        if not self.is_announced:
            yield Waiter(())
            return
        with listen(self._bind, [_table(self._mapper)], inserts=True) as waiter:
            yield waiter

    def finds_rows(self) -> bool:
        session = self._session
        if session.in_transaction() and self._first and self._bind.dialect.name == "postgresql":
            level = session.scalar(
                sa.select(sa.func.current_setting("transaction_isolation")), bind_arguments={"mapper": self._mapper}
            )
            if level in _FIXED:
                raise SnapshotIsFixed(
                    "wait_for_rows() in a transaction that goes on seeing the data as it was when it began. Call it "
                    "in autocommit, or in one of isolation level READ COMMITTED."
                )
        self._first = False
        bind = session.get_bind(self._mapper)
        if isinstance(session, OptInSession) or session.in_transaction() or isinstance(bind, sa.Connection):
            arguments = {"mapper": self._mapper, "clause": write_on(self._mapper.local_table)}
            return (
                session.execute(self._statement, bind_arguments=arguments, execution_options=_LOOKS).first()
                is not None
            )
        with connection_in_autocommit(bind) as connection:
            # a plain session would begin a transaction, and stay in it while it sleeps
            return connection.execute(self._statement).first() is not None

"""Running migrations: one deployment at a time, and none that stops the application while it waits for a lock."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from alembic import context

from ..drivers import sqlstate
from ..errors import ConfigurationError, LockTimeout
from ..locks.advisory import advisory_lock, lock_key
from ..session.durations import Duration, timeout_in_ms
from .blockers import holders_of, identity_of, who_holds_tables
from .files import keep_files
from .watching import Watch

__all__ = ["KEY", "run"]

KEY = "fictive.migrations"
"""The key of the advisory lock, as `fictive.sqlalchemy.advisory_lock` takes it."""

# Below "alembic", which env.py's fileConfig() leaves enabled and shows; another logger it would silence.
log = logging.getLogger("alembic.fictive")

_LOCK_NOT_AVAILABLE = "55P03"
_LONGEST_PAUSE = 60.0  # seconds
_POLL = 0.25  # seconds


def run(
    migrations: Callable[[], object],
    *engines: sa.Engine,
    wait: Duration = "10min",
    lock_timeout: Duration | None = "5s",
    tries: int = 5,
) -> None:
    """Call `migrations()`, which is `run_migrations_online` of `env.py`, with two guards on PostgreSQL.

    Only one process at a time gets to call it, by an advisory lock in each database of `engines`. Another one waits
    for up to `wait`, saying so, and then finds what is left to do: nothing as a rule. After that `LockTimeout` names
    who has it. The lock has a connection of its own, in no transaction, so each pool needs two; it is free when that
    ends, however it does. Waiting asks four times a second, rather than in one statement, whose snapshot a
    CREATE INDEX CONCURRENTLY of the other process would wait for in turn.

    A statement in a transaction that cannot have a lock within `lock_timeout` fails, so that the readers behind it
    are not kept waiting. The transaction is rolled back, and after a pause as long as `lock_timeout`, doubled each
    time and at most a minute, `migrations` is called again: `tries` times in all, then `LockTimeout` names who was in
    the way. It is called again only where the failed attempt left nothing but whole migrations, which it then finds
    done: else, as after an `autocommit_block()`, the database's error comes out at once. Statements in an
    `autocommit_block()` have no such timeout, because giving up CREATE INDEX CONCURRENTLY leaves an invalid index.
    Without a `lock_timeout` (None) there is one try.

    Durations are `"5s"`, seconds, or a timedelta. For commands that change nothing, such as `current` and `revision`,
    and with `--sql`, it just calls `migrations`; on engines of other databases too. Other errors pass through. Raises
    `ConfigurationError` for bad arguments, and `LockLost` when the lock was lost before the end. The engines must
    reach the server itself or a pooler of sessions: behind PgBouncer in transaction mode no lock can be kept.

    Price: two connections, three while saying who is in the way; 3 round trips and one for each transaction.
    (PostgreSQL documentation, "Advisory Locks", "Client Connection Defaults", "Building Indexes Concurrently".)
    """
    limit = timeout_in_ms(wait, "wait") / 1000
    milliseconds = None if lock_timeout is None else timeout_in_ms(lock_timeout, "lock_timeout")
    if isinstance(tries, bool) or not isinstance(tries, int) or tries < 1:
        raise ConfigurationError(f"tries = {tries!r}: expected a number of at least 1.")
    if not engines or not all(isinstance(engine, sa.Engine) for engine in engines):
        raise ConfigurationError(
            f"run(): expected the engines that are migrated, as in run(run_migrations_online, get_engine()), "
            f"not {engines!r}."
        )
    keep_files(context.script)
    postgresql = [engine for engine in engines if engine.dialect.name == "postgresql"]
    if not postgresql or context.is_offline_mode() or not _changes_something():
        migrations()
        return
    with contextlib.ExitStack() as locks:
        deadline = time.monotonic() + limit
        held: set[tuple[object, ...]] = set()
        for engine in postgresql:
            _lock(engine, locks, held, deadline, limit)
        if milliseconds is None:
            migrations()
        else:
            _try(migrations, postgresql, milliseconds, tries)


def _changes_something() -> bool:
    try:
        context.get_revision_argument()
    except KeyError:  # upgrade, downgrade and stamp have one
        return False
    return True


def _lock(
    engine: sa.Engine, locks: contextlib.ExitStack, held: set[tuple[object, ...]], deadline: float, limit: float
) -> None:
    """Take the lock, for as long as `locks` lasts, unless it is `held` already: two engines may have one database."""
    said = False
    while True:
        try:
            locks.enter_context(_locked(engine, held))
            return
        except LockTimeout:
            if identity_of(engine) in held:
                return
            who = "\n".join(holders_of(engine, lock_key(KEY))) or "Whoever it was is gone by now."
            if time.monotonic() >= deadline:
                raise LockTimeout(
                    f"Another process migrates {engine.url.database}, and was not done within {limit:g} s. {who}"
                ) from None
            if not said:
                said = True
                log.warning("Another process migrates %s. Waiting for up to %g s. %s", engine.url.database, limit, who)
        time.sleep(min(_POLL, max(0.0, deadline - time.monotonic())))


@contextlib.contextmanager
def _locked(engine: sa.Engine, held: set[tuple[object, ...]]) -> Iterator[None]:
    with sa_orm.Session(engine) as session, advisory_lock(session, KEY, nowait=True):
        held.add(identity_of(engine))
        yield


def _try(migrations: Callable[[], object], engines: list[sa.Engine], milliseconds: int, tries: int) -> None:
    pause = milliseconds / 1000
    for attempt in range(1, tries + 1):
        with Watch(engines, milliseconds) as watch:
            try:
                migrations()
                return
            except sa.exc.DBAPIError as error:
                if sqlstate(error) != _LOCK_NOT_AVAILABLE or not watch.whole:
                    raise
                failed = error
        who = _in_the_way(engines, failed.statement or "")
        if attempt == tries:
            raise LockTimeout(
                f"No lock within {milliseconds} ms for: {failed.statement}\nTried {tries} times; nothing of the "
                f"migration is left. {who}",
                failed,
            ) from failed
        pause = min(pause, _LONGEST_PAUSE)
        log.warning(
            "No lock within %d ms for: %s\nRolled back; attempt %d of %d in %g s. %s",
            milliseconds, failed.statement, attempt + 1, tries, pause, who,
        )  # fmt: skip
        time.sleep(pause)
        pause *= 2


def _in_the_way(engines: list[sa.Engine], statement: str) -> str:
    try:
        found = dict.fromkeys(line for engine in engines for line in who_holds_tables(engine, statement))
    except sa.exc.SQLAlchemyError as error:  # what is to be said is that the lock was not to be had
        return f"Who was in the way could not be found out: {error}"
    return "\n".join(found) or "Whoever was in the way is gone by now."

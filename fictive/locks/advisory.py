"""Locks on keys that mean something to the application only (PostgreSQL documentation, "Advisory Locks")."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import weakref
from collections.abc import Iterator
from typing import Any, TypeAlias, TypedDict

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..config import flag
from ..connection.engines import connection_in_autocommit
from ..connection.pooler import way_around
from ..errors import ConfigurationError, LockLost, LockTimeout
from ..report.watcher import WATCHER, Watcher
from ..session.blocks import transaction
from ..session.durations import Duration, timeout_in_ms
from ..session.given import require_postgresql, session_of, write_on
from .server import Quoting, ServerBlock, lock_timeouts, waiting_block
from .taken import TakenInside

__all__ = ["AdvisoryKey", "AdvisoryLockOptions", "LockKey", "advisory_lock", "lock_key"]

log = logging.getLogger("fictive.locks")

AdvisoryKey: TypeAlias = "int | tuple[int, int] | str"
"""A signed 64-bit integer, two signed 32-bit integers, or text."""


@dataclasses.dataclass(frozen=True)
class LockKey:
    """A key as PostgreSQL has it. One integer and two are spaces of their own and never meet."""

    numbers: tuple[int, ...]

    def in_pg_locks(self) -> str:
        """The condition on `pg_locks l` that finds it; one integer is kept there in two halves."""
        first, second = self.numbers if len(self.numbers) == 2 else (self.numbers[0] >> 32, self.numbers[0])
        return (
            f"l.locktype = 'advisory' AND l.classid = {first % 2**32}::oid AND l.objid = {second % 2**32}::oid"
            f" AND l.objsubid = {len(self.numbers)}"
        )


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """A lock as it was asked for."""

    key: LockKey
    given: AdvisoryKey
    shared: bool
    nowait: bool
    milliseconds: int | None

    def function(self, *, within: bool) -> str:
        """PostgreSQL's function, whose lock lasts as long as the transaction (`within`) or the connection."""
        return (
            f"pg{'_try' if self.nowait else ''}_advisory_{'xact_' if within else ''}lock"
            f"{'_shared' if self.shared else ''}"
        )

    def statement(self, *, within: bool) -> sa.Executable:
        if self.milliseconds is not None:
            return ServerBlock(lambda quoting: self._block(quoting, within=within))
        return sa.select(getattr(sa.func, self.function(within=within))(*_binds(self.key)))

    def _block(self, quoting: Quoting, *, within: bool) -> str:
        numbers = ", ".join(_cast(number, self.key) for number in self.key.numbers)
        return waiting_block(
            "",
            f"  PERFORM {self.function(within=within)}({numbers});\n",
            milliseconds=self.milliseconds,
            complaint=quoting.text(f"no lock on the key {self.given!r} within {self.milliseconds} ms"),
            in_the_way=self.key.in_pg_locks(),
        )


def _binds(key: LockKey) -> list[Any]:
    kind = sa.BigInteger if len(key.numbers) == 1 else sa.Integer
    return [sa.cast(sa.bindparam(None, number, kind), kind) for number in key.numbers]


def _cast(number: int, key: LockKey) -> str:
    return f"'{number}'::{'bigint' if len(key.numbers) == 1 else 'int'}"


# What a session holds outside, by its key: whether all of it is shared. Its own connection would wait for itself.
_held: weakref.WeakKeyDictionary[sa_orm.Session, dict[LockKey, bool]] = weakref.WeakKeyDictionary()


class AdvisoryLockOptions(TypedDict, total=False):
    """What `advisory_lock()` takes by keyword; its docstring has the meanings."""

    shared: bool
    nowait: bool
    timeout: Duration | None


def advisory_lock(
    session: sa_orm.Session | sa_orm.scoped_session[Any],
    key: AdvisoryKey,
    *,
    shared: bool = False,
    nowait: bool = False,
    timeout: Duration | None = None,
) -> contextlib.AbstractContextManager[sa_orm.Session]:
    """One holder at a time, for what no row or table stands for: `with advisory_lock(session, "nightly report"): ...`.

    In a transaction, the lock belongs to it: it is taken by the call itself and held until the transaction ends, which
    is later than the block; 1 round trip, which takes BEGIN along. Elsewhere it is held for the block by a connection
    of its own, so the pool needs one more; 2 round trips, and what the block runs stands alone or has transactions as
    ever. In a block of the same session on the same key nothing is sent. What is pending is not flushed before the
    lock is held.

    Behind a pooler of transactions (`FICTIVE_POOLER`), elsewhere means: on the direct URL, if there is one; or the
    block is a transaction of the session, as with `transaction()`, and ends with its COMMIT.

    Where writes leave a transaction open, under `writes_outside="begin"` and on a plain session, call `commit()` in a
    block that began in none, or the next holder does not see what was written. In a transaction, a `commit()` or
    `rollback()` in the block gives the lock back.

    `key` is a signed 64-bit integer, a pair of signed 32-bit integers, or text, of which a hash is taken (`lock_key`).
    All users of a database share the keys. `shared` lets other shared holders in. `timeout` is how long to wait,
    `"5s"`, seconds or a timedelta; without one forever, or as long as the server's own `lock_timeout`. With `nowait`
    nothing is waited for.

    Raises `LockTimeout` when the lock is not to be had; a transaction that was open goes on, but for one whose server
    has a `lock_timeout` of its own. Raises `LockLost` at the end of a block whose lock was lost with its connection,
    unless the block raises itself; a block's own exception comes out unchanged. Wrong arguments raise at the call. A
    call without `with` where no transaction is open locks nothing, and gives a `NotEnteredWarning`.
    """
    session = session_of(session)
    if flag(nowait, "nowait") and timeout is not None:
        raise ConfigurationError("advisory_lock(): nowait waits for nothing, so there is no timeout. Leave one out.")
    wanted = _Wanted(
        lock_key(key),
        key,
        flag(shared, "shared"),
        nowait,
        None if timeout is None else timeout_in_ms(timeout, "timeout"),
    )
    require_postgresql(session, "advisory_lock()")
    return _AdvisoryLock(session, wanted)


class _AdvisoryLock(TakenInside):
    """The lock of one call."""

    def __init__(self, session: sa_orm.Session, wanted: _Wanted) -> None:
        self._wanted = wanted
        super().__init__("advisory_lock(...)", session, {"clause": write_on()})

    def _has_it(self) -> bool:
        """Whether the session has the key by a block around this one, outside of any transaction."""
        wanted, held = self._wanted, _held.get(self._session, {})
        if wanted.key not in held:
            return False
        if held[wanted.key] and not wanted.shared:
            raise ConfigurationError(
                f"advisory_lock(): this session holds the key {wanted.given!r} shared already, and would wait for "
                "itself. Take it without shared in the block around this one."
            )
        return True

    def _take(self) -> None:
        if self._has_it():
            return
        with lock_timeouts("advisory_lock()"):
            statement = self._wanted.statement(within=True)
            _check_taken(self._session.execute(statement, bind_arguments=self._where), self._wanted)

    def _may_fail(self) -> bool:
        return self._wanted.milliseconds is not None and not self._has_it()

    @contextlib.contextmanager
    def _open(self) -> Iterator[sa_orm.Session]:
        session, wanted = self._session, self._wanted
        self._take_inside()
        if self._is_taken() or self._has_it():
            yield session
            return
        bind = session.get_bind(clause=write_on())
        engine = way_around(bind if isinstance(bind, sa.Engine) else bind.engine)
        if engine is None:
            with transaction(session):  # a pooler of transactions gives nothing longer
                with session.no_autoflush:
                    self._take()
                yield session
            return
        with _on_its_own_connection(engine, wanted, session.info.get(WATCHER)):
            held = _held.setdefault(session, {})
            held[wanted.key] = wanted.shared
            try:
                yield session
            finally:
                del held[wanted.key]


@contextlib.contextmanager
def _on_its_own_connection(engine: sa.Engine, wanted: _Wanted, watcher: Watcher | None) -> Iterator[None]:
    with connection_in_autocommit(engine, watcher) as connection:
        free = False  # whether it is certain that the connection holds no lock
        try:
            try:
                with lock_timeouts("advisory_lock()"):
                    _check_taken(connection.execute(wanted.statement(within=False)), wanted)
            except LockTimeout:
                free = True
                raise
            try:
                yield
            except BaseException:
                lost = _unlock(connection, wanted)
                free = lost is None
                if lost is not None:  # the block's own error is the one to see
                    log.warning("%s", lost, exc_info=lost)
                raise
            lost = _unlock(connection, wanted)
            free = lost is None
            if lost is not None:
                raise lost
        finally:
            if not free:
                connection.invalidate()


def _check_taken(result: Any, wanted: _Wanted) -> None:
    if result.returns_rows and not result.scalar() and wanted.nowait:
        raise LockTimeout(f"advisory_lock(): somebody else holds the key {wanted.given!r}.")


def _unlock(connection: sa.Connection, wanted: _Wanted) -> LockLost | None:
    """Give the lock back; what is wrong when it was not there any more."""
    unlock = sa.func.pg_advisory_unlock_shared if wanted.shared else sa.func.pg_advisory_unlock
    if connection.invalidated or connection.closed:
        return _lost(wanted, "with its connection")
    try:
        if connection.scalar(sa.select(unlock(*_binds(wanted.key)))):
            return None
    except sa.exc.DBAPIError as error:
        return _lost(wanted, "with its connection", error)
    return _lost(wanted, "(another server process answered, as behind a pooler of transactions)")


def _lost(wanted: _Wanted, how: str, cause: sa.exc.DBAPIError | None = None) -> LockLost:
    lost = LockLost(
        f"advisory_lock(): the lock on the key {wanted.given!r} was lost {how} before the end of its block; somebody "
        "else may have had it meanwhile. Look whether what the block did is right.",
        cause,
    )
    lost.__cause__ = cause
    return lost


def lock_key(key: AdvisoryKey) -> LockKey:
    """The key that PostgreSQL gets. Pure.

    Text becomes its 8-byte BLAKE2b hash (`hashlib.blake2b(digest_size=8)` of its UTF-8), read as a signed integer, the
    most significant byte first: the same in every process, and in every release of fictive. Raises `TypeError` or
    `ConfigurationError` for what is no key.
    """
    if isinstance(key, str):
        if not key:
            raise ConfigurationError("advisory_lock(): the key is an empty text, which is most likely a mistake.")
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return LockKey((int.from_bytes(digest, "big", signed=True),))
    numbers = key if isinstance(key, tuple) else (key,)
    if len(numbers) not in (1, 2) or not all(isinstance(each, int) and not isinstance(each, bool) for each in numbers):
        raise TypeError(f"advisory_lock(): expected an integer, a pair of integers or a text as key, not {key!r}.")
    bits = 64 if len(numbers) == 1 else 32
    if not all(-(2 ** (bits - 1)) <= each < 2 ** (bits - 1) for each in numbers):
        raise ConfigurationError(f"advisory_lock(): the key {key!r} does not fit in signed {bits}-bit integers.")
    return LockKey(tuple(int(each) for each in numbers))

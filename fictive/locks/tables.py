"""Locks on whole tables."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeAlias, TypedDict

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..config import choice, flag
from ..errors import ConfigurationError
from ..session.blocks import transaction
from ..session.durations import Duration, timeout_in_ms
from ..session.given import require_postgresql, session_of, write_on
from .server import Quoting, ServerBlock, lock_timeouts, waiting_block
from .taken import TakenInside

__all__ = ["LockMode", "LockModeName", "LockTablesOptions", "lock_tables", "tables_of"]

LockModeName: TypeAlias = Literal[
    "ACCESS SHARE", "ROW SHARE", "ROW EXCLUSIVE", "SHARE UPDATE EXCLUSIVE", "SHARE", "SHARE ROW EXCLUSIVE",
    "EXCLUSIVE", "ACCESS EXCLUSIVE",
]  # fmt: skip


class LockMode(str, enum.Enum):
    """PostgreSQL's table lock modes, the weakest first (PostgreSQL documentation, "Table-Level Locks")."""

    ACCESS_SHARE = "ACCESS SHARE"
    """What SELECT takes: keeps the table from being dropped, truncated or rewritten."""
    ROW_SHARE = "ROW SHARE"
    """What SELECT FOR UPDATE takes."""
    ROW_EXCLUSIVE = "ROW EXCLUSIVE"
    """What INSERT, UPDATE and DELETE take."""
    SHARE_UPDATE_EXCLUSIVE = "SHARE UPDATE EXCLUSIVE"
    """One holder at a time, while others read and write: for jobs that must not run twice at once. Keeps VACUUM and
    changes of the schema away too."""
    SHARE = "SHARE"
    """Nobody writes; others may hold it as well."""
    SHARE_ROW_EXCLUSIVE = "SHARE ROW EXCLUSIVE"
    """Nobody else writes; one holder at a time."""
    EXCLUSIVE = "EXCLUSIVE"
    """Nobody else does anything but read."""
    ACCESS_EXCLUSIVE = "ACCESS EXCLUSIVE"
    """Nobody else can so much as read."""

    def conflicts(self) -> frozenset[LockMode]:
        """The modes that others cannot have at the same time."""
        return _CONFLICTS[self]

    @property
    def name_in_pg_locks(self) -> str:
        """As the column `pg_locks.mode` has it, e.g. `ShareUpdateExclusiveLock`."""
        return self.value.title().replace(" ", "") + "Lock"


# Each mode against all, the weakest first, as in the documentation's table "Conflicting Lock Modes"; X: they conflict.
_TABLE = [".......X", "......XX", "....XXXX", "...XXXXX", "..XX.XXX", "..XXXXXX", ".XXXXXXX", "XXXXXXXX"]
_CONFLICTS = {
    mode: frozenset(other for other, mark in zip(LockMode, row, strict=True) if mark == "X")
    for mode, row in zip(LockMode, _TABLE, strict=True)
}


class LockTablesOptions(TypedDict, total=False):
    """What `lock_tables()` takes by keyword; its docstring has the meanings."""

    mode: LockMode | LockModeName
    timeout: Duration | None
    nowait: bool


def lock_tables(
    session: sa_orm.Session | sa_orm.scoped_session[Any],
    tables: Iterable[Any],
    *,
    mode: LockMode | LockModeName = LockMode.SHARE_UPDATE_EXCLUSIVE,
    timeout: Duration | None = "5s",
    nowait: bool = False,
) -> contextlib.AbstractContextManager[sa_orm.Session]:
    """Lock tables for a block: `with lock_tables(session, [Account]) as session: ...`.

    Where no transaction is open, the block is one that commits at its end, or rolls back on an exception. In a
    transaction the lock is taken by the call itself and held until the transaction ends, since PostgreSQL has no way
    to give a table lock back; the block is a savepoint, so that an exception caught around it undoes the block alone.

    `tables` are models (all tables of one are locked), or `sqlalchemy.Table`; they are locked in the order of their
    names whatever the order given, so that two callers cannot deadlock on them. `timeout` is how long to wait, `"5s"`,
    seconds or a timedelta; None leaves it to the server's own `lock_timeout`. With `nowait` nothing is waited for.

    Raises `LockTimeout` when a lock is not to be had; a transaction that was open goes on. Raises `ConfigurationError`
    or `TypeError` for wrong arguments, at the call, and `UnsupportedDialect` on other databases. A call without `with`
    where no transaction is open locks nothing, and gives a `NotEnteredWarning`.

    1 round trip, which takes BEGIN or SAVEPOINT along; with one UPDATE and the COMMIT 3. (A plain session sends its
    savepoints apart.) What is pending is not flushed before the lock is held. The timeout is for this alone:
    `lock_timeout` is afterwards what it was before (see `fictive.locks.server`).
    """
    session = session_of(session)
    found = tables_of(tables)
    wanted: LockMode = choice(LockMode, mode, "mode")
    milliseconds = None if timeout is None else timeout_in_ms(timeout, "timeout")
    if flag(nowait, "nowait"):
        milliseconds = None
    for table in found:
        require_postgresql(session, "lock_tables()", table)
    binds = {session.get_bind(clause=write_on(table)) for table in found}
    if len(binds) > 1:
        raise ConfigurationError(
            "lock_tables(): the tables are in several databases. Lock those of each database in a block of its own."
        )
    statement = ServerBlock(lambda quoting: _lock_block(quoting, found, wanted, milliseconds, nowait=nowait))
    return _TableLock(session, statement, found[0])


class _TableLock(TakenInside):
    """The lock of one call."""

    def __init__(self, session: sa_orm.Session, statement: sa.Executable, table: sa.Table) -> None:
        self._statement = statement
        super().__init__("lock_tables(...)", session, {"clause": write_on(table)})

    def _take(self) -> None:
        with lock_timeouts("lock_tables()"):
            self._session.execute(self._statement, bind_arguments=self._where)

    @contextlib.contextmanager
    def _open(self) -> Iterator[sa_orm.Session]:
        session = self._session
        self._take_inside()
        with transaction(session):
            if not self._is_taken():
                with session.no_autoflush:
                    self._take()
            yield session


def _lock_block(
    quoting: Quoting, tables: list[sa.Table], mode: LockMode, milliseconds: int | None, *, nowait: bool
) -> str:
    names = [quoting.table(table) for table in tables]
    conflicting = ", ".join(quoting.text(other.name_in_pg_locks) for other in sorted(mode.conflicts()))
    patience = " at once" if nowait else f" within {milliseconds} ms" if milliseconds else " within lock_timeout"
    return waiting_block(
        "",
        f"  LOCK TABLE {', '.join(names)} IN {mode.value} MODE{' NOWAIT' if nowait else ''};\n",
        milliseconds=milliseconds,
        complaint=quoting.text(f"no {mode.value} lock on {', '.join(quoting.plain(names))}{patience}"),
        in_the_way=f"l.locktype = 'relation' AND l.mode IN ({conflicting})"
        f" AND l.relation IN (SELECT to_regclass(t) FROM unnest({quoting.array(names)}) t)",
    )


def tables_of(entities: Iterable[Any]) -> list[sa.Table]:
    """The tables of models and tables, each once, in the order of their schemas and names.

    Raises `TypeError` for what is neither, and `ConfigurationError` where there is none.
    """
    if isinstance(entities, (str, sa.Table, type)) or not isinstance(entities, Iterable):
        raise TypeError(f"expected a list of models or tables, such as [Account], not {entities!r}.")
    found: set[sa.Table] = set()
    for entity in entities:
        if isinstance(entity, sa.Table):
            found.add(entity)
            continue
        mapper = sa.inspect(entity, raiseerr=False)
        if not isinstance(mapper, sa_orm.Mapper):
            raise TypeError(f"expected a model or a sqlalchemy.Table, not {entity!r}.")
        of_mapper = [table for table in mapper.tables if isinstance(table, sa.Table)]
        if not of_mapper:
            raise TypeError(f"{entity!r} is not mapped to a table.")
        found.update(of_mapper)
    if not found:
        raise ConfigurationError("There is no table to lock: the list of models or tables is empty.")
    return sorted(found, key=lambda table: (table.schema or "", table.name))

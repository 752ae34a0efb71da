"""Read replicas: which of them a read goes to, and what is known of each. Nothing is asked of a server for it.

A position in the write-ahead log (LSN) is a plain number here. A session knows the position of its last commit, which
comes back in COMMIT's own message; the check that a replica has replayed it rides in front of the read, and is a
division by zero where it has not. That answer, and a lost connection, are all that is learnt of a replica's health.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from ..errors import ConfigurationError
from ..session import private
from ..session.unentered import needs_with
from .block_variables import BlockVariable
from .servers import set_patience

__all__ = [
    "BEHIND",
    "COMMIT_POSITION",
    "Positions",
    "Replica",
    "ReplicaState",
    "Replicas",
    "check_position",
    "current_positions",
    "format_lsn",
    "has_replicas",
    "is_replica",
    "note_position",
    "note_write",
    "on_primary",
    "parse_lsn",
    "positions_of",
    "reads_for_write",
    "replicas_of",
    "server_name",
    "set_replicas",
    "using_positions",
    "wants_primary",
    "without_replicas",
]

_REPLAYS = "pg_catalog.pg_is_in_recovery()"
_REPLAYED = "pg_catalog.pg_last_wal_replay_lsn()"
_WRITTEN = "pg_catalog.pg_current_wal_insert_lsn()"

COMMIT_POSITION = f"SELECT {_WRITTEN}"
"""Right behind COMMIT: a position that a replica with this transaction has replayed.

It may be higher than the transaction's own: what others have written since, which the primary may not have sent yet.
The flushed position would be lower, but not right: nothing is flushed after COMMIT under ``synchronous_commit = off``,
and that it was off in the transaction cannot be seen after it.
"""

BEHIND = "22012"
"""The SQLSTATE by which a replica answers that it has not replayed the position; division_by_zero."""

_FIRST_DOWN, _LONGEST_DOWN = 1.0, 30.0  # seconds for which a replica that failed is left out
_FIRST_LAG, _SHORTEST_LAG, _LONGEST_LAG = 0.1, 0.005, 1.0  # seconds for which one that is behind is not asked again


def parse_lsn(text: str) -> int:
    """The number of a position as PostgreSQL writes it, `"16/B374D848"`. Raises `ValueError`."""
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) | int(low, 16)


def format_lsn(position: int) -> str:
    return f"{position >> 32:X}/{position & 0xFFFFFFFF:X}"


def server_name(url: sa.URL) -> str:
    """Where a server is, without user and password: `"db2.example.com:5432"`."""
    hosts = url.query.get("host") or url.host or "localhost"
    text = hosts if isinstance(hosts, str) else ", ".join(hosts)
    return f"{text}:{url.port or 5432}" if isinstance(hosts, str) and ":" not in text else text


def check_position(position: int) -> str:
    """What goes in front of a read. A server that replays nothing, such as one that was promoted, has what it has
    written itself."""
    lsn = f"'{format_lsn(position)}'::pg_catalog.pg_lsn"
    return f"SELECT 1/(CASE WHEN {_REPLAYS} THEN {_REPLAYED} ELSE {_WRITTEN} END >= {lsn})::pg_catalog.int4"


# -- what was written ------------------------------------------------------------------------------------------------


class Positions:
    """How far each primary had written when what must be seen was committed, in one request, job or session."""

    __slots__ = ("__weakref__", "_outer", "changed", "known", "unknown")

    def __init__(self, known: Mapping[sa.Engine, int] | None = None, outer: Positions | None = None) -> None:
        self.known: dict[sa.Engine, int] = dict(known or {})
        self._outer = outer
        """Those of the block around; what is written in this one is written there too."""
        self.unknown: set[sa.Engine] = set()
        self.changed = False
        """Whether anything was written since it was made."""
        if outer is not None:
            self.include(outer)

    def written(self, engine: sa.Engine, position: int | None) -> None:
        """A commit on `engine`, up to `position`; None where nobody has asked for it."""
        self.changed = True
        if position is None:
            self.unknown.add(engine)
        else:
            self.raise_to(engine, position)
        if self._outer is not None:
            self._outer.written(engine, position)

    def include(self, other: Positions) -> None:
        """See at least what `other` has to see."""
        for engine, position in other.known.items():
            self.raise_to(engine, position)
        self.unknown |= other.unknown

    def raise_to(self, engine: sa.Engine, position: int) -> None:
        """See at least what was there at `position`."""
        if position > self.known.get(engine, 0):
            self.known[engine] = position

    def needs_primary(self, engine: sa.Engine) -> bool:
        """Whether something was written of which no position is known."""
        return engine in self.unknown

    def __getitem__(self, engine: sa.Engine) -> int:
        """The position; 0 where nothing was written."""
        return self.known.get(engine, 0)

    def complete(self, ask: Callable[[sa.Engine], int]) -> Mapping[sa.Engine, int]:
        """All positions, after one look at each primary whose is not known."""
        while self.unknown:
            engine = next(iter(self.unknown))
            self.raise_to(engine, ask(engine))
            self.unknown.discard(engine)
        return self.known


_current: BlockVariable[Positions | None] = BlockVariable("fictive_positions", None)
_KEY = "fictive.positions"
_SHARED = "fictive.shared_positions"


def positions_of(info: dict[Any, Any]) -> Positions:
    """Those of the request or job, where there is one; else those of the session whose `info` it is.

    A session sees its own writes in either: those from before the block in it, and those of the block after it.
    """
    found = _current.get()
    if found is None:
        return _own(info)
    seen: object = info.get(_SHARED)
    if seen is not found:
        info[_SHARED] = found
        if _KEY in info:
            found.include(info[_KEY])
    return found


def note_position(info: dict[Any, Any], engine: sa.Engine, position: int | None) -> None:
    """A session has written; see `Positions.written`."""
    found, own = positions_of(info), _own(info)
    found.written(engine, position)
    if own is not found:
        own.written(engine, position)


def note_write(info: dict[Any, Any], engine: sa.Engine) -> None:
    """`note_position`, of a write that does not look like one, up to a position that nobody has asked for."""
    if has_replicas() and (found := replicas_of(engine)) is not None:
        note_position(info, found.primary, None)


def _own(info: dict[Any, Any]) -> Positions:
    if _KEY not in info:
        info[_KEY] = Positions()
    found: Positions = info[_KEY]
    return found


def current_positions() -> Positions | None:
    return _current.get()


@contextlib.contextmanager
def using_positions(positions: Positions) -> Iterator[Positions]:
    """All sessions used in the block share `positions`."""
    with _current.set(positions):
        yield positions


_primary = BlockVariable("fictive_primary", False)


@needs_with("primary()")
def on_primary() -> Iterator[None]:
    """Reads in the block go to the primary. Also a decorator."""
    with _primary.set(True):
        yield


def reads_for_write() -> contextlib.AbstractContextManager[None]:
    """Around reads that decide what is written: on the primary, where there are replicas."""
    return on_primary() if _replicas else contextlib.nullcontext()


wants_primary: Callable[[], bool] = _primary.get
"""Whether reads have to go to the primary now."""


# -- who reads -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ReplicaState:
    """What is known of a replica, for those who look."""

    url: sa.URL
    is_down: bool
    is_behind: bool
    busy: int
    """Reads under way."""
    reads: int
    """Reads that it has answered."""
    behind: int
    """Reads that it could not answer because it had not replayed enough."""
    failures: int
    """Reads that failed on it and went to the primary."""


class Replica:
    """One replica, and what its answers have told."""

    def __init__(self, engine: sa.Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine = engine
        self.name = server_name(engine.url)
        self.busy: deque[None] = deque()  # its length is the count: appending and popping are atomic
        self.reads = self.behind = self.failures = 0
        self._clock = clock
        self._down_until = 0.0
        self._down_pause = _FIRST_DOWN
        self._behind_position = 0
        self._behind_until = 0.0
        self._lag_pause = _FIRST_LAG

    def may_have(self, position: int, now: float) -> bool:
        """Whether a read that has to see `position` is worth a try."""
        if now < self._down_until:
            return False
        return not position or now >= self._behind_until or position < self._behind_position

    def passed(self, position: int) -> None:
        """It has answered a read, and so has replayed `position`."""
        self.reads += 1
        if self._down_pause > _FIRST_DOWN:
            self._down_pause = _FIRST_DOWN
        if self._behind_position and position >= self._behind_position:
            self._behind_position, self._behind_until = 0, 0.0
            self._lag_pause = max(self._lag_pause / 4, _SHORTEST_LAG)

    def was_behind(self, position: int) -> None:
        """It has not replayed `position`: reads that need it go to the primary for a moment, without asking."""
        self.behind += 1
        now = self._clock()
        if now < self._behind_until:
            self._behind_position = min(self._behind_position, position)
            return
        self._behind_position = position
        self._behind_until = now + self._lag_pause
        self._lag_pause = min(self._lag_pause * 2, _LONGEST_LAG)

    def failed(self, *, lost: bool) -> None:
        """A read failed on it. After a lost or refused connection it is left out for a while."""
        self.failures += 1
        if lost:
            self._down_until = self._clock() + self._down_pause
            self._down_pause = min(self._down_pause * 2, _LONGEST_DOWN)

    def state(self) -> ReplicaState:
        now = self._clock()
        return ReplicaState(
            self.engine.url,
            now < self._down_until,
            now < self._behind_until,
            len(self.busy),
            self.reads,
            self.behind,
            self.failures,
        )


class Replicas:
    """The replicas of one primary."""

    def __init__(
        self,
        primary: sa.Engine,
        engines: Sequence[sa.Engine],
        *,
        clock: Callable[[], float] = time.monotonic,
        order: Callable[[], float] = random.random,
    ) -> None:
        self.primary = primary
        self.members = [Replica(engine, clock) for engine in engines]
        self.tell_position = True
        """Whether the primary says up to where it has written."""
        self._clock = clock
        self._order = order

    def choose(self, position: int = 0) -> Replica | None:
        """The least busy of those that may have `position`, any of equals; None for the primary."""
        now = self._clock()
        found = None
        least = 0.0
        for replica in self.members:
            if replica.may_have(position, now):
                rank = len(replica.busy) + self._order()
                if found is None or rank < least:
                    found, least = replica, rank
        return found

    def states(self) -> list[ReplicaState]:
        return [replica.state() for replica in self.members]

    def __repr__(self) -> str:
        return f"<Replicas {[replica.engine.url for replica in self.members]!r}>"


_replicas: weakref.WeakKeyDictionary[sa.Engine, Replicas] = weakref.WeakKeyDictionary()


def set_replicas(engine: sa.Engine, replicas: Sequence[sa.Engine]) -> Replicas:
    """Let opt-in sessions on `engine` read from `replicas`, engines on streaming replicas of its server.

    What reads outside a transaction goes to the least busy of them; all else goes to `engine`. A session sees its own
    writes: a replica that has not replayed them does not answer, and the primary does. In a Flask app the setting
    `FICTIVE_REPLICAS` does it. An empty list ends it. Sends nothing.

    Raises `ConfigurationError` for engines that are not PostgreSQL's or have another driver.
    """
    for each in (engine, *replicas):
        if each.dialect.name != "postgresql" or each.dialect.driver != engine.dialect.driver:
            raise ConfigurationError(
                f"set_replicas(): {each.url!r}: primary and replicas have to be PostgreSQL with the same driver."
            )
    global any_replicas
    root = private.root_engine(engine)
    found = Replicas(root, replicas)
    for each in replicas:
        set_patience(each, 0.0)  # the primary is there
    if replicas:
        any_replicas = True
        _replicas[root] = found
    else:
        _replicas.pop(root, None)
    return found


@contextlib.contextmanager
def without_replicas(engines: Sequence[sa.Engine]) -> Iterator[None]:
    """For a test's sandbox, whose rows no replica has: reads of these engines go to them, as all else."""
    aside = {engine: found for engine in engines if (found := _replicas.pop(engine, None)) is not None}
    try:
        yield
    finally:
        _replicas.update(aside)


def has_replicas() -> bool:
    """Whether any engine of this process has some."""
    return bool(_replicas)


any_replicas = False
"""Whether any engine ever had replicas: else nothing has to be asked."""


def replicas_of(engine: sa.Engine) -> Replicas | None:
    """The replicas of an engine; None where it has none."""
    return _replicas.get(private.root_engine(engine)) if _replicas else None


def is_replica(engine: sa.Engine) -> bool:
    """Whether an engine is one of those that reads go to."""
    return any(member.engine is engine for each in list(_replicas.values()) for member in each.members)

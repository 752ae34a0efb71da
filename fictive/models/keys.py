"""Keys: random, ordered by time, or one inside and another outside."""

from __future__ import annotations

import os
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Mapped, declared_attr, mapped_column
from sqlalchemy.sql.compiler import SQLCompiler

__all__ = ["PublicIdMixin", "UUIDMixin", "UUIDv7Mixin", "uuid7"]

FIRST = -100
"""The place of a key among the columns."""


class UUIDMixin:
    """`id`: a random UUID (version 4), made by the application, so that it is known before the INSERT is sent.

    For keys that tell nothing. They fall all over the index; for large tables see `UUIDv7Mixin`.
    """

    if TYPE_CHECKING:
        id: Mapped[uuid.UUID]
    else:

        @declared_attr
        def id(cls):
            return mapped_column(sa.Uuid, primary_key=True, default=uuid.uuid4, sort_order=FIRST)


class UUIDv7Mixin:
    """`id`: a UUID that is ordered by time (version 7, RFC 9562), so that new rows sit at the end of the index.

    Rows that SQLAlchemy inserts get it from `uuid7()`, known before the INSERT is sent: with the server's function
    the ORM would have to send one INSERT a row to learn which key is whose. The column's default on PostgreSQL 18 and
    later is the server's own `uuidv7()`, for rows that others insert (PostgreSQL documentation, "UUID Functions");
    below there is none, and an INSERT by hand without a key fails. Never is it another kind.

    The time of making, to the millisecond, can be read from such a key.
    """

    if TYPE_CHECKING:
        id: Mapped[uuid.UUID]
    else:

        @declared_attr
        def id(cls):
            return mapped_column(
                sa.Uuid,
                primary_key=True,
                default=uuid7,
                server_default=_ServersUUIDv7(),
                insert_sentinel=True,  # SQLAlchemy would send row by row, taking the server's default for the one used
                sort_order=FIRST,
            )


class PublicIdMixin:
    """`id`, an integer that stays inside, and `public_id`, a random UUID for URLs and other systems.

    Joins and foreign keys stay narrow, and nobody outside can count rows or guess the next one's key.
    """

    if TYPE_CHECKING:
        id: Mapped[int]
        public_id: Mapped[uuid.UUID]
    else:

        @declared_attr
        def id(cls):
            # only an INTEGER is SQLite's row number
            return mapped_column(
                sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, sort_order=FIRST
            )

        @declared_attr
        def public_id(cls):
            return mapped_column(sa.Uuid, unique=True, nullable=False, default=uuid.uuid4, sort_order=FIRST)

    @classmethod
    def by_public_id(cls, public_id: uuid.UUID | str) -> sa.Select[Any]:
        """The SELECT of the row with that public id. `ValueError` for text that is not a UUID."""
        if not isinstance(public_id, uuid.UUID):
            public_id = uuid.UUID(public_id)
        return sa.select(cls).where(cls.public_id == public_id)


class _ServersUUIDv7(sa.FunctionElement[uuid.UUID]):
    """`uuidv7()` where the server has it, and no default where it has not."""

    type = sa.Uuid()
    inherit_cache = True


@compiles(_ServersUUIDv7)
def _no_default(element: _ServersUUIDv7, compiler: SQLCompiler, **kwargs: Any) -> str:
    return "NULL"


@compiles(_ServersUUIDv7, "postgresql")
def _default(element: _ServersUUIDv7, compiler: SQLCompiler, **kwargs: Any) -> str:
    # a dialect that has not connected (SQL shown, not sent) is taken for a new server's
    version = getattr(compiler.dialect, "server_version_info", None)
    return "NULL" if version is not None and version < (18,) else "uuidv7()"


# 48 bits of milliseconds, 4 of version, 12 of rand_a, 2 of variant, 62 of rand_b (RFC 9562, "UUID Version 7").
_TAIL_BITS = 74
_STEP_BITS = 32

_lock = threading.Lock()
_last: tuple[int, int, int] = (0, 0, 0)  # process, milliseconds, tail


def uuid7() -> uuid.UUID:
    """A UUID of version 7, greater than every one this process made before.

    Within a millisecond the random part goes up by a random step (RFC 9562, "Monotonicity and Counters", method 2),
    so that keys stay in order and cannot be guessed; a clock that is set back changes nothing in the order.
    """
    global _last
    with _lock:
        process, milliseconds, tail = _last
        now = time.time_ns() // 1_000_000
        if process != os.getpid() or now > milliseconds:  # a forked child must not go on from its parent's last
            milliseconds = max(now, milliseconds)
            tail = int.from_bytes(os.urandom(10), "big") >> (80 - _TAIL_BITS + 1)  # half of the range is left to go up
        else:
            tail += int.from_bytes(os.urandom(_STEP_BITS // 8), "big") + 1
            if tail >> _TAIL_BITS:
                milliseconds, tail = milliseconds + 1, tail & ((1 << _TAIL_BITS) - 1)
        _last = (os.getpid(), milliseconds, tail)
    rand_a, rand_b = tail >> 62, tail & ((1 << 62) - 1)
    return uuid.UUID(int=milliseconds << 80 | 7 << 76 | rand_a << 64 | 2 << 62 | rand_b)

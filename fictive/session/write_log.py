"""Log of autocommitted writes, quoted in warnings when they can no longer be rolled back."""

from __future__ import annotations

import logging
import warnings

import sqlalchemy.orm as sa_orm

from ..errors import AlreadyCommittedWarning
from . import private
from .callers import caller, stack_level

__all__ = ["WriteLog", "pending_writes", "warn_of_committed"]

log = logging.getLogger("fictive.committed")

_AT_MOST = 20
_REMEDY = (
    '. Put what belongs together in `with db.session.begin():`, or set FICTIVE_WRITES_OUTSIDE = "begin"; a function '
    "that only reads can say so with execution_options(fictive_writes=False)."
)


class WriteLog(list[str]):
    """A few words and the line of each write, the first twenty."""

    def note(self, what: str) -> None:
        if len(self) < _AT_MOST:
            self.append(f"{what} ({caller()})")


def pending_writes(session: sa_orm.Session) -> str:
    """What a flush would write, in a few words: `INSERT of 1 Item`."""
    parts = []
    for verb, states in private.pending_states(session):
        counts: dict[str, int] = {}
        for state in states:
            name = state.class_.__name__
            counts[name] = counts[name] + 1 if name in counts else 1
        for name in counts:
            parts.append(f"{verb} of {counts[name]} {name}")
    return ", ".join(parts) or "nothing"


def warn_of_committed(what: str, writes: list[str], place: str) -> None:
    """Log and warn of writes that stay; `place` is where the session is used."""
    log.warning("%s%s%s", what, "; ".join(writes), place)
    warnings.warn(AlreadyCommittedWarning(what + "; ".join(writes) + _REMEDY), stacklevel=stack_level())

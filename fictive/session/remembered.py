"""What a session remembers of writes, so that it can say later what stays and what was undone."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

from ..errors import AlreadyCommittedWarning
from .callers import caller, stack_level
from .state import SessionState
from .statements import Effect, nature_of, summary

__all__ = ["RemembersWrites", "warn_of_committed"]

_AT_MOST = 20
_TOGETHER = (
    '. Put what belongs together in `with db.session.begin():`, or set FICTIVE_WRITES_OUTSIDE = "begin"; a function '
    "that only reads can say so with execution_options(fictive_writes=False)."
)


class RemembersWrites(SessionState):
    """Keeps a few words and the line of each write that its block or context may not expect to stay."""

    def pending_writes(self) -> str:
        parts = []
        for verb, objects in (("INSERT", self.new), ("UPDATE", self.dirty), ("DELETE", self.deleted)):
            for name, count in Counter(type(obj).__name__ for obj in objects).items():
                parts.append(f"{verb} of {count} {name}")
        return ", ".join(parts) or "nothing"

    def _note_in_block(self, statement: Any, params: Any) -> None:
        """Remember a write in a block that asked for a savepoint and, being outside, got a transaction."""
        block = self._tx
        while block is not None and not block.asked_for_savepoint:
            block = block.parent
        if block is None or len(block.writes) >= _AT_MOST:
            return
        if statement is None:
            if not self.is_clean():
                block.writes.append(f"{self.pending_writes()} ({caller()})")
        elif nature_of(statement, params).effect is not Effect.READ:
            block.writes.append(f"{summary(statement)} ({caller()})")

    def _remember_write(self, what: str) -> None:
        if len(self._committed_writes) < _AT_MOST:
            self._committed_writes.append(f"{what} ({caller()})")


def warn_of_committed(what: str, writes: list[str]) -> None:
    warnings.warn(AlreadyCommittedWarning(what + "; ".join(writes) + _TOGETHER), stacklevel=stack_level())

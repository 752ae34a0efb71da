"""The end of the context: what is warned of, and what is given back."""

from __future__ import annotations

import warnings
from typing import Any

import sqlalchemy as sa

from ..config import UnsavedChanges
from ..errors import UnsavedChangesError, UnsavedChangesWarning
from .beginning import BeginsBlocks
from .callers import stack_level
from .hooks import settles
from .remembered import warn_of_committed

__all__ = ["EndsContext"]


class EndsContext(BeginsBlocks):
    """Reports changes that no one wrote and writes that stay, and closes."""

    def unsaved(self) -> list[str]:
        """What is new, changed or deleted and not written, a few words for each object. Sends nothing."""
        found = [f"{_name(obj)} (new)" for obj in self.new]
        found += [f"{_name(obj)} (deleted)" for obj in self.deleted]
        for obj in self.dirty:
            if self.is_modified(obj):
                changed = [attr.key for attr in sa.inspect(obj).attrs if attr.history.has_changes()]
                found.append(f"{_name(obj)} (changed: {', '.join(changed)})")
        return found

    def report_unsaved(self) -> None:
        """Warn of, or raise for, changes that are about to be lost, as `unsaved_changes` says."""
        if self.unsaved_changes is UnsavedChanges.IGNORE or self.is_clean():
            return
        found = self.unsaved()
        if not found:
            return
        shown = ", ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "")
        message = f"The context ends with changes that no one wrote, and they are lost: {shown}."
        if self.unsaved_changes is UnsavedChanges.ERROR:
            raise UnsavedChangesError(message)
        warnings.warn(UnsavedChangesWarning(message), stacklevel=stack_level())

    def report_committed(self) -> None:
        """Warn of writes that stay although their context ended with an error."""
        if self._committed_writes:
            warn_of_committed(
                "The context ended with an error, after these were committed at once: ", self._committed_writes
            )

    @settles
    def close(self) -> None:
        """Give back whatever is held; an open transaction is rolled back. Changes not written are dropped."""
        self._discard_blocks()
        super().close()
        self._release_outlived_pins()

    @settles
    def reset(self) -> None:
        """As `close()`, for a session that goes on."""
        self._discard_blocks()
        super().reset()
        self._release_outlived_pins()

    @settles
    def invalidate(self) -> None:
        """As `close()`, closing the connections of an open transaction for good."""
        self._discard_blocks()
        super().invalidate()
        self._release_outlived_pins()

    def __exit__(self, type_: Any, value: Any, traceback: Any) -> None:
        try:
            if type_ is None:
                self.report_unsaved()
            else:
                self.report_committed()
        finally:
            self.close()


def _name(obj: object) -> str:
    identity = sa.inspect(obj).identity
    return type(obj).__name__ + (f" {', '.join(map(str, identity))}" if identity else "")

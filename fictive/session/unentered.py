"""Context managers that say so when somebody forgets `with`."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from types import TracebackType
from typing import TypeVar

from ..errors import NotEnteredWarning
from .callers import caller_frame

__all__ = ["NeedsWith"]

log = logging.getLogger("fictive.unentered")

_T = TypeVar("_T")


class NeedsWith(contextlib.AbstractContextManager[_T]):
    """A context manager whose work begins with `with`.

    One that is dropped unentered gives a `NotEnteredWarning` and a log record, which name the line that made it.
    Subclasses write `_open()`; each `with` opens anew. `_needs_with = False` says that there is nothing to miss.
    """

    def __init__(self, what: str) -> None:
        """`what` is the call, for the message."""
        self._needs_with = True
        self._opened: list[contextlib.AbstractContextManager[_T]] = []
        self._what = what
        frame = caller_frame()
        self._made_at = frame.f_code.co_filename, frame.f_lineno

    def _open(self) -> contextlib.AbstractContextManager[_T]:
        raise NotImplementedError

    def __enter__(self) -> _T:
        self._needs_with = False
        opened = self._open()
        value = opened.__enter__()
        self._opened.append(opened)
        return value

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._opened.pop().__exit__(type_, error, traceback)

    def __del__(self) -> None:
        # not there: __init__ raised; finalizing: the program ends, and says so itself where that is an error
        if not getattr(self, "_needs_with", False) or sys.is_finalizing():
            return
        file, line = self._made_at
        message = f"{self._what} was called without `with`, and did nothing. Write `with {self._what}:`."
        log.warning("%s:%s: %s", file, line, message)
        warnings.warn_explicit(NotEnteredWarning(message), NotEnteredWarning, file, line)

"""Context managers that say so when somebody forgets `with`."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from ..errors import NotEnteredWarning
from .callers import find_caller

__all__ = ["NeedsWith", "needs_with", "warn_not_entered"]

log = logging.getLogger("fictive.unentered")

_T = TypeVar("_T")
_Arguments = ParamSpec("_Arguments")
_Function = TypeVar("_Function", bound=Callable[..., Any])


class NeedsWith(contextlib.AbstractContextManager[_T]):
    """A context manager whose work begins with `with`; also a decorator, around each call.

    One that is dropped unentered gives a `NotEnteredWarning` and a log record, which name the line that made it.
    Subclasses write `_open()`; each `with` opens anew. `_needs_with = False` says that there is nothing to miss.
    """

    def __init__(self, what: str) -> None:
        """`what` is the call, for the message."""
        self._opened: list[contextlib.AbstractContextManager[_T]] = []
        self._what = what
        frame, _ = find_caller()
        self._made_at = frame.f_code.co_filename, frame.f_lineno
        self._needs_with = True

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

    def __call__(self, function: _Function) -> _Function:
        self._needs_with = False

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._open():
                return function(*args, **kwargs)

        return run  # type: ignore[return-value]

    def __del__(self) -> None:
        if getattr(self, "_needs_with", False):  # not there where __init__ raised
            warn_not_entered(self._what, *self._made_at)


class _Made(NeedsWith[_T]):
    """What a function made by `needs_with` returns."""

    def __init__(self, what: str, make: Callable[[], contextlib.AbstractContextManager[_T]]) -> None:
        self._make = make
        self._first: contextlib.AbstractContextManager[_T] | None = make()  # raises for wrong arguments
        super().__init__(what)

    def _open(self) -> contextlib.AbstractContextManager[_T]:
        first, self._first = self._first, None
        return first or self._make()


def needs_with(
    what: str,
) -> Callable[[Callable[_Arguments, Iterator[_T]]], Callable[_Arguments, contextlib.AbstractContextManager[_T]]]:
    """`contextlib.contextmanager` for functions whose call without `with` is a mistake; `what` names it."""

    def decorate(
        function: Callable[_Arguments, Iterator[_T]],
    ) -> Callable[_Arguments, contextlib.AbstractContextManager[_T]]:
        make = contextlib.contextmanager(function)

        @functools.wraps(function)
        def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> contextlib.AbstractContextManager[_T]:
            return _Made(what, lambda: make(*args, **kwargs))

        return call

    return decorate


def warn_not_entered(what: str, file: str | None = None, line: int = 0) -> None:
    """Warn of a call that needs `with`, at that line; without one at the line that drops its object."""
    if sys.is_finalizing():
        return
    if file is None:
        frame, _ = find_caller()
        file, line = frame.f_code.co_filename, frame.f_lineno
    message = f"{what} was called without `with`, and did nothing. Write `with {what}:`."
    log.warning("%s:%s: %s", file, line, message)
    warnings.warn_explicit(NotEnteredWarning(message), NotEnteredWarning, file, line)

"""Which line of the user's code a call came from, for messages and warnings."""

from __future__ import annotations

import sys
from types import CodeType, FrameType

__all__ = ["caller", "find_caller", "stack_level"]

# By the name of the top-level package, so that no package has to be imported to be passed over.
_PASSED_OVER = frozenset({"fictive", "sqlalchemy", "flask_sqlalchemy", "contextlib", "werkzeug", "flask", "functools"})
_is_passed_over: dict[CodeType, bool] = {}
_MOST_KNOWN = 20_000


def caller() -> str:
    """`"file:line in function"` of the innermost frame that is not in a library fictive works through."""
    frame, _ = find_caller()
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def stack_level() -> int:
    """The `stacklevel` with which `warnings.warn` in the calling function names that same line."""
    return find_caller()[1]


def find_caller() -> tuple[FrameType, int]:
    """That frame, and its number from the caller's on. Do not keep it: it holds all that its function holds."""
    frame, level = sys._getframe(1), 0
    while frame.f_back is not None:
        code = frame.f_code
        if code not in _is_passed_over:
            _learn(frame)
        if not _is_passed_over[code]:
            break
        frame, level = frame.f_back, level + 1
    return frame, level


def _learn(frame: FrameType) -> None:
    if len(_is_passed_over) >= _MOST_KNOWN:
        _is_passed_over.clear()
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    _is_passed_over[frame.f_code] = package in _PASSED_OVER

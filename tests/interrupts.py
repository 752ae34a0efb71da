"""Interrupts at a chosen place: a program is run once for each bytecode, or line, of the code that it goes through."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import sqlalchemy

import fictive

OURS = str(Path(fictive.__file__).parent)
SQLALCHEMY = str(Path(sqlalchemy.__file__).parent)


class Interrupt(BaseException):
    """As gevent.Timeout and GreenletExit are: no Exception, and from anywhere."""


class Striker:
    """Raises `error` at the place with the number `at`, counted from 0, among those that `places` names.

    `places`: folders, and whether each bytecode in their code is a place (`"opcode"`), or each line (`"line"`).
    """

    def __init__(self, places: dict[str, str], at: int, error: type[BaseException] = Interrupt) -> None:
        self.places, self.at, self.error = places, at, error
        self.count = 0
        self.struck: str | None = None
        self._events: dict[Any, str | None] = {}

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Striker]:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield self
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        wanted = self._events.get(code, "")
        if wanted == "":
            name = code.co_filename
            wanted = next((kind for folder, kind in self.places.items() if name.startswith(folder)), None)
            if code.co_name == "__del__":  # Python swallows what is raised there
                wanted = None
            self._events[code] = wanted
        if wanted is None:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = wanted == "opcode", wanted == "line"
        return self._step

    def _step(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
        if event in ("opcode", "line"):
            if self.count == self.at:
                self.count += 1
                self.struck = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_qualname}"
                raise self.error
            self.count += 1
        return self._step

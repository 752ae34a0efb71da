"""Values that hold for a block of code."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Generic, TypeVar, cast

__all__ = ["BlockVariable"]

_T = TypeVar("_T")


class _Holder:
    """Lives as long as its block: a local variable there is all that refers to it."""

    __slots__ = ("__weakref__",)


class BlockVariable(Generic[_T]):
    """A context variable whose value is over with its block, in whatever way that ends.

    An interrupt may strike where `ContextVar.reset` was to be called, and whoever comes next in that thread would
    inherit the value. Here each value counts only while the block that set it is alive.
    """

    def __init__(self, name: str, default: _T) -> None:
        self._default = default
        none: tuple[tuple[_T, weakref.ref[Any]], ...] = ()
        self._values = ContextVar(name, default=none)

    def get(self) -> _T:
        held: tuple[tuple[_T, weakref.ref[Any]], ...] = self._values.get()
        for value, holder in reversed(held):
            if holder() is not None:
                return cast("_T", value)
        return self._default

    @contextlib.contextmanager
    def set(self, value: _T) -> Iterator[None]:
        """Let the block have `value`."""
        holder = _Holder()
        alive = [each for each in self._values.get() if each[1]() is not None]
        token = self._values.set((*alive, (value, weakref.ref(holder))))
        try:
            yield
        finally:
            self._values.reset(token)

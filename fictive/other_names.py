"""Other names for arguments, from libraries that code is moved over from. Each argument has one documented name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["also_named"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def also_named(**others: str) -> Callable[[_Function], _Function]:
    """Decorator: accept the keywords `others`, each for the argument that it names: `@also_named(db_name="name")`.

    Raises `TypeError` where both are given. Type checkers know the documented names only.
    """

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for other in others.keys() & kwargs.keys():
                name = others[other]
                if name in kwargs:
                    raise TypeError(f"{function.__name__}() got {name!r} and {other!r}, which are the same argument.")
                kwargs[name] = kwargs.pop(other)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate

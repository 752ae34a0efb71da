"""Decorators of views that were put above `@app.route`, where Flask serves the function without them."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click
import flask

from .errors import ConfigurationError

__all__ = ["Decorated"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Decorated:
    """The functions that one `db` has decorated, so that the apps it belongs to can be looked through.

    Flask's own signal tells of the first request; afterwards nothing is called any more.
    """

    def __init__(self) -> None:
        # both weak: what a route has registered is held by its app, and the rest need not be looked at
        self._decorated: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()
        self._within: weakref.WeakKeyDictionary[Callable[..., Any], str] = weakref.WeakKeyDictionary()

    def check(self, function: object, decorator: str) -> None:
        """Raise `TypeError` for what decorators make of functions, which cannot be decorated from above."""
        if isinstance(function, click.Command):
            raise TypeError(f"@db.{decorator} decorates a function; put it below @app.cli.command(), not above.")

    def add(self, decorated: _Function, decorator: str) -> _Function:
        """Remember that `decorator` made `decorated` of the functions within it."""
        self._decorated.add(decorated)
        for function in _layers(getattr(decorated, "__wrapped__", None)):
            with contextlib.suppress(TypeError):  # a callable that allows no weak reference
                self._within[function] = decorator
        return decorated

    def watch(self, app: flask.Flask) -> None:
        """Look through the views of `app` when it starts serving, which is later than all that registers some."""
        flask.request_started.connect(self._look, app)

    def _look(self, app: flask.Flask, **_: Any) -> None:
        self.check_views(app)
        flask.request_started.disconnect(self._look, app)

    def check_views(self, app: flask.Flask) -> None:
        """Raise `ConfigurationError` where a view of `app` was decorated after it had been registered."""
        if not self._within:
            return
        views = set(app.view_functions.values())
        served = {function for view in views for function in _layers(view) if function in self._decorated}
        covered = {function for each in served for function in _layers(each)}
        for view in views - covered:
            decorator = self._within.get(view)
            if decorator is not None and not _is_known_by_its_name(view):
                code = getattr(inspect.unwrap(view), "__code__", None)
                where = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
                name = getattr(view, "__qualname__", repr(view))
                raise ConfigurationError(
                    f"@db.{decorator} stands above the route of {name}(){where}, so that Flask serves the function "
                    f"without it. Put @db.{decorator} below @app.route."
                )


def _is_known_by_its_name(function: Any) -> bool:
    """Whether the function's name still means it: `other = db.transactional(view)` leaves a view as it is."""
    return getattr(function, "__globals__", {}).get(getattr(function, "__qualname__", None)) is function


def _layers(function: Any) -> Iterator[Any]:
    """The function and those that it wraps."""
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        yield function
        function = getattr(function, "__wrapped__", None)

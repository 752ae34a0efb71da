"""The contenders, and what each of them can be asked to do."""

from __future__ import annotations

import abc
import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from werkzeug.test import EnvironBuilder, run_wsgi_app

__all__ = ["NAMES", "PLAIN", "SLEEP", "Peer", "Setup", "installed", "load", "title"]

# Everything is compared with plain Flask-SQLAlchemy.
PLAIN = "plain"
NAMES = (PLAIN, "lite", "django", "raw", "fictive")
SLEEP = 0.05  # seconds that somebody else's API takes to answer, in /slow
_CLASSES = {
    PLAIN: ("benchmarks.peers.sqlalchemy_peers", "Plain"),
    "lite": ("benchmarks.peers.sqlalchemy_peers", "Lite"),
    "django": ("benchmarks.peers.django_peer", "Django"),
    "raw": ("benchmarks.peers.raw_peer", "Raw"),
    "fictive": ("benchmarks.peers.sqlalchemy_peers", "Fictive"),
}

_NEEDS = {"lite": ["flask_sqlalchemy_lite"], "django": ["django"]}


@dataclass(frozen=True)
class Setup:
    """How a contender connects. `safe`: with what it has against connections that died in the pool."""

    url: str
    driver: str
    pool_size: int = 5
    max_overflow: int = 10
    safe: bool = False


class Peer(abc.ABC):
    """One contender. What it does not offer, it has no method for: `getattr(peer, name, None)` tells.

    Its views are `/selects/<n>`, which loads n objects by key with a SELECT each, and `/slow`, which waits `SLEEP`
    between two such SELECTs. What is below `work` is done within `with peer.work():`.
    """

    name: str
    title: str

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._number = 0
        self._environs: dict[str, dict[str, Any]] = {}

    # In the views' stead: the application and what is needed to ask it.

    app: Callable[..., Any]

    def request(self, path: str) -> bytes:
        """The answer to GET `path`, from the WSGI application; the client does as little as can be."""
        environ = self._environs.get(path)
        if environ is None:
            environ = self._environs[path] = self.environ(path)
        body, status, _ = run_wsgi_app(self.app, dict(environ), buffered=True)
        if not status.startswith("200"):
            raise RuntimeError(f"{self.title}: GET {path} answered {status}")
        return b"".join(body)

    def environ(self, path: str) -> dict[str, Any]:
        return EnvironBuilder(path).get_environ()

    def work(self) -> AbstractContextManager[Any]:
        """What a job outside of requests runs in."""
        return contextlib.nullcontext()

    # One statement each.

    @abc.abstractmethod
    def get(self, key: int) -> object:
        """Load an object by its key."""

    @abc.abstractmethod
    def select(self, key: int) -> object:
        """Load an object with a SELECT that is written out."""

    @abc.abstractmethod
    def load(self, count: int) -> Sequence[object]:
        """Load that many objects with one SELECT."""

    # One transaction each.

    @abc.abstractmethod
    def insert(self) -> None: ...

    @abc.abstractmethod
    def select_update(self) -> None: ...

    @abc.abstractmethod
    def savepoint_insert(self) -> None: ...

    # The end.

    def leave_thread(self) -> None:
        """Called in each thread that made requests, before it ends."""
        return

    @abc.abstractmethod
    def close(self) -> None:
        """Close all connections."""

    # Values, ever new ones.

    def next_key(self) -> int:
        self._number += 1
        return self._number % 1000 + 1

    def next_name(self) -> str:
        self._number += 1
        return f"new {self._number}"

    links = (100, 10)
    """How many tags `next_links` gives, and how many of them were not there the last time."""

    def next_links(self) -> list[int]:
        self._number += 1
        count, changed = self.links
        first = changed + 1 if self._number % 2 else 1
        return list(range(first, first + count))


def installed() -> list[str]:
    """The contenders whose packages are here."""
    return [name for name in NAMES if all(importlib.util.find_spec(package) for package in _NEEDS.get(name, ()))]


def load(name: str) -> type[Peer]:
    """The class of a contender."""
    module, attribute = _CLASSES[name]
    found: type[Peer] = getattr(importlib.import_module(module), attribute)
    return found


def title(name: str, driver: str = "") -> str:
    """How a contender is called in tables."""
    return {
        PLAIN: "Flask-SQLAlchemy",
        "lite": "F-S-Lite",
        "django": "Django",
        "raw": f"raw {driver}".strip(),
        "fictive": "fictive",
    }[name]

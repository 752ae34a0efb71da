"""A row found by its unique name, or made."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from .peers import Peer
from .results import FOUND, MADE, Result
from .rows import execute

if TYPE_CHECKING:
    from .measurements import Bench

__all__ = ["finding"]


def finding(bench: Bench) -> Result:
    result = Result(
        "find_or_create",
        "Find or create",
        "µs",
        higher_is_better=False,
        what="A row is asked for by its unique name, in a context of its own: one that is there, and one that is "
        "made. Flask-SQLAlchemy by query, add and commit, which fails when two do it at once; Django by "
        "get_or_create.",
    )
    for way in bench.ways:
        with bench.peers(way) as contenders:
            for peer in contenders.values():
                execute(peer, "delete from tag where name like 'new %'")  # what it made before, by the same names
            for label, method in ((FOUND, "find_hit"), (MADE, "find_miss")):
                works = {name: functools.partial(_work, peer, method) for name, peer in contenders.items()}
                result.cases.append(bench.time_each(label, way, works, lambda seconds: seconds * 1e6))
    return result


def _work(peer: Peer, method: str) -> None:
    with peer.work():
        getattr(peer, method)()

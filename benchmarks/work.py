"""Work whose cost for the client is compared with plain's, in function calls and in instructions.

Neither depends on what else the machine does, so both can be promised. Each piece of work has an application context
of its own, as in a request, and no view around it: Flask's own calls would be added to both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .peers import PLAIN

PEERS = (PLAIN, "fictive")


@dataclass(frozen=True)
class Work:
    """`times` calls of the peer's `method`, with the keys 1, 2, 3 ... where it takes one."""

    label: str
    method: str
    times: int = 0
    by_key: bool = False
    """A read by key, which fictive does by a statement that it has prepared."""

    def on(self, peer: Any) -> Callable[[], None]:
        method = getattr(peer, self.method)
        keys = range(1, self.times + 1)

        def do() -> None:
            with peer.work():
                if keys:
                    for key in keys:
                        method(key)
                else:
                    method()

        return do


WORK = [
    Work("execute(select)", "select", 1),
    Work("execute(select) x 5", "select", 5),
    Work("execute(select) x 20", "select", 20),
    Work("Model.query x 5", "query", 5),
    Work("begin + INSERT", "insert"),
    Work("add + commit", "add_commit"),
    Work("begin + SELECT + UPDATE", "select_update"),
    Work("begin + begin_nested + INSERT", "savepoint_insert"),
    Work("read, begin + UPDATE", "read_update"),
    Work("find_or_create, made", "find_miss"),
    Work("get", "get", 1, by_key=True),
    Work("get x 5", "get", 5, by_key=True),
    Work("get x 20", "get", 20, by_key=True),
    Work("get_or_404", "get_or_404", 1, by_key=True),
    Work("find_or_create, found", "find_hit", by_key=True),
]


def chosen(labels: Sequence[str]) -> list[Work]:
    """The work of these labels; all of it where there are none."""
    return [work for work in WORK if work.label in labels or not labels]

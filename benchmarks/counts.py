"""Round trips, counted on the wire. `BENCHMARKS_SERVER=URL python -m benchmarks.counts DRIVER NAME…` prints JSON.

A process counts for one driver, because there is but one Django in a process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from fictive.testing.wire import Wire

from . import peers
from .peers import Peer, Setup
from .proxy import ROOT, child_environment
from .results import Counts
from .schema import Databases

# psycopg prepares a statement on its sixth run, which costs a round trip once.
WARM = 8
REPEATS = 4
NOT_OFFERED = "-"


@dataclass(frozen=True)
class Work:
    """Something to count: a view, or a method of the contender that is called, or returns what is called."""

    label: str
    path: str | None = None
    method: str | None = None
    prepared: bool = False
    safe: bool = False


WORK = [
    Work("view with 1 SELECT", path="/selects/1"),
    Work("view with 5 SELECTs", path="/selects/5"),
    Work("view with 1 SELECT, safe from dead connections", path="/selects/1", safe=True),
    Work("transaction: 1 INSERT", method="insert"),
    Work("transaction: SELECT + UPDATE", method="select_update"),
    Work("transaction + savepoint: 1 INSERT", method="savepoint_insert"),
    Work("SERIALIZABLE + timeouts: SELECT + UPDATE", method="serializable"),
    Work("find or create: found", method="find_hit"),
    Work("find or create: created", method="find_miss"),
    Work("set 100 many-to-many links, 10 changed", method="replace_links", prepared=True),
    Work("lock a table + UPDATE", method="lock_and_update"),
    Work("clean up 50 tables", method="clean_up"),
]

NOTES = [
    "Each number came out the same in every repetition, unless there are two.",
    "Safe from dead connections: pool_pre_ping, CONN_HEALTH_CHECKS; fictive needs no setting. Before it was counted, "
    "the server ended all connections, and the next request had to succeed.",
    "Find or create by hand, in Flask-SQLAlchemy, is the short way that fails when two do it at once.",
    "The links' owner and tags are loaded beforehand, in all contenders.",
]


def count(peer: Peer, work: Work, wire: Wire) -> str:
    """How many round trips `work` is, once everything is warm."""
    if work.method is not None and not hasattr(peer, work.method):
        return NOT_OFFERED
    found = [_count_once(peer, work, wire) for _ in range(WARM + REPEATS)][WARM:]
    return " or ".join(map(str, sorted(set(found))))


def _count_once(peer: Peer, work: Work, wire: Wire) -> int:
    if work.path is not None:
        with wire.record() as log:
            peer.request(work.path)
        return log.round_trips
    with contextlib.ExitStack() as recording:
        with peer.work():
            action: Callable[[], object] = getattr(peer, work.method or "")
            if work.prepared:
                action = action()  # type: ignore[assignment]
            log = recording.enter_context(wire.record())
            action()
        # Recorded to here: what the end of the context sends is part of it.
    return log.round_trips


def measure(
    server_url: str,
    driver: str,
    names: Sequence[str],
    work: Sequence[Work] = WORK,
) -> dict[str, dict[str, str]]:
    """By work and contender, in this process."""
    found: dict[str, dict[str, str]] = {each.label: {} for each in work}
    server = sa.make_url(server_url)
    assert server.host is not None
    with Databases(server_url, driver) as databases, Wire(server.host, server.port or 5432) as wire:
        for name in names:
            url = databases.url(name)
            for safe in (False, True):
                # Not more than one connection, so that the one that is warm is the one that is used.
                peer = peers.load(name)(Setup(wire.url(url), driver, pool_size=1, max_overflow=0, safe=safe))
                with contextlib.closing(peer):
                    for each in work:
                        if each.safe and safe:
                            found[each.label][name] = _count_safe(peer, each, wire, databases, url)
                        elif each.safe == safe:
                            found[each.label][name] = count(peer, each, wire)
    return found


def _count_safe(peer: Peer, work: Work, wire: Wire, databases: Databases, url: str) -> str:
    """The same, where a request after the death of all connections succeeds."""
    assert work.path is not None
    if peer.name == "raw":
        return NOT_OFFERED
    for _ in range(2):  # the first time may be the first time that the contender learns how it shows
        peer.request(work.path)
        databases.terminate(url)
        wire.close_connections()
        peer.request(work.path)
    return count(peer, work, wire)


def measure_all(server_url: str, drivers: Sequence[str], names: Sequence[str]) -> Counts:
    """By work, driver and contender, each driver in a process of its own, all of them at once."""
    counts = Counts(rows={work.label: {} for work in WORK}, notes=list(NOTES))
    with contextlib.ExitStack() as stack:
        started = {driver: stack.enter_context(_in_own_process(server_url, driver, names)) for driver in drivers}
        for driver, process in started.items():
            output = process.communicate()[0]
            if process.returncode:
                raise RuntimeError(f"counting on {driver} failed; its error is above")
            for label, row in json.loads(output).items():
                counts.rows[label][driver] = row
    return counts


def _in_own_process(server_url: str, driver: str, names: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.counts", driver, *names],
        cwd=ROOT,
        # In the environment rather than among the arguments, which others on the machine can read.
        env={**child_environment(), "BENCHMARKS_SERVER": server_url},
        stdout=subprocess.PIPE,
        text=True,
    )


if __name__ == "__main__":
    json.dump(measure(os.environ["BENCHMARKS_SERVER"], sys.argv[1], sys.argv[2:]), sys.stdout)

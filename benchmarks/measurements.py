"""What is timed. Each function measures one thing and returns a `Result`; `MEASUREMENTS` lists them."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from . import peers, rows
from .finding import finding
from .links import links
from .peers import NAMES, PLAIN, SLEEP, Peer, Setup
from .results import LOOPBACK, Case, Result
from .schema import Databases
from .timing import Crew, Progress, Spread, how_many, interleave, seconds_each


@dataclass(frozen=True)
class Scale:
    """How much is done. `seconds` is about how long plain takes for one sample: many short ones see the same drift."""

    rounds: int = 25
    seconds: float = 0.1
    warm: int = 10  # psycopg prepares a statement on its sixth run
    selects: tuple[int, ...] = (1, 2, 5, 10, 20)
    slow_rounds: int = 5
    slow_requests: int = 4  # of each thread
    latency_requests: int = 40  # of each thread
    objects: int = 1000
    links: int = 10_000
    rows: int = 100_000
    many_rows: int = 1_000_000
    row_rounds: int = 3
    entries: int = 1_000_000
    call_repeats: int = 20
    instruction_repeats: int = 10
    instruction_work: tuple[str, ...] = ()  # all


SMOKE = Scale(
    rounds=2,
    seconds=0,
    warm=1,
    selects=(1, 5),
    slow_rounds=1,
    slow_requests=1,
    latency_requests=4,
    objects=100,
    links=100,
    rows=600,
    many_rows=1200,
    row_rounds=2,
    entries=1000,
    call_repeats=1,
    instruction_repeats=1,
    instruction_work=("get",),
)


@dataclass
class Bench:
    """What a measurement needs: contenders that are connected, and how much to do."""

    databases: Databases
    driver: str
    scale: Scale
    progress: Progress
    ways: Mapping[str, sa.URL]  # to the same server
    names: Sequence[str] = NAMES

    @contextlib.contextmanager
    def peers(self, way: str, *, pool_size: int = 5, max_overflow: int = 10) -> Iterator[dict[str, Peer]]:
        """The contenders by name, each connected by `way`."""
        with contextlib.ExitStack() as stack:
            made: dict[str, Peer] = {}
            for name in self.names:
                at = self.ways[way]
                url = sa.make_url(self.databases.url(name)).set(host=at.host, port=at.port)
                setup = Setup(url.render_as_string(hide_password=False), self.driver, pool_size, max_overflow)
                made[name] = peers.load(name)(setup)
                stack.callback(made[name].close)
            yield made

    def told(self, text: str) -> Callable[[int, str], None]:
        def tell(number: int, name: str) -> None:
            self.progress.detail(f"{text} · round {number + 1} · {peers.title(name, self.driver)}")

        return tell

    def time_each(
        self, label: str, way: str, works: Mapping[str, Callable[[], object]], unit: Callable[[float], float]
    ) -> Case:
        """A case of `works`, each done as often as plain does it in a sample's time; `unit` makes it of seconds."""
        for work in works.values():
            seconds_each(work, self.scale.warm)
        count = how_many(works[PLAIN if PLAIN in works else next(iter(works))], self.scale.seconds)
        jobs = {name: functools.partial(seconds_each, work, count) for name, work in works.items()}
        found = interleave(jobs, self.scale.rounds, self.told(f"{way} · {label}"))
        return Case(label, way, {name: [unit(each) for each in samples] for name, samples in found.items()})


def per_second(seconds: float) -> float:
    return 1 / seconds


def microseconds(seconds: float) -> float:
    return seconds * 1e6


def views(bench: Bench) -> Result:
    result = Result(
        "views",
        "Requests per second by number of SELECTs",
        "requests/s",
        higher_is_better=True,
        what="A view that loads so many objects by key, asked by WSGI in the same process, one request at a time.",
    )
    for way in bench.ways:
        with bench.peers(way) as contenders:
            for number in bench.scale.selects:
                works = {
                    name: functools.partial(peer.request, f"/selects/{number}") for name, peer in contenders.items()
                }
                label = f"{number} SELECT{'' if number == 1 else 's'}"
                result.cases.append(bench.time_each(label, way, works, per_second))
    return result


def slow(bench: Bench) -> Result:
    threads, pool = 50, 5
    result = Result(
        "slow",
        "Slow views on a small pool",
        "requests/s",
        higher_is_better=True,
        what=f"{threads} threads ask a view that reads, waits {SLEEP * 1000:.0f} ms for somebody else's API, and "
        f"reads again. The pool has {pool} connections.",
    )
    requests = bench.scale.slow_requests
    with bench.peers(LOOPBACK, pool_size=pool, max_overflow=0) as contenders, _crews(contenders, threads) as crews:

        def job(name: str, times: int) -> float:
            def work() -> None:
                for _ in range(times):
                    contenders[name].request("/slow")

            return threads * times / crews[name].run(work)[0]

        for name in contenders:
            job(name, 1)
        jobs = {name: functools.partial(job, name, requests) for name in contenders}
        found = interleave(jobs, bench.scale.slow_rounds, bench.told(f"{threads} threads"))
        result.cases.append(Case(f"{threads} threads", LOOPBACK, found))
        held = {name: bench.databases.connections(peer.setup.url) for name, peer in contenders.items()}
    result.notes.append(
        "Connections to the server while it ran: "
        + ", ".join(f"{peers.title(name, bench.driver)} {number}" for name, number in held.items())
        + "."
    )
    return result


def latency(bench: Bench) -> Result:
    threads, percents = 8, (50, 95, 99)
    result = Result(
        "latency",
        f"Latency of the one-SELECT view under {threads} threads",
        "ms",
        higher_is_better=False,
        what=f"{threads} threads in one process, each asking again as soon as it has its answer. The threads share "
        "Python's GIL, so most of the time is spent waiting for it.",
        digits=2,
    )
    for way in bench.ways:
        with bench.peers(way) as contenders, _crews(contenders, threads) as crews:

            def job(name: str, crews: dict[str, Crew] = crews, peers: dict[str, Peer] = contenders) -> list[float]:
                request = functools.partial(peers[name].request, "/selects/1")

                def work() -> list[float]:
                    return [seconds_each(request, 1) for _ in range(bench.scale.latency_requests)]

                taken = sorted(one for each in crews[name].run(work)[1] for one in each)
                return [taken[math.ceil(len(taken) * percent / 100) - 1] * 1000 for percent in percents]

            for name in contenders:
                job(name)
            jobs = {name: functools.partial(job, name) for name in contenders}
            found = interleave(jobs, bench.scale.rounds, bench.told(way))
        for index, percent in enumerate(percents):
            samples = {name: [each[index] for each in rounds] for name, rounds in found.items()}
            result.cases.append(Case(f"p{percent}", way, samples))
    return result


def statements(bench: Bench) -> Result:
    result = Result(
        "statements",
        "Cost of a statement",
        "µs",
        higher_is_better=False,
        what="One object loaded by key, many times in one context. Flask-SQLAlchemy and F-S-Lite hold their "
        "connection, in one transaction; fictive is outside of one and gives its connection back each time.",
        digits=1,
    )
    with bench.peers(LOOPBACK) as contenders:
        for label, method in (("session.get", "get"), ("session.execute(select)", "select")):

            def job(name: str, count: int, method: str = method, peers: dict[str, Peer] = contenders) -> float:
                peer = peers[name]
                load = getattr(peer, method)
                with peer.work():
                    # The first one begins plain's transaction. Nobody keeps an object, so each is loaded anew.
                    seconds_each(lambda: load(peer.next_key()), bench.scale.warm)
                    return microseconds(seconds_each(lambda: load(peer.next_key()), count))

            first = PLAIN if PLAIN in contenders else next(iter(contenders))
            count = max(3, round(bench.scale.seconds * 1e6 / job(first, 10)))
            jobs = {name: functools.partial(job, name, count) for name in contenders}
            found = interleave(jobs, bench.scale.rounds, bench.told(label))
            result.cases.append(Case(label, LOOPBACK, found))
    return result


def transactions(bench: Bench) -> Result:
    result = Result(
        "transactions",
        "Transactions",
        "µs",
        higher_is_better=False,
        what="What a job does in an application context of its own. The server does not wait for its disk at COMMIT "
        "(fsync is off), which would add the same to all.",
    )
    for way in bench.ways:
        with bench.peers(way) as contenders:
            for label, method in (
                ("INSERT", "insert"),
                ("SELECT + UPDATE", "select_update"),
                ("savepoint INSERT", "savepoint_insert"),
            ):
                works = {name: functools.partial(_work, peer, method) for name, peer in contenders.items()}
                result.cases.append(bench.time_each(label, way, works, microseconds))
    return result


def _work(peer: Peer, method: str) -> None:
    with peer.work():
        getattr(peer, method)()


def memory(bench: Bench) -> Result:
    result = Result(
        "memory",
        "Memory per 1,000 loaded objects",
        "KiB",
        higher_is_better=False,
        what="What Python has allocated (tracemalloc) while the objects are held and their context is open. "
        "The driver alone gives tuples.",
    )
    objects = bench.scale.objects

    def job(peer: Peer) -> float:
        with peer.work():
            peer.load(2)  # what is allocated once
            gc.collect()
            tracemalloc.start()
            try:
                held = peer.load(objects)
                gc.collect()
                taken = tracemalloc.get_traced_memory()[0]
            finally:
                tracemalloc.stop()
            assert len(held) == objects
        return taken / 1024 * 1000 / objects

    with bench.peers(LOOPBACK) as contenders:
        jobs = {name: functools.partial(job, peer) for name, peer in contenders.items()}
        for warm in jobs.values():
            warm()
        found = interleave(jobs, min(3, bench.scale.rounds), bench.told("objects"))
    result.cases.append(Case("objects held", LOOPBACK, found))
    return result


def models(bench: Bench) -> Result:
    """Its module is imported last: where a model can be soft-deleted, each SELECT of opt-in sessions is looked at."""
    from . import models as of_models

    return of_models.models(bench)


MEASUREMENTS: dict[str, Callable[[Bench], Result]] = {
    "views": views,
    "slow": slow,
    "latency": latency,
    "statements": statements,
    "transactions": transactions,
    "memory": memory,
    "find_or_create": finding,
    "links": links,
    "insert_rows": rows.inserts,
    "upsert_rows": rows.upserts,
    "models": models,
}


def round_trip(bench: Bench, way: str) -> Spread:
    """How long SELECT 1 takes by `way`, in microseconds: what a round trip is."""
    engine = sa.create_engine(
        bench.ways[way].set(drivername=f"postgresql+{bench.driver}"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        cursor = connection.connection.cursor()
        samples = []
        for _ in range(200):
            start = time.perf_counter()
            cursor.execute("SELECT 1")
            samples.append(time.perf_counter() - start)
        cursor.close()
    engine.dispose()
    return Spread.of([microseconds(each) for each in samples[50:]])


@contextlib.contextmanager
def _crews(contenders: Mapping[str, Peer], size: int) -> Iterator[dict[str, Crew]]:
    """Threads for each contender, so that a connection that belongs to a thread is there in every round."""
    crews = {name: Crew(size) for name in contenders}
    try:
        yield crews
    finally:
        for name, crew in crews.items():
            crew.run(contenders[name].leave_thread)
            crew.close()

"""Measuring in rounds, so that whatever drifts meets all contenders alike, and what is made of the samples."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """The median of some samples, and the quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(low, median, high)


_LATENCY = Path("/dev/cpu_dma_latency")


def can_stay_awake() -> bool:
    return os.access(_LATENCY, os.W_OK)


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Keep the processors from sleeping while they wait (Linux documentation, "PM Quality Of Service Interface").

    A processor that has to be woken for each message adds to each round trip, in a virtual machine up to a tenth of a
    millisecond, and not to all contenders alike.
    """
    with _LATENCY.open("wb", buffering=0) as request:  # for as long as it is open
        request.write(struct.pack("i", 0))
        yield


def ratios(samples: Sequence[float], base: Sequence[float], *, higher_is_better: bool) -> Spread:
    """How many times as good as `base`, paired round by round."""
    if higher_is_better:
        return Spread.of([one / other for one, other in zip(samples, base, strict=True)])
    return Spread.of([other / one for one, other in zip(samples, base, strict=True)])


def interleave(
    contenders: Mapping[str, Callable[[], T]],
    rounds: int,
    told: Callable[[int, str], None] | None = None,
    *,
    generation: int = 1,
) -> dict[str, list[T]]:
    """Call each contender once a round, each round begun by another one; what they return, by contender.

    What the one before left behind, up to this `generation` of garbage, is not collected in the next one's time. A
    whole collection, 2, is for jobs that leave thousands of objects: it takes longer than a short sample.
    """
    found: dict[str, list[T]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if told:
                told(number, name)
            gc.collect(generation)
            found[name].append(contenders[name]())
    return found


def seconds_each(work: Callable[[], object], count: int) -> float:
    """How long `work` takes, over `count` times of it."""
    start = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - start) / count


def how_many(work: Callable[[], object], seconds: float) -> int:
    """How many times `work` is to be done to take about that long; at least 3."""
    if not seconds:
        return 3
    return max(3, round(seconds / seconds_each(work, 10)))


class Crew:
    """Threads that stay, and work at the same time: what a thread keeps for itself is there the next time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pool = ThreadPoolExecutor(size, thread_name_prefix="crew")
        self._barrier = threading.Barrier(size)

    def run(self, work: Callable[[], T]) -> tuple[float, list[T]]:
        """Do `work` once in each thread; the seconds from the first one's start to the last one's end."""

        def one() -> tuple[float, T, float]:
            self._barrier.wait()  # so that no thread does the work of two
            start = time.perf_counter()
            return start, work(), time.perf_counter()

        done = [future.result() for future in [self._pool.submit(one) for _ in range(self.size)]]
        return max(end for _, _, end in done) - min(start for start, _, _ in done), [found for _, found, _ in done]

    def close(self) -> None:
        self._pool.shutdown()


class Progress:
    """What is being measured, on standard error: one line on a terminal, one per measurement elsewhere."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._title = ""

    @contextlib.contextmanager
    def measuring(self, title: str) -> Iterator[None]:
        self._title = title
        started = time.monotonic()
        if self._terminal:
            self._show("")
        yield
        self._end(f"{title}: {time.monotonic() - started:.0f} s")

    def detail(self, text: str) -> None:
        if self._terminal:
            self._show(text)

    def _show(self, text: str) -> None:
        line = f"[{time.monotonic() - self._started:4.0f} s] {self._title}  {text}"[:110]
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def _end(self, text: str) -> None:
        start = "\r\x1b[K" if self._terminal else ""
        print(f"{start}[{time.monotonic() - self._started:4.0f} s] {text}", file=sys.stderr, flush=True)

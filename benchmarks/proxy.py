"""The delaying proxy in a process of its own: in ours it would compete with what is measured for the GIL."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from fictive.testing.wire import Wire

ROOT = Path(__file__).resolve().parent.parent


def child_environment() -> dict[str, str]:
    """The environment of a child that runs a part of this package."""
    path = [str(ROOT), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


@contextlib.contextmanager
def delayed(url: str, seconds: float) -> Iterator[sa.URL]:
    """Yield `url` by way of a proxy that adds `seconds` each way."""
    server = sa.make_url(url)
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.proxy", str(server.host), str(server.port), str(seconds)],
        cwd=ROOT,
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            answer = process.stdout.readline().split()
            if len(answer) != 2:
                raise RuntimeError("the delaying proxy did not start; its error is above")
            yield server.set(host=answer[0], port=int(answer[1]))
        finally:
            process.stdin.close()  # its sign to end


def main() -> None:
    host, port, seconds = sys.argv[1:]
    with Wire(host, int(port)) as wire:
        wire.delay = float(seconds)
        print(wire.host, wire.port, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            sys.stdin.read()


if __name__ == "__main__":
    main()

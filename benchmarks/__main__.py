"""The command line: `./run bench`, or `python -m benchmarks`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import sqlalchemy as sa

from fictive.testing import postgres

from . import cost, counts, report
from .instructions import ValgrindMissing, available
from .measurements import MEASUREMENTS, SMOKE, Bench, Scale, round_trip
from .peers import NAMES, installed
from .proxy import delayed
from .results import CALLS, DELAYED, INSTRUCTIONS, LOOPBACK, WAYS, Run
from .schema import Databases
from .timing import Progress, awake, can_stay_awake

DELAY = 0.0005  # seconds each way: two machines in one data centre
DRIVERS = ("psycopg2", "psycopg")
ROUND_TRIPS = "round-trips"
NAMES_OF_ALL = (ROUND_TRIPS, CALLS, INSTRUCTIONS, *MEASUREMENTS)


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 when something failed, but not when a target was missed: how fast it is here is no error."""
    options = _parser().parse_args(arguments)
    # Piped into something that does not speak UTF-8 the lines are less pretty, and nothing else.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    only = [*options.names, *(options.only or [])]
    if INSTRUCTIONS in only and not available():
        print(f"error: {ValgrindMissing()}", file=sys.stderr)
        return 1
    if options.awake and not can_stay_awake():
        print("error: --awake needs Linux, and root", file=sys.stderr)
        return 1
    try:
        with awake() if options.awake else contextlib.nullcontext():
            run = measure(options.driver, _scale(options), only=only, smoke=options.smoke, pythons=options.python)
        if options.awake:
            run.machine["processors"] = "kept awake"
    except postgres.EmbeddedServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("", file=sys.stderr)
        return 130
    print(report.as_text(run), flush=True)
    if options.json:
        Path(options.json).write_text(report.as_json(run), encoding="utf-8")
    if options.write:
        for path in report.write(run):
            print(f"wrote {path}", file=sys.stderr)
    return 1 if run.failures else 0


def measure(
    driver: str,
    scale: Scale,
    *,
    only: Sequence[str] | None = None,
    smoke: bool = False,
    pythons: Sequence[str] = (),
) -> Run:
    """Run the measurements named in `only`, by default all. One that fails is noted, and the others go on.

    Calls and instructions are also those of `pythons`, Pythons of other environments.
    """
    names = installed()
    progress = Progress()
    wanted = only or [name for name in NAMES_OF_ALL if name != INSTRUCTIONS or available()]
    with contextlib.ExitStack() as stack:
        # A server of its own: others that share one would be seen in the times.
        server = stack.enter_context(postgres.private_server())
        run = Run(smoke, driver, scale.rounds, report.machine(), {}, names)
        missing = [name for name in NAMES if name not in names]
        run.failures += [f"{name} is not installed: ./run setup" for name in missing]
        databases = stack.enter_context(Databases(server.url(), driver))
        run.versions = report.versions(str(databases.ask("show server_version")))
        ways = {LOOPBACK: sa.make_url(server.url()), DELAYED: stack.enter_context(delayed(server.url(), DELAY))}
        bench = Bench(databases, driver, scale, progress, ways, names)
        for way in ways:
            spread = round_trip(bench, way)
            run.machine[f"a round trip {WAYS[way]}"] = f"{spread.median:.0f} µs"
        if ROUND_TRIPS in wanted:
            with _noted(run, ROUND_TRIPS), progress.measuring(ROUND_TRIPS):
                run.counts = counts.measure_all(server.url(), _drivers(), names)
        for name, measured in cost.COSTS.items():
            for python in (sys.executable, *pythons) if name in wanted else ():
                with _noted(run, name), progress.measuring(name):
                    run.costs.append(measured(bench, python, [driver] if smoke else _drivers()))
        for name, measurement in MEASUREMENTS.items():
            if name in wanted:
                with _noted(run, name), progress.measuring(name):
                    run.results.append(measurement(bench))
    return run


@contextlib.contextmanager
def _noted(run: Run, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        run.failures.append(f"{name}: {type(error).__name__}: {error}")


def _drivers() -> list[str]:
    return [driver for driver in DRIVERS if importlib.util.find_spec(driver)]


def _scale(options: argparse.Namespace) -> Scale:
    scale = SMOKE if options.smoke else Scale()
    if options.rounds is not None:
        scale = dataclasses.replace(
            scale,
            rounds=options.rounds,
            slow_rounds=min(options.rounds, scale.slow_rounds),
            row_rounds=min(options.rounds, scale.row_rounds),
        )
    return scale


def _name(text: str) -> str:
    if text not in NAMES_OF_ALL:
        raise argparse.ArgumentTypeError(f"no measurement is called {text}")
    return text


def _python(text: str) -> str:
    if (found := shutil.which(text)) is None:
        raise argparse.ArgumentTypeError(f"there is no {text}")
    return os.path.abspath(found)  # the link in a virtual environment, not what it leads to


def _rounds(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least one round")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures fictive against plain Flask-SQLAlchemy, Flask-SQLAlchemy-Lite, Django and the driver "
        f"alone, on an embedded PostgreSQL of its own: on loopback, and with {DELAY * 1000:g} ms added each way. "
        "Prints tables, and what became of the targets. It wants a machine that does nothing else meanwhile.",
        epilog="Measurements: " + ", ".join(NAMES_OF_ALL) + ". By default all, instructions where "
        "valgrind is installed.",
    )
    parser.add_argument("names", nargs="*", type=_name, metavar="NAME", help="these measurements alone")
    parser.add_argument("--smoke", action="store_true", help="only see that everything runs; the times mean nothing")
    parser.add_argument(
        "--only",
        action="append",
        choices=NAMES_OF_ALL,
        metavar="NAME",
        help="the same; may be given several times",
    )
    parser.add_argument("--driver", choices=DRIVERS, default="psycopg2", help="to time on; default: %(default)s")
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        type=_python,
        metavar="PATH",
        help="count calls and instructions with this Python too, such as one with another SQLAlchemy",
    )
    parser.add_argument(
        "--awake",
        action="store_true",
        help="keep the processors from sleeping between messages, which takes long in a virtual machine; Linux, root",
    )
    parser.add_argument("--rounds", type=_rounds, metavar="N", help=f"default: {Scale().rounds}")
    parser.add_argument("--json", metavar="FILE", help="write everything, each sample included, to FILE")
    parser.add_argument("--write", action="store_true", help=f"write what the docs show, to {report.DOCS}")
    return parser


if __name__ == "__main__":
    sys.exit(main())

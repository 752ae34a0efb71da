"""The command line that the demo and the page share."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Callable

import sqlalchemy as sa

from fictive.testing.postgres import EmbeddedServerError


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog=prog, description=description)
    found.add_argument("--driver", choices=("psycopg2", "psycopg"), default="psycopg2", help="default: %(default)s")
    found.add_argument(
        "--api-ms",
        type=milliseconds,
        default=200,
        metavar="MS",
        help="how long somebody else's API takes to answer; default: %(default)s",
    )
    found.add_argument(
        "--latency-ms",
        type=milliseconds,
        default=0.5,
        metavar="MS",
        help="added each way between app and database; default: %(default)s, as within a data centre",
    )
    return found


def milliseconds(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 10_000:
        raise argparse.ArgumentTypeError("expected a number from 0 to 10000")
    return number


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("expected a number from 1 on")
    return number


def run(main: Callable[[], int], driver: str) -> int:
    """`main()`, with a sentence in place of a traceback for what is no mistake in the program.

    Ctrl-C and SIGTERM end it in order, so that the databases and the server are put away.
    """
    if importlib.util.find_spec(driver) is None:
        print(f"error: {driver} is not installed: ./run setup", file=sys.stderr)
        return 1
    # A shell starts background jobs with SIGINT ignored; Ctrl-C's signal is to end this one all the same.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return main()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (EmbeddedServerError, sa.exc.OperationalError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1

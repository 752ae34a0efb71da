from __future__ import annotations

import argparse
import faulthandler
import logging
import signal

from .run import PEERS, run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description="The ledger: what was told, and what is there."
    )
    parser.add_argument("--seconds", type=float, default=60, help="of work for each run (default 60)")
    parser.add_argument("--threads", type=int, default=20)
    parser.add_argument("--rate", type=float, default=10, help="faults a second (default 10)")
    parser.add_argument("--driver", action="append", choices=["psycopg2", "psycopg"], help="default: both")
    parser.add_argument("--peer", action="append", choices=sorted(PEERS), help="default: fictive")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--kind", action="append", help="a kind of fault, several times for more; default: all")
    parser.add_argument("--only", action="append", help="an operation, several times for more; default: all")
    parser.add_argument("--without", action="append", help="an operation to leave out")
    parser.add_argument("--writes-outside", default="commit", choices=["commit", "begin", "refuse"])
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    faulthandler.register(signal.SIGUSR1)
    logging.disable(logging.CRITICAL)  # tracebacks of lost connections by the hundred
    broken = 0
    for peer in options.peer or ["fictive"]:
        for driver in options.driver or ["psycopg2", "psycopg"]:
            report = run(
                peer,
                driver,
                seconds=options.seconds,
                threads=options.threads,
                rate=options.rate,
                seed=options.seed,
                kinds=options.kind,
                only=options.only,
                without=options.without,
                config={"FICTIVE_WRITES_OUTSIDE": options.writes_outside} if peer == "fictive" else {},
            )
            print(report, flush=True)
            if options.verbose:
                for what, count in sorted(report.by_kind.items()) + report.errors.most_common():
                    print(f"    {count:6} {what}")
            broken += sum(report.faulty.values()) if peer == "fictive" else 0
    return min(broken, 1)


if __name__ == "__main__":
    raise SystemExit(main())

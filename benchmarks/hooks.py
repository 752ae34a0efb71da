"""What 100 commit hooks add to a transaction. `python -m benchmarks.hooks [--smoke]`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from fictive.sqlalchemy import BorrowingPool, OptInSession, on_commit, transaction
from fictive.testing import postgres

HOOKS = 100


def seconds(session: sa_orm.Session, hooks: int) -> float:
    """One transaction with a statement, from BEGIN to the last hook."""
    start = time.perf_counter()
    with transaction(session):
        session.execute(sa.select(1))
        for _ in range(hooks):
            on_commit(session, _nothing)
    return time.perf_counter() - start


def _nothing() -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="only see that it runs")
    rounds = 3 if parser.parse_args(arguments).smoke else 2000
    with postgres.server() as pg:
        for driver in ("psycopg2", "psycopg"):
            engine = sa.create_engine(pg.url(driver=driver), poolclass=BorrowingPool)
            for kind in (OptInSession, sa_orm.Session):
                with kind(engine) as session:
                    for _ in range(10):
                        seconds(session, 1)
                    found: dict[int, list[float]] = {0: [], HOOKS: []}
                    for _ in range(rounds):  # in turns, so that both see the same drift
                        for hooks, samples in found.items():
                            samples.append(seconds(session, hooks))
                without, with_hooks = (statistics.median(found[hooks]) * 1e3 for hooks in (0, HOOKS))
                print(
                    f"{driver:9} {kind.__name__:13} {without:.3f} ms without hooks, "
                    f"{HOOKS} hooks add {with_hooks - without:.3f} ms"
                )
            engine.dispose()


if __name__ == "__main__":
    main()

"""From a COMMIT to the return of `wait_for_row_change`, with many waiters: `python -m benchmarks.waiting`.

`--smoke` only sees that it runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Sequence

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from fictive.sqlalchemy import OptInSession, notify_changes, wait_for_row_change
from fictive.testing import postgres
from fictive.testing.wire import Wire


class Base(sa_orm.DeclarativeBase):
    pass


class Job(Base):
    __tablename__ = "job"
    id: sa_orm.Mapped[int] = sa_orm.mapped_column(primary_key=True)
    step: sa_orm.Mapped[int]


notify_changes(Job)


def measure(driver: str, waiters: int, changes: int, *, watched: bool) -> tuple[list[float], int]:
    """Milliseconds from each COMMIT to the wake, and the statements sent in a second in which nothing changed.

    Each waiter waits for a row of its own. The statements are counted where it is `watched`, which takes time.
    """
    woken: dict[int, float] = {}
    with postgres.private_server() as server, Wire(server.host, server.port) as wire:
        engine = sa.create_engine(
            wire.url(server.url(driver=driver)) if watched else server.url(driver=driver), pool_size=20
        )
        Base.metadata.create_all(engine)
        with OptInSession(engine) as session, session.begin():
            session.add_all([Job(id=number, step=0) for number in range(1, waiters + 1)])
        asleep = threading.Semaphore(0)

        def wait(number: int) -> None:
            with OptInSession(engine) as session:
                job = session.get(Job, number)
                assert job is not None
                asleep.release()
                wait_for_row_change(session, Job, number, interval=3600, timeout=600)
                woken[number] = time.perf_counter()

        threads = [threading.Thread(target=wait, args=(number,), daemon=True) for number in range(1, waiters + 1)]
        for thread in threads:
            thread.start()
        for _ in threads:
            asleep.acquire()
        time.sleep(1)  # the first looks
        with wire.record() as idle:
            time.sleep(1)
        taken = []
        writer = sa.create_engine(server.url(driver=driver))
        with writer.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            for number in range(1, waiters + 1):
                connection.execute(sa.update(Job).where(Job.id == number).values(step=1))
                committed = time.perf_counter()
                if number <= changes:
                    threads[number - 1].join()
                    taken.append((woken[number] - committed) * 1000)
        for thread in threads:
            thread.join()
        writer.dispose()
        engine.dispose()
    return taken, len(idle.exchanges)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.waiting", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="only see that it runs")
    parser.add_argument("--driver", choices=("psycopg2", "psycopg"), default="psycopg2")
    options = parser.parse_args(arguments)
    waiters, changes = (10, 3) if options.smoke else (200, 100)
    _, idle = measure(options.driver, waiters, changes, watched=True)
    taken, _ = measure(options.driver, waiters, changes, watched=False)
    low, median, high = statistics.quantiles(taken, n=4)
    print(
        f"{options.driver}, {waiters} waiters: commit to wake {median:.1f} ms"
        f" ({low:.1f}-{high:.1f}, of {changes}); statements in an idle second: {idle}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Workers on one queue: `claim()` against FOR UPDATE that waits, and how soon a new job wakes one that sleeps.

`python -m benchmarks.queue [--smoke]`
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.orm import Mapped, mapped_column

from fictive.sqlalchemy import (
    BorrowingPool,
    OptInSession,
    claim,
    create_database,
    drop_database,
    notify_changes,
    wait_for_rows,
)
from fictive.testing import postgres

WORKERS = 32
JOBS = 10_000
BATCH = 10
WORK = 0.005  # seconds for a batch, within its transaction


class Base(sa_orm.DeclarativeBase):
    pass


class Job(Base):
    __tablename__ = "job"
    id: Mapped[int] = mapped_column(primary_key=True)
    done: Mapped[bool] = mapped_column(server_default=sa.false())
    __table_args__ = (sa.Index("job_waiting", "id", postgresql_where=sa.text("NOT done")),)


class Alarm(Base):
    """Jobs of a queue that is empty most of the time; its inserts pay for the trigger that wakes the workers."""

    __tablename__ = "alarm"
    id: Mapped[int] = mapped_column(primary_key=True)


notify_changes(Alarm, inserts=True)


@dataclasses.dataclass(frozen=True)
class Outcome:
    seconds: float
    done: int
    more_than_once: int

    @property
    def jobs_per_second(self) -> float:
        return self.done / self.seconds


def drain(engine: sa.Engine, *, workers: int, jobs: int, batch: int, work: float, skip_locked: bool) -> Outcome:
    """Let `workers` empty a queue of `jobs`, `batch` at a time."""
    with engine.begin() as connection:
        connection.execute(sa.text("TRUNCATE job RESTART IDENTITY"))
        connection.execute(sa.text("INSERT INTO job (done) SELECT false FROM generate_series(1, :n)"), {"n": jobs})
    statement = claim(sa.select(Job.id).where(~Job.done).order_by(Job.id), limit=batch, skip_locked=skip_locked)
    left = sa.select(sa.exists().where(~Job.done))
    found: Counter[int] = Counter()
    counting = threading.Lock()
    start = threading.Barrier(workers + 1)

    def run() -> None:
        with OptInSession(engine) as session:
            session.scalar(sa.select(1))  # connected before the time is taken
            start.wait()
            while True:
                with session.begin():
                    ids = session.scalars(statement).all()
                    if ids:
                        time.sleep(work)
                        session.execute(sa.update(Job).where(Job.id.in_(ids)).values(done=True))
                with counting:
                    found.update(ids)
                # who waited for rows that are done by then gets none of them, and has to ask again
                if not ids and not session.scalar(left):
                    return

    threads = [threading.Thread(target=run) for _ in range(workers)]
    for thread in threads:
        thread.start()
    start.wait()
    begun = time.perf_counter()
    for thread in threads:
        thread.join()
    return Outcome(time.perf_counter() - begun, len(found), sum(count > 1 for count in found.values()))


def wake(engine: sa.Engine, jobs: int) -> list[float]:
    """Milliseconds from just before each job's INSERT is sent until a worker, which slept, has claimed it."""
    claimed: list[float] = []
    sleeping = threading.Semaphore(0)

    def run() -> None:
        statement = claim(sa.select(Alarm), limit=1)
        with OptInSession(engine) as session:
            for _ in range(jobs):
                sleeping.release()
                wait_for_rows(session, statement, interval=3600)
                with session.begin():
                    session.delete(session.scalars(statement).one())
                    claimed.append(time.perf_counter())

    worker = threading.Thread(target=run)
    worker.start()
    sent = []
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        for _ in range(jobs):
            sleeping.acquire()
            time.sleep(0.02)  # it has looked, and waits
            sent.append(time.perf_counter())
            connection.execute(sa.insert(Alarm))
    worker.join()
    return [(later - sooner) * 1000 for sooner, later in zip(sent, claimed, strict=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 when a job was done twice or not at all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--driver", choices=("psycopg2", "psycopg"), default="psycopg2")
    parser.add_argument("--smoke", action="store_true", help="few jobs, to see that it runs")
    options = parser.parse_args(arguments)
    workers, jobs, work = (4, 200, 0.0) if options.smoke else (WORKERS, JOBS, WORK)
    right = True
    with postgres.server() if options.smoke else postgres.private_server(max_connections=100) as server:
        name = "fictive_benchmark_queue"
        drop_database(name, server_url=server.url(), force=True, missing_ok=True)
        create_database(name, server_url=server.url())
        engine = sa.create_engine(
            server.url(name, driver=options.driver), poolclass=BorrowingPool, pool_size=workers, max_overflow=0
        )
        try:
            Base.metadata.create_all(engine)
            speeds = []
            for title, skip_locked in (("FOR UPDATE SKIP LOCKED", True), ("FOR UPDATE", False)):
                outcome = drain(engine, workers=workers, jobs=jobs, batch=BATCH, work=work, skip_locked=skip_locked)
                right = right and outcome.done == jobs and not outcome.more_than_once
                speeds.append(outcome.jobs_per_second)
                print(
                    f"{title:24}{outcome.jobs_per_second:10,.0f} jobs/s; {outcome.done:,} of {jobs:,} jobs done,"
                    f" {outcome.more_than_once} more than once"
                )
            each = f"{BATCH} jobs at a time, {work * 1000:.0f} ms for them"
            print(f"{workers} workers, {each}: {speeds[0] / speeds[1]:.1f} times")
            taken = wake(engine, 3 if options.smoke else 300)
            print(
                f"a sleeping worker has a new job {statistics.median(taken):.1f} ms after its INSERT was sent"
                f" (of {len(taken)}, the slowest {max(taken):.1f} ms)"
            )
        finally:
            engine.dispose()
            drop_database(name, server_url=server.url(), force=True)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())

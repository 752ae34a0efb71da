"""A queue of jobs under kill -9: many processes claim, do and delete; each job is done once.

python -m tests.chaos.outbox --workers 32 --jobs 10000 --kills 100
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import time
from typing import Any

import psycopg
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fictive.sqlalchemy import BorrowingPool, claim, notify_changes, sessionmaker, wait_for_rows
from fictive.testing import postgres


class Base(DeclarativeBase):
    pass


class Job(Base):
    __tablename__ = "job"
    id: Mapped[int] = mapped_column(primary_key=True)


class Done(Base):
    """No constraint would stop a job from being done twice."""

    __tablename__ = "done"
    id: Mapped[int] = mapped_column(primary_key=True)
    job: Mapped[int]
    by: Mapped[int]


notify_changes(Job, inserts=True)


def work(url: str) -> None:
    """Claim, do and delete, until killed."""
    session = sessionmaker(sa.create_engine(url, poolclass=BorrowingPool))()
    waiting = claim(sa.select(Job).order_by(Job.id), limit=10)
    while True:
        with session.begin():
            jobs = session.scalars(waiting).all()
            for job in jobs:
                session.add(Done(job=job.id, by=os.getpid()))
                session.delete(job)
        session.expunge_all()
        if not jobs:
            wait_for_rows(session, claim(sa.select(Job)), interval="1s")


def start(url: str) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work(url)
    finally:
        os._exit(1)


def run(workers: int, jobs: int, kills: int, driver: str, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    with postgres.private_server(max_connections=3 * workers + 20) as server:
        url = server.url(driver=driver)
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        Base.metadata.create_all(engine)
        with psycopg.connect(server.url(), autocommit=True) as look:
            began = time.monotonic()
            running = [start(url) for _ in range(workers)]
            killed = died = 0
            try:
                # half of them at once, the others while all are at work
                look.execute("insert into job select n from generate_series(1, %s) n", [jobs // 2])
                left, added = jobs, jobs // 2
                while left or added < jobs:
                    for number, child in enumerate(running):
                        if os.waitpid(child, os.WNOHANG)[0]:
                            died += 1
                            running[number] = start(url)
                    if killed < kills:
                        number = rng.randrange(workers)
                        os.kill(running[number], signal.SIGKILL)
                        os.waitpid(running[number], 0)
                        running[number] = start(url)
                        killed += 1
                    if added < jobs:
                        some = min(jobs - added, max(1, jobs // 100))
                        look.execute("insert into job select %s + n from generate_series(1, %s) n", [added, some])
                        added += some
                    time.sleep(0.02)
                    left = (look.execute("select count(*) from job").fetchone() or (0,))[0]
                took = time.monotonic() - began
            finally:
                for child in running:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
            rows = look.execute("select count(*), count(distinct job), count(distinct by) from done").fetchone() or ()
        engine.dispose()
    return {
        "jobs": jobs,
        "done": rows[0],
        "different": rows[1],
        "by": rows[2],
        "killed": killed,
        "died": died,
        "seconds": round(took, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.outbox", description=__doc__)
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=10000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--driver", default="psycopg", choices=["psycopg2", "psycopg"])
    parser.add_argument("--seed", type=int, default=1)
    found = run(**vars(parser.parse_args()))
    print(json.dumps(found))
    return 0 if found["done"] == found["different"] == found["jobs"] else 1


if __name__ == "__main__":
    raise SystemExit(main())

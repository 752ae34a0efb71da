"""The queue of jobs: any number of workers, each job done once."""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa
from flask import current_app

from . import audit
from .database import db
from .models import Job, Order

MOST_TRIES = 3


def work(limit: int = 10) -> int:
    """Do at most `limit` jobs that no other worker has taken; returns how many there were.

    A job that fails leaves nothing but a note of its error, and is tried again, `MOST_TRIES` times in all.
    """
    with db.transaction():
        waiting = sa.select(Job).where(Job.done_at.is_(None), Job.tries < MOST_TRIES).order_by(Job.id)
        jobs = db.session.scalars(db.claim(waiting, limit=limit)).all()
        for job in jobs:
            try:
                with db.session.begin_nested():
                    KINDS[job.kind](job)
            except Exception as error:
                current_app.logger.exception("job %s failed", job.id)
                job.error = f"{type(error).__name__}: {error}"
            else:
                job.done_at = sa.func.now()
            job.tries += 1
        return len(jobs)


def _pack(job: Job) -> None:
    order = db.session.get_one(Order, job.order_id, with_for_update=True)
    if order.state == "new":  # and not canceled meanwhile
        order.parcel = current_app.config["CARRIER"](order.id)
        order.state = "packed"
        audit.record("order.packed", order.id, parcel=order.parcel)


KINDS: dict[str, Callable[[Job], None]] = {"pack": _pack}

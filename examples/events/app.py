"""A row's changes as server-sent events: `DATABASE_URL=… flask --app examples.events.app run`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from flask import Flask, Response, redirect, stream_with_context
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from werkzeug.wrappers import Response as Redirect

from fictive.errors import NotFoundError
from fictive.flask_sqlalchemy import OptInTransactionMixin
from fictive.sqlalchemy import notify_changes


class Base(DeclarativeBase):
    pass


class DB(OptInTransactionMixin, SQLAlchemy):
    pass


db = DB(model_class=Base)


class Job(db.Model):  # type: ignore[name-defined, misc]
    id: Mapped[int] = mapped_column(primary_key=True)
    progress: Mapped[int] = mapped_column(default=0)


notify_changes(Job)

START = """<!doctype html><html lang="en"><title>Jobs</title>
<form method="post" action="/jobs"><button>New job</button></form>"""

PAGE = """<!doctype html><html lang="en"><title>Job {key}</title><h1>Job {key}</h1>
<progress max="100" value="0" aria-label="progress"></progress>
<p>Open this page twice, and move the job on in one of them:
<button value="25">25 %</button> <button value="75">75 %</button> <button value="100">done</button>
<script>
for (const button of document.querySelectorAll("button"))
  button.onclick = () => fetch("/jobs/{key}/progress/" + button.value, {{method: "POST"}});
const events = new EventSource("/jobs/{key}/events"), bar = document.querySelector("progress");
events.onmessage = (event) => {{
  bar.value = JSON.parse(event.data).progress;
  if (bar.value === 100) events.close();
}};
</script>"""


def create_app(url: str | None = None) -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url or os.environ["DATABASE_URL"]
    db.init_app(app)
    with app.app_context():
        db.create_all()

    @app.get("/")
    def start() -> str:
        return START

    @app.post("/jobs")
    def create() -> Redirect:
        job = Job()
        db.session.add(job)
        db.session.commit()
        return redirect(f"/jobs/{job.id}", 303)

    @app.get("/jobs/<int:key>")
    def page(key: int) -> str:
        db.get_or_404(Job, key)
        return PAGE.format(key=key)

    @app.get("/jobs/<int:key>/events")
    def events(key: int) -> Response:
        db.get_or_404(Job, key)
        return Response(stream_with_context(_changes(key)), mimetype="text/event-stream")

    @app.post("/jobs/<int:key>/progress/<int:percent>")
    def advance(key: int, percent: int) -> tuple[str, int]:
        db.get_or_404(Job, key).progress = percent
        db.session.commit()
        return "", 204

    return app


def _changes(key: int) -> Iterator[str]:
    """Each state of the job until it is done. No connection is held between two of them."""
    job = db.session.get_one(Job, key)  # here, in the session that waits, which goes by what it has loaded
    yield _message(job)
    while job.progress < 100:
        try:
            job = db.wait_for_row_change(Job, key, timeout="15s")
        except TimeoutError:
            yield ": still here\n\n"  # this is how the server finds out that the browser has gone
        except NotFoundError:
            return
        else:
            yield _message(job)


def _message(job: Job) -> str:
    return f"data: {json.dumps({'progress': job.progress})}\n\n"

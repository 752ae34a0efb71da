"""The app's factory: `DATABASE_URL=… flask --app examples.tickets.app run`."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import sqlalchemy as sa
from flask import Flask, Response, abort, redirect, render_template, request, stream_with_context, url_for
from flask.cli import AppGroup
from werkzeug.wrappers import Response as Redirect

from . import worker
from .models import Concert, Order, Seat, db
from .selling import SoldOut, buy


def create_app(url: str | None = None) -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url or os.environ["DATABASE_URL"]
    db.init_app(app)
    app.cli.add_command(_commands())

    @app.get("/")
    def concerts() -> str:
        free = sa.select(sa.func.count()).where(Seat.concert_id == Concert.id, ~Seat.sold).scalar_subquery()
        found = db.session.execute(sa.select(Concert, free).order_by(Concert.id)).all()
        return render_template("tickets/concerts.html", concerts=found)

    @app.get("/concerts/<int:key>")
    def concert(key: int) -> str:
        found = db.get_or_404(Concert, key)
        seats = db.session.scalars(sa.select(Seat).where(Seat.concert_id == key).order_by(Seat.id)).all()
        return render_template("tickets/concert.html", concert=found, seats=seats)

    @app.post("/concerts/<int:key>/orders")
    def order(key: int) -> Redirect:
        db.get_or_404(Concert, key)
        buyer = request.form.get("buyer", "").strip() or abort(400, "Who is it for?")
        return redirect(url_for("show_order", key=buy(key, buyer).id), 303)

    @app.get("/orders/<uuid:key>")
    def show_order(key: uuid.UUID) -> str:
        return render_template("tickets/order.html", order=db.get_or_404(Order, key))

    @app.get("/orders/<uuid:key>/events")
    def events(key: uuid.UUID) -> Response:
        db.get_or_404(Order, key)
        return Response(stream_with_context(_until_printed(key)), mimetype="text/event-stream")

    @app.errorhandler(SoldOut)
    def sold_out(error: SoldOut) -> tuple[str, int]:
        return render_template("tickets/sold_out.html"), 409

    return app


def _until_printed(key: uuid.UUID) -> Iterator[str]:
    """Server-sent events: one when the ticket is printed. No connection is held until then."""
    order = db.session.get_one(Order, key)  # in the session that waits: what it has loaded is what it compares with
    while order.ticket is None:
        try:
            order = db.wait_for_row_change(Order, key, columns=["ticket"], timeout="15s")
        except TimeoutError:
            yield ": still here\n\n"  # fails when the browser has gone
    yield f"data: {order.ticket}\n\n"


def _commands() -> AppGroup:
    commands = AppGroup("tickets", help="What the box office does beside answering requests.")

    @commands.command()
    def init() -> None:
        """Make the tables, and a concert with three seats."""
        db.create_all()
        add_concert("Winterreise", seats=3)

    @commands.command()
    def work() -> None:
        """Print tickets as they are sold, until Ctrl-C."""
        worker.work()

    return commands


def add_concert(name: str, seats: int) -> int:
    """Add a concert with that many seats; returns its key."""
    with db.session.begin():
        concert = Concert(name=name)
        db.session.add(concert)
        db.session.flush()
        db.session.add_all(Seat(concert_id=concert.id, name=f"seat {number}") for number in range(1, seats + 1))
    return concert.id

"""The worker that prints tickets. Start as many as you like: each order is printed once."""

from __future__ import annotations

import sqlalchemy as sa

from .models import Order, Seat, db

WAITING = sa.select(Order).where(Order.ticket.is_(None)).order_by(Order.id)


def print_some(limit: int = 10) -> int:
    """Print at most `limit` tickets that no other worker has taken; returns how many."""
    with db.session.begin():
        orders = db.session.scalars(db.claim(WAITING, limit=limit, of=Order)).all()
        for order in orders:
            order.ticket = _printed(order.seat, order.buyer)
        return len(orders)


def work() -> None:
    """Print tickets as they are sold, until interrupted. Between two orders no connection is held."""
    while True:
        while print_some():
            pass
        db.wait_for_rows(db.claim(WAITING, of=Order))


def _printed(seat: Seat, buyer: str) -> str:
    return f"{seat.name}, {buyer}"

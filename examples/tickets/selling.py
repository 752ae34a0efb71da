"""Selling seats. Two buyers never get the same one, and no buyer is turned away while one is left."""

from __future__ import annotations

import sqlalchemy as sa

from .models import Order, Seat, db


class SoldOut(Exception):
    """All seats of the concert are sold."""


def buy(concert_id: int, buyer: str) -> Order:
    """Sell `buyer` the first free seat: 4 round trips. Raises `SoldOut`."""
    free = sa.select(Seat).where(Seat.concert_id == concert_id, ~Seat.sold).order_by(Seat.id)
    with db.session.begin():
        seat = db.session.scalar(db.claim(free, limit=1))  # passes over seats that others are buying
        if seat is None:
            # Others have the rest in hand. Wait for them: one of them may fail, and give a seat back.
            seat = db.session.scalars(db.claim(free, skip_locked=False)).first()
        if seat is None:
            raise SoldOut
        seat.sold = True
        order = Order(seat=seat, buyer=buyer)
        db.session.add(order)
    return order

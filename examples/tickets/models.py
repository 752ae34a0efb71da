"""Concerts, their seats, and orders. An order is also the job of the worker that prints the ticket."""

from __future__ import annotations

import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from fictive.flask_sqlalchemy import OptInTransactionMixin
from fictive.models import UUIDv7Mixin
from fictive.sqlalchemy import notify_changes


class Base(DeclarativeBase):
    pass


class DB(OptInTransactionMixin, SQLAlchemy):
    pass


db = DB(model_class=Base)


class Concert(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Seat(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    concert_id: Mapped[int] = mapped_column(sa.ForeignKey(Concert.id))
    name: Mapped[str]
    sold: Mapped[bool] = mapped_column(default=False)
    __table_args__ = (
        sa.UniqueConstraint("concert_id", "name"),
        sa.Index("seat_free", "concert_id", "id", postgresql_where=sa.text("NOT sold")),
    )


class Order(UUIDv7Mixin, db.Model):
    """Its key is random enough for URLs, and ordered by time, as the queue is."""

    __tablename__ = "ticket_order"
    seat_id: Mapped[int] = mapped_column(sa.ForeignKey(Seat.id), unique=True)
    buyer: Mapped[str]
    ticket: Mapped[str | None]  # what the worker has printed
    seat: Mapped[Seat] = relationship(lazy="joined", innerjoin=True)
    __table_args__ = (
        sa.Index("ticket_order_waiting", "id", postgresql_where=sa.text("ticket IS NULL")),
    )  # fmt: skip


notify_changes(Order, inserts=True)  # for the buyer's page, and for the worker

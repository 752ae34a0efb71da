"""What the shop keeps in its database."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column, relationship

from fictive.models import (
    PublicIdMixin,
    SoftDeleteMixin,
    TimestampMixin,
    UUIDv7Mixin,
    VersionMixin,
    unique_among_live,
)

from .database import db

STATES = ("new", "packed", "canceled")


class Customer(PublicIdMixin, SoftDeleteMixin, TimestampMixin, db.Model):
    """One who closed the account can open another with the same address; the orders stay with the old one."""

    __tablename__ = "customers"
    __table_args__ = (unique_among_live("email"),)

    email: Mapped[str] = mapped_column(sa.String(200))
    name: Mapped[str] = mapped_column(sa.String(100))


product_tags = db.Table(
    "product_tags",
    sa.Column("product_id", sa.ForeignKey("products.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("tag_id", sa.ForeignKey("tags.id", ondelete="CASCADE"), primary_key=True, index=True),
)


class Tag(db.Model):
    __tablename__ = "tags"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(30), unique=True)


class Product(PublicIdMixin, VersionMixin, TimestampMixin, db.Model):
    __tablename__ = "products"
    __table_args__ = (
        sa.CheckConstraint("price_cents >= 0", name="price_cents"),
        sa.Index(None, "name", "id"),  # the order of the catalogue's pages
    )

    sku: Mapped[str] = mapped_column(sa.String(40), unique=True)
    name: Mapped[str] = mapped_column(sa.String(100))
    price_cents: Mapped[int]

    tags: Mapped[list[Tag]] = relationship(secondary=product_tags, order_by=Tag.name)


class Stock(db.Model):
    """How many there are of a product.

    Not in `Product`: each sale would change its version, and whoever edits a description would be told so.
    """

    __tablename__ = "stock"
    __table_args__ = (sa.CheckConstraint("on_hand >= 0", name="on_hand"),)

    product_id: Mapped[int] = mapped_column(sa.ForeignKey("products.id", ondelete="CASCADE"), primary_key=True)
    on_hand: Mapped[int] = mapped_column(default=0, server_default="0")

    product: Mapped[Product] = relationship()


class Order(UUIDv7Mixin, VersionMixin, TimestampMixin, db.Model):
    """Its key is ordered by time, so "the newest first" is the order of the key."""

    __tablename__ = "orders"
    __table_args__ = (
        sa.CheckConstraint(f"state in {STATES}", name="state"),
        sa.Index(None, "customer_id", "id"),  # the pages of a customer's orders
    )

    customer_id: Mapped[int] = mapped_column(sa.ForeignKey("customers.id"))
    state: Mapped[str] = mapped_column(sa.String(10), default="new")
    note: Mapped[str] = mapped_column(sa.String(500), default="")
    parcel: Mapped[str | None] = mapped_column(sa.String(50))

    customer: Mapped[Customer] = relationship()
    lines: Mapped[list[OrderLine]] = relationship(
        cascade="all, delete-orphan", order_by="OrderLine.product_id", back_populates="order"
    )


class OrderLine(db.Model):
    __tablename__ = "order_lines"
    __table_args__ = (sa.CheckConstraint("quantity > 0", name="quantity"),)

    order_id: Mapped[uuid.UUID] = mapped_column(sa.ForeignKey("orders.id", ondelete="CASCADE"), primary_key=True)
    product_id: Mapped[int] = mapped_column(sa.ForeignKey("products.id"), primary_key=True, index=True)
    quantity: Mapped[int]
    price_cents: Mapped[int]  # on the day of the order

    order: Mapped[Order] = relationship(back_populates="lines")
    product: Mapped[Product] = relationship()


class Job(db.Model):
    """What is to be done for an order after its transaction; see `jobs`."""

    __tablename__ = "jobs"
    __table_args__ = (sa.Index("jobs_waiting_idx", "id", postgresql_where=sa.text("done_at IS NULL")),)

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(sa.String(20))
    order_id: Mapped[uuid.UUID] = mapped_column(sa.ForeignKey("orders.id", ondelete="CASCADE"), index=True)
    done_at: Mapped[datetime | None] = mapped_column(sa.DateTime(timezone=True))
    tries: Mapped[int] = mapped_column(default=0)
    error: Mapped[str | None]


class AuditEntry(db.Model):
    """Who did what; written in the transaction of what was done, so that there is neither one without the other."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True)
    at: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True), server_default=sa.func.now())
    who: Mapped[str] = mapped_column(sa.String(100))
    what: Mapped[str] = mapped_column(sa.String(50))
    subject: Mapped[str] = mapped_column(sa.String(100), index=True)
    details: Mapped[dict[str, Any]] = mapped_column(JSONB, default=dict)

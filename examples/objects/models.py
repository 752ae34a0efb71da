"""What the museum keeps in its database.

The models stand on a declarative base of their own and not on `db.Model`, so that two apps in one process, each with
its own `db`, share them. Nothing in them depends on fictive.
"""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

MOVING = "moving"
PLACES = ("stored", "shown", "lent")
"""The states that a user can ask for; between two of them an object is `MOVING`."""


class Base(DeclarativeBase):
    pass


object_tags = sa.Table(
    "object_tags",
    Base.metadata,
    sa.Column("object_id", sa.ForeignKey("objects.id"), primary_key=True),
    sa.Column("tag_id", sa.ForeignKey("tags.id"), primary_key=True),
)


class Tag(Base):
    __tablename__ = "tags"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(30), unique=True)


class Object(Base):
    __tablename__ = "objects"
    __table_args__ = (sa.CheckConstraint(f"state in {(*PLACES, MOVING)}", name="objects_state"),)
    # What the database fills in comes back with the INSERT or UPDATE itself, so no SELECT follows to learn it.
    __mapper_args__ = {"eager_defaults": True}

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(100), unique=True)
    state: Mapped[str] = mapped_column(sa.String(10), default="stored")
    updated_at: Mapped[datetime] = mapped_column(
        sa.DateTime(timezone=True), server_default=sa.func.now(), onupdate=sa.func.now()
    )

    tags: Mapped[list[Tag]] = relationship(secondary=object_tags)
    moves: Mapped[list[Move]] = relationship(order_by="Move.id")


class Move(Base):
    """A line in an object's logbook."""

    __tablename__ = "moves"

    id: Mapped[int] = mapped_column(primary_key=True)
    object_id: Mapped[int] = mapped_column(sa.ForeignKey("objects.id"), index=True)
    note: Mapped[str] = mapped_column(sa.String(100))
    insured_for: Mapped[int | None]

"""When a row was made and when it was last changed."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, declared_attr, mapped_column

__all__ = ["TimestampMixin"]

LAST = 100
"""The place of columns that every table has: after the table's own."""


class TimestampMixin:
    """`created_at` and `updated_at`, by the server's clock, with time zone.

    Both are `now()`, which is the start of the transaction (PostgreSQL documentation, "Current Date/Time"): all rows
    of one transaction get one time. `updated_at` moves with every UPDATE that goes through SQLAlchemy; one that is
    sent as text leaves it alone. Adds no statement to a flush: `created_at` and `updated_at` come back with the
    INSERT. After an UPDATE `updated_at` is read when next asked for, one round trip then; with
    `__mapper_args__ = {"eager_defaults": True}` it comes back with the UPDATE, which then is one statement a row.

    SQLite has no time zones: the values are UTC and naive there.
    """

    if TYPE_CHECKING:
        created_at: Mapped[datetime.datetime]
        updated_at: Mapped[datetime.datetime]
    else:
        # Attributes by functions without an annotation, in all of these mixins: to SQLAlchemy an annotation is a
        # field of the dataclass that the model may be, and a mixin that is none cannot have fields.

        @declared_attr
        def created_at(cls):
            return mapped_column(
                sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False, sort_order=LAST
            )

        @declared_attr
        def updated_at(cls):
            return mapped_column(
                sa.DateTime(timezone=True),
                server_default=sa.func.now(),
                onupdate=sa.func.now(),
                nullable=False,
                sort_order=LAST,
            )

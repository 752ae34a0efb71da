"""The schema that most tests use, on the opt-in class and, table for table the same, on plain Flask-SQLAlchemy."""

from __future__ import annotations

import types
from typing import Any

import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from fictive.flask_sqlalchemy import OptInTransactionMixin


class DB(OptInTransactionMixin, SQLAlchemy):
    pass


def define(db_class: type[SQLAlchemy], **options: Any) -> types.SimpleNamespace:
    """A database object of `db_class` with the models below, in a registry of its own."""

    class Base(DeclarativeBase):
        pass

    db = db_class(model_class=Base, **options)

    class Item(db.Model):  # type: ignore[name-defined, misc]
        """One table, one unique column, children with a foreign key checked at once."""

        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(unique=True)
        note: Mapped[str | None]
        children: Mapped[list[Child]] = relationship(back_populates="item", cascade="all, delete-orphan")
        tags: Mapped[list[Tag]] = relationship(secondary="item_tag")

    class Child(db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        item_id: Mapped[int] = mapped_column(sa.ForeignKey("item.id"))
        size: Mapped[int] = mapped_column(sa.CheckConstraint("size > 0"), default=1)
        item: Mapped[Item] = relationship(back_populates="children")

    class Tag(db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        label: Mapped[str] = mapped_column(unique=True)

    db.Table(
        "item_tag",
        sa.Column("item_id", sa.ForeignKey("item.id"), primary_key=True),
        sa.Column("tag_id", sa.ForeignKey("tag.id"), primary_key=True),
    )

    class Animal(db.Model):  # type: ignore[name-defined, misc]
        """Joined inheritance: one object is two rows."""

        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str]
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}

    class Dog(Animal):
        id: Mapped[int] = mapped_column(sa.ForeignKey("animal.id"), primary_key=True)
        breed: Mapped[str] = mapped_column(unique=True)
        __mapper_args__ = {"polymorphic_identity": "dog"}

    class Booking(db.Model):  # type: ignore[name-defined, misc]
        """A unique constraint that PostgreSQL checks at COMMIT."""

        id: Mapped[int] = mapped_column(primary_key=True)
        seat: Mapped[int]
        __table_args__ = (sa.UniqueConstraint("seat", deferrable=True, initially="DEFERRED"),)

    for model in (Item, Child, Tag, Animal, Dog, Booking):
        # Mapped[list[Child]] above names classes of this function
        model.__module__ = __name__
    names = {"Item": Item, "Child": Child, "Tag": Tag, "Animal": Animal, "Dog": Dog, "Booking": Booking}
    db.Model.registry.configure()
    return types.SimpleNamespace(db=db, **names)


opt_in = define(DB)
plain = define(SQLAlchemy)

db = opt_in.db
Item, Child, Tag, Animal, Dog, Booking = (
    getattr(opt_in, name) for name in ("Item", "Child", "Tag", "Animal", "Dog", "Booking")
)

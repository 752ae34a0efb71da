"""Models on `db.Model` for mypy, which cannot follow a base class made at run time. The page "Types" shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fictive.flask_sqlalchemy import BulkMixin, FilterByOrCreateMixin, OptInTransactionMixin


class Base(DeclarativeBase):
    pass


class DB(OptInTransactionMixin, FilterByOrCreateMixin, BulkMixin, SQLAlchemy):
    pass


db = DB(model_class=Base)

if TYPE_CHECKING:
    from fictive.flask_sqlalchemy import ModelMethods

    class Model(ModelMethods, Base):
        """What `db.Model` is when the program runs."""
else:
    Model = db.Model


class City(Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    size: Mapped[int] = mapped_column(default=0)


def grow(name: str) -> int:
    city = City.find_or_create(name=name)  # a City
    with db.session.begin():
        city.size += 1
    return city.size


def load(names: list[str]) -> list[City]:
    return City.insert_many([{"name": name} for name in names], returning="objects")

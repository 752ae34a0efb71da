"""The database class, and `db` for all the rest."""

from __future__ import annotations

import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase

from fictive.flask_sqlalchemy import BulkMixin, FilterByOrCreateMixin, OptInTransactionMixin
from fictive.models import naming_convention


class Base(DeclarativeBase):
    # A migration can only drop what it can name.
    metadata = sa.MetaData(naming_convention=naming_convention("postgresql"))


class DB(OptInTransactionMixin, FilterByOrCreateMixin, BulkMixin, SQLAlchemy):
    """Opt-in transactions, `Model.find_or_create()` and its like, `Model.insert_many()` and its like."""


db = DB(model_class=Base)

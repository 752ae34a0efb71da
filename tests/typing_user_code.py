"""User code, as an editor and a type checker see it. Checked by mypy --strict and pyright --strict, never run."""

from __future__ import annotations

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from typing_extensions import assert_type

from fictive.errors import TransactionRequired
from fictive.flask_sqlalchemy import FilterByOrCreateMixin, OptInTransactionMixin
from fictive.sqlalchemy import (
    FindOrCreateDescriptor,
    GetOrCreateDescriptor,
    OptInSession,
    Transaction,
    TransactionState,
    UpdateOrCreateDescriptor,
    WritesOutside,
    sessionmaker,
)


class Base(DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "thing"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class DB(OptInTransactionMixin, FilterByOrCreateMixin, SQLAlchemy):
    pass


db = DB(model_class=Base)
app = Flask(__name__)
db.init_app(app)


def view(id_: int) -> str:
    thing = db.get_or_404(Thing, id_)
    with db.session.begin() as transaction:
        thing.name = "new"
        with db.session.begin_nested():
            db.session.add(Thing(name="other"))
    assert_type(transaction, Transaction)
    assert_type(transaction.state, TransactionState)
    assert_type(db.session.in_transaction(), bool)
    with db.transaction(isolation_level="SERIALIZABLE", read_only=True), db.session.no_autoflush:
        pass
    with db.pinned() as session:
        assert_type(session, OptInSession)
    return thing.name


def script() -> None:
    engine = sa.create_engine("postgresql+psycopg://localhost/things")
    make_session = sessionmaker(engine, writes_outside="refuse")
    with make_session() as session:
        assert_type(session.writes_outside, WritesOutside)
        try:
            session.execute(sa.insert(Thing), {"name": "x"})
        except TransactionRequired:
            with session.begin():
                session.add(Thing(name="x"))


class Named(Base):
    """On any declarative base, in a line each."""

    __abstract__ = True
    find_or_create = FindOrCreateDescriptor(lambda: db.session)
    get_or_create = GetOrCreateDescriptor(lambda: db.session)
    update_or_create = UpdateOrCreateDescriptor(lambda: db.session)


class City(Named):
    __tablename__ = "city"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    size: Mapped[int]


def rows() -> None:
    assert_type(City.find_or_create(name="x"), City)
    assert_type(City.find_or_create({"size": 1}, name="x").size, int)
    assert_type(City.get_or_create(defaults={"size": lambda: 1}, name="x"), tuple[City, bool])
    assert_type(City.update_or_create({"size": 1}, create_defaults={}, name="x"), tuple[City, bool])
    assert_type(db.Model.find_or_create(id=1).metadata, sa.MetaData)

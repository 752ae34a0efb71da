"""User code, as an editor and a type checker see it. Checked by mypy --strict and pyright --strict, never run."""

from __future__ import annotations

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from typing_extensions import assert_type

from fictive.errors import TransactionRequired
from fictive.flask_sqlalchemy import OptInTransactionMixin
from fictive.sqlalchemy import OptInSession, Transaction, TransactionState, WritesOutside, sessionmaker


class Base(DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "thing"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class DB(OptInTransactionMixin, SQLAlchemy):
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

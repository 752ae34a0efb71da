"""Run by `test_compat_gevent.py`, in a gunicorn with greenlets: views that wait for the database."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import gevent
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fictive.flask_sqlalchemy import OptInTransactionMixin
from fictive.sqlalchemy import notify_changes


class Base(DeclarativeBase):
    pass


class DB(OptInTransactionMixin, SQLAlchemy):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


notify_changes(Item, inserts=True)
db = DB(model_class=Base)
app = Flask(__name__)
app.config.update(
    SQLALCHEMY_DATABASE_URI=os.environ["DATABASE_URL"], SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 20, "max_overflow": 0}
)
db.init_app(app)
with app.app_context():
    db.create_all()
WAIT = sa.text("select pg_advisory_xact_lock_shared(1)").execution_options(fictive_outside=True)


@app.get("/outside")
def outside() -> str:
    db.session.execute(WAIT)
    return "done"


@app.get("/block")
def block() -> str:
    with db.session.begin():
        db.session.add(Item(name="block"))
        db.session.flush()
        db.session.execute(WAIT)
    return "done"


@app.get("/timeout")
def timeout() -> str:
    for where in (db.session.begin, contextlib.nullcontext):
        with gevent.Timeout(0.1, False), where():
            db.session.add(Item(name="given up"))
            db.session.execute(WAIT)
            return "the lock was free"
    return "done"


@app.get("/new")
def new() -> str:
    db.wait_for_rows(Item)
    return "done"


@app.get("/state")
def state() -> dict[str, Any]:
    pool: Any = db.engine.pool
    return {
        "names": list(db.session.scalars(sa.select(Item.name))),
        "checked out": pool.checkedout(),
        "in transactions": db.session.scalar(
            sa.text(
                "select count(*) from pg_stat_activity where datname = current_database()"
                " and state like 'idle in transaction%'"
            )
        ),
    }

"""The tables of the ledger, on any Flask-SQLAlchemy class."""

from __future__ import annotations

import types
from typing import Any

import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ACCOUNTS = 12
BALANCE = 1000
JOBS = 6
KEYS = 40


def define(db_class: type[SQLAlchemy]) -> types.SimpleNamespace:
    """A database object of `db_class` with the models below."""

    class Base(DeclarativeBase):
        pass

    db = db_class(model_class=Base)

    class Account(db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        balance: Mapped[int] = mapped_column(sa.CheckConstraint("balance >= 0"))

    class Entry(db.Model):  # type: ignore[name-defined, misc]
        """What an operation wrote, by its token; `about` is the account, job or counter that it changed."""

        id: Mapped[int] = mapped_column(primary_key=True)
        token: Mapped[str] = mapped_column(index=True)
        kind: Mapped[str]
        about: Mapped[int | None]
        amount: Mapped[int] = mapped_column(default=0)

    class Job(db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        tries: Mapped[int] = mapped_column(default=0)

    class Counter(db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[int] = mapped_column(default=0)

    class Key(db.Model):  # type: ignore[name-defined, misc]
        """Found or created by a unique column."""

        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(unique=True)
        token: Mapped[str | None]

    class Loose(db.Model):  # type: ignore[name-defined, misc]
        """Found or created without a unique column."""

        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    class Setting(db.Model):  # type: ignore[name-defined, misc]
        """Upserted; the value is the token of who wrote it last."""

        name: Mapped[str] = mapped_column(primary_key=True)
        token: Mapped[str]

    return types.SimpleNamespace(
        db=db, Account=Account, Entry=Entry, Job=Job, Counter=Counter, Key=Key, Loose=Loose, Setting=Setting
    )


def fill(engine: sa.Engine, models: types.SimpleNamespace) -> None:
    """Make the tables, and what the operations work on."""
    models.db.metadata.create_all(engine)
    rows: list[tuple[Any, list[dict[str, Any]]]] = [
        (models.Account, [{"id": n, "balance": BALANCE} for n in range(1, ACCOUNTS + 1)]),
        (models.Job, [{"id": n, "tries": 0} for n in range(1, JOBS + 1)]),
        (models.Counter, [{"id": 1, "value": 0}]),
    ]
    with engine.begin() as connection:
        for model, values in rows:
            connection.execute(sa.insert(model), values)

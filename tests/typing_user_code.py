"""User code, as an editor and a type checker see it. Checked by mypy --strict and pyright --strict, never run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from typing_extensions import assert_type

from fictive import migrations
from fictive.errors import TransactionRequired
from fictive.flask_sqlalchemy import BulkMixin, FilterByOrCreateMixin, OptInTransactionMixin
from fictive.models import Repository
from fictive.rows import progress
from fictive.sqlalchemy import (
    FindOrCreateDescriptor,
    GetOrCreateDescriptor,
    InsertManyDescriptor,
    LockMode,
    OptInSession,
    Transaction,
    TransactionState,
    UpdateOrCreateDescriptor,
    Upserted,
    UpsertManyDescriptor,
    WritesOutside,
    advisory_lock,
    claim,
    cleanup_tables,
    create_database,
    insert_many,
    lock_tables,
    sessionmaker,
    transaction,
    update_many,
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


migrate = Migrate(app, db, **migrations.options())
migrate.configure(migrations.dated_file_names)


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
    with db.lock_tables([Thing], mode=LockMode.SHARE, timeout="5s") as locked, db.advisory_lock(1):
        assert_type(locked, sa_orm.Session)
        waiting = sa.select(Thing)
        assert_type(locked.scalars(claim(waiting, limit=3)).all(), Sequence[Thing])
    assert_type(lock_tables(db.session, [Thing]), AbstractContextManager[sa_orm.Session])
    assert_type(advisory_lock(db.session, (1, 2), shared=True), AbstractContextManager[sa_orm.Session])
    assert_type(create_database("a", server_url="postgresql://", exist_ok=True), bool)
    cleanup_tables(db.session, Base)
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


class BulkDB(OptInTransactionMixin, FilterByOrCreateMixin, BulkMixin, SQLAlchemy):
    pass


class BulkBase(DeclarativeBase):
    insert_many = InsertManyDescriptor(lambda: db.session)
    upsert_many = UpsertManyDescriptor(lambda: db.session)


class Row(BulkBase):
    __tablename__ = "row"
    id: Mapped[int] = mapped_column(primary_key=True)


def bulk() -> None:
    rows = ({"id": number} for number in range(3))
    assert_type(insert_many(db.session, Thing, rows), int)
    assert_type(insert_many(db.session, Thing, rows, returning="objects"), list[Thing])
    assert_type(Row.insert_many(rows), int)
    assert_type(Row.insert_many(rows, returning="objects", batch_size=10), list[Row])
    assert_type(Row.upsert_many(rows, key="id", duplicates="last"), Upserted)
    with progress.bar("Rows") as bar:
        assert_type(update_many(db.session, Thing, rows, progress=bar), int)


class Cities(Repository[City]):
    def large(self) -> list[City]:
        return self.list(City.size > 1000, order_by=City.size.desc())


def repositories() -> None:
    cities = Repository[City](db.session)
    assert_type(cities.get(1), City | None)
    assert_type(cities.get_or_raise(1).size, int)
    assert_type(cities.list(name="x"), list[City])
    assert_type(cities.keyset_page(10).items, list[City])
    assert_type(cities.page(2).total, int)
    assert_type(Cities(db.session).large(), list[City])
    assert_type(Cities(db.session).update(1, size=3), City)


@db.transaction
def bare(number: int) -> str:
    return str(number)


@db.transaction(retries=3, isolation_level="SERIALIZABLE", lock_timeout="5s")
def called(number: int) -> str:
    return str(number)


@db.transactional
def one_view() -> str:
    return ""


@db.transactional(statement_timeout=2.5)
def other_view() -> str:
    return ""


def blocks(session: Session) -> int:
    assert_type(bare(1), str)
    assert_type(called(1), str)
    assert_type(one_view() + other_view(), str)
    assert_type(db.run_transaction(lambda: 1, retries=2), int | None)
    db.on_commit(lambda: None)
    with db.transaction(durable=True) as block:
        assert_type(block, Transaction)
    with transaction(session, savepoint=False) as block:
        return 1

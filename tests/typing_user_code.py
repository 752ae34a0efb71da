"""User code, as an editor and a type checker see it. Checked by mypy --strict and pyright --strict, never run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import assert_type

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from fictive import migrations
from fictive.errors import TransactionRequired
from fictive.flask_sqlalchemy import BulkMixin, FilterByOrCreateMixin, OptInTransactionMixin
from fictive.models import FilterSet, Repository, SoftDeleteMixin, naming_convention, with_deleted
from fictive.rows import progress
from fictive.sqlalchemy import (
    FindOrCreateDescriptor,
    GetOrCreateDescriptor,
    InsertManyDescriptor,
    IsolationLevel,
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
    create_db_context,
    create_db_dependency,
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
    claimed = db.session.execute(db.claim(sa.select(Thing.id, Thing.name), limit=3)).one()
    assert_type((claimed[0], claimed[1]), tuple[int, str])
    db.session.execute(claim(sa.select(Thing.id, Thing.name), skip_locked=False))
    assert_type(lock_tables(db.session, [Thing]), AbstractContextManager[sa_orm.Session])
    assert_type(advisory_lock(db.session, (1, 2), shared=True), AbstractContextManager[sa_orm.Session])
    assert_type(create_database("a", server_url="postgresql://", exist_ok=True), bool)
    cleanup_tables(db.session, Base)
    with db.pinned() as session:
        assert_type(session, OptInSession)
    return thing.name


class OwnSession(Session):
    def own(self) -> int:
        return 1


def contexts(engine: sa.Engine) -> None:
    with create_db_context(sessionmaker(engine))() as session:
        assert_type(session, OptInSession)
    with create_db_context(db.session)() as session:
        assert_type(session, OptInSession)
    with create_db_context(sa_orm.sessionmaker(engine))() as plain:
        assert_type(plain, Session)
    with create_db_context(sa_orm.scoped_session(sa_orm.sessionmaker(engine, class_=OwnSession)))() as own:
        assert_type(own.own(), int)
    with create_db_context(lambda: OwnSession(engine))() as own:
        assert_type(own, OwnSession)
    with create_db_context(lambda: sa_orm.scoped_session(sa_orm.sessionmaker(engine, class_=OwnSession)))() as own:
        assert_type(own, OwnSession)
    assert_type(create_db_dependency(sessionmaker(engine))(), Iterator[OptInSession])


def wrong(mode: str, engine: sa.Engine) -> None:
    """Each line is an error, and is expected to be one."""
    db.lock_tables([Thing], timout="5s")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    db.lock_tables([Thing], mode="SHAR")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    lock_tables(db.session, [Thing], mode=mode)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.advisory_lock("key", share=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    db.claim(sa.select(Thing), skiplocked=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    db.transaction(isolation_level="SERIAL")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    db.transaction(readonly=True)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    transaction(db.session, retires=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    db.on_commit(len, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    naming_convention("oracle")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def levels(level: IsolationLevel) -> None:
    with db.transaction(isolation_level=level):
        db.on_commit(print, 1, sep="")


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
    assert_type(Repository(db.session, City).first(), City | None)
    assert_type(cities.create(City(name="x")), City)
    assert_type(cities.get_all(Filters({"name": "x"}), join=Note.thing, options=[]), list[City])
    assert_type(cities.get(1, with_for_update={"nowait": True}), City | None)
    cities.create(Thing())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    sa.select(Note).where(Note.is_deleted, ~Note.is_deleted)
    assert_type(Note().is_deleted, bool)
    assert_type(with_deleted(sa.select(Note)), sa.Select[Note])


class Filters(FilterSet):
    filters = [City.name]
    order = {"size": City.size}


class Note(SoftDeleteMixin, BulkBase):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    thing_id: Mapped[int] = mapped_column(sa.ForeignKey("thing.id"))
    thing: Mapped[Thing] = sa_orm.relationship()


def errors(app: Flask) -> None:
    db.init_error_handlers(app, retry_after=5)
    db.init_error_handlers(app, retry_after="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


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


@db.local_settings
def tenant_settings() -> dict[str, str | None]:
    return {"app.tenant": None}


assert_type(tenant_settings(), dict[str, str | None])
OptInSession(local_settings=lambda: {"statement_timeout": 2000, "app.admin": True})
db.local_settings(lambda: {"app.tenant": 0.5})  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]

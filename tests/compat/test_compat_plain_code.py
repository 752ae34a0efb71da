"""Code that calls add, flush, commit and rollback and never heard of fictive.

Each snippet runs on plain Flask-SQLAlchemy, on fictive under `FICTIVE_WRITES_OUTSIDE = "begin"`, where its outcome
must be the same, and under `"commit"`, where fictive must say so if a rollback came too late.
"""

# ruff: noqa: SIM105 - swallowed errors are written as people write them

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from fictive.errors import AlreadyCommittedWarning, FictiveWarning, TransactionRequired, UnsavedChangesWarning
from fictive.flask_sqlalchemy import OptInTransactionMixin


class DB(OptInTransactionMixin, SQLAlchemy):
    pass


def define(db_class: type[SQLAlchemy]) -> types.SimpleNamespace:
    class Base(DeclarativeBase):
        pass

    db = db_class(model_class=Base)

    class Account(db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(unique=True)
        balance: Mapped[int] = mapped_column(sa.CheckConstraint("balance >= 0"), default=0)
        entries = relationship("Entry", back_populates="account", cascade="all, delete-orphan")

    class Entry(db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        account_id: Mapped[int] = mapped_column(sa.ForeignKey("account.id"))
        amount: Mapped[int]
        account = relationship("Account", back_populates="entries")

    class Audit(db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        what: Mapped[str]

    class Seat(db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        number: Mapped[int]
        __table_args__ = (sa.UniqueConstraint("number", deferrable=True, initially="DEFERRED"),)

    @event.listens_for(Entry, "after_insert")
    def audit(mapper: Any, connection: sa.Connection, entry: Any) -> None:
        connection.execute(sa.insert(Audit).values(what=f"entry of {entry.amount}"))

    return types.SimpleNamespace(db=db, session=db.session, Account=Account, Entry=Entry, Audit=Audit, Seat=Seat)


PLAIN, FICTIVE = define(SQLAlchemy), define(DB)

SCHEMA = """
create table account (id serial primary key, name text not null unique, balance int not null check (balance >= 0));
create table entry (id serial primary key, account_id int not null references account, amount int not null);
create table audit (id serial primary key, what text not null);
create table seat (id serial primary key, number int not null unique deferrable initially deferred);
create function open_account(name text) returns int language sql
    as 'insert into account (name, balance) values (name, 7) returning id';
"""
DATA = """
truncate account, entry, audit, seat restart identity;
insert into account (name, balance) values ('cash', 100), ('bank', 100);
insert into seat (number) values (1);
"""


class Stop(Exception):
    """The program's own error, in the middle of its work."""


SNIPPETS: list[Any] = []


def snippet(commit: str, *, unsaved: bool = False) -> Callable[[Any], Any]:
    """Register one. `commit` says what it does under `"commit"`:

    `same`     the same as on plain
    `warns`    another outcome, and `AlreadyCommittedWarning` says so, because `rollback()` was called
    `stands`   another outcome that loses nothing: a write that stands alone, no autoflush, no expiry
    `refused`  `TransactionRequired`, nothing sent

    `unsaved`: the context ends with changes that no one wrote, of which fictive warns.
    """

    def register(function: Any) -> Any:
        SNIPPETS.append(pytest.param(function, commit, unsaved, id=function.__name__))
        return function

    return register


# -- add, flush, commit, rollback ----


@snippet("same")
def add_commit(t: Any) -> Any:
    account = t.Account(name="new")
    t.session.add(account)
    t.session.commit()
    return account.id, account.balance


@snippet("same")
def add_rollback_add_commit(t: Any) -> Any:
    first, second = t.Account(name="first"), t.Account(name="second")
    t.session.add(first)
    t.session.rollback()
    t.session.add(second)
    t.session.commit()
    return first in t.session, second in t.session, sa.inspect(first).transient


@snippet("warns")
def flush_then_rollback(t: Any) -> Any:
    account = t.Account(name="new")
    t.session.add(account)
    t.session.flush()
    t.session.rollback()
    return t.session.scalar(sa.select(sa.func.count()).select_from(t.Account))


@snippet("warns")
def flush_then_error_then_rollback(t: Any) -> Any:
    t.session.add(t.Account(name="new"))
    t.session.flush()
    t.session.add(t.Account(name="cash"))
    try:
        t.session.flush()
    except sa.exc.IntegrityError:
        t.session.rollback()
    t.session.add(t.Account(name="afterwards"))
    t.session.commit()


@snippet("warns")
def python_error_between_two_flushes(t: Any) -> Any:
    try:
        t.session.add(t.Account(name="new"))
        t.session.flush()
        raise Stop
    except Stop:
        t.session.rollback()
        raise


@snippet("same")
def commit_fails_rollback_commit(t: Any) -> Any:
    t.session.add_all([t.Account(name="new"), t.Account(name="cash")])
    try:
        t.session.commit()
    except sa.exc.IntegrityError:
        t.session.rollback()
    t.session.add(t.Account(name="afterwards"))
    t.session.commit()


@snippet("same")
def parent_and_children_one_fails(t: Any) -> Any:
    account = t.Account(name="new", entries=[t.Entry(amount=1), t.Entry(amount=None)])
    t.session.add(account)
    try:
        t.session.commit()
    except sa.exc.IntegrityError:
        t.session.rollback()
        return account in t.session


@snippet("same")
def flush_query_commit(t: Any) -> Any:
    account = t.Account(name="new", balance=5)
    t.session.add(account)
    t.session.flush()
    total = t.session.scalar(sa.select(sa.func.sum(t.Account.balance)))
    account.balance = total
    t.session.commit()
    return total, account.balance


@snippet("stands")
def others_see_nothing_before_commit(t: Any) -> Any:
    t.session.add(t.Account(name="new"))
    t.session.flush()
    before = t.look("select count(*) from account")
    t.session.commit()
    return before, t.look("select count(*) from account")


@snippet("same")
def change_and_commit(t: Any) -> Any:
    account = t.session.get(t.Account, 1)
    account.balance -= 30
    t.session.get(t.Account, 2).balance += 30
    t.session.commit()
    return account.balance


@snippet("same")
def change_and_rollback(t: Any) -> Any:
    account = t.session.get(t.Account, 1)
    account.balance = 1
    t.session.rollback()
    return account.balance, account in t.session, account in t.session.dirty


@snippet("warns")
def change_flush_rollback(t: Any) -> Any:
    account = t.session.get(t.Account, 1)
    account.balance = 1
    t.session.flush()
    t.session.rollback()
    return account.balance


@snippet("same")
def transfer_that_breaks_a_check(t: Any) -> Any:
    try:
        t.session.get(t.Account, 2).balance += 300
        t.session.get(t.Account, 1).balance -= 300
        t.session.commit()
    except sa.exc.IntegrityError:
        t.session.rollback()
    return [account.balance for account in t.session.scalars(sa.select(t.Account).order_by(t.Account.id))]


@snippet("warns")
def delete_flush_rollback(t: Any) -> Any:
    account = t.session.get(t.Account, 1)
    t.session.delete(account)
    t.session.flush()
    t.session.rollback()
    return account in t.session


@snippet("same")
def delete_rollback(t: Any) -> Any:
    account = t.session.get(t.Account, 1)
    t.session.delete(account)
    t.session.rollback()
    t.session.commit()
    return account in t.session, account.name


@snippet("warns")
def new_key_flush_rollback(t: Any) -> Any:
    account = t.session.get(t.Account, 1)
    account.id = 50
    t.session.flush()
    t.session.rollback()
    return sa.inspect(account).identity, t.session.get(t.Account, 1) is account


@snippet("same")
def merge_commit(t: Any) -> Any:
    t.session.merge(t.Account(id=1, name="petty cash", balance=3))
    t.session.merge(t.Account(id=9, name="new", balance=4))
    t.session.commit()


@snippet("same")
def expunge_after_flush_commit(t: Any) -> Any:
    t.session.add(t.Account(name="new"))
    t.session.flush()
    t.session.expunge_all()
    t.session.commit()


@snippet("warns")
def listener_writes_in_the_flush(t: Any) -> Any:
    t.session.add(t.Entry(account_id=1, amount=5))
    t.session.flush()
    seen = t.session.scalar(sa.select(sa.func.count()).select_from(t.Audit))
    t.session.rollback()
    return seen


@snippet("same")
def deferred_constraint_at_commit(t: Any) -> Any:
    t.session.add_all([t.Seat(number=2), t.Seat(number=1)])
    try:
        t.session.commit()
    except sa.exc.IntegrityError as error:
        t.session.rollback()
        return error.orig.diag.table_name


# -- errors that someone swallows ----


@snippet("stands")  # the second commit is on its own (A10)
def failed_commit_swallowed_then_commit(t: Any) -> Any:
    t.session.add_all([t.Account(name="new"), t.Account(name="cash")])
    try:
        t.session.commit()
    except sa.exc.IntegrityError:
        pass
    try:
        t.session.commit()
    except sa.exc.InvalidRequestError:
        t.session.rollback()
        return "commit says that nothing was saved"


@snippet("stands")  # the first flush has been committed, and nothing was rolled back
def failed_flush_swallowed_then_commit(t: Any) -> Any:
    t.session.add(t.Account(name="new"))
    t.session.flush()
    t.session.add(t.Account(name="cash"))
    try:
        t.session.flush()
    except sa.exc.IntegrityError:
        pass
    try:
        t.session.commit()
    except sa.exc.InvalidRequestError:
        t.session.rollback()
        return "commit says that nothing was saved"


@snippet("stands")
def failed_statement_swallowed_then_commit(t: Any) -> Any:
    t.session.execute(sa.update(t.Account).values(balance=1))
    try:
        t.session.execute(sa.insert(t.Account).values(name="cash"))
    except sa.exc.IntegrityError:
        pass
    # PostgreSQL answers COMMIT with ROLLBACK; plain does not say so, fictive does (A15)
    try:
        t.session.commit()
    except sa.exc.InvalidRequestError:
        t.session.rollback()


# -- savepoints ----


@snippet("same")
def savepoint_around_a_duplicate(t: Any) -> Any:
    t.session.add(t.Account(name="new"))
    t.session.flush()
    try:
        with t.session.begin_nested():
            t.session.add(t.Account(name="cash"))
    except sa.exc.IntegrityError:
        pass
    t.session.add(t.Account(name="afterwards"))
    t.session.commit()


@snippet("same")
def savepoint_first_duplicate_inside(t: Any) -> Any:
    for name in ("new", "cash", "another"):
        try:
            with t.session.begin_nested():
                t.session.add(t.Account(name=name))
        except sa.exc.IntegrityError:
            pass
    t.session.commit()


@snippet("same")
def savepoint_by_hand(t: Any) -> Any:
    savepoint = t.session.begin_nested()
    t.session.add(t.Account(name="undone"))
    t.session.flush()
    savepoint.rollback()
    savepoint = t.session.begin_nested()
    t.session.add(t.Account(name="kept"))
    savepoint.commit()
    t.session.commit()


@snippet("warns")
def flush_savepoint_rollback(t: Any) -> Any:
    t.session.add(t.Account(name="before"))
    t.session.flush()
    with t.session.begin_nested():
        t.session.add(t.Account(name="inside"))
    t.session.rollback()


@snippet("warns")
def savepoint_rollback(t: Any) -> Any:
    with t.session.begin_nested():
        t.session.add(t.Account(name="inside"))
    t.session.rollback()


@snippet("stands")  # pending changes become part of the block, which is a transaction of its own
def pending_then_savepoint_fails_then_commit(t: Any) -> Any:
    t.session.add(t.Account(name="before"))
    try:
        with t.session.begin_nested():
            t.session.add(t.Account(name="inside"))
            t.session.flush()
            raise Stop
    except Stop:
        pass
    t.session.commit()


@snippet("same")
def begin_as_a_block(t: Any) -> Any:
    with t.session.begin():
        t.session.add(t.Account(name="new"))
        t.session.flush()
    try:
        with t.session.begin():
            t.session.add(t.Account(name="undone"))
            t.session.flush()
            raise Stop
    except Stop:
        pass


# -- statements ----


@snippet("warns")
def query_update_rollback(t: Any) -> Any:
    count = t.Account.query.filter_by(name="cash").update({"balance": 1})
    t.session.rollback()
    return count, t.session.get(t.Account, 1).balance


@snippet("warns")
def query_delete_rollback(t: Any) -> Any:
    count = t.Account.query.filter(t.Account.name.like("%a%")).delete()
    t.session.rollback()
    return count


@snippet("warns")
def update_fetch_rollback(t: Any) -> Any:
    account = t.session.get(t.Account, 1)
    t.session.execute(
        sa.update(t.Account).values(balance=t.Account.balance + 1), execution_options={"synchronize_session": "fetch"}
    )
    during = account.balance
    t.session.rollback()
    return during, account.balance


@snippet("warns")
def insert_returning_rollback(t: Any) -> Any:
    key = t.session.scalar(sa.insert(t.Account).values(name="new", balance=0).returning(t.Account.id))
    t.session.rollback()
    return key


@snippet("warns")
def insert_in_a_cte_rollback(t: Any) -> Any:
    new = sa.insert(t.Account).values(name="new", balance=0).returning(t.Account.id).cte()
    key = t.session.scalar(sa.select(new.c.id))
    t.session.rollback()
    return key


@snippet("warns")
def bulk_save_rollback(t: Any) -> Any:
    t.session.bulk_save_objects([t.Account(name="a"), t.Account(name="b")])
    t.session.rollback()


@snippet("warns")
def bulk_insert_mappings_rollback(t: Any) -> Any:
    t.session.bulk_insert_mappings(t.Account, [{"name": "a"}, {"name": "b"}])
    t.session.rollback()


@snippet("warns")
def bulk_update_mappings_rollback(t: Any) -> Any:
    t.session.bulk_update_mappings(t.Account, [{"id": 1, "balance": 1}, {"id": 2, "balance": 2}])
    t.session.rollback()


@snippet("warns")
def insert_many_rollback(t: Any) -> Any:
    t.session.execute(sa.insert(t.Account), [{"name": "a"}, {"name": "b"}])
    t.session.rollback()


@snippet("warns")
def bulk_insert_then_duplicates_rollback(t: Any) -> Any:
    t.session.execute(sa.insert(t.Account), [{"name": "a"}, {"name": "b"}])
    try:
        t.session.execute(sa.insert(t.Account), [{"name": "c"}, {"name": "cash"}])
    except sa.exc.IntegrityError:
        t.session.rollback()
    t.session.commit()


@snippet("warns")
def text_dml_rollback(t: Any) -> Any:
    result = t.session.execute(sa.text("update account set balance = :b"), {"b": 1})
    t.session.rollback()
    return result.rowcount


@snippet("warns")
def text_dml_second_fails_rollback(t: Any) -> Any:
    try:
        t.session.execute(sa.text("update account set balance = balance + 300 where name = 'bank'"))
        t.session.execute(sa.text("update account set balance = balance - 300 where name = 'cash'"))
        t.session.commit()
    except sa.exc.IntegrityError:
        t.session.rollback()
        raise


@snippet("warns")
def function_that_writes_rollback(t: Any) -> Any:
    key = t.session.scalar(sa.select(sa.func.open_account("new")))
    t.session.rollback()
    return key


@snippet("warns")
def function_that_writes_by_itself_rollback(t: Any) -> Any:
    key = t.session.execute(sa.func.open_account("new")).scalar()
    t.session.rollback()
    return key


@snippet("warns")
def function_that_writes_in_text_rollback(t: Any) -> Any:
    key = t.session.scalar(sa.text("select open_account('new')"))
    t.session.rollback()
    return key


@snippet("same")
def function_that_writes_commit(t: Any) -> Any:
    key = t.session.scalar(sa.select(sa.func.open_account("new")))
    t.session.commit()
    return key


@snippet("refused")
def connection_of_the_session_rollback(t: Any) -> Any:
    connection = t.session.connection()
    connection.execute(sa.insert(t.Account).values(name="new", balance=0))
    t.session.execute(sa.text("update account set balance = 1"))
    seen = connection.scalar(sa.select(sa.func.sum(t.Account.balance)))
    t.session.rollback()
    return seen


@snippet("refused")
def connection_of_the_session_commit(t: Any) -> Any:
    cursor = t.session.connection().connection.cursor()
    cursor.execute("insert into account (name, balance) values ('new', 0)")
    cursor.close()
    t.session.commit()


# -- what has an effect only in a transaction ----

LOCKED = "select id from account where id = 1 for update skip locked"


@snippet("refused")
def for_update_change_commit(t: Any) -> Any:
    account = t.session.execute(sa.select(t.Account).filter_by(id=1).with_for_update()).scalar_one()
    locked = t.look(LOCKED) == []
    account.balance -= 1
    still = t.look(LOCKED) == []
    t.session.commit()
    return locked, still, t.look(LOCKED)


@snippet("refused")
def get_for_update_rollback(t: Any) -> Any:
    account = t.session.get(t.Account, 1, with_for_update=True)
    locked = t.look(LOCKED) == []
    t.session.rollback()
    return locked, account.balance, t.look(LOCKED)


@snippet("refused")
def refresh_for_update_commit(t: Any) -> Any:
    account = t.session.get(t.Account, 1)
    t.session.refresh(account, with_for_update=True)
    locked = t.look(LOCKED) == []
    account.balance += 1
    t.session.commit()
    return locked


@snippet("refused")
def query_for_update_end_of_context(t: Any) -> Any:
    t.Account.query.with_for_update().filter_by(id=1).one()
    return t.look(LOCKED)


@snippet("refused")
def advisory_lock_of_the_transaction(t: Any) -> Any:
    here = "(select oid from pg_database where datname = current_database())"
    count = f"select count(*) from pg_locks where locktype = 'advisory' and database = {here}"
    t.session.execute(sa.select(sa.func.pg_advisory_xact_lock(1)))
    held = t.look(count)
    t.session.commit()
    return held, t.look(count)


@snippet("refused")
def lock_table(t: Any) -> Any:
    locks = "select count(*) from pg_locks where mode = 'ExclusiveLock' and relation = 'account'::regclass"
    t.session.execute(sa.text("lock table account in exclusive mode"))
    held = t.look(locks)
    t.session.commit()
    return held, t.look(locks)


@snippet("refused")
def set_local(t: Any) -> Any:
    t.session.execute(sa.text("set local statement_timeout = '4321ms'"))
    during = t.session.scalar(sa.text("show statement_timeout"))
    t.session.rollback()
    return during, t.session.scalar(sa.text("show statement_timeout")) != during


@snippet("refused")
def temporary_table(t: Any) -> Any:
    t.session.execute(sa.text("create temporary table names (name text) on commit drop"))
    t.session.execute(sa.text("insert into names select name from account"))
    t.session.execute(sa.text("insert into account (name, balance) select name || '2', 0 from names"))
    t.session.commit()


# -- autoflush, expiry ----


@snippet("stands")
def query_sees_what_was_added(t: Any) -> Any:
    t.session.add(t.Account(name="new"))
    found = t.session.scalar(sa.select(t.Account).filter_by(name="new"))
    t.session.commit()
    return found is not None and found.id


@snippet("stands")
def query_sees_what_was_changed(t: Any) -> Any:
    t.session.get(t.Account, 1).balance = 1000
    total = t.session.scalar(sa.select(sa.func.sum(t.Account.balance)))
    t.session.commit()
    return total


@snippet("same")
def no_autoflush_block(t: Any) -> Any:
    t.session.add(t.Account(name="new"))
    with t.session.no_autoflush:
        found = t.Account.query.filter_by(name="new").first()
    t.session.commit()
    return found


@snippet("stands")
def commit_expires(t: Any) -> Any:
    account = t.session.get(t.Account, 1)
    account.name = "petty cash"
    t.session.commit()
    t.look("update account set balance = 77 where id = 1")
    return account.balance


@snippet("stands")
def rollback_expires(t: Any) -> Any:
    account = t.session.get(t.Account, 1)
    t.look("update account set balance = 77 where id = 1")
    t.session.rollback()
    return account.balance


@snippet("same")
def refresh_and_expire(t: Any) -> Any:
    account = t.session.get(t.Account, 1)
    t.look("update account set balance = 77 where id = 1")
    t.session.refresh(account)
    first = account.balance
    t.look("update account set balance = 78 where id = 1")
    t.session.expire_all()
    return first, account.balance


@snippet("same")
def change_while_reading_in_parts(t: Any) -> Any:
    t.look("insert into account (name, balance) select 'n' || i, i from generate_series(1, 25) as i")
    for account in t.Account.query.order_by(t.Account.id).yield_per(10):
        account.balance += 1
    t.session.commit()


@snippet("same")
def lazy_load_of_what_was_flushed(t: Any) -> Any:
    account = t.Account(name="new")
    t.session.add(account)
    t.session.flush()
    t.session.add(t.Entry(account_id=account.id, amount=3))
    t.session.flush()
    amounts = [entry.amount for entry in account.entries]
    t.session.commit()
    return amounts


# -- the end of the context ----


@snippet("same", unsaved=True)
def end_without_commit(t: Any) -> Any:
    t.session.add(t.Account(name="new"))
    t.session.get(t.Account, 1).balance = 1


@snippet("stands")
def end_after_flush(t: Any) -> Any:
    t.session.add(t.Account(name="new"))
    t.session.flush()


@snippet("warns")
def end_by_an_error_after_flush(t: Any) -> Any:
    t.session.add(t.Account(name="new"))
    t.session.flush()
    raise Stop


@snippet("stands")
def remove_after_flush(t: Any) -> Any:
    t.session.add(t.Account(name="new"))
    t.session.flush()
    t.session.remove()
    return t.session.get(t.Account, 1).name


@snippet("stands")
def close_after_update(t: Any) -> Any:
    t.session.execute(sa.update(t.Account).values(balance=1))
    t.session.close()
    return t.session.get(t.Account, 1).balance


@snippet("same")
def the_usual_wrapper(t: Any) -> Any:
    try:
        t.session.add(t.Account(name="new"))
        t.session.add(t.Account(name="cash"))
        t.session.commit()
    except Exception:
        t.session.rollback()
        raise
    finally:
        t.session.close()


# -- Flask-Dance's storage: forget the old token, add the new one, commit ----


def store_token(t: Any, name: str) -> None:
    t.session.query(t.Seat).filter_by(number=1).delete()
    t.session.add(t.Account(name=name))
    t.session.commit()


@snippet("same")
def flask_dance_stores_a_token(t: Any) -> Any:
    store_token(t, "token")


@snippet("warns")
def flask_dance_insert_fails(t: Any) -> Any:
    try:
        store_token(t, "cash")
    except sa.exc.IntegrityError:
        t.session.rollback()
        raise


# -- events ----

HOOKS = "before_commit after_commit after_rollback after_soft_rollback before_flush after_flush".split()


def record_events(t: Any) -> list[str]:
    seen: list[str] = []
    for name in HOOKS:
        event.listen(t.session(), name, lambda *args, _name=name: seen.append(_name))
    return seen


@snippet("same")
def events_of_add_commit(t: Any) -> Any:
    seen = record_events(t)
    t.session.add(t.Account(name="new"))
    t.session.commit()
    return seen


@snippet("warns")
def events_of_a_longer_story(t: Any) -> Any:
    seen = record_events(t)
    t.session.get(t.Account, 1).balance = 1
    t.session.flush()
    with t.session.begin_nested():
        t.session.add(t.Account(name="new"))
    t.session.rollback()
    t.session.add(t.Account(name="cash"))
    with pytest.raises(sa.exc.IntegrityError):
        t.session.commit()
    t.session.rollback()
    return seen


# -- the runner ----


@dataclasses.dataclass
class Outcome:
    returned: Any
    error: type[BaseException] | None
    rows: dict[str, Any]


@dataclasses.dataclass
class Run:
    outcome: Outcome
    error: BaseException | None
    warnings: list[type[Warning]]


@pytest.fixture
def run(database_url: str, look: Callable[..., list[Any]]) -> Any:
    """`run(snippet, way)` on the same rows each time."""
    look(SCHEMA)

    def run_(function: Any, way: str) -> Run:
        look(DATA)
        models = PLAIN if way == "plain" else FICTIVE
        app = Flask("plain_code")
        app.config["SQLALCHEMY_DATABASE_URI"] = database_url
        if way != "plain":
            app.config["FICTIVE_WRITES_OUTSIDE"] = way
        models.db.init_app(app)
        returned, error = None, None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with app.app_context():
                    returned = function(types.SimpleNamespace(**vars(models), look=look))
            except (Stop, sa.exc.SQLAlchemyError) as raised:
                error = raised
        with app.app_context():
            checked_out = models.db.engine.pool.checkedout()
            models.db.engine.dispose()
        assert checked_out == 0
        rows = {
            "account": look("select id, name, balance from account order by id"),
            "entry": look("select account_id, amount from entry order by id"),
            "audit": look("select what from audit order by id"),
            "seat": look("select number from seat order by id"),
        }
        outcome = Outcome(returned, type(error) if error else None, rows)
        return Run(outcome, error, [warning.category for warning in caught])

    return run_


@pytest.mark.parametrize(("function", "commit", "unsaved"), SNIPPETS)
def test_a23_begin_is_what_plain_code_expects(run: Any, function: Any, commit: str, unsaved: bool) -> None:
    plain, begin = run(function, "plain"), run(function, "begin")
    assert begin.outcome == plain.outcome
    said = [category for category in begin.warnings if issubclass(category, FictiveWarning)]
    assert said == ([UnsavedChangesWarning] if unsaved else [])
    assert [category for category in begin.warnings if category not in said] == plain.warnings


@pytest.mark.parametrize(("function", "commit", "unsaved"), SNIPPETS)
def test_a23_commit_says_where_rollback_comes_too_late(run: Any, function: Any, commit: str, unsaved: bool) -> None:
    plain, alone = run(function, "plain"), run(function, "commit")
    said = [category for category in alone.warnings if issubclass(category, FictiveWarning)]
    if commit == "warns":
        assert alone.outcome != plain.outcome, "plain and fictive agree: this snippet is `same`"
        assert AlreadyCommittedWarning in said
    elif commit == "refused":
        assert isinstance(alone.error, TransactionRequired), alone
        assert said == []
    else:
        assert (alone.outcome == plain.outcome) == (commit == "same"), (plain.outcome, alone.outcome)
        assert said == ([UnsavedChangesWarning] if unsaved else [])


def test_the_sessions_are_the_real_ones() -> None:
    assert type(PLAIN.session) is sa_orm.scoped_session
    assert PLAIN.session is not FICTIVE.session

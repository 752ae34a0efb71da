"""Rows that are deleted and still there."""

from __future__ import annotations

import datetime
import itertools
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy import event
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import Mapped, declared_attr, mapped_column

from ..rows.attributes import WITH_DELETED
from ..session import private
from ..session.session import OptInSession
from .timestamps import LAST

__all__ = ["SoftDeleteMixin", "hide_deleted", "unique_among_live", "with_deleted"]

_Statement = TypeVar("_Statement", bound=Any)


class SoftDeleteMixin:
    """`deleted_at`: when the row was deleted, by the server's clock; NULL while it lives.

    Deleted rows are hidden from SELECTs, joins, lazy loads and eager loads of every opt-in session, from what its ORM
    `insert().from_select()` copies, and from its ORM `update()` and `delete()` by criteria; other sessions hide them
    after `hide_deleted(session)`. Statements on other models are not touched, nor are those of Core.

    `is_deleted` is for objects and for queries: `with_deleted(select(Item).where(Item.is_deleted))`. A model that
    looks for its deleted rows often sets `__index_deleted_at__ = True`, for an index over `deleted_at`.

    What it means elsewhere:

    * To purge deleted rows: `session.execute(with_deleted(delete(Item).where(Item.deleted_at < day)))`.
    * `session.delete(obj)` deletes the row, whether or not it is marked; so does a bulk update by primary key.
    * An object that the session has loaded stays in it: `session.get` and a many-to-one hand it out from memory.
    * `session.merge()` of a deleted row that is not loaded finds none, and INSERTs: an `IntegrityError`.
    * Rows that point to a deleted one stay, and cascades do not run: delete them too where that is wanted.
    * A deleted row keeps its unique keys. `unique_among_live` makes a key that can be given again.
    * `find_or_create` and its family find, change and make live rows only, in any session. With such a key a deleted
      row is not in the way. With an ordinary unique constraint it is: they raise `KeyOfDeletedRow`, and so does
      `upsert_many`, unless its rows give `deleted_at` themselves, which says what is to become of it.
    * `update_many` sets what it is given, in deleted rows too.
    * `cleanup_tables` empties the table, deleted rows included.
    """

    # `find_or_create` is about live rows, in any session, and so may go by a key that is unique among them
    __deleted_when_set__ = "deleted_at"

    if TYPE_CHECKING:
        deleted_at: Mapped[datetime.datetime | None]
    else:

        @declared_attr
        def deleted_at(cls):
            index = bool(getattr(cls, "__index_deleted_at__", False)) or None
            return mapped_column(sa.DateTime(timezone=True), nullable=True, index=index, sort_order=LAST)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hide_deleted(OptInSession)

    @hybrid_property
    def is_deleted(self) -> bool:
        """Whether the row is marked; in a query an SQL condition."""
        return self.deleted_at is not None

    @is_deleted.inplace.expression
    @classmethod
    def _is_deleted_in_sql(cls) -> sa.ColumnElement[bool]:
        return cls.deleted_at.is_not(None)

    def soft_delete(self) -> None:
        """Mark the row deleted, with the next flush, by the server's clock. Until then `deleted_at` is this process's
        time. Of a row that is deleted already the time stays."""
        if self.deleted_at is None:
            self.deleted_at = _Now.of(datetime.datetime.now(datetime.UTC))

    def restore(self) -> None:
        """Let the row live again, with the next flush. A unique key that was given again meanwhile raises there."""
        self.deleted_at = None


class _Now(datetime.datetime):
    """A time to look at, and the server's `now()` for SQLAlchemy, which writes it. What is made of it is a time alone,
    such as thirty days later: Python makes it by calling the class, and in `replace()` by the type alone."""

    def __new__(cls, *args: Any, **kwargs: Any) -> datetime.datetime:  # type: ignore[misc]
        return datetime.datetime(*args, **kwargs)

    @classmethod
    def of(cls, time: datetime.datetime) -> _Now:
        day = (time.year, time.month, time.day)
        return super().__new__(cls, *day, time.hour, time.minute, time.second, time.microsecond, time.tzinfo)

    def replace(self, *args: Any, **kwargs: Any) -> datetime.datetime:  # type: ignore[override]
        return datetime.datetime.combine(self.date(), self.timetz()).replace(*args, **kwargs)

    def __clause_element__(self) -> sa.ColumnElement[datetime.datetime]:
        return sa.func.now()

    def __reduce_ex__(self, protocol: Any) -> Any:  # what is copied or pickled is a time
        return datetime.datetime.combine, (self.date(), self.timetz())


def with_deleted(statement: _Statement) -> _Statement:
    """`statement`, a SELECT, a `Query`, or an ORM `update()`, `delete()` or `insert().from_select()`, with deleted
    rows among its own, and among what it loads eagerly.

    For `session.get` give `execution_options={"fictive_with_deleted": True}`.
    """
    result: _Statement = statement.execution_options(**{WITH_DELETED: True})
    return result


def hide_deleted(target: Any) -> None:
    """Hide deleted rows from the sessions of `target`: a session, a session class, a `sessionmaker` or a
    `scoped_session`. Opt-in sessions do it by themselves."""
    if isinstance(target, sa_orm.scoped_session):
        target = target.session_factory
    private.listen_once(target, "do_orm_execute", _add_criteria)


def unique_among_live(*columns: str, name: str | None = None) -> sa.Index:
    """A unique index over the rows that are not deleted, for `__table_args__`: `unique_among_live("email")`."""
    live = sa.text("deleted_at IS NULL")
    return sa.Index(name, *columns, unique=True, postgresql_where=live, sqlite_where=live)


def _is_live(cls: Any) -> Any:
    """Not a lambda: objects keep the option for their lazy loads, and are pickled with it."""
    return cls.deleted_at.is_(None)


LIVE = sa_orm.with_loader_criteria(SoftDeleteMixin, _is_live, include_aliases=True)


# find_or_create() names it itself, for sessions that do not hide; then it is not added once more
SoftDeleteMixin.__live_rows__ = LIVE  # type: ignore[attr-defined]


def _add_criteria(state: sa_orm.ORMExecuteState) -> None:
    if state.is_select:
        private.rest_of_a_stream(state)
    elif state.is_executemany:
        return
    if state.is_column_load or state.execution_options.get(WITH_DELETED):
        return
    statement = private.resolved(state.statement)
    if not isinstance(statement, _HIDING) or (isinstance(statement, sa.Insert) and statement.select is None):
        return
    if _may_read_deletable(statement):
        state.statement = _hide_in_exists(statement).options(LIVE)
        if isinstance(statement, sa.CompoundSelect):  # SQLAlchemy 2.0 leaves its options out of the cache's key
            state.update_execution_options(compiled_cache=None)


_HIDING = (sa.Select, sa.CompoundSelect, sa_orm.FromStatement, sa.Update, sa.Delete, sa.Insert)
_JOINED = frozenset({"joined", False})
_names: set[str] = set()
"""Of the tables of models with the mixin. One whose model is gone is looked for in vain, which changes nothing."""
_columns: weakref.WeakKeyDictionary[Any, sa.Column[Any]] = weakref.WeakKeyDictionary()
"""Their `deleted_at`, by table."""


@event.listens_for(SoftDeleteMixin, "after_mapper_constructed", propagate=True)
def _note_table(mapper: sa_orm.Mapper[Any], _: type[Any]) -> None:
    column = mapper.columns["deleted_at"]
    _names.add(str(mapper.local_table))
    _columns[column.table] = column


def _may_read_deletable(statement: Any) -> bool:
    """Whether a model with the mixin takes part, by its table or by what may be joined to load it along.

    Other eager loads and lazy loads are statements of their own.
    """
    if options := private.options_of(statement):
        # a lazy load has those of the SELECT that loaded its parent
        return all(private.criterion_of(option) is not _is_live for option in options)
    elements = [statement]
    for element in elements:  # and those that are found on the way
        if isinstance(element, sa.Table):
            if element.fullname in _names:
                return True
            mapper = private.mapper_of(element)
            if mapper is not None and any(each.lazy in _JOINED for each in mapper.relationships):
                return True
            continue
        # of `join(Item.owner)` the condition is there, and not the table
        table = getattr(element, "table", None)
        table = getattr(table, "element", table)
        if isinstance(table, sa.Table) and table.fullname in _names:
            return True
        if not isinstance(element, (sa.Column, sa.BindParameter)):
            elements.extend(element.get_children())
    return False


def _hide_in_exists(statement: Any) -> Any:
    """On SQLAlchemy 2.0, whose loader criteria do not reach into `any()` and `has()`: those with the condition."""
    if _ON_21:
        return statement

    def with_condition(element: Any, **kwargs: Any) -> Any:
        if not isinstance(element, sa.Exists):
            return None
        inner = sa.sql.visitors.replacement_traverse(element, {"stop_on": [element]}, with_condition)
        for selectable in itertools.chain.from_iterable(map(sa.sql.visitors.iterate, private.named_froms(inner))):
            table = selectable.element if isinstance(selectable, sa.Alias) else selectable
            if isinstance(selectable, (sa.Table, sa.Alias)) and table in _columns:
                inner = inner.where(selectable.c[_columns[table].key].is_(None))
        return inner

    return sa.sql.visitors.replacement_traverse(statement, {}, with_condition)


_ON_21 = tuple(map(int, sa.__version__.split(".")[:2])) >= (2, 1)

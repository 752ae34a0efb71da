"""What an INSERT, UPDATE or DELETE that the session was given has changed shows in what is loaded.

SQLAlchemy changes the columns of the objects that an ORM statement meets, and leaves the rest until the objects are
expired, as a plain session's commit does. Here the statement expires what is loaded from the rows that it wrote:
relationships, counts by subquery, and the columns themselves where SQLAlchemy did not change them (a statement on a
table, or `synchronize_session=False`). All is loaded when it is looked at next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from . import private
from .foreign_key_actions import action, foreign_keys_to
from .written import columns_read, expire, secondary_tables

__all__ = ["EXPIRES_ITSELF", "expire_written", "expire_written_in_bulk"]

EXPIRES_ITSELF = "fictive_expires_itself"
"""The execution option of a statement whose caller knows better what is stale."""


class _Written(NamedTuple):
    """What a statement has written."""

    table: Any
    columns: Collection[str] | None
    """An UPDATE's columns; None for all."""
    makes_rows: bool
    removes_rows: bool
    is_synchronized: bool
    """Whether SQLAlchemy has changed the columns of the objects that it meets."""
    foreign_keys: tuple[sa.Column[Any], ...] = ()
    """Where the server wrote by a foreign key: its columns. A row in which one is NULL was not written."""


def expire_written(session: sa_orm.Session, statement: Any, params: Any, options: Mapping[str, Any]) -> None:
    """After a statement: expire what it has made stale, pending changes excepted. Sends nothing."""
    given, statement = statement, private.from_statement(statement)
    if session.expire_on_commit or not isinstance(statement, sa.UpdateBase) or EXPIRES_ITSELF in options:
        return
    mapper = private.mapper_of(statement.table)
    synchronize = {**statement.get_execution_options(), **options}.get("synchronize_session", "auto")
    written = _Written(
        statement.table if mapper is None else mapper.local_table,
        private.columns_set(statement, params) if isinstance(statement, sa.Update) else None,
        isinstance(statement, sa.Insert),
        isinstance(statement, sa.Delete),
        mapper is not None and synchronize is not False and given is statement,
    )
    _expire(session, written)


def expire_written_in_bulk(
    session: sa_orm.Session,
    mapper: sa_orm.Mapper[Any],
    *,
    makes_rows: bool,
    columns: Collection[str] | None = None,
    is_synchronized: bool = False,
) -> None:
    """After rows of a mapper were inserted, or these columns changed, past the objects of the session: as
    `expire_written`."""
    if not session.expire_on_commit and len(session.identity_map):
        for table in mapper.tables:
            _expire(session, _Written(table, columns, makes_rows, False, is_synchronized))


def _expire(session: sa_orm.Session, written: _Written) -> None:
    for each in _with_actions(written):
        _expire_one(session, each)


def _with_actions(written: _Written) -> list[_Written]:
    """What was written, and what the server wrote for it by ON DELETE and ON UPDATE."""
    found = [written]
    for each in () if written.makes_rows else found:  # and those that are found on the way
        for constraint in foreign_keys_to(each.table):
            columns = tuple(constraint.columns)
            if each.removes_rows:
                what = action(constraint.ondelete)
            else:
                changed = each.columns is None or any(part.column.key in each.columns for part in constraint.elements)
                what = action(constraint.onupdate) if changed else ""
            if what:
                deletes = each.removes_rows and what == "CASCADE"
                keys = None if deletes else frozenset(column.key for column in columns)
                more = _Written(constraint.table, keys, False, deletes, False, columns)
                if more not in found:
                    found.append(more)
    return found


def _expire_one(session: sa_orm.Session, written: _Written) -> None:
    reading: dict[sa_orm.Mapper[Any], list[Any]] = {}
    scope = private.scope_of(session)
    for state in session.identity_map.all_states():
        mapper = state.manager.mapper
        if mapper not in reading:
            reading[mapper] = [each for each in mapper.attrs if _reads(each, written)]
        if scope is not None and state.committed_state:
            scope.skipped.update((state, each.key) for each in reading[mapper] if _waits(state, each))
        if stale := [each.key for each in reading[mapper] if _is_stale(state, each, written)]:
            expire(session, state, stale)


def _waits(state: Any, attribute: Any) -> bool:
    """Whether an attribute has a pending change, by which it does not become what the rows are: a collection."""
    is_relationship = isinstance(attribute, sa_orm.RelationshipProperty)
    return is_relationship and attribute.direction is not sa_orm.MANYTOONE and attribute.key in state.committed_state


def _is_stale(state: Any, attribute: Any, written: _Written) -> bool:
    """Whether an attribute is loaded, has no pending change, and may be another one now."""
    values = state.dict
    if attribute.key not in values or attribute.key in state.committed_state:
        return False
    if isinstance(attribute, sa_orm.ColumnProperty) and _has_null(state, written.foreign_keys):
        return False
    # what has its row does not get another one by an INSERT
    return not written.makes_rows or getattr(attribute, "uselist", True) or values[attribute.key] is None


def _has_null(state: Any, columns: Collection[sa.Column[Any]]) -> bool:
    """Whether one of these columns is known to be NULL in the row of an object."""
    for column in columns:
        with contextlib.suppress(sa_orm.exc.UnmappedColumnError):
            if state.dict.get(state.manager.mapper.get_property_by_column(column).key, column) is None:
                return True
    return False


def _reads(attribute: Any, written: _Written) -> bool:
    """Whether an attribute of that kind may be another one after what was written."""
    if isinstance(attribute, sa_orm.RelationshipProperty):
        if written.makes_rows or written.removes_rows:
            return written.table in {*attribute.mapper.tables, *secondary_tables(attribute)}
        return any(_was_written(column, written) for column in columns_read(attribute))
    if not isinstance(attribute, sa_orm.ColumnProperty):
        return False
    expression = attribute.columns[0]
    if isinstance(expression, sa.Column):
        if written.is_synchronized and not (_is_made(expression) and not written.removes_rows):
            return False
        return not written.makes_rows and any(_was_written(column, written) for column in attribute.columns)
    return any(_was_written(column, written) for column in columns_read(attribute))


def _was_written(column: Any, written: _Written) -> bool:
    if not isinstance(column, sa.Column) or column.table is not written.table:
        return False
    if written.columns is None:
        return not column.primary_key  # by which the objects are known
    return column.key in written.columns or _is_made(column)


def _is_made(column: sa.Column[Any]) -> bool:
    """Whether each UPDATE gives it a value, named or not."""
    return column.onupdate is not None or column.server_onupdate is not None or column.computed is not None

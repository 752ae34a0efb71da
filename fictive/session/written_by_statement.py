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
from .written import columns_read, expire, once_for_each_mapper, secondary_tables

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
    states = session.identity_map.all_states()
    mappers = {state.manager.mapper: _loaded_from(state.manager.mapper) for state in states}
    for each in _with_actions(written):
        reading = {
            mapper: found
            for mapper, loaded in mappers.items()
            if (found := [one.attribute for one in loaded.get(each.table, ()) if _reads(one, each)])
        }
        if reading:
            _expire_read(session, states, reading, each)


def _with_actions(written: _Written) -> list[_Written]:
    """What was written, and what the server wrote for it by ON DELETE and ON UPDATE."""
    found = [written]
    known = set()
    for each in () if written.makes_rows else found:  # and those that are found on the way
        for constraint in foreign_keys_to(each.table):
            if each.removes_rows:
                what = action(constraint.ondelete)
            else:
                changed = each.columns is None or any(part.column.key in each.columns for part in constraint.elements)
                what = action(constraint.onupdate) if changed else ""
            deletes = each.removes_rows and what == "CASCADE"
            if what and (constraint, deletes) not in known:
                known.add((constraint, deletes))
                columns = tuple(constraint.columns)
                keys = None if deletes else frozenset(column.key for column in columns)
                found.append(_Written(constraint.table, keys, False, deletes, False, columns))
    return found


def _expire_read(
    session: sa_orm.Session,
    states: Collection[Any],
    reading: Mapping[sa_orm.Mapper[Any], list[Any]],
    written: _Written,
) -> None:
    scope = private.scope_of(session)
    for state in states:
        attributes = reading.get(state.manager.mapper, ())
        if scope is not None and state.committed_state:
            scope.skipped.update((state, each.key) for each in attributes if _waits(state, each))
        if stale := [each.key for each in attributes if _is_stale(state, each, written)]:
            expire(session, state, stale)


class _Loaded(NamedTuple):
    """A mapped attribute, and what it is loaded from."""

    attribute: Any
    columns: Collection[sa.Column[Any]]
    rows_of: Collection[Any]
    """The tables of whose rows a relationship is."""


@once_for_each_mapper
def _loaded_from(mapper: sa_orm.Mapper[Any]) -> dict[Any, list[_Loaded]]:
    """By table, the attributes that are loaded from it."""
    found: dict[Any, list[_Loaded]] = {}
    for attribute in mapper.attrs:
        columns: set[Any] = set()
        rows_of: set[Any] = set()
        if isinstance(attribute, sa_orm.RelationshipProperty):
            columns, rows_of = columns_read(attribute), {*attribute.mapper.tables, *secondary_tables(attribute)}
        elif isinstance(attribute, sa_orm.ColumnProperty):
            columns = columns_read(attribute)
            if isinstance(attribute.columns[0], sa.Column):  # joined inheritance has one in each table
                columns |= {each for each in attribute.columns if isinstance(each, sa.Column)}
        for table in {*rows_of, *(column.table for column in columns)}:
            found.setdefault(table, []).append(_Loaded(attribute, columns, rows_of))
    return found


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


def _reads(loaded: _Loaded, written: _Written) -> bool:
    """Whether an attribute may be another one after what was written."""
    if loaded.rows_of and (written.makes_rows or written.removes_rows):
        return written.table in loaded.rows_of
    if not loaded.rows_of and isinstance(loaded.attribute.columns[0], sa.Column):
        made = not written.removes_rows and any(map(_is_made, loaded.columns))
        if written.makes_rows or (written.is_synchronized and not made):
            return False
    return any(_was_written(column, written) for column in loaded.columns)


def _was_written(column: Any, written: _Written) -> bool:
    if not isinstance(column, sa.Column) or column.table is not written.table:
        return False
    if written.columns is None:
        return not column.primary_key  # by which the objects are known
    return column.key in written.columns or _is_made(column)


def _is_made(column: sa.Column[Any]) -> bool:
    """Whether each UPDATE gives it a value, named or not."""
    return column.onupdate is not None or column.server_onupdate is not None or column.computed is not None

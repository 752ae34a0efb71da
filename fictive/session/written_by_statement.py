"""What an INSERT, UPDATE or DELETE that the session was given has changed shows in what is loaded.

SQLAlchemy changes the columns of the objects that an ORM statement meets, and leaves the rest until the objects are
expired, as a plain session's commit does. Here the statement expires what is loaded from the rows that it wrote:
relationships, counts by subquery, and the columns themselves where SQLAlchemy did not change them (a statement on a
table, or `synchronize_session=False`). All is loaded when it is looked at next.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.sql import visitors

from . import private

__all__ = ["expire_written", "expire_written_in_bulk"]


class _Written(NamedTuple):
    """What a statement has written."""

    table: Any
    columns: Collection[str] | None
    """An UPDATE's columns; None for all."""
    makes_rows: bool
    removes_rows: bool
    is_synchronized: bool
    """Whether SQLAlchemy has changed the columns of the objects that it meets."""


def expire_written(session: sa_orm.Session, statement: Any, params: Any, options: Mapping[str, Any]) -> None:
    """After a statement: expire what it has made stale, pending changes excepted. Sends nothing."""
    if session.expire_on_commit or not isinstance(statement, sa.UpdateBase):
        return
    mapper = private.mapper_of(statement.table)
    synchronize = {**statement.get_execution_options(), **options}.get("synchronize_session", "auto")
    written = _Written(
        statement.table if mapper is None else mapper.local_table,
        private.columns_set(statement, params) if isinstance(statement, sa.Update) else None,
        isinstance(statement, sa.Insert),
        isinstance(statement, sa.Delete),
        mapper is not None and synchronize is not False,
    )
    _expire(session, written)


def expire_written_in_bulk(session: sa_orm.Session, mapper: sa_orm.Mapper[Any], *, makes_rows: bool) -> None:
    """After rows of a mapper were inserted, or changed, past the objects of the session: as `expire_written`."""
    if not session.expire_on_commit and len(session.identity_map):
        for table in mapper.tables:
            _expire(session, _Written(table, None, makes_rows, removes_rows=False, is_synchronized=False))


def _expire(session: sa_orm.Session, written: _Written) -> None:
    reads: dict[Any, bool] = {}
    for state in session.identity_map.all_states():
        stale = list(_stale(state, written, reads))
        obj = state.obj() if stale else None
        if obj is not None:
            session.expire(obj, stale)
            private.expire_with_savepoint(session, state)


def _stale(state: Any, written: _Written, reads: dict[Any, bool]) -> Iterator[str]:
    """The loaded attributes of an object that are loaded from what was written."""
    values, pending = state.dict, state.committed_state
    for attribute in state.manager.mapper.attrs:
        if attribute.key not in values or attribute.key in pending:
            continue
        if attribute not in reads:
            reads[attribute] = _reads(attribute, written)
        if not reads[attribute]:
            continue
        if written.makes_rows and not getattr(attribute, "uselist", True) and values[attribute.key] is not None:
            continue  # it has its row
        yield attribute.key


def _reads(attribute: Any, written: _Written) -> bool:
    """Whether an attribute of that kind may be another one after what was written."""
    if isinstance(attribute, sa_orm.RelationshipProperty):
        if written.makes_rows or written.removes_rows:
            secondary = [] if attribute.secondary is None else list(visitors.iterate(attribute.secondary))
            return any(each is written.table for each in (*attribute.mapper.tables, *secondary))
        joins = [each for each in (attribute.primaryjoin, attribute.secondaryjoin) if each is not None]
        return _was_any_written((part for join in joins for part in visitors.iterate(join)), written)
    if not isinstance(attribute, sa_orm.ColumnProperty):
        return False
    expression = attribute.columns[0]
    if isinstance(expression, sa.Column):
        if written.is_synchronized and not (_is_made(expression) and not written.removes_rows):
            return False
        return not written.makes_rows and _was_any_written(attribute.columns, written)
    return _was_any_written(visitors.iterate(expression), written)


def _was_any_written(parts: Iterable[Any], written: _Written) -> bool:
    return any(isinstance(part, sa.Column) and _was_written(part, written) for part in parts)


def _was_written(column: sa.Column[Any], written: _Written) -> bool:
    if column.table is not written.table:
        return False
    return written.columns is None or column.key in written.columns or _is_made(column)


def _is_made(column: sa.Column[Any]) -> bool:
    """Whether each UPDATE gives it a value, named or not."""
    return column.onupdate is not None or column.server_onupdate is not None or column.computed is not None

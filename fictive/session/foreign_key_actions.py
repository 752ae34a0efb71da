"""What the server does to other rows, by ON DELETE and ON UPDATE, when a row is deleted or its key changes.

SQLAlchemy leaves that to the server with `passive_deletes` and `passive_updates`, and where a model has no
relationship to the rows that refer to its own. The objects of those rows then show what was, until something expires
them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

__all__ = ["Reference", "action", "foreign_keys_to", "reached_by_delete", "reached_by_update", "references_to"]

_FOREIGN_KEYS = "fictive.foreign_keys"
"""The key, in the `info` of a `MetaData`, of the foreign keys with an action by the table that they refer to."""


class Reference(NamedTuple):
    """A foreign key with an action, between the rows of two mappers."""

    owner: sa_orm.Mapper[Any]
    foreign_keys: tuple[str, ...]
    """The attributes of `owner`."""
    keys: tuple[str, ...]
    """The attributes that they refer to."""
    on_delete: str
    """In capitals; "" where it does nothing to the rows of `owner`."""
    on_update: str


def action(text: str | None) -> str:
    """What ON DELETE or ON UPDATE does to the rows that refer to a row, in capitals; "" for nothing."""
    found = " ".join((text or "").upper().split())
    return "" if found in ("NO ACTION", "RESTRICT") else found


def foreign_keys_to(table: Any) -> Sequence[sa.ForeignKeyConstraint]:
    """The foreign keys, of all tables, that refer to a table and whose actions change rows."""
    if not isinstance(table, sa.Table):
        return ()
    metadata = table.metadata
    found: dict[Any, list[sa.ForeignKeyConstraint]]
    size, found = metadata.info.get(_FOREIGN_KEYS, (0, {}))
    if size != len(metadata.tables):  # more were defined meanwhile
        found = {}
        for constraint in (each for one in metadata.tables.values() for each in one.foreign_key_constraints):
            if action(constraint.ondelete) or action(constraint.onupdate):
                found.setdefault(_referred(constraint), []).append(constraint)
        metadata.info[_FOREIGN_KEYS] = len(metadata.tables), found
    return found.get(table, ())


def references_to(mapper: sa_orm.Mapper[Any]) -> Iterator[Reference]:
    """The foreign keys whose actions change rows of other objects when a row of this mapper changes."""
    for owner in mapper.registry.mappers:
        for constraint in getattr(owner.local_table, "foreign_key_constraints", ()):
            on_delete, on_update = action(constraint.ondelete), action(constraint.onupdate)
            if (on_delete or on_update) and _referred(constraint) in mapper.tables:
                with contextlib.suppress(sa_orm.exc.UnmappedColumnError):
                    foreign_keys = [owner.get_property_by_column(each.parent).key for each in constraint.elements]
                    keys = [mapper.get_property_by_column(each.column).key for each in constraint.elements]
                    yield Reference(owner, tuple(foreign_keys), tuple(keys), on_delete, on_update)


def _referred(constraint: sa.ForeignKeyConstraint) -> sa.Table | None:
    """The table that a foreign key refers to; None for one that the metadata does not have."""
    try:
        return constraint.referred_table
    except sa.exc.SQLAlchemyError:
        return None


def reached_by_delete(
    session: sa_orm.Session, deleted: Sequence[Any], references: Callable[[Any], Sequence[Reference]]
) -> tuple[list[Any], list[tuple[Any, Reference]]]:
    """Of the objects in a session, by their states: those whose rows went with deleted ones, and those whose foreign
    keys the server has changed."""
    gone: list[Any] = []
    changed: list[tuple[Any, Reference]] = []
    known, wave = set(deleted), list(deleted)
    while wave:
        reached = [found for found in _referring(session, wave, references, "on_delete") if found[0] not in known]
        wave = []
        for state, reference in reached:
            if reference.on_delete != "CASCADE":
                changed.append((state, reference))
            elif state not in known:
                known.add(state)
                wave.append(state)
        gone += wave
    return gone, changed


def reached_by_update(
    session: sa_orm.Session, states: Sequence[Any], references: Callable[[Any], Sequence[Reference]]
) -> list[tuple[Any, Reference]]:
    """The objects whose foreign keys the server has changed with the keys that a flush has changed."""
    return list(_referring(session, states, references, "on_update"))


def _referring(
    session: sa_orm.Session, states: Sequence[Any], references: Callable[[Any], Sequence[Reference]], what: str
) -> Iterator[tuple[Any, Reference]]:
    """The objects in the session that refer to what these were before the flush, by a foreign key with that action."""
    wanted: dict[Reference, set[Any]] = {}
    for state in states:
        for reference in references(state):
            if getattr(reference, what):
                wanted.setdefault(reference, set()).add(tuple(_before(state, key) for key in reference.keys))
    for state in session.identity_map.all_states() if wanted else ():
        for reference, values in wanted.items():
            if state.manager.mapper.isa(reference.owner):
                refers = tuple(state.dict.get(key) for key in reference.foreign_keys)
                if None not in refers and refers in values:
                    yield state, reference


def _before(state: Any, key: str) -> Any:
    """What an attribute was before the flush; the primary key is known even where it is not loaded."""
    before = state.committed_state.get(key, state.dict.get(key))
    if before is None or before is sa_orm.LoaderCallableStatus.NO_VALUE:
        mapper = state.manager.mapper
        columns = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
        before = state.key[1][columns.index(key)] if state.key is not None and key in columns else None
    return before

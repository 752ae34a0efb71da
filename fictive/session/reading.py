"""What a SELECT brings is what the objects show, and reads by key without building their statement each time.

SQLAlchemy's identity map keeps the attributes of an object that is in the session already, whatever a row says; on a
plain session each commit expires them. Here nothing is expired, so a row *renews* them: when SQLAlchemy looks up the
object of a row (`IdentityMap.get`), the column attributes that the statement loads are taken away, unless they have a
pending change, and SQLAlchemy fills them from the row as it fills expired ones. Nothing is sent for it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from . import private

__all__ = ["DELETED_WHEN_SET", "LIVE_ROWS", "IdentityMap", "load_numbers", "prepared_get"]


DELETED_WHEN_SET = "__deleted_when_set__"
"""The class attribute with the name of the attribute that marks a row deleted, and hides it."""
LIVE_ROWS = "__live_rows__"
"""The class attribute with the loader option by which a SELECT sees live rows only."""


class IdentityMap(private.IdentityMapBase):  # type: ignore[misc]
    """SQLAlchemy's, whose objects take the values of the rows that are read. Set on a session's map as its class."""

    stale_before = 0
    """Objects of loads before this one are renewed; the numbers are SQLAlchemy's `runid` of loads. 0: none are."""

    def get(self, key: Any, default: Any = None) -> Any:
        if key not in self._dict:
            return default
        try:
            state = self._dict[key]
        except KeyError:  # collected in between
            return default
        instance = state.obj()
        if instance is None:
            return default
        if self.stale_before and (state.runid is None or state.runid < self.stale_before):
            # `get()`, `merge()` and lazy loads come here too, and have no row to fill the object from
            load = private.load_of_row(sys._getframe(1))
            if load is not None and (state.runid is None or state.runid < load.runid - 1):
                columns_of(load.compile_state).renew(state)
                state.runid = load.runid - 1  # not again by this load's rows, nor by those of an earlier one
        return instance


class LoadedColumns:
    """The column attributes that one compiled statement loads, by mapper."""

    def __init__(self, compile_state: Any) -> None:
        self._entities: list[tuple[sa_orm.Mapper[Any], set[str]]] = []
        for key, columns in getattr(compile_state, "attributes", {}).items():
            if isinstance(key, tuple) and key[0] == "memoized_setups":
                mapper = sa.inspect(key[1][-1]).mapper
                keys = {each.key for each, column in columns.items() if isinstance(column, sa.ColumnElement)}
                self._entities.append((mapper, keys))
        if not self._entities:  # of select(Model).from_statement(): SQLAlchemy takes what it finds in the rows
            names, mappers = private.given_by_statement(compile_state)
            self._entities = [(mapper, _keys_of_columns(mapper, names)) for mapper in mappers]
        self._keys: dict[sa_orm.Mapper[Any], tuple[str, ...]] = {}

    def renew(self, state: Any) -> None:
        """Take away what the row is to bring; pending changes stay, and the version that they were made on."""
        mapper, values, changed = state.manager.mapper, state.dict, state.committed_state
        keys = self._keys.get(mapper)
        if keys is None:
            found = {key for entity, loaded in self._entities if mapper.isa(entity) for key in loaded}
            keys = self._keys[mapper] = tuple(found & set(mapper.column_attrs.keys()))
        version = mapper.version_id_col if changed else None
        kept = mapper.get_property_by_column(version).key if version is not None else None
        for key in keys:
            if key in values and key not in changed and key != kept:
                del values[key]
                state.expired_attributes.add(key)


def _keys_of_columns(mapper: sa_orm.Mapper[Any], names: Collection[str]) -> set[str]:
    return {each.key for each in mapper.column_attrs if any(getattr(c, "name", None) in names for c in each.columns)}


def columns_of(compile_state: Any) -> LoadedColumns:
    """What a compiled ORM statement loads; kept with it, which SQLAlchemy caches."""
    try:
        return compile_state._fictive_columns  # type: ignore[no-any-return]
    except AttributeError:
        found = compile_state._fictive_columns = LoadedColumns(compile_state)
        return found


load_numbers: Any = private.load_numbers()
"""`next(load_numbers)` is above the number of each load so far, and below that of the next one."""


class _PreparedGet:
    """`SELECT ... WHERE pk = :pk` of a mapper with one key column, built once: SQLAlchemy builds it for each
    `get()`. What fictive's own listeners would add is there already."""

    __slots__ = ("identity_class", "statement")

    def __init__(self, mapper: sa_orm.Mapper[Any]) -> None:
        column = mapper.primary_key[0]
        self.identity_class = mapper._identity_class
        self.statement = sa.select(mapper.class_).where(
            mapper.get_property_by_column(column).class_attribute == sa.bindparam("pk_1", type_=column.type)
        )
        if live_rows := getattr(mapper.class_, LIVE_ROWS, None):
            self.statement = self.statement.options(live_rows)


_prepared: dict[Any, _PreparedGet | None] = {}


def prepared_get(entity: Any) -> _PreparedGet | None:
    """The prepared `get()` of a mapped class; None where SQLAlchemy's own has more to do."""
    try:
        return _prepared[entity]
    except (KeyError, TypeError):
        pass
    mapper = sa.inspect(entity, raiseerr=False)
    if not isinstance(mapper, sa_orm.Mapper) or not isinstance(entity, type):
        return None
    is_simple = (
        len(mapper.primary_key) == 1
        and not mapper.always_refresh
        and mapper.polymorphic_on is None
        and not mapper.inherits
        and all(
            each.lazy in ("select", True, "noload", "raise", "dynamic", "write_only") for each in mapper.relationships
        )
        and not private.is_composite_key(mapper)
    )
    found = _prepared[entity] = _PreparedGet(mapper) if is_simple else None
    return found

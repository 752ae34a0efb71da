"""One lazy load for all objects that will want it: those of the same query."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.orm.attributes import set_committed_value

from ..session import private
from .soft_delete import SoftDeleteMixin

__all__ = ["load_for_all"]

_AT_ONCE = 500
"""As many as SQLAlchemy's `selectinload` asks for in one statement."""


_WAY = "fictive.way"


def load_for_all(
    state: sa_orm.ORMExecuteState, parent: sa_orm.InstanceState[Any], relationship: sa_orm.RelationshipProperty[Any]
) -> sa.Result[Any] | None:
    """Load `relationship` for `parent`, whose lazy load `state` is, and its peers; returns what that load was to find.

    None where it would have no one to load for but `parent`, or where the objects in memory differ from their rows,
    which the statement goes by, or where the row is deleted (`SoftDeleteMixin`).
    """
    peers = list(_peers(state.session, parent, relationship))
    if not peers or parent.modified or _may_be_hidden(parent):
        return None
    way = relationship.info.get(_WAY) or relationship.info.setdefault(_WAY, _way(relationship))
    keyed = [(each, way.key(each)) for each in (parent, *peers)]
    keys = list(dict.fromkeys(key for _, key in keyed if key is not None))
    found: dict[tuple[Any, ...] | None, list[Any]] = defaultdict(list)
    for at in range(0, len(keys), _AT_ONCE):
        statement = private.loaded_as(way.statement(keys[at : at + _AT_ONCE]), state.statement)
        for *values, related in state.session.execute(statement, bind_arguments=state.bind_arguments).unique():
            found[tuple(values)].append(related)
    for peer, key in keyed[1:]:
        instance = peer.obj()
        if instance is not None and (key in found or way.knows_all):
            set_committed_value(instance, relationship.key, _value(relationship, found.get(key, [])))
    return private.result_of(found.get(keyed[0][1], []))


def _peers(
    session: sa_orm.Session, parent: sa_orm.InstanceState[Any], relationship: sa_orm.RelationshipProperty[Any]
) -> Iterable[sa_orm.InstanceState[Any]]:
    """The objects of `parent`'s query whose relationship is not loaded. The session holds them weakly, and no one else
    holds them here."""
    run = private.load_run(parent)
    for peer in session.identity_map.all_states():
        if (
            peer is not parent
            and private.load_run(peer) == run
            and peer.mapper.isa(relationship.parent)
            and not peer.expired
            and not peer.modified
            and relationship.key not in peer.dict
            and not _may_be_hidden(peer)
        ):
            yield peer


def _may_be_hidden(parent: sa_orm.InstanceState[Any]) -> bool:
    """Whether the statement, which reads the parents' rows, might pass that of a deleted one over."""
    return issubclass(parent.class_, SoftDeleteMixin) and parent.dict.get("deleted_at", parent) is not None


@dataclasses.dataclass(frozen=True)
class _Way:
    """How related objects are found: each row of `statement` is a key, as `key` has it, and one of them."""

    key: Callable[[sa_orm.InstanceState[Any]], tuple[Any, ...] | None]
    statement: Callable[[list[tuple[Any, ...]]], sa.Select[Any]]
    knows_all: bool = True
    """Whether an object whose key is not among the rows has none related; else it is left to its own lazy load."""


def _way(relationship: sa_orm.RelationshipProperty[Any]) -> _Way:
    """By the foreign key alone where the relationship is that, and by a join, as it says, where it is more."""
    pair = _plain_foreign_key(relationship)
    if pair is None:
        return _Way(private.key_of, functools.partial(_by_join, relationship))
    local, remote = pair
    if relationship.direction is sa_orm.RelationshipDirection.ONETOMANY and [local] == [
        *relationship.parent.primary_key
    ]:
        return _Way(private.key_of, functools.partial(_by_column, relationship, remote))
    if relationship.direction is sa_orm.RelationshipDirection.MANYTOONE:
        name = relationship.parent.get_property_by_column(local).key
        return _Way(
            functools.partial(_given, name), functools.partial(_by_column, relationship, remote), knows_all=False
        )
    return _Way(private.key_of, functools.partial(_by_join, relationship))


def _plain_foreign_key(
    relationship: sa_orm.RelationshipProperty[Any],
) -> tuple[sa.ColumnElement[Any], sa.ColumnElement[Any]] | None:
    """The columns, of this side and of the other, whose equality is all that the relationship asks for."""
    if relationship.secondary is not None or len(relationship.local_remote_pairs) != 1:
        return None
    local, remote = relationship.local_remote_pairs[0]
    same = any(relationship.primaryjoin.compare(each) for each in (local == remote, remote == local))
    # of an inherited table's columns SQLAlchemy has a view of its own
    own = _is_of(remote, relationship.mapper) and _is_of(local, relationship.parent)
    return (local, remote) if same and own else None


def _is_of(column: sa.ColumnElement[Any], mapper: sa_orm.Mapper[Any]) -> bool:
    return isinstance(column, sa.Column) and column.table is mapper.local_table


def _given(name: str, state: sa_orm.InstanceState[Any]) -> tuple[Any, ...] | None:
    value = state.dict.get(name)
    return None if value is None else (value,)


def _by_column(
    relationship: sa_orm.RelationshipProperty[Any], column: sa.ColumnElement[Any], keys: list[tuple[Any, ...]]
) -> sa.Select[Any]:
    statement = sa.select(column, relationship.entity.entity).where(column.in_([key[0] for key in keys]))
    return statement.order_by(*relationship.order_by) if relationship.order_by else statement


def _by_join(relationship: sa_orm.RelationshipProperty[Any], keys: list[tuple[Any, ...]]) -> sa.Select[Any]:
    parent = sa_orm.aliased(relationship.parent)
    columns = [
        getattr(parent, relationship.parent.get_property_by_column(column).key)
        for column in relationship.parent.primary_key
    ]
    if len(columns) == 1:
        among = columns[0].in_([key[0] for key in keys])
    else:
        among = sa.tuple_(*columns).in_(keys)
    related = relationship.entity.entity
    statement = sa.select(*columns, related).select_from(parent).join(getattr(parent, relationship.key)).where(among)
    return statement.order_by(*relationship.order_by) if relationship.order_by else statement


def _value(relationship: sa_orm.RelationshipProperty[Any], related: list[Any]) -> Any:
    if relationship.uselist:
        return related
    return related[0] if related else None

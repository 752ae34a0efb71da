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


_PLAN = "fictive.load_plan"
_KEYS = "fictive_keys"


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
    plan = relationship.info.get(_PLAN) or relationship.info.setdefault(_PLAN, _plan(relationship))
    keyed = [(each, plan.key(each)) for each in (parent, *peers)]
    keys = list(dict.fromkeys(key for _, key in keyed if key is not None))
    found: dict[tuple[Any, ...] | None, dict[int, Any]] = defaultdict(dict)
    statement = private.loaded_as(plan.statement, state.statement)
    for at in range(0, len(keys), _AT_ONCE):
        rows = state.session.execute(
            statement, {_KEYS: plan.parameter(keys[at : at + _AT_ONCE])}, bind_arguments=state.bind_arguments
        )
        # each object once, by what it is: SQLAlchemy's own way takes longer over a row than making its object does
        for row in rows.unique() if private.must_be_unique(rows) else rows:
            related = row[-1]
            found[row[:-1]][id(related)] = related
    for peer, key in keyed[1:]:
        instance = peer.obj()
        if instance is not None and (key in found or plan.knows_all):
            set_committed_value(instance, relationship.key, _value(relationship, list(found.get(key, {}).values())))
    return private.result_of(list(found.get(keyed[0][1], {}).values()))


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
class LoadPlan:
    """How related objects are found: each row of `statement` is a key, as `key` has it, and one of them. Made once for
    each relationship."""

    key: Callable[[sa_orm.InstanceState[Any]], tuple[Any, ...] | None]
    statement: sa.Select[Any]
    knows_all: bool = True
    """Whether an object whose key is not among the rows has none related; else it is left to its own lazy load."""
    columns: int = 1

    def parameter(self, keys: list[tuple[Any, ...]]) -> list[Any]:
        return [key[0] for key in keys] if self.columns == 1 else keys


def _plan(relationship: sa_orm.RelationshipProperty[Any]) -> LoadPlan:
    """By the foreign key alone where the relationship is that, and by a join, as it says, where it is more."""
    pair = _plain_foreign_key(relationship)
    if pair is None:
        return _by_join(relationship)
    local, remote = pair
    if relationship.direction is sa_orm.RelationshipDirection.ONETOMANY and [local] == [
        *relationship.parent.primary_key
    ]:
        return LoadPlan(private.key_of, _by_column(relationship, remote))
    if relationship.direction is sa_orm.RelationshipDirection.MANYTOONE:
        name = relationship.parent.get_property_by_column(local).key
        return LoadPlan(functools.partial(_given, name), _by_column(relationship, remote), knows_all=False)
    return _by_join(relationship)


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


def _by_column(relationship: sa_orm.RelationshipProperty[Any], column: sa.ColumnElement[Any]) -> sa.Select[Any]:
    among = column.in_(sa.bindparam(_KEYS, expanding=True))
    return sa.select(column, relationship.entity.entity).where(among).order_by(*relationship.order_by or ())


def _by_join(relationship: sa_orm.RelationshipProperty[Any]) -> LoadPlan:
    parent = sa_orm.aliased(relationship.parent)
    columns = [
        getattr(parent, relationship.parent.get_property_by_column(column).key)
        for column in relationship.parent.primary_key
    ]
    keys: Any = sa.bindparam(_KEYS, expanding=True)
    among = columns[0].in_(keys) if len(columns) == 1 else sa.tuple_(*columns).in_(keys)
    rows = sa.select(*columns, relationship.entity.entity).select_from(parent)
    rows = rows.join(getattr(parent, relationship.key)).where(among).order_by(*relationship.order_by or ())
    return LoadPlan(private.key_of, rows, columns=len(columns))


def _value(relationship: sa_orm.RelationshipProperty[Any], related: list[Any]) -> Any:
    if relationship.uselist:
        return related
    return related[0] if related else None

"""One lazy load for all objects that will want it: those of the same query."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.orm.attributes import set_committed_value

from ..session import private
from .soft_delete import SoftDeleteMixin

__all__ = ["load_for_all"]

_AT_ONCE = 500
"""As many as SQLAlchemy's `selectinload` asks for in one statement."""


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
    keys = [private.key_of(each) for each in (parent, *peers)]
    found: dict[Any, list[Any]] = defaultdict(list)
    for at in range(0, len(keys), _AT_ONCE):
        statement = private.loaded_as(_statement(relationship, keys[at : at + _AT_ONCE]), state.statement)
        for *key, related in state.session.execute(statement, bind_arguments=state.bind_arguments).unique():
            found[tuple(key)].append(related)
    for peer in peers:
        instance = peer.obj()
        if instance is not None:
            set_committed_value(instance, relationship.key, _value(relationship, found[private.key_of(peer)]))
    return private.result_of(found[private.key_of(parent)])


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
            and not _may_be_hidden(peer)
            and relationship.key in peer.unloaded
        ):
            yield peer


def _may_be_hidden(parent: sa_orm.InstanceState[Any]) -> bool:
    """Whether the statement, which reads the parents' rows, might pass that of a deleted one over."""
    return issubclass(parent.class_, SoftDeleteMixin) and parent.dict.get("deleted_at", parent) is not None


def _statement(relationship: sa_orm.RelationshipProperty[Any], keys: list[tuple[Any, ...]]) -> sa.Select[Any]:
    """The related objects, each with the key of the object that it is related to."""
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

"""Many-to-many relationships without loading them: what is linked is known by its key."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.orm.attributes import instance_state

from ..errors import ConfigurationError, UnsavedObject
from ..other_names import also_named
from ..session.given import require_postgresql, session_of
from ..session.session import atomic
from .attributes import as_key, attribute_names, python_types
from .link_sql import Columns, Key, linked_by
from .write_binding import execute_write

__all__ = ["LinkChanges", "m2m_add", "m2m_clear", "m2m_remove", "m2m_set"]


@dataclasses.dataclass(frozen=True)
class LinkChanges:
    """What `m2m_set` changed: the keys of the related objects that were linked, and of those that no longer are.

    False when nothing changed.
    """

    added: tuple[Any, ...] = ()
    removed: tuple[Any, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed)


@also_named(rel_attr="relationship")
def m2m_add(
    session: object,
    instance: object,
    relationship: sa_orm.QueryableAttribute[Any],
    *related: Any,
    ignore_conflicts: bool = False,
) -> tuple[Any, ...]:
    """Link `related` to `instance`; returns the keys of those that were not linked before.

    `relationship` is the attribute of the class, `Item.tags`. `related` are objects or primary keys, a tuple for a
    primary key of several columns; one that is given twice counts once. Keys are returned as they are given, in no
    order; where the link table refers to other columns than the primary key, their values.

    A link that is there already is an `IntegrityError`, if the link table has a unique constraint. With
    `ignore_conflicts` it is left as it is, also when another transaction adds it at the same time; that takes a
    primary key, unique constraint or unique index over just the columns of the link, or is a `ConfigurationError`.

    Defaults of further columns of the link table apply. No ORM events fire for the collection. Collections that are
    loaded on either side are expired.

    Before any SQL: `TypeError` for a relationship that is not many-to-many, is viewonly or has further conditions in
    its join, and for objects and keys of another kind; `UnsavedObject`, a `ValueError`, for an `instance` that was not
    saved; `UnsupportedDialect` on another database than PostgreSQL.

    One round trip, and none without `related`. New related objects in the session, and unsaved changes of the
    collection, are flushed first; in autocommit that and the links are then one transaction. Otherwise it is part of
    the open transaction.
    """
    operation = LinkOperation("m2m_add()", session, instance, relationship, related)
    if ignore_conflicts and operation.links.unique_key() is None:
        columns = ", ".join(column.name for column in (*operation.links.owner, *operation.links.own))
        raise ConfigurationError(
            f"ignore_conflicts=True needs to know a link that is there: {operation.links.table.fullname} has no "
            f"primary key, unique constraint or unique index over ({columns}) alone."
        )
    if not related:
        return ()
    return operation.keys(operation.run(operation.links.insert, ignore_conflicts=ignore_conflicts))


@also_named(rel_attr="relationship")
def m2m_remove(
    session: object, instance: object, relationship: sa_orm.QueryableAttribute[Any], *related: Any
) -> tuple[Any, ...]:
    """Unlink `related` from `instance`; returns the keys of those that were linked.

    Those that were not linked are passed over. Arguments, errors and price as in `m2m_add`.
    """
    operation = LinkOperation("m2m_remove()", session, instance, relationship, related)
    if not related:
        return ()
    return operation.keys(operation.run(operation.links.delete))


@also_named(rel_attr="relationship")
def m2m_set(
    session: object, instance: object, relationship: sa_orm.QueryableAttribute[Any], *related: Any
) -> LinkChanges:
    """Let `related`, and nothing else, be linked to `instance`; returns what changed.

    Rows of links that stay are not touched, so that further columns keep their values; where nothing changes
    nothing is written. Without `related` it is `m2m_clear`. A default of a further column that is a Python function
    is called for each of `related`.

    One statement, all or nothing. Two at a time for one owner, under READ COMMITTED, each go by what they found: a
    link that only one of them wants may stay. Lock the owner's row where that matters. Arguments, errors and price as
    in `m2m_add`.
    """
    operation = LinkOperation("m2m_set()", session, instance, relationship, related)
    rows = operation.run(operation.links.replace)
    added, removed = (operation.keys(row for row in rows if row[0] is is_new) for is_new in (True, False))
    return LinkChanges(added, removed)


@also_named(rel_attr="relationship")
def m2m_clear(session: object, instance: object, relationship: sa_orm.QueryableAttribute[Any]) -> tuple[Any, ...]:
    """Unlink everything from `instance`; returns the keys of what was linked.

    Errors and price as in `m2m_add`.
    """
    operation = LinkOperation("m2m_clear()", session, instance, relationship, ())
    return operation.keys(operation.run(lambda dialect, owner, wanted: operation.links.clear(owner)))


class LinkOperation:
    """One call: its arguments, looked at before anything is sent."""

    def __init__(
        self, what: str, session: object, instance: object, relationship: object, related: tuple[Any, ...]
    ) -> None:
        self.session = session_of(session)
        self.links = links = linked_by(relationship)
        self.dialect = require_postgresql(self.session, what, links.related_mapper)
        self._what = what
        if not isinstance(instance, links.owner_mapper.class_):
            raise TypeError(f"{what}: {links.name} is of {links.owner_mapper.class_.__name__}, not of {instance!r}.")
        self._instance = instance
        state: sa_orm.InstanceState[Any] = sa.inspect(instance)
        if state.identity is None or state.deleted or state.was_deleted:
            raise UnsavedObject(f"{what}: {instance!r} is not saved. Add it to the session and flush or commit first.")
        self._types = python_types(list(links.related))
        self._plain = links.whole_key and len(self._types) == 1 and {*map(type, related)} <= {self._types[0]}
        """Whether the keys are of one column and no object is among them. A tuple for each of ten thousand would make
        the garbage collector look through all that the process has."""
        self._keys: Sequence[Any] = related if self._plain else [self._key_of(each) for each in related]
        """Values where it is so; else tuples, and the states of objects, whose keys are looked up after the flush."""
        self._owner_collections = self._collections(links.owner_mapper, set(links.owner))
        self._related_collections = self._collections(links.related_mapper, set(links.related))

    def run(self, build: Callable[..., sa.Executable], **options: Any) -> list[Any]:
        """Send what `build` makes of the owner's and the related keys, and expire what is loaded of them.

        The rows that come back end with the related key.
        """
        links, must_flush = self.links, self._must_flush()
        with atomic(self.session, self._what) if must_flush else contextlib.nullcontext():
            if must_flush:
                self.session.flush()
            owner = _reader(links.owner_mapper, links.owner.values())(sa.inspect(self._instance))
            wanted = self._wanted()
            self._check_shared(owner, wanted)
            statement = build(self.dialect, owner, wanted, **options)
            result = execute_write(self.session, statement, links.related_mapper, table=links.table)
            rows = [tuple(row) for row in result]
            width = len(links.related)
            self._expire(itertools.chain(zip(*wanted, strict=True), [row[-width:] for row in rows]))
            return rows

    def keys(self, rows: Iterable[Key]) -> tuple[Any, ...]:
        """The related keys as users give them: a value, or a tuple of several."""
        width = len(self.links.related)
        found = dict.fromkeys([row[-width:] for row in rows])
        return tuple(found) if width > 1 else tuple([value for (value,) in found])

    # -- arguments --------------------------------------------------------------------------------------------------

    def _wanted(self) -> Columns:
        """The related keys, each once."""
        if self._plain:
            return [list(dict.fromkeys(self._keys))]
        read = _reader(self.links.related_mapper, self.links.related.values())
        keys = dict.fromkeys([key if isinstance(key, tuple) else read(key) for key in self._keys])
        return list(zip(*keys, strict=True)) or [()] * len(self.links.related)

    def _key_of(self, given: Any) -> Any:
        """A key as a tuple; of an object its state."""
        links, related = self.links, self.links.related_mapper
        if isinstance(given, related.class_):
            state: sa_orm.InstanceState[Any] = instance_state(given)
            if state.key is None and state.session is not self.session:
                raise UnsavedObject(f"{self._what}: {given!r} is not saved. Add it to the session first.")
            return state
        if isinstance(sa.inspect(given, raiseerr=False), sa_orm.InstanceState):
            raise TypeError(f"{self._what}: {links.name} links {related.class_.__name__} objects, not {given!r}.")
        if not links.whole_key:
            raise TypeError(
                f"{self._what}: {links.table.fullname} does not refer to the primary key of "
                f"{related.class_.__name__}. Give objects, not {given!r}."
            )
        key = as_key(given, self._types)
        if key is None:
            expected = ", ".join(f"{name} {column.type!r}" for column, name in links.related.items())
            raise TypeError(
                f"{self._what}: {given!r} is no primary key of {related.class_.__name__} ({expected}), and no object "
                "of it. Several are given one by one: *keys."
            )
        return key

    def _check_shared(self, owner: Key, wanted: Columns) -> None:
        """A column that holds both sides' value has one for both."""
        shared = dict(zip(self.links.owner, owner, strict=True))
        for position, column in enumerate(self.links.related):
            for key in zip(*wanted, strict=True) if column in shared else ():
                if key[position] != shared[column]:
                    raise ValueError(
                        f"{self._what}: {key!r} has another {column.name} than {self._instance!r}, which has "
                        f"{shared[column]!r}, and a link has one for both."
                    )

    def _must_flush(self) -> bool:
        """Whether a flush has to come first: new objects have no key, and changes of a collection would be lost when
        it is expired."""
        if self._has_changes(sa.inspect(self._instance), self._owner_collections):
            return True
        collections = self._related_collections
        if self._plain and not collections:
            return False
        for each in zip(self._keys) if self._plain else self._keys:
            state = self._loaded(each) if isinstance(each, tuple) else each
            if state is not None and (state.key is None or self._has_changes(state, collections)):
                return True
        return False

    # -- what is loaded ---------------------------------------------------------------------------------------------

    def _expire(self, keys: Iterable[Key]) -> None:
        """Let the collections of both sides be loaded again. Those of others that have unsaved changes stay."""
        if self._instance in self.session:
            self._expire_loaded(sa.inspect(self._instance), self._owner_collections)
        collections = self._related_collections
        if not collections:
            return
        if self.links.whole_key:
            loaded: Iterable[Any] = map(self._loaded, keys)
        else:
            known, names = set(keys), self.links.related.values()
            objects = (each for each in self.session if isinstance(each, self.links.related_mapper.class_))
            states = map(instance_state, objects)
            loaded = [state for state in states if tuple(map(state.dict.get, names)) in known]
        for state in loaded:
            if state is not None and not self._has_changes(state, collections):
                self._expire_loaded(state, collections)

    def _collections(self, mapper: sa_orm.Mapper[Any], side: set[sa.Column[Any]]) -> list[str]:
        """The relationships of `mapper` and its subclasses over the same link table, with these columns for its own
        side."""
        found = {
            relationship.key: None
            for each in mapper.self_and_descendants
            for relationship in each.relationships
            if relationship.secondary is self.links.table
            and {link for _, link in relationship.synchronize_pairs} == side
        }
        return list(found)

    def _loaded(self, key: Key) -> sa_orm.InstanceState[Any] | None:
        """The state of the related object, if the session has it; without loading what is expired of it."""
        if not self._related_collections:
            return None
        found = self.session.identity_map.get(self.links.related_mapper.identity_key_from_primary_key(key))
        return None if found is None else sa.inspect(found)

    def _has_changes(self, state: sa_orm.InstanceState[Any], attributes: list[str]) -> bool:
        return state.modified and any(
            state.attrs[name].history.has_changes() for name in attributes if name in state.dict
        )

    def _expire_loaded(self, state: sa_orm.InstanceState[Any], attributes: list[str]) -> None:
        if loaded := [name for name in attributes if name in state.dict]:
            self.session.expire(state.obj(), loaded)


def _reader(mapper: sa_orm.Mapper[Any], names: Collection[str]) -> Callable[[Any], Key]:
    """A function that reads attributes of saved objects, by their state. Those of the primary key are known even
    where all is expired."""
    primary_key = attribute_names(mapper, mapper.primary_key)
    if primary_key == [*names]:
        return operator.attrgetter("identity")
    places = [primary_key.index(name) if name in primary_key else name for name in names]

    def read(state: sa_orm.InstanceState[Any]) -> Key:
        identity: Any = state.identity
        return tuple([identity[place] if isinstance(place, int) else getattr(state.obj(), place) for place in places])

    return read

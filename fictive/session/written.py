"""What a flush wrote shows in the relationships that are loaded, though nothing is expired at a commit.

SQLAlchemy writes foreign keys, and leaves relationships that are loaded as they are until their object is expired, as
a plain session's commit does. Here a flush finds the few that it has made stale, and expires those alone: a
many-to-one whose foreign key is another one now, a collection that lacks what was added or moved by its foreign key,
or holds what was deleted, and what the server changed by ON DELETE and ON UPDATE. What reads a table in another way (a
secondary table, further conditions, a subquery) is expired wherever it is loaded, as a commit of SQLAlchemy's does.
All is loaded when it is looked at next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.orm import attributes, collections
from sqlalchemy.sql import visitors

from . import private
from .foreign_key_actions import Reference, reached_by_delete, reached_by_update, references_to
from .reading import DELETED_WHEN_SET

__all__ = [
    "columns_read", "expire", "expire_stale", "note_orphan", "note_written", "once_for_each_mapper",
    "secondary_tables",
]  # fmt: skip

_RELATIONS = "fictive.relations"
"""The key, in the `info` of a class that is mapped, of its `_Relations`."""

_Stale = tuple[Any, str | None]
"""The state of an object, and an attribute that is to be loaded anew; None for all."""
_T = TypeVar("_T")
_Pairs = tuple[tuple[str, str], ...]
"""Attributes on the side of the foreign key, each with the one that it refers to."""


class _Relation(NamedTuple):
    owner: sa_orm.Mapper[Any]
    key: str
    pairs: _Pairs
    order: frozenset[str] = frozenset()
    """Attributes of the members, by which the server sorts them."""


class _Reader(NamedTuple):
    """An attribute that is loaded from rows of a mapper in a way that is not followed row by row."""

    owner: sa_orm.Mapper[Any]
    key: str
    by_rows: bool
    """Whether a row that is added or deleted may change it."""
    columns: frozenset[str]
    """The mapper's attributes whose change may."""


class _Collection(NamedTuple):
    key: str
    columns: frozenset[str]
    """The attributes by which the rows are found."""
    is_written: bool
    """Whether a flush writes all changes in it."""
    is_ordered: bool
    """Whether the server sorts it."""


class _Relations(NamedTuple):
    """The relationships that a row of a mapper has a say in."""

    generation: int
    own: tuple[_Relation, ...]
    """Its many-to-ones."""
    incoming: tuple[_Relation, ...]
    """The collections, and scalars, of others that its foreign keys put it in."""
    local: tuple[_Collection, ...]
    """Its collections, and scalars of other's foreign keys."""
    links: tuple[tuple[str, tuple[_Reader, ...]], ...]
    """Its many-to-manys, and what else is loaded from their secondary table."""
    readers: tuple[_Reader, ...]
    references: tuple[Reference, ...]
    """Foreign keys to its rows, whose actions change others."""
    followed: frozenset[str]
    """Its attributes whose change such a foreign key follows."""


_generation = 0


@sa.event.listens_for(sa_orm.Mapper, "after_configured")
def _forget_relations() -> None:
    global _generation
    _generation += 1


def once_for_each_mapper(make: Callable[[sa_orm.Mapper[Any]], _T]) -> Callable[[sa_orm.Mapper[Any]], _T]:
    """Keep what a function says of a mapper, until more models are mapped."""
    key = f"fictive.{make.__name__}"

    def kept(mapper: sa_orm.Mapper[Any]) -> _T:
        known = mapper.class_manager.info
        found: tuple[int, _T] | None = known.get(key)
        if found is None or found[0] != _generation:
            found = known[key] = _generation, make(mapper)
        return found[1]

    return kept


def note_written(session: Any, context: Any) -> None:
    """A listener to `after_flush`: remember which loaded relationships are stale now."""
    if session.expire_on_commit:
        return
    if session._nested_transaction is not None:
        private.note_savepoint_write(session)
    scope = session._fictive
    stale: list[_Stale] = []
    deleted, renamed = [], []
    owners: _Owners | None = None
    readers: set[_Reader] = set()
    for state, (is_delete, only_looked_at) in context.states.items():
        if is_delete:
            deleted.append(state)  # one that is only looked at too: its row is another object's now
            readers.update(each for each in _relations(state.manager.mapper).readers if each.by_rows)
            continue
        if only_looked_at:
            if state.committed_state:  # a foreign key that follows a key
                stale += [(state, each.key) for each in _relations(state.manager.mapper).own if _is_other(state, each)]
            continue
        known = state.manager.info
        relations = known[_RELATIONS] if _RELATIONS in known else None  # noqa: SIM401 - without a call
        if relations is None or relations.generation != _generation:
            relations = _relations(state.manager.mapper)
        if relations.own:
            stale += [(state, each.key) for each in relations.own if _is_other(state, each)]
        if relations.incoming:
            if owners is None:
                owners = _Owners(session, context.states)
            stale += _moved(owners, state, relations.incoming)
        if relations.local:
            stale += [(state, each.key) for each in relations.local if _is_unlike_its_rows(state, each)]
        if relations.followed and state.key is not None and not relations.followed.isdisjoint(state.committed_state):
            renamed.append(state)
        for key, others in relations.links:
            if key in state.committed_state:
                readers.update(others)
        for each in relations.readers:
            if (state.key is None and each.by_rows) or (state.key is not None and _wrote(state, each.columns)):
                readers.add(each)
    changed = reached_by_update(session, renamed, _references) if renamed else []
    if deleted:
        stale += _kept_of_rows(context.states, deleted)
        gone, others = reached_by_delete(session, deleted, _references)
        stale += ((state, None) for state in gone)
        for mapper in {state.manager.mapper for state in deleted}:
            readers.update(_read_from_reached(mapper))
        changed += others
        deleted += gone
    if scope.orphans:
        deleted, scope.orphans = [*deleted, *scope.orphans], []
    if deleted:
        stale += _holding(session, context.states, deleted)
    for state, reference in changed:
        stale += _repointed(state, reference)
        readers.update(_read_by(reference))
    if readers:
        stale += _loaded(session, readers)
    if scope.skipped:
        stale += scope.skipped
        scope.skipped = set()
    if stale:
        scope.stale = stale


def note_orphan(session: Any, obj: Any) -> None:
    """A listener to `pending_to_transient`: remember new objects that are no longer to be written, as they have lost
    their parent, and that the next flush leaves in other collections."""
    if not session.expire_on_commit:
        session._fictive.orphans.append(attributes.instance_state(obj))


def expire_stale(session: Any) -> None:
    """Let what `note_written` found be loaded anew, once the flush is done."""
    stale, session._fictive.stale = session._fictive.stale, None
    for state, key in stale:
        expire(session, state, None if key is None else [key])


def expire(session: Any, state: Any, keys: Sequence[str] | None) -> None:
    """Let attributes of an object, or all, be loaded anew, and again where the savepoint that is open is rolled
    back."""
    obj = state.obj()
    if obj is not None and obj in session:
        session.expire(obj, keys)
        private.expire_with_savepoint(session, state)


def columns_read(attribute: Any) -> set[sa.Column[Any]]:
    """The columns by which a mapped attribute is loaded: of a relationship's joins and order, or of an expression."""
    found = _columns_joined(attribute)
    if isinstance(attribute, sa_orm.RelationshipProperty):
        found |= _columns_in(attribute.order_by or ())
    return found


def _columns_joined(attribute: Any) -> set[sa.Column[Any]]:
    is_relationship = isinstance(attribute, sa_orm.RelationshipProperty)
    found = _columns_in((attribute.primaryjoin, attribute.secondaryjoin) if is_relationship else attribute.columns[:1])
    marks_deleted = getattr(attribute.mapper.class_, DELETED_WHEN_SET, None) if is_relationship else None
    if marks_deleted is not None and attribute.direction is not sa_orm.MANYTOONE:  # which comes from memory
        found.update(attribute.mapper.column_attrs[marks_deleted].columns)
    return found


def _columns_in(expressions: Iterable[Any]) -> set[sa.Column[Any]]:
    parts = (part for each in expressions if each is not None for part in visitors.iterate(each))
    return {part for part in parts if isinstance(part, sa.Column)}


def secondary_tables(relation: Any) -> set[Any]:
    """The tables between the two sides of a relationship."""
    secondary = relation.secondary
    return set() if secondary is None else {each for each in visitors.iterate(secondary) if isinstance(each, sa.Table)}


def _relations(mapper: sa_orm.Mapper[Any]) -> _Relations:
    known: dict[Any, Any] = mapper.class_manager.info
    found: _Relations | None = known.get(_RELATIONS)
    if found is None or found.generation != _generation:
        found = known[_RELATIONS] = _relations_of(mapper)
    return found


def _relations_of(mapper: sa_orm.Mapper[Any]) -> _Relations:
    own, incoming, local, links, readers = [], [], [], [], []
    for relation in mapper.relationships:
        if relation.direction is sa_orm.MANYTOONE and (pairs := _pairs(mapper, relation.mapper, relation)):
            own.append(_Relation(mapper, relation.key, pairs))
        elif relation.direction is not sa_orm.MANYTOONE:
            is_written = not relation.viewonly and relation.passive_deletes != "all"
            columns = _attributes_of(mapper, relation.local_columns)
            local.append(_Collection(relation.key, columns, is_written, bool(relation.order_by)))
        if relation.direction is sa_orm.MANYTOMANY and not relation.viewonly:
            links.append((relation.key, tuple(_others_of(relation))))
    for owner in mapper.registry.mappers:
        for relation in owner.relationships:
            if relation.parent is not owner:
                continue
            if relation.direction is sa_orm.ONETOMANY and mapper.isa(relation.mapper):
                pairs = tuple((fk, key) for key, fk in _pairs(owner, mapper, relation))
                if pairs:
                    order = _attributes_of(mapper, _columns_in(relation.order_by or ()))
                    incoming.append(_Relation(owner, relation.key, pairs, order))
            if (reader := _reader(mapper, owner, relation)) is not None:
                readers.append(reader)
        readers += _subqueries(mapper, owner)
    references = tuple(references_to(mapper))
    followed = frozenset(key for each in references if each.on_update for key in each.keys)
    mine = (tuple(own), tuple(incoming), tuple(local), tuple(links))
    return _Relations(_generation, *mine, tuple(readers), references, followed)


def _kept_of_rows(flushed: Iterable[Any], deleted: Iterable[Any]) -> Iterator[_Stale]:
    """What new objects, whose rows were those of deleted ones, keep: SQLAlchemy makes one UPDATE of both."""
    keys = {state.key for state in deleted}
    for state in flushed:
        mapper = state.manager.mapper
        if state.key is None and mapper.identity_key_from_instance(state.obj()) in keys:
            yield from ((state, key) for key in mapper.column_attrs.keys() if key not in state.dict)  # noqa: SIM118


def _references(state: Any) -> tuple[Reference, ...]:
    return _relations(state.manager.mapper).references


def _read_from_reached(mapper: sa_orm.Mapper[Any]) -> Iterator[_Reader]:
    """What is loaded from rows that go, or change, with deleted rows of a mapper, in the session or not."""
    mappers = [mapper]
    for each in mappers:  # and those that are found on the way
        for reference in _relations(each).references:
            if reference.on_delete == "CASCADE":
                yield from (reader for reader in _relations(reference.owner).readers if reader.by_rows)
                if reference.owner not in mappers:
                    mappers.append(reference.owner)
            elif reference.on_delete:
                yield from _read_by(reference)


def _read_by(reference: Reference) -> Iterator[_Reader]:
    """What is loaded by a foreign key that the server has changed, beyond the relationships of its own objects."""
    relations, changed = _relations(reference.owner), frozenset(reference.foreign_keys)
    yield from (reader for reader in relations.readers if not changed.isdisjoint(reader.columns))
    # to another object's collection, or out of one that goes by a part of the key
    if "SET DEFAULT" in (reference.on_delete, reference.on_update) or len(changed) > 1:
        for relation in relations.incoming:
            if not changed.isdisjoint(fk for fk, _ in relation.pairs):
                yield _Reader(relation.owner, relation.key, False, changed)


def _repointed(state: Any, reference: Reference) -> Iterator[_Stale]:
    """What of an object is another one now that the server has changed its foreign key."""
    mapper, changed = state.manager.mapper, set(reference.foreign_keys)
    keys = {mapper.get_property_by_column(column).key for column in mapper.primary_key}
    yield from ((state, key) for key in changed - keys)
    relations = _relations(mapper)
    for own in relations.own:
        if own.key in state.dict and not changed.isdisjoint(fk for fk, _ in own.pairs):
            yield state, own.key
    for each in relations.local:
        if each.key in state.dict and not each.columns.isdisjoint(changed):
            yield state, each.key


def _reader(mapper: sa_orm.Mapper[Any], owner: sa_orm.Mapper[Any], relation: Any) -> _Reader | None:
    """How a relationship is loaded from rows of a mapper, beyond its foreign keys and theirs."""
    read = columns_read(relation) if relation.secondary is not None else _columns_joined(relation)
    if relation.secondary is not None:
        if not secondary_tables(relation).isdisjoint(mapper.tables):
            return _Reader(owner, relation.key, True, _attributes_of(mapper, read))
        read -= set(mapper.primary_key)
        by_rows = True
    else:
        read -= {each for pair in relation.local_remote_pairs for each in pair}
        by_rows = False  # these come by their foreign keys
    columns = _attributes_of(mapper, read) if mapper.isa(relation.mapper) else frozenset()
    return _Reader(owner, relation.key, by_rows, columns) if columns else None


def _subqueries(mapper: sa_orm.Mapper[Any], owner: sa_orm.Mapper[Any]) -> Iterator[_Reader]:
    """A mapper's `column_property()` with a subquery over rows of another one."""
    for attribute in owner.column_attrs:
        parts = visitors.iterate(attribute.columns[0])
        if attribute.parent is owner and any(isinstance(each, sa.ScalarSelect) for each in parts):
            read = columns_read(attribute) - set(owner.primary_key)
            if columns := _attributes_of(mapper, read):
                yield _Reader(owner, attribute.key, True, columns)


def _others_of(relation: Any) -> Iterator[_Reader]:
    """The other relationships that are loaded from a many-to-many's secondary table."""
    tables = secondary_tables(relation)
    for owner in relation.mapper.registry.mappers:
        for other in owner.relationships:
            is_same = other is relation or other in private.other_sides(relation)
            if other.parent is owner and not tables.isdisjoint(secondary_tables(other)) and not is_same:
                yield _Reader(owner, other.key, True, frozenset())


def _attributes_of(mapper: sa_orm.Mapper[Any], columns: Iterable[Any]) -> frozenset[str]:
    found = set()
    for column in columns:
        with contextlib.suppress(sa_orm.exc.UnmappedColumnError):
            found.add(mapper.get_property_by_column(column).key)
    return frozenset(found)


def _wrote(state: Any, keys: frozenset[str]) -> bool:
    """Whether the flush has changed one of these attributes, or the server has."""
    return not (keys.isdisjoint(state.committed_state) and keys.isdisjoint(state.expired_attributes))


def _is_unlike_its_rows(state: Any, collection: _Collection) -> bool:
    """Whether a loaded collection is of other rows now, is not in the server's order any more, or has changes that no
    flush writes, such as an object twice."""
    if collection.key not in state.dict:
        return False
    if state.key is not None and _wrote(state, collection.columns):
        return True
    if collection.key not in state.committed_state:
        return False
    members = _members(state.dict[collection.key])
    if not collection.is_written or len({id(member) for member in members}) < len(members):
        return True
    if not collection.is_ordered or len(members) < 2:
        return False
    before = {id(member) for member in _members_before(state.committed_state[collection.key])}
    return any(id(member) not in before for member in members)


def _loaded(session: Any, readers: Iterable[_Reader]) -> Iterator[tuple[Any, str]]:
    for state in session.identity_map.all_states():
        for reader in readers:
            if reader.key in state.dict and state.manager.mapper.isa(reader.owner):
                yield state, reader.key


def _pairs(local: sa_orm.Mapper[Any], remote: sa_orm.Mapper[Any], relation: Any) -> _Pairs:
    """Attributes of both sides; none where a column is not mapped."""
    try:
        return tuple(
            (local.get_property_by_column(one).key, remote.get_property_by_column(other).key)
            for one, other in relation.local_remote_pairs
        )
    except sa_orm.exc.UnmappedColumnError:
        return ()


def _is_other(state: Any, relation: _Relation) -> bool:
    """Whether a loaded many-to-one is another object than the foreign key says, or may be."""
    values = state.dict
    if relation.key not in values:
        return False
    target, expired = values[relation.key], state.expired_attributes
    if target is None:
        return all(fk in expired or values.get(fk) is not None for fk, _ in relation.pairs)
    found = attributes.instance_dict(target)
    for fk, key in relation.pairs:
        if fk in values and key in found:
            if values[fk] is None or values[fk] != found[key]:
                return True
        elif fk in expired or (fk in state.committed_state and key not in found):
            return True
    return False


def _moved(owners: _Owners, state: Any, relations: Sequence[_Relation]) -> Iterator[tuple[Any, str]]:
    """Collections that an object is in by its foreign key, or was, and which do not show it."""
    obj, values, before = state.obj(), state.dict, state.committed_state
    is_new = state.key is None
    for relation in relations:
        foreign_keys = [fk for fk, _ in relation.pairs]
        if not state.expired_attributes.isdisjoint(foreign_keys):
            # the server has computed it, and what it was before is forgotten
            yield from ((owner, relation.key) for owner in owners.all(relation) if relation.key in owner.dict)
            continue
        if not is_new and not any(fk in before for fk in foreign_keys) and relation.order.isdisjoint(before):
            continue
        now = list(owners.of(relation, [values.get(fk) for fk in foreign_keys]))
        former = () if is_new else owners.of(relation, [before.get(fk, values.get(fk)) for fk in foreign_keys])
        for owner in {*now, *former}:
            if relation.key in owner.dict:
                members = _members(owner.dict[relation.key])
                shown = sum(member is obj for member in members)  # 2, where a backref has added it once more
                if shown != (owner in now) or (shown and relation.order and len(members) > 1):
                    yield owner, relation.key


class _Owners:
    """The objects that foreign keys refer to: those of the session, and those that the same flush has added."""

    def __init__(self, session: Any, flushed: Mapping[Any, tuple[bool, bool]]) -> None:
        self._session = session
        self._flushed = flushed
        self._new: dict[Any, Any] | None = None

    def all(self, relation: _Relation) -> Iterator[Any]:
        for state in [*self._session.identity_map.all_states(), *self._added().values()]:
            if state.manager.mapper.isa(relation.owner):
                yield state

    def of(self, relation: _Relation, values: Sequence[Any]) -> Iterator[Any]:
        """The states of what these foreign keys refer to. One that was set without being loaded may have been any:
        SQLAlchemy does not ask for the old value."""
        if None in values:
            return
        wanted = {
            key: value
            for (_, key), value in zip(relation.pairs, values, strict=True)
            if value is not sa_orm.LoaderCallableStatus.NO_VALUE
        }
        primary = [relation.owner.get_property_by_column(column).key for column in relation.owner.primary_key]
        if set(primary) == set(wanted):
            identity = relation.owner.identity_key_from_primary_key(tuple(wanted[key] for key in primary))
            found = self._session.identity_map.get(identity)
            state = self._added().get(identity) if found is None else sa.inspect(found)
            if state is not None:
                yield state
            return
        for state in self.all(relation):
            if all(key in state.dict and state.dict[key] == value for key, value in wanted.items()):
                yield state

    def _added(self) -> Mapping[Any, Any]:
        """By the key under which the session is about to have them; those without a relationship are left out."""
        if self._new is None:
            self._new = {
                state.manager.mapper.identity_key_from_instance(state.obj()): state
                for state, (is_delete, only_looked_at) in self._flushed.items()
                if state.key is None
                and not is_delete
                and not only_looked_at
                and not state.dict.keys().isdisjoint(state.manager.mapper.relationships.keys())
            }
        return self._new


def _holding(session: Any, flushed: Iterable[Any], deleted: Sequence[Any]) -> Iterator[_Stale]:
    """Relationships, among those loaded in the session and of new objects, with an object that was deleted."""
    gone = {id(state.obj()) for state in deleted}
    mappers = {state.manager.mapper for state in deleted}
    for state in [*session.identity_map.all_states(), *(each for each in flushed if each.key is None)]:
        if id(state.obj()) in gone:
            continue
        for relation in state.manager.mapper.relationships:
            value = state.dict.get(relation.key)
            if value is None or not any(mapper.isa(relation.mapper) for mapper in mappers):
                continue
            if any(id(member) in gone for member in _members(value)):
                yield state, relation.key


def _members(value: Any) -> list[Any]:
    """The objects of a loaded relationship."""
    if value is None:
        return []
    try:
        return list(collections.collection_adapter(value))
    except AttributeError:
        return [value]


def _members_before(value: Any) -> Iterable[Any]:
    """The objects of a relationship before it was changed: SQLAlchemy keeps a copy of the collection."""
    return value if isinstance(value, Iterable) else ()

"""`after_commit_of`: objects of a model, once the transaction that created, changed or deleted them is committed."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import sqlalchemy.orm as sa_orm
from sqlalchemy import event

from .blocks import on_commit, on_rollback

__all__ = ["OWNER", "Told", "after_commit_of"]

OWNER = "fictive.owner"
"""The key in a session's `info` of the session that it works for, in whose transaction."""

_T = TypeVar("_T")
Told = Callable[[list[_T], list[_T], list[_T]], object]


class _Kind(enum.Enum):
    CREATED = "after_insert"
    CHANGED = "after_update"
    DELETED = "after_delete"


def after_commit_of(model: type[_T]) -> Callable[[Told[_T]], Told[_T]]:
    """Decorator: call the function with the objects of `model` that a transaction created, changed and deleted, three
    lists, after its COMMIT: `@after_commit_of(Order)` on `def index(created, changed, deleted): ...`.

    `model` is a mapped class, whose subclasses count, or a base class or mixin of some. It holds for all sessions of
    the process, and for all of a transaction at once, savepoints included: what a savepoint undid is not in the lists,
    nor is an object that was created and deleted. "Changed" are objects whose row was updated; links of a many-to-many
    relationship are no row of theirs. In autocommit, each flush is such a transaction. The function runs as a hook of
    `on_commit` does: it may use the session and begin transactions, and what it raises comes out as `HooksFailed`.

    It sees what a flush writes, `find_or_create` and its family included: for this model they take the way on which
    mapper events fire (5 round trips on a miss). Statements do not tell of objects: `update()`, `delete()`,
    `insert_many()` and the like are not seen. The objects are held until the transaction ends. Sends nothing.
    (SQLAlchemy documentation, "Mapper-level Flush Events".)
    """
    if not isinstance(model, type):
        raise TypeError(f"after_commit_of() takes a model, not {model!r}.")

    def decorate(function: Told[_T]) -> Told[_T]:
        if not callable(function):
            raise TypeError(f"after_commit_of() decorates a function, not {function!r}.")
        watch = _Watch(function)
        for kind in _Kind:
            event.listen(model, kind.value, functools.partial(watch.note, kind), propagate=True)
        return function

    return decorate


class _Watch:
    """What one function is told of."""

    def __init__(self, function: Told[Any]) -> None:
        self._function = function

    def note(self, kind: _Kind, mapper: Any, connection: Any, target: object) -> None:
        session = sa_orm.object_session(target)
        if session is None or (kind is _Kind.CHANGED and not session.is_modified(target, include_collections=False)):
            return
        session = session.info.get(OWNER, session)
        root = session.get_transaction()
        if root is None:
            return
        noted = session.info.get(self)
        if noted is None or noted.root is not root:
            noted = session.info[self] = _Noted(session, root)
        noted.add(kind, target, self)

    def tell(self, changes: Iterable[tuple[_Kind, Any]]) -> None:
        first: dict[int, _Kind] = {}
        last: dict[int, tuple[_Kind, Any]] = {}
        for kind, target in changes:
            first.setdefault(id(target), kind)
            last[id(target)] = (kind, target)
        lists: dict[_Kind, list[Any]] = {kind: [] for kind in _Kind}
        for key, (kind, target) in last.items():
            was_created = first[key] is _Kind.CREATED
            if kind is _Kind.DELETED and was_created:
                continue
            lists[_Kind.CREATED if was_created else kind].append(target)
        if any(lists.values()):
            self._function(lists[_Kind.CREATED], lists[_Kind.CHANGED], lists[_Kind.DELETED])


class _Noted:
    """The objects of one transaction, by the savepoint that they depend on."""

    def __init__(self, session: sa_orm.Session, root: sa_orm.SessionTransaction) -> None:
        self.root = root
        self._session = session
        self._open: dict[sa_orm.SessionTransaction, list[tuple[int, _Kind, Any]]] = {}
        self._kept: list[tuple[int, _Kind, Any]] = []
        self._number = 0

    def add(self, kind: _Kind, target: object, watch: _Watch) -> None:
        scope = self._session.get_nested_transaction() or self.root
        if scope not in self._open:
            self._open[scope] = []
            on_commit(self._session, self._keep, scope, watch)
            on_rollback(self._session, self._drop, scope)
        self._number += 1
        self._open[scope].append((self._number, kind, target))

    def _keep(self, scope: sa_orm.SessionTransaction, watch: _Watch) -> None:
        """After COMMIT, for each savepoint that was not rolled back; the last one tells."""
        self._kept += self._open.pop(scope)
        if not self._open:
            self._session.info.pop(watch, None)
            watch.tell((kind, target) for _, kind, target in sorted(self._kept, key=lambda each: each[0]))

    def _drop(self, scope: sa_orm.SessionTransaction) -> None:
        self._open.pop(scope, None)

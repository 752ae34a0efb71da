"""`Model.insert_many(rows)` and its like: the functions of `bulk.py` as methods of a declarative base's classes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol, TypeVar, cast, overload

from .bulk import Upserted, insert_many, update_many, upsert_many
from .bulk_operation import Progress
from .duplicates import Duplicates

__all__ = ["InsertManyDescriptor", "UpdateManyDescriptor", "UpsertManyDescriptor"]

_M = TypeVar("_M")


class _InsertMany(Protocol[_M]):
    @overload
    def __call__(
        self, rows: Iterable[Any], *, batch_size: int = ..., returning: None = ..., commit_every: int | None = ...,
        progress: Progress | None = ...,
    ) -> int:  # fmt: skip
        """Insert `rows`, mappings or objects from any iterable, by COPY where that is faster; returns how many.

        One transaction, unless `commit_every` is given. `returning="keys"` or `"objects"` returns those instead.
        """

    @overload
    def __call__(
        self, rows: Iterable[Any], *, batch_size: int = ..., returning: Literal["keys"],
        commit_every: int | None = ..., progress: Progress | None = ...,
    ) -> list[Any]:  # fmt: skip
        """Insert `rows` and return their primary keys, in the order of the rows."""

    @overload
    def __call__(
        self, rows: Iterable[Any], *, batch_size: int = ..., returning: Literal["objects"],
        commit_every: int | None = ..., progress: Progress | None = ...,
    ) -> list[_M]:  # fmt: skip
        """Insert `rows` and return them as objects of the session, in the order of the rows."""


class _UpsertMany(Protocol):
    def __call__(
        self, rows: Iterable[Any], *, key: Any, update: Sequence[Any] | None = None, duplicates: Duplicates = ...,
        batch_size: int = ..., commit_every: int | None = ..., progress: Progress | None = ...,
    ) -> Upserted:  # fmt: skip
        """Insert `rows`, and update those whose unique `key`, a name or several, is there; returns how many of each.

        `update` names the attributes to update, all others by default. `duplicates="last"`: of rows with one key the
        last wins; without it they raise `DuplicateRows`. One transaction, unless `commit_every` is given.
        """


class _UpdateMany(Protocol):
    def __call__(
        self, rows: Iterable[Any], *, key: Any = None, duplicates: Duplicates = ..., batch_size: int = ...,
        commit_every: int | None = ..., progress: Progress | None = ...,
    ) -> int:  # fmt: skip
        """Update rows by their `key`, the primary key by default; returns how many there were."""


class _Descriptor:
    """Made with a callable that returns the session to work on: `insert_many = InsertManyDescriptor(lambda: session)`
    in the body of any declarative base."""

    def __init__(self, session: Callable[[], Any]) -> None:
        self._session = session


class InsertManyDescriptor(_Descriptor):
    """`Model.insert_many(rows, ...)`: `fictive.sqlalchemy.insert_many` of that model."""

    def __get__(self, instance: object, owner: type[_M]) -> _InsertMany[_M]:
        return cast(_InsertMany[_M], _bound(insert_many, self._session(), owner))


class UpsertManyDescriptor(_Descriptor):
    """`Model.upsert_many(rows, key=..., ...)`: `fictive.sqlalchemy.upsert_many` of that model."""

    def __get__(self, instance: object, owner: type[Any]) -> _UpsertMany:
        return cast(_UpsertMany, _bound(upsert_many, self._session(), owner))


class UpdateManyDescriptor(_Descriptor):
    """`Model.update_many(rows, ...)`: `fictive.sqlalchemy.update_many` of that model."""

    def __get__(self, instance: object, owner: type[Any]) -> _UpdateMany:
        return cast(_UpdateMany, _bound(update_many, self._session(), owner))


def _bound(function: Callable[..., Any], session: Any, owner: type[Any]) -> Any:
    bound = functools.partial(function, session, owner)
    bound.__doc__ = function.__doc__  # else it is that of partial()
    return bound

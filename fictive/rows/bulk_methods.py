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
    ) -> int: ...  # fmt: skip
    @overload
    def __call__(
        self, rows: Iterable[Any], *, batch_size: int = ..., returning: Literal["keys"],
        commit_every: int | None = ..., progress: Progress | None = ...,
    ) -> list[Any]: ...  # fmt: skip
    @overload
    def __call__(
        self, rows: Iterable[Any], *, batch_size: int = ..., returning: Literal["objects"],
        commit_every: int | None = ..., progress: Progress | None = ...,
    ) -> list[_M]: ...  # fmt: skip


class _UpsertMany(Protocol):
    def __call__(
        self, rows: Iterable[Any], *, key: Any, update: Sequence[Any] | None = None, duplicates: Duplicates = ...,
        batch_size: int = ..., commit_every: int | None = ..., progress: Progress | None = ...,
    ) -> Upserted: ...  # fmt: skip


class _UpdateMany(Protocol):
    def __call__(
        self, rows: Iterable[Any], *, key: Any = None, duplicates: Duplicates = ..., batch_size: int = ...,
        commit_every: int | None = ..., progress: Progress | None = ...,
    ) -> int: ...  # fmt: skip


class _Descriptor:
    """Made with a callable that returns the session to work on: `insert_many = InsertManyDescriptor(lambda: session)`
    in the body of any declarative base."""

    def __init__(self, session: Callable[[], Any]) -> None:
        self._session = session


class InsertManyDescriptor(_Descriptor):
    """`Model.insert_many(rows, ...)`: `fictive.sqlalchemy.insert_many` of that model."""

    def __get__(self, instance: object, owner: type[_M]) -> _InsertMany[_M]:
        bound: Any = functools.partial(insert_many, self._session(), owner)
        return cast(_InsertMany[_M], bound)


class UpsertManyDescriptor(_Descriptor):
    """`Model.upsert_many(rows, key=..., ...)`: `fictive.sqlalchemy.upsert_many` of that model."""

    def __get__(self, instance: object, owner: type[Any]) -> _UpsertMany:
        return functools.partial(upsert_many, self._session(), owner)


class UpdateManyDescriptor(_Descriptor):
    """`Model.update_many(rows, ...)`: `fictive.sqlalchemy.update_many` of that model."""

    def __get__(self, instance: object, owner: type[Any]) -> _UpdateMany:
        return functools.partial(update_many, self._session(), owner)

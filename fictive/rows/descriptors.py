"""The functions of `find_or_create.py` and `bulk.py` as methods of the classes of any declarative base."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, TypeVar, Unpack, cast, overload

import sqlalchemy.orm as sa_orm

if TYPE_CHECKING:
    from .bulk import Upserted
    from .bulk_input import Duplicates
    from .bulk_operation import Progress
    from .new_objects import Defaults

__all__ = [
    "FindOrCreateDescriptor", "GetOrCreateDescriptor", "InsertManyDescriptor", "UpdateManyDescriptor",
    "UpdateOrCreateDescriptor", "UpsertManyDescriptor",
]  # fmt: skip

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)

SessionSource = Callable[[], "sa_orm.Session | sa_orm.scoped_session[Any]"]


class _FindOrCreate(Protocol[_T_co]):
    def __call__(self, defaults: Defaults = None, **filter_by: Any) -> _T_co:
        """The object that has the attributes `filter_by`, created on a miss: see `FindOrCreateDescriptor`."""


class _GetOrCreate(Protocol[_T_co]):
    def __call__(self, defaults: Defaults = None, **filter_by: Any) -> tuple[_T_co, bool]:
        """As `find_or_create`, returning `(object, created)`."""


class _UpdateOrCreate(Protocol[_T_co]):
    def __call__(
        self, defaults: Mapping[str, Any], create_defaults: Mapping[str, Any] | None = None, **filter_by: Any
    ) -> tuple[_T_co, bool]:
        """Set `defaults` on the object that has the attributes `filter_by`: see `UpdateOrCreateDescriptor`."""


class _BulkOptions(TypedDict, total=False):
    """Those of all bulk functions."""

    batch_size: int
    commit_every: int | None
    progress: Progress | None


class _InsertMany(Protocol[_T]):
    @overload
    def __call__(self, rows: Iterable[Any], *, returning: None = ..., **options: Unpack[_BulkOptions]) -> int:
        """Insert `rows`, mappings or objects, and return how many: see `fictive.sqlalchemy.insert_many`."""

    @overload
    def __call__(
        self, rows: Iterable[Any], *, returning: Literal["keys"], **options: Unpack[_BulkOptions]
    ) -> list[Any]:
        """Insert `rows` and return their primary keys, in the order of the rows."""

    @overload
    def __call__(
        self, rows: Iterable[Any], *, returning: Literal["objects"], **options: Unpack[_BulkOptions]
    ) -> list[_T]:
        """Insert `rows` and return them as objects of the session, in the order of the rows."""


class _UpsertMany(Protocol):
    def __call__(
        self, rows: Iterable[Any], *, key: Any, update: Sequence[Any] | None = None, duplicates: Duplicates = ...,
        **options: Unpack[_BulkOptions],
    ) -> Upserted:  # fmt: skip
        """Insert `rows`, or update those whose `key` is there: see `fictive.sqlalchemy.upsert_many`."""


class _UpdateMany(Protocol):
    def __call__(
        self, rows: Iterable[Any], *, key: Any = None, duplicates: Duplicates = ..., **options: Unpack[_BulkOptions]
    ) -> int:
        """Update rows by their `key`, the primary key by default: see `fictive.sqlalchemy.update_many`."""


class _Descriptor:
    """Made with a callable that returns the session to use, any of SQLAlchemy's or a registry of them:
    `insert_many = InsertManyDescriptor(lambda: session)` in the body of a declarative base."""

    def __init__(self, session: SessionSource) -> None:
        self._session = session


class FindOrCreateDescriptor(_Descriptor):
    """`Model.find_or_create(defaults=None, **filter_by)`: the object that has these attributes, created on a miss.

    `filter_by` names attributes as `Query.filter_by` does: columns, hybrids, composites, many-to-one relationships;
    None looks for NULL. `defaults` are more attributes for a new object, a mapping or a callable that returns one, and
    its values may be callables; what is callable is called on a miss only. The new object is made by the model's
    constructor. It is an object of the session, loaded, and not expired.

    However many do it at once, there is one row, and one of them has created it. 1 round trip on a hit. On a miss 2,
    and 3 where another was faster: `INSERT ... ON CONFLICT (key) DO NOTHING RETURNING`, with the primary key, unique
    constraint or unique index whose columns are all in the lookup. Where there is none, or NULL is in it, or the
    model has insert events or several tables, creators of one lookup wait for each other at an advisory lock in a
    transaction: 5 on a miss. Needs PostgreSQL 14, or SQLite, whose write lock does the same.

    Inside it is part of the transaction, and never aborts it. Outside it follows `writes_outside`; on a plain session
    it is part of the transaction that the session has begun, and nothing is committed. The session is not flushed.

    Raises before any SQL: `UnknownAttribute` for a name that is not stored, `UnsavedObject` for a related object
    without a row. `MultipleResultsFound` where several match; `IntegrityError` of any other constraint; `FlushError`,
    as of a flush, where a trigger cancels the INSERT; in REPEATABLE READ and above, where another transaction has
    created the row and this one cannot see it, the error with SQLSTATE 40001, after which the transaction is to be
    done again (PostgreSQL documentation, "Transaction Isolation"). `ConfigurationError` where the database has not
    that key, or takes no ON CONFLICT: a table with rules, a view with triggers. Those work if the model has no key.
    """

    def __get__(self, instance: object, owner: type[_T]) -> _FindOrCreate[_T]:
        source = self._session

        def find_or_create(defaults: Defaults = None, **filter_by: Any) -> _T:
            """The object that has these attributes, created on a miss; see `FindOrCreateDescriptor`."""
            from .find_or_create import get_or_create  # not before it is used

            return get_or_create(source(), owner, filter_by, defaults)[0]

        return find_or_create


class GetOrCreateDescriptor(_Descriptor):
    """`Model.get_or_create(defaults=None, **filter_by)`: as `find_or_create`, returning `(object, created)`."""

    def __get__(self, instance: object, owner: type[_T]) -> _GetOrCreate[_T]:
        source = self._session

        def bound(defaults: Defaults = None, **filter_by: Any) -> tuple[_T, bool]:
            """As `find_or_create`, returning `(object, created)`; see `GetOrCreateDescriptor`."""
            from .find_or_create import get_or_create

            return get_or_create(source(), owner, filter_by, defaults)

        return bound


class UpdateOrCreateDescriptor(_Descriptor):
    """`Model.update_or_create(defaults, create_defaults=None, **filter_by)`: returns `(object, created)`.

    Sets `defaults` on the row that the lookup finds, or creates one of the lookup, `defaults` and `create_defaults`,
    which win. Of several at once one creates, and the others' values are applied after. A row in which nothing would
    change is not written, and no `onupdate` column moves. The object is as the database has it; changes to it that
    were not flushed are lost.

    1 round trip: `INSERT ... ON CONFLICT (key) DO UPDATE`, in which callables are all called. It locks the row FOR NO
    KEY UPDATE, so that rows referring to it can still be written. Each call takes a number from the table's sequence.
    Where `find_or_create` needs its advisory lock, or the model has update events, 5 round trips, and likewise on
    SQLite. Everything else is as for `find_or_create`.
    """

    def __get__(self, instance: object, owner: type[_T]) -> _UpdateOrCreate[_T]:
        source = self._session

        def bound(
            defaults: Mapping[str, Any], create_defaults: Mapping[str, Any] | None = None, **filter_by: Any
        ) -> tuple[_T, bool]:
            """Set `defaults` on what is found, or create it; see `UpdateOrCreateDescriptor`."""
            from .find_or_create import update_or_create

            return update_or_create(source(), owner, filter_by, defaults, create_defaults)

        return bound


class InsertManyDescriptor(_Descriptor):
    """`Model.insert_many(rows, ...)`: `fictive.sqlalchemy.insert_many` of that model."""

    def __get__(self, instance: object, owner: type[_T]) -> _InsertMany[_T]:
        from .bulk import insert_many

        return cast(_InsertMany[_T], _bound(insert_many, self._session(), owner))


class UpsertManyDescriptor(_Descriptor):
    """`Model.upsert_many(rows, key=..., ...)`: `fictive.sqlalchemy.upsert_many` of that model."""

    def __get__(self, instance: object, owner: type[Any]) -> _UpsertMany:
        from .bulk import upsert_many

        return cast(_UpsertMany, _bound(upsert_many, self._session(), owner))


class UpdateManyDescriptor(_Descriptor):
    """`Model.update_many(rows, ...)`: `fictive.sqlalchemy.update_many` of that model."""

    def __get__(self, instance: object, owner: type[Any]) -> _UpdateMany:
        from .bulk import update_many

        return cast(_UpdateMany, _bound(update_many, self._session(), owner))


def _bound(function: Callable[..., Any], session: Any, owner: type[Any]) -> Any:
    bound = functools.partial(function, session, owner)
    bound.__doc__ = function.__doc__  # else it is that of partial()
    return bound

"""The queries that every model needs, under names that say what they cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..config import WritesOutside
from ..errors import ConfigurationError, NotFoundError
from ..rows import bulk
from ..rows.attributes import mapper_of, unknown_attribute
from ..session.given import dialect_of, session_of, together
from ..session.optin import OptInSession
from . import keyset

__all__ = ["KeysetPage", "Page", "Repository"]

_M = TypeVar("_M")
_List = list  # a method has that name


@dataclasses.dataclass(frozen=True)
class Page(Generic[_M]):
    """One page of numbered ones, which begin with 1."""

    items: _List[_M]
    number: int
    size: int
    total: int

    @property
    def pages(self) -> int:
        return -(-self.total // self.size)

    @property
    def has_next(self) -> bool:
        return self.number < self.pages

    @property
    def has_previous(self) -> bool:
        return self.number > 1


@dataclasses.dataclass(frozen=True)
class KeysetPage(Generic[_M]):
    """One page, and the cursors of its neighbours; None where there is none."""

    items: _List[_M]
    next: str | None
    previous: str | None


class Repository(Generic[_M]):
    """The queries of one model: `items = Repository[Item](db.session)`, or `class Items(Repository[Item])` with more.

    Takes any session, or a `scoped_session` such as `db.session`, of which it uses the current one. Each method sends
    one query, but for those of many rows. One that writes does it outside in a transaction of its own and inside in
    the open one, like the session itself. Conditions are SQL expressions, or keywords for equality:
    `items.list(Item.size > 3, color="red")`.
    """

    model: ClassVar[type[Any]]
    _bound: ClassVar[dict[type[Any], type[Any]]]

    def __class_getitem__(cls, model: Any) -> Any:
        # typing keeps the argument where an instance cannot see it; a subclass of its own can
        if isinstance(model, TypeVar):
            return super().__class_getitem__(model)  # type: ignore[misc]
        mapper_of(model)
        if "_bound" not in cls.__dict__:
            cls._bound = {}
        if model not in cls._bound:
            cls._bound[model] = type(f"{cls.__name__}[{model.__name__}]", (cls,), {"model": model})
        return cls._bound[model]

    def __init__(self, session: sa_orm.Session | sa_orm.scoped_session[Any]) -> None:
        if not hasattr(self, "model"):
            raise ConfigurationError(f"{type(self).__name__} of what? Write {type(self).__name__}[Model](session).")
        if not isinstance(session, (sa_orm.Session, sa_orm.scoped_session)):
            session_of(session)  # raises; that of a scope is not asked for before it is needed
        self._given = session

    @property
    def session(self) -> sa_orm.Session:
        """The session in use."""
        return session_of(self._given)

    # -- reading ------------------------------------------------------------------------------------------------------

    def get(self, key: Any) -> _M | None:
        """The object with that primary key, a tuple if it has several columns, or None. An object that is loaded
        already is handed out without a query."""
        found: _M | None = self.session.get(self.model, key)
        return found

    def get_or_raise(self, key: Any) -> _M:
        """The same; raises `NotFoundError`."""
        found = self.get(key)
        if found is None:
            raise NotFoundError(f"There is no {self.model.__name__} with the key {key!r}.")
        return found

    def list(
        self, *where: Any, order_by: Any = (), limit: int | None = None, offset: int | None = None, **equal: Any
    ) -> _List[_M]:
        """All objects that meet the conditions."""
        statement = self._select(where, equal).order_by(*_several(order_by)).limit(limit).offset(offset)
        return _List(self.session.scalars(statement).unique())

    def first(self, *where: Any, order_by: Any = (), **equal: Any) -> _M | None:
        """The first one in the order, or None."""
        found = self.list(*where, order_by=order_by, limit=1, **equal)
        return found[0] if found else None

    def count(self, *where: Any, **equal: Any) -> int:
        """How many there are."""
        statement = sa.select(sa.func.count()).select_from(self.model).where(*self._conditions(where, equal))
        return int(self.session.scalar(statement) or 0)

    def exists(self, *where: Any, **equal: Any) -> bool:
        """Whether there is one."""
        conditions = self._conditions(where, equal)
        return bool(self.session.scalar(sa.select(sa.select(self.model).where(*conditions).exists())))

    def page(self, number: int = 1, size: int = 20, *where: Any, order_by: Any = (), **equal: Any) -> Page[_M]:
        """Page `number` of `size` objects, with the total. One query, on a page beyond the end as well.

        The database reads all rows before the page; for far pages of large tables there is `keyset_page`. Without
        `order_by` the order is that of the primary key.
        """
        if number < 1 or size < 1:
            raise ValueError(f"page(number={number}, size={size}): both begin with 1.")
        conditions = self._conditions(where, equal)
        order = _several(order_by) or tuple(self._mapper.primary_key)
        rows = (
            sa.select(self.model, sa.func.row_number().over(order_by=order).label("fictive_position"))
            .where(*conditions)
            .order_by(*order)
            .limit(size)
            .offset((number - 1) * size)
            .subquery()
        )
        total = sa.select(sa.func.count().label("total")).select_from(self.model).where(*conditions).subquery()
        item = sa_orm.aliased(self.model, rows)
        statement = (
            sa.select(total.c.total, item)
            .select_from(total)
            .outerjoin(item, sa.true())
            .order_by(rows.c.fictive_position)
        )
        found = self.session.execute(statement).unique().all()
        items = [row[1] for row in found if row[1] is not None]
        return Page(items, number, size, total=found[0][0])

    def keyset_page(
        self,
        size: int = 20,
        *where: Any,
        after: str | None = None,
        before: str | None = None,
        order_by: Any = (),
        **equal: Any,
    ) -> KeysetPage[_M]:
        """The `size` objects after, or before, a cursor of a neighbouring page; the first page without one.

        Costs the same on every page, given an index over the columns of `order_by`, and shows nothing twice when rows
        are added meanwhile. `order_by` is NOT NULL columns of the model, with `.desc()` or without; the primary key
        goes behind them. Cursors are text for a URL, and hold the values of these columns. Raises `InvalidCursor`
        for one that is none.
        """
        if size < 1:
            raise ValueError(f"keyset_page(size={size}): it begins with 1.")
        if after is not None and before is not None:
            raise ValueError("keyset_page(after=..., before=...): one or the other.")
        order = keyset.order_of(self._mapper, _several(order_by))
        keys, backwards = order.keys, before is not None
        statement = self._select(where, equal).order_by(*order.order_by(backwards=backwards)).limit(size + 1)
        cursor = after if before is None else before
        parameters = None if cursor is None else order.parameters(cursor)
        if parameters is not None:
            dialect = dialect_of(self.session, self._mapper)
            statement = statement.where(order.beyond(dialect, backwards=backwards))
        found = _List(self.session.scalars(statement, parameters).unique())
        more, items = len(found) > size, found[:size]
        if before is not None:
            items.reverse()
        has_next, has_previous = (more, cursor is not None) if before is None else (True, more)
        return KeysetPage(
            items,
            next=keyset.encode(keys, items[-1]) if items and has_next else None,
            previous=keyset.encode(keys, items[0]) if items and has_previous else None,
        )

    # -- writing ------------------------------------------------------------------------------------------------------

    def create(self, **values: Any) -> _M:
        """A new object, written."""
        session = self._session_that_may_write("create()")
        created: _M = self.model(**values)
        session.add(created)
        session.flush()
        return created

    def update(self, instance_or_key: Any, **values: Any) -> _M:
        """The object with `values`, written. By key it is one UPDATE that returns the row, and no version is compared;
        raises `NotFoundError`."""
        session = self._session_that_may_write("update()")
        if isinstance(instance_or_key, self.model):
            for name in values:
                self._check(name)
            for name, value in values.items():
                setattr(instance_or_key, name, value)
            session.flush()
            instance: _M = instance_or_key
            return instance
        statement = sa.update(self.model).where(*self._is(instance_or_key)).values(self._named(values))
        returning = statement.returning(self.model).execution_options(populate_existing=True)
        updated: _M | None = session.scalars(returning).one_or_none()
        if updated is None:
            raise NotFoundError(f"There is no {self.model.__name__} with the key {instance_or_key!r}.")
        return updated

    def delete(self, instance_or_key: Any) -> bool:
        """Delete the object; by key it is one DELETE, without the session's cascades. Whether there was one."""
        session = self._session_that_may_write("delete()")
        if isinstance(instance_or_key, self.model):
            session.delete(instance_or_key)
            session.flush()
            return True
        result: Any = session.execute(sa.delete(self.model).where(*self._is(instance_or_key)))
        return bool(result.rowcount)

    def insert_many(self, rows: Iterable[Any]) -> int:
        """`fictive.sqlalchemy.insert_many`, which has more to say; returns how many rows there were."""
        return bulk.insert_many(self.session, self.model, rows)

    def upsert_many(self, rows: Iterable[Any], *, key: Any, update: Sequence[Any] | None = None) -> bulk.Upserted:
        """`fictive.sqlalchemy.upsert_many`; returns how many rows were inserted and updated."""
        return bulk.upsert_many(self.session, self.model, rows, key=key, update=update)

    def _session_that_may_write(self, method: str) -> sa_orm.Session:
        """The session; one that refuses writes raises before an object is touched, which it would write later."""
        session = self.session
        if isinstance(session, OptInSession) and session.writes_outside is WritesOutside.REFUSE:
            with together(session, f"{type(self).__name__}.{method}"):
                pass
        return session

    # -- building -----------------------------------------------------------------------------------------------------

    @property
    def _mapper(self) -> sa_orm.Mapper[Any]:
        return mapper_of(self.model)

    def _select(self, where: Iterable[Any], equal: dict[str, Any]) -> sa.Select[Any]:
        return sa.select(self.model).where(*self._conditions(where, equal))

    def _conditions(self, where: Iterable[Any], equal: dict[str, Any]) -> _List[Any]:
        return [*where, *(self._attribute(name) == value for name, value in equal.items())]

    def _attribute(self, name: str) -> Any:
        self._check(name)
        return getattr(self.model, name)

    def _check(self, name: str) -> None:
        if name not in self._mapper.all_orm_descriptors:
            raise unknown_attribute(self._mapper, name, f"Repository[{self.model.__name__}]")

    def _named(self, values: dict[str, Any]) -> dict[Any, Any]:
        return {self._attribute(name): value for name, value in values.items()}

    def _is(self, key: Any) -> _List[Any]:
        columns = self._mapper.primary_key
        parts = key if isinstance(key, (tuple, list)) else (key,)
        if len(parts) != len(columns):
            raise ValueError(f"{key!r}: the key of {self.model.__name__} has {len(columns)} columns.")
        return [column == part for column, part in zip(columns, parts, strict=True)]


def _several(order_by: Any) -> tuple[Any, ...]:
    if isinstance(order_by, str):
        raise TypeError(f"order_by={order_by!r}: expected a column such as Item.name or Item.name.desc(), or several.")
    if isinstance(order_by, Sequence):
        return tuple(order_by)
    return (order_by,)

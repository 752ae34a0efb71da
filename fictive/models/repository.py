"""The queries that every model needs, under names that say what they cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..config import WritesOutside
from ..errors import ConfigurationError, NotFoundError
from ..rows import bulk
from ..rows.attributes import mapper_of, unknown_attribute
from ..session.given import dialect_of, session_of
from ..session.session import OptInSession, atomic
from . import keyset
from .filters import FilterSet

__all__ = ["ForUpdate", "KeysetPage", "Page", "Repository"]

ForUpdate: TypeAlias = "bool | Mapping[str, Any] | None"
"""Whether to lock the rows, and how: the arguments of `Select.with_for_update()`."""

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
    one query, but for those of many rows. One that writes does so in
    the open transaction, or in autocommit in one of its own. `Repository(session, Item)` is one too.

    Conditions are SQL expressions, keywords for equality, and `FilterSet` objects: `items.list(Item.size > 3,
    color="red")`. `join` names relationships, one or a path of several, whose attributes the conditions and the order
    go by: `items.list(Owner.name == "Ada", join=Item.owner)`. An object is found once, however many related rows
    match; by a relationship to many rows there is no order.

    `options` are loader options such as `selectinload(Item.tags)`. `with_for_update` locks the rows of the model until
    the transaction ends: True, or the arguments of `Select.with_for_update` as a dict, `{"skip_locked": True}`.
    """

    model: type[Any]
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

    def __init__(self, session: sa_orm.Session | sa_orm.scoped_session[Any], model: type[_M] | None = None) -> None:
        name = type(self).__name__
        if model is not None:
            mapper_of(model)
            if getattr(self, "model", model) is not model:
                raise ConfigurationError(f"{name} is a repository of {self.model.__name__}, not of {model.__name__}.")
            self.model = model
        if not hasattr(self, "model"):
            raise ConfigurationError(f"{name} of what? Write {name}[Model](session).")
        if not isinstance(session, (sa_orm.Session, sa_orm.scoped_session)):
            session_of(session)  # raises; that of a scope is not asked for before it is needed
        self._given = session

    @property
    def session(self) -> sa_orm.Session:
        """The session in use."""
        return session_of(self._given)

    # -- reading ------------------------------------------------------------------------------------------------------

    def get(self, key: Any, *, options: Sequence[Any] = (), with_for_update: ForUpdate = None) -> _M | None:
        """The object with that primary key, a tuple if it has several columns, or None. An object that is loaded
        already is handed out without a query, unless it is to be locked."""
        lock = self._lock(with_for_update)
        found: _M | None = self.session.get(
            self.model, key, options=_several(options, "options"), with_for_update=lock
        )
        return found

    def get_or_raise(self, key: Any, *, options: Sequence[Any] = (), with_for_update: ForUpdate = None) -> _M:
        """The same; raises `NotFoundError`."""
        found = self.get(key, options=options, with_for_update=with_for_update)
        if found is None:
            raise NotFoundError(f"There is no {self.model.__name__} with the key {key!r}.")
        return found

    def list(
        self,
        *where: Any,
        order_by: Any = (),
        limit: int | None = None,
        offset: int | None = None,
        join: Any = (),
        options: Sequence[Any] = (),
        with_for_update: ForUpdate = None,
        **equal: Any,
    ) -> _List[_M]:
        """All objects that meet the conditions."""
        query = self._query(where, equal, order_by, join)
        statement = query.select(self.model).order_by(*query.order).limit(limit).offset(offset)
        statement = statement.options(*_several(options, "options"))
        if (lock := self._lock(with_for_update)) is not None:
            statement = statement.with_for_update(**lock)
        return _List(self.session.scalars(statement).unique())

    get_all = list
    """`list`, by another name."""

    def first(
        self,
        *where: Any,
        order_by: Any = (),
        join: Any = (),
        options: Sequence[Any] = (),
        with_for_update: ForUpdate = None,
        **equal: Any,
    ) -> _M | None:
        """The first one in the order, or None."""
        found = self.list(
            *where, order_by=order_by, limit=1, join=join, options=options, with_for_update=with_for_update, **equal
        )
        return found[0] if found else None

    def count(self, *where: Any, join: Any = (), **equal: Any) -> int:
        """How many there are."""
        query = self._query(where, equal, (), join)
        return int(self.session.scalar(query.select(sa.func.count(), of=self.model)) or 0)

    def exists(self, *where: Any, join: Any = (), **equal: Any) -> bool:
        """Whether there is one."""
        query = self._query(where, equal, (), join)
        return bool(self.session.scalar(sa.select(query.select(self.model).exists())))

    def page(
        self,
        number: int = 1,
        size: int = 20,
        *where: Any,
        order_by: Any = (),
        join: Any = (),
        options: Sequence[Any] = (),
        **equal: Any,
    ) -> Page[_M]:
        """Page `number` of `size` objects, with the total. One query, on a page beyond the end as well.

        The database reads all rows before the page; for far pages of large tables there is `keyset_page`. Without
        `order_by` the order is that of the primary key.
        """
        if number < 1 or size < 1:
            raise ValueError(f"page(number={number}, size={size}): both begin with 1.")
        query = self._query(where, equal, order_by, join)
        order = query.order or self._key
        position = sa.func.row_number().over(order_by=order).label("fictive_position")
        rows = (
            query.select(*self._key, position, of=self.model)
            .order_by(*order)
            .limit(size)
            .offset((number - 1) * size)
            .subquery()
        )
        total = query.select(sa.func.count().label("total"), of=self.model).subquery()
        same = sa.and_(*(own == found for own, found in zip(self._key, rows.c, strict=False)))
        statement = (
            sa.select(total.c.total, self.model)
            .select_from(total)
            .outerjoin(rows, sa.true())
            .outerjoin(self.model, same)
            .order_by(rows.c.fictive_position)
            .options(*_several(options, "options"))
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
        join: Any = (),
        options: Sequence[Any] = (),
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
        query = self._query(where, equal, order_by, join)
        order = keyset.order_of(self._mapper, query.order, dialect_of(self.session, self._mapper))
        cursor = after if before is None else before
        parameters = None if cursor is None else order.parameters(cursor)
        page = order.page(size + 1, has_cursor=cursor is not None, backwards=before is not None)
        statement = query.narrow(page)
        if options:
            statement = statement.options(*_several(options, "options"))
        try:
            found = self.session.execute(statement, parameters).unique().all()
        except sa.exc.DataError as error:
            if cursor is None:
                raise
            # a number too large for its column, or a time zone that PostgreSQL has not
            raise keyset.no_cursor(cursor) from error
        more, rows = len(found) > size, found[:size]
        if before is not None:
            rows = rows[::-1]
        has_next, has_previous = (more, cursor is not None) if before is None else (True, more)
        return KeysetPage(
            [row[0] for row in rows],
            next=keyset.encode(rows[-1][1:]) if rows and has_next else None,
            previous=keyset.encode(rows[0][1:]) if rows and has_previous else None,
        )

    # -- writing ------------------------------------------------------------------------------------------------------

    def create(self, instance: _M | None = None, /, **values: Any) -> _M:
        """A new object, written: `instance`, or one made of `values`."""
        if instance is not None and (values or not isinstance(instance, self.model)):
            raise TypeError(f"create() takes one {self.model.__name__}, or its values by keyword.")
        session = self._session_that_may_write("create()")
        created: _M = self.model(**values) if instance is None else instance
        session.add(created)
        session.flush()
        return created

    def update(self, instance_or_key: Any, **values: Any) -> _M:
        """The object with `values`, written. By key it is one UPDATE that returns the row, and no version is compared;
        raises `NotFoundError`, also for a row that is marked deleted and hidden."""
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
            with atomic(session, f"{type(self).__name__}.{method}"):
                pass
        return session

    # -- building -----------------------------------------------------------------------------------------------------

    @property
    def _mapper(self) -> sa_orm.Mapper[Any]:
        return mapper_of(self.model)

    @property
    def _key(self) -> _List[Any]:
        """The attributes of the primary key."""
        mapper = self._mapper
        return [getattr(self.model, mapper.get_property_by_column(column).key) for column in mapper.primary_key]

    def _query(self, where: Iterable[Any], equal: dict[str, Any], order_by: Any, join: Any) -> _Query:
        conditions: _List[Any] = []
        order = _several(order_by)
        relationships = [_relationship(each) for each in _several(join, "join")]
        for each in where:
            if isinstance(each, FilterSet):
                conditions += each.where
                order = order or tuple(each.order_by)
                relationships += each.relationships
            else:
                conditions.append(each)
        conditions += [self._attribute(name) == value for name, value in equal.items()]
        unique = {id(each.property): each for each in relationships}
        return _Query(self._key, conditions, order, _List(unique.values()))

    def _lock(self, with_for_update: ForUpdate) -> dict[str, Any] | None:
        """Of the model's rows alone, not of those that are loaded along."""
        if with_for_update is None or with_for_update is False:
            return None
        if with_for_update is True:
            return {"of": self.model}
        if not isinstance(with_for_update, Mapping):
            raise TypeError(f"with_for_update={with_for_update!r}: expected True or a dict of its arguments.")
        return {"of": self.model, **with_for_update}

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


@dataclasses.dataclass(frozen=True)
class _Query:
    """What a reading method was asked for."""

    key: _List[Any]
    conditions: _List[Any]
    order: tuple[Any, ...]
    relationships: _List[Any]

    def select(self, *entities: Any, of: Any = None) -> sa.Select[Any]:
        """A SELECT of `entities` that meet the conditions. `of` is the model, where `entities` do not name it."""
        statement = sa.select(*entities)
        if of is not None:
            statement = statement.select_from(of)
        return self.narrow(statement)

    def narrow(self, statement: sa.Select[Any]) -> sa.Select[Any]:
        """The statement with joins and conditions; the same object where there are none, as SQLAlchemy keeps with it
        the key of its cache."""
        if not self.conditions and not self.relationships:
            return statement
        if not any(each.property.uselist for each in self.relationships):
            for each in self.relationships:
                statement = statement.join(each, isouter=True)  # an order loses no row that has nothing to join
            return statement.where(*self.conditions)
        # by a relationship to many a row would come several times
        found = sa.select(*self.key).correlate(None)
        for each in self.relationships:
            found = found.join(each)
        found = found.where(*self.conditions)
        return statement.where((sa.tuple_(*self.key) if len(self.key) > 1 else self.key[0]).in_(found))


def _relationship(given: Any) -> Any:
    prop = getattr(given, "property", None)
    if not isinstance(given, sa_orm.QueryableAttribute) or not isinstance(prop, sa_orm.RelationshipProperty):
        raise TypeError(f"join={given!r}: expected relationships such as Item.owner.")
    return given


def _several(given: Any, what: str = "order_by") -> tuple[Any, ...]:
    if isinstance(given, str):
        expected = "a column such as Item.name or Item.name.desc(), or several" if what == "order_by" else "no text"
        raise TypeError(f"{what}={given!r}: expected {expected}.")
    if isinstance(given, Sequence):
        return tuple(given)
    return (given,)

"""Waiting until a row changes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..connection.engines import connection_in_autocommit
from ..errors import NotFoundError, RowChangeTimeout, SnapshotIsFixed
from ..other_names import also_named
from ..rows.attributes import as_key, mapped_property, mapper_of, python_types, table_columns, unknown_attribute
from ..session.durations import Duration, timeout_in_ms
from ..session.given import session_of, write_on
from ..session.session import OptInSession
from .listener import Waiter, listen
from .notify_triggers import announces, tables_of

__all__ = ["wait_for_row_change"]

_T = TypeVar("_T")
_UNKNOWN: Any = object()
_READS = {"fictive_writes": False, "fictive_primary": True}  # whatever functions are called
_FIXED = ("repeatable read", "serializable")


@also_named(pk_value="pk")
def wait_for_row_change(
    session: object,
    model: type[_T],
    pk: Any,
    *,
    columns: Iterable[str | sa_orm.QueryableAttribute[Any]] | None = None,
    interval: Duration = 0.5,
    timeout: Duration | None = None,
) -> _T:
    """Wait until another transaction has changed a row, and return its object, loaded anew.

    `pk` is the primary key, a tuple where it has several columns. `columns` are the attributes that count, by default
    all columns that a query loads (not deferred ones). A change is a value that differs from the one the session's
    own object was loaded with, so one committed between that and this call is seen at once; of what is not loaded,
    from the one that the first look finds.

    The row is looked at every `interval`; after `notify_changes(model)` the database tells when to look, and nothing
    is sent meanwhile. Both are seconds, text such as `"100ms"`, or a timedelta. After `timeout`, by the monotonic
    clock and with the time that queries take, `RowChangeTimeout`, a `TimeoutError`, is raised. A row that is not
    there, or is deleted meanwhile, is a `NotFoundError`, whose message says which.

    Unsaved changes of the object are kept. In autocommit each look is one round trip that selects what is compared,
    and no connection is held in between; the object at the end is one more. In a transaction its connection is held as
    ever; where it can see no change, since its isolation level is REPEATABLE READ or SERIALIZABLE, the first look
    raises `SnapshotIsFixed`. A session bound to a connection that is in a transaction looks in a savepoint, so that an
    error leaves that transaction usable. A plain session holds a connection once it has begun a transaction, which
    loading the object does: end it before the next call.

    Before any SQL: `TypeError` for what is not a model and for a key of another kind, `UnknownAttribute` for unknown
    columns, `ConfigurationError` for a bad interval or timeout.
    """
    poller = RowPoller(session_of(session), mapper_of(model), pk, columns)
    seconds = timeout_in_ms(interval, "interval") / 1000
    deadline = math.inf if timeout is None else time.monotonic() + timeout_in_ms(timeout, "timeout") / 1000

    def remaining() -> float | None:
        return None if timeout is None else max(0.0, deadline - time.monotonic())

    with poller.waiter() as waiter:
        if poller.is_announced:
            left = remaining()
            waiter.answered.wait(seconds if left is None else min(seconds, left))
        while True:
            waiter.woken.clear()
            if poller.finds_change(waiter):
                return poller.instance()  # type: ignore[no-any-return]
            if (left := remaining()) == 0:
                raise RowChangeTimeout(f"{poller.name} did not change within {timeout!r}.")
            waiter.sleep(seconds, left)


class RowPoller:
    """What is compared, and with what."""

    def __init__(
        self,
        session: sa_orm.Session,
        mapper: sa_orm.Mapper[Any],
        pk: Any,
        columns: Iterable[str | sa_orm.QueryableAttribute[Any]] | None,
    ) -> None:
        self._session = session
        self._mapper = mapper
        key = as_key(pk, python_types(mapper.primary_key))
        if key is None:
            expected = ", ".join(f"{column.name} {column.type!r}" for column in mapper.primary_key)
            raise TypeError(f"{pk!r} is no primary key of {mapper.class_.__name__} ({expected}).")
        self._key = key
        self.name = f"{mapper.class_.__name__} {', '.join(map(str, key))}"
        self._properties = _watched(mapper, columns)
        self._tables = tables_of(mapper)
        self.is_announced = all(map(announces, self._tables))
        self._identity = mapper.identity_key_from_primary_key(key)
        instance = session.identity_map.get(self._identity)
        self._seen = instance is not None
        self._known = [_loaded(instance, prop) for prop in self._properties]
        attributes = [getattr(mapper.class_, prop.key) for prop in self._properties]
        ours = [getattr(mapper.class_, mapper.get_property_by_column(column).key) for column in mapper.primary_key]
        self._statement = sa.select(*attributes).where(*(own == value for own, value in zip(ours, key, strict=True)))
        self._first = True

    @contextlib.contextmanager
    def waiter(self) -> Iterator[Waiter]:
        """Told of changes where the model's tables have the trigger; else one that polls."""
        table = self._mapper.local_table  # a replica takes no LISTEN
        engine = self._session.get_bind(self._mapper, clause=write_on(table))
        if isinstance(engine, sa.Connection):
            engine = engine.engine
        self.is_announced = self.is_announced and engine.dialect.name == "postgresql"
        if not self.is_announced:
            yield Waiter(())
            return
        with listen(engine, self._tables) as waiter:
            yield waiter

    def finds_change(self, waiter: Waiter) -> bool:
        """One statement. Raises `NotFoundError` where the row is gone, `SnapshotIsFixed` where looking is no use."""
        row = self._one(waiter)
        if row is None:
            raise self._not_found()
        self._seen = True
        changed = False
        for index, (prop, value) in enumerate(zip(self._properties, row, strict=True)):
            if self._known[index] is _UNKNOWN:
                self._known[index] = value
            elif not _same(prop, self._known[index], value):
                changed = True
        return changed

    def _not_found(self) -> NotFoundError:
        return NotFoundError(f"{self.name} was {'deleted' if self._seen else 'not found'}.")

    def _one(self, waiter: Waiter) -> Any:
        """The values to compare. With the first ones come what the trigger calls the row, and the isolation level."""
        inside = self._session.in_transaction()
        statement, extra = self._statement, 0
        if self._first and self.is_announced:
            statement = statement.add_columns(_as_notified(self._mapper))
            extra = 1
        bind = self._bind()
        postgresql = bind.dialect.name == "postgresql"
        if self._first and inside and postgresql:
            statement = statement.add_columns(sa.func.current_setting("transaction_isolation"))
        row: Any = self._run(statement, bind)
        if self._first and inside and (not postgresql or (row is not None and row[-1] in _FIXED)):
            raise SnapshotIsFixed(
                "wait_for_row_change() in a transaction that goes on seeing the data as it was when it began. Call it "
                "in autocommit, or in one of isolation level READ COMMITTED."
            )
        self._first = False
        if row is None:
            return None
        if extra and _is_plain(self._mapper):
            waiter.key = row[len(self._properties)]
        return row[: len(self._properties)]

    def _run(self, statement: sa.Select[Any], bind: sa.Engine | sa.Connection) -> Any:
        session = self._session
        with _savepoint_of_another(session, bind):
            if isinstance(session, OptInSession) or session.in_transaction():
                return session.execute(
                    statement, bind_arguments={"mapper": self._mapper}, execution_options=_READS
                ).one_or_none()
            if isinstance(bind, sa.Connection):
                return bind.execute(statement).one_or_none()
        with connection_in_autocommit(bind) as connection:
            # a plain session would begin a transaction, and stay in it while it sleeps
            return connection.execute(statement).one_or_none()

    def _bind(self) -> sa.Engine | sa.Connection:
        return self._session.get_bind(self._mapper)

    def instance(self) -> Any:
        """The object with what is stored now, but for what was changed on it and not saved."""
        if not isinstance(self._session, OptInSession):
            return self._load()  # it begins a transaction, which would outlive the savepoint
        with _savepoint_of_another(self._session, self._bind()):
            return self._load()

    def _load(self) -> Any:
        found = self._session.identity_map.get(self._identity)
        if found is None:
            found = self._session.get(self._mapper.class_, self._key[0] if len(self._key) == 1 else self._key)
            if found is None:
                raise self._not_found()
            return found
        state: sa_orm.InstanceState[Any] = sa.inspect(found)
        unchanged = [each.key for each in state.attrs if not each.history.has_changes()]
        self._session.expire(found, unchanged)
        names = [name for name in unchanged if name in state.mapper.column_attrs and not _is_deferred(state, name)]
        try:
            self._session.refresh(found, names)
        except sa.exc.InvalidRequestError as error:
            if type(error) is not sa.exc.InvalidRequestError:
                raise
            raise self._not_found() from error
        return found


def _savepoint_of_another(
    session: sa_orm.Session, bind: sa.Engine | sa.Connection
) -> contextlib.AbstractContextManager[Any]:
    """A savepoint where a statement would run in a transaction that the session has not begun, but was bound to."""
    if isinstance(bind, sa.Connection) and bind.in_transaction() and not session.in_transaction():
        return bind.begin_nested()
    return contextlib.nullcontext()


def _is_deferred(state: sa_orm.InstanceState[Any], name: str) -> bool:
    return state.mapper.column_attrs[name].deferred


def _watched(
    mapper: sa_orm.Mapper[Any], columns: Iterable[str | sa_orm.QueryableAttribute[Any]] | None
) -> list[sa_orm.ColumnProperty[Any]]:
    if columns is None:
        return [prop for prop in mapper.column_attrs if table_columns(prop) and not prop.deferred]
    if isinstance(columns, (str, sa_orm.QueryableAttribute)):
        raise TypeError(f"columns = {columns!r}: expected a list of attributes.")
    found = []
    for column in columns:
        name = column if isinstance(column, str) else getattr(column, "key", None)
        if not isinstance(name, str):
            raise TypeError(f"columns: {column!r} is no attribute of {mapper.class_.__name__}.")
        prop = mapped_property(mapper, name)
        if not isinstance(prop, sa_orm.ColumnProperty) or not table_columns(prop):
            raise unknown_attribute(mapper, name, "columns")
        found.append(prop)
    if not found:
        raise TypeError("columns is empty: nothing to compare. Leave it out for all.")
    return found


def _loaded(instance: object | None, prop: sa_orm.ColumnProperty[Any]) -> Any:
    """The value that an attribute was loaded with, whatever it was changed to since; sends nothing."""
    if instance is None:
        return _UNKNOWN
    history = sa.inspect(instance).attrs[prop.key].history
    values = history.deleted if history.has_changes() else history.unchanged
    return values[0] if values else _UNKNOWN


def _same(prop: sa_orm.ColumnProperty[Any], one: Any, other: Any) -> bool:
    # NaN is not equal to itself
    return one is other or bool(prop.columns[0].type.compare_values(one, other)) or (one != one and other != other)


def _as_notified(mapper: sa_orm.Mapper[Any]) -> sa.ColumnElement[str]:
    """The key as the trigger sends it."""
    return sa.cast(sa.func.json_build_array(*mapper.primary_key), sa.Text)


def _is_plain(mapper: sa_orm.Mapper[Any]) -> bool:
    """Whether the trigger names the row as `_as_notified` does: by the same columns, and no setting of the
    connection, such as its time zone, makes another text of them."""
    keys = [list(table.primary_key.columns) for table in tables_of(mapper)]
    if list(mapper.primary_key) not in keys or len({len(key) for key in keys}) > 1 or len(keys[0]) > 1 < len(keys):
        return False
    return all(isinstance(column.type, (sa.Integer, sa.String, sa.Uuid)) for column in mapper.primary_key)

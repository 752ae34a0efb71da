"""Find a row by some of its attributes, or create it: correct under concurrency, without catching IntegrityError."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..config import WritesOutside
from ..connection.replicas import has_replicas
from ..drivers import sqlstate
from ..errors import ConfigurationError, KeyOfDeletedRow, UnsupportedDialect
from ..session import private
from ..session.given import dialect_of, session_of
from ..session.model_events import OWNER
from ..session.session import OptInSession, atomic
from . import get_or_create_sql
from .attributes import mapper_of
from .lookups import Lookup, lookup_of, plan_of
from .new_objects import (
    Defaults,
    check_names,
    columns_of,
    evaluated,
    lacks,
    new_object,
    set_columns,
    split,
    written_columns,
)
from .stored_values import is_sql
from .unique_keys import UniqueKey, refused_conflict
from .write_binding import execute_write, writing

__all__ = ["get_or_create", "update_or_create"]

_T = TypeVar("_T")

_ASIDE: Any = {"autoflush": False, "expire_on_commit": False, "join_transaction_mode": "create_savepoint"}
_ROUNDS = 5
"""How often a row may vanish between the INSERT that met it and the SELECT that looks for it."""
_TRIES = 20
"""How often a transaction of our own, with nothing else in it, is done again after a serialization failure."""


def get_or_create(
    session: object, model: type[_T], filter_by: Mapping[str, Any], defaults: Defaults = None
) -> tuple[_T, bool]:
    """See `FindOrCreateDescriptor`."""
    call = LookupOperation(session, model, "find_or_create", filter_by)
    if not callable(defaults):
        check_names(call.mapper, defaults or {}, "defaults", filter_by)
    return call.again_on_conflict(lambda: call.find_or_create(defaults))


def update_or_create(
    session: object,
    model: type[_T],
    filter_by: Mapping[str, Any],
    defaults: Mapping[str, Any],
    create_defaults: Mapping[str, Any] | None = None,
) -> tuple[_T, bool]:
    """See `UpdateOrCreateDescriptor`."""
    call = LookupOperation(session, model, "update_or_create", filter_by)
    check_names(call.mapper, defaults, "defaults", filter_by)
    check_names(call.mapper, create_defaults or {}, "create_defaults", filter_by)
    changes = evaluated(defaults)
    return call.again_on_conflict(lambda: call.update_or_create(changes, create_defaults or {}))


class LookupOperation:
    """One call: what is looked up, where, and the key that it goes by."""

    def __init__(self, session: object, model: type[Any], method: str, filter_by: Mapping[str, Any]) -> None:
        self.session = session_of(session)
        self.mapper = mapper_of(model)
        self.what = f"{model.__name__}.{method}()"
        self.dialect = dialect_of(self.session, self.mapper)
        self._filter_by = filter_by
        self._plan = plan_of(self.mapper, filter_by, self.dialect)
        if self._plan is None:
            _ = self.lookup  # what is wrong with it is an error before any SQL
        if self.dialect.name not in ("postgresql", "sqlite"):
            raise UnsupportedDialect(
                f"{self.what} needs PostgreSQL or SQLite; this session is on {self.dialect.name}."
            )
        self._made: dict[str, Any] | None = None

    @functools.cached_property
    def lookup(self) -> Lookup:
        return lookup_of(self.mapper, self._filter_by, self.dialect)

    @functools.cached_property
    def key(self) -> UniqueKey | None:
        """The unique key that the lookup goes by; looked for on a miss only."""
        if self._plan is not None:
            return self._plan.key(self._filter_by)
        return self.lookup.key(self.dialect.name)

    def _write(
        self, statement: sa.Executable, parameters: Mapping[str, Any] | None = None, *, what: str = "",
        key: UniqueKey | None = None,
    ) -> Any:  # fmt: skip
        """`key`: what the statement names in ON CONFLICT."""
        try:
            return execute_write(self.session, statement, self.mapper, parameters, what=what)
        except sa.exc.DBAPIError as error:
            refused = key and refused_conflict(error, self.what, self.mapper.local_table, key)
            if not refused:
                raise
            raise ConfigurationError(
                f"{refused} Make that key in the database; or leave it (unique=True) out of the model, and those who "
                "create such a row wait for each other at an advisory lock."
            ) from error

    # -- outside and inside -------------------------------------------------------------------------------------------

    def again_on_conflict(self, work: Callable[[], _T]) -> _T:
        """Outside nothing else is lost when a serialization failure rolls it back, so it is done again here.

        It happens where the server's own default is REPEATABLE READ or above.
        """
        for left in reversed(range(_TRIES)):
            alone = self._is_alone()
            try:
                return work()
            except sa.exc.DBAPIError as error:
                if not alone or not left or sqlstate(error) != "40001":
                    raise
        raise AssertionError("the last try returns or raises")

    def _is_alone(self) -> bool:
        session = self.session
        if not isinstance(session, OptInSession) or session.in_transaction():
            return False
        bind = session.get_bind(mapper=self.mapper)
        joined = isinstance(bind, sa.Connection) and bind.in_transaction()
        return session.writes_outside is WritesOutside.COMMIT and not joined

    # -- finding ------------------------------------------------------------------------------------------------------

    def find(self, *, populate_existing: bool = False) -> Any:
        """The object, or None; raises `MultipleResultsFound`."""
        options = {"populate_existing": True} if populate_existing else {}
        if has_replicas():
            options["fictive_primary"] = True
        if self._plan is None:
            statement, parameters = self.lookup.select(), None
        else:
            statement, parameters = self._plan.statement, self._plan.parameters(self._filter_by)
        return self.session.scalars(statement, parameters, execution_options=options).unique().one_or_none()

    def find_or_create(self, defaults: Defaults) -> tuple[Any, bool]:
        if (found := self.find()) is not None:
            return found, False
        values = self._values(defaults)
        if self.key is not None and self._is_plain("before_insert", "after_insert"):
            return self._create_by_key(values, self.key)
        with self._alone_with_lookup() as (aside, level):
            if (found := self.find()) is not None:
                return found, False
            return self._create(aside, values, level)

    def update_or_create(self, changes: Mapping[str, Any], only_new: Mapping[str, Any]) -> tuple[Any, bool]:
        if (
            self.key is not None
            and changes
            and self.dialect.name == "postgresql"
            and self._is_plain("before_insert", "after_insert", "before_update", "after_update")
        ):
            values = self._values({**changes, **only_new})
            columns = self._columns(values)
            # PostgreSQL looks for NULLs before it looks for a conflict, and would refuse to update a row that is there
            if not lacks(self.mapper.local_table, columns):
                return self._update_or_create_by_key(changes, values, columns, self.key)
        with self._alone_with_lookup() as (aside, level):
            # of=class_ would be the tables of subclasses too, where `with_polymorphic` joins them; a concrete class
            # may be a subquery of its table, which has no other name to lock by
            of = None if self.mapper.concrete else list(self.mapper.tables)
            locking = self.lookup.select().with_for_update(key_share=True, of=of)
            for left in reversed(range(_ROUNDS)):
                rows = aside.scalars(locking).unique()
                found = rows.one_or_none() if left else rows.one()
                if found is not None:
                    break
                created = self._create(aside, self._values({**changes, **only_new}), level)
                if created[1]:
                    return created
            for name, value in split(self.mapper, changes)[0].items():
                setattr(found, name, value)
            aside.commit()
            return self._adopt(found, changes), False

    # -- creating -----------------------------------------------------------------------------------------------------

    def _values(self, defaults: Defaults) -> dict[str, Any]:
        """What a new object is made of; callables are called at the first time."""
        if self._made is None:
            given = defaults() if callable(defaults) else defaults
            if callable(defaults):
                check_names(self.mapper, given or {}, "defaults", self._filter_by)
            looked_up: Mapping[str, Any]
            if self._plan is not None:
                looked_up = self._plan.assigned(self._filter_by)
            else:
                looked_up = {**self.lookup.assigned, **self.lookup.related}
            self._made = {**looked_up, **evaluated(given or {})}
        return self._made

    def _is_plain(self, *events: str) -> bool:
        """Whether one INSERT is all there is to creating: one table, which tells the class, and nobody listens."""
        mapper = self.mapper
        return (
            isinstance(mapper.local_table, sa.Table)
            and len(mapper.tables) == 1
            and (mapper.polymorphic_on is None or mapper.polymorphic_on in set(mapper.local_table.columns))
            and not private.has_listeners(self.mapper, *events)
        )

    def _new(self, values: Mapping[str, Any]) -> Any:
        return new_object(self.mapper, *split(self.mapper, values))

    def _columns(self, values: Mapping[str, Any]) -> dict[sa.Column[Any], Any]:
        nulls = self.lookup.nulls if self._plan is None else self._plan.nulls
        given = columns_of(self.mapper, self._new(values), nulls, self.dialect)
        return written_columns(self.mapper, given, self.dialect)

    def _create_by_key(self, values: Mapping[str, Any], key: UniqueKey) -> tuple[Any, bool]:
        columns = self._columns(values)
        unless_there, parameters = self._insert_unless_there(columns, key)
        for _ in range(_ROUNDS):
            created = self._write(unless_there, parameters, key=key).scalars().one_or_none()
            if created is not None:
                return self._with_related(created, values), True
            if (found := self.find()) is not None:
                return found, False
            self._refuse_key_of_deleted(key)
        return self._insist(columns, values), True

    def _insert_unless_there(
        self, columns: Mapping[sa.Column[Any], Any], key: UniqueKey
    ) -> tuple[sa.Executable, Mapping[str, Any] | None]:
        """The statement and its parameters; the plan keeps it, unless the values are in it."""
        if self._plan is None or any(map(is_sql, columns.values())):
            return get_or_create_sql.insert_unless_there(self.mapper, columns, key, self.dialect.name), None
        kept = self._plan.inserts.get((key, *columns))
        if kept is None:
            kept = get_or_create_sql.prepared_insert(self.mapper, columns, key, self.dialect.name)
            self._plan.inserts[(key, *columns)] = kept
        statement, names = kept
        return statement, dict(zip(names, columns.values(), strict=True))

    def _refuse_key_of_deleted(self, key: UniqueKey) -> None:
        """Raise where what keeps the row from being made is one that is deleted: it would be in the way for ever."""
        lookup, model = self.lookup, self.mapper.class_.__name__
        if lookup.live is None:
            return
        deleted = get_or_create_sql.deleted_with_key(lookup, key)
        if self.session.execute(deleted, bind_arguments={"mapper": self.mapper}).first() is None:
            return
        shown = [
            f"{column.name}={lookup.columns.get(column)!r}" for column in key.elements if column in lookup.columns
        ]
        raise KeyOfDeletedRow(
            f"{self.what}: a {model} that is deleted has the key {', '.join(shown) or 'of the lookup'}. Restore it "
            "(SELECT it by with_deleted(...)), or make the key one that only live rows have: unique_among_live(...)."
        )

    def _insist(self, columns: Mapping[sa.Column[Any], Any], values: Mapping[str, Any]) -> Any:
        """Insert, and let the database say so where a row outside the lookup has the key, with another value in the
        rest of the lookup or of another class."""
        created = self._write(get_or_create_sql.insert(self.mapper, columns)).scalars().one_or_none()
        if created is None:
            raise sa_orm.exc.FlushError(
                f"{self.what}: the database inserted no {self.mapper.class_.__name__}. Look for a BEFORE INSERT "
                f"trigger on {self.mapper.local_table} that returns NULL."
            )
        return self._with_related(created, values)

    def _update_or_create_by_key(
        self,
        changes: Mapping[str, Any],
        values: Mapping[str, Any],
        columns: Mapping[sa.Column[Any], Any],
        key: UniqueKey,
    ) -> tuple[Any, bool]:
        setting = set_columns(self.mapper, split(self.mapper, changes)[0])
        statement = get_or_create_sql.upsert(self.lookup, columns, setting, key, self.dialect)
        for _ in range(_ROUNDS):
            row = self._write(statement, what=self.what, key=key).unique().one_or_none()
            if row is not None:
                return self._with_related(row[0], values if row[1] else changes), bool(row[1])
            if (found := self.find(populate_existing=True)) is not None:  # unchanged, and not seen by that statement
                return self._with_related(found, changes), False
            self._refuse_key_of_deleted(key)
        return self._insist(columns, values), True

    def _connection(self) -> sa.Connection:
        return self.session.connection(bind_arguments=writing(self.mapper))

    # -- creating where no statement can do it alone --------------------------------------------------------------

    @contextlib.contextmanager
    def _alone_with_lookup(self) -> Iterator[tuple[sa_orm.Session, str]]:
        """A transaction in which nobody else creates this lookup; a session of its own in it, and its isolation level.

        What is pending in the caller's session stays as it is, whatever happens in here.
        """
        with atomic(self.session, self.what):
            if self.dialect.name == "sqlite":
                level = ""
                self._write(get_or_create_sql.write_lock(self.mapper))
            else:
                level = self._write(get_or_create_sql.lock_lookup(self.lookup, self.dialect)).one()[1]
            connection = self._connection()
            with sa_orm.Session(connection, info={OWNER: self.session}, **_ASIDE) as aside:
                yield aside, level

    def _create(self, aside: sa_orm.Session, values: Mapping[str, Any], level: str) -> tuple[Any, bool]:
        """The new object; or one that was there all the same, from a writer who does not take the lock."""
        aside.commit()  # its savepoint so far, which would take back what is written through the caller's session
        frozen = level in ("repeatable read", "serializable")
        if self.key is None:
            if frozen and self._exists_elsewhere():
                self._write(get_or_create_sql.serialization_failure(self.what))
            if self._is_plain("before_insert", "after_insert"):
                return self._insist(self._columns(values), values), True
        for left in reversed(range(_ROUNDS)):
            created = self._new(values)
            aside.add(created)
            try:
                aside.commit()
            except sa.exc.IntegrityError as error:
                if self.key is None or not _is_duplicate(error):
                    raise
                aside.rollback()
                if (found := self.find()) is not None:
                    return found, False
                if frozen and self._exists_elsewhere():
                    self._write(get_or_create_sql.serialization_failure(self.what))
                self._refuse_key_of_deleted(self.key)
                if not left:
                    raise
            else:
                return self._adopt(created, values), True
        raise AssertionError("the last round returns or raises")

    def _exists_elsewhere(self) -> bool:
        """Whether a row was committed since this transaction's snapshot was taken, seen from another connection.

        No statement of PostgreSQL's shows it to this transaction where there is no unique key to stumble over.
        """
        with sa_orm.Session(self._connection().engine) as elsewhere:
            return elsewhere.scalar(get_or_create_sql.committed_elsewhere(self.lookup)) is not None

    # -- handing over -------------------------------------------------------------------------------------------------

    def _adopt(self, written: Any, values: Mapping[str, Any]) -> Any:
        """The object in the caller's session, as it was written."""
        state = sa.inspect(written)
        held, version = self.session.identity_map.get(state.key), self.mapper.version_id_col
        if held is not None and version is not None:  # merge() would call the version it has a stale one
            self.session.expire(held, [self.mapper.get_property_by_column(version).key])
        adopted = self.session.merge(written, load=False)
        columns = {prop.key for prop in self.mapper.column_attrs}
        if stale := columns & state.unloaded:
            self.session.expire(adopted, list(stale))
        related = split(self.mapper, values)[1]
        if stale := set(related) & sa.inspect(adopted).dict.keys():
            self.session.expire(adopted, list(stale))
        return self._with_related(adopted, values)

    def _with_related(self, loaded: Any, values: Mapping[str, Any]) -> Any:
        """`loaded` with the related objects that it was made of, so that no one has to load them.

        Loaded collections on their side are loaded again when next looked at.
        """
        for name, related in split(self.mapper, values)[1].items():
            prop: Any = self.mapper.attrs[name]
            if related is not None and sa.inspect(related).session is not self.session:
                continue
            sa_orm.attributes.set_committed_value(loaded, name, related)
            if related is not None and prop.back_populates:
                state = sa.inspect(related)
                if prop.back_populates in state.dict and not state.attrs[prop.back_populates].history.has_changes():
                    self.session.expire(related, [prop.back_populates])
        return loaded


def _is_duplicate(error: sa.exc.IntegrityError) -> bool:
    return sqlstate(error) in (None, "23505")  # SQLite has no SQLSTATE

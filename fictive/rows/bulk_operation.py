"""One call of a bulk function: its arguments, checked, how far it has come, and the transaction around it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from ..drivers import sqlstate
from ..errors import ConfigurationError, DuplicateRows, KeyOfDeletedRow, TransactionAlreadyBegun
from ..session.given import session_of
from ..session.session import OptInSession, atomic
from ..session.written_by_statement import expire_written_in_bulk
from .attributes import attribute_names, live_attribute, mapper_of
from .bulk_input import Batch, RowReader, attribute_named, duplicate_rows, shown_key
from .column_defaults import InsertDefaults, UpdateDefaults, discriminator, first_version, onupdate_of_each
from .relations import forget_relations
from .unique_keys import UniqueKey, refused_conflict, unique_keys
from .upsert_sql import CreateStaging, Upsert, of_class, staging_table
from .write_binding import asked_about_write, writing

__all__ = ["BulkOperation", "Progress"]

log = logging.getLogger("fictive.rows")

Progress = Callable[[int, int | None], object]
"""Told after each batch how many rows were sent so far, and how many there are, or None where that is not known."""


# Engines whose role may not create temporary tables.
_without_staging: weakref.WeakSet[sa.Engine] = weakref.WeakSet()
_INSUFFICIENT_PRIVILEGE = "42501"
_NOT_BY_COPY = ("0A000", "42809")  # feature_not_supported, wrong_object_type
_CARDINALITY_VIOLATION = "21000"


class _StagingRefused(Exception):
    """The role may not create a temporary table. Never leaves fictive: the call goes another way."""


class BulkOperation:
    """The call. Within `run` it has a `connection`; `is_alone` says that this and its transaction are for it only."""

    connection: sa.Connection
    is_alone: bool

    def __init__(
        self, given: Any, model: Any, rows: Iterable[Any], function: str, batch_size: int, commit_every: int | None,
        progress: Progress | None, *, only_updates: bool = False,
    ) -> None:  # fmt: skip
        self.session = session_of(given)
        self.mapper = mapper_of(model)
        self.function = function
        self.commit_every = None if commit_every is None else _positive(commit_every, "commit_every", function)
        size = _positive(batch_size, "batch_size", function)
        size = size if self.commit_every is None else min(size, self.commit_every)
        self._new_reader = functools.partial(RowReader, self.mapper, rows, size, function, only_updates=only_updates)
        self.reader = self._new_reader()
        self._began_anew = False
        self.done = self.batches_sent = self.inserted = self.updated = 0
        self._progress = progress

    # -- the model ----------------------------------------------------------------------------------------------------

    @property
    def table(self) -> sa.Table:
        return self.mapper.local_table  # type: ignore[return-value]

    def is_single_table(self) -> bool:
        return len(self.mapper.tables) == 1 and isinstance(self.mapper.local_table, sa.Table)

    def need_table(self) -> None:
        if not isinstance(self.mapper.local_table, sa.Table):
            raise TypeError(
                f"{self.function}: a {self.mapper.class_.__name__} is mapped to a join or a SELECT, which no INSERT "
                "takes. Add objects to the session instead, or call it on a class of each table."
            )

    def need_single_table(self) -> None:
        if not self.is_single_table():
            raise TypeError(
                f"{self.function}: a {self.mapper.class_.__name__} is rows of several tables "
                f"({', '.join(str(table) for table in self.mapper.tables)}), and no one statement writes both. Add "
                "objects to the session instead, or call it on a class of each table."
            )

    def attributes(self, given: Any, where: str, *, may_be_empty: bool = False) -> list[str]:
        """The names of one attribute or of several."""
        each = [given] if isinstance(given, str) or hasattr(given, "key") else list(given)
        if not each and not may_be_empty:
            raise ValueError(f"{self.function}: {where} names no attribute.")
        return [attribute_named(self.mapper, name, where) for name in each]

    # -- the rows -----------------------------------------------------------------------------------------------------

    def need_names(self, needed: Sequence[str], where: str) -> None:
        if missing := [name for name in needed if name not in self.reader.names]:
            raise ValueError(f"{self.function}: the rows have no {', '.join(missing)}, which {where} needs.")

    def columns(self, names: Iterable[str]) -> list[sa.Column[Any]]:
        """The columns of these attributes."""
        return [self.reader.columns[name] for name in names]

    def by_column(self, batch: Batch) -> dict[sa.Column[Any], Sequence[Any]]:
        return {self.reader.columns[name]: values for name, values in batch.columns.items()}

    def _batches(self) -> Iterator[Batch]:
        """Those of one transaction, of values only; each has been sent when the next one is asked for."""
        for batch in self.reader.batches(self.commit_every):
            batch.check_values(self.mapper.class_.__name__)
            yield batch
            self.done += batch.size
            self.batches_sent += 1
            if self._progress is not None:
                self._progress(self.done, self.reader.total)

    # -- what is made of them -----------------------------------------------------------------------------------------

    @functools.cached_property
    def insert_defaults(self) -> InsertDefaults:
        given = set(self.columns(self.reader.names))
        return InsertDefaults(self.table, given, {**first_version(self.mapper), **discriminator(self.mapper)})

    def with_fixed(self, batch: Batch) -> dict[sa.Column[Any], Sequence[Any]]:
        """The rows for an INSERT of SQLAlchemy's, which makes the other defaults."""
        fixed = self.insert_defaults.fixed
        return self.by_column(batch) | {column: [value] * batch.size for column, value in fixed.items()}

    def upsert(self, keys: Sequence[str], updates: Sequence[str]) -> Upsert:
        """An upsert that shows deleted rows it meets, unless the rows say themselves what is to become of those."""
        head, key, update = self.reader.head(), self.columns(keys), self.columns(updates)
        assert head is not None
        row = {column: values[0] for column, values in self.by_column(head).items() if column in {*key, *update}}
        defaults = UpdateDefaults(self.mapper, row)
        name = live_attribute(self.mapper)
        live = None if name is None or name in self.reader.names else self.reader.columns[name]
        only = of_class(self.mapper)
        dialect = self.connection.dialect
        return Upsert(self.table, key, update, defaults.for_all, dialect, defaults.by_row, only, live)

    def row_defaults(self, upsert: Upsert, batch: Batch) -> dict[sa.Column[Any], Sequence[Any]]:
        """The values of the columns in `upsert.by_row`."""
        given = {*upsert.key, *upsert.update}
        columns = {column: values for column, values in self.by_column(batch).items() if column in given}
        return onupdate_of_each(upsert.by_row, columns, batch.size)

    def by_update_defaults(self, upsert: Upsert, batch: Batch) -> Iterator[tuple[Upsert, Batch]]:
        """The rows of a batch by what their update sets besides, which is one for all rows of a statement."""
        if not upsert.by_row:
            yield upsert, batch
            return
        groups: dict[str, tuple[dict[Any, Any], list[int]]] = {}
        defaults = self.row_defaults(upsert, batch)
        for number, values in enumerate(zip(*defaults.values(), strict=True)):
            besides = {**upsert.besides, **dict(zip(defaults, values, strict=True))}
            groups.setdefault(repr(values), (besides, []))[1].append(number)
        for besides, numbers in groups.values():
            yield dataclasses.replace(upsert, besides=besides), batch.chosen(numbers)

    # -- the transaction ----------------------------------------------------------------------------------------------

    def run(self, work: Callable[[Iterator[Batch]], None]) -> None:
        """Do `work` in one transaction, or in as many as `commit_every` asks for; in none where there is no row."""
        if self.commit_every is not None and self.session.in_transaction():
            raise TransactionAlreadyBegun(
                f"{self.function}: commit_every={self.commit_every} cannot commit within a transaction that somebody "
                "else began. Call it outside, or leave commit_every out."
            )
        committed = transactions = 0
        try:
            while self.reader.head() is not None:
                with contextlib.suppress(_StagingRefused):  # nothing is read by then: the same rows go another way
                    try:
                        with self._atomic():
                            work(self._batches())
                    except sa.exc.DBAPIError as error:
                        if transactions or not self._begins_anew(error):
                            raise
                        continue
                    if self.commit_every is not None and self.session.in_transaction():
                        self.session.commit()  # of a session that begins by itself
                    committed, transactions = self.done, transactions + 1
        except BaseException as error:
            if self.commit_every is not None:
                note = (
                    f"{self.function}: {committed} rows in {transactions} transactions had been committed and stay; "
                    "nothing after them was."
                )
                error.add_note(note)
                log.warning("%s Ended by %r", note, error)
            raise

    def _begins_anew(self, error: sa.exc.DBAPIError) -> bool:
        """Whether the rows can be read again, since the relation is not any more what it was when it was asked: row
        security was enabled, or another role has taken over. Its kind has been forgotten by now."""
        if self._began_anew or not self.reader.is_held or sqlstate(error) not in _NOT_BY_COPY:
            return False
        self._began_anew = True
        self.reader = self._new_reader()
        self.done = self.batches_sent = self.inserted = self.updated = 0
        return True

    @contextlib.contextmanager
    def _atomic(self) -> Iterator[None]:
        session = self.session
        self.is_alone = isinstance(session, OptInSession) and not session.in_transaction()
        with atomic(session, f"{self.function} of {self.mapper.class_.__name__}"):
            self.connection = connection = session.connection(bind_arguments=writing(self.mapper))
            # a savepoint alone would be a transaction on SQLite, and commit at its end
            needless = self.is_alone or (connection.dialect.name == "sqlite" and not isinstance(session, OptInSession))
            try:
                with (
                    asked_about_write(session, writing(self.mapper)),
                    contextlib.nullcontext() if needless else connection.begin_nested(),
                ):
                    yield
            except sa.exc.DBAPIError:
                forget_relations(connection)
                raise

    def may_stage(self) -> bool:
        if self._began_anew:  # such as of a view with DISTINCT, of which UPDATE by a trigger is possible, and no lock
            return False
        return self.connection.dialect.name == "postgresql" and self.connection.engine not in _without_staging

    def create_staging(self, columns: Sequence[sa.Column[Any]]) -> sa.Table:
        """Create a temporary table, in which rows of these columns wait; where the role may not, `run` begins anew."""
        stage = staging_table(columns)
        try:
            self.connection.execute(CreateStaging(stage, columns))
        except sa.exc.DBAPIError as error:
            if sqlstate(error) != _INSUFFICIENT_PRIVILEGE:
                raise
            _without_staging.add(self.connection.engine)
            raise _StagingRefused from error
        return stage

    def expire_loaded(self, *, inserted: bool = False, updated: bool = False) -> None:
        """Let what the session has loaded of such rows be loaded again: their columns, and relationships that they
        belong to. What was changed in the objects and not yet written stays."""
        if not self.done:
            return
        if inserted:
            expire_written_in_bulk(self.session, self.mapper, makes_rows=True)
        if not updated:
            return
        columns = [column.key for column in self.columns(self.reader.names)]
        expire_written_in_bulk(self.session, self.mapper, makes_rows=False, columns=columns, is_synchronized=True)
        for loaded in list(self.session.identity_map.values()):
            if isinstance(loaded, self.mapper.class_):
                state = sa.inspect(loaded)
                own = attribute_names(state.mapper, state.mapper.primary_key)
                stale = [name for name in self.reader.columns if name in state.dict and name in state.unmodified]
                if names := [name for name in stale if name not in own]:
                    self.session.expire(loaded, names)

    # -- what was wrong -----------------------------------------------------------------------------------------------

    def refuse_deleted(self, upsert: Upsert, keys: Iterable[Sequence[Any]]) -> None:
        """Raise for the key of a row that an upsert has met and that is deleted."""
        for key in keys:
            raise KeyOfDeletedRow(
                f"{self.function}: a {self.mapper.class_.__name__} that is deleted has the key "
                f"{shown_key(attribute_names(self.mapper, upsert.key), key)}. Restore it first, or let the rows give "
                f"{live_attribute(self.mapper)} (None restores), or make the key one that only live rows have: "
                "unique_among_live(...)."
            )

    def refuse_duplicates(self, upsert: Upsert, stage: sa.Table) -> None:
        """Raise for a key that is staged twice."""
        for key in self.connection.execute(upsert.duplicate_in(stage)):
            raise duplicate_rows(attribute_names(self.mapper, upsert.key), key)

    @contextlib.contextmanager
    def conflicts_explained(self, keys: Sequence[str]) -> Iterator[None]:
        """Say in our words that PostgreSQL met a key twice, in batches apart, or equal to it and not to Python; and
        that it takes no ON CONFLICT of that key."""
        try:
            yield
        except sa.exc.DBAPIError as error:
            if sqlstate(error) == _CARDINALITY_VIOLATION:
                raise DuplicateRows(
                    f'{self.function}: two rows have the same key ({", ".join(keys)}). Pass duplicates="last" for '
                    "the last one to win."
                ) from error
            dialect = self.connection.dialect.name
            refused = refused_conflict(error, self.function, self.table, UniqueKey(tuple(self.columns(keys))))
            if refused is None:
                raise
            of_model = "; ".join(map(str, unique_keys(self.table, dialect))) or "none"
            raise ConfigurationError(
                f"{refused} The model has these keys for it: {of_model}. Make a unique constraint or index that is "
                "not deferrable; for a view or a table with rules, add objects to the session instead."
            ) from error


def _positive(number: Any, name: str, function: str) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{function}: {name}={number!r}: expected a number of rows, 1 or more.")
    return number

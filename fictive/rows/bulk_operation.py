"""One call of a bulk function: its arguments, checked, how far it has come, and the transaction around it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from ..drivers import sqlstate
from ..errors import KeyOfDeletedRow, TransactionAlreadyBegun
from ..session.given import session_of, together
from ..session.session import OptInSession
from .attributes import live_attribute, mapper_of
from .bulk_input import Batch, RowReader, attribute_named, columns_by_attribute
from .column_defaults import InsertDefaults, UpdateDefaults, discriminator, first_version
from .relations import forget_relations
from .upsert_sql import Upsert, of_class
from .write_binding import asked_about_write, writing

__all__ = ["BulkOperation", "Progress", "StagingRefused"]

log = logging.getLogger("fictive.rows")

Progress = Callable[[int, int | None], object]
"""Told after each batch how many rows were sent so far, and how many there are, or None where that is not known."""


# Engines whose role may not create temporary tables.
_without_staging: weakref.WeakSet[sa.Engine] = weakref.WeakSet()
_INSUFFICIENT_PRIVILEGE = "42501"
_NOT_BY_COPY = ("0A000", "42809")  # feature_not_supported, wrong_object_type


class StagingRefused(Exception):
    """The role may not create a temporary table. Never leaves fictive: the call goes another way."""


class BulkOperation:
    """One call of these functions: its arguments, checked, and how far it has come."""

    def __init__(
        self, given: Any, model: Any, rows: Iterable[Any], function: str, batch_size: int, commit_every: int | None,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.session = session_of(given)
        self.mapper = mapper_of(model)
        self.function = function
        self.commit_every = None if commit_every is None else _positive(commit_every, "commit_every", function)
        size = _positive(batch_size, "batch_size", function)
        self._size = size if self.commit_every is None else min(size, self.commit_every)
        self._new_reader = functools.partial(RowReader, self.mapper, rows, self._size, function)
        self.reader = self._new_reader()
        self._began_anew = False
        self.done = 0
        self.batches_sent = 0
        self._progress = progress
        self._columns = columns_by_attribute(self.mapper)

    # -- the model ----------------------------------------------------------------------------------------------------

    def is_single_table(self) -> bool:
        return len(self.mapper.tables) == 1 and isinstance(self.mapper.local_table, sa.Table)

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

    def column(self, name: str) -> sa.Column[Any]:
        return self._columns[name]

    @property
    def table(self) -> sa.Table:
        return self.mapper.local_table  # type: ignore[return-value]

    def given_columns(self) -> list[sa.Column[Any]]:
        """The columns that the rows give."""
        return [self.column(name) for name in self.names_of_head()]

    def insert_defaults(self) -> InsertDefaults:
        return InsertDefaults(
            self.table, set(self.given_columns()), {**first_version(self.mapper), **discriminator(self.mapper)}
        )

    def first_row(self) -> dict[sa.Column[Any], Any]:
        head = self.reader.head()
        assert head is not None
        return {self.column(name): head.values(name)[0] for name in head.names}

    def update_defaults(self, row: Mapping[sa.Column[Any], Any]) -> UpdateDefaults:
        """`onupdate` and the version for this row."""
        return UpdateDefaults(self.mapper, row)

    def upsert(self, keys: Sequence[str], updates: Sequence[str], dialect: sa.Dialect) -> Upsert:
        key, update = (list(map(self.column, names)) for names in (keys, updates))
        row = {column: value for column, value in self.first_row().items() if column in {*key, *update}}
        defaults = self.update_defaults(row)
        only = of_class(self.mapper)
        return Upsert(self.table, key, update, defaults.for_all, dialect, by_row=defaults.by_row, only=only)

    def upsert_into_live(self, keys: Sequence[str], updates: Sequence[str], dialect: sa.Dialect) -> Upsert:
        """An upsert that shows deleted rows it meets, unless the rows say themselves what is to become of those."""
        live = live_attribute(self.mapper)
        upsert = self.upsert(keys, updates, dialect)
        if live is None or live in self.names_of_head():
            return upsert
        return dataclasses.replace(upsert, live=self.column(live))

    def by_update_defaults(self, upsert: Upsert, batch: Batch) -> Iterator[tuple[Upsert, Batch]]:
        """The rows of a batch by what their update sets besides, which is one for all rows of a statement."""
        if not upsert.by_row:
            yield upsert, batch
            return
        groups: dict[str, tuple[dict[Any, Any], list[int]]] = {}
        for number, row in enumerate(self.by_column(batch)):
            given = {column: value for column, value in row.items() if column in {*upsert.key, *upsert.update}}
            besides = self.update_defaults(given).values
            groups.setdefault(repr([besides[column] for column in upsert.by_row]), (besides, []))[1].append(number)
        for besides, numbers in groups.values():
            yield dataclasses.replace(upsert, besides=besides), batch.chosen(numbers)

    def refuse_deleted(self, upsert: Upsert, keys: Iterable[Sequence[Any]]) -> None:
        """Raise for the key of a row that an upsert has met and that is deleted."""
        for key in keys:
            names = [self.mapper.get_property_by_column(column).key for column in upsert.key]
            shown = ", ".join(f"{name}={value!r}" for name, value in zip(names, key, strict=True))
            model = self.mapper.class_.__name__
            raise KeyOfDeletedRow(
                f"{self.function}: a {model} that is deleted has the key {shown}. Restore it first, or let the rows "
                f"give {live_attribute(self.mapper)} (None restores), or make the key one that only live rows have: "
                "unique_among_live(...)."
            )

    def by_column(self, batch: Batch) -> Iterator[dict[sa.Column[Any], Any]]:
        columns = [self.column(name) for name in batch.names]
        for row in zip(*batch.columns, strict=True):
            yield dict(zip(columns, row, strict=True))

    # -- the rows -----------------------------------------------------------------------------------------------------

    def names_of_head(self) -> tuple[str, ...]:
        head = self.reader.head()
        assert head is not None
        return head.names

    def need_names(self, names: Sequence[str], needed: Sequence[str], where: str) -> None:
        if missing := [name for name in needed if name not in names]:
            raise ValueError(f"{self.function}: the rows do not give {', '.join(missing)}, which {where} names.")

    def is_small(self, few: int) -> bool:
        """Whether there are fewer rows than that, as far as one batch tells."""
        head = self.reader.head()
        return head is None or (head.size < few and self.reader.at_end_after_head())

    def sent(self, size: int) -> None:
        self.done += size
        self.batches_sent += 1
        if self._progress is not None:
            self._progress(self.done, self.reader.total)

    def tracked(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; each has been sent when the next one is asked for."""
        for batch in batches:
            yield batch
            self.sent(batch.read)

    # -- the transaction ----------------------------------------------------------------------------------------------

    def run(self, work: Callable[[sa.Connection, Iterator[Batch], bool], None]) -> None:
        """Do `work` in one transaction, or in as many as `commit_every` asks for; in none where there is no row.

        `work` is told whether the transaction, and with it the connection, is its alone.
        """
        if self.commit_every is not None and self.session.in_transaction():
            raise TransactionAlreadyBegun(
                f"{self.function}: commit_every={self.commit_every} cannot commit within a transaction that somebody "
                "else began. Call it outside, or leave commit_every out."
            )
        committed = transactions = 0
        try:
            while self.reader.head() is not None:
                with contextlib.suppress(StagingRefused):  # nothing is read by then: the same rows go another way
                    try:
                        with self._atomic() as (connection, is_alone):
                            work(connection, self.reader.batches(self.commit_every), is_alone)
                    except sa.exc.DBAPIError as error:
                        if transactions or not self._begins_anew(error):
                            raise
                        continue
                    if self.commit_every is not None and self.session.in_transaction():
                        self.session.commit()  # of a session that begins by itself
                    committed, transactions = self.done, transactions + 1
        except BaseException as error:
            if self.commit_every is not None:
                _note(
                    error,
                    f"{self.function}: {committed} rows in {transactions} transactions had been committed and stay; "
                    "nothing after them was.",
                )
            raise

    def _begins_anew(self, error: sa.exc.DBAPIError) -> bool:
        """Whether the rows can be read again, since the relation is not any more what it was when it was asked: row
        security was enabled, or another role has taken over. Its kind has been forgotten by now."""
        if self._began_anew or not self.reader.is_held or sqlstate(error) not in _NOT_BY_COPY:
            return False
        self._began_anew = True
        self.reader = self._new_reader()
        self.done = self.batches_sent = 0
        return True

    @contextlib.contextmanager
    def _atomic(self) -> Iterator[tuple[sa.Connection, bool]]:
        session = self.session
        is_alone = isinstance(session, OptInSession) and not session.in_transaction()
        with together(session, f"{self.function} of {self.mapper.class_.__name__}"):
            connection = session.connection(bind_arguments=writing(self.mapper))
            # a savepoint alone would be a transaction on SQLite, and commit at its end
            needless = is_alone or (connection.dialect.name == "sqlite" and not isinstance(session, OptInSession))
            try:
                with (
                    asked_about_write(session, writing(self.mapper)),
                    contextlib.nullcontext() if needless else connection.begin_nested(),
                ):
                    yield connection, is_alone
            except sa.exc.DBAPIError:
                forget_relations(connection)
                raise

    def may_stage(self, connection: sa.Connection) -> bool:
        return connection.dialect.name == "postgresql" and connection.engine not in _without_staging

    def create_staging(self, connection: sa.Connection, statement: sa.Executable) -> None:
        """Create a temporary table; raises `StagingRefused` where the role may not."""
        try:
            connection.execute(statement)
        except sa.exc.DBAPIError as error:
            if sqlstate(error) != _INSUFFICIENT_PRIVILEGE:
                raise
            _without_staging.add(connection.engine)
            raise StagingRefused from error

    def expire_loaded(self) -> None:
        """Let objects that are loaded in the session be loaded again; what was changed on them and not yet written
        stays."""
        if not self.done:
            return
        for loaded in list(self.session.identity_map.values()):
            if isinstance(loaded, self.mapper.class_):
                state = sa.inspect(loaded)
                stale = [name for name in self._columns if name in state.dict and name in state.unmodified]
                own = {state.mapper.get_property_by_column(column).key for column in state.mapper.primary_key}
                if names := [name for name in stale if name not in own]:
                    self.session.expire(loaded, names)


def _positive(number: Any, name: str, function: str) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{function}: {name}={number!r}: expected a number of rows, 1 or more.")
    return number


def _note(error: BaseException, text: str) -> None:
    """Python 3.10 shows no notes, and has no `add_note`; there the log is where it can be read."""
    if hasattr(error, "add_note"):
        error.add_note(text)
    else:
        error.__notes__ = [*getattr(error, "__notes__", []), text]
    log.warning("%s Ended by %r", text, error)

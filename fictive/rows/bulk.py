"""Many rows at a time: `insert_many`, `upsert_many`, `update_many`. What is sent, and when."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, overload

import sqlalchemy as sa

from ..errors import UnsupportedDialect
from ..session.given import dialect_of
from .bulk_input import Batch
from .bulk_operation import BulkOperation, Progress
from .copy_loader import copy_into_table, insert_rows, staged, statements_for
from .duplicates import Duplicates, check_duplicates, conflicts_explained, raise_on_duplicate, without_duplicates
from .stored_values import is_exact
from .upsert_sql import Upsert

__all__ = ["BATCH_SIZE", "Upserted", "insert_many", "update_many", "upsert_many"]

BATCH_SIZE = 2000
"""Larger batches overlap less encoding with the server's work; smaller ones cost more each."""
COPY_FROM = 20
"""Fewer rows than that go by INSERT, which is one message less on psycopg2; from about here COPY is faster."""
STAGE_ABOVE = 500
"""Up to so many rows are upserted from the statement: making and dropping a temporary table takes about as long."""
UPDATE_EACH = 4
"""Up to so many rows are updated by an UPDATE each."""

_M = TypeVar("_M")


class Upserted(NamedTuple):
    """What `upsert_many` did; `unchanged` rows were not written, since the same values were there already, or a later
    row of the same key won."""

    inserted: int
    updated: int
    unchanged: int


@overload
def insert_many(
    session: Any, model: type[_M], rows: Iterable[Any], *, batch_size: int = ..., returning: None = ...,
    commit_every: int | None = ..., progress: Progress | None = ...,
) -> int: ...  # fmt: skip
@overload
def insert_many(
    session: Any, model: type[_M], rows: Iterable[Any], *, batch_size: int = ..., returning: Literal["keys"],
    commit_every: int | None = ..., progress: Progress | None = ...,
) -> list[Any]: ...  # fmt: skip
@overload
def insert_many(
    session: Any, model: type[_M], rows: Iterable[Any], *, batch_size: int = ..., returning: Literal["objects"],
    commit_every: int | None = ..., progress: Progress | None = ...,
) -> list[_M]: ...  # fmt: skip
def insert_many(
    session: Any,
    model: type[_M],
    rows: Iterable[Any],
    *,
    batch_size: int = BATCH_SIZE,
    returning: Literal["keys", "objects"] | None = None,
    commit_every: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """Insert `rows`: dicts of attribute names, or objects of `model`, which are not added to the session.

    All or nothing: outside in a transaction of its own, inside in a savepoint. All rows have the keys of the
    first one. Returns how many there were; with `returning="keys"` the primary keys in the order of the rows, tuples
    where they are composite; with `"objects"` the objects, loaded in this session. No rows send nothing.

    `batch_size`
        rows that are read and sent at a time; memory is for one batch, whatever the number of rows.
    `commit_every`
        rows in each of several transactions, outside only. What was committed stays when a later row is wrong, and a
        note on the error (`__notes__`) says how many rows that were.
    `progress`
        called with the number of rows sent and the total, or None, after each batch: see `fictive.rows.progress`.

    Types, column defaults, server defaults, the discriminator of single-table inheritance and the version of a
    versioned model work as in a flush; ORM events (`before_insert`) do not fire, as in SQLAlchemy's own bulk INSERT.

    By COPY on PostgreSQL with psycopg2 and psycopg, from 20 rows on (PostgreSQL documentation, "COPY"); by INSERT
    for fewer, with `returning`, with joined inheritance, with a default that is an SQL expression or is computed from
    its row, and for a batch with a value that only the driver knows how to send.

    Raises `RowsDiffer`, `UnknownAttribute` or `TypeError` before anything of the batch is sent. 2 round trips for less
    than 20 rows outside on psycopg2, otherwise 3.
    """
    operation = BulkOperation(session, model, rows, "insert_many()", batch_size, commit_every, progress)
    if returning is not None:
        return _insert_returning(operation, model, returning)

    def work(connection: sa.Connection, batches: Iterator[Batch], is_alone: bool) -> None:
        if operation.is_single_table():
            few = operation.is_small(COPY_FROM)
            if few or not copy_into_table(operation, connection, batches, is_alone=is_alone):
                _insert_values(operation, connection, batches)
            return
        for batch in operation.tracked(batches):
            batch.check_values(model.__name__)
            operation.session.execute(sa.insert(model), batch.mappings())

    operation.run(work)
    return operation.done


def upsert_many(
    session: Any,
    model: type[Any],
    rows: Iterable[Any],
    *,
    key: Any,
    update: Sequence[Any] | None = None,
    duplicates: Duplicates = "error",
    batch_size: int = BATCH_SIZE,
    commit_every: int | None = None,
    progress: Progress | None = None,
) -> Upserted:
    """Insert `rows`, and update those whose `key` is there already. Returns how many of each, as `Upserted`.

    `key`
        the attribute, or attributes, with a unique constraint or index. Only a conflict over it makes an update;
        that of another constraint is an `IntegrityError`.
    `update`
        the attributes that are set in rows that are there: by default all that the rows give, but the key; `[]`
        leaves such rows as they are. A row that has the values already, byte for byte, is not written (and fires no
        trigger). `onupdate` columns and the version move with what is written.
    `duplicates`
        two rows with one key: `"error"` raises `DuplicateRows`, `"last"` takes the last one.

    The other arguments, and what is all or nothing, as in `insert_many`. Rows are written in the order of the key, so
    that two calls at the same time wait for each other instead of meeting in a deadlock.

    Up to 500 rows are `INSERT … ON CONFLICT DO UPDATE`, 2 round trips outside. More go by COPY into a temporary table,
    which one statement merges: 4 round trips. Inside, rows that are no list are a COPY for each batch. PostgreSQL and
    SQLite; on SQLite it is one INSERT a batch, keys are remembered to tell duplicates, and all rows that are not
    inserted count as updated.
    """
    operation = BulkOperation(session, model, rows, "upsert_many()", batch_size, commit_every, progress)
    dialect = dialect_of(operation.session, operation.mapper)
    if dialect.name not in ("postgresql", "sqlite"):
        raise UnsupportedDialect(f"upsert_many() needs PostgreSQL or SQLite; this session is on {dialect.name}.")
    operation.need_single_table()
    check_duplicates(duplicates)
    keys = operation.attributes(key, "key")
    updates = None if update is None else operation.attributes(update, "update", may_be_empty=True)
    if both := set(keys) & set(updates or ()):
        raise ValueError(f"upsert_many(): {', '.join(sorted(both))} is in key, and so cannot be in update as well.")
    totals = [0, 0]

    def work(connection: sa.Connection, batches: Iterator[Batch], is_alone: bool) -> None:
        names = operation.names_of_head()
        operation.need_names(names, keys, "key")
        operation.need_names(names, updates or (), "update")
        setting = [name for name in names if name not in keys] if updates is None else updates
        upsert = operation.upsert_into_live(keys, setting, connection.dialect)
        with conflicts_explained(operation, keys, connection.dialect):
            few = operation.is_small(STAGE_ABOVE + 1)
            # PostgreSQL itself refuses to update a row twice, and only that
            if (duplicates == "last" or not upsert.update) and _may_hide_duplicates(upsert):
                few = False
            if few or upsert.by_row or not operation.may_stage(connection):
                _upsert_from_values(operation, connection, batches, upsert, keys, duplicates, totals)
                return
            batches = without_duplicates(batches, keys, duplicates)
            with staged(operation, connection, batches, upsert, is_alone=is_alone) as stage:
                if duplicates == "error" and not upsert.update:
                    raise_on_duplicate(operation, connection, upsert, stage)
                found = connection.execute(upsert.upsert_from(stage, last_wins=duplicates == "last")).one()
        if upsert.live is not None and found[2] is not None:
            operation.refuse_deleted(upsert, [found[3:]])
        totals[0] += found[0]
        totals[1] += found[1] - found[0]

    operation.run(work)
    operation.expire_loaded()
    return Upserted(totals[0], totals[1], operation.done - sum(totals))


def update_many(
    session: Any,
    model: type[Any],
    rows: Iterable[Any],
    *,
    key: Any = None,
    duplicates: Duplicates = "error",
    batch_size: int = BATCH_SIZE,
    commit_every: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Update the rows with the `key` of each of `rows`, by default the primary key, to the other values it gives.

    Returns how many rows of the table were updated: fewer than `rows` where some key is not there, which is no error.
    `onupdate` columns and the version move where a byte of a value changes. With joined inheritance the key is the
    primary key, and a key that is not there is SQLAlchemy's `StaleDataError`. The other arguments, and the order in
    which rows are locked, as in `upsert_many`.

    Up to 4 rows are an UPDATE each; more, and keys that their column rounds or pads, go by COPY into a temporary table
    and are one UPDATE, 4 round trips outside.
    Elsewhere than on PostgreSQL they are an UPDATE each.
    """
    operation = BulkOperation(session, model, rows, "update_many()", batch_size, commit_every, progress)
    check_duplicates(duplicates)
    mapper = operation.mapper
    primary = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
    keys = primary if key is None else operation.attributes(key, "key")
    if not operation.is_single_table() and set(keys) != set(primary):
        operation.need_single_table()
    updated = 0

    def work(connection: sa.Connection, batches: Iterator[Batch], is_alone: bool) -> None:
        nonlocal updated
        names = operation.names_of_head()
        operation.need_names(names, keys, "key")
        others = [name for name in names if name not in keys]
        if not others:
            raise ValueError(f"update_many(): the rows give {', '.join(names)}, which is the key, and nothing to set.")
        batches = without_duplicates(batches, keys, duplicates)
        if not operation.is_single_table():
            for batch in operation.tracked(batches):
                operation.session.execute(sa.update(model), batch.mappings())
                updated += batch.size
            return
        upsert = operation.upsert(keys, others, connection.dialect)
        hidden = _may_hide_duplicates(upsert) and not operation.is_small(2)
        if (operation.is_small(UPDATE_EACH + 1) and not hidden) or not operation.may_stage(connection):
            for batch in operation.tracked(batches):
                batch.check_values(model.__name__)
                updated += _update_rows(operation, connection, batch, upsert)
            return
        with staged(operation, connection, batches, upsert, is_alone=is_alone) as stage:
            if duplicates == "error" and (hidden or operation.batches_sent > 1):
                raise_on_duplicate(operation, connection, upsert, stage)
            updated += connection.execute(upsert.update_from(stage, last_wins=duplicates == "last")).rowcount

    operation.run(work)
    operation.expire_loaded()
    return updated


def _may_hide_duplicates(upsert: Upsert) -> bool:
    """Whether two keys that Python tells apart may be one in the database, as 1.005 and 1.01 of two places are, or two
    with NULL."""
    if upsert.dialect.name != "postgresql":
        return False
    return upsert.nulls_are_one or not all(is_exact(column.type, upsert.dialect) for column in upsert.key)


def _insert_values(operation: BulkOperation, connection: sa.Connection, batches: Iterator[Batch]) -> None:
    given, fixed = operation.given_columns(), operation.insert_defaults().fixed
    for batch in operation.tracked(batches):
        batch.check_values(operation.mapper.class_.__name__)
        values = [*batch.columns, *([value] * batch.size for value in fixed.values())]
        insert_rows(connection, operation.table, [*given, *fixed], values, batch.size)


def _insert_returning(operation: BulkOperation, model: Any, returning: str) -> list[Any]:
    if returning not in ("keys", "objects"):
        raise ValueError(f'insert_many(): returning={returning!r}: expected "keys", "objects" or None.')
    mapper = operation.mapper
    keys = [getattr(model, mapper.get_property_by_column(column).key) for column in mapper.primary_key]
    wanted = [model] if returning == "objects" else keys
    statement = sa.insert(model).returning(*wanted, sort_by_parameter_order=True)
    found: list[Any] = []

    def work(connection: sa.Connection, batches: Iterator[Batch], is_alone: bool) -> None:
        for batch in operation.tracked(batches):
            rows = batch.mappings()
            if batch.check_values(model.__name__):  # NULL in a statement of its own for each row
                one = sa.insert(model).returning(*wanted)
                results = [operation.session.execute(one.values(**row)) for row in rows]
            else:
                results = [operation.session.execute(statement, rows)]
            for result in results:
                found.extend(result.scalars() if len(wanted) == 1 else map(tuple, result))

    operation.run(work)
    return found


def _update_rows(operation: BulkOperation, connection: sa.Connection, batch: Batch, upsert: Upsert) -> int:
    """An UPDATE for each row, in the order of the key."""
    rows = list(operation.by_column(batch))
    with contextlib.suppress(TypeError):  # keys that Python cannot compare
        rows.sort(key=operator.itemgetter(*upsert.key))
    updated = 0
    for row in rows:
        by_row = operation.update_defaults(row).values if upsert.by_row else {}
        besides = {column: value for column, value in by_row.items() if column in upsert.by_row}
        updated += connection.execute(upsert.update_row(row, besides)).rowcount
    return updated


def _upsert_from_values(
    operation: BulkOperation, connection: sa.Connection, batches: Iterator[Batch], upsert: Upsert, keys: list[str],
    duplicates: Duplicates, totals: list[int],
) -> None:  # fmt: skip
    on_postgresql = connection.dialect.name == "postgresql"
    given, fixed = operation.given_columns(), operation.insert_defaults().fixed
    columns = [*given, *fixed]
    seen: set[Any] | None = None if on_postgresql else set()
    for batch in operation.tracked(without_duplicates(batches, keys, duplicates, seen)):
        batch.check_values(operation.mapper.class_.__name__)
        before = None if on_postgresql else connection.scalar(sa.select(sa.func.count()).select_from(upsert.table))
        written: list[Any] = []
        for each, part in operation.by_update_defaults(upsert, batch.sorted_by(keys)):
            values = [*part.columns, *([value] * part.size for value in fixed.values())]
            for statement, rows in statements_for(each.upsert(), columns, values):
                result = connection.execute(statement, rows)
                written += result.all() if on_postgresql or upsert.live is not None else []
        if on_postgresql:
            fresh = sum(row[0] for row in written)
            totals[0] += fresh
            totals[1] += len(written) - fresh
        if upsert.live is not None:
            at = 1 if on_postgresql else 0
            operation.refuse_deleted(upsert, (row[at + 1 :] for row in written if row[at] is not None))
        if before is not None:
            inserted = connection.execute(sa.select(sa.func.count()).select_from(upsert.table)).scalar_one() - before
            totals[0] += inserted
            totals[1] += batch.size - inserted if upsert.update else 0

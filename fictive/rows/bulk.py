"""Many rows at a time: `insert_many`, `upsert_many`, `update_many`. What is sent, and when."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, overload

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..errors import UnsupportedDialect
from ..session.given import dialect_of
from .attributes import attribute_names
from .bulk_input import Batch, Duplicates, check_duplicates, without_duplicates
from .bulk_operation import BulkOperation, Progress
from .copy_loader import copy_into_table, insert_rows, staged, statements_for
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

    All or nothing: in a savepoint, in autocommit in a transaction of its own. All rows have the keys of the
    first one. Returns how many there were; with `returning="keys"` the primary keys in the order of the rows, tuples
    where they are composite; with `"objects"` the objects, loaded in this session. No rows send nothing.

    `batch_size`
        rows that are read and sent at a time; memory is for one batch, whatever the number of rows.
    `commit_every`
        rows in each of several transactions, in autocommit only. What was committed stays when a later row is wrong,
        and a note on the error (`__notes__`) says how many rows that were.
    `progress`
        called with the number of rows sent and the total, or None, after each batch: see `fictive.rows.progress`.

    What is stored is what a flush stores: defaults, also for None, discriminator and version included. ORM events
    (`before_insert`) do not fire, as in SQLAlchemy's own bulk INSERT. By COPY from 20 rows, on psycopg2 and psycopg,
    where it stores the same (PostgreSQL documentation, "COPY"); else, and with `returning` or joined inheritance, by
    INSERT.

    Raises `RowsDiffer`, `UnknownAttribute` or `TypeError` before anything of the batch is sent. 2 round trips for less
    than 20 rows in autocommit on psycopg2, otherwise 3.
    """
    operation = BulkOperation(session, model, rows, "insert_many()", batch_size, commit_every, progress)
    operation.need_table()
    if returning is not None:
        made = _insert_returning(operation, model, returning)
        operation.expire_loaded(inserted=True)
        return made

    def work(batches: Iterator[Batch]) -> None:
        if not operation.is_single_table():
            for batch in batches:
                _insert_by_orm(operation, sa.insert(model), batch)
        elif operation.reader.is_fewer_than(COPY_FROM) or not copy_into_table(operation, batches):
            for batch in batches:
                insert_rows(operation.connection, operation.table, operation.with_fixed(batch), batch.size)

    operation.run(work)
    operation.expire_loaded(inserted=True)
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
        that of another constraint is an `IntegrityError`. `ConfigurationError` where PostgreSQL takes no ON CONFLICT
        of it: it has no such key, or a deferrable one, or the table has rules.
    `update`
        the attributes that are set in rows that are there: by default all that the rows give, but the key; `[]`
        leaves such rows as they are. A row that has the values already, byte for byte, is not written (and fires no
        trigger). `onupdate` columns and the version move with what is written.
    `duplicates`
        two rows with one key: `"error"` raises `DuplicateRows`, `"last"` takes the last one.

    The other arguments, and what is all or nothing, as in `insert_many`. Rows are written in the order of the key, so
    that two calls at the same time wait for each other instead of meeting in a deadlock.

    2 round trips in autocommit for up to 500 rows, `INSERT … ON CONFLICT DO UPDATE`; 4 for more, by a temporary table.
    In a transaction, rows that are no list are a COPY for each batch. PostgreSQL, and SQLite, where keys are
    remembered to tell duplicates, and all rows that are not inserted count as updated.
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

    def work(batches: Iterator[Batch]) -> None:
        operation.need_names(keys, "key=")
        operation.need_names(updates or (), "update=")
        setting = [name for name in operation.reader.names if name not in keys] if updates is None else updates
        upsert = operation.upsert(keys, setting)
        with operation.conflicts_explained(keys):
            few = operation.reader.is_fewer_than(STAGE_ABOVE + 1)
            # PostgreSQL itself refuses to update a row twice, and only that
            if (duplicates == "last" or not upsert.update) and _may_hide_duplicates(upsert):
                few = False
            if few or upsert.by_row or not operation.may_stage():
                _upsert_from_values(operation, batches, upsert, keys, duplicates)
                return
            batches = without_duplicates(batches, keys, duplicates)
            with staged(operation, batches, upsert, operation.insert_defaults) as stage:
                if duplicates == "error" and not upsert.update:
                    operation.refuse_duplicates(upsert, stage)
                statement = upsert.upsert_from(stage, last_wins=duplicates == "last")
                inserted, written, *deleted = operation.connection.execute(statement).one()
        if deleted and deleted[0] is not None:
            operation.refuse_deleted(upsert, [deleted[1:]])
        operation.inserted += inserted
        operation.updated += written - inserted

    operation.run(work)
    operation.expire_loaded(inserted=True, updated=True)
    inserted, updated = operation.inserted, operation.updated
    return Upserted(inserted, updated, operation.done - inserted - updated)


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
    primary key, rows give the version that they know, if there is one, and a key that is not there, or a version that
    has moved, is SQLAlchemy's `StaleDataError`. The other arguments, and the order in
    which rows are locked, as in `upsert_many`.

    Up to 4 rows, and all elsewhere than on PostgreSQL, are an UPDATE each; more, and keys that their column rounds or
    pads, are one UPDATE from a temporary table, 4 round trips in autocommit.
    """
    operation = BulkOperation(
        session, model, rows, "update_many()", batch_size, commit_every, progress, only_updates=True
    )
    check_duplicates(duplicates)
    primary = attribute_names(operation.mapper, operation.mapper.primary_key)
    keys = primary if key is None else operation.attributes(key, "key")
    if set(keys) != set(primary):
        operation.need_single_table()

    def work(batches: Iterator[Batch]) -> None:
        operation.need_names(keys, "key=")
        given = operation.reader.names
        others = [name for name in given if name not in keys]
        if not others:
            raise ValueError(f"update_many(): the rows give {', '.join(given)}, which is the key, and nothing to set.")
        by_stage = operation.is_single_table() and operation.may_stage()
        batches = without_duplicates(batches, keys, duplicates, None if by_stage else set())
        if not operation.is_single_table():
            version = operation.mapper.version_id_col  # SQLAlchemy compares it
            operation.need_names(
                [] if version is None else attribute_names(operation.mapper, [version]), "version_id_col"
            )
            for batch in batches:
                operation.session.execute(sa.update(model), _with_none(operation, batch))
                operation.updated += batch.size
            return
        upsert = operation.upsert(keys, others)
        hidden = _may_hide_duplicates(upsert) and not operation.reader.is_fewer_than(2)
        if (operation.reader.is_fewer_than(UPDATE_EACH + 1) and not hidden) or not by_stage:
            for batch in batches:
                _update_rows(operation, _in_order(batch, keys, upsert), upsert)
            return
        with staged(operation, batches, upsert) as stage:
            if duplicates == "error" and (hidden or operation.batches_sent > 1):
                operation.refuse_duplicates(upsert, stage)
            statement = upsert.update_from(stage, last_wins=duplicates == "last")
            operation.updated += operation.connection.execute(statement).rowcount

    operation.run(work)
    operation.expire_loaded(updated=True)
    return operation.updated


def _may_hide_duplicates(upsert: Upsert) -> bool:
    """Whether two keys that Python tells apart may be one in the database, as 1.005 and 1.01 of two places are, or two
    with NULL."""
    if upsert.dialect.name != "postgresql":
        return False
    return upsert.nulls_are_one or not all(is_exact(column.type, upsert.dialect) for column in upsert.key)


def _insert_returning(operation: BulkOperation, model: Any, returning: str) -> list[Any]:
    if returning not in ("keys", "objects"):
        raise ValueError(f'insert_many(): returning={returning!r}: expected "keys", "objects" or None.')
    mapper = operation.mapper
    keys = [getattr(model, name) for name in attribute_names(mapper, mapper.primary_key)]
    wanted = [model] if returning == "objects" else keys
    statement = sa.insert(model).returning(*wanted, sort_by_parameter_order=True)
    found: list[Any] = []

    def work(batches: Iterator[Batch]) -> None:
        for batch in batches:
            made: dict[int, Any] = {}
            for result, numbers in _insert_by_orm(operation, statement, batch):
                rows = list(result.scalars() if len(wanted) == 1 else map(tuple, result))
                if len(rows) < len(numbers):
                    raise sa_orm.exc.FlushError(
                        f"insert_many(): the database inserted {len(rows)} of {len(numbers)} rows, and does not say "
                        f"which. Look for a BEFORE INSERT trigger on {operation.table} that returns NULL."
                    )
                made |= dict(zip(numbers, rows, strict=True))
            found.extend(made[number] for number in range(batch.size))

    operation.run(work)
    return found


def _insert_by_orm(operation: BulkOperation, statement: Any, batch: Batch) -> list[tuple[Any, Sequence[int]]]:
    """By SQLAlchemy's own bulk statement: its results, each with the numbers of its rows."""
    names = {operation.reader.columns[name]: name for name in batch.columns}
    sent = statements_for(statement, operation.by_column(batch), batch.size, names)
    options = {"render_nulls": True}
    return [
        (operation.session.execute(each, rows, execution_options=options), numbers) for each, rows, numbers in sent
    ]


def _with_none(operation: BulkOperation, batch: Batch) -> list[dict[str, Any]]:
    """The rows, with None for `sa.null()`, which is no parameter, where it is the same."""
    plain = {name for name in batch.columns if not operation.reader.columns[name].type.should_evaluate_none}
    null = sa.null()
    return [
        {name: None if value is null and name in plain else value for name, value in row.items()}
        for row in batch.mappings()
    ]


def _update_rows(operation: BulkOperation, batch: Batch, upsert: Upsert) -> None:
    """An UPDATE for each row, in their order."""
    rows = operation.by_column(batch) | operation.row_defaults(upsert, batch)
    for row in zip(*rows.values(), strict=True):
        statement = upsert.update_row(dict(zip(rows, row, strict=True)))
        operation.updated += operation.connection.execute(statement).rowcount


def _upsert_from_values(
    operation: BulkOperation, batches: Iterator[Batch], upsert: Upsert, keys: list[str], duplicates: Duplicates
) -> None:
    connection, on_postgresql = operation.connection, upsert.dialect.name == "postgresql"
    for batch in without_duplicates(batches, keys, duplicates, set()):
        before = 0 if on_postgresql else _count(operation)
        written: list[Any] = []
        for each, part in operation.by_update_defaults(upsert, _in_order(batch, keys, upsert)):
            fixed = operation.with_fixed(part)
            for statement, rows, _ in statements_for(each.upsert(), fixed, part.size, with_defaults=False):
                result = connection.execute(statement, rows)
                written += result.all() if on_postgresql or upsert.live is not None else []
        if on_postgresql:
            inserted = sum(row[0] for row in written)
            updated = len(written) - inserted
            written = [row[1:] for row in written]
        else:
            inserted = _count(operation) - before
            updated = batch.size - inserted if upsert.update else 0
        if upsert.live is not None:
            operation.refuse_deleted(upsert, (key for live, *key in written if live is not None))
        operation.inserted += inserted
        operation.updated += updated


def _in_order(batch: Batch, keys: Sequence[str], upsert: Upsert) -> Batch:
    return batch.chosen(upsert.in_order_of_key([batch.columns[name] for name in keys]))


def _count(operation: BulkOperation) -> int:
    return operation.connection.execute(sa.select(sa.func.count()).select_from(operation.table)).scalar_one()

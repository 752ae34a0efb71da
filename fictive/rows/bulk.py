"""Many rows at a time: `insert_many`, `upsert_many`, `update_many`. What is sent, and when."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, overload

import sqlalchemy as sa

from ..errors import UnsupportedDialect
from ..session.given import dialect_of
from .batches import Batch
from .calls import Call, Progress
from .duplicates import Duplicates, check_duplicates, raise_on_duplicate, telling_duplicates, without_duplicates
from .fills import fills_of
from .merging import Merge
from .routes import Route, refuse_expressions

__all__ = ["BATCH_SIZE", "Upserted", "insert_many", "update_many", "upsert_many"]

BATCH_SIZE = 2000
"""Of bigger ones less of the making and the server's taking happens at the same time; smaller ones cost more each."""
COPY_FROM = 20
"""Fewer rows than that go by INSERT, which is one message less on psycopg2; from about here COPY is faster."""
STAGE_FROM = 500
"""Fewer rows than that are upserted from the statement: making and dropping a temporary table takes about as long."""
UPDATE_EACH = 4
"""So many rows at most are updated by an UPDATE each."""

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
    call = Call(session, model, rows, "insert_many()", batch_size, commit_every, progress)
    if returning is not None:
        return _insert_returning(call, model, returning)

    def work(connection: sa.Connection, batches: Iterator[Batch], is_alone: bool) -> None:
        def insert(batch: Batch) -> None:
            refuse_expressions(call.mapper, batch)
            call.session.execute(sa.insert(model), batch.mappings())

        route = None
        if call.is_single_table() and not call.is_small(COPY_FROM):
            route = Route.into_table(call, connection)
        if route is None:
            for batch in batches:
                insert(batch)
                call.sent(batch.read)
        else:
            route.send(connection, call.tracked(batches), insert, is_alone=is_alone)

    call.run(work)
    return call.done


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
        leaves such rows as they are. A row that has the values already is not written (and fires no trigger), unless
        one of them is of a type without equality, such as `json`. `onupdate` columns and the version move with it.
    `duplicates`
        two rows with one key: `"error"` raises `DuplicateRows`, `"last"` takes the last one.

    The other arguments, and what is all or nothing, as in `insert_many`. Rows are written in the order of the key, so
    that two calls at the same time wait for each other instead of meeting in a deadlock.

    Up to 500 rows are `INSERT … ON CONFLICT DO UPDATE`, 2 round trips outside. More go by COPY into a temporary table,
    which one statement merges: 4 round trips. Inside, rows that are no list are a COPY for each batch. PostgreSQL and
    SQLite; on SQLite it is one INSERT a batch, keys are remembered to tell duplicates, and all rows that are not
    inserted count as updated.
    """
    call = Call(session, model, rows, "upsert_many()", batch_size, commit_every, progress)
    dialect = dialect_of(call.session, call.mapper)
    if dialect.name not in ("postgresql", "sqlite"):
        raise UnsupportedDialect(f"upsert_many() needs PostgreSQL or SQLite; this session is on {dialect.name}.")
    call.need_single_table()
    check_duplicates(duplicates)
    keys = call.attributes(key, "key")
    updates = None if update is None else call.attributes(update, "update", may_be_empty=True)
    if both := set(keys) & set(updates or ()):
        raise ValueError(f"upsert_many(): {', '.join(sorted(both))} is in key, and so cannot be in update as well.")
    totals = [0, 0]

    def work(connection: sa.Connection, batches: Iterator[Batch], is_alone: bool) -> None:
        names = call.names_of_head()
        call.need_names(names, keys, "key")
        call.need_names(names, updates or (), "update")
        setting = [name for name in names if name not in keys] if updates is None else updates
        merge = call.merge_into_live(keys, setting)
        route = None
        if dialect.name == "postgresql" and not call.is_small(STAGE_FROM):
            route = Route.into_stage(call, connection)
        if route is None:
            _upsert_from_values(call, connection, batches, merge, keys, duplicates, totals)
            return
        with route.staged(connection, without_duplicates(batches, keys, duplicates), is_alone=is_alone) as stage:
            if duplicates == "error" and not merge.update:
                raise_on_duplicate(call, connection, merge, stage)
            with telling_duplicates(call, keys):
                found = connection.execute(merge.upsert_from(stage, last_wins=duplicates == "last")).one()
            if merge.live is not None and found[2] is not None:
                call.refuse_deleted(merge, [found[3:]])
        totals[0] += found[0]
        totals[1] += found[1] - found[0]

    call.run(work)
    call.expire_loaded()
    return Upserted(totals[0], totals[1], call.done - sum(totals))


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
    `onupdate` columns and the version move where a value changes (all values being of types with equality). With
    joined inheritance the key is the primary key, and a key that is not there is SQLAlchemy's `StaleDataError`. The
    other arguments as in `upsert_many`.

    Two calls at the same time for the same rows, unlike two of `upsert_many`, may meet in a deadlock (SQLSTATE 40P01):
    where that can be, run them with retries (`run_transaction`).

    Up to 4 rows are an UPDATE each; more go by COPY into a temporary table and are one UPDATE, 4 round trips outside.
    Elsewhere than on PostgreSQL they are an UPDATE each.
    """
    call = Call(session, model, rows, "update_many()", batch_size, commit_every, progress)
    check_duplicates(duplicates)
    primary = [call.mapper.get_property_by_column(column).key for column in call.mapper.primary_key]
    keys = primary if key is None else call.attributes(key, "key")
    if not call.is_single_table() and set(keys) != set(primary):
        call.need_single_table()
    dialect = dialect_of(call.session, call.mapper)
    updated = 0

    def work(connection: sa.Connection, batches: Iterator[Batch], is_alone: bool) -> None:
        nonlocal updated
        names = call.names_of_head()
        call.need_names(names, keys, "key")
        others = [name for name in names if name not in keys]
        if not others:
            raise ValueError(f"update_many(): the rows give {', '.join(names)}, which is the key, and nothing to set.")
        route = None
        if not call.is_single_table():
            for batch in without_duplicates(batches, keys, duplicates):
                call.session.execute(sa.update(model), batch.mappings())
                updated += batch.size
                call.sent(batch.read)
            return
        merge = call.merge(keys, others)
        if dialect.name == "postgresql" and not call.is_small(UPDATE_EACH + 1):
            route = Route.into_stage(call, connection, only_given=True)
        if route is None:
            statement = merge.update_one()
            for batch in without_duplicates(batches, keys, duplicates):
                refuse_expressions(call.mapper, batch)
                for row in call.by_column(batch):
                    updated += connection.execute(statement, merge.update_parameters(row)).rowcount
                call.sent(batch.read)
            return
        with route.staged(connection, without_duplicates(batches, keys, duplicates), is_alone=is_alone) as stage:
            if duplicates == "error" and call.batches_sent > 1:
                raise_on_duplicate(call, connection, merge, stage)
            updated += connection.execute(merge.update_from(stage, last_wins=duplicates == "last")).rowcount

    call.run(work)
    call.expire_loaded()
    return updated


def _insert_returning(call: Call, model: Any, returning: str) -> list[Any]:
    if returning not in ("keys", "objects"):
        raise ValueError(f'insert_many(): returning={returning!r}: expected "keys", "objects" or None.')
    keys = [getattr(model, call.mapper.get_property_by_column(column).key) for column in call.mapper.primary_key]
    wanted = [model] if returning == "objects" else keys
    statement = sa.insert(model).returning(*wanted, sort_by_parameter_order=True)
    found: list[Any] = []

    def work(connection: sa.Connection, batches: Iterator[Batch], is_alone: bool) -> None:
        for batch in batches:
            refuse_expressions(call.mapper, batch)
            result = call.session.execute(statement, batch.mappings())
            found.extend(result.scalars() if len(wanted) == 1 else map(tuple, result))
            call.sent(batch.read)

    call.run(work)
    return found


def _upsert_from_values(
    call: Call, connection: sa.Connection, batches: Iterator[Batch], merge: Merge, keys: list[str],
    duplicates: Duplicates, totals: list[int],
) -> None:  # fmt: skip
    on_postgresql = connection.dialect.name == "postgresql"
    statement = merge.upsert(connection.dialect.name)
    if on_postgresql:
        statement = merge.counting(statement)
    elif merge.live is not None:
        statement = statement.returning(*merge.deleted_key())
    fills = fills_of(call.mapper, [call.column(name) for name in call.names_of_head()])
    added = {
        column: values for column, values in fills.values.items()
        if column is call.mapper.polymorphic_on or column is call.mapper.version_id_col
    }  # fmt: skip
    seen: set[Any] | None = None if on_postgresql else set()
    for batch in without_duplicates(batches, keys, duplicates, seen):
        refuse_expressions(call.mapper, batch)
        constants = {column.key: values(1)[0] for column, values in added.items()}
        rows = [{**{c.key: value for c, value in row.items()}, **constants} for row in call.by_column(batch)]
        with contextlib.suppress(TypeError):  # keys that Python cannot compare
            rows.sort(key=operator.itemgetter(*(column.key for column in merge.key)))
        before = None if on_postgresql else connection.scalar(sa.select(sa.func.count()).select_from(merge.table))
        with telling_duplicates(call, keys):
            result = connection.execute(statement, rows)
            written = result.all() if on_postgresql or merge.live is not None else []
            if on_postgresql:
                fresh = [row[0] for row in written]
                totals[0] += sum(fresh)
                totals[1] += len(fresh) - sum(fresh)
        if merge.live is not None:
            at = 1 if on_postgresql else 0
            call.refuse_deleted(merge, (row[at + 1 :] for row in written if row[at] is not None))
        if before is not None:
            inserted = connection.execute(sa.select(sa.func.count()).select_from(merge.table)).scalar_one() - before
            totals[0] += inserted
            totals[1] += batch.size - inserted if merge.update else 0
        call.sent(batch.read)

"""The statements of find_or_create and its family. Pure functions; nothing is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.dialects import postgresql

from ..session import private
from .attributes import WITH_DELETED
from .column_defaults import UpdateDefaults
from .lookups import Lookup
from .stored_values import as_stored, database_type, texts_differ
from .unique_keys import UniqueKey
from .upsert_sql import EXCLUDED, insert_into, of_class, on_conflict_update, was_inserted

__all__ = [
    "committed_elsewhere",
    "deleted_with_key",
    "insert",
    "insert_unless_there",
    "lock_lookup",
    "prepared_insert",
    "serialization_failure",
    "upsert",
    "write_lock",
]

_CREATED = "fictive_created"

Values = Mapping[sa.Column[Any], Any]


def insert(mapper: sa_orm.Mapper[Any], values: Values) -> sa.Executable:
    """A plain INSERT that returns the object."""
    table: Any = mapper.local_table
    return _loading(mapper, sa.insert(table).values(dict(values)))


def insert_unless_there(mapper: sa_orm.Mapper[Any], values: Values, key: UniqueKey, dialect: str) -> sa.Executable:
    """An INSERT that returns the object, or nothing where another row has the key already.

    It waits for a transaction that has inserted the same key and is not over (PostgreSQL documentation, "Transaction
    Isolation: Read Committed Isolation Level").
    """
    return _loading(mapper, _unless_there(mapper, values, key, dialect))


def _unless_there(mapper: sa_orm.Mapper[Any], values: Values, key: UniqueKey, dialect: str) -> Any:
    return insert_into(mapper.local_table, dialect).values(dict(values)).on_conflict_do_nothing(**key.target)


def prepared_insert(
    mapper: sa_orm.Mapper[Any], columns: Iterable[sa.Column[Any]], key: UniqueKey, dialect: str
) -> tuple[sa.Executable, list[str]]:
    """As `insert_unless_there`, for any values of these columns: the statement, and the parameters' names."""
    prefix = "fictive_"
    while any(name.startswith(prefix) for name in mapper.local_table.columns.keys()):  # noqa: SIM118 - no mapping
        prefix += "_"  # a column's name as a parameter would be a value of that column
    names = {column: f"{prefix}{number}" for number, column in enumerate(columns)}
    values = {column: sa.bindparam(name, type_=column.type) for column, name in names.items()}
    statement = private.cached_as_it_is(_unless_there(mapper, values, key, dialect))
    return _loading(mapper, statement), [*names.values()]


def _loading(mapper: sa_orm.Mapper[Any], statement: Any) -> sa.Executable:
    loaded: Any = sa.select(mapper.class_).from_statement(statement.returning(*mapper.local_table.columns))
    return loaded.execution_options(populate_existing=True)  # type: ignore[no-any-return]


def deleted_with_key(lookup: Lookup, key: UniqueKey) -> sa.Select[Any]:
    """Whether a row that is deleted and still there has the key, whatever else the lookup says."""
    assert lookup.live is not None
    same: list[Any] = list(lookup.criteria[:-1])
    if all(isinstance(element, sa.Column) for element in key.elements):
        same = [element == lookup.columns[element] for element in key.elements]  # `IS NULL` for None
    if key.where is not None:
        same.append(key.condition)
    deleted = getattr(lookup.mapper.class_, lookup.live).is_not(None)
    found: sa.Select[Any] = sa.select(sa.literal_column("1")).select_from(lookup.mapper)
    return found.where(*same, deleted).limit(1).execution_options(**{WITH_DELETED: True})


def upsert(lookup: Lookup, values: Values, changes: Values, key: UniqueKey, dialect: sa.Dialect) -> sa.Select[Any]:
    """One statement that inserts `values`, or makes `changes` in the row that has the key; the object, and whether it
    was inserted.

    A row in which nothing would change is not written, and read by the last part. Nothing comes back where that row
    was changed by another transaction meanwhile, has the values in another form, or does not match the whole lookup.
    """
    mapper = lookup.mapper
    table: Any = mapper.local_table
    setting = {
        column: EXCLUDED if column in values and values[column] is value else value
        for column, value in changes.items()
    }
    # of a row with the same key that is another one by the rest of the lookup, or by what an expression leaves out
    by_columns = all(isinstance(element, sa.Column) for element in key.elements)
    is_all = by_columns and not lookup.expressions and lookup.columns.keys() <= key.columns
    beyond_key = () if is_all else lookup.criteria
    statement = on_conflict_update(
        insert_into(table, dialect.name).values(dict(values)),
        key.target,
        setting,
        UpdateDefaults(mapper, {**lookup.columns, **changes}).values,
        dialect,
        only_where=[*beyond_key, *of_class(mapper)],
    )
    # SQLAlchemy would cut a long name outside of the CTE and not within
    columns = [column.label(f"fictive_{n}") for n, column in enumerate(table.columns)]
    written = statement.returning(*columns, was_inserted(key.target).label(_CREATED)).cte("fictive_written")
    there = [~texts_differ(column, value, dialect) for column, value in changes.items()]
    unchanged = sa.select(*columns, sa.false().label(_CREATED)).where(
        *lookup.criteria, *there, ~sa.exists(sa.select(sa.literal_column("1")).select_from(written))
    )
    found = sa.union_all(sa.select(*written.columns), unchanged).subquery("fictive_found")
    entity = sa_orm.aliased(mapper.class_, found)
    result = sa.select(entity, found.columns[_CREATED])
    return result.execution_options(populate_existing=True)


# -- where no key keeps two creators apart ----------------------------------------------------------------------------

_HASHED = (
    sa.Integer, sa.Numeric, sa.Boolean, sa.Date, sa.DateTime, sa.Time, sa.Interval, postgresql.INTERVAL, sa.Uuid,
    sa.LargeBinary, sa.String, postgresql.JSONB,
)  # fmt: skip

_WITHOUT_HASH = (postgresql.CITEXT, postgresql.DOMAIN, sa.Enum)


def lock_lookup(lookup: Lookup, dialect: sa.Dialect) -> sa.Select[Any]:
    """Takes the advisory lock of this lookup until the end of the transaction; returns the isolation level.

    The server hashes the values as they would be stored and as their types compare them: 1 and 1.0, or one moment in
    two time zones, are one lock. A value whose type is not known to have a hash, or to mean more by equal, is left
    out, which only makes more lookups wait for each other.
    """
    parts: list[Any] = []
    names: list[str] = []
    known = [(str(column), column.type, value) for column, value in lookup.columns.items()]
    known += [(f"expression {at}", each.type, value) for at, (each, value) in enumerate(lookup.expressions)]
    for name, type_, value in sorted(known, key=lambda each: each[0]):
        names.append(name)
        stored = database_type(type_, dialect)
        has_hash = isinstance(stored, _HASHED) and not isinstance(stored, _WITHOUT_HASH)
        if has_hash and getattr(stored, "collation", None) is None:
            text = isinstance(stored, sa.String)
            parts.append(sa.cast(as_stored(value, type_, dialect), sa.Text() if text else type_))
    seed = _number("\0".join(["fictive", lookup.mapper.local_table.description, *names]))
    number: Any = sa.literal_column(str(seed), sa.BigInteger)
    if parts:
        number = sa.func.hash_record_extended(sa.func.row(*parts), sa.cast(number, sa.BigInteger))
    return sa.select(sa.func.pg_advisory_xact_lock(number), sa.func.current_setting("transaction_isolation"))


def _number(text: str) -> int:
    """A signed 64-bit number for `text`, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def write_lock(mapper: sa_orm.Mapper[Any]) -> sa.Update:
    """Changes nothing, and takes SQLite's write lock until the end of the transaction, as BEGIN IMMEDIATE does."""
    table: Any = mapper.local_table if isinstance(mapper.local_table, sa.Table) else next(iter(mapper.tables))
    column = next(iter(table.columns))
    return sa.update(table).values({column: column}).where(sa.literal_column("0") == sa.literal_column("1"))


def committed_elsewhere(lookup: Lookup) -> sa.Select[Any]:
    """Whether there is a row that this connection can see; one that is being deleted does not count."""
    return (
        sa.select(sa.literal_column("1"))
        .select_from(lookup.mapper)
        .where(*lookup.criteria)
        .limit(1)
        .with_for_update(key_share=True, read=True, skip_locked=True, of=lookup.mapper.local_table)
    )


def serialization_failure(what: str) -> sa.TextClause:
    """Lets the server raise 40001 itself, with all that follows from an error: the transaction is aborted."""
    message = f"could not serialize access: {what} meets a row that this transaction cannot see"
    quoted = message.replace("'", "''").replace(":", r"\:")
    return sa.text(f"DO $fictive$BEGIN RAISE SQLSTATE '40001' USING MESSAGE = '{quoted}'; END$fictive$")

"""The statements of find_or_create and its family. Pure functions; nothing is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.dialects import postgresql, sqlite

from .columns import WITH_DELETED
from .lookups import Lookup, UniqueKey
from .values import update_defaults

__all__ = [
    "committed_elsewhere",
    "deleted_with_key",
    "insert",
    "insert_unless_there",
    "serialise",
    "serialization_failure",
    "upsert",
    "write_lock",
]

_CREATED = "fictive_created"

Values = Mapping[sa.Column[Any], Any]


def insert(mapper: sa_orm.Mapper[Any], values: Values) -> sa.Executable:
    """A plain INSERT that returns the object."""
    table: Any = mapper.local_table
    return _loading(mapper, sa.insert(table).values(dict(values)).returning(*table.columns))


def insert_unless_there(mapper: sa_orm.Mapper[Any], values: Values, key: UniqueKey, dialect: str) -> sa.Executable:
    """An INSERT that returns the object, or nothing where another row has the key already.

    It waits for a transaction that has inserted the same key and is not over (PostgreSQL documentation, "Transaction
    Isolation: Read Committed Isolation Level").
    """
    table = mapper.local_table
    statement: Any = (sqlite if dialect == "sqlite" else postgresql).insert(table).values(dict(values))
    statement = statement.on_conflict_do_nothing(index_elements=key.target, index_where=key.target_where)
    return _loading(mapper, statement.returning(*table.columns))


def _loading(mapper: sa_orm.Mapper[Any], statement: Any) -> sa.Executable:
    loaded: sa.Executable = sa.select(mapper.class_).from_statement(statement)
    return loaded.execution_options(populate_existing=True)


def deleted_with_key(lookup: Lookup, key: UniqueKey) -> sa.Select[Any]:
    """Whether a row that is deleted and still there has the key, whatever else the lookup says."""
    assert lookup.live is not None
    same: list[Any] = list(lookup.criteria[:-1])
    if all(isinstance(element, sa.Column) for element in key.elements):
        same = [element == lookup.columns[element] for element in key.elements]  # `IS NULL` for None
    if key.where is not None:
        same.append(key.target_where)
    deleted = getattr(lookup.mapper.class_, lookup.live).is_not(None)
    found: sa.Select[Any] = sa.select(sa.literal_column("1")).select_from(lookup.mapper)
    return found.where(*same, deleted).limit(1).execution_options(**{WITH_DELETED: True})


def upsert(lookup: Lookup, values: Values, changes: Values, key: UniqueKey) -> sa.Select[Any]:
    """One statement that inserts `values`, or makes `changes` in the row that has the key; the object, and whether it
    was inserted.

    A row in which nothing would change is not written, and read by the last part. Nothing comes back where that row
    was changed by another transaction meanwhile, or does not match the whole lookup.
    """
    mapper = lookup.mapper
    table: Any = mapper.local_table
    statement = postgresql.insert(table).values(dict(values))
    setting: dict[Any, Any] = {}
    excluded: list[sa.Column[Any]] = []
    differences: list[Any] = []
    same: list[Any] = []
    for column, value in changes.items():
        inserted_too = column in values and value is not None and values[column] is value
        setting[column] = statement.excluded[column.key] if inserted_too else _literal(column, value)
        if inserted_too and not _is_json(column):
            excluded.append(column)
        else:
            differences.append(_comparable(column).is_distinct_from(_comparable(column, setting[column])))
        if not isinstance(_type(column), (sa.types.UserDefinedType, sa.types.NullType)):
            same.append(_comparable(column).is_not_distinct_from(_comparable(column, _literal(column, value))))
    if excluded:  # by their bytes: what `=` takes for equal, as citext does, may differ all the same
        ours = sa.cast(sa.func.row(*excluded), _Record)
        theirs = sa.cast(sa.func.row(*(statement.excluded[column.key] for column in excluded)), _Record)
        differences.insert(0, ours.op("*<>", is_comparison=True)(theirs))
    setting |= update_defaults(table, changes)
    version = mapper.version_id_col
    if version is not None and version not in setting and callable(mapper.version_id_generator):
        numbered = isinstance(version.type, sa.Integer)
        setting[version] = version + 1 if numbered else _literal(version, mapper.version_id_generator(None))
    statement = statement.on_conflict_do_update(
        index_elements=key.target,
        index_where=key.target_where,
        set_=setting,
        where=sa.and_(sa.or_(*differences), *_beyond_key(lookup, key)),
    )
    inserted = (sa.literal_column("xmax") == sa.literal_column("0")).label(_CREATED)
    written = statement.returning(*table.columns, inserted).cte("fictive_written")
    unchanged = sa.select(*table.columns, sa.false().label(_CREATED)).where(
        *lookup.criteria, *same, ~sa.exists(sa.select(sa.literal_column("1")).select_from(written))
    )
    found = sa.union_all(sa.select(*written.columns), unchanged).subquery("fictive_found")
    entity = sa_orm.aliased(mapper.class_, found)
    result = sa.select(entity, found.columns[_CREATED])
    return result.execution_options(populate_existing=True)


def _beyond_key(lookup: Lookup, key: UniqueKey) -> Iterator[Any]:
    """What the key alone does not say of the row: without it a row of another lookup would be changed."""
    mapper = lookup.mapper
    if lookup.expressions or not lookup.columns.keys() <= key.columns:
        yield from lookup.criteria
    if mapper.single:
        kinds = [each.polymorphic_identity for each in mapper.self_and_descendants]
        yield mapper.polymorphic_on.in_(kinds)  # type: ignore[union-attr]


def _literal(column: Any, value: Any) -> Any:
    if isinstance(value, sa.ClauseElement) or hasattr(value, "__clause_element__"):
        return value
    return sa.null() if value is None else sa.literal(value, column.type)


class _Record(sa.types.UserDefinedType[Any]):
    """PostgreSQL's type for any row (PostgreSQL documentation, "Composite Type Comparison")."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "record"


def _type(column: Any) -> Any:
    type_ = column.type
    while isinstance(type_, sa.types.TypeDecorator):
        type_ = type_.impl
    return type_


def _is_json(column: Any) -> bool:
    return isinstance(_type(column), sa.JSON) and not isinstance(_type(column), postgresql.JSONB)


def _comparable(column: Any, value: Any = None) -> Any:
    """A column, or a value for it, as something that has an `=`; type json has none."""
    value = column if value is None else value
    return sa.cast(value, postgresql.JSONB) if _is_json(column) else value


# -- where no key keeps two creators apart ----------------------------------------------------------------------------

_WITHOUT_HASH = (postgresql.BIT, postgresql.MONEY, postgresql.TSVECTOR, postgresql.TSQUERY)


def serialise(lookup: Lookup) -> sa.Select[Any]:
    """Takes the advisory lock of this lookup until the end of the transaction; returns the isolation level.

    The server hashes the values, as their types compare them: 1 and 1.0, or one moment in two time zones, are one
    lock. A value whose type says nothing about that is left out, which only makes more lookups wait for each other.
    """
    parts: list[Any] = []
    names: list[str] = []
    known = [(str(column), column.type, value) for column, value in lookup.columns.items()]
    known += [(f"expression {at}", each.type, value) for at, (each, value) in enumerate(lookup.expressions)]
    for name, type_, value in sorted(known, key=lambda each: each[0]):
        names.append(name)
        if isinstance(type_, (sa.types.NullType, sa.JSON)) or getattr(type_, "collation", None):
            continue
        given = sa.cast(value if isinstance(value, sa.ClauseElement) else sa.literal(value, type_), type_)
        parts.append(sa.cast(given, sa.Text) if isinstance(type_, _WITHOUT_HASH) else given)
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

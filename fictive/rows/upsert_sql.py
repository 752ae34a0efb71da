"""The SQL of upserts and of updates by key: from values in the statement, or from a staging table. Pure."""

from __future__ import annotations

import contextlib
import functools
import itertools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import visitors
from sqlalchemy.sql.expression import ClauseElement, Executable

from .stored_values import as_stored, bound, database_type, images_differ, texts_differ
from .unique_keys import UniqueKey, key_over

__all__ = ["EXCLUDED", "CreateStaging", "Upsert", "insert_into", "of_class", "on_conflict_update",
           "staging_table", "was_inserted"]  # fmt: skip

EXCLUDED: Any = object()
"""Instead of a value: what the row to insert has for the column."""

# Whether a row that comes back was inserted. `xmax` would tell, but a partitioned table, a view, and a role with
# privileges on some columns have none. So an update leaves its key as a mark for the RETURNING of its row, which takes
# it off. Where a trigger cancels the update, the mark stays for the transaction: each table has a setting of its own.


def _mark(target: Mapping[str, Any]) -> Any:
    parts = itertools.chain.from_iterable(map(visitors.iterate, target["index_elements"]))
    table = next(part.table for part in parts if isinstance(part, sa.Column))
    return sa.literal_column(f"'fictive.met_{zlib.crc32(str(table).encode()):08x}'", sa.Text)


def _key_text(target: Mapping[str, Any]) -> Any:
    return sa.cast(sa.func.row(*target["index_elements"]), sa.Text)


def _leaves_mark(target: Mapping[str, Any]) -> sa.ColumnElement[bool]:
    return sa.func.set_config(_mark(target), _key_text(target), sa.true()).is_not(None)


def was_inserted(target: Mapping[str, Any]) -> sa.ColumnElement[bool]:
    """For RETURNING: whether the row was inserted, or else updated, by a statement with this ON CONFLICT target."""
    mark = _mark(target)
    is_taken_off = sa.func.set_config(mark, sa.literal_column("''"), sa.true()) != sa.literal_column("''")  # false
    return sa.case((sa.func.current_setting(mark, sa.true()) == _key_text(target), is_taken_off), else_=sa.true())


def insert_into(table: Any, dialect_name: str) -> Any:
    """An INSERT that can have ON CONFLICT."""
    return (sqlite if dialect_name == "sqlite" else postgresql).insert(table)


def of_class(mapper: sa_orm.Mapper[Any]) -> list[sa.ColumnElement[bool]]:
    """The condition that rows are of this class, in a table that it shares with others."""
    column: Any = mapper.polymorphic_on
    if not mapper.single or column is None:
        return []
    # not by IN, which a statement with many rows cannot have
    return [sa.or_(*(column == each.polymorphic_identity for each in mapper.self_and_descendants))]


def on_conflict_update(
    insert: Any,
    target: Mapping[str, Any],
    setting: Mapping[sa.Column[Any], Any],
    besides: Mapping[sa.Column[Any], Any],
    dialect: sa.Dialect,
    *,
    also_where: Iterable[Any] = (),
    only_where: Iterable[Any] = (),
) -> Any:
    """`INSERT … ON CONFLICT DO UPDATE` that sets `setting` and, where that changes a byte of the row, `besides`.

    A row in which nothing would change is not written. `also_where`: nor kept as it is where this is true;
    `only_where`: nor touched where this is false.
    """
    same = [column for column, value in setting.items() if value is EXCLUDED]
    excluded = [insert.excluded[column.key] for column in same]
    values: dict[Any, Any] = dict(zip(same, excluded, strict=True))
    differences: list[Any] = []
    if same and dialect.name == "postgresql":
        differences.append(images_differ(same, excluded))
    elif same:
        differences += [column.is_distinct_from(value) for column, value in values.items()]
    for column, value in setting.items():
        if value is not EXCLUDED:
            values[column] = bound(value, column.type)
            differences.append(texts_differ(column, value, dialect))
    values |= {column: bound(value, column.type) for column, value in besides.items()}
    changes = sa.and_(sa.or_(*differences, *also_where), *only_where)
    if dialect.name == "postgresql":
        changes = sa.case((changes, _leaves_mark(target)), else_=sa.false())
    return insert.on_conflict_do_update(**target, set_=values, where=changes)


# -- staging ----------------------------------------------------------------------------------------------------------

_numbers = itertools.count(1)


def staging_table(columns: Sequence[sa.Column[Any]]) -> sa.Table:
    """A temporary table with these columns of another one, of exactly their types, and last the number of each row.

    It goes with its transaction; names are never used twice in a process, since a transaction may have several.
    """
    number = "fictive_row"
    while number in {column.name for column in columns}:
        number += "_"
    own = [sa.Column(column.name, column.type, key=column.key) for column in columns]
    # with the schema's name, so that no `schema_translate_map` takes it for the model's
    name = f"fictive_stage_{next(_numbers)}"
    return sa.Table(name, sa.MetaData(), *own, sa.Column(number, sa.BigInteger), schema="pg_temp")


class CreateStaging(Executable, ClauseElement):
    """`CREATE TEMPORARY TABLE … ON COMMIT DROP AS SELECT … WITH NO DATA`: the types are the database's own."""

    inherit_cache = False

    def __init__(self, stage: sa.Table, columns: Sequence[sa.Column[Any]]) -> None:
        self.name = stage.name
        own = [sa.type_coerce(column, sa.types.NullType()).label(column.name) for column in columns]
        *_, number = stage.columns
        self.select = sa.select(*own, sa.cast(sa.null(), sa.BigInteger).label(number.name))


@compiles(CreateStaging)
def _create_staging(element: CreateStaging, compiler: Any, **kwargs: Any) -> str:
    select = compiler.process(element.select, **kwargs)
    return f"CREATE TEMPORARY TABLE {element.name} ON COMMIT DROP AS {select} WITH NO DATA"


# -- upserts and updates ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Upsert:
    """How rows meet those that are there: by `key`, setting `update` from the row, and `besides` to what it says."""

    table: sa.Table
    key: Sequence[sa.Column[Any]]
    update: Sequence[sa.Column[Any]]
    besides: Mapping[sa.Column[Any], Any]
    dialect: sa.Dialect
    by_row: Sequence[sa.Column[Any]] = ()
    """Further columns that an update sets from the row, without counting as a change."""
    only: Sequence[sa.ColumnElement[bool]] = ()
    """Other rows are left as they are."""
    live: sa.Column[Any] | None = None
    """NULL in rows that live: an upsert that meets another one writes it as well, and says so, to be taken back."""

    def upsert(self) -> Any:
        """`INSERT … ON CONFLICT`, its values not yet given. On PostgreSQL a row comes back for each that was written:
        whether it was inserted, and `deleted_key`."""
        upsert = self._on_conflict(insert_into(self.table, self.dialect.name))
        inserted = [] if self.dialect.name == "sqlite" else [was_inserted(self._target)]
        returned = [*inserted, *self.deleted_key()]
        return upsert.returning(*returned) if returned else upsert

    def upsert_from(self, stage: sa.Table, *, last_wins: bool) -> Any:
        """The counts (inserted, written) of an upsert of what is staged, and `deleted_key` where it met one."""
        source: Any = self._last_of_each(stage).subquery("last") if last_wins else stage
        names = stage.columns.keys()[:-1]
        select = sa.select(*(source.c[name] for name in names)).order_by(*self._order(source))
        insert = postgresql.insert(self.table).from_select(names, select)
        fresh = was_inserted(self._target).label("fresh")
        done = self._on_conflict(insert).returning(fresh, *self.deleted_key()).cte("done")
        counts = [sa.func.count().filter(done.c.fresh), sa.func.count()]
        for column in list(done.c)[1:]:  # none, or those of deleted_key()
            texts: Any = sa.func.array_agg(sa.cast(column, sa.Text)).filter(done.c.fictive_live.is_not(None))
            counts.append(sa.type_coerce(texts, sa.ARRAY(sa.Text))[1])
        return sa.select(*counts).select_from(done)

    def deleted_key(self) -> list[Any]:
        """For RETURNING: `live` and the key of the row; nothing where no row can be a deleted one.

        Not whether `live` is NULL, which SQLite 3.40 gets wrong where a partial index has it in its condition.
        """
        if self.live is None:
            return []
        return [self.live.label("fictive_live"), *(c.label(f"fictive_key_{n}") for n, c in enumerate(self.key))]

    @functools.cached_property
    def _known_key(self) -> UniqueKey | None:
        return key_over(self.table, self.key, self.dialect.name)

    @functools.cached_property
    def _target(self) -> dict[str, Any]:
        """Of ON CONFLICT: the unique key, or one that only the database knows."""
        return (self._known_key or UniqueKey(tuple(self.key))).target

    @property
    def nulls_are_one(self) -> bool:
        """Whether two keys with NULL are one, by NULLS NOT DISTINCT."""
        return self._known_key is not None and not self._known_key.nulls_distinct

    def _on_conflict(self, insert: Any) -> Any:
        target = self._target
        if not self.update and self.live is None:
            return insert.on_conflict_do_nothing(**target)
        setting = dict.fromkeys(self.update, EXCLUDED)
        besides: Any = self.besides if self.update else {self.live: self.live}
        only = self.only if self.update else ()
        deleted = [] if self.live is None else [self.live.is_not(None)]
        return on_conflict_update(insert, target, setting, besides, self.dialect, also_where=deleted, only_where=only)

    def update_row(self, row: Mapping[sa.Column[Any], Any]) -> Any:
        """`UPDATE` of the row with this key."""
        given = {column: bound(row[column], column.type) for column in (*self.update, *self.by_row)}
        where = [self._is_same(column, as_stored(row[column], column.type, self.dialect)) for column in self.key]
        return self._update(where, given, [texts_differ(column, row[column], self.dialect) for column in self.update])

    def update_from(self, stage: sa.Table, *, last_wins: bool) -> Any:
        """`UPDATE … FROM` what is staged. It locks the rows in their order before it writes the first."""
        source: Any = self._last_of_each(stage).cte("last") if last_wins else stage
        given = {column: source.c[column.key] for column in (*self.update, *self.by_row)}
        same = [self._is_same(column, source.c[column.key]) for column in self.key]
        joined: Any = sa.select(sa.literal_column("1").label("one")).select_from(
            self.table.join(source, sa.and_(*same))
        )
        ordered = joined.where(*self.only).order_by(*self._order(source))
        locked = ordered.with_for_update(key_share=True, of=self.table).cte("locked")
        first = sa.select(sa.func.count()).select_from(locked).scalar_subquery() >= 0
        changed = images_differ(self.update, [given[column] for column in self.update])
        return self._update([first, *same], given, [changed])

    def _is_same(self, column: sa.Column[Any], value: Any) -> sa.ColumnElement[bool]:
        """Of a column of the key; an index answers this, and does not answer IS NOT DISTINCT FROM."""
        equal: sa.ColumnElement[bool] = column == value
        if not column.nullable or not self.nulls_are_one:
            return equal
        return sa.or_(equal, sa.and_(column.is_(None), value.is_(None)))

    def _update(self, where: Iterable[Any], given: Mapping[sa.Column[Any], Any], changed: Iterable[Any]) -> Any:
        """`UPDATE` of all that is found to what is `given`; what else is set only where a value is `changed`."""
        besides = {column: bound(value, column.type) for column, value in self.besides.items()}
        besides |= {column: given[column] for column in self.by_row}
        setting = {column: given[column] for column in self.update}
        setting |= {column: sa.case((sa.or_(*changed), value), else_=column) for column, value in besides.items()}
        return sa.update(self.table).where(*where, *self.only).values(setting)

    # -- duplicates ---------------------------------------------------------------------------------------------------

    def duplicate_in(self, stage: sa.Table) -> Any:
        """A key that is staged twice."""
        keys = [stage.c[column.key] for column in self.key]
        given = [] if self.nulls_are_one else [key.is_not(None) for key in keys]
        return sa.select(*keys).where(*given).group_by(*keys).having(sa.func.count() > 1).limit(1)

    def _last_of_each(self, stage: sa.Table) -> Any:
        """What is staged, without rows whose key comes again; a key with a NULL in it is like no other, as a rule."""
        *columns, number = stage.columns
        keys = [stage.c[column.key] for column in self.key]
        rank = sa.func.row_number().over(partition_by=keys, order_by=number.desc()).label("fictive_rank")
        ranked = sa.select(*columns, rank).subquery("ranked")
        nullable = [] if self.nulls_are_one else [column for column in self.key if column.nullable]
        is_last = sa.or_(ranked.c.fictive_rank == 1, *(ranked.c[column.key].is_(None) for column in nullable))
        return sa.select(*(ranked.c[column.key] for column in columns)).where(is_last)

    def _order(self, source: Any) -> list[Any]:
        """By the key, so that two statements at the same time wait for each other and do not deadlock; texts by code
        point, as Python sorts, for a statement with values takes its locks in the same order: `in_order_of_key`."""
        order: list[Any] = []
        for column in self.key:
            stored, value = database_type(column.type, self.dialect), source.c[column.key]
            if isinstance(stored, sa.Enum):
                value = sa.cast(value, sa.Text)
            order.append(sa.collate(value, "C") if isinstance(stored, sa.String) else value)
        return order

    def in_order_of_key(self, values: Sequence[Sequence[Any]]) -> list[int]:
        """The numbers of rows with these keys, given by column, in the order in which statements take their locks."""
        columns = [self._sortable(column, each) for column, each in zip(self.key, values, strict=True)]
        keys = list(zip(*columns, strict=True))
        try:
            return sorted(range(len(keys)), key=keys.__getitem__)
        except TypeError:  # keys that Python cannot compare
            return [*range(len(keys))]

    def _sortable(self, column: sa.Column[Any], values: Sequence[Any]) -> Sequence[Any]:
        """What is sent for these values of a type of the application's, which Python may sort otherwise or not at all;
        NULL comes last."""
        if isinstance(column.type, (sa.types.TypeDecorator, sa.Enum)):
            process = column.type.dialect_impl(self.dialect).bind_processor(self.dialect)
            with contextlib.suppress(Exception):  # of the processor's; the statement raises it as a flush does
                values = values if process is None else list(map(process, values))
        return [(value is None, value) for value in values] if None in values else values

"""The statements of upserts and of updates by key: from values in the statement, or from a staging table. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import ClauseElement, Executable

__all__ = ["CreateStage", "DropStage", "Merge", "Stage", "can_compare"]

_numbers = itertools.count(1)


class Stage:
    """A temporary table with some columns of another one, of exactly their types, and the number of each row.

    It goes with its transaction; names are never used twice in a process, since a transaction may have several.
    """

    def __init__(self, table: sa.Table, columns: Sequence[sa.Column[Any]]) -> None:
        self.of = table
        self.columns = list(columns)
        own = [sa.Column(column.name, column.type, key=column.key) for column in columns]
        number = "fictive_row"
        while number in {column.name for column in columns}:
            number += "_"
        self.number: sa.Column[int] = sa.Column(number, sa.BigInteger)
        self.table = sa.Table(f"fictive_stage_{next(_numbers)}", sa.MetaData(), *own, self.number)

    def __getitem__(self, column: sa.Column[Any]) -> sa.Column[Any]:
        return self.table.c[column.key]

    @property
    def names(self) -> list[str]:
        """All its columns, as COPY names them."""
        return [column.name for column in self.table.columns]


class CreateStage(Executable, ClauseElement):
    """`CREATE TEMPORARY TABLE … ON COMMIT DROP AS SELECT … WITH NO DATA`: the types are the database's own."""

    inherit_cache = False

    def __init__(self, stage: Stage) -> None:
        self.name = stage.table.name
        number = sa.cast(sa.null(), sa.BigInteger).label(stage.number.name)
        self.select = sa.select(*stage.columns, number)


class DropStage(Executable, ClauseElement):
    inherit_cache = False

    def __init__(self, stage: Stage) -> None:
        self.name = stage.table.name


@compiles(CreateStage)
def _create_stage(element: CreateStage, compiler: Any, **kwargs: Any) -> str:
    select = compiler.process(element.select, **kwargs)
    name = compiler.preparer.quote(element.name)
    return f"CREATE TEMPORARY TABLE {name} ON COMMIT DROP AS {select} WITH NO DATA"


@compiles(DropStage)
def _drop_stage(element: DropStage, compiler: Any, **kwargs: Any) -> str:
    return f"DROP TABLE {compiler.preparer.quote(element.name)}"


@dataclass(frozen=True)
class Merge:
    """How rows meet those that are there: by `key`, setting `update` from the row, and `besides` to what it says."""

    table: sa.Table
    key: Sequence[sa.Column[Any]]
    update: Sequence[sa.Column[Any]]
    besides: Mapping[sa.Column[Any], Any]
    live: sa.Column[Any] | None = None
    """NULL in rows that live: an upsert that meets another one writes it as well, and says so, to be taken back."""

    # -- upserts ------------------------------------------------------------------------------------------------------

    def upsert(self, dialect_name: str) -> Any:
        """`INSERT … ON CONFLICT`, its values not yet given."""
        insert: Any = (sqlite if dialect_name == "sqlite" else postgresql).insert(self.table)
        return self._on_conflict(insert)

    def upsert_from(self, stage: Stage, *, last_wins: bool) -> Any:
        """The counts (inserted, written) of an upsert of what is staged.

        In the order of the key, so that two of them at the same time wait for each other and do not deadlock.
        """
        source = [stage[column] for column in stage.columns]
        select = sa.select(*source)
        if last_wins:
            select = self._last_of_each(stage)
            source = list(select.selected_columns)
            by_key = {column.key: column for column in source}
            select = select.order_by(*(_as_python_sorts(by_key[column.key]) for column in self.key))
        else:
            select = select.order_by(*(_as_python_sorts(stage[column]) for column in self.key))
        insert = postgresql.insert(self.table).from_select([column.key for column in stage.columns], select)
        done = self._on_conflict(insert).returning(_WAS_INSERTED.label("fresh"), *self.deleted_key()).cte("done")
        counts = [sa.func.count().filter(done.c.fresh), sa.func.count()]
        for column in list(done.c)[1:]:  # none, or those of deleted_key()
            texts: Any = sa.func.array_agg(sa.cast(column, sa.Text)).filter(done.c.fictive_live.is_not(None))
            counts.append(sa.type_coerce(texts, sa.ARRAY(sa.Text))[1])
        return sa.select(*counts).select_from(done)

    def counting(self, upsert: Any) -> Any:
        """`upsert` with a row back for each that was written: whether it was inserted, and `deleted_key`."""
        return upsert.returning(_WAS_INSERTED, *self.deleted_key())

    def deleted_key(self) -> list[Any]:
        """For RETURNING: `live` and the key of the row; nothing where no row can be a deleted one.

        Not whether `live` is NULL, which SQLite 3.40 gets wrong where a partial index has it in its condition.
        """
        if self.live is None:
            return []
        return [self.live.label("fictive_live"), *(c.label(f"fictive_key_{n}") for n, c in enumerate(self.key))]

    def _on_conflict(self, insert: Any) -> Any:
        where = self._index_where()
        target = {"index_elements": list(self.key), "index_where": where}
        if not self.update and self.live is not None:
            return insert.on_conflict_do_update(
                **target, set_={self.live.name: self.live}, where=self.live.is_not(None)
            )
        if not self.update:
            return insert.on_conflict_do_nothing(**target)
        set_ = {column.name: insert.excluded[column.key] for column in self.update}
        set_.update({column.name: value for column, value in self.besides.items()})
        changed = None
        if all(can_compare(column.type) for column in self.update):
            changed = sa.or_(*(column.is_distinct_from(insert.excluded[column.key]) for column in self.update))
            if self.live is not None:
                changed = sa.or_(changed, self.live.is_not(None))
        return insert.on_conflict_do_update(**target, set_=set_, where=changed)

    def _index_where(self) -> Any:
        """The condition of a partial unique index, where that is the only one over the key that the model knows."""
        key = set(self.key)
        known = [self.table.primary_key, *self.table.constraints]
        if any(isinstance(each, (sa.PrimaryKeyConstraint, sa.UniqueConstraint)) and set(each.columns) == key
               for each in known):  # fmt: skip
            return None
        found = []
        for index in self.table.indexes:
            if index.unique and set(index.expressions) == key:
                found.append(index.dialect_options["postgresql"].get("where"))
        return found[0] if len(found) == 1 else None

    # -- updates ------------------------------------------------------------------------------------------------------

    def update_one(self) -> Any:
        """`UPDATE` of the row with the key `key_<n>` to the values `set_<n>`; parameters as `update_parameters`."""
        where = [column == sa.bindparam(f"key_{n}", type_=column.type) for n, column in enumerate(self.key)]
        values: dict[Any, Any] = {c: sa.bindparam(f"set_{n}", type_=c.type) for n, c in enumerate(self.update)}
        values.update(self._besides_where_changed(values))
        return sa.update(self.table).where(*where).values(values)

    def update_parameters(self, row: Mapping[sa.Column[Any], Any]) -> dict[str, Any]:
        keys = {f"key_{n}": row[column] for n, column in enumerate(self.key)}
        return {**keys, **{f"set_{n}": row[column] for n, column in enumerate(self.update)}}

    def update_from(self, stage: Stage, *, last_wins: bool) -> Any:
        """`UPDATE … FROM` what is staged."""
        source: Any = self._last_of_each(stage).subquery("last") if last_wins else stage.table
        values: dict[Any, Any] = {column: source.c[column.key] for column in self.update}
        values.update(self._besides_where_changed(values))
        return sa.update(self.table).values(values).where(*(each == source.c[each.key] for each in self.key))

    def _besides_where_changed(self, values: Mapping[Any, Any]) -> dict[Any, Any]:
        """`besides` for a row that gets other values than it has; the row is counted as updated in any case."""
        if not all(can_compare(column.type) for column in self.update):
            return dict(self.besides)
        changed = sa.or_(*(column.is_distinct_from(value) for column, value in values.items()))
        return {
            column: sa.case(
                (changed, value if isinstance(value, ClauseElement) else sa.literal(value, column.type)), else_=column
            )
            for column, value in self.besides.items()
        }

    # -- duplicates ---------------------------------------------------------------------------------------------------

    def duplicate_in(self, stage: Stage) -> Any:
        """A key that is staged twice."""
        keys = [stage[column] for column in self.key]
        given = [key.is_not(None) for key in keys]
        return sa.select(*keys).where(*given).group_by(*keys).having(sa.func.count() > 1).limit(1)

    def _last_of_each(self, stage: Stage) -> Any:
        """What is staged, without rows whose key comes again; a key with a NULL in it is like no other."""
        keys = [stage[column] for column in self.key]
        rank = sa.func.row_number().over(partition_by=keys, order_by=stage.number.desc()).label("fictive_rank")
        ranked = sa.select(*(stage[column] for column in stage.columns), rank).subquery("ranked")
        nullable = [ranked.c[column.key].is_(None) for column in self.key if column.nullable]
        return sa.select(*(ranked.c[column.key] for column in stage.columns)).where(
            sa.or_(ranked.c.fictive_rank == 1, *nullable)
        )


# An inserted row version has no transaction that deleted or locked it (PostgreSQL documentation, "System Columns").
_WAS_INSERTED: sa.ColumnElement[bool] = sa.literal_column("xmax", sa.Integer) == sa.literal_column("0")


def _as_python_sorts(column: Any) -> Any:
    """Texts by code point, so that an upsert from values, sorted by Python, takes its locks in the same order."""
    stored = column.type.impl_instance if isinstance(column.type, sa.types.TypeDecorator) else column.type
    is_text = isinstance(stored, sa.String) and not isinstance(stored, sa.Enum)
    return sa.collate(column, "C") if is_text else column


_COMPARABLE = (
    sa.String, sa.Integer, sa.Numeric, sa.Float, sa.Boolean, sa.Date, sa.DateTime, sa.Time, sa.Interval,
    sa.LargeBinary, sa.Uuid, postgresql.JSONB, postgresql.INTERVAL, postgresql.INET, postgresql.CIDR,
)  # fmt: skip


def can_compare(type_: sa.types.TypeEngine[Any]) -> bool:
    """Whether the type is known to have an equality operator, which `json`, for one, has not."""
    if isinstance(type_, sa.types.TypeDecorator):
        return can_compare(type_.impl_instance)
    if isinstance(type_, sa.ARRAY):
        return can_compare(type_.item_type)
    return isinstance(type_, _COMPARABLE)

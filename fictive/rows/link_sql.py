"""The rows between the two sides of a many-to-many relationship, and the statements on them. Pure.

Keys go as arrays (`unnested`), so that a statement has the same text for one link and for ten thousand.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.dialects import postgresql
from sqlalchemy.sql import operators

from .attributes import attribute_names
from .column_defaults import InsertDefaults
from .stored_values import PADDED_TEXT, array_text, bound, database_type
from .unique_keys import UniqueKey, key_over

__all__ = ["Columns", "Key", "Links", "linked_by"]

Key = tuple[Any, ...]
"""The values of one side of a link, in the order of the columns that hold them."""

Columns = Sequence[Sequence[Any]]
"""The related sides of many links: for each column its values, all of one length."""


@dataclasses.dataclass(frozen=True)
class Links:
    """A many-to-many relationship by its link table.

    `owner` and `related` are the columns of the link table with the attribute of either side whose value they hold.
    The related ones stand in the order of the related primary key, if they hold all of it (`whole_key`).
    """

    name: str
    table: sa.Table
    owner_mapper: sa_orm.Mapper[Any]
    related_mapper: sa_orm.Mapper[Any]
    owner: Mapping[sa.Column[Any], str]
    related: Mapping[sa.Column[Any], str]
    whole_key: bool

    @property
    def own(self) -> list[sa.Column[Any]]:
        """The related side's columns that are not the owner's too, as the tenant of both is."""
        return [column for column in self.related if column not in self.owner]

    def unique_key(self) -> UniqueKey | None:
        """The unique key that a second row for the same link violates; None without one."""
        key = key_over(self.table, {*self.owner, *self.related}, "postgresql")
        return None if key is None or key.where is not None else key

    # -- statements -------------------------------------------------------------------------------------------------

    def insert(self, dialect: sa.Dialect, owner: Key, wanted: Columns, *, ignore_conflicts: bool) -> sa.Executable:
        """INSERT of links, returning the related side of those that are new."""
        singly, for_all = self._rows(owner, wanted)
        insert = self._insert(unnested(dialect, singly), singly, for_all, ignore_conflicts=ignore_conflicts)
        return insert.returning(*self.related)

    def delete(self, dialect: sa.Dialect, owner: Key, wanted: Columns) -> sa.Executable:
        """DELETE of links, returning the related side of those that were there."""
        is_one_of = self._is_one_of(sa.select(*unnested(dialect, self._own_values(wanted)).c))
        return sa.delete(self.table).where(self._of(owner), is_one_of).returning(*self.related)

    def clear(self, owner: Key) -> sa.Executable:
        """DELETE of all links of the owner, returning their related side."""
        return sa.delete(self.table).where(self._of(owner)).returning(*self.related)

    def replace(self, dialect: sa.Dialect, owner: Key, wanted: Columns) -> sa.Executable:
        """One statement that deletes what is not `wanted` and inserts what is missing; a row for each change: whether
        it was added, and its related side.

        The differences are found in one pass over both; each row is written at most once (PostgreSQL documentation,
        "Data-Modifying Statements in WITH").
        """
        singly, for_all = self._rows(owner, wanted)
        rows = unnested(dialect, singly)
        linked = {column: f"fictive_linked_{number}" for number, column in enumerate(self.related)}
        named = [column.label(name) for column, name in linked.items()]
        own = [column.label(linked[column]) for column in self.own]
        there = sa.select(*own, sa.true().label("fictive_there")).where(self._of(owner)).subquery("there")
        same = sa.and_(*(rows.c[column.name] == there.c[linked[column]] for column in self.own))
        is_new, is_old = there.c.fictive_there.is_(None), rows.c[self.own[0].name].is_(None)
        different = (
            sa.select(*rows.c, *there.c)
            .select_from(rows.join(there, same, full=True))
            .where(is_new | is_old)
            .cte("different")
        )
        old = sa.select(*(different.c[name] for name in there.c.keys()[:-1]))
        old = old.where(different.c[self.own[0].name].is_(None))
        if len(self.own) == 1:
            # Looked up in the primary key whatever the statistics say; joined, a table that has just grown was
            # compared with every difference.
            is_removed = self.own[0] == sa.any_(sa.func.array(old.scalar_subquery()))
        else:
            is_removed = self._is_one_of(old)
        removed = sa.delete(self.table).where(self._of(owner), is_removed).returning(*named).cte("removed")
        is_added = different.c.fictive_there.is_(None)
        insert = self._insert(different, singly, for_all, is_added, ignore_conflicts=True)
        added = insert.returning(*named).cte("added")
        return sa.union_all(
            sa.select(sa.true().label("is_new"), *added.c), sa.select(sa.false().label("is_new"), *removed.c)
        )

    # -- their parts --------------------------------------------------------------------------------------------------

    def _of(self, owner: Key) -> sa.ColumnElement[bool]:
        return sa.and_(*(column == value for column, value in self._owner_values(owner).items()))

    def _owner_values(self, owner: Key) -> dict[sa.Column[Any], Any]:
        return {column: bound(value, column.type) for column, value in zip(self.owner, owner, strict=True)}

    def _own_values(self, wanted: Columns) -> dict[sa.Column[Any], Sequence[Any]]:
        sides = zip(self.related, wanted, strict=True)
        return {column: values for column, values in sides if column not in self.owner}

    def _is_one_of(self, keys: sa.Select[Any]) -> sa.ColumnElement[bool]:
        return self.own[0].in_(keys) if len(self.own) == 1 else sa.tuple_(*self.own).in_(keys)

    def _rows(self, owner: Key, wanted: Columns) -> tuple[dict[sa.Column[Any], Sequence[Any]], dict[Any, Any]]:
        """The values that differ from row to row, the keys and what Python makes for each; and those that all rows
        have: SQL, constants, and arrays, of which an array would be taken apart to its last element."""
        size = len(wanted[0])
        given: dict[Any, Sequence[Any]] = dict(zip(self.related, wanted, strict=True))
        given |= {column: [value] * size for column, value in zip(self.owner, owner, strict=True)}
        defaults = InsertDefaults(self.table, given)
        singly, for_all = self._own_values(wanted), self._owner_values(owner) | defaults.sql_values()
        made = defaults.values(given, size)
        for column in defaults.columns:
            if column.default.is_callable and not isinstance(column.type, sa.ARRAY):  # type: ignore[union-attr]
                singly[column] = made[column]
            else:
                for_all[column] = bound(made[column][0] if size else None, column.type)
        return singly, for_all

    def _insert(
        self,
        source: sa.FromClause,
        singly: Iterable[Any],
        for_all: Mapping[Any, Any],
        *where: Any,
        ignore_conflicts: bool,
    ) -> postgresql.Insert:
        """In the order of the related key, so that two at the same time wait for each other and do not deadlock."""
        filled = {**for_all, **{column: source.c[column.name] for column in singly}}
        select = sa.select(*filled.values()).select_from(source).where(*where)
        select = select.order_by(*(source.c[column.name] for column in self.own))
        statement = postgresql.insert(self.table).from_select(list(filled), select, include_defaults=False)
        key = self.unique_key() if ignore_conflicts else None
        return statement.on_conflict_do_nothing(**key.target) if key is not None else statement


def linked_by(attribute: object) -> Links:
    """The links that a relationship attribute such as `Item.tags` stands for.

    Raises `TypeError` for anything else, and for relationships whose links its columns alone do not tell.
    """
    relationship = getattr(attribute, "property", None)
    if not isinstance(relationship, sa_orm.RelationshipProperty) or isinstance(attribute, sa_orm.MapperProperty):
        raise TypeError(f"expected a many-to-many relationship such as Item.tags, not {attribute!r}.")
    relationship.parent.registry.configure()  # as the first query does: `secondary` may still be a name
    name = str(attribute)
    table = relationship.secondary
    if table is None:
        raise TypeError(f"{name} is not a many-to-many relationship: it has no secondary table.")
    if relationship.viewonly:
        raise TypeError(f"{name} is viewonly. Give the relationship that writes the links.")
    if not isinstance(table, sa.Table):
        raise TypeError(f"{name} has {type(table).__name__} as secondary, in which nothing can be written.")
    pairs = relationship.synchronize_pairs
    related_pairs = relationship.secondary_synchronize_pairs or []
    for condition, expected in ((relationship.primaryjoin, pairs), (relationship.secondaryjoin, related_pairs)):
        if condition is None or not _is_plain(condition, len(expected)):
            raise TypeError(
                f"{name} has a condition in its join beside the foreign keys ({condition}), which does not say what "
                "a new link has to look like. Write to its table with insert() and delete()."
            )
    owner, related = relationship.parent, relationship.mapper
    owner_side, side = _side(owner, pairs), _side(related, related_pairs)
    primary_key = attribute_names(related, related.primary_key)
    whole_key = sorted(side.values()) == sorted(primary_key)
    if whole_key:
        side = dict(sorted(side.items(), key=lambda item: primary_key.index(item[1])))
    return Links(name, table, owner, related, owner_side, side, whole_key)


def _side(mapper: sa_orm.Mapper[Any], pairs: Iterable[tuple[Any, Any]]) -> dict[sa.Column[Any], str]:
    return {link: mapper.get_property_by_column(column).key for column, link in pairs}


def _is_plain(condition: sa.ColumnElement[bool], number: int) -> bool:
    """Whether a join is `number` columns that are equal to others, and nothing else."""
    parts = list(condition.clauses) if isinstance(condition, sa.BooleanClauseList) else [condition]
    return len(parts) == number and all(
        isinstance(part, sa.BinaryExpression)
        and part.operator is operators.eq
        and isinstance(part.left, sa.ColumnClause)
        and isinstance(part.right, sa.ColumnClause)
        for part in parts
    )


# -- many values in one parameter -------------------------------------------------------------------------------------


def unnested(dialect: sa.Dialect, columns: Mapping[sa.Column[Any], Sequence[Any]]) -> sa.FromClause:
    """A table of values by column, all of one length. One array is one parameter, whatever its length (PostgreSQL
    documentation, "Set Returning Functions")."""
    arrays = [_array(dialect, column.type, values) for column, values in columns.items()]
    names: list[Any] = [sa.column(column.name, column.type) for column in columns]
    table = sa.func.unnest(*arrays).table_valued(*names)
    # what a type does to a parameter in SQL, it does here to the elements
    elements = [element.type.bind_expression(element) for element in names]
    if all(element is None for element in elements):
        return table.render_derived(name="wanted")
    stored = [
        own.label(own.name) if element is None else sa.type_coerce(element, own.type).label(own.name)
        for own, element in zip(names, elements, strict=True)
    ]
    return sa.select(*stored).select_from(table.render_derived(name="wanted_raw")).subquery("wanted")


def _array(dialect: sa.Dialect, type_: sa.types.TypeEngine[Any], values: Sequence[Any]) -> sa.ColumnElement[Any]:
    process = type_.dialect_impl(dialect).bind_processor(dialect)
    literal = _literal(values if process is None else list(map(process, values)))
    if literal is None:
        return sa.bindparam(None, list(values), sa.ARRAY(type_), unique=True)
    return sa.cast(sa.bindparam(None, literal, sa.Text(), unique=True), sa.ARRAY(_without_length(type_, dialect)))


def _literal(values: Sequence[Any]) -> str | None:
    """The text of an array of numbers, texts or UUIDs (PostgreSQL documentation, "Array Input and Output Syntax");
    None where there are others, which are left to the driver.

    A driver takes several times as long over ten thousand, and so does the server over `ARRAY[1, 2, …]`.
    """
    kinds = set(map(type, values))
    if kinds == {int}:
        return "{" + str(list(values))[1:-1] + "}"
    if not kinds <= {int, str, uuid.UUID, type(None)}:
        return None
    return array_text(None if value is None else str(value) for value in values)


def _without_length(type_: sa.types.TypeEngine[Any], dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
    """A cast to `varchar(5)` would cut what is longer, and so make another value of it (PostgreSQL documentation,
    "Character Types"); without a length the value finds nothing, or is refused."""
    stored: Any = database_type(type_, dialect)
    if not isinstance(stored, sa.String) or isinstance(stored, sa.Enum) or not (stored.length or stored.collation):
        return type_
    return PADDED_TEXT if isinstance(stored, sa.CHAR) else sa.Text()

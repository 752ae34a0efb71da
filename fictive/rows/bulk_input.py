"""Reading the caller's rows: some at a time, all of one shape, no key twice, by column. Nothing is sent."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..errors import DuplicateRows, RowsDiffer
from .attributes import foreign_key_of, hybrid, mapped_property, table_columns, unknown_attribute
from .stored_values import is_sql

__all__ = [
    "Batch", "Duplicates", "RowReader", "as_mappings", "attribute_named", "check_duplicates", "duplicate_rows",
    "has_one_of", "shown_key", "without_duplicates",
]  # fmt: skip

Duplicates = Literal["error", "last"]


def _columns_by_attribute(mapper: sa_orm.Mapper[Any]) -> dict[str, sa.Column[Any]]:
    """The column of each attribute of the class, and of those of its subclasses that are rows of its table."""
    found: dict[str, sa.Column[Any]] = {}
    for each in mapper.self_and_descendants:
        for prop in each.column_attrs if each is mapper or each.local_table is mapper.local_table else ():
            if table_columns(prop):
                found.setdefault(prop.key, prop.columns[0])  # type: ignore[arg-type]
    return found


def attribute_named(mapper: sa_orm.Mapper[Any], name: Any, where: str) -> str:
    """The attribute that holds the column which `name` means: itself, or that of a synonym or of a hybrid that is a
    column, or of a class attribute such as `User.email`. Raises `UnknownAttribute`."""
    if not isinstance(name, str):
        name = getattr(name, "key", None) or repr(name)
    prop = mapped_property(mapper, name)
    if table_columns(prop):
        assert prop is not None
        return prop.key
    if hybrid(mapper, name) is not None:
        element = getattr(mapper.class_, name)
        element = element.__clause_element__() if hasattr(element, "__clause_element__") else element
        for each in mapper.column_attrs:
            if isinstance(element, sa.Column) and any(element.shares_lineage(own) for own in table_columns(each)):
                return each.key
    raise unknown_attribute(mapper, name, where)


@dataclass(frozen=True)
class Batch:
    """Some rows, by column: the values of each attribute."""

    columns: Mapping[str, Sequence[Any]]
    size: int

    def mappings(self) -> list[dict[str, Any]]:
        """The rows by attribute name."""
        return as_mappings(self.columns, self.size)

    def check_values(self, model: str) -> None:
        """Raise `TypeError` for an SQL expression; `sa.null()` is a value."""
        for name, column in self.columns.items():
            for kind in set(map(type, column)):
                if kind is not sa.sql.elements.Null and (is_sql(kind) or issubclass(kind, sa.ClauseElement)):
                    raise TypeError(
                        f"{model}.{name} is given an SQL expression; rows are values. Make it a default of the "
                        "column, or execute an insert() or update() of your own."
                    )

    def chosen(self, indexes: Sequence[int]) -> Batch:
        """Those rows of it."""
        columns = {name: [column[index] for index in indexes] for name, column in self.columns.items()}
        return Batch(columns, len(indexes))


def as_mappings(columns: Mapping[str, Sequence[Any]], size: int) -> list[dict[str, Any]]:
    """So many rows by name, from values by column."""
    if not columns:
        return [{} for _ in range(size)]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def has_one_of(kind: type, columns: Iterable[Sequence[Any]]) -> bool:
    """Whether one of that class is among the values, such as SQL's NULL, written `sa.null()`."""
    return any(kind in set(map(type, column)) for column in columns)


class RowReader:
    """The rows of one call, read `size` at a time and never all at once.

    Rows are mappings of attribute names, or objects of the model: see `_of_object`. All have the keys of the first
    one; `RowsDiffer` says what differs.
    """

    def __init__(
        self, mapper: sa_orm.Mapper[Any], rows: Iterable[Any], size: int, function: str, *, only_updates: bool = False
    ) -> None:
        if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
            raise TypeError(f"{function} takes an iterable of dicts or of {mapper.class_.__name__}, not {rows!r}.")
        self.total = len(rows) if isinstance(rows, Sized) else None
        self.is_held = isinstance(rows, (list, tuple))
        """Whether reading on runs no code of the caller's."""
        self.columns = _columns_by_attribute(mapper)
        self.names: tuple[str, ...] = ()
        """The attributes that rows give, once the first one has been read."""
        self.read = 0
        self._mapper = mapper
        self._only_updates = only_updates
        self._rows = iter(rows)
        self._size = size
        self._head: Batch | None = None
        self._keys: frozenset[Any] | None = None
        self._getter: Any = None

    def head(self) -> Batch | None:
        """The next batch, which stays the next one; None at the end."""
        if self._head is None:
            self._head = self._next(self._size)
        return self._head

    def is_fewer_than(self, many: int) -> bool:
        """Whether there are fewer rows than that, as far as the next batch tells."""
        head = self.head()
        return head is None or (head.size < many and (head.size < self._size or self.read == self.total))

    def batches(self, most: int | None = None) -> Iterator[Batch]:
        """Read on, at most `most` rows; the caller sees to it that the head is not more than that."""
        left = sys.maxsize if most is None else most
        while left and (batch := self._head or self._next(min(left, self._size))) is not None:
            self._head = None
            left -= batch.size
            yield batch

    def _next(self, size: int) -> Batch | None:
        part: list[Any] = list(itertools.islice(self._rows, size))
        if not part:
            return None
        if set(map(type, part)) != {dict}:
            part = [row if type(row) is dict else self._as_dict(row, number) for number, row in enumerate(part)]
        if self._keys is None:
            self._learn(part[0])
        if set(map(len, part)) != {len(self.names)}:
            raise self._difference(part)
        try:
            columns = self._by_column(part)
        except KeyError:
            raise self._difference(part) from None
        self.read += len(part)
        return Batch(dict(zip(self.names, columns, strict=True)), len(part))

    def _learn(self, row: Mapping[Any, Any]) -> None:
        self._keys = frozenset(row)
        names = tuple(key if key in self.columns else attribute_named(self._mapper, key, "a row") for key in row)
        for name, key in zip(names, row, strict=True):
            if names.count(name) > 1:
                raise RowsDiffer(f"A row gives {self._mapper.class_.__name__}.{name} twice, once as {key!r}.")
        self.names = names
        self._getter = operator.itemgetter(*row) if row else None

    def _by_column(self, part: list[Any]) -> Sequence[Sequence[Any]]:
        if self._getter is None:
            return []
        found = map(self._getter, part)
        return [tuple(found)] if len(self.names) == 1 else list(zip(*found, strict=True))

    def _as_dict(self, row: Any, number: int) -> dict[Any, Any]:
        if isinstance(row, Mapping):
            return dict(row)
        state = sa.inspect(row, raiseerr=False)
        if not isinstance(state, sa_orm.InstanceState) or not state.mapper.isa(self._mapper):
            raise TypeError(
                f"Row {self.read + number + 1} is neither a dict nor a {self._mapper.class_.__name__}: {row!r}."
            )
        if state.mapper.local_table is not self._mapper.local_table:
            raise TypeError(
                f"Row {self.read + number + 1} is a {state.mapper.class_.__name__}, which has other tables than "
                f"{self._mapper.class_.__name__}: call it on {state.mapper.class_.__name__}."
            )
        return self._of_object(state)

    def _of_object(self, state: sa_orm.InstanceState[Any]) -> dict[str, Any]:
        """The attributes that are set, as a flush takes them: keys come from related objects, and what the database or
        the ORM makes is left to them."""
        held, mapper = state.dict, state.mapper
        row = {
            prop.key: held[prop.key] for prop in mapper.column_attrs
            if prop.key in held and table_columns(prop) and not self._is_made(state, prop)
        }  # fmt: skip
        for relation in mapper.relationships:
            is_new = relation.key in held and relation.key in state.committed_state and not relation.viewonly
            if is_new and relation.direction is sa_orm.RelationshipDirection.MANYTOONE:
                for column, value in foreign_key_of(relation, held[relation.key], "a row").items():
                    name = mapper.get_property_by_column(column).key
                    row[name] = row.get(name) if value is None else value
        return row

    def _is_made(self, state: sa_orm.InstanceState[Any], prop: sa_orm.ColumnProperty[Any]) -> bool:
        """Whether the value that the object holds is not what the row is to say."""
        column, mapper = table_columns(prop)[0], state.mapper
        if column is mapper.version_id_col and mapper.version_id_generator is not False:
            return not self._only_updates or len(mapper.tables) == 1  # else SQLAlchemy compares it
        if column.primary_key and state.dict[prop.key] is None:
            return True
        is_made = column.computed is not None or (self._only_updates and column.onupdate is not None)
        return is_made and prop.key not in state.committed_state

    def _difference(self, part: list[Any]) -> RowsDiffer:
        known = self._keys or frozenset()
        number, row = next((number, row) for number, row in enumerate(part) if row.keys() != known)
        missing, more = (", ".join(sorted(map(str, keys))) for keys in (known - row.keys(), row.keys() - known))
        parts = [f"it lacks {missing}"] * bool(missing) + [f"it also has {more}"] * bool(more)
        return RowsDiffer(
            f"Row {self.read + number + 1} has other keys than row 1: {' and '.join(parts)}. Give all rows the same "
            "keys, or call once for each kind of row."
        )


# -- two rows with one key --------------------------------------------------------------------------------------------


def check_duplicates(duplicates: str) -> None:
    if duplicates not in ("error", "last"):
        raise ValueError(f'duplicates={duplicates!r}: expected "error" or "last".')


def without_duplicates(
    batches: Iterator[Batch], keys: Sequence[str], duplicates: Duplicates, seen: set[Any] | None = None
) -> Iterator[Batch]:
    """The batches, in each no key twice that Python can compare; `seen` remembers the keys of all."""
    for batch in batches:
        values = [batch.columns[name] for name in keys]
        by_row: Sequence[Any] = values[0] if len(values) == 1 else list(zip(*values, strict=True))
        try:
            last = {key: number for number, key in enumerate(by_row)}
        except TypeError:  # lists and dicts; the database compares them
            yield batch
            continue
        if len(last) < batch.size:
            last = {key if _is_whole(key) else (number, key): number for number, key in enumerate(by_row)}
        if duplicates == "error" and (len(last) < batch.size or seen is not None):
            met = set() if seen is None else seen
            for key in by_row:
                if key in met and _is_whole(key):
                    raise duplicate_rows(keys, key if len(keys) > 1 else (key,))
                met.add(key)
        yield batch if len(last) == batch.size else batch.chosen(sorted(last.values()))


def _is_whole(key: Any) -> bool:
    """Whether no part of the key is NULL, which is equal to nothing."""
    return key is not None and not (isinstance(key, tuple) and None in key)


def duplicate_rows(names: Iterable[str], key: Iterable[Any]) -> DuplicateRows:
    shown = shown_key(names, key)
    return DuplicateRows(f'Two rows have the key {shown}. Pass duplicates="last" for the last one to win.')


def shown_key(names: Iterable[str], key: Iterable[Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in zip(names, key, strict=True))

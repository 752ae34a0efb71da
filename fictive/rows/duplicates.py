"""Two rows of one call with one key: found in a batch by Python, and across batches by PostgreSQL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import sqlalchemy as sa

from ..drivers import sqlstate
from ..errors import ConfigurationError, DuplicateRows
from .bulk_input import Batch
from .bulk_operation import BulkOperation
from .unique_keys import unique_keys
from .upsert_sql import StagingTable, Upsert

__all__ = ["Duplicates", "check_duplicates", "conflicts_explained", "raise_on_duplicate", "without_duplicates"]

Duplicates = Literal["error", "last"]
_CARDINALITY_VIOLATION = "21000"
_NO_SUCH_KEY = "42P10"


def check_duplicates(duplicates: str) -> None:
    if duplicates not in ("error", "last"):
        raise ValueError(f'duplicates={duplicates!r}: expected "error" or "last".')


def without_duplicates(
    batches: Iterator[Batch], keys: Sequence[str], duplicates: Duplicates, seen: set[Any] | None = None
) -> Iterator[Batch]:
    """The batches, in each no key twice; `seen` remembers the keys of all."""
    for batch in batches:
        values = [batch.values(name) for name in keys]
        by_row: Sequence[Any] = values[0] if len(values) == 1 else list(zip(*values, strict=True))
        try:
            last = {each: number for number, each in enumerate(by_row)}
        except TypeError:  # lists and dicts; the database compares them
            yield batch
            continue
        if len(last) < batch.size:
            last = {
                each if _is_whole(each) else (number, each): number for number, each in enumerate(by_row)
            }  # fmt: skip
        if duplicates == "error":
            again = None
            if len(last) < batch.size:
                first = {each: number for number, each in reversed(list(enumerate(by_row)))}
                again = next(each for n, each in enumerate(by_row) if _is_whole(each) and first[each] != n)
            elif seen is not None:
                again = next((each for each in last if each in seen and _is_whole(each)), None)
                seen.update(last)
            if again is not None:
                raise DuplicateRows(_duplicate(keys, again))
        yield batch if len(last) == batch.size else batch.chosen(sorted(last.values()))


def _is_whole(key: Any) -> bool:
    """Whether no part of the key is NULL, which is equal to nothing."""
    return key is not None and not (isinstance(key, tuple) and None in key)


def _duplicate(keys: Sequence[str], key: Any) -> str:
    values = key if isinstance(key, tuple) and len(keys) > 1 else (key,)
    shown = ", ".join(f"{name}={value!r}" for name, value in zip(keys, values, strict=True))
    return f'Two rows have the key {shown}. Pass duplicates="last" for the last one to win.'


def raise_on_duplicate(
    operation: BulkOperation, connection: sa.Connection, upsert: Upsert, stage: StagingTable
) -> None:
    found = connection.execute(upsert.duplicate_in(stage)).first()
    if found is not None:
        names = [operation.mapper.get_property_by_column(column).key for column in upsert.key]
        raise DuplicateRows(_duplicate(names, tuple(found) if len(names) > 1 else found[0]))


@contextlib.contextmanager
def conflicts_explained(operation: BulkOperation, keys: Sequence[str], dialect: sa.Dialect) -> Iterator[None]:
    """Say in our words that PostgreSQL met a key twice, in batches apart, or equal to it and not to Python; and that
    it has no unique key like that."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        if sqlstate(error) == _CARDINALITY_VIOLATION:
            raise DuplicateRows(
                f'{operation.function}: two rows have the same key ({", ".join(keys)}). Pass duplicates="last" for '
                "the last one to win."
            ) from error
        if sqlstate(error) != _NO_SUCH_KEY:
            raise
        known = [
            ", ".join(str(getattr(element, "name", element)) for element in key.elements)
            for key in unique_keys(operation.table, dialect.name)
        ]
        raise ConfigurationError(
            f"{operation.function}: key={', '.join(keys)} is no unique key of {operation.table.fullname}. "
            f"The model has: {'; '.join(f'({each})' for each in known) or 'none'}. Make a unique constraint or index."
        ) from error

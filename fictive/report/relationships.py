"""Which relationship a repeated SELECT loads, by its text: a hint, not more."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

__all__ = ["relationships_of"]

_PARTS = re.compile(r"\bFROM\s+(?P<tables>.*?)\s+WHERE\s+(?P<where>.*)", re.DOTALL | re.IGNORECASE)


def relationships_of(sql: str, mappers: Iterable[sa_orm.Mapper[Any]]) -> list[str]:
    """The relationships, as `Author.books`, whose lazy load is `sql`; several where the text does not tell."""
    match = _PARTS.search(sql)
    if match is None:
        return []
    tables = {_bare(part) for part in match["tables"].split(",")}
    where = match["where"].replace('"', "")
    found = {
        f"{mapper.class_.__name__}.{relationship.key}"
        for mapper in mappers
        for relationship in mapper.relationships
        if relationship.parent is mapper and _is_load(relationship, tables, where)
    }
    return sorted(found)


def _is_load(relationship: sa_orm.RelationshipProperty[Any], tables: set[str], where: str) -> bool:
    target = relationship.mapper.local_table
    if not isinstance(target, sa.Table) or target.name not in tables:
        return False
    if relationship.secondary is not None:
        return isinstance(relationship.secondary, sa.Table) and relationship.secondary.name in tables
    remote = [column for column in relationship.remote_side if isinstance(column, sa.Column)]
    return len(tables) == 1 and all(re.search(rf"\b{re.escape(f'{column.table.name}.{column.name}')}\b", where)
                                    for column in remote)  # fmt: skip


def _bare(part: str) -> str:
    """`"public".item AS x` is `item`."""
    words = part.strip().split()
    return words[0].rpartition(".")[2].strip('"') if words else ""

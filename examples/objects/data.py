"""The sample data, always the same, and what is in the database now."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from .models import Base, Move, Object, Tag, object_tags

_OBJECTS = {
    "Astrolabe": ("shown", ["brass", "instrument"]),
    "Barometer": ("stored", ["glass", "instrument"]),
    "Celestial globe": ("shown", ["instrument", "paper"]),
    "Diving helmet": ("lent", ["brass", "sea"]),
    "Egyptian cat": ("shown", ["bronze"]),
    "Figurehead": ("stored", ["sea", "wood"]),
    "Gramophone": ("stored", ["brass", "wood"]),
    "Harp": ("shown", ["instrument", "wood"]),
    "Ivory chess set": ("stored", []),
    "Jade pendant": ("lent", ["stone"]),
    "Kayak": ("stored", ["sea", "wood"]),
    "Lighthouse lens": ("shown", ["glass", "sea"]),
}


def fill(engine: sa.Engine) -> None:
    """Make the tables where they are missing, and put the sample data in place of whatever is in them."""
    names = sorted({name for _, tags in _OBJECTS.values() for name in tags})
    tag_ids = {name: number for number, name in enumerate(names, 1)}
    tables = ", ".join(table.name for table in Base.metadata.sorted_tables)
    with engine.begin() as connection:
        Base.metadata.create_all(connection)
        connection.execute(sa.text(f"truncate {tables} restart identity"))
        connection.execute(sa.insert(Tag), [{"name": name} for name in names])
        connection.execute(
            sa.insert(Object), [{"name": name, "state": state} for name, (state, _) in _OBJECTS.items()]
        )
        connection.execute(
            sa.insert(object_tags),
            [
                {"object_id": number, "tag_id": tag_ids[name]}
                for number, (_, tags) in enumerate(_OBJECTS.values(), 1)
                for name in tags
            ],
        )
        connection.execute(
            sa.insert(Move),
            [
                {"object_id": number, "note": "joins the collection", "insured_for": 1000 * number}
                for number in range(1, len(_OBJECTS) + 1)
            ],
        )


def dump(engine: sa.Engine) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables, without the times at which they were written."""
    with engine.connect() as connection:
        return {
            table.name: sorted(
                tuple(row)
                for row in connection.execute(sa.select(*(c for c in table.columns if c.name != "updated_at")))
            )
            for table in Base.metadata.sorted_tables
        }

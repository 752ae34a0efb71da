"""Products from a file."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError

from fictive.rows.bulk import Upserted

from . import audit
from .database import db
from .messages import ProductRow
from .models import Product, Stock


def import_products(lines: Iterable[str], progress: Any = None) -> Upserted:
    """Products by their sku: new ones are inserted, others get the file's name and price; all of them, or none.

    Two imports at once would each undo half of the other: the second one raises `LockTimeout`.
    """
    with db.transaction(), db.advisory_lock("shop: import of products", nowait=True):
        done = Product.upsert_many(_rows(lines), key="sku", update=["name", "price_cents"], progress=progress)
        without_stock = sa.select(Product.id).where(~sa.exists().where(Stock.product_id == Product.id))
        db.session.execute(sa.insert(Stock).from_select(["product_id"], without_stock))
        audit.record("products.imported", "products", inserted=done.inserted, updated=done.updated)
    return done


def _rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(lines)
    for row in reader:
        try:
            yield ProductRow.model_validate(row).model_dump()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"line {reader.line_num}: {where}: {first['msg']}") from None

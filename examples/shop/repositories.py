"""The queries of a model that more than one place needs."""

from __future__ import annotations

import uuid
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import joinedload

from fictive.models import KeysetPage, Repository, with_deleted

from .database import db
from .models import Customer, Order, OrderLine, Product, Tag


class Products(Repository[Product]):
    def catalogue(self, tag: str | None, after: str | None, size: int = 20) -> KeysetPage[Product]:
        """A page by name. One query, and one for the tags of all of them when the first one's are asked for."""
        tagged = [] if tag is None else [Product.tags.any(Tag.name == tag)]
        return self.keyset_page(size, *tagged, after=after, order_by=Product.name)


class Orders(Repository[Order]):
    def newest(self, customer: Customer, after: str | None, size: int = 20) -> KeysetPage[Order]:
        """A page of a customer's orders. The key is ordered by time."""
        return self.keyset_page(size, customer_id=customer.id, after=after, order_by=Order.id.desc())

    def whole(self, id: uuid.UUID) -> sa.Select[Any]:
        """The order with all that belongs to it, a customer who is gone included. One query."""
        products = joinedload(Order.lines).joinedload(OrderLine.product)
        return with_deleted(sa.select(Order).where(Order.id == id).options(joinedload(Order.customer), products))


# `db.session` is looked up anew for each call, so these can live as long as the module.
products = Products(db.session)
orders = Orders(db.session)

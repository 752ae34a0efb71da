"""The views. Reading has no transaction; what belongs together is in one, here or in `ordering`."""

from __future__ import annotations

import uuid
from typing import Any

import sqlalchemy as sa
from flask import Blueprint, abort, request, url_for

from fictive.models import ConcurrentModificationError

from . import audit, messages, ordering
from .database import db
from .models import Customer, Order, Product, Stock, Tag
from .repositories import orders, products

blueprint = Blueprint("shop", __name__)

Answer = tuple[dict[str, Any], int]


# Customers


@blueprint.put("/customers")
@db.transactional
def save_customer() -> Answer:
    """The customer with that address, new or under a new name."""
    wanted = messages.read(messages.CustomerIn)
    customer, created = Customer.update_or_create({"name": wanted.name}, email=wanted.email)
    audit.record("customer.created" if created else "customer.saved", customer.public_id)
    return messages.customer_json(customer), 201 if created else 200


@blueprint.get("/customers/<uuid:public_id>/orders")
def customers_orders(public_id: uuid.UUID) -> dict[str, Any]:
    """The newest first. Two queries: the customer, and the page."""
    customer = db.one_or_404(Customer.by_public_id(public_id))
    page = orders.newest(customer, request.args.get("after"))
    return {"orders": [messages.order_summary_json(order) for order in page.items], "next": page.next}


@blueprint.delete("/customers/<uuid:public_id>")
def close_account(public_id: uuid.UUID) -> Answer:
    customer = db.one_or_404(Customer.by_public_id(public_id))
    customer.soft_delete()
    audit.record("customer.closed", customer.public_id)
    db.session.commit()
    return {}, 204


# Products


@blueprint.get("/products")
def catalogue() -> dict[str, Any]:
    """A page by name, of all products or those with one `tag`."""
    page = products.catalogue(request.args.get("tag"), request.args.get("after"))
    return {"products": [messages.product_json(product) for product in page.items], "next": page.next}


@blueprint.get("/products/<uuid:public_id>")
def show_product(public_id: uuid.UUID) -> dict[str, Any]:
    return messages.product_json(db.one_or_404(Product.by_public_id(public_id)))


@blueprint.patch("/products/<uuid:public_id>")
def edit_product(public_id: uuid.UUID) -> dict[str, Any]:
    """Change a product. Whoever has not seen the last change gets 409."""
    wanted = messages.read(messages.ProductEdit)
    product = db.one_or_404(Product.by_public_id(public_id))
    _compare_versions(product, wanted.version)
    for name, value in wanted.changes().items():
        setattr(product, name, value)
    audit.record("product.changed", product.public_id, **wanted.changes())
    db.session.commit()  # no transaction was open until here: the version counter watches
    return messages.product_json(product)


@blueprint.put("/products/<uuid:public_id>/tags")
@db.transactional
def tag_product(public_id: uuid.UUID) -> dict[str, Any]:
    """Give a product these tags and no others; tags that do not exist yet are made."""
    names = sorted(set(messages.read(messages.ProductTags).tags))  # all take them in one order: no deadlock
    product = db.one_or_404(Product.by_public_id(public_id).with_for_update(key_share=True))
    changes = db.m2m_set(product, Product.tags, *[Tag.find_or_create(name=name) for name in names])
    audit.record("product.tagged", product.public_id, added=len(changes.added), removed=len(changes.removed))
    return messages.product_json(product)


@blueprint.post("/products/<uuid:public_id>/deliveries")
@db.transactional
def deliver(public_id: uuid.UUID) -> dict[str, Any]:
    """More of a product."""
    more = messages.read(messages.Delivery).quantity
    product = Product.by_public_id(public_id).with_only_columns(Product.id).scalar_subquery()
    added = sa.update(Stock).where(Stock.product_id == product).values(on_hand=Stock.on_hand + more)
    on_hand = db.session.scalar(added.returning(Stock.on_hand))
    if on_hand is None:
        abort(404)
    audit.record("product.delivered", public_id, quantity=more)
    return {"on_hand": on_hand}


# Orders


@blueprint.post("/orders")
def place_order() -> tuple[dict[str, Any], int, dict[str, str]]:
    order = ordering.place(messages.read(messages.OrderIn))
    return messages.order_json(order), 201, {"Location": url_for("shop.show_order", id=order.id)}


@blueprint.get("/orders/<uuid:id>")
def show_order(id: uuid.UUID) -> dict[str, Any]:
    """The order, its customer and its lines. One query."""
    order = db.session.scalars(orders.whole(id)).unique().one_or_none() or abort(404)
    return messages.order_json(order)


@blueprint.patch("/orders/<uuid:id>")
def edit_order(id: uuid.UUID) -> dict[str, Any]:
    wanted = messages.read(messages.OrderEdit)
    order = db.get_or_404(Order, id)
    _compare_versions(order, wanted.version)
    order.note = wanted.note
    audit.record("order.changed", order.id)
    db.session.commit()
    return messages.order_summary_json(order)


@blueprint.delete("/orders/<uuid:id>")
def cancel_order(id: uuid.UUID) -> dict[str, Any]:
    return messages.order_summary_json(ordering.cancel(id))


def _compare_versions(row: Product | Order, seen: int) -> None:
    """What changed while a form was open in a browser; between this and the commit the flush compares."""
    if row.version != seen:
        raise ConcurrentModificationError(f"version {seen} was changed by somebody else; now it is {row.version}")

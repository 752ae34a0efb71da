"""Placing and canceling orders: what has to happen together."""

from __future__ import annotations

import uuid
from collections import Counter

import sqlalchemy as sa
from blinker import Namespace
from flask import abort, current_app
from sqlalchemy.orm import contains_eager

from . import audit
from .database import db
from .messages import LineIn, OrderIn
from .models import Customer, Job, Order, OrderLine, Product, Stock

order_placed = Namespace().signal("order-placed")
"""Sent with `order_id` when an order is committed."""


@db.transaction
def place(wanted: OrderIn) -> Order:
    """The order, the customer if there was none, less in stock, a job for the packers and a line in the audit table:
    all of it or nothing."""
    customer = Customer.find_or_create({"name": wanted.customer.name}, email=wanted.customer.email)
    order = Order(customer=customer, note=wanted.note, lines=_take(wanted.lines))
    db.session.add(order)
    db.session.flush()
    db.session.add(Job(kind="pack", order_id=order.id))
    audit.record("order.placed", order.id)
    app, order_id = current_app._get_current_object(), order.id
    db.on_commit(lambda: order_placed.send(app, order_id=order_id))
    return order


@db.transaction
def cancel(id: uuid.UUID) -> Order:
    """Cancel an order that is not packed yet, and put what it has taken back."""
    # The packers lock it too: either they find it canceled, or this one finds it packed.
    order = db.get_or_404(Order, id, with_for_update=True)
    if order.state != "new":
        abort(409, f"The order is {order.state}.")
    order.state = "canceled"
    stock = _locked_stock(Stock.product_id.in_([line.product_id for line in order.lines]))
    quantities = {line.product_id: line.quantity for line in order.lines}
    for each in stock:
        each.on_hand += quantities[each.product_id]
    audit.record("order.canceled", order.id)
    return order


def _take(lines: list[LineIn]) -> list[OrderLine]:
    quantities: Counter[uuid.UUID] = Counter()
    for line in lines:
        quantities[line.product] += line.quantity
    stock = _locked_stock(Product.public_id.in_(quantities))
    if missing := quantities.keys() - {each.product.public_id for each in stock}:
        abort(409, f"No such product: {', '.join(sorted(map(str, missing)))}.")
    taken = []
    for each in stock:
        quantity = quantities[each.product.public_id]
        if each.on_hand < quantity:
            abort(409, f"Of {each.product.name!r} there are {each.on_hand} left.")
        each.on_hand -= quantity
        taken.append(OrderLine(product=each.product, quantity=quantity, price_cents=each.product.price_cents))
    return taken


def _locked_stock(which: sa.ColumnElement[bool]) -> list[Stock]:
    """With its products, locked in one order, so that two orders for the same things do not deadlock."""
    statement = (
        sa.select(Stock)
        .join(Stock.product)
        .where(which)
        .options(contains_eager(Stock.product))
        .order_by(Stock.product_id)
        .with_for_update(of=Stock)
    )
    return list(db.session.scalars(statement))

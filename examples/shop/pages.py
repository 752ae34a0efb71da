"""Plain HTML pages of what is in the shop, each with a timeline of what it sent until then."""

from __future__ import annotations

import sqlalchemy as sa
from flask import Blueprint, render_template, request
from sqlalchemy.orm import joinedload

from fictive.models import with_deleted
from fictive.report.requests import report_so_far
from fictive.report.timeline import axis_of, lanes, ms

from .database import db
from .models import Customer, Job, Order, OrderLine, Tag, product_tags
from .repositories import products

blueprint = Blueprint("pages", __name__, url_prefix="/pages", template_folder="templates")
blueprint.add_app_template_filter(ms, "ms")

NEWEST = 50


@blueprint.get("/")
def catalogue() -> str:
    """Two queries: the products, and the tags of all of them."""
    page = products.catalogue(request.args.get("tag"), request.args.get("after"))
    return _page("Products", "products.html", page=page)


@blueprint.get("/orders")
def orders() -> str:
    """Two queries: the orders with their customers, and the lines with their products."""
    query = sa.select(Order).options(joinedload(Order.customer)).order_by(Order.id.desc()).limit(NEWEST)
    found = db.session.scalars(with_deleted(query)).all()
    quantities = sa.select(OrderLine.order_id, sa.func.sum(OrderLine.quantity * OrderLine.price_cents))
    wanted = quantities.where(OrderLine.order_id.in_([order.id for order in found])).group_by(OrderLine.order_id)
    return _page("Orders", "orders.html", orders=found, totals=dict(db.session.execute(wanted).all()))


@blueprint.get("/customers")
def customers() -> str:
    """One query, the number of orders included."""
    count = sa.select(sa.func.count()).where(Order.customer_id == Customer.id).scalar_subquery()
    query = sa.select(Customer, count).order_by(Customer.name).limit(NEWEST)
    return _page("Customers", "customers.html", customers=db.session.execute(query).all())


@blueprint.get("/queue")
def queue() -> str:
    """One query. What `flask --app examples.shop.app shop work` has to do, and has done."""
    query = sa.select(Job).order_by(Job.done_at.is_not(None), Job.id.desc()).limit(NEWEST)
    return _page("Queue", "queue.html", jobs=db.session.scalars(query).all())


@blueprint.get("/tags")
def tags() -> str:
    """One query, the number of products included."""
    count = sa.select(sa.func.count()).where(product_tags.c.tag_id == Tag.id).scalar_subquery()
    query = sa.select(Tag, count).order_by(Tag.name)
    return _page("Tags", "tags.html", tags=db.session.execute(query).all())


def _page(title: str, template: str, **found: object) -> str:
    report = report_so_far()  # None outside debug mode
    drawn = None if report is None else lanes(report)
    axis = None if report is None else axis_of(report)
    return render_template(f"shop/{template}", title=title, report=report, lanes=drawn, axis=axis, **found)

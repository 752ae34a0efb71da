"""What comes in and goes out as JSON. Input that cannot be right is pydantic's `ValidationError`, which is a 400."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, TypeVar

from flask import request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from .models import Customer, Order, Product

# PostgreSQL's text has no NUL.
_PRINTABLE = r"^[^\x00-\x1f]*$"


def _text(longest: int) -> Any:
    return StringConstraints(strip_whitespace=True, min_length=1, max_length=longest, pattern=_PRINTABLE)


Name = Annotated[str, _text(100)]
TagName = Annotated[str, _text(30)]
Note = Annotated[str, StringConstraints(max_length=500, pattern=_PRINTABLE)]
Email = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^@\s\x00]+@[^@\s\x00]+$", to_lower=True)]
Cents = Annotated[int, Field(ge=0, le=100_000_000)]
Quantity = Annotated[int, Field(ge=1, le=1000)]

# In


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CustomerIn(Body):
    email: Email
    name: Name


class ProductEdit(Body):
    """`version` is the one that the editor has seen."""

    version: int
    name: Name | None = None
    price_cents: Cents | None = None

    def changes(self) -> dict[str, Any]:
        return self.model_dump(exclude={"version"}, exclude_none=True)


class ProductTags(Body):
    tags: list[TagName] = Field(max_length=10)


class Delivery(Body):
    quantity: Quantity


class LineIn(Body):
    product: uuid.UUID
    quantity: Quantity


class OrderIn(Body):
    customer: CustomerIn
    lines: list[LineIn] = Field(min_length=1, max_length=50)
    note: Note = ""


class OrderEdit(Body):
    version: int
    note: Note


class ProductRow(Body):
    """A row of an import."""

    sku: Annotated[str, _text(40)]
    name: Name
    price_cents: Cents


_Body = TypeVar("_Body", bound=Body)


def read(kind: type[_Body]) -> _Body:
    """The request's body as one of the above."""
    return kind.model_validate_json(request.get_data())


# Out


def customer_json(customer: Customer) -> dict[str, Any]:
    return {"id": str(customer.public_id), "email": customer.email, "name": customer.name}


def product_json(product: Product) -> dict[str, Any]:
    return {
        "id": str(product.public_id),
        "version": product.version,
        "sku": product.sku,
        "name": product.name,
        "price_cents": product.price_cents,
        "tags": [tag.name for tag in product.tags],
    }


def order_summary_json(order: Order) -> dict[str, Any]:
    return {"id": str(order.id), "version": order.version, "state": order.state, "note": order.note}


def order_json(order: Order) -> dict[str, Any]:
    """For an order whose customer, lines and products are loaded."""
    lines = [
        {"product": line.product.name, "quantity": line.quantity, "price_cents": line.price_cents}
        for line in order.lines
    ]
    return order_summary_json(order) | {
        "customer": customer_json(order.customer),
        "parcel": order.parcel,
        "lines": lines,
        "total_cents": sum(line.quantity * line.price_cents for line in order.lines),
    }

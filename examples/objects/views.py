"""The views that are the same on plain Flask-SQLAlchemy and on fictive: all but one.

Reading needs no change at all; on fictive each SELECT is sent as it is, and between two of them no connection is
held. `add()` and `commit()` need none either: there the commit writes what is pending in one transaction. Only a
view that wants a transaction around reads and writes says so, in `plain.py` and `optin.py`.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from flask import Blueprint, abort, url_for
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import joinedload, selectinload

from . import insurer, messages
from .database import db
from .models import Object, Tag

blueprint = Blueprint("objects", __name__)

ID = "<int(max=2147483647):id>"  # what fits in the column; more is no object's id, so 404


@blueprint.get("/overview")
def overview() -> dict[str, Any]:
    """How many objects there are where. One SELECT."""
    counts = db.session.execute(sa.select(Object.state, sa.func.count()).group_by(Object.state))
    return {"objects": dict(sorted((state, count) for state, count in counts))}


@blueprint.get(f"/objects/{ID}")
def show(id: int) -> dict[str, Any]:
    """An object and its tags. One SELECT."""
    obj = db.get_or_404(Object, id, options=[joinedload(Object.tags)])
    return messages.object_with_tags_json(obj)


@blueprint.get(f"/objects/{ID}/insurance")
def insurance(id: int) -> dict[str, Any]:
    """What the object could be insured for, and its logbook: a SELECT, somebody else's API, another SELECT."""
    obj = db.get_or_404(Object, id)
    offer = insurer.ask(obj.name)
    return messages.object_json(obj) | {"offer": offer, "moves": [messages.move_json(move) for move in obj.moves]}


@blueprint.get("/objects")
def index() -> dict[str, Any]:
    """A page of objects by name, all or those in one `state`. Three SELECTs: the page, its tags, the total."""
    wanted = messages.read_page()
    query = sa.select(Object).order_by(Object.name).options(selectinload(Object.tags))
    if wanted.state is not None:
        query = query.where(Object.state == wanted.state)
    page = db.paginate(query, page=wanted.page, per_page=wanted.per_page, error_out=False)
    return {
        "objects": [messages.object_with_tags_json(obj) for obj in page.items],
        "page": page.page,
        "pages": page.pages,
        "total": page.total,
    }


@blueprint.post("/objects")
def create() -> tuple[dict[str, Any], int, dict[str, str]]:
    """A new object; tags that do not exist yet are made with it, or nothing is."""
    new = messages.read_new_object()
    found = db.session.scalars(sa.select(Tag).where(Tag.name.in_(new.tags))) if new.tags else ()
    tags = {tag.name: tag for tag in found}
    obj = Object(name=new.name, tags=[tags.get(name) or Tag(name=name) for name in new.tags])
    db.session.add(obj)
    try:
        db.session.commit()
    except IntegrityError:
        db.session.rollback()
        abort(409, f"There is an object named {new.name!r} already, or one of the tags was added just now.")
    return messages.object_with_tags_json(obj), 201, {"Location": url_for("objects.show", id=obj.id)}

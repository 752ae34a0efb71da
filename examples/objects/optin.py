"""Moving an object, written for fictive. Its twin is `plain.py`, which says why there are two."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, abort

from . import insurer, messages
from .database import db
from .models import MOVING, Move, Object
from .views import ID

blueprint = Blueprint("moves", __name__)


@blueprint.patch(f"/objects/{ID}")
def move(id: int) -> dict[str, Any]:
    """Move an object. First it is marked as moving, then insured for its way, then put in its new place."""
    place = messages.read_place()

    with db.session.begin():
        obj = db.get_or_404(Object, id, with_for_update=True)
        if obj.state == MOVING:
            abort(409, "The object is being moved already.")
        db.session.add(Move(object_id=id, note=f"leaves: {obj.state}"))
        obj.state = MOVING

    offer = insurer.ask(obj.name)

    with db.session.begin():
        obj = db.get_or_404(Object, id, with_for_update=True)
        db.session.add(Move(object_id=id, note=f"arrives: {place}", insured_for=offer))
        obj.state = place
    return messages.object_json(obj)

"""Moving an object, written for plain Flask-SQLAlchemy. Its twin is `optin.py`.

Why there are two: a plain session is in a transaction from its first statement on, so `with db.session.begin():`
after any read raises "A transaction is already begun on this Session." There, `commit()` ends one atomic step and the
next statement begins another.
"""

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

    obj = db.get_or_404(Object, id, with_for_update=True)
    if obj.state == MOVING:
        abort(409, "The object is being moved already.")
    db.session.add(Move(object_id=id, note=f"leaves: {obj.state}"))
    obj.state = MOVING
    db.session.commit()

    # commit() has expired the object: reading its name is a SELECT, which begins a transaction for the time we wait.
    offer = insurer.ask(obj.name)

    obj = db.get_or_404(Object, id, with_for_update=True)
    db.session.add(Move(object_id=id, note=f"arrives: {place}", insured_for=offer))
    obj.state = place
    db.session.commit()
    return messages.object_json(obj)

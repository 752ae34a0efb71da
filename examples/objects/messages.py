"""What comes in and goes out as JSON. Input that cannot be right is answered with 400 and a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from flask import request
from werkzeug.exceptions import BadRequest

from .models import PLACES, Move, Object

# In


@dataclass(frozen=True)
class NewObject:
    name: str
    tags: list[str]


@dataclass(frozen=True)
class PageWanted:
    page: int
    per_page: int
    state: str | None


def read_new_object() -> NewObject:
    body = _body({"name", "tags"})
    tags = body.get("tags", [])
    if not isinstance(tags, list) or len(tags) > 10:
        _refuse("'tags' must be a list of at most 10 words.")
    names = [_text(tag, "Each of 'tags'", 30) for tag in tags]
    return NewObject(_text(body.get("name"), "'name'", 100), list(dict.fromkeys(names)))


def read_place() -> str:
    place = _body({"state"}).get("state")
    if place not in PLACES:
        _refuse(f"'state' must be one of {', '.join(PLACES)}.")
    return str(place)


def read_page() -> PageWanted:
    state = request.args.get("state")
    if state is not None and state not in PLACES:
        _refuse(f"'state' must be one of {', '.join(PLACES)}.")
    return PageWanted(_number("page", 1, 1_000_000), _number("per_page", 5, 100), state)


def _body(known: set[str]) -> dict[str, Any]:
    body = request.get_json(silent=True)
    if not isinstance(body, dict):
        _refuse("The body must be a JSON object, sent as application/json.")
    if unknown := sorted(body.keys() - known):
        _refuse(f"Unknown: {', '.join(map(repr, unknown))}. Known here: {', '.join(map(repr, sorted(known)))}.")
    return body


def _text(value: object, what: str, longest: int) -> str:
    # isprintable() also keeps out what PostgreSQL's text cannot hold: NUL and halves of surrogate pairs.
    if not isinstance(value, str) or not value.isprintable() or not 1 <= len(value.strip()) <= longest:
        _refuse(f"{what} must be a line of text of 1 to {longest} characters.")
    return value.strip()


def _number(name: str, default: int, largest: int) -> int:
    given = request.args.get(name, str(default))
    if not (given.isascii() and given.isdigit() and len(given) <= 9 and 1 <= int(given) <= largest):
        _refuse(f"'{name}' must be a whole number from 1 to {largest}.")
    return int(given)


def _refuse(why: str) -> NoReturn:
    raise BadRequest(why)


# Out


def object_json(obj: Object) -> dict[str, Any]:
    return {"id": obj.id, "name": obj.name, "state": obj.state, "updated_at": obj.updated_at.isoformat()}


def object_with_tags_json(obj: Object) -> dict[str, Any]:
    return object_json(obj) | {"tags": sorted(tag.name for tag in obj.tags)}


def move_json(move: Move) -> dict[str, Any]:
    return {"note": move.note, "insured_for": move.insured_for}

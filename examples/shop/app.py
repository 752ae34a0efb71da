"""The app's factory, for `flask --app examples.shop.app …`."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from flask import Flask
from flask_migrate import Migrate
from pydantic import ValidationError
from werkzeug.exceptions import HTTPException

from fictive import migrations
from fictive.errors import InvalidCursor
from fictive.models import ConcurrentModificationError

from . import commands, pages, views
from .database import db

# Rendering as a batch is for SQLite.
migrate = Migrate(
    db=db, directory=str(Path(__file__).parent / "migrations"), render_as_batch=False, **migrations.options()
)
migrate.configure(migrations.dated_file_names)


def create_app(**config: Any) -> Flask:
    """The shop. The database is `SQLALCHEMY_DATABASE_URI` of `config`, or `DATABASE_URL` of the environment.

    `CARRIER` is a callable that gives the number of a parcel for an order's key.
    """
    app = Flask(__name__)
    app.config.from_mapping(
        CARRIER=_carrier,
        FICTIVE_LAZY_LOADS="batch",  # the tags of a page of products are one query
    )
    app.config.from_mapping(config)
    db.init_app(app)
    migrate.init_app(app)
    app.register_blueprint(views.blueprint)
    app.register_blueprint(pages.blueprint)
    app.cli.add_command(commands.shop)
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(ConcurrentModificationError, _changed_meanwhile)
    app.register_error_handler(ValidationError, _bad_input)
    app.register_error_handler(InvalidCursor, _bad_cursor)
    return app


def _carrier(order_id: uuid.UUID) -> str:
    return f"parcel-{order_id.hex[-8:]}"


def _http(error: HTTPException) -> tuple[dict[str, Any], int]:
    return {"error": error.description}, error.code or 500


def _changed_meanwhile(error: Exception) -> tuple[dict[str, Any], int]:
    return {"error": "Somebody else changed this since you read it. Read it again, and decide again."}, 409


def _bad_cursor(error: InvalidCursor) -> tuple[dict[str, Any], int]:
    return {"error": str(error)}, 400


def _bad_input(error: ValidationError) -> tuple[dict[str, Any], int]:
    first = error.errors(include_url=False)[0]
    return {"error": f"{'.'.join(map(str, first['loc'])) or 'the body'}: {first['msg']}"}, 400

"""The app's factory."""

from __future__ import annotations

from typing import Any

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from werkzeug.exceptions import HTTPException

from fictive.flask_sqlalchemy import OptInTransactionMixin

from . import optin, plain, views
from .insurer import Insurer
from .models import Base


def create_app(database_class: type[SQLAlchemy], url: str, **config: Any) -> Flask:
    """The app on `database_class`, which is `SQLAlchemy` or a class with `OptInTransactionMixin`, such as `DB`.

    `config` goes into `app.config`; besides Flask-SQLAlchemy's keys there is `INSURER`, a callable (see `Insurer`).
    Tables are not made here: `db.create_all()` or `data.fill()` does.
    """
    app = Flask(__name__)
    app.config.from_mapping(SQLALCHEMY_DATABASE_URI=url, INSURER=Insurer())
    app.config.from_mapping(config)
    database_class(app, model_class=Base)  # type: ignore[arg-type]  # Flask-SQLAlchemy's bound forgets type[...]
    app.register_blueprint(views.blueprint)
    opt_in = issubclass(database_class, OptInTransactionMixin)
    app.register_blueprint(optin.blueprint if opt_in else plain.blueprint)
    app.register_error_handler(HTTPException, _error_json)
    return app


def _error_json(error: HTTPException) -> tuple[dict[str, Any], int]:
    return {"error": error.description, "status": error.name}, error.code or 500

"""The database class that makes transactions opt-in, and `db` for the views."""

from __future__ import annotations

from typing import cast

from flask import current_app
from flask_sqlalchemy import SQLAlchemy
from werkzeug.local import LocalProxy

from fictive.flask_sqlalchemy import OptInTransactionMixin


class DB(OptInTransactionMixin, SQLAlchemy):
    """All it takes to move an app to fictive."""


# An app with one database class writes `db = DB(model_class=Base)` here. This one exists in two versions, so `db` is
# whatever the app that answers the request was made with.
db = cast("SQLAlchemy", LocalProxy(lambda: current_app.extensions["sqlalchemy"]))

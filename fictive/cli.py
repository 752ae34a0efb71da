"""`flask fictive ...`: the commands, for the databases of a Flask app."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import flask
import flask.cli

from .command_line.commands import install
from .command_line.settings import library_settings
from .command_line.target import Database, Target
from .config import ORIGINS, Settings

__all__ = ["fictive"]


@click.group("fictive")
@flask.cli.with_appcontext
def fictive() -> None:
    """Look at the databases of this app, create them, empty them, drop them."""


def _target() -> Target:
    app: Any = flask.current_app._get_current_object()  # type: ignore[attr-defined]
    db = app.extensions["sqlalchemy"]
    databases = [
        Database(key or "default", engine, db.metadatas.get(key), _options(app, key))
        for key, engine in sorted(db.engines.items(), key=lambda each: each[0] or "")
    ]
    return Target(
        databases,
        app.config,
        app.extensions.get(ORIGINS, {}),
        [mapper for registry in _registries(db) for mapper in registry.mappers],
        Path(app.root_path),
        lambda: _library_settings(app),
    )


def _registries(db: Any) -> set[Any]:
    """The registry of `db.Model`, and those that other bases of the app may have."""
    return {db.Model.registry}


def _library_settings(app: flask.Flask) -> Iterator[Mapping[str, Any]]:
    settings: Settings = app.extensions["fictive"]
    return (dataclasses.asdict(row) for row in library_settings(settings, app.config))


def _options(app: flask.Flask, key: str | None) -> Mapping[str, Any]:
    """The options that the app's configuration gives the engine of a bind key."""
    shared = app.config.get("SQLALCHEMY_ENGINE_OPTIONS") or {}
    bind = (app.config.get("SQLALCHEMY_BINDS") or {}).get(key, {})
    own = bind if isinstance(bind, Mapping) else {"url": bind}
    if key is None and app.config.get("SQLALCHEMY_DATABASE_URI") is not None:
        own = {"url": app.config["SQLALCHEMY_DATABASE_URI"], **own}
    if app.config.get("SQLALCHEMY_ECHO"):
        own = {"echo": True, **own}
    return {**shared, **own}


install(fictive, _target)

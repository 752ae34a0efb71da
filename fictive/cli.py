"""`flask fictive ...`: the commands, for the databases of a Flask app."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import flask
import flask.cli

from .config import Settings
from .errors import ConfigurationError
from .flask_config import ENVIRONMENT, Environment, options_in_force

if TYPE_CHECKING:
    from .command_line.target import Target

__all__ = ["fictive"]


class _Commands(click.Group):
    """A group whose commands are imported when one is asked for: a server needs none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        self._load()
        return super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        self._load()
        return super().get_command(ctx, cmd_name)

    def _load(self) -> None:
        if not self.commands:
            from .command_line.commands import install

            install(self, _target)


@click.group("fictive", cls=_Commands)
@flask.cli.with_appcontext
def fictive() -> None:
    """Look at the databases of this app, create them, empty them, drop them."""


def _target() -> Target:
    from .command_line.target import Database, Target

    app: Any = flask.current_app._get_current_object()  # type: ignore[attr-defined]
    db = app.extensions.get("sqlalchemy")
    if db is None:
        raise ConfigurationError("This app has no database: call db.init_app(app) where the app is made.")
    environment: Environment = app.extensions.get(ENVIRONMENT, Environment())
    databases, origins = [], dict(environment.origins)
    for key, engine in sorted(db.engines.items(), key=lambda each: str(each[0] or "")):
        options, given_by = options_in_force(app.config, db._engine_options, environment, key, engine.url)
        databases.append(Database(str(key or "default"), engine, db.metadatas.get(key), options))
        origins |= given_by
    return Target(
        databases,
        app.config,
        origins,
        [mapper for registry in _registries(db) for mapper in registry.mappers],
        Path(app.root_path),
        lambda: _library_settings(app),
    )


def _registries(db: Any) -> set[Any]:
    """The registry of `db.Model`, and those that other bases of the app may have."""
    return {db.Model.registry}


def _library_settings(app: flask.Flask) -> Iterator[Mapping[str, Any]]:
    from .command_line.settings import library_settings

    settings: Settings | None = app.extensions.get("fictive")
    if settings is None:  # plain Flask-SQLAlchemy, to which these commands were added by hand
        return iter(())
    return (dataclasses.asdict(row) for row in library_settings(settings, app.config))

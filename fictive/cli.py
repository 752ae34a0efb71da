"""`flask fictive ...`: commands that look at an app's database."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import click
import flask
import flask.cli
import sqlalchemy as sa

from .config import ORIGINS, Settings, setting_name
from .session import private
from .session.engines import STATEMENT_TIMEOUT

__all__ = ["fictive"]


@click.group("fictive")
def fictive() -> None:
    """Look at the database of this app."""


@fictive.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with bind, name, value and origin.")
@flask.cli.with_appcontext
def settings(as_json: bool) -> None:
    """Show what is in force, and where it came from. Passwords are hidden."""
    rows = list(_settings(flask.current_app))
    if as_json:
        for row in rows:
            click.echo(json.dumps(dataclasses.asdict(row)))
        return
    widths = [max(len(str(getattr(row, name))) for row in rows) for name in ("bind", "name", "value")]
    for row in rows:
        cells = (row.bind.ljust(widths[0]), row.name.ljust(widths[1]), str(row.value).ljust(widths[2]), row.origin)
        click.echo("  ".join(cells).rstrip())


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting: of which database (`""` for all), its name, its value as text, and where that comes from."""

    bind: str
    name: str
    value: str
    origin: str


def _settings(app: flask.Flask) -> Iterator[Row]:
    origins: Mapping[str, str] = app.extensions.get(ORIGINS, {})
    for key, engine in app.extensions["sqlalchemy"].engines.items():
        options = _options(app, key)
        for name, (option, value) in _in_force(engine, options).items():
            variable = f"{key}_{name}".upper() if key else name
            origin = origins.get(variable) or ("app.config" if option in options else "default")
            yield Row(key or "default", variable, str(value), origin)
    settings: Settings = app.extensions["fictive"]
    for field in dataclasses.fields(settings):
        name, value = setting_name(field.name), getattr(settings, field.name)
        shown = (
            value.value if isinstance(value, enum.Enum) else _ranges(value) if isinstance(value, frozenset) else value
        )
        yield Row("", name, str(shown), "app.config" if name in app.config else "default")


def _text(value: object) -> str:
    if isinstance(value, frozenset):
        return _ranges(value)
    return str(value.value if isinstance(value, enum.Enum) else value)


def _ranges(numbers: frozenset[int]) -> str:
    """`"400-499, 503"`."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][-1] + 1:
            found[-1] = [found[-1][0], number]
        else:
            found.append([number])
    return ", ".join("-".join(map(str, each)) for each in found)


def _in_force(engine: sa.Engine, options: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """By the variable's name: the engine's option that it is, and the value."""
    found: dict[str, tuple[str, Any]] = {"DATABASE_URL": ("url", engine.url.render_as_string(hide_password=True))}
    found |= {f"DB_{name.upper()}": (name, value) for name, value in private.pool_settings(engine.pool).items()}
    found["DB_ECHO"] = ("echo", engine.echo or False)
    if engine.dialect.name == "postgresql":
        found["DB_STATEMENT_TIMEOUT"] = _statement_timeout(engine, options)
    return found


def _statement_timeout(engine: sa.Engine, options: Mapping[str, Any]) -> tuple[str, str]:
    if (limit := engine.get_execution_options().get(STATEMENT_TIMEOUT)) is not None:
        return "execution_options", f"{limit}ms, in transactions"
    startup = str(options.get("connect_args", {}).get("options", ""))
    if match := re.search(r"statement_timeout=(\S+)", startup):
        return "connect_args", f"{match[1]}ms"
    return "", "the server's"


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

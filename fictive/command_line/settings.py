"""`settings`: what is in force, and where it came from."""

from __future__ import annotations

import dataclasses
import enum
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy as sa

from ..config import Settings, setting_name
from ..connection.link import STATEMENT_TIMEOUT
from ..databases.engine_options import startup_options
from ..session import private
from .target import Database

__all__ = ["SettingRow", "engine_settings", "library_settings", "settings_of_databases"]


@dataclasses.dataclass(frozen=True)
class SettingRow:
    """One setting: of which database (`""` for all), its name, its value as text, and where that comes from."""

    bind: str
    name: str
    value: str
    origin: str


def settings_of_databases(databases: list[Database], origins: Mapping[str, str]) -> Iterator[SettingRow]:
    """The settings of the engines, by the names of the variables that set them. Passwords are hidden."""
    for database in databases:
        named = " " not in database.key  # else a replica without a bind key, which no variable names
        for name, (option, value) in _in_force(database.engine, database.options).items():
            variable = f"{database.key}_{name}".upper() if named and database.key != "default" else name
            origin = (named and origins.get(variable)) or ("app.config" if option in database.options else "default")
            yield SettingRow(database.key, variable, _text(value), origin)


def library_settings(settings: Settings, config: Mapping[str, Any]) -> Iterator[SettingRow]:
    """The `FICTIVE_*` settings of an app."""
    for field in dataclasses.fields(settings):
        name = setting_name(field.name)
        yield SettingRow("", name, _text(getattr(settings, field.name)), "app.config" if name in config else "default")


def engine_settings(engine: sa.Engine, options: Mapping[str, Any]) -> dict[str, Any]:
    """The value in force by the name of the variable that sets it."""
    return {name: value for name, (_, value) in _in_force(engine, options).items()}


def _text(value: object) -> str:
    if isinstance(value, sa.URL):
        return value.render_as_string(hide_password=True)
    if isinstance(value, tuple):  # what belongs to bind keys; None is the default database
        texts = ((key, _text_of_databases(each)) for key, each in value)
        return ", ".join(text if key is None else f"{key}: {text}" for key, text in texts) or "None"
    if isinstance(value, frozenset):
        return _ranges(value) if all(isinstance(each, int) for each in value) else ", ".join(sorted(map(str, value)))
    return str(value.value if isinstance(value, enum.Enum) else value)


def _text_of_databases(value: sa.URL | tuple[str | sa.URL, ...]) -> str:
    """URLs without their passwords, and bind keys."""
    each = (value,) if isinstance(value, sa.URL) else value
    return ", ".join(_text(sa.make_url(one) if "://" in str(one) else one) for one in each)


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
    found: dict[str, tuple[str, Any]] = {"DATABASE_URL": ("url", engine.url)}
    found |= {f"DB_{name.upper()}": (name, value) for name, value in private.pool_settings(engine.pool).items()}
    found["DB_ECHO"] = ("echo", engine.echo or False)
    if engine.dialect.name == "postgresql":
        found["DB_STATEMENT_TIMEOUT"] = _statement_timeout(engine, options)
    return found


def _statement_timeout(engine: sa.Engine, options: Mapping[str, Any]) -> tuple[str, str]:
    if (limit := engine.get_execution_options().get(STATEMENT_TIMEOUT)) is not None:
        return "execution_options", f"{limit}ms, in transactions"
    given = (options.get("connect_args") or {}).get("options")
    found = re.findall(r"statement_timeout\s*=\s*(\S+)", given or startup_options(engine.url, os.environ))
    if found:
        return "connect_args" if given else "url", f"{found[-1]}ms" if found[-1].isdigit() else found[-1]
    return "", "the server's"

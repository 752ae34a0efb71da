"""What the commands work on: the databases of an app, or the one of a URL."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..databases.urls import database_url
from ..errors import ConfigurationError

__all__ = ["Database", "Target", "target_of_url"]


@dataclasses.dataclass(frozen=True)
class Database:
    """One database: its key (`"default"`, or that of a bind), its engine, and what the app says of it."""

    key: str
    engine: sa.Engine
    metadata: sa.MetaData | None = None
    """The app's tables in it; None without an app."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The engine's options as far as they are known."""


@dataclasses.dataclass(frozen=True)
class Target:
    databases: Sequence[Database]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """`app.config`."""
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Where variables that configure the databases came from."""
    mappers: Sequence[sa_orm.Mapper[Any]] = ()
    source: Path | None = None
    """The directory with the app's code."""
    settings: Callable[[], Iterator[Mapping[str, Any]]] = lambda: iter(())
    """The rows of the command `settings` for the library's own."""
    owned: bool = False
    """Whether the engines were made for the command, which then disposes of them."""

    def chosen(self, bind: str | None) -> Sequence[Database]:
        """The database with the key `bind`, or all."""
        if bind is None:
            return self.databases
        found = [each for each in self.databases if each.key == bind]
        if not found:
            keys = ", ".join(each.key for each in self.databases)
            raise ConfigurationError(f"There is no bind {bind!r}; there are: {keys}.")
        return found


def target_of_url(url: str | None) -> Target:
    """The database of `url`, or of `DATABASE_URL` in the environment or a `.env` file. Nothing is sent."""
    try:
        from ..settings import DatabaseSettings
    except ImportError:
        text = url or os.environ.get("DATABASE_URL")
        if not text:
            raise ConfigurationError("Name the database: --url, or DATABASE_URL in the environment.") from None
        engine = sa.create_engine(database_url(text, "--url" if url else "DATABASE_URL"))
        return Target([Database("default", engine)], owned=True)
    if url:
        database_url(url, "--url")
    settings = DatabaseSettings(database_url=url) if url else DatabaseSettings()
    options = settings.engine_options()
    origins = settings.origins() | ({"DATABASE_URL": "--url"} if url else {})
    engine = sa.create_engine(settings.url, **options)
    return Target([Database("default", engine, options=options)], origins=origins, owned=True)

"""What the commands work on: the databases of an app, or the one of a URL."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..databases.urls import database_url
from ..errors import ConfigurationError

__all__ = ["Database", "Target", "each_once", "place_of", "target_of_url"]


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


def place_of(database: Database) -> tuple[object, ...]:
    """Which database it is, whoever connects to it."""
    url = database.engine.url
    return url.get_backend_name(), url.host, url.port, url.database or id(database)


def each_once(databases: Iterable[Database]) -> list[Database]:
    """Of bind keys that lead to one database the first."""
    found: dict[tuple[object, ...], Database] = {}
    for each in databases:
        found.setdefault(place_of(each), each)
    return list(found.values())


def target_of_url(url: str | None) -> Target:
    """The database of `url`, or of `DATABASE_URL` in the environment or a `.env` file. Nothing is sent."""
    try:
        from ..settings import DatabaseSettings
    except ImportError:
        text = os.environ.get("DATABASE_URL") if url is None else url
        if text is None or (url is None and not text):
            raise ConfigurationError("Name the database: --url, or DATABASE_URL in the environment.") from None
        engine = sa.create_engine(database_url(text, "DATABASE_URL" if url is None else "--url"))
        return Target([Database("default", engine)], owned=True)
    if url is not None:  # an empty one too, which a shell makes of a variable that is not set
        database_url(url, "--url")
    settings = DatabaseSettings() if url is None else DatabaseSettings(database_url=url)
    options = settings.engine_options()
    origins = settings.origins() | ({} if url is None else {"DATABASE_URL": "--url"})
    engine = sa.create_engine(settings.url, **options)
    return Target([Database("default", engine, options=options)], origins=origins, owned=True)

"""Names of migration files: the day and what it is about, `2026-03-01_orders_have_a_note.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError

__all__ = ["dated_file_names"]

_OPTION = "file_template"
_DATED = "%(year)d-%(month).2d-%(day).2d_%(slug)s"

# Not bound to Alembic's Config: the stubs of Flask-Migrate have one of their own that is not derived from it.
AnyConfig = TypeVar("AnyConfig")


class _Template(str):
    """Alembic's template of a file's name. Alembic itself writes over a file that has the name, without a word."""

    directories: tuple[Path, ...]

    def __new__(cls, template: str, directories: Iterable[Path]) -> _Template:
        self = super().__new__(cls, template)
        self.directories = tuple(directories)
        return self

    def __mod__(self, values: Mapping[str, Any]) -> str:
        if not values["slug"] and str(self) == _DATED:
            raise CommandError('A migration\'s file is named for its message. Give one: -m "orders have a note".')
        name = super().__mod__(values)
        for directory in self.directories:
            if (found := directory / f"{name}.py").exists():
                raise CommandError(f"There is a migration {found} already. Give the new one another message.")
        return name


def dated_file_names(config: AnyConfig) -> AnyConfig:
    """Let Alembic name new migrations `YYYY-MM-DD_slug.py`: for Flask-Migrate, `migrate.configure(dated_file_names)`.

    `config` is changed and returned. A `file_template` in `alembic.ini` wins, and files that are there keep their
    names. The slug is made from the message, and without a message a dated name is refused. Whatever the template, a
    name is refused that a file has already (a second migration of the day with the same message, say): Alembic would
    write over it. Both are Alembic's `CommandError`, which its commands and Flask-Migrate's show as a line.
    """
    if not isinstance(config, Config):
        raise TypeError(f"dated_file_names() takes Alembic's Config, not {config!r}.")
    given = config.get_alembic_option

    def option(name: str, default: Any = None) -> Any:
        if name == _OPTION:
            return _Template(given(name) or _DATED, _directories(config))
        return given(name, default)

    # the template must not be read as text, which would lose what it does; no option of Alembic's takes a function
    config.get_alembic_option = option  # type: ignore[method-assign]
    return config


def keep_files(script: ScriptDirectory) -> None:
    """Let no new migration of this directory take the place of another one, whatever its `file_template`."""
    if not isinstance(script.file_template, _Template):
        locations = script.version_locations or [f"{script.dir}/versions"]
        script.file_template = _Template(script.file_template, map(Path, locations))


def _directories(config: Config) -> Iterable[Path]:
    named = config.get_version_locations_list()
    return map(Path, named or [f"{config.get_alembic_option('script_location')}/versions"])

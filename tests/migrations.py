"""A directory of migrations, and `flask db ...` on it as a user would."""

from __future__ import annotations

import contextlib
import logging
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flask import Flask
from flask_migrate import Migrate


class Project:
    """Flask-Migrate on an app; `options` are those of `Migrate`."""

    def __init__(self, app: Flask, db: Any, directory: Path, **options: Any) -> None:
        self.app, self.db = app, db
        self.directory = directory / "migrations"
        self.migrate = Migrate(app, db, directory=str(self.directory), **options)

    def flask(self, *arguments: str, fails: bool = False) -> Any:
        result = self.app.test_cli_runner().invoke(args=["db", *arguments])
        assert (result.exception is not None) == fails, (result.output, result.exception)
        return result

    def write(self, revision: str, down: str | None, upgrade: str) -> None:
        (self.directory / "versions" / f"{revision}_.py").write_text(
            textwrap.dedent(
                f"""
                from alembic import op
                import sqlalchemy as sa

                revision = {revision!r}
                down_revision = {down!r}

                def upgrade():
                    {{}}

                def downgrade():
                    op.drop_table("a")
                """
            ).format(upgrade)
        )


@contextlib.contextmanager
def logging_as_it_was() -> Iterator[None]:
    """The environment that Flask-Migrate writes configures logging from its alembic.ini, for the whole process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    disabled = {
        name: logger.disabled
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger)
    }
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, was in disabled.items():
        logging.getLogger(name).disabled = was
    for name in ("alembic", "sqlalchemy.engine", "flask_migrate"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).setLevel(logging.NOTSET)

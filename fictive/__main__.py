"""`python -m fictive ...`: the commands without Flask, for the database of a URL."""

from __future__ import annotations

from pathlib import Path

import click

from .command_line.commands import install
from .command_line.target import Target, target_of_url

__all__ = ["main"]


@click.group("fictive")
@click.option("--url", metavar="URL", help="The database; else DATABASE_URL of the environment or a .env file.")
def main(url: str | None) -> None:
    """Look at a database, create it, empty it, drop it."""


def _target() -> Target:
    context = click.get_current_context()
    if context.params.get("code"):  # the source in the current directory; no database is needed
        return Target([], source=Path.cwd())
    return target_of_url(context.find_root().params.get("url"))


install(main, _target)

if __name__ == "__main__":
    main(prog_name="python -m fictive")

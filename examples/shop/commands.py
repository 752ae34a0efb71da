"""`flask shop …`"""

from __future__ import annotations

from typing import TextIO

import click
from flask.cli import AppGroup

from fictive.errors import LockTimeout
from fictive.rows import progress

from . import jobs
from .importing import import_products

shop = AppGroup("shop", help="What the shop does beside answering requests.")


@shop.command("import-products")
@click.argument("file", type=click.File(encoding="utf-8"))
def import_products_command(file: TextIO) -> None:
    """Read products from FILE, a CSV with the columns sku, name and price_cents."""
    try:
        with progress.bar("Products") as bar:
            done = import_products(file, progress=bar)
    except LockTimeout:
        raise click.ClickException("Another import is running.") from None
    except ValueError as error:
        raise click.ClickException(f"{file.name}, {error}. Nothing was imported.") from None
    click.echo(f"{done.inserted} new, {done.updated} changed, {done.unchanged} as they were")


@shop.command()
@click.option("--at-a-time", type=click.IntRange(1, 1000), default=10, show_default=True)
def work(at_a_time: int) -> None:
    """Do jobs until none is waiting. Start as many of these as you like."""
    total = 0
    while number := jobs.work(at_a_time):
        total += number
    click.echo(f"{total} jobs")

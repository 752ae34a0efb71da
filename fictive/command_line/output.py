"""Rows as a table for people, or as one JSON object a line for programs."""

from __future__ import annotations

import datetime
import decimal
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

__all__ = ["print_json", "print_table"]

_MOST = 60  # characters of a cell in a plain table, but for the last column
_MOST_LAST = 160


def print_json(rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    for row in rows:
        click.echo(json.dumps(dict(row), default=_plain))


def _plain(value: object) -> object:
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    return str(value)


def print_table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], *, empty: str) -> None:
    """A table; on a terminal with rich where that is installed. Without rows, the text `empty`."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    if not cells:
        click.echo(empty)
    elif sys.stdout.isatty() and importlib.util.find_spec("rich"):
        _print_rich(columns, cells)
    else:
        _print_plain(columns, cells)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, (float, decimal.Decimal)):
        return f"{value:.1f}"
    return " ".join(str(value).split())


def _print_plain(columns: Sequence[str], cells: list[list[str]]) -> None:
    most = [_MOST] * (len(columns) - 1) + [_MOST_LAST]
    short = [[_shortened(cell, limit) for cell, limit in zip(row, most, strict=True)] for row in cells]
    widths = [max(map(len, column)) for column in zip(columns, *short, strict=True)]
    for row in (list(columns), *short):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _print_rich(columns: Sequence[str], cells: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(
            column, overflow="fold" if column == columns[-1] else "ellipsis", no_wrap=column != columns[-1]
        )
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))  # not markup: a query may have brackets
    Console().print(table)

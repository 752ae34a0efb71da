"""Rows as a table for people, or as one JSON object a line for programs."""

from __future__ import annotations

import datetime
import decimal
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

__all__ = ["on_terminal", "print_json", "print_table", "printable"]

_MOST = 60  # characters of a cell in a plain table, but for the last column
_MOST_LAST = 160
_LEAST_LAST = 20  # on a terminal


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
    elif on_terminal() and not _fits(columns, cells):
        _print_blocks(columns, cells)
    elif on_terminal() and importlib.util.find_spec("rich"):
        _print_rich(columns, cells)
    else:
        _print_plain(columns, cells)


def on_terminal() -> bool:
    """Whether the output goes to one. A process may have no output at all."""
    return sys.stdout is not None and sys.stdout.isatty()


def printable(text: str) -> str:
    """Text of others', such as a query, on one line and without what would steer a terminal."""
    text = " ".join(text.split())
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, (float, decimal.Decimal)):
        return f"{value:.1f}"
    return printable(str(value))


def _widths(columns: Sequence[str], cells: list[list[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(columns, *cells, strict=True)]


def _fits(columns: Sequence[str], cells: list[list[str]]) -> bool:
    """Whether the terminal is wide enough for all columns but the last, and some of that."""
    return sum(width + 2 for width in _widths(columns, cells)[:-1]) + _LEAST_LAST <= shutil.get_terminal_size().columns


def _print_blocks(columns: Sequence[str], cells: list[list[str]]) -> None:
    """A block for each row: what it has, and the last column on lines of its own."""
    width = max(_LEAST_LAST, shutil.get_terminal_size().columns)
    for row in cells:
        facts = [f"{name} {cell}" for name, cell in zip(columns[:-1], row[:-1], strict=True) if cell]
        click.echo(click.wrap_text(", ".join(facts), width, subsequent_indent="  "))
        click.echo(f"  {row[-1]}\n")


def _print_plain(columns: Sequence[str], cells: list[list[str]]) -> None:
    most = [_MOST] * (len(columns) - 1) + [_MOST_LAST]
    short = [[_shortened(cell, limit) for cell, limit in zip(row, most, strict=True)] for row in cells]
    widths = _widths(columns, short)
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

"""A progress bar in the terminal for bulk work. Needs rich: `pip install rich`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..errors import ConfigurationError
from .bulk_operation import Progress

__all__ = ["bar"]


@contextlib.contextmanager
def bar(title: str = "Rows", *, console: Any = None) -> Iterator[Progress]:
    """A progress bar for the `with` block; what it gives goes to `progress=`, of one call or of several in turn.

    Shows rows, rows per second, and the time left where the number of rows is known. On standard error, and as one
    line at the end where that is no terminal; `console` is a `rich.console.Console` to write to instead.
    Raises `ConfigurationError` where rich is not installed.
    """
    try:
        import rich.console as rich_console
        import rich.progress as rich_progress
    except ImportError:
        raise ConfigurationError("A progress bar needs rich (extra fictive[progress]): pip install rich.") from None
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TextColumn("{task.completed:,.0f} rows"),
        rich_progress.TextColumn("{task.fields[rate]}"),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    shown = rich_progress.Progress(*columns, console=console or rich_console.Console(stderr=True))
    with shown:
        task = shown.add_task(title, total=None, rate="")

        def progress(done: int, total: int | None) -> None:
            elapsed = shown.tasks[0].elapsed or 0.0
            rate = f"{done / elapsed:,.0f}/s" if elapsed else ""
            shown.update(task, completed=done, total=total, rate=rate)

        yield progress

"""`on_commit` and `on_rollback`: functions that run once the outcome of a transaction is known.

They are kept with SQLAlchemy's own object for the transaction or savepoint they were registered in
(`Transaction.hooks`). A savepoint that was released hands them on to what is around it; at its end the transaction
puts them among the session's due ones, and whatever ended it runs those last, when the session can be used again.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from time import perf_counter
from typing import Literal

import sqlalchemy.orm as sa_orm

from ..connection.replicas import on_primary
from ..errors import HooksFailed
from ..report.watcher import WATCHER, Watcher
from . import private

__all__ = ["DUE", "Hook", "HookKind", "captured", "check_hook", "due_hooks", "run_due"]

log = logging.getLogger("fictive.hooks")

Hook = Callable[[], object]
HookKind = Literal["commit", "rollback"]

DUE = "fictive.due_hooks"
"""The key in `session.info`, there while hooks are due."""

captured: list[list[Hook]] = []
"""Lists of tests, the last of which gets hooks that would run."""


def check_hook(fn: object) -> None:
    """Raise `TypeError` for what cannot be called, or would only make a coroutine when called."""
    if not callable(fn):
        raise TypeError(f"a hook is a function, with its arguments after it, not {fn!r}.")
    if inspect.iscoroutinefunction(fn):
        raise TypeError(f"{fn!r} is a coroutine function, and nobody would await it. Start the task in a function.")


def due_hooks(session: sa_orm.Session) -> list[tuple[HookKind, Hook]]:
    """The hooks of transactions that have ended, in the order in which they are to run."""
    found: list[tuple[HookKind, Hook]] = session.info.setdefault(DUE, [])
    return found


def _watched(kind: HookKind, fn: Hook, watcher: Watcher) -> Hook:
    """The hook, telling `watcher` how long it took."""

    def run() -> object:
        failure: BaseException | None = None
        started = perf_counter()
        try:
            return fn()
        except BaseException as error:
            failure = error
            raise
        finally:
            watcher.hook_ran(kind, started, perf_counter(), failure)

    return run


def run_due(session: sa_orm.Session, *, after: BaseException | None = None) -> None:
    """Run what is due, all of it; then raise `HooksFailed` if any of it raised.

    `after` an error, which is the one to see, failures of hooks are logged.
    """
    due: list[tuple[HookKind, Hook]] = session.info.pop(DUE, [])
    if not due:
        return
    hooks = [fn for _, fn in due]
    if captured:
        captured[-1].extend(hooks)
        return
    watcher = session.info.get(WATCHER)
    if watcher is not None:
        hooks = [_watched(kind, fn, watcher) for kind, fn in due]
    failures: list[Exception] = []
    interrupt: BaseException | None = None
    with on_primary(), private.past_ended_blocks(session):  # a hook is not part of the block that has ended
        for fn in hooks:
            try:
                fn()
            except Exception as error:
                failures.append(error)
            except BaseException as error:
                interrupt = interrupt or error
    failed = HooksFailed(f"{len(failures)} of {len(hooks)} hooks failed", failures) if failures else None
    if interrupt is not None:
        raise interrupt from failed
    if failed is None:
        return
    if after is not None:
        log.warning("hooks failed after %r", after, exc_info=failed)
    else:
        raise failed from failures[0]

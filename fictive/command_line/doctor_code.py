"""What `doctor --code` finds by reading the app's source. Nothing is run, and no database is asked."""

from __future__ import annotations

import ast
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy.orm as sa_orm

from .code_events import Event, Function, Kind, functions_of
from .findings import Finding, Severity
from .source import Unreadable, read, source_files

__all__ = ["code_findings"]

_LISTENED = {
    "after_begin": "Each statement outside a block then runs in a short transaction: BEGIN and COMMIT for each.",
    "begin": "Each statement outside a block then runs in a short transaction: BEGIN and COMMIT for each.",
    "reset": "Each statement outside a block then takes its connection from the pool anew.",
    "after_commit": "SQLAlchemy calls it for released savepoints too. db.on_commit(function) runs after COMMIT only.",
    "after_rollback": "SQLAlchemy calls it for savepoints too. db.on_rollback(function) follows the transaction.",
}
_WRITE_PENDING = frozenset({Kind.FLUSH, Kind.COMMIT, Kind.ROLLBACK})
_SLOWER = frozenset({"after_begin", "begin", "reset"})


def code_findings(
    source: Path | None, mappers: Sequence[sa_orm.Mapper[Any]] = (), writes_outside: str = "commit"
) -> Iterator[Finding]:
    """Findings for the Python files below `source` and those with the models.

    `writes_outside` is the app's setting. Under `"begin"` and `"report"` most of what is found changes nothing, and is
    a fact to look at before the setting is changed.
    """
    modules = []
    for path in source_files(source, mappers):
        file = _shown(path, source)
        try:
            tree = read(path)
            modules.append((file, list(functions_of(tree)), tree))
        except (Unreadable, RecursionError) as error:
            why = error if isinstance(error, Unreadable) else "it is nested too deeply"
            yield Finding("not-read", Severity.INFO, f"{file}: is not read: {why}.")
    callers = _Callers([function for _, functions, _ in modules for function in functions])
    for file, functions, tree in modules:
        for function in functions:
            yield from _Examination(file, function, callers, writes_outside).findings()
        if views := [commit for each in functions if (commit := _only_commit(each)) is not None]:
            lines = ", ".join(str(each.line) for each in views)
            word = "line" if len(views) == 1 else "lines"
            yield Finding("commit-in-view", Severity.INFO, f"{file}: views that commit one write ({word} {lines}).",
                          "Fine as they are; a begin() block around the write does the same.")  # fmt: skip
        yield from _listeners(file, tree)


def _shown(path: Path, source: Path | None) -> str:
    return str(path.relative_to(source)) if source is not None and path.is_relative_to(source) else str(path)


class _Callers:
    """From where the app's functions are called, by their names."""

    def __init__(self, functions: Sequence[Function]) -> None:
        self.inside: set[str] = set()
        """Called, and only where a transaction is open."""
        self.outside: set[str] = set()
        """Called where none is open."""
        readers: dict[str, bool] = {}
        for function in functions:
            name = _bare_name(function)
            readers[name] = readers.get(name, True) and _reads_first(function)
        self.readers = {name for name, reads in readers.items() if reads}
        """They run a query before they write what is pending."""
        defined = {_bare_name(function) for function in functions if not function.is_view}
        while True:
            calls: dict[str, bool] = {}
            for function in functions:
                always = function.in_transaction or _bare_name(function) in self.inside
                for name, in_block in function.calls:
                    calls[name] = calls.get(name, True) and (in_block or always)
            self.outside = {name for name, only in calls.items() if not only}
            found = {name for name, only in calls.items() if only and name in defined}
            if found <= self.inside:
                return
            self.inside |= found


def _bare_name(function: Function) -> str:
    return function.name.removesuffix("()")


def _only_commit(function: Function) -> Event | None:
    """The commit of a view that writes once, outside a block."""
    if not function.is_view or function.in_transaction or len(_steps(function.events)) != 1:
        return None
    return next((each for each in function.events if each.kind is Kind.COMMIT and not each.in_block), None)


class _Examination:
    """One function."""

    def __init__(self, file: str, function: Function, callers: _Callers, mode: str) -> None:
        name = _bare_name(function)
        self.file, self.function, self.mode, self.readers = file, function, mode, callers.readers
        self.outside = not function.in_transaction and name not in callers.inside
        self.sure = function.is_view or name in callers.outside or name == "the module"
        """Whether it is known to run outside; else it depends on callers that were not found."""
        self.events = self._bare(function.events)

    def _bare(self, events: Sequence[Event] | None = None) -> list[Event]:
        """Of these events, or of all of the function's, those outside a transaction."""
        events = self.function.everything if events is None else events
        return [each for each in events if self.outside and not each.in_block]

    def findings(self) -> Iterator[Finding]:
        yield from self._writes()
        if self.mode != "refuse" and (unseen := _unseen(self.events, self.readers)) is not None:
            yield self._changes(
                "no-autoflush", unseen, f'runs a query ({unseen.what}) after add() or a change: under "commit" there '
                "is no autoflush, and the query does not see it.", "db.session.flush() before it, in a block.",
            )  # fmt: skip
        locking = next((each for each in self._bare() if each.kind is Kind.NEEDS_TRANSACTION), None)
        if locking is not None and self.mode not in ("begin", "report"):
            yield self._finding(
                "needs-transaction", Severity.ERROR if self.sure else Severity.INFO, locking,
                f"uses {locking.what} outside a block, which raises TransactionRequired.",
                "with db.session.begin(): around it and what relies on it.",
            )  # fmt: skip
        for each in self.function.everything:
            if each.kind in (Kind.COMMIT, Kind.ROLLBACK) and each.in_block:
                yield self._finding(
                    "commit-in-block", Severity.WARNING, each, f"calls {each.what} within a block: the next statement "
                    "in the block raises TransactionEnded.",
                    "Leave it out: the end of the block commits, an exception rolls back.",
                )  # fmt: skip
            elif each.kind is Kind.SLOW and (each.in_block or not self.outside):
                yield self._finding(
                    "slow-call-in-block", Severity.WARNING, each, f"calls {each.what} in a transaction, whose locks "
                    "and connection are held meanwhile.", "Call it before the block, or after it.",
                )  # fmt: skip

    def _writes(self) -> Iterator[Finding]:
        steps = _steps(self.events)
        if not steps:
            return
        lines = sorted({each.line for each in steps})
        undone = next((each for each in self.events if each.kind in (Kind.UNDO, Kind.ROLLBACK)), None)
        sent = next((each for each in steps if each.kind is not Kind.COMMIT), None)
        if self.mode == "refuse":
            yield self._finding(
                "write-outside", Severity.ERROR if self.sure else Severity.INFO, steps[0],
                f"writes outside a block ({steps[0].what}), which raises TransactionRequired.",
                "with db.session.begin(): around it.",
            )  # fmt: skip
        elif len(steps) > 1:
            count = f"{len(lines)} steps" if len(lines) > 1 else "a loop"
            yield self._changes(
                "split-writes", steps[0], f'writes in {count} (lines {", ".join(map(str, lines))}): under "commit" '
                "each is a transaction of its own.", "with db.session.begin(): around them, without the commit().",
            )  # fmt: skip
        elif undone is not None and sent is not None:
            yield self._changes(
                "rollback-too-late", undone, f'calls rollback(): under "commit" {sent.what} in line {sent.line} is '
                "committed by then.", "with db.session.begin(): around both, without the rollback().",
            )  # fmt: skip

    def _changes(self, check: str, event: Event, what: str, remedy: str) -> Finding:
        """What is different under "commit": a warning where that is the setting."""
        warns = self.mode not in ("begin", "report") and self.sure
        return self._finding(check, Severity.WARNING if warns else Severity.INFO, event, what, remedy)

    def _finding(self, check: str, severity: Severity, event: Event, what: str, remedy: str) -> Finding:
        unless = "" if self.sure or event.in_block else " If its callers open a block, this does not apply."
        return Finding(check, severity, f"{self.file}:{event.line}: {self.function.name} {what}{unless}", remedy)


def _steps(events: Iterable[Event]) -> list[Event]:
    """The transactions that the longest stretch up to a commit would be under "commit"."""
    return max(_transactions(events), key=len, default=[])


def _transactions(events: Iterable[Event]) -> Iterator[list[Event]]:
    """For each stretch up to a commit: the events that are a transaction of their own under "commit"."""
    for _, stretch in itertools.groupby(_numbered(events), key=lambda each: each[0]):
        pending, steps = False, []
        for _, event in stretch:
            if event.kind is Kind.PENDING:
                pending = True
            elif event.kind is Kind.SEND or (event.kind in (Kind.FLUSH, Kind.COMMIT) and pending):
                steps.append(event)
                pending = pending and event.kind is Kind.SEND
        yield steps


def _numbered(events: Iterable[Event]) -> Iterator[tuple[int, Event]]:
    number = 0
    for event in events:
        yield number, event
        number += event.kind in (Kind.COMMIT, Kind.ROLLBACK)


def _unseen(events: Iterable[Event], readers: set[str]) -> Event | None:
    """The first query after `add()` or `delete()` with neither a flush nor an end of the transaction in between."""
    pending = False
    for event in events:
        if event.kind is Kind.PENDING:
            pending = True
        elif event.kind in _WRITE_PENDING:
            pending = False
        elif pending and (event.kind is Kind.READ or (event.kind is Kind.CALL and event.what in readers)):
            return event if event.kind is Kind.READ else dataclasses.replace(event, what=f"in {event.what}()")
    return None


def _reads_first(function: Function) -> bool:
    kinds = [each.kind for each in function.events if not each.in_block]
    first = next((kind for kind in kinds if kind is Kind.READ or kind in _WRITE_PENDING), None)
    return first is Kind.READ and not function.in_transaction and not function.is_view


def _listeners(file: str, tree: ast.Module) -> Iterator[Finding]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or len(node.args) < 2 or not isinstance(node.args[1], ast.Constant):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        event = node.args[1].value
        if name in ("listen", "listens_for") and event in _LISTENED:
            severity = Severity.WARNING if event in _SLOWER else Severity.INFO
            yield Finding("listener", severity, f'{file}:{node.lineno}: a listener to "{event}".', _LISTENED[event])

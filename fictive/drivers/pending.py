"""Which commands wait for the next statement (piggyback), and what is sent with it. Pure: nothing here sends.

psycopg (3) sends them as messages of their own in one round trip, and anything may ride. What follows is about
psycopg2, which has one message for all.

Nobody has to wait for the answer to BEGIN or SAVEPOINT, so they travel in one message with the first statement that
needs them. The server parses a whole message before it runs any of it (PostgreSQL documentation, "Message Flow, Simple
Query"), which decides what may ride:

- BEGIN, and savepoints right behind it, ride with any statement. If its grammar is wrong the whole message is refused
  and the connection is still idle: both are sent again, apart, and all is as if they had never ridden.
- A SAVEPOINT within a transaction rides only with a statement whose text the server has parsed before: a refused
  message would abort the transaction without the savepoint to go back to.
- RELEASE rides with the next SAVEPOINT or with COMMIT; not with another statement, whose error, if it names a
  position, would count the RELEASE, and could not be had again without it.
- A SET LOCAL has to be sent before the next statement, and rides with any, since an error aborts the transaction with
  or without it; only a position in that error counts it. Behind a RELEASE or SAVEPOINT it goes by their rules.
- Nothing rides with a text that may be empty or may end the transaction.

What belongs to a statement in autocommit, its settings, is `bound`: it goes in the message of the statement, or that
is not sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from uuid import UUID

__all__ = [
    "PendingCommands",
    "again",
    "are_plain",
    "as_bytes",
    "goes_alone",
    "is_anonymous_block",
    "may_carry",
    "note_parsed",
    "parsed",
]

_OWN_NAME = re.compile(r"sa_savepoint_\d+")

# Texts, with their placeholders, that a server of this process has parsed. Values cannot change the grammar.
parsed: set[object] = set()
_MOST_PARSED = 10_000


def note_parsed(query: object) -> None:
    """Remember that the server has parsed `query`."""
    if len(parsed) >= _MOST_PARSED:
        parsed.clear()
    parsed.add(query)


_NOTHING = re.compile(r"(?:[\s;]|--[^\n]*|/\*(?:[^*/]|\*(?!/)|/(?!\*))*\*/)*")
_ENDS = re.compile(r"\b(?:commit|rollback|end|abort|prepare)\b", re.IGNORECASE)


def goes_alone(text: str) -> bool:
    """Whether nothing may ride with a text. In doubt nothing may.

    It may be empty, and the answer to an empty one would be the answer to BEGIN. Or it may end the transaction: what
    was done until then stays, so that it could not be sent again, and its errors would count what had ridden.
    """
    start = _NOTHING.match(text).end()  # type: ignore[union-attr]
    if text[start : start + 1] in ("", "-", "/"):
        return True
    if _ENDS.match(text, start) is not None:
        return True
    several = text.find(";", start) != -1 and not is_anonymous_block(text)
    return several and _ENDS.search(text, start) is not None


_ANONYMOUS_BLOCK = re.compile(r"DO (?P<tag>\$\w*\$)(?P<body>.*)(?P=tag)", re.DOTALL)


def is_anonymous_block(text: str) -> bool:
    """Whether a text is one DO: its semicolons, and words such as END, are within its dollar quotes. Within a
    transaction it cannot end it (PostgreSQL documentation, "DO")."""
    if not text.startswith("DO $"):
        return False
    match = _ANONYMOUS_BLOCK.fullmatch(text)
    return match is not None and match["tag"] not in match["body"]


_PLAIN = frozenset({str, int, float, bool, bytes, type(None), Decimal, date, datetime, time, timedelta, UUID})


def are_plain(values: object) -> bool:
    """Whether values merge into a text as literals of one token; an empty tuple, say, is a syntax error."""
    if values is None:
        return True
    kind = type(values)
    if kind is not dict and kind is not list and kind is not tuple:
        if not isinstance(values, Mapping):
            return False
        values = dict(values)
    # a loop is cheaper than a generator expression
    for value in values.values() if type(values) is dict else values:  # type: ignore[attr-defined]  # noqa: SIM110
        if type(value) not in _PLAIN:
            return False
    return True


may_carry: set[object] = set()
"""Texts with which commands may travel (not `goes_alone`), with their placeholders."""


def as_bytes(text: str) -> bytes:
    """Commands as they are sent. A value that a driver has quoted is in the connection's encoding, and stands in the
    text by surrogates where that is not UTF-8 (`Driver.set_command`)."""
    return text.encode("utf-8", "surrogateescape")


class PendingCommands:
    """The commands of one transaction that have not been sent, and its savepoints that have."""

    __slots__ = ("bound", "commands", "savepoints")

    def __init__(self) -> None:
        self.bound = False
        """Whether they belong to the next statement, in autocommit, and are never sent apart."""
        self.commands: list[str] = []
        self.savepoints: list[str] = []
        """Names of those that were sent, from the outermost in."""

    def waits_for_commit(self) -> bool:
        """Whether nothing waits that a statement could take along: a RELEASE goes with the next SAVEPOINT or
        COMMIT."""
        return not self.commands or all(command.startswith("RELEASE") for command in self.commands)

    def sent(self, commands: Iterable[str]) -> None:
        """Told of what was sent."""
        for command in commands:
            kind, _, name = command.partition(" ")
            if kind == "SAVEPOINT":
                self.savepoints.append(name)
            elif kind in ("RELEASE", "ROLLBACK") and (name := name.rpartition(" ")[2]) in self.savepoints:
                last = _last_index(self.savepoints, name)
                del self.savepoints[last + (kind == "ROLLBACK") :]

    def savepoint(self, name: str) -> None:
        self.commands.append(f"SAVEPOINT {name}")

    def release(self, name: str) -> bool:
        """RELEASE; returns whether it has to be sent now. Not at all when its SAVEPOINT was never sent, nor then
        anything within it; later when the name is one of SQLAlchemy's, which are never used again."""
        if self._forget_from(name):
            return False
        if _OWN_NAME.fullmatch(name) and name in self.savepoints:
            self.commands.append(f"RELEASE SAVEPOINT {name}")
            return False
        return True

    def roll_back_to(self, name: str) -> bool:
        """ROLLBACK TO; returns whether it has to be sent. Nothing was done since a SAVEPOINT that was never sent."""
        if self._forget_from(name):
            if not _OWN_NAME.fullmatch(name):  # one of the user's may be gone back to again; SQLAlchemy's is not
                self.commands.append(f"SAVEPOINT {name}")
            return False
        if name in self.savepoints:
            self.commands.clear()  # all of it came within the savepoint
        return True

    def with_commit(self) -> list[str]:
        """What goes in one message with COMMIT: releases; a savepoint in which nothing was done is forgotten."""
        commands, self.commands = self.commands, []
        return [command for command in commands if command.startswith("RELEASE")]

    def before_and_with(self, query: object) -> tuple[list[str], list[str]]:
        """What is sent before `query` in a message of its own, and what rides in the same one, on psycopg2."""
        commands, self.commands = self.commands, []
        if commands[0].startswith("BEGIN"):
            return [], commands
        with_any = not any(command.startswith(("SAVEPOINT", "RELEASE")) for command in commands)
        return ([], commands) if with_any or query in parsed else (commands, [])

    def take(self) -> list[str]:
        """Everything, to be sent now."""
        commands, self.commands = self.commands, []
        return commands

    def _forget_from(self, name: str) -> bool:
        command = f"SAVEPOINT {name}"
        if command not in self.commands:
            return False
        del self.commands[_last_index(self.commands, command) :]
        return True


def _last_index(names: list[str], name: str) -> int:
    return len(names) - 1 - names[::-1].index(name)


def again(riding: list[str], *, idle: bool, has_position: bool) -> list[str] | None:
    """What to send so that a failed statement can be sent once more, alone; None when its error is good as it is.

    Alone it fails in the same way, since none of it was done; but with the error, and in the state, that it would
    have had without riders. `idle`: whether the server is in no transaction; `has_position`: whether the error names
    a position in the message, which is not the one in the statement.
    """
    if idle and riding[0].startswith("BEGIN"):
        return riding  # the message was refused as a whole
    if not has_position:
        return None
    if riding[0].startswith("BEGIN"):
        return ["ROLLBACK", *riding]
    for index, command in enumerate(riding):
        if command.startswith("SAVEPOINT "):
            return [f"ROLLBACK TO {command}", *riding[index + 1 :]]
    return None

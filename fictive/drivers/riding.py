"""Which control statements wait for the next statement, and what is sent with it. Pure: nothing here sends.

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
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Literal
from uuid import UUID

__all__ = [
    "ControlStatement",
    "Waiting",
    "again",
    "are_plain",
    "goes_alone",
    "is_anonymous_block",
    "is_parsed",
    "parse_control",
    "parsed",
]

ControlStatement = tuple[Literal["SAVEPOINT", "RELEASE", "ROLLBACK TO"], str]

_CONTROL = re.compile(r'(SAVEPOINT|RELEASE|ROLLBACK TO)(?: SAVEPOINT)? (\w+|"(?:[^"]|"")+")')
_OWN_NAME = re.compile(r"sa_savepoint_\d+")

# Texts, with their placeholders, that a server of this process has parsed. Values cannot change the grammar.
_parsed: set[str] = set()
_MOST_PARSED = 10_000


def parse_control(query: object) -> ControlStatement | None:
    """SAVEPOINT, RELEASE or ROLLBACK TO and its name; None for any other statement."""
    if not isinstance(query, str) or query[:1] not in "SR":
        return None
    match = _CONTROL.fullmatch(query)
    return (match[1], match[2]) if match else None  # type: ignore[return-value]


def parsed(query: object) -> None:
    """Remember that the server has parsed `query`."""
    if isinstance(query, str):
        if len(_parsed) >= _MOST_PARSED:
            _parsed.clear()
        _parsed.add(query)


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
    found = values.values() if isinstance(values, Mapping) else values if isinstance(values, (list, tuple)) else None
    return found is not None and all(type(value) in _PLAIN for value in found)


def is_parsed(query: object) -> bool:
    return isinstance(query, str) and query in _parsed


class Waiting:
    """The control statements of one connection that have not been sent."""

    def __init__(self) -> None:
        self._commands: list[str] = []
        self._savepoints: list[str] = []  # those that were sent, from the outermost in

    def __bool__(self) -> bool:
        return bool(self._commands)

    def waits_for_commit(self) -> bool:
        """Whether nothing waits that a statement could take along."""
        return not self._commands or all(command.startswith("RELEASE") for command in self._commands)

    def clear(self) -> None:
        """The transaction ends, and with it all savepoints."""
        self._commands.clear()
        self._savepoints.clear()

    def add(self, command: str) -> None:
        """Let `command` wait: a SAVEPOINT, or a SET LOCAL for the statements to come."""
        self._commands.append(command)

    def sent(self, commands: Iterable[str]) -> None:
        """Told of what was sent."""
        for kind, name in filter(None, map(parse_control, commands)):
            if kind == "SAVEPOINT":
                self._savepoints.append(name)
            elif name in self._savepoints:
                last = _last_index(self._savepoints, name)
                del self._savepoints[last + (kind == "ROLLBACK TO") :]

    def takes(self, kind: str, name: str, *, aborted: bool) -> bool:
        """Whether a control statement is dealt with here: it waits, or nothing is left to do. Else it is sent now.

        `aborted`: whether the server refuses all but ROLLBACK TO; it is then the server's to answer.
        """
        if kind == "ROLLBACK TO":
            return not self.roll_back_to(name)
        if aborted:
            return False
        if kind == "SAVEPOINT":
            self.add(f"SAVEPOINT {name}")
            return True
        return not self.release(name)

    def release(self, name: str) -> bool:
        """RELEASE; returns whether it has to be sent now. Not at all when its SAVEPOINT was never sent, nor then
        anything within it; later when the name is one of SQLAlchemy's, which are never used again."""
        if self._forget_from(name):
            return False
        if _OWN_NAME.fullmatch(name) and name in self._savepoints:
            self._commands.append(f"RELEASE SAVEPOINT {name}")
            return False
        return True

    def roll_back_to(self, name: str) -> bool:
        """ROLLBACK TO; returns whether it has to be sent. Nothing was done since a SAVEPOINT that was never sent."""
        if self._forget_from(name):
            if not _OWN_NAME.fullmatch(name):  # one of the user's may be gone back to again; SQLAlchemy's is not
                self._commands.append(f"SAVEPOINT {name}")
            return False
        if name in self._savepoints:
            self._commands.clear()  # all of it came within the savepoint
        return True

    def with_commit(self) -> list[str]:
        """What goes in one message with COMMIT: releases; a savepoint in which nothing was done is forgotten."""
        commands, self._commands = self._commands, []
        return [command for command in commands if command.startswith("RELEASE")]

    def riders(self, begin: str | None, query: object) -> tuple[list[str], list[str]]:
        """What is sent before `query` in a message of its own, and what rides in the same one.

        `begin` is the BEGIN that has to come first, None within a transaction.
        """
        if begin is not None:
            commands, self._commands = self._commands, []
            return [], [begin, *commands]
        if self.waits_for_commit():
            return [], []
        commands, self._commands = self._commands, []
        with_any = not any(command.startswith(("SAVEPOINT", "RELEASE")) for command in commands)
        return ([], commands) if with_any or is_parsed(query) else (commands, [])

    def all(self, begin: str | None) -> list[str]:
        """Everything, to be sent now."""
        commands, self._commands = self._commands, []
        return commands if begin is None else [begin, *commands]

    def _forget_from(self, name: str) -> bool:
        command = f"SAVEPOINT {name}"
        if command not in self._commands:
            return False
        del self._commands[_last_index(self._commands, command) :]
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

"""Reading a wire log."""

from __future__ import annotations

import re

from fictive.testing.wire import Log

# A control statement in front of another one in the same message.
_RIDER = re.compile(r"(BEGIN|SAVEPOINT|RELEASE|ROLLBACK|SET LOCAL)\b[^;]*;\s*")


def verbs(log: Log) -> list[str]:
    """The first word of each statement, e.g. `["BEGIN", "INSERT", "COMMIT"]`, whether or not they came together."""
    return [verb for message in messages(log) for verb in message.split("+") if verb]


def own_verbs(log: Log) -> list[str]:
    """The same without the DEALLOCATE that psycopg sends after a rollback once it has prepared a statement."""
    return [verb for verb in verbs(log) if verb != "DEALLOCATE"]


def messages(log: Log) -> list[str]:
    """What each round trip was for, e.g. `["BEGIN+INSERT", "COMMIT"]`."""
    return ["+".join(verb for text in each.statements for verb in _split(text)) for each in log.exchanges]


def _split(text: str) -> list[str]:
    found = []
    while match := _RIDER.match(text):
        found.append(match[1].split()[0])
        text = text[match.end() :]
    first = text.split(None, 1)
    return [*found, first[0].upper().rstrip(";")] if first else found

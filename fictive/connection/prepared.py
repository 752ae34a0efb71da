"""The messages that psycopg (3) sends of its own accord: it prepares what it runs often, and forgets that again.

Private names of psycopg, without which nothing is counted.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Prepared"]


class Prepared:
    """What is prepared on a connection before a statement, to see what was prepared or forgotten besides."""

    __slots__ = ("dbapi", "made", "names")

    def __init__(self, dbapi: Any) -> None:
        self.look(dbapi)

    def look(self, dbapi: Any) -> None:
        """The connection is this one."""
        self.dbapi = dbapi
        self.made, self.names = _state(dbapi)

    def messages(self, dbapi: Any) -> int:
        """How many messages were sent for that since. Nothing is known of another connection than was expected."""
        if dbapi is not self.dbapi:
            return 0
        made, names = _state(dbapi)
        made -= self.made
        if self.names and not names:
            return made + 1  # DEALLOCATE ALL
        return made + max(self.names + made - names, 0)


def _state(dbapi: Any) -> tuple[int, int]:
    """How many statements were prepared on a connection so far, and how many are."""
    try:  # getattr() would be three calls more
        manager = dbapi._prepared
        return manager._prepared_idx, len(manager._names)
    except AttributeError:
        return 0, 0

"""What a session's connection tells the one who watches it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["WATCHER", "Watcher"]

WATCHER = "fictive.watcher"
"""The key in `session.info` of the session's watcher. A session connection reads it when it is made."""


class Watcher(Protocol):
    """Called by a session connection while a watcher is set; without one, nothing is called.

    Times are `time.perf_counter()`, in seconds. A method must not raise, must not block and must not use the session.
    """

    def statement(
        self,
        sql: str,
        parameters: object,
        started: float,
        ended: float,
        rows: int,
        round_trips: int,
        carried: Sequence[str],
        transaction: int | None,
        error: BaseException | None,
    ) -> None:
        """The user's statement was sent and answered, in `round_trips` round trips. On the caller's stack.

        `sql` and `parameters` as the driver's cursor got them; `rows` is the cursor's rowcount, -1 when unknown;
        `carried` are the commands that travelled in the same message (`BEGIN`, `SAVEPOINT x`). `transaction` is the
        number given to `transaction_began`, None in autocommit. A COPY is a statement too.
        """

    def replica_told(self, name: str, outcome: str) -> None:
        """A read outside went to the replica `name`, which `"answered"`; `statement` tells of it next.

        Or the primary is asked next, since the replica was `"behind"` or `"unreachable"`, or the read `"failed"`.
        """

    def waited_for_pool(self, started: float, ended: float) -> None:
        """A server connection was taken from the pool (not from the idle ones): that long the pool took."""

    def transaction_began(self, transaction: int) -> None:
        """A transaction, not a savepoint, was begun in this session. Its BEGIN may travel with the first statement.

        The number is unique in the process (an `itertools.count`).
        """

    def transaction_ended(
        self, transaction: int, outcome: str, started: float, ended: float, round_trips: int
    ) -> None:
        """It ended: `outcome` is `"committed"`, `"rolled back"`, `"aborted"` or `"in doubt"`.

        `started` and `ended` are those of the COMMIT or ROLLBACK, in `round_trips` round trips: 0 when nothing was
        sent, as in a block without statements.
        """

    def command(self, sql: str, started: float, ended: float, round_trips: int, transaction: int | None) -> None:
        """A command of the session's own that travelled alone: a BEGIN or SAVEPOINT sent apart, a ROLLBACK TO."""

    def connection_lost(self) -> None:
        """The server connection was lost."""

    def hook_ran(self, kind: str, started: float, ended: float, error: BaseException | None) -> None:
        """A hook of `on_commit` or `on_rollback` ran; `kind` is `"commit"` or `"rollback"`."""

    def retried(self, number: int, error: BaseException) -> None:
        """A statement or a transaction is run again, for the `number`-th time, because of `error`."""

"""The session: statements stand alone, and a transaction is where the code says so."""

from __future__ import annotations

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy import event

from .context_end import EndsContext
from .state import check_options

__all__ = ["OptInSession", "check_options"]

# The session is made of layers, one subject and one module each; each rests on those before it:
#   state         how it is set, and whether it is inside
#   remembered    what it remembers of writes, for its messages
#   ending        how a block ends, and the hooks that run then
#   connections   which connection a statement runs on; pinned()
#   outside       how a statement runs
#   writing       flush, commit, rollback, bulk
#   beginning     how a block begins
#   context_end   what is warned of at the end, and close()
# and write_modes has what they do differently by `writes_outside`. `super().commit()` in a layer is SQLAlchemy's own
# commit. So what is SQLAlchemy's is overridden in one layer only, and in none below the last that needs the original.


class OptInSession(EndsContext):
    """A `sqlalchemy.orm.Session` without the transaction that nobody asked for.

    *Outside* a transaction each statement is one round trip on a connection that is back in the pool when the call
    returns; a flush, and whatever else takes several statements, is atomic in a transaction of its own. *Inside*, from
    `begin()` to the end of its block, it is SQLAlchemy's session. Loaded objects stay attached either way.

    Takes the arguments of `sqlalchemy.orm.Session`, and:

    `writes_outside`
        what a write outside does: `"commit"` (default), `"begin"` or `"refuse"`; see `fictive.config.WritesOutside`.
    `unsaved_changes`
        what happens to changes no one wrote by the end of a `with` block or an app context: `"warn"` (default),
        `"error"` or `"ignore"`.
    `retry_reads`
        whether a statement that met a lost connection is run again, once, where it can have done nothing: a read
        outside, the first statement of a transaction. On by default.

    `autoflush` and `expire_on_commit` are off by default; on under `writes_outside="begin"`, as in SQLAlchemy.
    Not for use by several threads at once, as any session.
    """

    def in_transaction(self) -> bool:
        """Whether a transaction is open: from `begin()` to its end, whether or not anything was sent yet."""
        return self._is_inside()

    def get_transaction(self) -> sa_orm.SessionTransaction | None:
        """SQLAlchemy's object for the open transaction; None outside."""
        return super().get_transaction() if self._is_inside() else None


def _after_begin(session: sa_orm.Session, transaction: sa_orm.SessionTransaction, connection: sa.Connection) -> None:
    if transaction.parent is None:
        assert isinstance(session, OptInSession)
        session.transaction_begins(connection)


event.listen(OptInSession, "after_begin", _after_begin)

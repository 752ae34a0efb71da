"""What a write outside does, one class for each member of `WritesOutside`: all that they do differently is here."""

from __future__ import annotations

import abc
import contextlib
from typing import TYPE_CHECKING, Any

from ..config import WritesOutside
from ..errors import TransactionRequired
from .statements import summary

if TYPE_CHECKING:
    from .outside import Executes
    from .writing import Writes

__all__ = ["WriteMode", "write_mode"]


class WriteMode(abc.ABC):
    """What a session asks, outside, when it is about to write."""

    setting: WritesOutside
    stays_open = False
    """Whether the first write begins a transaction that lasts, as everything does in SQLAlchemy's own session."""

    @abc.abstractmethod
    def check_statement(self, statement: Any) -> None:
        """Raise for a statement that writes, where it may not."""

    @abc.abstractmethod
    def together(self, session: Executes, what: str) -> contextlib.AbstractContextManager[None]:
        """Around several statements, which are `what`."""

    @abc.abstractmethod
    def flush(self, session: Writes, objects: Any) -> None:
        """Something is pending."""

    @abc.abstractmethod
    def commit(self, session: Writes) -> None:
        """Something may be pending."""


class Commit(WriteMode):
    """It stands alone, in a transaction of its own where that takes several statements."""

    setting = WritesOutside.COMMIT

    def check_statement(self, statement: Any) -> None:
        pass

    def together(self, session: Executes, what: str) -> contextlib.AbstractContextManager[None]:
        return session.own_transaction(what)

    def flush(self, session: Writes, objects: Any) -> None:
        session.flush_own(objects)

    def commit(self, session: Writes) -> None:
        session.commit_own()


class Begin(WriteMode):
    """It begins a transaction, which stays open; what comes next is inside."""

    setting = WritesOutside.BEGIN
    stays_open = True

    def check_statement(self, statement: Any) -> None:
        pass

    def together(self, session: Executes, what: str) -> contextlib.AbstractContextManager[None]:
        return session.lasting_transaction()

    def flush(self, session: Writes, objects: Any) -> None:
        session.begin_lasting()  # pending from before the mode was changed
        session.flush(objects)

    def commit(self, session: Writes) -> None:
        session.commit_lasting()


class Refuse(WriteMode):
    """It raises, and nothing has been sent."""

    setting = WritesOutside.REFUSE

    def check_statement(self, statement: Any) -> None:
        raise _refused(summary(statement))

    def together(self, session: Executes, what: str) -> contextlib.AbstractContextManager[None]:
        raise _refused(what)

    def flush(self, session: Writes, objects: Any) -> None:
        raise _refused(session.pending_writes())

    def commit(self, session: Writes) -> None:
        if not session.is_clean():
            raise _refused(session.pending_writes())
        session.commit_own()


_MODES: dict[WritesOutside, WriteMode] = {mode.setting: mode for mode in (Commit(), Begin(), Refuse())}


def write_mode(setting: WritesOutside) -> WriteMode:
    """The one for a setting; it keeps nothing, and serves all sessions."""
    return _MODES[setting]


def _refused(what: str) -> TransactionRequired:
    return TransactionRequired(
        f'{what} outside a transaction, where writes are refused (writes_outside = "refuse"). Put it in '
        "`with db.session.begin():`."
    )

"""Which connection a statement runs on: its own, the transaction's, or a pinned one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from ..connection.pooler import is_pooled, refusal
from ..drivers import driver_for
from ..errors import TransactionAlreadyBegun, TransactionRequired
from . import private
from .ending import EndsBlocks
from .engines import listen_to, prepare
from .leases import Pins

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TakesConnections"]


class TakesConnections(EndsBlocks):
    """Asked by SQLAlchemy for a connection (`private.JointedSession`), and by the user."""

    def bare_connection(self, bind: sa.Engine | sa.Connection) -> sa.Connection | None:
        if self._is_inside():
            return None
        if self._pins is not None and bind in self._pins:
            assert isinstance(bind, sa.Connection)
            return bind
        return self._lease.connection(bind) if self._lease is not None else None

    def get_bind(self, *args: Any, **kwargs: Any) -> sa.Engine | sa.Connection:
        """The engine, as SQLAlchemy's session has it; in `pinned()`, the pinned connection."""
        bind = super().get_bind(*args, **kwargs)
        if isinstance(bind, sa.Engine):
            if bind is not self._prepared:
                prepare(bind)
                self._prepared = bind
            if self._pins is not None:
                return self._pins.pin(bind)
        return bind

    def connection(self, bind_arguments: Any = None, execution_options: Any = None) -> sa.Connection:
        """The transaction's connection; in `pinned()`, the pinned one.

        Outside raises `TransactionRequired`: there is no connection that the session keeps. For a connection of your
        own there is `db.engine.connect()`.
        """
        self._check_block()
        if not self._is_inside() and self._pins is None:
            if not self._mode.stays_open:
                raise TransactionRequired(
                    "session.connection() outside a transaction: the session keeps no connection. Call it within "
                    "`with db.session.begin():` or `with db.pinned():`, or use db.engine.connect()."
                )
            self.begin_lasting()
        return super().connection(bind_arguments=bind_arguments, execution_options=execution_options)

    @contextlib.contextmanager
    def pinned(self) -> Iterator[Self]:
        """Keep one connection for the block: for temporary tables, `SET`, session-level locks.

        Statements still stand alone, and `begin()` works, all on that connection. At the end it is closed, so that
        nothing set through it reaches anyone else; the price is one reconnect. In a `pinned()` block it changes
        nothing; inside a transaction it raises `TransactionAlreadyBegun`.
        """
        if self._pins is not None:
            yield self
            return
        if isinstance(bind := self.get_bind(), sa.Engine) and is_pooled(bind):
            raise refusal("pinned()")
        if self._is_inside():
            raise TransactionAlreadyBegun("pinned() goes around begin(), not inside; a transaction has its own.")
        pins = self._pins = Pins()
        try:
            yield self
        finally:
            self._pins = None
            if self._tx is not None:  # a block that was begun in here and never ended
                self._discard_blocks()
                self._discard()
            if pins and self._is_inside():  # a transaction that goes on: it keeps its connection to its end
                self._outlived_pins.append(pins)
            else:
                pins.release()

    def transaction_begins(self, connection: sa.Connection) -> None:
        """Told when the transaction takes a connection; nothing has been sent on it."""
        driver_for(connection.dialect).enter_transaction(connection, self._options)
        if self._own and private.streams(
            connection.engine
        ):  # SQLAlchemy would declare a cursor for INSERT .. RETURNING
            connection.execution_options(stream_results=False, yield_per=None)
        listen_to(connection, self)

"""How a block begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from ..drivers import NO_OPTIONS, TransactionOptions, driver_for
from ..errors import ConfigurationError, TransactionAlreadyBegun
from .local_settings import LocalSettings
from .options import BlockOptions, block_options
from .transaction import Joined, Transaction, is_enclosed
from .writing import Writes

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import TransactionArguments

__all__ = ["BeginsBlocks"]


class BeginsBlocks(Writes):
    """Begins transactions, savepoints, and blocks that join what is open."""

    def begin(self, nested: bool = False) -> Transaction:  # type: ignore[override]
        """Begin a transaction: `with session.begin():` commits at the end of the block, or rolls back on an exception.

        What was changed before on the session's objects is part of it. Sends nothing until the first statement.
        Raises `TransactionAlreadyBegun` inside.
        """
        if nested:
            return self.begin_nested()
        return self._begin(NO_OPTIONS)

    def begin_nested(self) -> Transaction:  # type: ignore[override]
        """Inside: a savepoint. Outside: a transaction of its own, which ends with its block.

        Under `writes_outside="begin"`, outside: a savepoint in a transaction that stays open, as in SQLAlchemy.
        """
        self._check_block()
        if not self._is_inside():
            if not self._mode.stays_open:
                return self._begin_alone()
            self.begin_lasting()
        return self._push(super().begin(nested=True), nested=True)

    def transaction(self, **arguments: Unpack[TransactionArguments]) -> Transaction:
        """A transaction outside, a savepoint inside: for code that must be atomic wherever it is called from.

        It is begun at once. `fictive.sqlalchemy.transaction` has the arguments, and is a decorator as well.
        """
        options = block_options(**arguments)
        self._check_block()
        if options.settings:
            options.check(self.get_bind().dialect)
        if not self._is_inside():
            return self._with_settings(self._begin(options.begin), options)
        options.check_inside(self._options, enclosed=is_enclosed(self._tx))
        if options.savepoint:
            return self._with_settings(self.begin_nested(), options)
        record = self.change_record()
        assert record is not None
        return self._with_settings(Joined(self, record, self._tx, self), options)

    def _begin(self, options: TransactionOptions) -> Transaction:
        self._check_block()
        if self._is_inside():
            raise TransactionAlreadyBegun(
                "A transaction is open already"
                + (f", begun by the write at {self._first_write}" if self._tx is None and self._first_write else "")
                + ". For a savepoint in it call begin_nested(); transaction() begins outside, a savepoint inside."
            )
        if options:
            self._check_options(options)
        self._options = options
        record = self.change_record()
        return self._push(super().begin() if record is None else record, nested=False)

    def _begin_alone(self) -> Transaction:
        """The transaction that `begin_nested()` is outside."""
        whole = self.begin()
        whole.asked_for_savepoint = True
        if not self._joins_a_transaction():
            return whole
        savepoint = self._push(super().begin(nested=True), nested=True)
        savepoint.whole = whole
        return savepoint

    def _joins_a_transaction(self) -> bool:
        """Whether the session is bound to a connection in a transaction of somebody else's (SQLAlchemy documentation,
        "Joining a Session into an External Transaction")."""
        try:
            bind = self.get_bind()
        except sa.exc.UnboundExecutionError:
            return False
        return isinstance(bind, sa.Connection) and bind.in_transaction()

    def _check_options(self, options: TransactionOptions) -> None:
        dialect = self.get_bind().dialect
        driver = driver_for(dialect)
        if not driver.has_options:
            driver.refuse_options(options, dialect)
        known = [level for level in dialect.get_isolation_level_values(None) if level != "AUTOCOMMIT"]  # type: ignore[arg-type]
        if options.isolation_level is not None and options.isolation_level not in known:
            raise ConfigurationError(
                f"isolation_level={options.isolation_level!r}: expected one of {', '.join(known)}."
            )

    def _with_settings(self, block: Transaction, options: BlockOptions) -> Transaction:
        if options.settings:
            whole = block.parent is None and not block.nested and not self._joins_a_transaction()
            block.settings = LocalSettings(self, options.settings, whole=whole)
            block.settings.begin()
        return block

    def _push(self, inner: sa_orm.SessionTransaction, *, nested: bool) -> Transaction:
        self._tx = Transaction(self, inner, self._tx, nested=nested, keeper=self)
        return self._tx

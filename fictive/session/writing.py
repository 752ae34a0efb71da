"""Writing what is pending: flush, commit, rollback, and SQLAlchemy's bulk methods."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from . import private
from .callers import caller
from .hooks import settles
from .outside import Executes
from .remembered import warn_of_committed

__all__ = ["Writes"]


class Writes(Executes):
    """Flushes in the transaction that is open, or in one of its own."""

    def flush(self, objects: Any = None) -> None:
        """Write what is pending. Inside: in the transaction. Outside: in one of its own, all or nothing."""
        if self.flushing or self._own:
            super().flush(*_given(objects))
            return
        self._check_block()
        if self._is_inside():
            self._note_in_block(None, None)
            try:
                super().flush(*_given(objects))
            except BaseException as error:
                self.note_error(error)
                raise
            return
        if self.is_clean():
            return
        self._mode.flush(self, objects)

    def flush_own(self, objects: Any) -> None:
        """Outside: flush what is pending, in a transaction of its own."""
        writes = self.pending_writes()
        self._flush_alone(objects)
        self._remember_write(writes)

    @settles
    def _flush_alone(self, objects: Any) -> None:
        self._own = True
        try:
            record = self.open_change_record()
            try:
                super().flush(*_given(objects))
                self._commit_by(private.commit_as_is, self, record)
            except BaseException:
                self._discard()
                raise
        finally:
            self._own = False

    @settles
    def commit(self) -> None:
        """Inside: flush and commit, ending the block. Outside: flush what is pending in one transaction, if anything.

        Outside with nothing pending it sends nothing.
        """
        self._check_block()
        if self._tx is not None:
            self._end(self._root_block(), commit=True, ended_at=caller(), to_root=True)
            return
        self._mode.commit(self)

    def commit_lasting(self) -> None:
        """Outside any block, the transaction that a write began."""
        self._raise_if_aborted(super().get_transaction())
        self._commit_by(super().commit)
        self._forget()
        self._release_outlived_pins()

    def commit_own(self) -> None:
        """Outside: what is pending, in a transaction of its own."""
        self._own = True
        try:
            self._commit_by(super().commit)
        except BaseException:
            self._discard()
            raise
        finally:
            self._own = False
        self._forget()

    @settles
    def rollback(self) -> None:
        """Inside: undo the transaction, ending the block. Outside: discard what is pending; sends nothing.

        Outside under `writes_outside="commit"` it warns with `AlreadyCommittedWarning` of writes since the last
        commit that it can no longer undo.
        """
        if self._tx is not None:
            if self._tx.is_active:
                self._end(self._root_block(), commit=False, ended_at=caller(), to_root=True)
            return
        if self.change_record() is None and (self._mode.stays_open or not self.is_clean()):
            self.open_change_record()
        writes = self._committed_writes
        self._forget()
        super().rollback()
        self._release_outlived_pins()
        if writes:
            warn_of_committed("rollback() outside a transaction cannot undo what was committed at once: ", writes)

    def bulk_save_objects(self, objects: Iterable[object], *args: Any, **kwargs: Any) -> None:
        """As SQLAlchemy's; outside, all or nothing in a transaction of its own."""
        with self.together("bulk_save_objects()"):
            super().bulk_save_objects(objects, *args, **kwargs)

    def bulk_insert_mappings(self, mapper: Any, *args: Any, **kwargs: Any) -> None:
        """As SQLAlchemy's; outside, all or nothing in a transaction of its own."""
        with self.together("bulk_insert_mappings()"):
            super().bulk_insert_mappings(mapper, *args, **kwargs)

    def bulk_update_mappings(self, mapper: Any, *args: Any, **kwargs: Any) -> None:
        """As SQLAlchemy's; outside, all or nothing in a transaction of its own."""
        with self.together("bulk_update_mappings()"):
            super().bulk_update_mappings(mapper, *args, **kwargs)


def _given(objects: Any) -> tuple[Any, ...]:
    return () if objects is None else (objects,)  # naming it is deprecated from SQLAlchemy 2.1 on

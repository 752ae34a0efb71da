"""COPY FROM STDIN, written to in blocks, on psycopg2 and psycopg (3), which are imported in the calls."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["CopyWriter", "NotCopyable", "Psycopg2Writer", "PsycopgWriter", "psycopg2_texts", "psycopg_texts"]


class NotCopyable(Exception):
    """A value has no text that COPY could be given. Never leaves fictive: the rows go by INSERT."""


class CopyWriter(Protocol):
    """A COPY that is under way. The connection can do nothing else until `finish` or `abort`."""

    def write(self, block: str) -> None:
        """Send some lines; an error of the server's may come here or from `finish`."""

    def finish(self) -> None:
        """Wait until the server has taken all, and raise what it found wrong. A second call does nothing."""

    def abort(self) -> None:
        """End the COPY with an error, and the transaction with it; raises nothing."""


class PsycopgWriter:
    def __init__(self, cursor: Any, statement: str) -> None:
        self._manager = cursor.copy(statement)
        self._copy = self._manager.__enter__()

    def write(self, block: str) -> None:
        self._copy.write(block)

    def finish(self) -> None:
        if self._copy is not None:
            self._copy = None
            self._manager.__exit__(None, None, None)

    def abort(self) -> None:
        if self._copy is not None:
            self._copy = None
            with contextlib.suppress(Exception):
                error = RuntimeError("the rows ended with an error")
                self._manager.__exit__(RuntimeError, error, None)


class Psycopg2Writer:
    """psycopg2 asks for the data, in `copy_expert`, so that runs in a thread of its own.

    The caller's rows must not be asked for in there: what they do on this connection would end the COPY, and what
    they raise would become an error of the server's.
    """

    def __init__(self, cursor: Any, statement: str) -> None:
        self._blocks: queue.Queue[str | None] = queue.Queue(maxsize=4)
        self._error: BaseException | None = None
        self._stopped = False
        self._aborted = False
        self._open = True
        self._thread = threading.Thread(target=self._run, args=(cursor, statement), name="fictive-copy", daemon=True)
        self._is_started = False

    def _start(self) -> None:
        """Not when it is made: an interrupt that strikes before the caller has the writer would leave the thread."""
        if not self._is_started:
            self._is_started = True
            self._thread.start()

    def _run(self, cursor: Any, statement: str) -> None:
        try:
            if not self._aborted:
                cursor.copy_expert(statement, self)
        except BaseException as error:
            self._error = error
        finally:
            self._stopped = True
            with contextlib.suppress(queue.Empty):  # room for a writer that waits for it
                while True:
                    self._blocks.get_nowait()

    def read(self, size: int) -> str:
        """For psycopg2, in the thread. It takes blocks of any size."""
        block = self._blocks.get()
        if self._aborted:
            raise RuntimeError("the rows ended with an error")
        return block or ""

    def write(self, block: str) -> None:
        if self._stopped:
            self.finish()
        self._start()
        self._blocks.put(block)

    def finish(self) -> None:
        if not self._open:
            return
        self._open = False
        self._start()
        if not self._stopped:
            self._blocks.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def abort(self) -> None:
        self._aborted = True
        self._open = False
        with contextlib.suppress(queue.Full):  # then `read` does not wait
            self._blocks.put_nowait(None)
        if self._thread.ident is not None:  # else it was not started, or ends without a look at the connection
            self._thread.join()  # even after an interrupt in `finish`: the connection is the thread's until then


def psycopg_texts(dbapi: Any) -> Callable[[Any], str]:
    """What psycopg itself, with the adapters registered on the connection, writes a value as."""
    import psycopg
    from psycopg.adapt import PyFormat, Transformer

    transformer = Transformer.from_context(dbapi)

    def text(value: Any) -> str:
        try:
            dumped = transformer.get_dumper(value, PyFormat.TEXT).dump(value)
        except psycopg.ProgrammingError:
            raise NotCopyable from None
        return "" if dumped is None else bytes(dumped).decode()

    return text


def psycopg2_texts() -> Callable[[Any], str]:
    """psycopg2 writes values as SQL literals only; of its wrappers, those that SQLAlchemy makes are known here."""
    import psycopg2.extensions
    import psycopg2.extras

    def text(value: Any) -> str:
        if isinstance(value, psycopg2.extensions.Binary):
            return "\\x" + bytes(value.adapted).hex()
        if isinstance(value, psycopg2.extras.Json):
            return str(value.dumps(value.adapted))
        raise NotCopyable

    return text

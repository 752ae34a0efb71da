"""The driver alone, in a Flask app: what is left when there is no ORM. Statements in autocommit, a small pool."""

from __future__ import annotations

import contextlib
import importlib
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flask import Flask

from .. import schema
from . import SLEEP, Peer, Setup

_ITEM = "SELECT id, name, state, counter, made_at FROM item WHERE id = %s"


class Raw(Peer):
    name = "raw"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.title = f"raw {setup.driver}"
        self._driver = importlib.import_module(setup.driver)
        self._idle: queue.LifoQueue[Any] = queue.LifoQueue()
        self._lock = threading.Lock()
        self._opened = 0
        self.app = self.flask = Flask("benchmarks.raw", instance_path=tempfile.gettempdir())
        self.flask.config["PROPAGATE_EXCEPTIONS"] = True  # to where it is measured, not into a log
        self.flask.add_url_rule("/selects/<int:count>", view_func=self._selects, endpoint="selects")
        self.flask.add_url_rule("/slow", view_func=self._slow, endpoint="slow")

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Any]:
        """A connection in autocommit, of which there are so many as the pool may have."""
        connection = self._take()
        try:
            yield connection
        finally:
            self._idle.put(connection)

    def _take(self) -> Any:
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait()
        with self._lock:
            more = self._opened < self.setup.pool_size + self.setup.max_overflow
            self._opened += more
        if not more:
            return self._idle.get()
        connection = self._driver.connect(self.setup.url)
        connection.autocommit = True
        return connection

    @contextlib.contextmanager
    def _transaction(self, isolation_level: Any = None) -> Iterator[Any]:
        """A cursor in a transaction."""
        with self._connection() as connection:
            connection.autocommit = False
            connection.isolation_level = isolation_level
            try:
                with connection.cursor() as cursor:
                    yield cursor
                connection.commit()
            except BaseException:
                connection.rollback()
                raise
            finally:
                connection.isolation_level = None
                connection.autocommit = True

    def _row(self, statement: str, *values: Any) -> Any:
        with self._connection() as connection, connection.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchone()

    def _selects(self, count: int) -> str:
        return ",".join(self._row(_ITEM, key)[1] for key in range(1, count + 1))

    def _slow(self) -> str:
        first = self._row(_ITEM, 1)[1]
        time.sleep(SLEEP)
        return f"{first},{self._row(_ITEM, 2)[1]}"

    def get(self, key: int) -> object:
        return self._row(_ITEM, key)

    select = get

    def load(self, count: int) -> Sequence[object]:
        with self._connection() as connection, connection.cursor() as cursor:
            cursor.execute("SELECT id, name, state, counter, made_at FROM item WHERE id <= %s", (count,))
            found: Sequence[object] = cursor.fetchall()
            return found

    def insert(self) -> None:
        with self._transaction() as cursor:
            self._insert(cursor)

    def _insert(self, cursor: Any) -> None:
        values = (self.next_key(), "seen")
        cursor.execute("INSERT INTO event (item_id, note) VALUES (%s, %s) RETURNING id", values)
        cursor.fetchone()

    def select_update(self) -> None:
        with self._transaction() as cursor:
            self._select_update(cursor)

    def _select_update(self, cursor: Any) -> None:
        key = self.next_key()
        cursor.execute(_ITEM, (key,))
        cursor.execute("UPDATE item SET counter = %s WHERE id = %s", (cursor.fetchone()[3] + 1, key))

    def savepoint_insert(self) -> None:
        with self._transaction() as cursor:
            cursor.execute("SAVEPOINT one")
            self._insert(cursor)
            cursor.execute("RELEASE SAVEPOINT one")

    def serializable(self) -> None:
        if self.setup.driver == "psycopg":
            level = self._driver.IsolationLevel.SERIALIZABLE
        else:
            level = "SERIALIZABLE"
        with self._transaction(level) as cursor:
            cursor.execute("SET LOCAL lock_timeout = '5s'")
            cursor.execute("SET LOCAL statement_timeout = '30s'")
            self._select_update(cursor)

    def find_hit(self) -> None:
        self._find_or_insert("tag 1")

    def find_miss(self) -> None:
        self._find_or_insert(self.next_name())

    def _find_or_insert(self, name: str) -> None:
        if self._row("SELECT id FROM tag WHERE name = %s", name) is None:
            self._row("INSERT INTO tag (name) VALUES (%s) ON CONFLICT (name) DO NOTHING RETURNING id", name)

    def replace_links(self) -> Callable[[], None]:
        wanted = self.next_links()

        def replace() -> None:
            with self._transaction() as cursor:
                cursor.execute("DELETE FROM item_tag WHERE item_id = 1 AND tag_id <> ALL (%s)", (wanted,))
                cursor.execute(
                    "INSERT INTO item_tag (item_id, tag_id) SELECT 1, unnest(%s::int[]) ON CONFLICT DO NOTHING",
                    (wanted,),
                )

        return replace

    def set_links(self) -> None:
        self.replace_links()()

    def lock_and_update(self) -> None:
        with self._transaction() as cursor:
            cursor.execute("SET LOCAL lock_timeout = '5s'")
            cursor.execute("LOCK TABLE item IN SHARE UPDATE EXCLUSIVE MODE")
            cursor.execute("UPDATE item SET state = 'lent' WHERE id = %s", (self.next_key(),))

    def clean_up(self) -> None:
        with self._transaction() as cursor:
            for table in schema.SIDE:
                cursor.execute(f"DELETE FROM {table.name}")

    def close(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()

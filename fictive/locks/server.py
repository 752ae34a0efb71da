"""Waiting for a lock on the server's side: one statement sets the timeout, waits, and puts the timeout back.

PostgreSQL has no timeout for one lock, only the setting `lock_timeout`. An anonymous block sets it for itself and puts
the former value back, so that nothing is left to leak; and where the wait was for nothing it says who is in the way.
If it fails the server undoes its settings (PostgreSQL documentation, "DO", "Client Connection Defaults", "Trapping
Errors").
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import ExecutableDDLElement

from ..drivers import sqlstate
from ..errors import LockTimeout

__all__ = ["Quoting", "ServerBlock", "lock_timeouts", "waiting_block"]

_LOCK_NOT_AVAILABLE = "55P03"

MOST_QUERY = 200
"""Characters of another session's query in a message."""


class Quoting:
    """Turns names and texts into SQL for one statement, as its dialect and its schema_translate_map want them."""

    def __init__(self, compiler: Any) -> None:
        self._compiler = compiler
        self._preparer: Any = compiler.dialect.identifier_preparer
        self._doubles = compiler.dialect.paramstyle in ("format", "pyformat")
        self._schemas = compiler.schema_translate_map or {}

    def table(self, table: sa.Table) -> str:
        """The name of `table` with its schema."""
        name: str = self._preparer.format_table(table, use_schema=False)
        schema = self._schemas.get(table.schema, table.schema)
        return name if schema is None else f"{self._preparer.quote_schema(schema)}.{name}"

    def text(self, text: str) -> str:
        """`text` as a literal."""
        literal: str = self._compiler.sql_compiler.render_literal_value(text, sa.String())
        return literal

    def plain(self, sql: Iterable[str]) -> list[str]:
        """SQL, such as quoted names, without what `text` does again: percent signs doubled for the driver."""
        return [each.replace("%%", "%") if self._doubles else each for each in sql]

    def array(self, sql: Iterable[str]) -> str:
        """SQL, such as quoted names, as an array of texts."""
        # one literal: SQLAlchemy takes as long over each as over all of them
        escaped = (each.replace("\\", "\\\\").replace('"', '\\"') for each in self.plain(sql))
        return self.text("{" + ",".join(f'"{each}"' for each in escaped) + "}") + "::text[]"


class ServerBlock(ExecutableDDLElement):
    """An anonymous block of PL/pgSQL. It takes no parameters, so `write` quotes what it is about into the text.

    `write` must not use percent signs of its own: drivers take them for placeholders.
    """

    def __init__(self, write: Callable[[Quoting], str]) -> None:
        self.write = write


@compiles(ServerBlock, "postgresql")
def _compile_block(element: ServerBlock, compiler: Any, **kwargs: Any) -> str:
    body = element.write(Quoting(compiler))
    tag = "$fictive$"
    while tag in body:
        tag = tag[:-1] + "_$"
    return f"DO {tag}\n{body}\n{tag}"


def waiting_block(
    declare: str, work: str, *, milliseconds: int | None, complaint: str, in_the_way: str, finish: str = ""
) -> str:
    """The text of a block that does `work` with a `lock_timeout`, or without one of its own.

    `complaint` is an SQL expression, the message when a lock was not to be had; `in_the_way` an SQL condition on
    `pg_locks l`, saying which locks are the ones waited for.
    """
    before = after = ""
    if milliseconds is not None:
        declare += "  fictive_before text := current_setting('lock_timeout');\n"
        before = f"  PERFORM set_config('lock_timeout', '{int(milliseconds)}', true);\n"
        after = "  PERFORM set_config('lock_timeout', fictive_before, true);\n"
    return f"""DECLARE
{declare}  fictive_others text;
BEGIN
{before}{work}{after}{finish}EXCEPTION WHEN lock_not_available THEN
  SELECT string_agg(DISTINCT concat(
      'pid ', l.pid, ' (', concat_ws(', ', a.usename, nullif(a.application_name, ''), a.state), ') ',
      CASE WHEN l.granted THEN 'holds ' ELSE 'waits for ' END, l.mode, ' on ',
      CASE l.locktype WHEN 'relation' THEN l.relation::regclass::text ELSE 'the key' END,
      '; its query: ', left(a.query, {MOST_QUERY})), E'\\n')
    INTO fictive_others
    FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE l.pid IS DISTINCT FROM pg_backend_pid()
      AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
      AND ({in_the_way});
  RAISE EXCEPTION USING ERRCODE = 'lock_not_available', MESSAGE = {complaint},
    DETAIL = coalesce(fictive_others, 'Whoever was in the way is gone by now.');
END"""


@contextlib.contextmanager
def lock_timeouts(what: str) -> Iterator[None]:
    """Raise `LockTimeout`, its message beginning with `what`, from the server's word that a lock was not to be had."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        if sqlstate(error) != _LOCK_NOT_AVAILABLE:
            raise
        told = getattr(error.orig, "diag", None)
        message = getattr(told, "message_primary", None) or str(error.orig)
        if detail := getattr(told, "message_detail", None):
            message += f". {detail}"
        raise LockTimeout(f"{what}: {message}", error) from error

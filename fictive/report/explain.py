"""The plan of a statement, as the server has it now."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from ..errors import UnsupportedDialect
from .report import kind_of

__all__ = ["can_analyze", "explain"]

_PATIENCE = "10s"


def can_analyze(sql: str) -> bool:
    """Whether a statement may be run again for its plan: a read, by its first word."""
    return kind_of(sql) == "read"


def explain(engine: sa.Engine, sql: str, parameters: Any, *, analyze: bool = False) -> str:
    """The plan of `sql`, as text. With `analyze` the statement is run: for reads only.

    In a read-only transaction of its own that is rolled back, with a `statement_timeout` of 10 seconds. Errors of the
    server's come out as they are.
    """
    if analyze and not can_analyze(sql):
        raise ValueError("EXPLAIN ANALYZE runs the statement: for reads only.")
    if isinstance(parameters, (list, tuple)) and parameters and isinstance(parameters[0], (list, tuple, dict)):
        parameters = parameters[0]  # of many, the first
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{_PATIENCE}'")
            prefix = "EXPLAIN (ANALYZE, BUFFERS)" if analyze else "EXPLAIN"
        elif engine.dialect.name == "sqlite":
            prefix = "EXPLAIN QUERY PLAN"
        else:
            raise UnsupportedDialect(f"EXPLAIN needs PostgreSQL or SQLite, not {engine.dialect.name}.")
        try:
            found = connection.exec_driver_sql(f"{prefix} {sql}", parameters or None)
            return "\n".join(str(row[-1]) for row in found)
        finally:
            connection.rollback()

"""What `doctor` finds out about a pooler, and about the way around it."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa

from ..connection.pooler import find_pooler, is_pooled, way_around
from .findings import Finding, Severity

__all__ = ["pooler_findings", "statement_pooler_findings"]

_WHERE = "SELECT current_database(), system_identifier FROM pg_catalog.pg_control_system()"


def pooler_findings(engine: sa.Engine, *, is_known: bool) -> Iterator[Finding]:
    """Whether a pooler is there, whether the app was told, and whether FICTIVE_DIRECT_URL leads around it.

    `is_known` where something else than `set_pooler` says so. At most three connections by each way.
    """
    told = is_known or is_pooled(engine)
    pooler = find_pooler(engine)
    if pooler is not None:
        by_session = pooler.mode == "session"
        yield Finding(
            "pooler",
            Severity.INFO if told or by_session else Severity.WARNING,
            f"{pooler.version or 'A pooler such as PgBouncer'} is between the app and the server, and pools "
            + ("sessions." if by_session else "transactions." if told else "transactions; the app is not told."),
            ""
            if told or by_session
            else "Set FICTIVE_POOLER = 'transaction' or DB_PGBOUNCER=true (see docs, Deployment): session locks, "
            "LISTEN, SET and prepared statements do not work there.",
        )
    elif is_pooled(engine):
        yield Finding(
            "pooler",
            Severity.INFO,
            "FICTIVE_POOLER is set, and no pooler is between the app and the server from here: pinned(), SET and "
            "session locks are refused all the same.",
        )
    direct = way_around(engine) if is_pooled(engine) else None
    if direct is not None:
        yield from _direct_findings(engine, direct)


def statement_pooler_findings(engine: sa.Engine) -> list[Finding]:
    """Whether an engine that cannot be used is behind a pooler of statements. Raises nothing."""
    try:
        pooler = find_pooler(engine)
    except Exception:  # the server is not there, and that is what is told
        return []
    if pooler is None or pooler.mode != "statement":
        return []
    return [
        Finding(
            "pooler",
            Severity.ERROR,
            f"{pooler.version or 'A pooler such as PgBouncer'} is between the app and the server, and pools "
            "statements: no transaction can be begun.",
            "Let it pool transactions (pool_mode = transaction), and set FICTIVE_POOLER = 'transaction'.",
        )
    ]


def _direct_findings(engine: sa.Engine, direct: sa.Engine) -> Iterator[Finding]:
    try:
        with engine.connect() as connection:
            expected = connection.exec_driver_sql(_WHERE).one()
        with direct.connect() as connection:
            found = connection.exec_driver_sql(_WHERE).one()
        pooler = find_pooler(direct)
    except sa.exc.DBAPIError as error:
        reason = str(error.orig).strip().splitlines()[0]
        yield Finding(
            "direct-url",
            Severity.ERROR,
            f"FICTIVE_DIRECT_URL cannot be used: {reason}.",
            "Give the URL of the server itself; pinned(), session locks and listeners go there.",
        )
        return
    if found != expected:
        yield Finding(
            "direct-url",
            Severity.ERROR,
            "FICTIVE_DIRECT_URL leads to another database than the pooler does.",
            "A lock that is held there keeps nobody out. Give the URL of the server that the pooler connects to.",
        )
    elif pooler is not None and pooler.mode != "session":
        yield Finding(
            "direct-url",
            Severity.ERROR,
            "FICTIVE_DIRECT_URL leads through a pooler of transactions too.",
            "Give the URL of the server itself.",
        )

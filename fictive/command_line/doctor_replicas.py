"""What `doctor` finds out about read replicas."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa

from ..connection.replicas import Replica, replicas_of
from .findings import Finding, Severity
from .target import Database

__all__ = ["replica_findings"]

_SYSTEM = "SELECT system_identifier FROM pg_catalog.pg_control_system()"
_REPLICA = f"""
SELECT pg_catalog.pg_is_in_recovery(), ({_SYSTEM}),
 pg_catalog.pg_wal_lsn_diff(:written, pg_catalog.pg_last_wal_replay_lsn())
"""
_FAR = 16 << 20  # bytes of log, which is one segment


def replica_findings(database: Database) -> Iterator[Finding]:
    """Whether each replica is one of this primary, and how far it is behind. One connection to each server."""
    replicas = replicas_of(database.engine)
    if replicas is None:
        return
    with database.engine.connect() as connection:
        written = connection.exec_driver_sql("SELECT pg_catalog.pg_current_wal_lsn()::text").scalar_one()
        system = connection.exec_driver_sql(_SYSTEM).scalar_one()
    for replica in replicas.members:
        yield _examine(replica, written, system)


def _examine(replica: Replica, written: str, system: int) -> Finding:
    name = replica.name
    try:
        with replica.engine.connect() as connection:
            recovering, own_system, behind = connection.execute(sa.text(_REPLICA), {"written": written}).one()
    except sa.exc.DBAPIError as error:
        reason = str(error.orig).strip().splitlines()[0]
        return Finding(
            "replica",
            Severity.ERROR,
            f"The replica {name} cannot be used: {reason}.",
            "Start it, or take it out of FICTIVE_REPLICAS. Reads go to the primary meanwhile.",
        )
    if own_system != system:
        return Finding(
            "replica",
            Severity.ERROR,
            f"{name} is no replica of this database's server.",
            "Name its streaming replicas in FICTIVE_REPLICAS.",
        )
    if not recovering:
        return Finding(
            "replica",
            Severity.WARNING,
            f"{name} is a primary, and no replica.",
            "After a failover, swap the URLs, or name several hosts and target_session_attrs.",
        )
    if behind is None or behind > _FAR:
        amount = "an unknown amount" if behind is None else f"{int(behind) >> 20} MB"
        return Finding(
            "replica",
            Severity.WARNING,
            f"The replica {name} is {amount} of log behind.",
            "Reads of users who wrote lately go to the primary meanwhile.",
        )
    return Finding("replica", Severity.INFO, f"The replica {name} is {max(0, int(behind))} bytes of log behind.")

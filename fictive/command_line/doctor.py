"""`doctor`: what is wrong with an app's databases, found out without changing anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import sqlalchemy as sa

from ..connection.replicas import is_replica
from .doctor_code import code_findings
from .doctor_connection import connection_findings, setting_findings, version_findings
from .doctor_models import lookup_findings, table_findings
from .doctor_pooler import statement_pooler_findings
from .doctor_replicas import replica_findings
from .doctor_server import catalog_findings, session_findings
from .findings import Finding, Severity
from .settings import engine_settings
from .target import Database, Target, each_once

__all__ = ["examine", "examine_code"]

PATIENCE = 1.0
"""Seconds for which somebody must be idle in a transaction, or be blocked, before it is a finding."""

_ORDER = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.INFO: 2}


def examine(target: Target, bind: str | None = None, *, patience: float = PATIENCE) -> list[Finding]:
    """All findings for the target's databases, or the one with the key `bind`; errors first.

    Changes nothing, takes no lock that others wait for, and takes up to `patience` seconds where somebody is idle in
    a transaction or blocked. Raises SQLAlchemy's `OperationalError` for a database that cannot be reached.
    """
    found: list[Finding] = []
    chosen = target.chosen(bind)
    if bind is None:  # a replica is a finding of its primary's, also where it cannot be reached
        chosen = [each for each in chosen if not is_replica(each.engine)]
    servers = each_once(chosen)
    for database in chosen:
        # a server to which another bind key leads is examined once
        of_one = _examine(target, database, patience, with_server=database in servers)
        found += (dataclasses.replace(each, bind=database.key) for each in of_one)
    in_force = {each.key: engine_settings(each.engine, each.options) for each in chosen}
    found += setting_findings(chosen, target.origins, in_force)
    if target.mappers:
        dialect = next(iter(target.databases)).engine.dialect.name
        found += lookup_findings(target.mappers, target.source, dialect)
    return sorted(found, key=lambda each: _ORDER[each.severity])


def examine_code(target: Target) -> list[Finding]:
    """All findings for the app's source; errors first. Sends nothing."""
    mode = str(target.config.get("FICTIVE_WRITES_OUTSIDE", "commit"))
    found = list(code_findings(target.source, target.mappers, mode))
    if target.mappers:
        dialect = next(iter(target.databases)).engine.dialect.name
        found += lookup_findings(target.mappers, target.source, dialect)
    return sorted(found, key=lambda each: _ORDER[each.severity])


def _examine(target: Target, database: Database, patience: float, *, with_server: bool) -> Iterator[Finding]:
    try:
        yield from _examine_models(database)
        yield from _examine_connections(target, database)
        if with_server:
            yield from _examine_server(database, patience)
    except sa.exc.OperationalError:
        reasons = statement_pooler_findings(database.engine)
        if not reasons:
            raise
        yield from reasons


def _examine_models(database: Database) -> Iterator[Finding]:
    yield from version_findings(database)
    if database.metadata is not None and database.metadata.tables:
        yield from table_findings(database.engine, database.metadata)


def _examine_connections(target: Target, database: Database) -> Iterator[Finding]:
    if database.engine.dialect.name != "postgresql":
        yield Finding("database", Severity.INFO, "Only PostgreSQL is examined further.")
        return
    known = any(name.endswith("DB_PGBOUNCER") for name in target.origins) or bool(target.config.get("FICTIVE_POOLER"))
    yield from connection_findings(database, pooler_is_known=known)
    yield from replica_findings(database)


def _examine_server(database: Database, patience: float) -> Iterator[Finding]:
    if database.engine.dialect.name != "postgresql":
        return
    yield from catalog_findings(database.engine)
    yield from session_findings(database.engine, patience=patience)

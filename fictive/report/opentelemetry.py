"""Spans and metrics for OpenTelemetry. Needs its API: `pip install opentelemetry-api`.

A span for each transaction, from BEGIN to COMMIT, stands beside those that OpenTelemetry's own instrumentation of
SQLAlchemy or the driver makes for the statements.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import flask
import sqlalchemy as sa

from ..errors import ConfigurationError
from .report import Report, Statement, Transaction
from .requests import check_watched
from .signals import request_reported, transaction_ended

__all__ = ["instrument"]

_NAME = "fictive"
# https://opentelemetry.io/docs/specs/semconv/database/database-metrics/
_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
_SYSTEMS = {"mssql": "microsoft.sql_server", "oracle": "oracle.db"}


def instrument(app: flask.Flask, *, tracer_provider: Any = None, meter_provider: Any = None) -> None:
    """Give each transaction of `app` a span, and count statements, connections and transactions.

    Call it once, after `db.init_app(app)`, with `FICTIVE_REPORT = True`. The providers are OpenTelemetry's global ones
    unless others are given. A span is made when its transaction ends, below the span that is current then.

    Raises `ConfigurationError` where OpenTelemetry is not installed or the app's requests are not watched.
    """
    try:
        from opentelemetry import metrics, trace
    except ImportError:
        raise ConfigurationError(
            "This needs OpenTelemetry (extra fictive[opentelemetry]): pip install opentelemetry-api."
        ) from None
    check_watched(app)
    with app.app_context():
        engines: dict[Any, sa.Engine] = dict(app.extensions["sqlalchemy"].engines)
    common = _attributes(engines)
    tracer = trace.get_tracer(_NAME, tracer_provider=tracer_provider)
    meter = metrics.get_meter(_NAME, meter_provider=meter_provider)
    failed = trace.Status(trace.StatusCode.ERROR)

    def histogram(name: str, unit: str, text: str) -> Any:
        return meter.create_histogram(name, unit, text, explicit_bucket_boundaries_advisory=_SECONDS)

    duration = histogram("db.client.operation.duration", "s", "Duration of database client operations.")
    rows = meter.create_histogram("db.client.response.returned_rows", "{row}", "Rows returned by an operation.")
    waits = histogram("db.client.connection.wait_time", "s", "Time to obtain an open connection from the pool.")
    uses = histogram("db.client.connection.use_time", "s", "Time between borrowing a connection and returning it.")
    open_for = histogram("fictive.transaction.duration", "s", "Time between BEGIN and COMMIT.")
    idle_for = histogram("fictive.transaction.idle_time", "s", "Time in which a transaction was open and idle.")
    trips = meter.create_histogram("fictive.request.round_trips", "{round_trip}", "Round trips of a request.")

    def span(app: flask.Flask, transaction: Transaction) -> None:
        attributes = {**common, "fictive.transaction.outcome": transaction.outcome}
        open_for.record(transaction.seconds, attributes)
        idle_for.record(transaction.idle_seconds, attributes)
        details: dict[str, Any] = {
            "fictive.transaction.idle_time": transaction.idle_seconds,
            "fictive.transaction.statements": transaction.statements,
            "fictive.transaction.retries": transaction.retries,
        }
        if transaction.line is not None:
            details["code.file.path"] = transaction.line.file
            details["code.line.number"] = transaction.line.number
            details["code.function.name"] = transaction.line.function
        shift = time.time_ns() - time.perf_counter_ns()
        made = tracer.start_span(
            "transaction", attributes={**attributes, **details}, start_time=_nanoseconds(transaction.started) + shift
        )
        if transaction.outcome in ("aborted", "in doubt"):
            made.set_status(failed)
        made.end(_nanoseconds(transaction.ended or transaction.started) + shift)

    def count(app: flask.Flask, report: Report) -> None:
        trips.record(report.round_trips, {"http.route": str(report.request.get("endpoint") or "")})
        for since, until in report.pool_waits:
            waits.record(until - since, common)
        for each in report.transactions:
            uses.record(each.seconds, common)
        for one in report.statements:
            attributes = {**common, "db.operation.name": _operation(one)}
            if one.error is not None:
                attributes["error.type"] = one.error.partition(":")[0]
            elif one.rows >= 0 and one.kind == "read":
                rows.record(one.rows, attributes)
            duration.record(one.seconds, attributes)
            if one.transaction is None:
                uses.record(one.seconds, common)

    transaction_ended.connect(span, app, weak=False)
    request_reported.connect(count, app, weak=False)

    def pools(options: Any) -> Iterable[Any]:
        for key, engine in engines.items():
            pool: Any = engine.pool
            if hasattr(pool, "checkedout") and hasattr(pool, "checkedin"):
                named = {**common, "db.client.connection.pool.name": key or "default"}
                yield metrics.Observation(pool.checkedout(), {**named, "db.client.connection.state": "used"})
                yield metrics.Observation(pool.checkedin(), {**named, "db.client.connection.state": "idle"})

    meter.create_observable_up_down_counter(
        "db.client.connection.count", [pools], "{connection}", "Connections by their state."
    )


def _attributes(engines: dict[Any, sa.Engine]) -> dict[str, Any]:
    """Those of all spans and metrics; the first engine's, which the default one is."""
    engine = engines.get(None) or next(iter(engines.values()))
    name = engine.dialect.name
    found: dict[str, Any] = {"db.system.name": _SYSTEMS.get(name, name)}
    if engine.url.database:
        found["db.namespace"] = engine.url.database
    if engine.url.host:
        found["server.address"] = engine.url.host
    return found


def _operation(statement: Statement) -> str:
    words = statement.sql.split(None, 1)
    return words[0].upper() if words else ""


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)

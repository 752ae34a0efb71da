"""Metrics for Prometheus. Needs prometheus_client: `pip install prometheus-client`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flask

from ..errors import ConfigurationError
from .report import Report, Transaction
from .requests import check_watched
from .signals import request_reported, transaction_ended

__all__ = ["export"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_COUNTS = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144)


def export(app: flask.Flask, registry: Any = None) -> None:
    """Count what the requests of `app` do, in `registry` (prometheus_client's default one).

    Call it once, after `db.init_app(app)`, with `FICTIVE_REPORT = True`. How the metrics are served is the app's
    business (`prometheus_client.make_wsgi_app()`); they work with prometheus_client's multiprocess mode, but for those
    of the pool, which are of the process that is asked.

    Raises `ConfigurationError` where prometheus_client is not installed or the app's requests are not watched.
    """
    try:
        import prometheus_client
    except ImportError:
        raise ConfigurationError(
            "This needs prometheus_client (extra fictive[prometheus]): pip install prometheus-client."
        ) from None
    check_watched(app)
    registry = registry if registry is not None else prometheus_client.REGISTRY

    def histogram(name: str, text: str, labels: list[str], buckets: Any) -> Any:
        return prometheus_client.Histogram(f"fictive_{name}", text, labels, buckets=buckets, registry=registry)

    def counter(name: str, text: str, labels: list[str]) -> Any:
        return prometheus_client.Counter(f"fictive_{name}", text, labels, registry=registry)

    by_request = {
        "database_seconds": histogram("request_database_seconds", "Time in the database", ["endpoint"], _SECONDS),
        "held_seconds": histogram("request_held_seconds", "Time with a connection", ["endpoint"], _SECONDS),
        "idle_seconds": histogram("request_idle_seconds", "Time idle in a transaction", ["endpoint"], _SECONDS),
        "pool_seconds": histogram("request_pool_seconds", "Time waiting for a connection", ["endpoint"], _SECONDS),
        "round_trips": histogram("request_round_trips", "Round trips to the database", ["endpoint"], _COUNTS),
    }
    lost = counter("connections_lost", "Connections that were lost", [])
    retries = counter("retries", "Statements and transactions that were run again", ["endpoint"])
    repeated = counter("repeated_statements", "Statements that repeat another one of their request", ["endpoint"])
    seconds = histogram("transaction_seconds", "How long a transaction was open", ["outcome"], _SECONDS)
    idle = histogram("transaction_idle_seconds", "How long it was open and idle", ["outcome"], _SECONDS)

    def count_request(app: flask.Flask, report: Report) -> None:
        endpoint = str(report.request.get("endpoint") or "")
        for name, metric in by_request.items():
            metric.labels(endpoint).observe(getattr(report, name))
        lost.inc(report.lost)
        retries.labels(endpoint).inc(len(report.retries))
        repeated.labels(endpoint).inc(sum(each.count - 1 for each in report.findings))

    def count_transaction(app: flask.Flask, transaction: Transaction) -> None:
        seconds.labels(transaction.outcome).observe(transaction.seconds)
        idle.labels(transaction.outcome).observe(transaction.idle_seconds)

    request_reported.connect(count_request, app, weak=False)
    transaction_ended.connect(count_transaction, app, weak=False)
    registry.register(_Pools(app))


class _Pools:
    """The connections of the app's pools, looked at when the metrics are."""

    def __init__(self, app: flask.Flask) -> None:
        self._app = app

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        found = GaugeMetricFamily("fictive_pool_connections", "Connections of the pool", labels=["bind", "state"])
        size = GaugeMetricFamily("fictive_pool_size", "Connections that the pool keeps", labels=["bind"])
        with self._app.app_context():
            engines = self._app.extensions["sqlalchemy"].engines
        for key, engine in engines.items():
            bind, pool = key or "default", engine.pool
            if hasattr(pool, "checkedout") and hasattr(pool, "checkedin"):
                found.add_metric([bind, "used"], pool.checkedout())
                found.add_metric([bind, "idle"], pool.checkedin())
                size.add_metric([bind], pool.size())
        yield found
        yield size

"""Watches an app's requests: gives each app context a collector, and its report to all that want it."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import flask
import sqlalchemy as sa

from ..config import Settings
from ..connection.link import SessionConnection
from ..errors import ConfigurationError
from .collector import Collector
from .engine_events import watch_engine
from .guards import Guard
from .holders import Holders
from .lines import register_application
from .log import log_report
from .relationships import relationships_of
from .report import Report, transaction_report
from .server_timing import server_timing
from .signals import request_reported, transaction_ended

__all__ = ["KEPT", "Reports", "check_watched", "collector_of_context", "install", "report_so_far", "reports_of"]

KEPT = 200
"""How many reports the page and the panel can show."""

EXTENSION = "fictive.report"
"""The key in `app.extensions` of its `Reports`."""

_COLLECTOR = "_fictive_collector"
_REQUEST = "_fictive_request"
_ID_HEADERS = ("X-Request-ID", "X-Correlation-ID", "X-Amzn-Trace-Id")

_log = logging.getLogger("fictive.report")


class Reports:
    """What one app's requests are reported to."""

    def __init__(self, app: flask.Flask, settings: Settings, *, keep: bool) -> None:
        self.settings = settings
        self.recent: deque[Report] = deque(maxlen=KEPT if keep else 0)
        """The last reports, the newest last; none unless they are kept."""
        self.shows_timing = settings.report_server_timing
        self.guard: Guard | None = None
        """Watches transactions and connections, where a setting says so."""
        if settings.report_transaction_open is not None or settings.report_connection_held is not None:
            self.guard = Guard(
                transaction_open=settings.report_transaction_open, connection_held=settings.report_connection_held
            )
        self._app = app

    def hold(self, engine: sa.Engine) -> None:
        """Know who has the engine's connections."""
        if self.guard is not None and self.guard.connection_held is not None:
            guard = self.guard
            guard.holders.append(Holders(engine, _who, lambda holder: guard.wake()))
        else:
            Holders(engine, _who)

    def relationships(self, sql: str) -> list[str]:
        """The relationships of the app's models that `sql` may be a lazy load of."""
        return relationships_of(sql, self._app.extensions["sqlalchemy"].Model.registry.mappers)

    def timing_wanted(self) -> bool:
        return self._app.debug if self.shows_timing is None else self.shows_timing

    def wants(self, collector: Collector) -> bool:
        """Whether anybody would look at a report of it; deriving one costs more than collecting."""
        settings = self.settings
        if self.recent.maxlen or request_reported.receivers:
            return True
        trips, seconds, transactions = collector.totals()
        return (
            (settings.report_round_trips is not None and trips > settings.report_round_trips)
            or (settings.report_slow is not None and seconds > settings.report_slow)
            or (settings.report_idle is not None and transactions)
        )

    def take(self, report: Report) -> None:
        """Hand a finished report to all. What fails there is logged, and does not reach the request."""
        self.recent.append(report)
        with _nothing_escapes():
            log_report(report, self.settings)
        if request_reported.receivers:
            with _nothing_escapes():
                request_reported.send(self._app, report=report)

    def transaction(self, collector: Collector, number: int) -> None:
        """A transaction has ended."""
        if transaction_ended.receivers:
            with _nothing_escapes():
                transaction = transaction_report(collector.events, number)
                if transaction is not None:
                    transaction_ended.send(self._app, transaction=transaction)


def install(app: flask.Flask, settings: Settings, engines: Mapping[Any, Any]) -> None:
    """Watch the requests of `app`."""
    if EXTENSION in app.extensions:
        return
    reports = app.extensions[EXTENSION] = Reports(app, settings, keep=app.debug)
    register_application(app.root_path)
    # strong: blinker would forget functions that nothing else holds
    flask.request_started.connect(_started, app, weak=False)
    flask.request_finished.connect(_finished, app, weak=False)
    flask.request_tearing_down.connect(_tearing_down, app, weak=False)
    flask.appcontext_tearing_down.connect(_context_ends, app, weak=False)
    for engine in engines.values():
        watch_engine(engine, _current, tells_itself=lambda connection: isinstance(connection, SessionConnection))
        if app.debug or settings.report_connection_held is not None:
            reports.hold(engine)
    if app.debug:
        from .page import blueprint

        app.register_blueprint(blueprint)


def reports_of(app: flask.Flask) -> Reports | None:
    """Those of an app whose requests are watched; else None."""
    found = app.extensions.get(EXTENSION)
    return found if isinstance(found, Reports) else None


def check_watched(app: flask.Flask) -> None:
    """Raise `ConfigurationError` where the app's requests are not watched."""
    if reports_of(app) is None:
        raise ConfigurationError("The app's requests are not watched: set FICTIVE_REPORT = True before init_app().")


def collector_of_context() -> Collector | None:
    """The collector of the current app context, made now if it has none; None where requests are not watched."""
    if not flask.has_app_context():
        return None
    found: Collector | None = flask.g.get(_COLLECTOR)
    if found is None and (reports := flask.current_app.extensions.get(EXTENSION)) is not None:
        guard = reports.guard
        watch = guard.watch if guard is not None and guard.transaction_open is not None else None
        found = Collector(reports.transaction, watch)
        setattr(flask.g, _COLLECTOR, found)
    return found


def report_so_far() -> Report | None:
    """What the current request has done until now; None where it is not watched."""
    collector = flask.g.get(_COLLECTOR) if flask.has_app_context() else None
    return None if collector is None else _report(collector)


def _who() -> tuple[str | None, Collector | None]:
    """The endpoint and the collector of who takes a connection."""
    endpoint = flask.request.endpoint if flask.has_request_context() else None
    return endpoint, flask.g.get(_COLLECTOR) if flask.has_app_context() else None


def _current() -> Collector | None:
    return collector_of_context()


def _started(app: flask.Flask, **_: Any) -> None:
    collector = collector_of_context()
    if collector is not None:
        collector.start()
        facts = _facts(flask.request)
        collector.what = f"{facts['method']} {facts['path']} (endpoint {facts['endpoint']}, id {facts['id']})"
        setattr(flask.g, _REQUEST, facts)


def _finished(app: flask.Flask, response: Any, **_: Any) -> None:
    collector = flask.g.get(_COLLECTOR)
    if collector is None:
        return
    facts = flask.g.get(_REQUEST)
    if facts is not None:
        facts["status"] = response.status_code
    reports = reports_of(app)
    if reports is not None and reports.timing_wanted():
        with _nothing_escapes():
            response.headers.add("Server-Timing", server_timing(_report(collector)))


def _tearing_down(app: flask.Flask, exc: BaseException | None = None, **_: Any) -> None:
    facts = flask.g.get(_REQUEST)
    if facts is not None and exc is not None:
        facts.setdefault("status", 500)
        facts["error"] = type(exc).__name__
    if not _context_ends_with_request():
        _finish(app)


def _context_ends(app: flask.Flask, **_: Any) -> None:
    _finish(app)


def _context_ends_with_request() -> bool:
    """Whether the app context was pushed for this request. Not where somebody, such as a test, had pushed one."""
    context: Any = flask.globals.request_ctx._get_current_object()  # type: ignore[attr-defined]
    tokens = getattr(context, "_cv_tokens", None)  # Flask documents no other way to tell
    return not tokens or not isinstance(tokens, list) or tokens[-1][1] is not None


def _finish(app: flask.Flask) -> None:
    """Report what the collector has; of a context without a request only if there is anything."""
    collector, facts = flask.g.get(_COLLECTOR), flask.g.pop(_REQUEST, None)
    reports = reports_of(app)
    if collector is None or reports is None:
        return
    if facts is None and not collector.events:
        return
    if facts is not None and facts["endpoint"] is not None and facts["endpoint"].startswith("_fictive."):
        collector.start()
        return
    if reports.wants(collector):
        with _nothing_escapes():
            report = _report(collector, facts if facts is not None else {"endpoint": _without_request()})
            reports.take(report)
    collector.start()


def _report(collector: Collector, facts: Mapping[str, Any] | None = None) -> Report:
    return Report.of(
        collector.events,
        number=collector.number,
        started=collector.started,
        started_wall=collector.started_wall,
        ended=time.perf_counter(),
        request=facts if facts is not None else flask.g.get(_REQUEST),
        relationships=flask.current_app.extensions[EXTENSION].relationships,
    )


def _without_request() -> str | None:
    """The command of the command line that runs, if one does."""
    import click

    context = click.get_current_context(silent=True)
    return f"command {context.info_name}" if context is not None else None


def _facts(request: flask.Request) -> dict[str, Any]:
    given = next((value for name in _ID_HEADERS if (value := request.headers.get(name))), None)
    if given is None and (parent := request.headers.get("traceparent", "")).count("-") >= 3:
        given = parent.split("-")[1]
    return {
        "method": request.method,
        "path": request.path,
        "endpoint": request.endpoint,
        "id": given[:200] if given else uuid.uuid4().hex,
    }


@contextlib.contextmanager
def _nothing_escapes() -> Iterator[None]:
    """Reporting must not turn an answer into an error."""
    try:
        yield
    except Exception:
        _log.exception("the report of a request failed")

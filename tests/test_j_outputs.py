"""What else reads the collector (rules J1, J3, C4): guards, pool timeouts, tags, Prometheus, OpenTelemetry."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from fictive.errors import ConfigurationError
from fictive.report.requests import reports_of
from fictive.report.tags import comment
from fictive.testing.wire import Wire
from tests.conftest import MakeApp
from tests.fresh_database import PATIENCE
from tests.models import opt_in

db, Item = opt_in.db, opt_in.Item

View = Callable[[], Any]
UNPREPARED: dict[str, Any] = {
    "psycopg2": {}, "psycopg": {"SQLALCHEMY_ENGINE_OPTIONS": {"connect_args": {"prepare_threshold": None}}}
}  # fmt: skip
"""Configuration with which psycopg prepares nothing, which costs a round trip now and then."""


def app_with(make_app: MakeApp, view: View, **config: Any) -> Flask:
    app = make_app(**config)

    @app.get("/")
    def index() -> Any:
        return view() or ""

    return app


def until(found: Callable[[], Any]) -> Any:
    """What `found` returns once that is true."""
    deadline = time.monotonic() + PATIENCE
    while not (value := found()) and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert value
    return value


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    """The messages of `fictive.report` that have a text in them."""
    caplog.set_level(logging.INFO, "fictive.report")
    return lambda text: [each.getMessage() for each in caplog.records
                         if each.name == "fictive.report" and text in each.getMessage()]  # fmt: skip


# -- guards -----------------------------------------------------------------------------------------------------------


def test_c4_a_transaction_open_for_long_is_logged_while_it_is_open(
    make_app: MakeApp, records: Callable[[str], list[str]]
) -> None:
    found: list[str] = []

    def view() -> None:
        with db.session.begin():
            db.session.execute(sa.text("select 1"))
            reports_of(app).guard.transaction_open = 0.0  # from now on: the statement may take any time
            found.extend(until(lambda: records("a transaction of ")))

    app = app_with(make_app, view, FICTIVE_REPORT_TRANSACTION_OPEN="1h")
    assert app.test_client().get("/", headers={"X-Request-ID": "r-1"}).status_code == 200
    (message,) = found
    first = view.__code__.co_firstlineno
    assert "GET / (endpoint index, id r-1) is open for" in message
    assert re.search(rf"begun at \S+test_j_outputs.py:({first + 1}|{first + 2}) in view; ", message)
    assert "outside of the database" in message
    assert re.search(r"it is at \S+test_j_outputs.py:\d+ in until", message)
    assert len(records("a transaction of ")) == 1


def test_c4_a_transaction_that_waits_for_a_lock_is_said_to_wait_for_the_database(
    make_app: MakeApp, records: Callable[[str], list[str]], look: Callable[..., list[Any]]
) -> None:
    def view() -> None:
        with db.session.begin():
            db.session.execute(sa.text("select pg_advisory_xact_lock(77)"))

    app = app_with(make_app, view, FICTIVE_REPORT_TRANSACTION_OPEN="20ms")
    look("select pg_advisory_lock(77)")
    thread = threading.Thread(target=lambda: app.test_client().get("/"))
    thread.start()
    try:
        (message,) = until(lambda: records("a transaction of "))
    finally:
        look("select pg_advisory_unlock(77)")
        thread.join()
    assert (
        f"it waits for the database at tests/test_j_outputs.py:{view.__code__.co_firstlineno + 2} in view" in message
    )


def test_c4_a_connection_held_for_long_is_logged(make_app: MakeApp, records: Callable[[str], list[str]]) -> None:
    def view() -> None:
        with db.engine.connect() as connection:
            connection.execute(sa.text("select 'held'"))
            until(lambda: records("a connection is held by index"))

    app = app_with(make_app, view, FICTIVE_REPORT_CONNECTION_HELD="20ms")
    app.test_client().get("/")
    (message,) = records("a connection is held by index")  # that of the app's making may be held for long too
    assert "held by index, thread MainThread, for" in message
    assert f"taken at tests/test_j_outputs.py:{view.__code__.co_firstlineno + 1} in view" in message


def test_c4_short_ones_are_not_logged(make_app: MakeApp, records: Callable[[str], list[str]]) -> None:
    def view() -> None:
        with db.session.begin():
            db.session.execute(sa.text("select 1"))

    app = app_with(make_app, view, FICTIVE_REPORT_TRANSACTION_OPEN="1min", FICTIVE_REPORT_CONNECTION_HELD="1min")
    for _ in range(3):
        app.test_client().get("/")
    assert records("") == []


def test_c4_no_thread_without_a_setting(make_app: MakeApp) -> None:
    app = app_with(make_app, lambda: None, FICTIVE_REPORT=True)
    before = set(threading.enumerate())
    app.test_client().get("/")
    assert set(threading.enumerate()) == before


def test_c4_a_pool_timeout_names_who_has_the_connections(make_app: MakeApp) -> None:
    taken, done = threading.Event(), threading.Event()

    def view() -> None:
        with db.session.begin():
            db.session.execute(sa.text("select 'in the way'"))
            taken.set()
            done.wait()

    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}
    app = app_with(make_app, view, DEBUG=True, SQLALCHEMY_ENGINE_OPTIONS=options)
    thread = threading.Thread(target=lambda: app.test_client().get("/"), name="worker-7")
    thread.start()
    taken.wait()
    try:
        with app.app_context(), pytest.raises(sa.exc.TimeoutError) as caught:
            db.session.execute(sa.text("select 1"))
    finally:
        done.set()
        thread.join()
    message = str(caught.value)
    assert "QueuePool limit" in message or "imit of size" in message
    assert "Held by:\n  index, thread worker-7, for" in message
    assert f"taken at tests/test_j_outputs.py:{view.__code__.co_firstlineno + 2} in view" in message
    assert "its last statement: select 'in the way'" in message


# -- tags -------------------------------------------------------------------------------------------------------------


def test_j1_statements_carry_tags(make_app: MakeApp, wire: Wire) -> None:
    def view() -> None:
        db.session.execute(sa.text("select 'a%' || :x"), {"x": "b"})
        with db.session.begin():
            db.session.add(Item(name="x"))

    app = app_with(make_app, view, FICTIVE_REPORT_TAGS=True)
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    with wire.record() as log:
        app.test_client().get("/", headers={"traceparent": trace})
    assert log.round_trips == 3
    tagged = [text for text in log.statements if "SELECT" in text.upper() or "INSERT" in text]
    assert len(tagged) == 2
    for text in tagged:
        assert text.endswith(f"/*route='index',traceparent='{trace}'*/")
    with app.app_context(), wire.record() as log:
        db.session.execute(sa.text("select 1"))
    assert log.statements == ["select 1"]


def test_j1_tags_are_quoted() -> None:
    assert comment(route="shop.cart", action=None) == "/*route='shop.cart'*/"
    assert comment(route="a'*/b") == "/*route='a%27%2A/b'*/"
    assert comment() == ""


# -- Prometheus -------------------------------------------------------------------------------------------------------


def test_j1_prometheus(make_app: MakeApp, driver: str) -> None:
    prometheus_client = pytest.importorskip("prometheus_client")
    registry_class = prometheus_client.CollectorRegistry
    from fictive.report import prometheus

    def view() -> None:
        with db.session.begin():
            db.session.execute(sa.text("select 1"))
        for n in range(3):
            db.session.execute(sa.text("select :n"), {"n": n})

    app, registry = app_with(make_app, view, FICTIVE_REPORT=True, **UNPREPARED[driver]), registry_class()
    prometheus.export(app, registry)
    for _ in range(2):
        app.test_client().get("/")
    value = registry.get_sample_value
    assert value("fictive_request_round_trips_sum", {"endpoint": "index"}) == 2 * 5
    assert value("fictive_request_round_trips_count", {"endpoint": "index"}) == 2
    assert value("fictive_transaction_seconds_count", {"outcome": "committed"}) == 2
    assert value("fictive_repeated_statements_total", {"endpoint": "index"}) == 2 * 2
    assert value("fictive_request_database_seconds_sum", {"endpoint": "index"}) > 0
    assert value("fictive_pool_connections", {"bind": "default", "state": "used"}) == 0
    assert b"fictive_pool_size" in prometheus_client.generate_latest(registry)


def test_j1_outputs_need_reports(make_app: MakeApp) -> None:
    pytest.importorskip("prometheus_client")
    pytest.importorskip("opentelemetry")
    from fictive.report import opentelemetry, prometheus

    app = make_app()
    for output in (prometheus.export, opentelemetry.instrument):
        with pytest.raises(ConfigurationError, match="FICTIVE_REPORT = True"):
            output(app)


# -- OpenTelemetry ----------------------------------------------------------------------------------------------------


@pytest.fixture
def telemetry() -> Iterator[tuple[Any, Any, Any, Any]]:
    """Providers for spans and metrics, and where both end."""
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(shutdown_on_exit=False), MeterProvider([reader], shutdown_on_exit=False)
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    yield tracers, exporter, meters, reader
    tracers.shutdown()
    meters.shutdown()


def test_j3_a_span_for_each_transaction(make_app: MakeApp, telemetry: Any) -> None:
    from fictive.report import opentelemetry

    tracers, exporter, meters, _ = telemetry

    def view() -> None:
        with tracers.get_tracer("test").start_as_current_span("view"):
            with db.session.begin():
                db.session.execute(sa.text("select 1"))
                threading.Event().wait(0.02)
            with pytest.raises(ZeroDivisionError), db.session.begin():
                db.session.execute(sa.text("select 2"))
                raise ZeroDivisionError

    app = app_with(make_app, view, FICTIVE_REPORT=True)
    opentelemetry.instrument(app, tracer_provider=tracers, meter_provider=meters)
    assert app.test_client().get("/").status_code == 200
    committed, rolled_back, outer = exporter.get_finished_spans()
    assert [committed.name, rolled_back.name] == ["transaction", "transaction"]
    assert committed.attributes["fictive.transaction.outcome"] == "committed"
    assert rolled_back.attributes["fictive.transaction.outcome"] == "rolled back"
    assert committed.attributes["fictive.transaction.idle_time"] >= 0.02
    assert committed.attributes["code.function.name"] == "view"
    assert committed.attributes["db.system.name"] == "postgresql"
    assert committed.end_time - committed.start_time >= 0.02e9
    assert outer.start_time <= committed.start_time < committed.end_time <= outer.end_time
    assert committed.parent.span_id == outer.context.span_id


def test_j1_metrics_by_the_semantic_conventions(make_app: MakeApp, telemetry: Any) -> None:
    from fictive.report import opentelemetry

    tracers, _, meters, reader = telemetry

    def view() -> None:
        with db.session.begin():
            db.session.execute(sa.text("select 1"))

    app = app_with(make_app, view, FICTIVE_REPORT=True)
    opentelemetry.instrument(app, tracer_provider=tracers, meter_provider=meters)
    app.test_client().get("/")
    found = {
        metric.name: metric.data.data_points
        for of_resource in reader.get_metrics_data().resource_metrics
        for of_scope in of_resource.scope_metrics
        for metric in of_scope.metrics
    }
    (operation,) = found["db.client.operation.duration"]
    assert operation.count == 1
    assert operation.attributes["db.operation.name"] == "SELECT"
    assert found["fictive.request.round_trips"][0].sum == 2
    assert found["db.client.response.returned_rows"][0].sum == 1
    assert found["fictive.transaction.duration"][0].attributes["fictive.transaction.outcome"] == "committed"
    states = {point.attributes["db.client.connection.state"]: point.value
              for point in found["db.client.connection.count"]}  # fmt: skip
    assert states["used"] == 0

"""Run by `test_compat_watching.py` in a process of its own: an app with one tool that watches, and what the tool saw.

`python watching_program.py TOOL KIND URL`; KIND is plain or fictive. Prints a line `ready`, and for each line with the
name of a view that it reads, one JSON object: the SQL that the tool saw, one text a span.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from typing import Any

Seen = Callable[[], list[str]]
"""What the tool saw since it was last asked."""


def opentelemetry(library: str, commenter: bool) -> Callable[[Any, Any], Seen]:
    def start(app: Any, engine: Any) -> Seen:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        provider, exporter = TracerProvider(), InMemorySpanExporter()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        options: dict[str, Any] = {"tracer_provider": provider, "enable_commenter": commenter}
        if library == "sqlalchemy":
            from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor

            SQLAlchemyInstrumentor().instrument(engine=engine, skip_dep_check=True, **options)
        elif library == "psycopg2":
            from opentelemetry.instrumentation.psycopg2 import Psycopg2Instrumentor

            Psycopg2Instrumentor().instrument(skip_dep_check=True, **options)
        else:
            from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor

            PsycopgInstrumentor().instrument(skip_dep_check=True, **options)

        def seen() -> list[str]:
            spans = exporter.get_finished_spans()
            exporter.clear()
            names = ("db.statement", "db.query.text")
            return [str(next((s.attributes[n] for n in names if n in s.attributes), f"({s.name})")) for s in spans]

        return seen

    return start


def sentry(app: Any, engine: Any) -> Seen:
    import sentry_sdk
    from sentry_sdk.integrations.flask import FlaskIntegration
    from sentry_sdk.integrations.sqlalchemy import SqlalchemyIntegration

    found: list[str] = []

    def before(event: Any, hint: Any) -> None:
        found.extend(span["description"] for span in event["spans"] if span["op"].startswith("db"))

    sentry_sdk.init(
        dsn="http://key@127.0.0.1:1/1", traces_sample_rate=1.0, before_send_transaction=before,
        integrations=[FlaskIntegration(), SqlalchemyIntegration()], default_integrations=False,
    )  # fmt: skip

    def seen() -> list[str]:
        result = found.copy()
        found.clear()
        return result

    return seen


def datadog(app: Any, engine: Any) -> Seen:
    from ddtrace import patch
    from ddtrace.trace import TraceFilter, tracer

    found: list[str] = []

    class Keep(TraceFilter):  # type: ignore[misc]
        def process_trace(self, trace: Any) -> None:
            found.extend(
                span.resource for span in trace
                if span.span_type == "sql" and not span.name.endswith((".connect", ".connection.commit",
                                                                       ".connection.rollback"))
            )  # fmt: skip

    tracer.configure(trace_processors=[Keep()])
    patch(psycopg=True)

    def seen() -> list[str]:
        result = found.copy()
        found.clear()
        return result

    return seen


def newrelic(app: Any, engine: Any) -> Seen:
    import newrelic.agent

    with tempfile.NamedTemporaryFile("w", suffix=".ini", delete=False) as file:
        file.write("[newrelic]\nlicense_key = x\ndeveloper_mode = true\napp_name = x\nlog_level = error\n")
    newrelic.agent.initialize(file.name)
    application = newrelic.agent.register_application(timeout=10.0)
    from newrelic.api.database_trace import DatabaseTrace

    found: list[str] = []
    finish = DatabaseTrace.finalize_data

    def finalize_data(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(self.sql)
        return finish(self, *args, **kwargs)

    DatabaseTrace.finalize_data = finalize_data
    app.wsgi_app = newrelic.agent.WSGIApplicationWrapper(app.wsgi_app, application)

    def seen() -> list[str]:
        result = [text for text in found if text not in ("COMMIT", "ROLLBACK")]
        found.clear()
        return result

    return seen


def debug_toolbar(app: Any, engine: Any) -> Seen:
    import flask_debugtoolbar
    from flask_sqlalchemy.record_queries import get_recorded_queries

    app.debug = True
    app.config.update(SECRET_KEY="x", DEBUG_TB_PANELS=["flask_debugtoolbar.panels.sqlalchemy.SQLAlchemyDebugPanel"])
    flask_debugtoolbar.DebugToolbarExtension(app)
    found: list[str] = []

    @app.after_request
    def keep(response: Any) -> Any:
        found.extend(each.statement for each in get_recorded_queries())
        return response

    def seen() -> list[str]:
        result = found.copy()
        found.clear()
        return result

    return seen


TOOLS: dict[str, Callable[[Any, Any], Seen]] = {
    "OpenTelemetry SQLAlchemy": opentelemetry("sqlalchemy", False),
    "OpenTelemetry SQLAlchemy, commenter": opentelemetry("sqlalchemy", True),
    "OpenTelemetry psycopg2": opentelemetry("psycopg2", False),
    "OpenTelemetry psycopg2, commenter": opentelemetry("psycopg2", True),
    "OpenTelemetry psycopg": opentelemetry("psycopg", False),
    "OpenTelemetry psycopg, commenter": opentelemetry("psycopg", True),
    "Sentry": sentry,
    "Datadog, DBM": datadog,
    "New Relic": newrelic,
    "Flask-DebugToolbar": debug_toolbar,
    "none": lambda app, engine: list,
}
BEFORE_IMPORT = ("Datadog, DBM", "New Relic")  # patch the driver's module as it is imported, or before it is used


def main(tool: str, kind: str, url: str) -> None:
    import flask

    app = flask.Flask("watched")
    early = TOOLS[tool](app, None) if tool in BEFORE_IMPORT else None
    driver_tool = "psycopg" in tool
    seen = early or (TOOLS[tool](app, None) if driver_tool else None)

    import sqlalchemy as sa

    from tests.models import opt_in, plain

    models = opt_in if kind == "fictive" else plain
    db, item = models.db, models.Item
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    if tool == "Flask-DebugToolbar":
        app.config["SQLALCHEMY_RECORD_QUERIES"] = True
    db.init_app(app)

    @app.get("/read")
    def read() -> Any:
        return {"found": db.session.execute(sa.select(item.name)).all() and 1}

    @app.get("/write")
    def write() -> Any:
        with db.session.begin():
            db.session.add(item(name="written"))
        return {}

    @app.get("/nested")
    def nested() -> Any:
        with db.session.begin():
            with db.session.begin_nested():
                db.session.add(item(name="nested"))
        return {}

    with app.app_context():
        if seen is None:
            seen = TOOLS[tool](app, db.engine)
        with db.engine.connect() as connection:
            connection.execute(sa.text("select 'warm'"))
    assert seen is not None
    client = app.test_client()
    client.get("/read")
    seen()
    print("ready", flush=True)
    for line in sys.stdin:
        answer = client.get(f"/{line.strip()}")
        assert answer.status_code == 200, answer.text
        print(json.dumps(seen()), flush=True)
    with app.app_context():
        db.engine.dispose()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The page `/_fictive/`: the last requests and what each did. In debug mode only."""

from __future__ import annotations

import ipaddress
import linecache
import secrets
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import flask
import sqlalchemy as sa
from werkzeug.sansio.utils import host_is_trusted

from .explain import can_analyze, explain
from .lines import Line
from .report import Report, Statement
from .requests import Reports, reports_of
from .timeline import MOST_ROWS, axis_of, lanes, marks, ms, rows, shortened

__all__ = ["blueprint", "template_context"]

PER_PAGE = 50
_AROUND = 3  # lines of source before and after
_MOST_PARAMETERS = 4000

_token = secrets.token_urlsafe()
"""What a form has to send back: other sites cannot know it."""

blueprint = flask.Blueprint("_fictive", __name__, url_prefix="/_fictive", template_folder="templates")
blueprint.add_app_template_filter(ms, "_fictive_ms")


@blueprint.before_request
def _in_debug_mode_only() -> None:
    app = flask.current_app
    if not app.debug or reports_of(app) is None:
        flask.abort(404)
    if not _is_trusted(flask.request.host):
        # a name that somebody made lead to this machine would let another site read the page
        flask.abort(400, f"The host {flask.request.host!r} is not trusted. Add it to TRUSTED_HOSTS.")


def _is_trusted(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        config = flask.current_app.config
        named = [config.get("SERVER_NAME"), *(config.get("TRUSTED_HOSTS") or [])]
        return host_is_trusted(host, ["localhost", ".localhost", *filter(None, named)])
    return True


@blueprint.get("/")
def index() -> flask.Response:
    reports = list(_reports().recent)[::-1]
    page = max(flask.request.args.get("page", 1, type=int), 1)
    shown = reports[(page - 1) * PER_PAGE : page * PER_PAGE]
    return _render("index.html", reports=shown, page=page, more=len(reports) > page * PER_PAGE, total=len(reports))


@blueprint.get("/<int:number>")
def request(number: int) -> flask.Response:
    report = _find(number)
    return _render("request.html", report=report, lanes=lanes(report), axis=axis_of(report), rows=rows(report))


@blueprint.get("/<int:number>/<int:statement>")
def statement(number: int, statement: int) -> flask.Response:
    report, found = _find_statement(number, statement)
    return _render_statement(report, found)


@blueprint.post("/<int:number>/<int:statement>")
def plan(number: int, statement: int) -> flask.Response:
    report, found = _find_statement(number, statement)
    if not secrets.compare_digest(flask.request.form.get("token", ""), _token):
        flask.abort(400, "The form is not one of this page's.")
    analyze = flask.request.form.get("plan") == "analyze"
    if analyze and not (can_analyze(found.sql) and flask.request.form.get("again")):
        flask.abort(400, "EXPLAIN ANALYZE runs the statement again: only for reads, and only if that is meant.")
    text = error = ""
    engines: Mapping[Any, sa.Engine] = flask.current_app.extensions["sqlalchemy"].engines
    for engine in engines.values():
        try:
            text, error = explain(engine, found.sql, found.parameters, analyze=analyze), ""
            break
        except Exception as raised:  # of another database, or no longer right in this one: shown, whatever it is
            error = error or str(getattr(raised, "orig", None) or raised)
    return _render_statement(report, found, plan=text, error=error, analyze=analyze)


def _render_statement(report: Report, found: Statement, **more: Any) -> flask.Response:
    return _render(
        "statement.html",
        report=report,
        statement=found,
        parameters=_parameters(found.parameters),
        source=_source(found.line),
        can_analyze=can_analyze(found.sql),
        token=_token,
        **more,
    )


def _parameters(parameters: object) -> str:
    if not parameters:
        return ""
    text = repr(parameters)
    return text if len(text) <= _MOST_PARAMETERS else text[:_MOST_PARAMETERS] + "…"


def _source(line: Line | None) -> list[tuple[int, str, bool]]:
    """The line and those around it, with their numbers, and whether it is the line."""
    if line is None:
        return []
    numbers = range(max(line.number - _AROUND, 1), line.number + _AROUND + 1)
    text = [(number, linecache.getline(line.file, number).rstrip("\n")) for number in numbers]
    return [(number, each, number == line.number) for number, each in text if each or number == line.number]


def _reports() -> Reports:
    reports = reports_of(flask.current_app)
    assert reports is not None
    return reports


def _find(number: int) -> Report:
    found = next((report for report in _reports().recent if report.number == number), None)
    if found is None:
        flask.abort(404, "This request is not among the last ones any more.")
    return found


def _find_statement(number: int, statement: int) -> tuple[Report, Statement]:
    report = _find(number)
    if not 1 <= statement <= len(report.statements):
        flask.abort(404)
    return report, report.statements[statement - 1]


def _render(template: str, **context: Any) -> flask.Response:
    text = flask.render_template(f"_fictive/{template}", **template_context(), **context)
    # as a stream, into which Flask-DebugToolbar puts nothing
    response = flask.Response(iter([text.encode()]), mimetype="text/html")
    response.headers["Content-Security-Policy"] = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'; frame-ancestors 'self'"
    )
    response.headers["Cache-Control"] = "no-store"
    response.headers["Referrer-Policy"] = "same-origin"
    return response


def template_context() -> dict[str, Any]:
    """What the templates use besides the report."""
    return {"marks": marks, "shortened": shortened, "clock": _clock, "name": _name, "most": MOST_ROWS}


def _clock(report: Report) -> str:
    return datetime.fromtimestamp(report.started_wall).strftime("%H:%M:%S")


def _name(report: Report) -> str:
    if "path" not in report.request:
        return str(report.request.get("endpoint") or "without a request")
    return f"{report.request['method']} {report.request['path']}"

"""A panel for Flask-DebugToolbar: what the request did with its databases, drawn as on the page `/_fictive/`.

In the app's configuration::

    DEBUG_TB_PANELS = [..., "fictive.report.toolbar.FictivePanel"]
"""

from __future__ import annotations

from typing import Any

import flask
from flask_debugtoolbar.panels import DebugPanel
from markupsafe import Markup, escape

from .page import template_context
from .report import Report
from .requests import report_so_far
from .timeline import axis_of, lanes, ms, rows

__all__ = ["FictivePanel"]


class FictivePanel(DebugPanel):
    """Needs an app whose requests are watched: in debug mode they are, unless `FICTIVE_REPORT` is False."""

    name = "Fictive"
    has_content = True
    _report: Report | None = None

    def process_response(self, request: Any, response: Any) -> None:
        self._report = report_so_far()

    def nav_title(self) -> str:
        return "Database"

    def nav_subtitle(self) -> str:
        if self._report is None:
            return "not watched"
        return f"{self._report.round_trips} round trips, {ms(self._report.database_seconds)}"

    def title(self) -> str:
        return "What this request did with its databases"

    def url(self) -> str:
        return ""

    def content(self) -> str:
        report = self._report
        if report is None:
            return "<p>FICTIVE_REPORT is off.</p>"
        page = flask.render_template(
            "_fictive/panel.html", report=report, lanes=lanes(report), axis=axis_of(report), rows=rows(report),
            **template_context(),
        )  # fmt: skip
        # in a frame, so that neither the toolbar's styles nor the page's reach the other
        return Markup(
            '<iframe title="What this request did with its databases" sandbox="allow-same-origin allow-forms"'
            ' style="width:100%;height:calc(100vh - 120px);border:0" srcdoc="{}"></iframe>'
        ).format(escape(str(page)))

"""The audit table."""

from __future__ import annotations

from typing import Any

from flask import has_request_context, request

from .database import db
from .models import AuditEntry


def record(what: str, subject: object, **details: Any) -> None:
    """Add a line about `subject`, to be written with whatever the session writes next."""
    who = request.headers.get("X-User", "anonymous")[:100] if has_request_context() else "command line"
    db.session.add(AuditEntry(who=who, what=what, subject=str(subject), details=details))

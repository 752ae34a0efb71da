"""Databases that no command may empty or drop."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

__all__ = ["PROTECTED", "why_protected"]

PROTECTED = "FICTIVE_PROTECTED"
"""In the environment or in `app.config`: whether `drop` and `cleanup` are refused."""

_NAMES = ("FLASK_ENV", "APP_ENV", "ENVIRONMENT", "ENV", "DEPLOY_ENV")
_VALUES = ("production", "prod", "live")
_FALSE = ("0", "false", "no", "off", "")

_MARK = "SELECT current_setting('fictive.protected', true)"


def why_protected(engine: sa.Engine | None, config: Mapping[str, Any]) -> str | None:
    """Why the database must not be emptied or dropped, or None.

    The mark in the database itself (`ALTER DATABASE shop SET fictive.protected = on`) always counts. Else
    `FICTIVE_PROTECTED` decides, in the environment before `config`; where it is not set, a variable that says
    "production" does. A database that cannot be reached has no mark. At most one query.
    """
    if engine is not None and engine.dialect.name == "postgresql" and _marked(engine):
        return f"the database {engine.url.database!r} has the setting fictive.protected"
    for where, values in (("the environment", os.environ), ("app.config", config)):
        said = values.get(PROTECTED)
        if said is None:
            continue
        if str(said).strip().lower() in _FALSE:
            return None
        return f"{PROTECTED} is set in {where}"
    for where, values in (("the environment", os.environ), ("app.config", config)):
        for name in _NAMES:
            if str(values.get(name, "")).strip().lower() in _VALUES:
                return f"{name} is {values[name]!r} in {where}"
    return None


def _marked(engine: sa.Engine) -> bool:
    try:
        with engine.connect() as connection:
            said = connection.exec_driver_sql(_MARK).scalar()
    except sa.exc.OperationalError:
        return False
    return str(said or "").strip().lower() not in _FALSE

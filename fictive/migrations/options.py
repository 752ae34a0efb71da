"""What Alembic's `context.configure()` is given."""

from __future__ import annotations

from typing import Any

from alembic.runtime.plugins import Plugin
from alembic.util import DispatchPriority

from .checks import move_to_tables
from .notify_changes import compare

__all__ = ["options"]

_CHECKS = "fictive.checks_of_columns"
_TRIGGERS = "fictive.notify_changes"

Plugin(_CHECKS).add_autogenerate_comparator(
    move_to_tables, "schema", "fictive_checks_of_columns", priority=DispatchPriority.FIRST
)
# the last, since it looks which tables are created and dropped
Plugin(_TRIGGERS).add_autogenerate_comparator(
    compare, "schema", "fictive_notify_changes", qualifier="postgresql", priority=DispatchPriority.LAST
)


def options() -> dict[str, Any]:
    """Options for `Migrate(app, db, **options())`, or for `context.configure(**options())` in `env.py`.

    Autogenerate then sees two more things. The triggers of `notify_changes`, on PostgreSQL, which it creates, drops,
    and replaces where a key has changed. And CHECK constraints, by name: Alembic can compare them but does not unasked
    (Alembic documentation, "Opt-in plugins"), and those given to a column, not to a table, it leaves out of new tables
    too. A changed condition under the same name it does not see. Triggers take one query more. Sends nothing itself.
    """
    return {
        "autogenerate_plugins": [
            "alembic.autogenerate.*",
            "alembic.ext.checkconstraint_byname",
            _CHECKS,
            _TRIGGERS,
        ]
    }

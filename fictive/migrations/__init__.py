"""For Alembic and Flask-Migrate: one deployment at a time, a `lock_timeout` with further tries, file names, triggers.

`env.py` calls `run`, and `Migrate` is given the rest; importing it adds `op.create_notify_changes` and
`op.drop_notify_changes` to Alembic's operations. See the page "Migrations".
"""

try:
    import alembic.runtime.plugins as _plugins  # noqa: F401
except ImportError as error:
    raise ImportError(
        "fictive.migrations needs Alembic 1.19.2 or newer (extra fictive[migrations]):"
        " pip install flask-migrate 'alembic>=1.19.2'",
        name="alembic",
    ) from error

from .files import dated_file_names
from .notify_changes import CreateNotifyChanges, DropNotifyChanges
from .options import options
from .running import run

__all__ = ["CreateNotifyChanges", "DropNotifyChanges", "dated_file_names", "options", "run"]

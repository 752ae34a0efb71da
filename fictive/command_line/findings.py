"""What `doctor` finds."""

from __future__ import annotations

import dataclasses
import enum

__all__ = ["Finding", "Severity"]


class Severity(str, enum.Enum):
    ERROR = "error"
    """Something fails, or gives wrong results."""
    WARNING = "warning"
    """Something is slow, fragile or about to fail."""
    INFO = "info"
    """A fact; nothing is wrong."""


@dataclasses.dataclass(frozen=True)
class Finding:
    check: str
    """The name of the check, for filters: `foreign-key-index`."""
    severity: Severity
    what: str
    remedy: str = ""
    bind: str = ""

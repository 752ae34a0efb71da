"""What the tables of most apps have in common. Names only; each is usable on its own."""

from __future__ import annotations

from .filters import FilterSet
from .keys import PublicIdMixin, UUIDMixin, UUIDv7Mixin, uuid7
from .lazy_loads import allow_lazy_loads, set_lazy_loads
from .naming import check_names, naming_convention
from .repository import KeysetPage, Page, Repository
from .soft_delete import SoftDeleteMixin, hide_deleted, unique_among_live, with_deleted
from .timestamps import TimestampMixin
from .versions import ConcurrentModificationError, VersionMixin

__all__ = [
    "ConcurrentModificationError",
    "FilterSet",
    "KeysetPage",
    "Page",
    "PublicIdMixin",
    "Repository",
    "SoftDeleteMixin",
    "TimestampMixin",
    "UUIDMixin",
    "UUIDv7Mixin",
    "VersionMixin",
    "allow_lazy_loads",
    "check_names",
    "hide_deleted",
    "naming_convention",
    "set_lazy_loads",
    "unique_among_live",
    "uuid7",
    "with_deleted",
]

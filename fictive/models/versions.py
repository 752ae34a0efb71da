"""Two who change one row: the second is told, and does not win."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, declared_attr, mapped_column
from sqlalchemy.orm.exc import StaleDataError

from ..errors import ConfigurationError
from .timestamps import LAST

__all__ = ["ConcurrentModificationError", "VersionMixin"]

ConcurrentModificationError = StaleDataError
"""What a flush raises when a row was changed or deleted since it was read; SQLAlchemy's own error, by a name that
says what happened."""


class VersionMixin:
    """`version`: goes up with every UPDATE, and an UPDATE or DELETE of an object whose row has moved on raises
    `ConcurrentModificationError`; nothing of that flush is written.

    SQLAlchemy's version counter (SQLAlchemy documentation, "Configuring a Version Counter"): the flush asks for the
    version that was read, in the same statement, so it costs nothing. To check what a browser read a minute ago, let
    it send the version along and compare before the change. UPDATE statements of your own, and upserts, let it go up
    too and check nothing.

    Raises `ConfigurationError` at class creation where the counter cannot be put in force.
    """

    if TYPE_CHECKING:
        version: Mapped[int]
    else:

        @declared_attr
        def version(cls):
            attribute = mapped_column(sa.Integer, nullable=False, default=1, server_default="1", sort_order=LAST)
            column = attribute.column
            column.onupdate = sa.ColumnDefault(column + 1, for_update=True)
            return attribute

        @declared_attr.directive
        def __mapper_args__(cls):
            return _counter(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "__mapper_args__" in cls.__dict__ and "__mapper__" not in cls.__dict__:
            _add_counter(cls, cls.__dict__["__mapper_args__"])
        super().__init_subclass__(**kwargs)
        mapper = sa.inspect(cls, raiseerr=False) if "__mapper__" in cls.__dict__ else None
        if mapper is not None and mapper.version_id_col is None:
            raise ConfigurationError(
                f"{cls.__name__} has __mapper_args__ of its own and VersionMixin after its base, so that its version "
                f"would not be looked at. Write VersionMixin first: class {cls.__name__}(VersionMixin, ...)."
            )


def _add_counter(cls: Any, own: Any) -> None:
    """A model's own `__mapper_args__` would hide the mixin's."""

    def both(cls: Any) -> dict[str, Any]:
        given = own.__get__(None, cls) if hasattr(own, "__get__") else own
        return {**_counter(cls), **given}

    cls.__mapper_args__ = declared_attr.directive(both)


def _counter(cls: Any) -> dict[str, Any]:
    for base in cls.__mro__[1:]:
        if "__mapper__" in base.__dict__ and sa.inspect(base).version_id_col is not None:
            return {}  # inherited
    return {"version_id_col": cls.version}

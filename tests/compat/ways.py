"""Ways to run the same code."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
from flask_sqlalchemy import SQLAlchemy

from fictive.errors import AlreadyCommittedWarning, UnsavedChangesWarning
from fictive.flask_sqlalchemy import OptInTransactionMixin


class DB(OptInTransactionMixin, SQLAlchemy):
    pass


@dataclasses.dataclass(frozen=True)
class Way:
    """One of the ways to run the same code: `plain`, or on fictive under a `FICTIVE_WRITES_OUTSIDE`."""

    name: str

    @property
    def fictive(self) -> bool:
        return self.name != "plain"

    @property
    def db_class(self) -> type[SQLAlchemy]:
        return DB if self.fictive else SQLAlchemy

    @property
    def config(self) -> dict[str, Any]:
        return {"FICTIVE_WRITES_OUTSIDE": self.name} if self.fictive else {}

    @property
    def at_once(self) -> bool:
        """Whether a write outside a transaction stands alone."""
        return self.name == "commit"

    def says_already_committed(self, match: str = "") -> contextlib.AbstractContextManager[Any]:
        """Where `rollback()` cannot undo, fictive says so."""
        return pytest.warns(AlreadyCommittedWarning, match=match) if self.at_once else contextlib.nullcontext()

    def says_unsaved(self, match: str = "") -> contextlib.AbstractContextManager[Any]:
        """Where the context ends with changes no one wrote, fictive says so."""
        return pytest.warns(UnsavedChangesWarning, match=match) if self.fictive else contextlib.nullcontext()

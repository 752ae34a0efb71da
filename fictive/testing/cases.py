"""The sandbox for `unittest`."""

from __future__ import annotations

import unittest
from collections.abc import Iterable
from typing import Any, ClassVar

import sqlalchemy as sa

from .sandbox import Sandbox, engines_of, sandbox

__all__ = ["SandboxTestCase"]


class SandboxTestCase(unittest.TestCase):
    """Each test runs in a sandbox, and the class in one around them.

    Set `app` to the Flask app, or override `engines()`. Rows that `set_up_rows()` makes are there in each test of the
    class.
    """

    app: ClassVar[Any] = None
    sandbox: Sandbox
    """That of the test."""

    @classmethod
    def engines(cls) -> Iterable[sa.Engine]:
        return engines_of(cls.app)

    @classmethod
    def set_up_rows(cls) -> None:
        """Make rows for all tests of the class."""

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.enterClassContext(sandbox(*cls.engines()))
        cls.set_up_rows()

    def setUp(self) -> None:
        super().setUp()
        self.sandbox = self.enterContext(sandbox(*self.engines()))

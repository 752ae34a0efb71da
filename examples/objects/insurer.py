"""Somebody else's API."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from typing import cast

from flask import current_app


class Insurer:
    """Says for how much an object can be insured. As such services do, it takes its time: `seconds`."""

    def __init__(self, seconds: float = 0.25) -> None:
        self.seconds = seconds

    def __call__(self, name: str) -> int:
        time.sleep(self.seconds)
        return 1000 + zlib.crc32(name.encode()) % 90_000


def ask(name: str) -> int:
    """The sum that the app's insurer names, in euros."""
    return cast("Callable[[str], int]", current_app.config["INSURER"])(name)

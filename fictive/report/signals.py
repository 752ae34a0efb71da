"""Signals for whoever counts: sent only where somebody listens."""

from __future__ import annotations

from blinker import Namespace

__all__ = ["request_reported", "transaction_ended"]

_signals = Namespace()

request_reported = _signals.signal("fictive-request-reported")
"""`handler(app, report)`: a request, or another app context that used a session, has ended. `report` is a `Report`."""

transaction_ended = _signals.signal("fictive-transaction-ended")
"""`handler(app, transaction)`: a transaction of a session has ended. `transaction` is a `Transaction`."""

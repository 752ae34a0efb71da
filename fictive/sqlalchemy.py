"""For any SQLAlchemy session: scripts, jobs, and frameworks other than Flask. Names only; the code is below."""

from __future__ import annotations

from .config import Settings, UnsavedChanges, WritesOutside
from .drivers.sqlite import TakeTurnsPool
from .session.optin import OptInSession
from .session.parking import ParkingPool
from .session.scoped import OptInScopedSession, sessionmaker
from .session.transaction import Transaction, TransactionState

__all__ = [
    "OptInScopedSession",
    "OptInSession",
    "ParkingPool",
    "Settings",
    "TakeTurnsPool",
    "Transaction",
    "TransactionState",
    "UnsavedChanges",
    "WritesOutside",
    "sessionmaker",
]

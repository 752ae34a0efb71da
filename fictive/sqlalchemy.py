"""For any SQLAlchemy session: scripts, jobs, and frameworks other than Flask. Names only; the code is below."""

from __future__ import annotations

from .config import Settings, UnsavedChanges, WritesOutside
from .drivers.sqlite import TakeTurnsPool
from .rows.many_to_many import LinkChanges, m2m_add, m2m_clear, m2m_remove, m2m_set
from .session.optin import OptInSession
from .session.parking import ParkingPool
from .session.scoped import OptInScopedSession, sessionmaker
from .session.transaction import Transaction, TransactionState

__all__ = [
    "LinkChanges",
    "OptInScopedSession",
    "OptInSession",
    "ParkingPool",
    "Settings",
    "TakeTurnsPool",
    "Transaction",
    "TransactionState",
    "UnsavedChanges",
    "WritesOutside",
    "m2m_add",
    "m2m_clear",
    "m2m_remove",
    "m2m_set",
    "sessionmaker",
]

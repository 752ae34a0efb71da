"""For any SQLAlchemy session: scripts, jobs, and frameworks other than Flask. Names only; the code is below."""

from __future__ import annotations

from .config import Settings, UnsavedChanges, WritesOutside
from .databases.cleanup import cleanup_tables
from .databases.create import create_database, database_exists, drop_database
from .drivers.sqlite import TakeTurnsPool
from .locks.advisory import advisory_lock, lock_key
from .locks.rows import claim
from .locks.tables import LockMode, lock_tables
from .rows.bulk import Upserted, insert_many, update_many, upsert_many
from .rows.bulk_methods import InsertManyDescriptor, UpdateManyDescriptor, UpsertManyDescriptor
from .rows.descriptors import FindOrCreateDescriptor, GetOrCreateDescriptor, UpdateOrCreateDescriptor
from .rows.many_to_many import LinkChanges, m2m_add, m2m_clear, m2m_remove, m2m_set
from .session.optin import OptInSession
from .session.parking import ParkingPool
from .session.scoped import OptInScopedSession, sessionmaker
from .session.transaction import Transaction, TransactionState

__all__ = [
    "FindOrCreateDescriptor",
    "GetOrCreateDescriptor",
    "InsertManyDescriptor",
    "LinkChanges",
    "LockMode",
    "OptInScopedSession",
    "OptInSession",
    "ParkingPool",
    "Settings",
    "TakeTurnsPool",
    "Transaction",
    "TransactionState",
    "UnsavedChanges",
    "UpdateManyDescriptor",
    "UpdateOrCreateDescriptor",
    "UpsertManyDescriptor",
    "Upserted",
    "WritesOutside",
    "advisory_lock",
    "claim",
    "cleanup_tables",
    "create_database",
    "database_exists",
    "drop_database",
    "insert_many",
    "lock_key",
    "lock_tables",
    "m2m_add",
    "m2m_clear",
    "m2m_remove",
    "m2m_set",
    "sessionmaker",
    "update_many",
    "upsert_many",
]

"""For any SQLAlchemy session: scripts, jobs, and frameworks other than Flask. Names only; the code is below."""

from __future__ import annotations

from .changes.new_rows import wait_for_rows
from .changes.notify_triggers import notify_changes
from .changes.row_change import wait_for_row_change
from .config import Settings, UnsavedChanges, WritesOutside
from .connection.pool import BorrowingPool
from .connection.pooler import set_pooler
from .connection.replicas import on_primary, set_replicas
from .databases.cleanup import cleanup_tables
from .databases.create import create_database, database_exists, drop_database
from .drivers.sqlite import TakeTurnsPool
from .errors import NotFoundError
from .locks.advisory import advisory_lock, lock_key
from .locks.rows import claim
from .locks.tables import LockMode, LockModeName, lock_tables
from .rows.bulk import Upserted, insert_many, update_many, upsert_many
from .rows.descriptors import (
    FindOrCreateDescriptor,
    GetOrCreateDescriptor,
    InsertManyDescriptor,
    UpdateManyDescriptor,
    UpdateOrCreateDescriptor,
    UpsertManyDescriptor,
)
from .rows.many_to_many import LinkChanges, m2m_add, m2m_clear, m2m_remove, m2m_set
from .session.blocks import (
    TransactionBlock,
    get_transaction,
    on_commit,
    on_rollback,
    run_transaction,
    transaction,
    transaction_required,
)
from .session.contexts import create_db_context, create_db_dependency
from .session.model_events import after_commit_of
from .session.options import IsolationLevel
from .session.scoped import OptInScopedSession, sessionmaker
from .session.session import OptInSession
from .session.transaction import Rollback, Transaction, TransactionState

__all__ = [
    "BorrowingPool",
    "FindOrCreateDescriptor",
    "GetOrCreateDescriptor",
    "InsertManyDescriptor",
    "IsolationLevel",
    "LinkChanges",
    "LockMode",
    "LockModeName",
    "NotFoundError",
    "OptInScopedSession",
    "OptInSession",
    "Rollback",
    "Settings",
    "TakeTurnsPool",
    "Transaction",
    "TransactionBlock",
    "TransactionState",
    "UnsavedChanges",
    "UpdateManyDescriptor",
    "UpdateOrCreateDescriptor",
    "UpsertManyDescriptor",
    "Upserted",
    "WritesOutside",
    "advisory_lock",
    "after_commit_of",
    "claim",
    "cleanup_tables",
    "create_database",
    "create_db_context",
    "create_db_dependency",
    "database_exists",
    "drop_database",
    "get_transaction",
    "insert_many",
    "lock_key",
    "lock_tables",
    "m2m_add",
    "m2m_clear",
    "m2m_remove",
    "m2m_set",
    "notify_changes",
    "on_commit",
    "on_primary",
    "on_rollback",
    "run_transaction",
    "sessionmaker",
    "set_pooler",
    "set_replicas",
    "transaction",
    "transaction_required",
    "update_many",
    "upsert_many",
    "wait_for_row_change",
    "wait_for_rows",
]

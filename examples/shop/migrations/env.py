"""Alembic's environment: the app's database and its models."""

from __future__ import annotations

from alembic import context
from flask import current_app

from fictive.migrations import run

migrate = current_app.extensions["migrate"]
metadata, engine = migrate.db.metadata, migrate.db.engine


def run_migrations() -> None:
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=metadata, **migrate.configure_args)
        with context.begin_transaction():
            context.run_migrations()


if context.is_offline_mode():
    context.configure(url=engine.url, target_metadata=metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    run(run_migrations, engine)  # one process at a time, and none that others wait behind

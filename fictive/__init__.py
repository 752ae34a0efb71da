"""Opt-in transactions for Flask-SQLAlchemy on PostgreSQL."""

__version__ = "0.1.0"

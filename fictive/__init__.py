"""Opt-in transactions for Flask-SQLAlchemy on PostgreSQL."""

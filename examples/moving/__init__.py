"""A small app on plain Flask-SQLAlchemy, and its way to fictive: `plain.py`, `begin.py`, `done.py`."""

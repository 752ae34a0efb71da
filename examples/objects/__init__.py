"""A museum's objects: a small Flask app that runs on plain Flask-SQLAlchemy and on fictive."""

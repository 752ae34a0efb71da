"""The commands of `flask fictive` and `python -m fictive`."""

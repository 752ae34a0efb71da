"""Whole databases: making, dropping and emptying them."""

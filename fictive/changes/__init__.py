"""Waiting for what others write: a row that changes, rows that appear."""

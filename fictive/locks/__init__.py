"""Locks on tables, on rows, and on keys of the application's own."""

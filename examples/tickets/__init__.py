"""Tickets for concerts: two buyers and one seat, a queue worker, and a page that waits."""

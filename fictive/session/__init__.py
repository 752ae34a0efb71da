"""The opt-in session: when a connection is taken, what begins and ends a transaction."""

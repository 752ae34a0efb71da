"""The connection object of a session: it borrows a server connection for a statement, a transaction or a block."""

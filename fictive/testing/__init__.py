"""What tests of a database need: a server of their own, and its wire."""

"""Apps to read and to run, each in a package of its own."""

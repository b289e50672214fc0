"""A PostgreSQL server for tests, the demo and development, from a package or an installation of the machine."""

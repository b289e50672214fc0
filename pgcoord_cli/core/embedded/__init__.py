"""A PostgreSQL that comes with pgcoord, for tests, the demo and development."""

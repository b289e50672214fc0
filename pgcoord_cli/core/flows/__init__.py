"""Executions that depend on each other: creating, claiming, running, ending, dispatching and repairing them."""

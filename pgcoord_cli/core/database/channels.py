"""Names of the NOTIFY channels. Each includes the schema, so that two clusters in one database never wake each other.

A notification only wakes (rule I7): its payload is never used, and a waiting program reads the tables once in a poll
interval without any.
"""

from __future__ import annotations

POLL_SECONDS = 1.0
"""How long a program waits for a notification before it reads the tables without one."""


def commits(schema: str) -> str:
    """Wakes the leader: requests have been enqueued."""
    return f"{schema}.commits"


def leadership(schema: str) -> str:
    """Wakes programs that wait for a leader: the lease was taken or released."""
    return f"{schema}.leader"


def data(schema: str) -> str:
    """Wakes the watches of keys: a batch has been committed."""
    return f"{schema}.data"


def reply(schema: str, client: str) -> str:
    """Wakes one client process: some of its requests have been settled. `client` is 12 hex digits."""
    return f"{schema}.reply.{client}"


def outbox(schema: str, table: str) -> str:
    """Wakes the tails of an outbox: events have been committed."""
    return f"{schema}.{table}"


def executions(schema: str) -> str:
    """Wakes the workers: executions have become eligible."""
    return f"{schema}.executions"

"""`pgcoord tail` in separate processes, and queries for tests of tails."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from uuid import uuid4

import psycopg

from pgcoord_cli.settings import Settings
from tests.asking import until, value
from tests.faults.program_process import ProgramProcess, starter

EXECUTION = "00000000-0000-0000-0000-000000000001"

Sql = psycopg.Connection[Any]
Record = dict[str, Any]


class TailProcess(ProgramProcess):
    """A running `pgcoord tail …`."""

    def record(self, kind: str) -> Record:
        """Returns the next record of that type, skipping others; for `-o json`."""
        while True:
            record = json.loads(self.line())
            if record["type"] == kind:
                return dict(record)

    def ids(self, number: int) -> list[int]:
        """Returns the ids of the next events, skipping other records."""
        return [self.record("event")["event_id"] for _ in range(number)]


StartTail = Callable[..., TailProcess]


def tail_starter(settings: Callable[[], Settings]) -> AbstractContextManager[StartTail]:
    """Starts `pgcoord tail …`."""
    return starter(TailProcess, ["tail"], settings)


# -- on the server


def add(sql: Sql, number: int = 1, table: str = "lease_events", **values: Any) -> list[int]:
    """Inserts events as a service does; returns their ids."""
    kind = "event_type" if table == "lease_events" else "outcome"
    defaults = {"execution_id": EXECUTION, kind: "acquired" if table == "lease_events" else "success"}
    row = defaults | values
    rows = sql.execute(
        f"INSERT INTO pgcoord.{table} ({', '.join(row)})"
        f" SELECT {', '.join(['%s'] * len(row))} FROM generate_series(1, {number}) RETURNING event_id",
        [*row.values()],
    )
    return [event_id for (event_id,) in rows.fetchall()]


def add_named(sql: Sql, number: int) -> list[str]:
    """Inserts events of one new execution each; returns these."""
    names = [str(uuid4()) for _ in range(number)]
    for name in names:
        add(sql, execution_id=name)
    return names


def add_and_roll_back(sql: Sql, number: int = 1, table: str = "lease_events") -> list[int]:
    """Inserts events and rolls back; returns their ids, which stay unused."""
    with sql.transaction(force_rollback=True):
        return add(sql, number, table)


def wake_until(sql: Sql) -> int | None:
    """Returns until when tails of the lease events have asked for notifications, in microseconds; None: never."""
    microseconds: int | None = value(sql, "SELECT pg_sequence_last_value('pgcoord.lease_events_wake_until')")
    return microseconds


def until_asleep(sql: Sql) -> None:
    """Waits until the first tail has printed all events and waits for more, so that its start position is fixed."""
    until(lambda: wake_until(sql) is not None)


def terminate(sql: Sql, application: str) -> int:
    """Terminates the sessions of that application in this database; returns their number."""
    return sql.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = %s AND datname = current_database()",
        [application],
    ).rowcount


def until_gone(sql: Sql, application: str) -> None:
    """Waits until there is no session of that application in this database."""
    text = (
        "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = %s AND datname = current_database())"
    )
    until(lambda: value(sql, text, application))

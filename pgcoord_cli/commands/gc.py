"""`pgcoord gc`: deletes rows that no client, leader or tail can need any more. Made for cron."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pgcoord_cli.commands.framework import command, duration, noun, output_of, row_count
from pgcoord_cli.settings import LONGEST_DURATION

if TYPE_CHECKING:
    from pgcoord_cli.core.gc import Progress

app = noun("Delete settled commit requests and old events that are no longer needed.")

REQUESTS, LEASES, COMPLETIONS = "commit_requests", "lease_events", "completion_events"

BatchSize = Annotated[
    int,
    typer.Option("--batch-size", metavar="N", min=1, callback=row_count("--batch-size"), help="Rows per transaction."),
]
MaxRuntime = Annotated[
    str, typer.Option("--max-runtime", metavar="DURATION", help="For each table, start no batch after this time.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Count the rows that would be deleted; change nothing.")]


REQUESTS_HELP = """Delete settled commit requests that are older than the retention. Pending ones are never deleted.

\b
Examples:
  pgcoord gc commit-requests
  pgcoord gc commit-requests --older-than 1h --dry-run
  pgcoord gc commit-requests -q --max-runtime 5m
"""

LEASES_HELP = """Delete lease events that are older than the retention and that every subscription has passed.

A tail that resumes from an older cursor exits 8, with the cursor to resume from.

\b
Examples:
  pgcoord gc lease-events --older-than 7d
  pgcoord gc lease-events -o json | jq .lease_events.furthest_behind
"""

COMPLETIONS_HELP = """\
Delete dispatched completion events that are older than the retention and that every subscription has passed.

\b
Examples:
  pgcoord gc completion-events --older-than 7d
  pgcoord gc completion-events --dry-run
"""

ALL_HELP = """Delete settled commit requests, lease events and completion events.

\b
Examples:
  pgcoord gc all
  pgcoord gc all -q --max-runtime 5m
"""


def _register(name: str, tables: Sequence[str], default: str, text: str) -> None:
    """Registers one command; the commands differ in their tables, the default retention and the help."""
    help_of_retention = f"Retention; at least 60s. [default: {default}]"

    def collect(
        ctx: typer.Context,
        older_than: str | None = typer.Option(None, "--older-than", metavar="DURATION", help=help_of_retention),
        batch_size: BatchSize = 1000,
        max_runtime: MaxRuntime = "30s",
        dry_run: DryRun = False,
    ) -> None:
        _collect(ctx, tables, older_than, batch_size, max_runtime, dry_run=dry_run)

    collect.__doc__ = text
    command(app, name)(collect)


_register("commit-requests", [REQUESTS], "10m", REQUESTS_HELP)
_register("lease-events", [LEASES], "1d", LEASES_HELP)
_register("completion-events", [COMPLETIONS], "1d", COMPLETIONS_HELP)
_register("all", [REQUESTS, LEASES, COMPLETIONS], "requests 10m, events 1d", ALL_HELP)


def _collect(
    ctx: typer.Context, tables: Sequence[str], older_than: str | None, batch_size: int, max_runtime: str, *,
    dry_run: bool,
) -> None:  # fmt: skip
    from pgcoord_cli.core import gc
    from pgcoord_cli.core.database import session

    settings, out = output_of(ctx)
    retention = None
    if older_than is not None:
        retention = gc.check_retention(duration("--older-than", longest=LONGEST_DURATION)(older_than) or 0)
    seconds = duration("--max-runtime")(max_runtime) or 0
    document: dict[str, dict[str, Any]] = {}
    with session.command_session(settings, "gc", writes=not dry_run) as conn:
        for table in tables:
            ends_at = time.monotonic() + seconds

            def go_on(deleted: int, table: str = table, ends_at: float = ends_at) -> bool:
                out.detail(f"{table}: {deleted} deleted")
                return time.monotonic() < ends_at

            document[table] = _collect_table(conn, table, retention, None if dry_run else batch_size, go_on)
    for found in document.values():
        if found.get("held_back") and not out.is_json:
            out.warn(found["held_back"])
    is_something_done = any(found["deleted"] or found.get("orphaned") for found in document.values())
    if is_something_done or out.is_json or not out.quiet:
        out.document(document)


def _collect_table(
    conn: Any, table: str, retention: float | None, batch_size: int | None, go_on: Progress
) -> dict[str, Any]:
    """Deletes from one table and returns the JSON record; only counts if `batch_size` is None."""
    from pgcoord_cli.core import gc
    from pgcoord_cli.core.events.outbox import OUTBOXES

    if table == REQUESTS:
        seconds = retention or gc.DEFAULT_RETENTION
        if batch_size is None:
            return gc.count_commit_requests(conn, seconds)._asdict()
        return gc.collect_commit_requests(conn, seconds, batch_size, go_on)._asdict()
    outbox = next(outbox for outbox in OUTBOXES.values() if outbox.table == table)
    seconds = retention or gc.DEFAULT_EVENT_RETENTION
    if batch_size is None:
        return gc.count_events(conn, outbox, seconds)._asdict()
    return gc.collect_events(conn, outbox, seconds, batch_size, go_on)._asdict()

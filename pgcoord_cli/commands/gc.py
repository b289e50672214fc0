"""`pgcoord gc`: delete what nobody can ask for any more. Made for cron."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from pgcoord_cli.commands.framework import command, duration, noun, output_of, row_count
from pgcoord_cli.settings import LONGEST_DURATION

app = noun("Collect garbage: settled requests that nobody can ask for any more.")


@command(app, "commit-requests")
def commit_requests(
    ctx: typer.Context,
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="DURATION", help="Keep what was settled since; at least 60s.")
    ] = "10m",
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size", metavar="N", min=1, callback=row_count("--batch-size"), help="Rows a transaction."
        ),
    ] = 1000,
    max_runtime: Annotated[
        str, typer.Option("--max-runtime", metavar="DURATION", help="Begin no batch after that long.")
    ] = "30s",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted; change nothing.")] = False,
) -> None:
    """Delete settled commit requests that are older than the retention. Pending ones are never deleted.

    \b
    Examples:
      pgcoord gc commit-requests
      pgcoord gc commit-requests --older-than 1h --dry-run
      pgcoord gc commit-requests -q --max-runtime 5m
    """
    from pgcoord_cli.core import gc, session

    settings, out = output_of(ctx)
    retention = gc.check_retention(duration("--older-than", longest=LONGEST_DURATION)(older_than) or 0)
    ends_at = time.monotonic() + (duration("--max-runtime")(max_runtime) or 0)

    def go_on(deleted: int) -> bool:
        out.detail(f"commit_requests: {deleted} deleted")
        return time.monotonic() < ends_at

    with session.command_session(settings, "gc", writes=not dry_run) as conn:
        if dry_run:
            collected = gc.count_commit_requests(conn, retention)
        else:
            collected = gc.collect_commit_requests(conn, retention, batch_size, go_on)
    if collected.deleted or collected.orphaned or out.is_json or not settings.quiet:
        out.document({"commit_requests": collected._asdict()})

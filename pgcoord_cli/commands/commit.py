"""`pgcoord commit`: shows commit requests and their outcomes."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

import typer

from pgcoord_cli.commands.framework import Limit, command, identifier, noun, output_of
from pgcoord_cli.errors import ConditionFalse, UsageError

app = noun("Show commit requests and their outcomes.")

COLUMNS = ["id", "request_id", "status", "commit_version", "read_version", "epoch", "created_at", "reason"]
RequestId = Annotated[str, typer.Argument(metavar="REQUEST_ID", help="The UUID of the request, made by its client.")]
STATUSES = "pending, committed, conflict, too_old, rejected, orphaned"


@command(app, "list")
def list_(
    ctx: typer.Context,
    status: Annotated[
        str | None, typer.Option("--status", metavar="STATUS", help=f"Only requests with this status: {STATUSES}.")
    ] = None,
    limit: Limit = 20,
) -> None:
    """List commit requests, newest first.

    \b
    Examples:
      pgcoord commit list
      pgcoord commit list --status rejected --limit 5
      pgcoord commit list -o jsonl
    """
    from pgcoord_cli.core.commits import requests
    from pgcoord_cli.core.database import session

    settings, out = output_of(ctx)
    wanted = None
    if status is not None:
        if status not in tuple(requests.Status):
            raise UsageError(f"--status: {status!r} is not one of {STATUSES}")
        wanted = requests.Status(status)
    with session.command_session(settings, "commit list", writes=False) as conn:
        found = requests.list_requests(conn, wanted, limit)
    out.rows(COLUMNS, [request._asdict() for request in found], empty="no commit requests")


@command(app, "show")
def show(
    ctx: typer.Context,
    request_id: RequestId,
) -> None:
    """Show the outcome of one request; exit 3 if it is not stored.

    \b
    Examples:
      pgcoord commit show 7f8d2c9e-5a6b-4c3d-9e1f-0a2b3c4d5e6f
      pgcoord commit show 7f8d2c9e-5a6b-4c3d-9e1f-0a2b3c4d5e6f -o json
    """
    from pgcoord_cli.core.commits import requests
    from pgcoord_cli.core.database import session

    settings, out = output_of(ctx)
    wanted = _request_id(request_id)
    with session.command_session(settings, "commit show", writes=False) as conn:
        request = requests.find_request(conn, wanted)
        if request is None:
            raise _absent(wanted)
        requests.confirm(conn, request)
    out.document(request._asdict())


@command(app, "explain")
def explain(ctx: typer.Context, request_id: RequestId) -> None:
    """Show what a request read and wrote, its outcome, and the commit that it conflicted with.

    \b
    Examples:
      pgcoord commit explain 7f8d2c9e-5a6b-4c3d-9e1f-0a2b3c4d5e6f
      pgcoord commit explain 7f8d2c9e-5a6b-4c3d-9e1f-0a2b3c4d5e6f -o json
    """
    from pgcoord_cli.core.commits import explain as explaining
    from pgcoord_cli.core.database import session

    settings, out = output_of(ctx)
    wanted = _request_id(request_id)
    with session.command_session(settings, "commit explain", writes=False) as conn:
        explanation = explaining.explain(conn, wanted)
    if explanation is None:
        raise _absent(wanted)
    out.document(explanation)


def _request_id(text: str) -> UUID:
    return identifier(text, "REQUEST_ID", "list request ids with: pgcoord commit list")


def _absent(request_id: UUID) -> ConditionFalse:
    return ConditionFalse(
        f"there is no request {request_id}",
        hint="it was never enqueued, or it was settled and then deleted by garbage collection",
    )

"""`pgcoord commit`: shows commit requests and their outcomes."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

import typer

from pgcoord_cli.commands.framework import Limit, command, duration, identifier, noun, output_of
from pgcoord_cli.errors import ConditionFalse, UsageError
from pgcoord_cli.settings import LONGEST_DURATION

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
def explain(
    ctx: typer.Context,
    request_id: Annotated[
        str | None, typer.Argument(metavar="REQUEST_ID", help="The UUID of the request, made by its client.")
    ] = None,
    hot: Annotated[
        bool,
        typer.Option("--hot", help="List the keys over which the most requests conflicted."),
    ] = False,
    since: Annotated[
        str, typer.Option("--since", metavar="DURATION", help="With --hot: only requests of this last time.")
    ] = "10m",
    limit: Limit = 20,
) -> None:
    """Show what a request read and wrote, its outcome, and the commit that it conflicted with.

    With --hot, list the keys that the most requests conflicted over, and their numbers of conflicts. At most the newest
    10,000 requests are read for it.

    \b
    Examples:
      pgcoord commit explain 7f8d2c9e-5a6b-4c3d-9e1f-0a2b3c4d5e6f
      pgcoord commit explain 7f8d2c9e-5a6b-4c3d-9e1f-0a2b3c4d5e6f -o json
      pgcoord commit explain --hot --since 1h --limit 5
    """
    if (request_id is None) != hot:
        raise UsageError("give either REQUEST_ID or --hot", hint="list request ids with: pgcoord commit list")
    if request_id is None:
        _list_conflicting_keys(ctx, duration("--since", longest=LONGEST_DURATION)(since), limit)
    else:
        _explain(ctx, _request_id(request_id))


def _explain(ctx: typer.Context, request_id: UUID) -> None:
    from pgcoord_cli.core.commits import explain as explaining
    from pgcoord_cli.core.database import session

    settings, out = output_of(ctx)
    with session.command_session(settings, "commit explain", writes=False) as conn:
        explanation = explaining.explain(conn, request_id)
    if explanation is None:
        raise _absent(request_id)
    out.document(explanation)


def _list_conflicting_keys(ctx: typer.Context, seconds: float | None, limit: int) -> None:
    from pgcoord_cli.core.commits.conflicting_keys import conflicting_keys
    from pgcoord_cli.core.database import session

    settings, out = output_of(ctx)
    with session.command_session(settings, "commit explain", writes=False) as conn:
        found = conflicting_keys(conn, seconds, limit)
    out.rows(
        ["key", "conflicts", "last_at", "encoding"],
        [key.record() for key in found.keys],
        empty=f"no conflicts among {found.requests} requests",
    )
    if found.is_cut:
        out.note(f"only the newest {found.requests} requests were read")


def _request_id(text: str) -> UUID:
    return identifier(text, "REQUEST_ID", "list request ids with: pgcoord commit list")


def _absent(request_id: UUID) -> ConditionFalse:
    return ConditionFalse(
        f"there is no request {request_id}",
        hint="it was never enqueued, or it was settled and then deleted by garbage collection",
    )

"""`pgcoord execution`: claims executions, renews their leases and ends them, from a shell."""

from __future__ import annotations

from typing import Annotated

import typer

from pgcoord_cli.commands.framework import command, duration, identifier, noun, output_of
from pgcoord_cli.errors import ConditionFalse
from pgcoord_cli.settings import check_text

app = noun("Claim executions, renew their leases, and end them.")

ExecutionId = Annotated[str, typer.Argument(metavar="EXECUTION_ID", help="The UUID of the execution.")]
LeaseEpoch = Annotated[
    int,
    typer.Option("--epoch", metavar="N", min=0, max=2**63 - 1, help="The lease_epoch that execution claim printed."),
]
LeaseDuration = Annotated[str, typer.Option("--lease", metavar="DURATION", help="Time to live of the lease.")]


@command(app, "claim")
def claim(
    ctx: typer.Context,
    owner: Annotated[
        str | None, typer.Option("--owner", metavar="NAME", help="Owner of the lease. [default: host and pid]")
    ] = None,
    lease: LeaseDuration = "30s",
    namespace: Annotated[str | None, typer.Option("--namespace", metavar="NS", help="Only of this namespace.")] = None,
    instance_tag: Annotated[str | None, typer.Option("--instance-tag", metavar="V", help="Only with this tag.")] = None,
) -> None:
    """Lease the oldest eligible execution; exit 3 if there is none.

    Pass the printed lease_epoch to renew, complete and fail: they exit 6 and change nothing if the lease was lost.

    \b
    Examples:
      pgcoord execution claim --lease 5m
      pgcoord execution claim -o json | jq -r '.execution_id, .lease_epoch'
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.flows import executions
    from pgcoord_cli.core.leader.candidate import default_node_id

    settings, out = output_of(ctx)
    for option, text in (("--owner", owner), ("--namespace", namespace), ("--instance-tag", instance_tag)):
        check_text(text, option)
    seconds = duration("--lease")(lease) or 0
    with session.command_session(settings, "execution claim", writes=True) as conn:
        claims = executions.claim(
            conn, owner or default_node_id(), seconds, namespace=namespace, instance_tag=instance_tag
        )
    if not claims:
        raise ConditionFalse("no execution is eligible")
    record = claims[0]._asdict()
    out.document(record | {name: str(record[name]) for name in ("execution_id", "lease_id", "flow_id") if record[name]})


@command(app, "renew")
def renew(ctx: typer.Context, execution_id: ExecutionId, epoch: LeaseEpoch, lease: LeaseDuration = "30s") -> None:
    """Renew a lease from now on; exit 6 if it was lost.

    \b
    Examples:
      pgcoord execution renew 6f1c… --epoch 1 --lease 5m
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.flows import executions

    settings, out = output_of(ctx)
    wanted = identifier(execution_id, "EXECUTION_ID")
    seconds = duration("--lease")(lease) or 0
    with session.command_session(settings, "execution renew", writes=True) as conn:
        expires_at = executions.renew(conn, wanted, epoch, seconds)
    out.document({"execution_id": str(wanted), "expires_at": expires_at})


@command(app, "complete")
def complete(ctx: typer.Context, execution_id: ExecutionId, epoch: LeaseEpoch) -> None:
    """End an execution as a success; exit 6 and change nothing if the lease was lost.

    \b
    Examples:
      pgcoord execution complete 6f1c… --epoch 1
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.flows import executions

    settings, out = output_of(ctx)
    wanted = identifier(execution_id, "EXECUTION_ID")
    with session.command_session(settings, "execution complete", writes=True) as conn:
        executions.complete(conn, wanted, epoch)
    out.document({"execution_id": str(wanted), "state": "success"})


@command(app, "fail")
def fail(
    ctx: typer.Context,
    execution_id: ExecutionId,
    epoch: LeaseEpoch,
    reason: Annotated[
        str | None, typer.Option("--reason", metavar="TEXT", help="Reason, shown with the execution.")
    ] = None,
) -> None:
    """End an attempt as a failure; exit 6 and change nothing if the lease was lost.

    The execution becomes eligible again after a backoff, or ends as failed if this was its last attempt.

    \b
    Examples:
      pgcoord execution fail 6f1c… --epoch 1 --reason 'disk full'
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.flows import executions

    settings, out = output_of(ctx)
    wanted = identifier(execution_id, "EXECUTION_ID")
    check_text(reason, "--reason")
    with session.command_session(settings, "execution fail", writes=True) as conn:
        state = executions.fail(conn, wanted, epoch, reason)
    out.document({"execution_id": str(wanted), "state": state})


@command(app, "revoke")
def revoke(ctx: typer.Context, execution_id: ExecutionId) -> None:
    """Revoke the lease of a running execution, which becomes eligible again; exit 3 if it is not running.

    \b
    Examples:
      pgcoord execution revoke 6f1c…
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.flows import executions

    settings, out = output_of(ctx)
    wanted = identifier(execution_id, "EXECUTION_ID")
    with session.command_session(settings, "execution revoke", writes=True) as conn:
        executions.revoke(conn, wanted)
    out.document({"execution_id": str(wanted), "state": "eligible"})


@command(app, "show")
def show(ctx: typer.Context, execution_id: ExecutionId) -> None:
    """Show one execution and its lease; exit 3 if there is no such execution.

    \b
    Examples:
      pgcoord execution show 6f1c…
      pgcoord execution show 6f1c… -o json | jq -r .state
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.flows import executions

    settings, out = output_of(ctx)
    wanted = identifier(execution_id, "EXECUTION_ID")
    with session.command_session(settings, "execution show", writes=False) as conn:
        out.document(executions.execution_record(conn, wanted))

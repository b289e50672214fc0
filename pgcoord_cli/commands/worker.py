"""`pgcoord worker`: run commands for executions as they become eligible."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pgcoord_cli.commands.framework import command, duration, noun, output_of, stop_on_signals
from pgcoord_cli.errors import UsageError
from pgcoord_cli.settings import check_text

if TYPE_CHECKING:
    from pgcoord_cli.core.flows.worker import WorkEvent
    from pgcoord_cli.render import Output

app = noun("Run commands for executions as they become eligible.")

SHORTEST_LEASE = 1.0

STDERR = 2  # its descriptor


@command(app, "run")
def run(
    ctx: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[-- CMD...]", help="For executions without a command of their own.")
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="End when nothing is eligible any more, nor will be after a back-off.")
    ] = False,
    concurrency: Annotated[
        int, typer.Option("--concurrency", metavar="N", min=1, max=256, help="Commands at once.")
    ] = 1,
    lease: Annotated[
        str, typer.Option("--lease", metavar="DURATION", help="How long a lease lasts unrenewed; at least 1s.")
    ] = "30s",
    owner: Annotated[
        str | None, typer.Option("--owner", metavar="NAME", help="Name of this worker. [default: host and pid]")
    ] = None,
    namespace: Annotated[str | None, typer.Option("--namespace", metavar="NS", help="Only of this namespace.")] = None,
    instance_tag: Annotated[str | None, typer.Option("--instance-tag", metavar="V", help="Only with this tag.")] = None,
) -> None:
    """Claim executions, run a command for each, renew its lease, and end it by the exit status.

    A command finds PGCOORD_EXECUTION_ID, PGCOORD_LEASE_ID, PGCOORD_LEASE_EPOCH, PGCOORD_FLOW_ID, PGCOORD_EXECUTION_NAME
    and PGCOORD_ATTEMPT in its environment. When its lease is lost, it is ended with everything it started. Ctrl-C and
    SIGTERM let the commands in hand end; a second one ends them, and gives their executions back. With -o json, what
    the commands print goes to stderr. With --once, the exit code is that of the command that failed an execution
    for good, the last one if several did, and 0 if all went well.

    \b
    Examples:
      pgcoord worker run -- ./do-it
      pgcoord worker run --concurrency 4 --namespace deploys
      pgcoord worker run --once -- sh -c 'echo $PGCOORD_EXECUTION_NAME'
    """
    from pgcoord_cli.core.flows.worker import Worker, WorkerOptions
    from pgcoord_cli.core.leader.candidate import default_node_id

    settings, out = output_of(ctx)
    for option, text in (("--owner", owner), ("--namespace", namespace), ("--instance-tag", instance_tag)):
        check_text(text, option)
    seconds = duration("--lease")(lease) or 0
    if seconds < SHORTEST_LEASE:
        raise UsageError(f"--lease: {lease!r} is too short; the least is {SHORTEST_LEASE:g}s")
    stdout = STDERR if out.is_json else None  # there, stdout is for the events alone
    options = WorkerOptions(
        owner or default_node_id(), words or (), concurrency, seconds, namespace, instance_tag, once, stdout
    )
    worker = Worker(settings, options, lambda event: _report(out, event))
    received = stop_on_signals(worker.stop, times=2)
    code = worker.run()
    raise typer.Exit(128 + received[0] if received else code)


def _report(out: Output, event: WorkEvent) -> None:
    attempt = f" attempt {event.attempt}" if event.attempt and event.attempt > 1 else ""
    line = ": ".join(filter(None, [f"{event.name}{attempt}", event.event.replace("_", " "), event.detail]))
    if out.is_json:
        out.record(event._asdict(), line)
    elif event.event in ("failed", "lost", "trouble"):
        out.warn(line)
    else:
        out.note(line)

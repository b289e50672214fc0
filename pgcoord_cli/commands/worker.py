"""`pgcoord worker`: runs commands for executions as they become eligible."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from pgcoord_cli.commands.framework import (
    command,
    daemon_exit_code,
    duration,
    ended_by_signal,
    event_writer,
    noun,
    output_of,
    stop_on_signals,
)
from pgcoord_cli.errors import PgcoordError, UsageError
from pgcoord_cli.settings import check_text

app = noun("Run commands for executions as they become eligible.")

SHORTEST_LEASE = 1.0

STDERR = 2  # file descriptor


@command(app, "run")
def run(
    ctx: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- CMD...]", help="The command for executions that have none of their own."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Exit when no execution is eligible or in backoff.")] = False,
    concurrency: Annotated[
        int, typer.Option("--concurrency", metavar="N", min=1, max=256, help="Concurrent commands.")
    ] = 1,
    lease: Annotated[
        str, typer.Option("--lease", metavar="DURATION", help="Time to live of a lease without renewal; at least 1s.")
    ] = "30s",
    owner: Annotated[
        str | None, typer.Option("--owner", metavar="NAME", help="Owner of the leases. [default: host and pid]")
    ] = None,
    namespace: Annotated[str | None, typer.Option("--namespace", metavar="NS", help="Only of this namespace.")] = None,
    instance_tag: Annotated[str | None, typer.Option("--instance-tag", metavar="V", help="Only with this tag.")] = None,
) -> None:
    """Claim executions, run a command for each while renewing its lease, and end them by its exit status.

    The environment of a command has PGCOORD_EXECUTION_ID, PGCOORD_LEASE_ID, PGCOORD_LEASE_EPOCH, PGCOORD_FLOW_ID,
    PGCOORD_EXECUTION_NAME and PGCOORD_ATTEMPT. When its lease is lost, its process group is terminated. Ctrl-C and
    SIGTERM wait for the running commands; a second one terminates them and makes their executions eligible again. After
    SIGTERM the exit code is 0, except with --once, and 1 if the result of a command could not be reported. With -o
    json, stdout of the commands goes to stderr. With --once, the exit code is that of the command that made an
    execution fail, the last one of several; 0 if no execution failed.

    \b
    Examples:
      pgcoord worker run -- ./do-it
      pgcoord worker run --concurrency 4 --namespace deploys
      pgcoord worker run --once -- sh -c 'echo $PGCOORD_EXECUTION_NAME'
    """
    from pgcoord_cli.core.flows.worker import Worker, WorkerOptions
    from pgcoord_cli.core.leader.candidate import default_node_id

    settings, out = output_of(ctx, is_daemon=True)
    for option, text in (("--owner", owner), ("--namespace", namespace), ("--instance-tag", instance_tag)):
        check_text(text, option)
    seconds = duration("--lease")(lease) or 0
    if seconds < SHORTEST_LEASE:
        raise UsageError(f"--lease: {lease!r} is shorter than the minimum of {SHORTEST_LEASE:g}s")
    stdout = STDERR if out.is_json else None  # with JSON, stdout has the events only
    options = WorkerOptions(
        owner or default_node_id(), words or (), concurrency, seconds, namespace, instance_tag, once, stdout
    )
    write = event_writer(out)
    worker = Worker(settings, options, lambda event: write(event._asdict()))
    received = stop_on_signals(worker.stop, times=2)
    code = worker.run()
    if worker.lost_results and received[:1] == [signal.SIGTERM]:  # a death of SIGINT is no success anyway
        raise PgcoordError(
            f"the results of {worker.lost_results} commands could not be reported",
            hint="their executions run again when their leases have expired",
        )
    if once and received:
        raise ended_by_signal(received[0])
    raise typer.Exit(daemon_exit_code(received, code))

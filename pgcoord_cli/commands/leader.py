"""`pgcoord leader`: runs candidates and shows the elected leader."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pgcoord_cli.commands.framework import (
    Limit,
    command,
    daemon_exit_code,
    duration,
    ended_by_signal,
    event_writer,
    noun,
    output_of,
    spare_the_collector,
    stdout_reader,
    stop_on_signals,
)
from pgcoord_cli.errors import ConditionFalse, Termination
from pgcoord_cli.settings import Settings, check_text

if TYPE_CHECKING:
    from pgcoord_cli.render import Output


class Companion(StrEnum):
    """The work that a candidate's process can do besides."""

    DISPATCH = "dispatch"


app = noun("Run candidates for the leader, and inspect the elected one.")


@command(app, "run")
def run(
    ctx: typer.Context,
    node_id: Annotated[
        str | None, typer.Option("--node-id", metavar="ID", help="Name of this candidate. [default: host and pid]")
    ] = None,
    ttl: Annotated[
        str, typer.Option("--ttl", metavar="DURATION", help="Time to live of the lease without renewal; at least 1s.")
    ] = "10s",
    beside: Annotated[
        list[Companion] | None,
        typer.Option(
            "--with",
            metavar="|".join(Companion),
            help="Work that this process does besides: dispatch completion events.",
        ),
    ] = None,
) -> None:
    """Stand for election, and resolve commit requests while elected. Runs until SIGTERM or Ctrl-C.

    Any number of candidates can run: one is the leader, the others wait to replace it. Ctrl-C and SIGTERM finish the
    current batch and release the lease; a second one exits at once. After SIGTERM the exit code is 0.

    \b
    Examples:
      pgcoord leader run
      pgcoord leader run --node-id west-1 --ttl 5s
      pgcoord leader run --with dispatch
      pgcoord leader run -o jsonl >> leader.log
    """
    from pgcoord_cli.core.leader.candidate import Candidate, default_node_id
    from pgcoord_cli.core.leader.lease import MIN_TTL

    settings, out = output_of(ctx, is_daemon=True)
    check_text(node_id, "--node-id")
    seconds = duration("--ttl", minimum=MIN_TTL - 0.001)(ttl) or 0
    write = event_writer(out)
    candidate = Candidate(settings, node_id or default_node_id(), seconds, lambda event: write(event._asdict()))
    received = stop_on_signals(candidate.stop)
    spare_the_collector()
    with _companions(settings, beside or []):
        candidate.run()
    raise typer.Exit(daemon_exit_code(received))


def _companions(settings: Settings, beside: Sequence[Companion]) -> AbstractContextManager[None]:
    if Companion.DISPATCH not in beside:
        return nullcontext()
    from pgcoord_cli.core.flows.dispatcher import CompletionDispatcher

    return CompletionDispatcher(settings, lambda _trouble: None).running()  # they are logged


@command(app, "status")
def status(
    ctx: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Repeat until Ctrl-C.")] = False,
    interval: Annotated[
        str, typer.Option("--interval", metavar="DURATION", help="With --watch: longest time between two documents.")
    ] = "2s",
) -> None:
    """Show the leader, the durable version and the queue; exit 3 if there is no leader or the queue does not advance.

    With --watch, print them again at every change of the leader and after every interval; with -o json, one document
    per line. Trouble after the first connection, such as a restart of the server, is logged once and retried.

    \b
    Examples:
      pgcoord leader status
      pgcoord leader status -o json | jq .leader.epoch
      pgcoord leader status --watch --interval 1s
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.leader import status as leader_status

    settings, out = output_of(ctx, is_daemon=watch)
    seconds = duration("--interval")(interval) or 0
    if watch:
        _watch(settings, out, seconds)
    with session.command_session(settings, "leader status", writes=False) as conn:
        document = leader_status.status_document(conn)
    out.document(document)
    if document["health"]["hidden"]:
        out.note(document["health"]["hidden"])
    if not document["health"]["healthy"]:
        hint = None if document["leader"]["held"] else leader_status.RUN_HINT
        raise ConditionFalse(document["health"]["reason"], hint=hint, answered=True)


def _watch(settings: Settings, out: Output, seconds: float) -> NoReturn:
    """Prints each document, on a terminal in place of the one before, until Ctrl-C or SIGTERM; then exits."""
    from pgcoord_cli.core.leader.status import watch_status

    in_place = sys.stdout.isatty() and not out.is_json

    def show(document: dict[str, dict[str, Any]]) -> None:
        if in_place:
            sys.stdout.write("\x1b[2J\x1b[H")
        out.next_document(document)

    try:
        with stdout_reader():
            watch_status(settings, seconds, show)
    except KeyboardInterrupt as stop:
        raise ended_by_signal(signal.SIGTERM if isinstance(stop, Termination) else signal.SIGINT) from None


LeaderEpoch = Annotated[int, typer.Option("--epoch", metavar="N", help="The expected epoch of the leader.")]
WaitLimit = Annotated[str, typer.Option("--timeout", metavar="DURATION", help="Exit 124 after this time.")]


@command(app, "wait")
def wait(ctx: typer.Context, timeout: WaitLimit = "30s") -> None:
    """Wait until there is a leader, and print its epoch and address; return at once if there is one.

    A connection that is lost meanwhile is reopened until the time is up.

    \b
    Examples:
      pgcoord leader wait
      pgcoord leader wait --timeout 5s -q && pgcoord kv set ready yes
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.leader import status as leader_status

    settings, out = output_of(ctx)
    seconds = duration("--timeout")(timeout) or 0
    # It writes nothing, but a standby refuses LISTEN: refused here instead of until the time is up.
    with session.command_session(settings, "leader wait", writes=True) as conn:
        lease = leader_status.await_leader(settings, conn, "leader wait", seconds)
    out.document({"epoch": lease.epoch, "leader_addr": lease.leader_addr})


@command(app, "step-down")
def step_down(
    ctx: typer.Context,
    wait_: Annotated[bool, typer.Option("--wait", help="Wait until the next leader is elected.")] = False,
    timeout: WaitLimit = "30s",
) -> None:
    """Ask the leader to finish its batch and release the lease. Without another candidate, it is elected again.

    \b
    Examples:
      pgcoord leader step-down
      pgcoord leader step-down --wait --timeout 10s
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.leader import status as leader_status

    settings, out = output_of(ctx)
    seconds = duration("--timeout")(timeout) or 0
    with session.command_session(settings, "leader step-down", writes=True) as conn:
        epoch, leader_addr = leader_status.step_down(conn, settings.schema)
        record = {"asked_epoch": epoch, "asked_leader": leader_addr}
        if wait_:
            lease = leader_status.await_leader(settings, conn, "leader step-down", seconds, after_epoch=epoch)
            record |= {"epoch": lease.epoch, "leader_addr": lease.leader_addr or ""}
    out.document(record)


@command(app, "history")
def history(
    ctx: typer.Context,
    since: Annotated[
        str | None, typer.Option("--since", metavar="DURATION", help="Only terms that had not ended this long ago.")
    ] = None,
    limit: Limit = 50,
) -> None:
    """List the terms of leaders, newest first: when and why each ended, and the versions that it committed.

    \b
    Examples:
      pgcoord leader history
      pgcoord leader history --since 1h -o json
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.leader import lease

    settings, out = output_of(ctx)
    seconds = duration("--since")(since)
    with session.command_session(settings, "leader history", writes=False) as conn:
        terms = lease.history(conn, seconds, limit)
    out.rows(
        list(lease.LeadershipRecord._fields), [term._asdict() for term in terms], empty="no leader has been elected"
    )


@command(app, "assert")
def assert_(ctx: typer.Context, epoch: LeaderEpoch) -> None:
    """Exit 0 if the leader has this epoch, else 6: a fence for scripts.

    \b
    Examples:
      pgcoord leader assert --epoch 7 && ./nightly-job
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.leader import status as leader_status

    settings, out = output_of(ctx)
    with session.command_session(settings, "leader assert", writes=False) as conn:
        leader_status.assert_epoch(conn, epoch)
    out.document({"epoch": epoch, "leads": True})

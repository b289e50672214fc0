"""`pgcoord leader`: run, inspect and watch the elected leader."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pgcoord_cli.commands.framework import command, duration, noun, output_of
from pgcoord_cli.errors import ConditionFalse, interruption
from pgcoord_cli.settings import check_text

if TYPE_CHECKING:
    from pgcoord_cli.core.leader import LeaderEvent
    from pgcoord_cli.render import Output

app = noun("Run, inspect and watch the elected leader.")


@command(app, "run")
def run(
    ctx: typer.Context,
    node_id: Annotated[
        str | None, typer.Option("--node-id", metavar="ID", help="Name of this candidate. [default: host and pid]")
    ] = None,
    ttl: Annotated[
        str, typer.Option("--ttl", metavar="DURATION", help="How long the lease lasts unrenewed; at least 1s.")
    ] = "10s",
) -> None:
    """Stand for election, and while elected resolve commit requests. Runs until SIGTERM or Ctrl-C.

    Start as many as you like: one leads, the others wait to replace it. Ctrl-C and SIGTERM finish the batch in hand and
    release the lease; a second one breaks off at once.

    \b
    Examples:
      pgcoord leader run
      pgcoord leader run --node-id west-1 --ttl 5s
      pgcoord leader run -o jsonl >> leader.log
    """
    from pgcoord_cli.core.leader import Leader, default_node_id
    from pgcoord_cli.core.lease import MIN_TTL

    settings, out = output_of(ctx)
    check_text(node_id, "--node-id")
    seconds = duration("--ttl", minimum=MIN_TTL - 0.001)(ttl) or 0
    leader = Leader(settings, node_id or default_node_id(), seconds, lambda event: _report(out, event))
    received: list[int] = []

    def on_signal(number: int, _frame: Any) -> None:
        received.append(number)
        leader.stop()
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    leader.run()
    raise typer.Exit(128 + received[0] if received else 0)


def _report(out: Output, event: LeaderEvent) -> None:
    epoch = "" if event.epoch is None else f" epoch {event.epoch}"
    line = f"{event.node_id}: {event.event}{epoch}: {event.detail}"
    if out.is_json:
        out.record(event._asdict(), line)
    elif event.event in ("fenced", "lost", "unreachable"):
        out.warn(line)
    else:
        out.note(line)


@command(app, "status")
def status(
    ctx: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again and again until Ctrl-C.")] = False,
    interval: Annotated[
        str, typer.Option("--interval", metavar="DURATION", help="With --watch: longest time between two looks.")
    ] = "2s",
) -> None:
    """Say who leads, how far the data has got and how long the queue is; exit 3 when nobody leads.

    With --watch it looks again at every change of leadership and once in an interval; with -o json that is one
    document a line.

    \b
    Examples:
      pgcoord leader status
      pgcoord leader status -o json | jq .leader.epoch
      pgcoord leader status --watch --interval 1s
    """
    from pgcoord_cli.core import leader, session

    settings, out = output_of(ctx)
    seconds = duration("--interval")(interval) or 0
    with session.command_session(settings, "leader status", writes=False) as conn:
        if watch:
            _watch(out, leader.watch_status(conn, settings.schema, seconds))
        document = leader.status_document(conn)
    out.document(document)
    if not document["leader"]["held"]:
        raise ConditionFalse("nobody leads", hint="start a leader with: pgcoord leader run", answered=True)


def _watch(out: Output, documents: Any) -> None:
    """Each look below the one before, or in its place on a terminal. Ctrl-C is its ordinary end."""
    in_place = sys.stdout.isatty() and not out.is_json
    try:
        for document in documents:
            if in_place:
                sys.stdout.write("\x1b[2J\x1b[H")
            out.next_document(document)
    except KeyboardInterrupt as stop:
        raise typer.Exit(interruption(stop).exit_code) from None

"""`pgcoord reconcile`: repairs what crashes leave behind. Made for cron."""

from __future__ import annotations

from contextlib import closing
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from pgcoord_cli.commands.framework import (
    command,
    daemon_exit_code,
    duration,
    event_writer,
    output_of,
    row_count,
    single,
    stop_on_signals,
)
from pgcoord_cli.errors import PgcoordError, UsageError
from pgcoord_cli.settings import check_text

if TYPE_CHECKING:
    from logging import Logger

    from pgcoord_cli.core.flows.reconcile import Scope, Tick
    from pgcoord_cli.render import Output
    from pgcoord_cli.settings import Settings

app = single("Dispatch events, end leases and cancel executions that crashes left behind.")


class Which(StrEnum):
    """The reconcilers."""

    DEPENDENCY = "dependency"
    LEASE_EXPIRY = "lease-expiry"
    SIBLING_CANCEL = "sibling-cancel"
    ORPHANED_COMMITS = "orphaned-commits"
    ALL = "all"


@command(app, "reconcile")
def reconcile(
    ctx: typer.Context,
    which: Annotated[
        Which, typer.Argument(metavar="WHICH", help=f"The reconciler to run: {', '.join(Which)}.")
    ] = Which.ALL,
    batch_limit: Annotated[
        int,
        typer.Option("--batch-limit", metavar="N", min=1, callback=row_count("--batch-limit"), help="Rows per tick."),
    ] = 1000,
    stale_threshold_ms: Annotated[
        int,
        typer.Option(
            "--stale-threshold-ms",
            metavar="N",
            min=0,
            max=10**12,
            help="Age from which an event is dispatched, in milliseconds.",
        ),
    ] = 1000,
    namespace: Annotated[str | None, typer.Option("--namespace", metavar="NS", help="Only of this namespace.")] = None,
    instance_tag: Annotated[str | None, typer.Option("--instance-tag", metavar="V", help="Only with this tag.")] = None,
    drain: Annotated[bool, typer.Option("--drain", help="Repeat until a tick changes nothing.")] = False,
    loop: Annotated[bool, typer.Option("--loop", help="Repeat until Ctrl-C or SIGTERM.")] = False,
    interval: Annotated[
        str, typer.Option("--interval", metavar="DURATION", help="With --loop: pause between two ticks.")
    ] = "5s",
    list_quarantined: Annotated[
        bool, typer.Option("--list-quarantined", help="Only list the quarantined events.")
    ] = False,
    retry: Annotated[
        str | None,
        typer.Option(
            "--retry", metavar="EVENT_ID|all", help="Only release quarantined events, to be dispatched again."
        ),
    ] = None,
) -> None:
    """Dispatch events, end leases and cancel executions that crashes left behind.

    Runs one tick of a reconciler, or of all; exit 1 if an event could not be dispatched. Any number of reconcilers can
    run at once. With -q, prints nothing if there was nothing to do. With --loop, trouble after the first connection is
    logged once and retried; the exit code after SIGTERM is 0.

    dependency dispatches completion events that are still undispatched; lease-expiry ends expired leases, so that their
    executions become eligible again; sibling-cancel cancels executions that a satisfied policy no longer needs;
    orphaned-commits marks pending requests that no leader settled.

    \b
    Examples:
      pgcoord reconcile -q
      pgcoord reconcile dependency --drain -o json
      pgcoord reconcile --loop --interval 5s
      pgcoord reconcile --list-quarantined
      pgcoord reconcile --retry all
    """
    from pgcoord_cli.core.flows.reconcile import Scope

    settings, out = output_of(ctx, is_daemon=loop)
    for option, text in (("--namespace", namespace), ("--instance-tag", instance_tag)):
        check_text(text, option)
    seconds = duration("--interval")(interval) or 0
    if list_quarantined:
        _list_quarantined(settings, out)
    elif retry is not None:
        _retry_quarantined(settings, out, _event_id(retry))
    elif loop:
        _loop(settings, out, which, Scope(batch_limit, stale_threshold_ms, namespace, instance_tag), seconds)
    else:
        ticks = _tick(settings, which, Scope(batch_limit, stale_threshold_ms, namespace, instance_tag), drain=drain)
        if any(tick.reconciled or tick.errors for tick in ticks.values()) or out.is_json or not out.quiet:
            _show(out, ticks)
        if errors := sum(tick.errors for tick in ticks.values()):
            raise PgcoordError(f"{errors} events could not be dispatched; the reasons are on stderr", answered=True)


def _tick(settings: Settings, which: Which, scope: Scope, *, drain: bool) -> dict[str, Tick]:
    """Runs one tick of each reconciler; with `drain`, repeats until a tick changes nothing. Returns the sums."""
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.flows.reconcile import RECONCILERS, Tick, ignore_error

    wanted = RECONCILERS if which == Which.ALL else {which.value: RECONCILERS[which.value]}
    totals = dict.fromkeys(wanted, Tick())
    with session.command_session(settings, "reconcile", writes=True) as conn:
        while True:
            ticks = {name: run(conn, scope, ignore_error) for name, run in wanted.items()}
            totals = {name: totals[name] + tick for name, tick in ticks.items()}
            if not drain or not any(tick.reconciled for tick in ticks.values()):
                return totals


def _loop(settings: Settings, out: Output, which: Which, scope: Scope, seconds: float) -> None:
    import logging

    from pgcoord_cli.core.concurrency.outage import Outage
    from pgcoord_cli.core.concurrency.supervisor import Supervisor
    from pgcoord_cli.core.concurrency.wakeup import Wakeup
    from pgcoord_cli.core.database.session import open_session

    log = logging.getLogger("pgcoord.reconcile")
    # The first session is only a check, so that its error ends the command instead of being retried (rule I17).
    open_session(settings, "reconcile", writes=True).close()
    write = event_writer(out)
    with closing(Wakeup()) as wakeup:
        received = stop_on_signals(wakeup.set)
        supervisor = Supervisor(wakeup, lambda: bool(received), outage=Outage(log, "no tick", "ticking"))

        def tick_on() -> str | None:
            """Ticks until a signal; returns the reason of a tick that failed."""
            while not received:
                try:
                    ticks = _tick(settings, which, scope, drain=False)
                except PgcoordError as error:
                    return error.reason
                supervisor.recovered()
                write({name: tick._asdict() for name, tick in ticks.items()})
                _log_ticks(log, ticks)
                if not received:
                    wakeup.wait(seconds)
            return None

        supervisor.run(tick_on)
    raise typer.Exit(daemon_exit_code(received))


def _show(out: Output, ticks: dict[str, Tick]) -> None:
    if out.is_json:
        out.document({name: tick._asdict() for name, tick in ticks.items()})
    else:
        records = [{"reconciler": name} | tick._asdict() for name, tick in ticks.items()]
        out.rows(list(records[0]), records)


def _log_ticks(log: Logger, ticks: dict[str, Tick]) -> None:
    for name, tick in ticks.items():
        if tick.reconciled or tick.errors:
            fields = tick._asdict() | {"reconciler": name}
            log.info("%s: %d reconciled, %d errors", name, tick.reconciled, tick.errors, extra=fields)


def _list_quarantined(settings: Settings, out: Output) -> None:
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.flows import reconcile

    columns = ["event_id", "execution_id", "flow_id", "outcome", "attempts", "last_error", "quarantined_at"]
    with session.command_session(settings, "reconcile", writes=False) as conn:
        out.rows(columns, reconcile.list_quarantined(conn), empty="no event is quarantined")


def _retry_quarantined(settings: Settings, out: Output, event_id: int | None) -> None:
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.flows import reconcile

    with session.command_session(settings, "reconcile", writes=True) as conn:
        out.document({"retried": reconcile.retry_quarantined(conn, event_id)})


def _event_id(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or int(text) >= 2**63:
        raise UsageError(f"--retry: {text!r} is neither an event id nor all")
    return int(text)

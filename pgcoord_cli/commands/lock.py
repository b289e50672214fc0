"""`pgcoord lock`: runs a command under a lock, and shows the holders of locks."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from pgcoord_cli.commands.framework import command, duration, noun, output_of
from pgcoord_cli.errors import Busy, UsageError
from pgcoord_cli.settings import check_text

app = noun("Run a command under a lock, and show or break locks.")

LockName = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the lock, any text; each schema has its own names.")
]
FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


@command(app, "run")
def run(
    ctx: typer.Context,
    name: LockName,
    words: Annotated[list[str], typer.Argument(metavar="-- CMD...", help="The command and its arguments.")],
    wait: Annotated[
        str | None, typer.Option("--wait", metavar="DURATION", help="How long to wait for the lock. [default: no wait]")
    ] = None,
    conflict_exit_code: Annotated[
        int,
        typer.Option(
            "--conflict-exit-code", metavar="N", min=0, max=255, help="Exit code if another session holds the lock."
        ),
    ] = 5,
    kill_grace: Annotated[
        str,
        typer.Option("--kill-grace", metavar="DURATION", help="Time from SIGTERM to SIGKILL when the lock is lost."),
    ] = "10s",
    fence: Annotated[
        bool, typer.Option("--fence", help="Pass a fence in PGCOORD_FENCE, a number that grows with every acquisition.")
    ] = False,
) -> None:
    """Run a command while holding a lock, so that at most one runs at a time, across machines.

    Without --wait, exit 5 (or --conflict-exit-code) at once if another session holds the lock, and name it. Signals are
    forwarded to the process group of the command, and its exit code is passed through. When the connection that holds
    the lock is lost, the command is terminated and the exit code is 4. A connection that is lost during --wait is
    reopened, and waits behind the other sessions again.

    \b
    Examples:
      pgcoord lock run nightly -- pgcoord gc all
      pgcoord lock run nightly --conflict-exit-code 0 -q -- ./backup.sh
      pgcoord lock run deploy --wait 5m --fence -- ./deploy.sh
    """
    import logging

    from pgcoord_cli.core.locks.ownership import check_name
    from pgcoord_cli.core.locks.run import LockOptions, LockRun

    settings, _ = output_of(ctx, is_daemon=True)
    check_text(name, "NAME")
    seconds = duration("--wait")(wait) or 0.0
    grace = duration("--kill-grace")(kill_grace) or 0.0
    lock_run = LockRun(settings, LockOptions(check_name(name, "NAME"), words, seconds, grace, fence))

    def forward_signals() -> None:
        for number in FORWARDED_SIGNALS:
            signal.signal(number, lambda received, _frame: lock_run.signal(received))

    try:
        code = lock_run.run(forward_signals)
    except Busy as error:
        if conflict_exit_code == Busy.exit_code:
            raise
        logging.getLogger("pgcoord.locks").info(error.message, extra={"lock": name})
        raise typer.Exit(conflict_exit_code) from None
    raise typer.Exit(code)


HIDDEN = "client and since are hidden: to see those of other roles, this role needs a GRANT of pg_read_all_stats"
"""The note beside sessions of which this role may not see all."""


@command(app, "list")
def list_(ctx: typer.Context) -> None:
    """List the sessions that hold locks, and those that wait for them.

    \b
    Examples:
      pgcoord lock list
      pgcoord lock list -o json | jq '.[] | select(.is_waiting)'
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.locks import ownership

    settings, out = output_of(ctx)
    with session.command_session(settings, "lock list", writes=False) as conn:
        found = ownership.list_locks(conn)
    out.rows(["name", "is_waiting", "pid", "application", "client", "since"], found, empty="no lock is held")
    if any(each["client"] is None for each in found):
        out.note(HIDDEN)


@command(app, "who")
def who(ctx: typer.Context, name: LockName) -> None:
    """Show the session that holds a lock; exit 3 if none does.

    \b
    Examples:
      pgcoord lock who nightly
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.locks import ownership

    settings, out = output_of(ctx)
    check_text(name, "NAME")
    ownership.check_name(name, "NAME")
    with session.command_session(settings, "lock who", writes=False) as conn:
        holder = ownership.holder_of(conn, settings.schema, name)
    out.document({"name": name} | holder._asdict())
    if holder.client is None:
        out.note(HIDDEN)


@command(app, "break")
def break_(
    ctx: typer.Context,
    name: LockName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Terminate the session without confirmation.")] = False,
) -> None:
    """Terminate the session that holds a lock, which releases the lock; exit 3 if no session holds it.

    A command that runs under the lock is then terminated by its `lock run`.

    \b
    Examples:
      pgcoord lock break nightly
      pgcoord lock break nightly --yes
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.locks import ownership

    settings, out = output_of(ctx)
    check_text(name, "NAME")
    ownership.check_name(name, "NAME")
    with session.command_session(settings, "lock break", writes=True) as conn:
        if not yes:
            holder = ownership.holder_of(conn, settings.schema, name)
            _confirm_by_name(name, f"{name!r} is held by {holder}. Type the name of the lock to terminate that session")
        broken = ownership.break_lock(conn, settings.schema, name)
    out.document({"name": name, "broken": broken._asdict()})


def _confirm_by_name(name: str, question: str) -> None:
    from pgcoord_cli.commands.standard_input import is_typed

    if not is_typed():
        raise UsageError("lock break needs a confirmation, and standard input is no terminal", hint="add --yes")
    if typer.prompt(question, err=True) != name:
        raise UsageError(f"the answer is not {name!r}; no session was terminated")

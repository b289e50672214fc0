"""`pgcoord lock`: run a command while holding a lock, and see who holds which."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from pgcoord_cli.commands.framework import command, duration, noun, output_of
from pgcoord_cli.errors import Busy, UsageError
from pgcoord_cli.settings import check_text

app = noun("Run a command while holding a lock, and see who holds which.")

LockName = Annotated[str, typer.Argument(metavar="NAME", help="Any text; each schema has names of its own.")]
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


@command(app, "run")
def run(
    ctx: typer.Context,
    name: LockName,
    words: Annotated[list[str], typer.Argument(metavar="-- CMD...", help="The command and its arguments.")],
    wait: Annotated[
        str | None, typer.Option("--wait", metavar="DURATION", help="Wait for the lock. [default: not at all]")
    ] = None,
    conflict_exit_code: Annotated[
        int, typer.Option("--conflict-exit-code", metavar="N", min=0, max=255, help="When somebody else holds it.")
    ] = 5,
    kill_grace: Annotated[
        str, typer.Option("--kill-grace", metavar="DURATION", help="From TERM to KILL, when the lock is lost.")
    ] = "10s",
    fence: Annotated[
        bool, typer.Option("--fence", help="Give the command a number in PGCOORD_FENCE that grows each time.")
    ] = False,
) -> None:
    """Run a command while holding a lock, so that it never runs twice at once, on whichever machines.

    Without --wait it fails at once when somebody else holds the lock (exit 5, or what --conflict-exit-code says), and
    names them. Signals are passed to the command and everything it started; its exit code is passed on. When the
    connection that holds the lock is lost, the command is ended and the exit code is 4.

    \b
    Examples:
      pgcoord lock run nightly -- pgcoord gc all
      pgcoord lock run nightly --conflict-exit-code 0 -q -- ./backup.sh
      pgcoord lock run deploy --wait 5m --fence -- ./deploy.sh
    """
    from pgcoord_cli.core.locks.ownership import check_name
    from pgcoord_cli.core.locks.run import LockOptions, LockRun

    settings, out = output_of(ctx)
    check_text(name, "NAME")
    seconds = duration("--wait")(wait) or 0.0
    grace = duration("--kill-grace")(kill_grace) or 0.0
    lock_run = LockRun(settings, LockOptions(check_name(name, "NAME"), words, seconds, grace, fence))

    def pass_signals_on() -> None:
        for number in PASSED_ON:
            signal.signal(number, lambda received, _frame: lock_run.signal(received))

    try:
        code = lock_run.run(pass_signals_on)
    except Busy as error:
        if conflict_exit_code == Busy.exit_code:
            raise
        out.note(error.message)
        raise typer.Exit(conflict_exit_code) from None
    raise typer.Exit(code)


@command(app, "list")
def list_(ctx: typer.Context) -> None:
    """List the locks that are held, by whom, and who waits for them.

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


@command(app, "who")
def who(ctx: typer.Context, name: LockName) -> None:
    """Say who holds a lock; exit 3 when nobody does.

    \b
    Examples:
      pgcoord lock who nightly
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.locks import ownership

    settings, out = output_of(ctx)
    check_text(name, "NAME")
    with session.command_session(settings, "lock who", writes=False) as conn:
        holder = ownership.holder_of(conn, settings.schema, name)
    out.document({"name": name} | holder._asdict())


@command(app, "break")
def break_(
    ctx: typer.Context,
    name: LockName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for the name to be typed.")] = False,
) -> None:
    """End the session that holds a lock, and with it the lock; exit 3 when nobody does.

    The command that ran under it with lock run is ended by its lock run, on its machine.

    \b
    Examples:
      pgcoord lock break nightly
      pgcoord lock break nightly --yes
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.locks import ownership

    settings, out = output_of(ctx)
    check_text(name, "NAME")
    with session.command_session(settings, "lock break", writes=True) as conn:
        if not yes:
            holder = ownership.holder_of(conn, settings.schema, name)
            _have_it_typed(name, f"{name!r} is held by {holder}. Type its name to end that session")
        broken = ownership.break_lock(conn, settings.schema, name)
    out.document({"name": name, "broken": broken._asdict()})


def _have_it_typed(name: str, question: str) -> None:
    from pgcoord_cli.commands.standard_input import is_typed

    if not is_typed():
        raise UsageError("this has to be confirmed, and there is no terminal to ask at", hint="say --yes")
    if typer.prompt(question, err=True) != name:
        raise UsageError("that is not the name; nothing was done")

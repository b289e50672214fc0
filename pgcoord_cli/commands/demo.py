"""`pgcoord demo`: shows commits, failover and flows on a temporary PostgreSQL server."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from pgcoord_cli.commands.framework import command, output_of, single
from pgcoord_cli.errors import PgcoordError

if TYPE_CHECKING:
    from pgcoord_cli.core.demo.transfers import DemoResult
    from pgcoord_cli.core.embedded.server import EmbeddedServer
    from pgcoord_cli.render import Output

app = single("Show commits, failover and flows on a temporary PostgreSQL server.")


@command(app, "demo")
def demo(
    ctx: typer.Context,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the server running, and print commands to try on it.")
    ] = False,
) -> None:
    """Show commits, failover and flows on a temporary PostgreSQL server.

    Starts a server and two candidates, transfers money between accounts with many concurrent clients, kills the leader
    half way, and checks that every account balance and every acknowledged transfer is right. Then runs a flow, kills
    its worker, and lets a reconciler and a second worker finish it. Removes the server at the end.

    \b
    Examples:
      pgcoord demo
      pgcoord demo --keep
      pgcoord demo -q -o json
    """
    from pgcoord_cli.core.demo import transfers

    settings, out = output_of(ctx)
    reporter = TerminalReporter(out)
    reporter.step("Start a temporary PostgreSQL server")
    with _server(keep=keep) as server:
        reporter.detail(f"PostgreSQL {server.version()}, on a Unix socket, durability on")
        result = transfers.run(replace(settings, dsn=server.dsn, dsn_source="pgcoord demo"), reporter)
        reporter.end()
        _show(out, result)
        if keep:
            _print_commands_to_try(out, server)


@contextmanager
def _server(*, keep: bool) -> Iterator[EmbeddedServer]:
    """Yields a temporary server; with `keep`, a new one in the directory of `pgcoord dev --name demo`, left running."""
    from pgcoord_cli.core.embedded.server import EmbeddedServer, dev_root, temporary_server

    if not keep:
        with temporary_server() as server:
            yield server
        return
    server = EmbeddedServer(dev_root("demo"))
    server.destroy()
    server.start()
    yield server


def _show(out: Output, result: DemoResult) -> None:
    out.document({"demo": result._asdict() | {"ok": result.ok}})
    if not result.ok:
        raise PgcoordError(
            "the result is wrong: this is a bug in pgcoord", hint="please report it with this output", answered=True
        )
    out.note(
        f"\nThe sum of the balances is unchanged, and each of {result.acknowledged} acknowledged transfers was applied "
        "exactly once, although the leader was killed. The flow ended as its policies require, although its worker was."
    )


def _print_commands_to_try(out: Output, server: EmbeddedServer) -> None:
    import shlex

    out.note(
        "\nThe server is still running. Commands to try:\n"
        f"  export PGCOORD_DSN={shlex.quote(server.dsn)}\n"
        "  pgcoord leader run &\n"
        "  pgcoord leader status\n"
        "  pgcoord kv range account/ account0\n"
        "  pgcoord kv set greeting hello && pgcoord kv get greeting\n"
        "  pgcoord commit list --limit 5\n"
        "and to remove it:\n"
        "  pgcoord dev down --name demo --destroy --yes"
    )


class TerminalReporter:
    """Reports the progress of the demonstration on stderr: numbered steps, details, a progress bar that is redrawn."""

    REDRAW_SECONDS = 0.1

    def __init__(self, out: Output) -> None:
        self._out = out
        self._steps = 0
        self._drawn_at = 0.0
        self._in_place = sys.stderr.isatty() and not out.quiet
        self._line_open = False

    def step(self, title: str) -> None:
        """Prints a numbered heading."""
        self.end()
        self._steps += 1
        self._out.note(f"{self._steps}. {title}")

    def detail(self, text: str) -> None:
        """Prints an indented line."""
        self.end()
        self._out.note(f"   {text}")

    def progress(self, done: int, total: int) -> None:
        """Redraws the progress bar, at most ten times a second; does nothing if stderr is not a terminal."""
        now = time.monotonic()
        if not self._in_place or (now - self._drawn_at < self.REDRAW_SECONDS and done < total):
            return
        self._drawn_at = now
        filled = 40 * done // total
        sys.stderr.write(f"\r   [{'#' * filled}{'.' * (40 - filled)}] {done}/{total}")
        sys.stderr.flush()
        self._line_open = True

    def end(self) -> None:
        """Ends the line of the progress bar, if one is open."""
        if self._line_open:
            sys.stderr.write("\n")
            self._line_open = False

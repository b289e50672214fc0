"""`pgcoord dev`: a development PostgreSQL server, kept until it is destroyed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from pgcoord_cli.commands.framework import command, noun, output_of
from pgcoord_cli.errors import ConditionFalse, UsageError

if TYPE_CHECKING:
    from pgcoord_cli.core.embedded.server import EmbeddedServer
    from pgcoord_cli.render import Output
    from pgcoord_cli.settings import Settings

app = noun("Run a development PostgreSQL server.")

ServerName = Annotated[
    str, typer.Option("--name", metavar="NAME", help="Name of the server; demo --keep creates 'demo'.")
]

START_HINT = "start it with: pgcoord dev up"


@command(app, "up")
def up(
    ctx: typer.Context,
    name: ServerName = "default",
    server_version: Annotated[
        int | None,
        typer.Option(
            "--server-version",
            metavar="N",
            help="PostgreSQL 15, 16 or 18. [default: that of the data, else the newest]",
        ),
    ] = None,
    no_migrate: Annotated[bool, typer.Option("--no-migrate", help="Do not apply migrations.")] = False,
) -> None:
    """Start the development server, creating it at the first call, and apply the migrations that it lacks.

    The server listens on a Unix socket only and runs until `dev down`, which keeps its data. PGCOORD_DEV_DIR is the
    directory of the data. If the server is running already, only the missing migrations are applied.

    \b
    Examples:
      pgcoord dev up
      pgcoord dev up --server-version 16 --no-migrate
      pgcoord dev up -q -o json
    """
    import shlex

    settings, out = output_of(ctx)
    server = _server(name, server_version)
    started = server.start()
    applied = 0 if no_migrate else bring_up_to_date(replace(settings, dsn=server.dsn, dsn_source="pgcoord dev"), out)
    out.document(server.describe()._asdict() | {"started": started, "migrations_applied": applied})
    out.note(f"export PGCOORD_DSN={shlex.quote(server.dsn)}")


@command(app, "down")
def down(
    ctx: typer.Context,
    name: ServerName = "default",
    destroy: Annotated[bool, typer.Option("--destroy", help="Delete the data as well.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without confirmation.")] = False,
) -> None:
    """Stop the development server, and keep its data unless --destroy is given.

    \b
    Examples:
      pgcoord dev down
      pgcoord dev down --destroy
      pgcoord dev down --destroy --yes
    """
    _, out = output_of(ctx)
    server = _server(name)
    if destroy and not yes:
        _confirm(server)
    stopped = server.stop()
    destroyed = server.destroy() if destroy else False
    out.document({"stopped": stopped, "destroyed": destroyed, "data_directory": str(server.data)})


@command(app, "dsn")
def dsn(ctx: typer.Context, name: ServerName = "default") -> None:
    """Print the DSN of the development server; exit 3 if it is not running.

    \b
    Examples:
      pgcoord dev dsn
      export PGCOORD_DSN=$(pgcoord dev dsn)
      psql "$(pgcoord dev dsn)"
    """
    _, out = output_of(ctx)
    server = _server(name)
    if not server.is_running():
        raise ConditionFalse("the development server is not running", hint=START_HINT)
    if out.is_json:
        out.document({"dsn": server.dsn})
    else:
        out.lines([server.dsn])


@command(app, "status")
def status(ctx: typer.Context, name: ServerName = "default") -> None:
    """Show whether the development server is running, and its paths; exit 3 if it is not.

    \b
    Examples:
      pgcoord dev status
      pgcoord dev status -o json | jq -r .data_directory
    """
    _, out = output_of(ctx)
    description = _server(name).describe()
    out.document(description._asdict())
    if not description.running:
        out.note(START_HINT)
        raise typer.Exit(ConditionFalse.exit_code)


def bring_up_to_date(settings: Settings, out: Output) -> int:
    """Applies the migrations that the database lacks, with a note each on stderr; returns their number."""
    from pgcoord_cli.core.database.upgrade import upgrade

    return len(
        upgrade(
            settings,
            on_wait=lambda holder: out.note(f"waiting for the migration lock held by {holder}"),
            on_applied=lambda done: out.note(f"applied {done.version:04}_{done.name}"),
        )
    )


def _server(name: str, version: int | None = None) -> EmbeddedServer:
    """Returns the server of that name. Raises UsageError if its data belongs to another version of PostgreSQL."""
    from pgcoord_cli.core.embedded.installation import find_installation
    from pgcoord_cli.core.embedded.server import EmbeddedServer, dev_root

    if not name.replace("-", "").replace("_", "").isalnum():
        raise UsageError(f"--name: {name!r} may contain letters, digits, - and _ only")
    server = EmbeddedServer(dev_root(name))
    made_by = server.version()
    if version in (None, made_by):
        return server
    if made_by:
        raise UsageError(
            f"--server-version {version}: the data in {server.data} belongs to PostgreSQL {made_by}",
            hint="delete it with: pgcoord dev down --destroy; or set PGCOORD_DEV_DIR to another directory",
        )
    return EmbeddedServer(server.root, find_installation(version))


def _confirm(server: EmbeddedServer) -> None:
    """Asks on the terminal whether to delete the data; exits unless the answer is yes."""
    from pgcoord_cli.commands.standard_input import confirm

    confirm(f"Delete {server.root} and all data in it?", "--destroy deletes all data")

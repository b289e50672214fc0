"""`pgcoord migrate`: applies, lists and checks migrations, and grants rights."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from pgcoord_cli.commands.framework import command, duration, noun, output_of
from pgcoord_cli.errors import ConditionFalse, PgcoordError, UsageError

app = noun("Apply, list and check the migrations of the schema, and grant rights on it.")

COLUMNS = ["version", "name", "state", "applied_at", "applied_by", "execution_ms"]


@command(app, "up")
def up(
    ctx: typer.Context,
    to: Annotated[int | None, typer.Option("--to", metavar="N", help="Stop after migration N.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the migrations that would be applied; change nothing.")
    ] = False,
    lock_timeout: Annotated[
        str, typer.Option("--lock-timeout", metavar="DURATION", help="How long to wait for another migration run.")
    ] = "30s",
) -> None:
    """Apply the migrations that the schema lacks, each in its own transaction.

    Concurrent runs are safe: they wait for each other.

    \b
    Examples:
      pgcoord migrate up
      pgcoord migrate up --dry-run
      pgcoord migrate up --to 2 --schema staging
    """
    from pgcoord_cli.core.database import migrations, session

    settings, out = output_of(ctx)
    timeout = duration("--lock-timeout")(lock_timeout) or 0
    with session.migration_session(settings, read_only=dry_run) as (conn, server):
        if dry_run:
            session.require_own_name(server, settings)
            todo = migrations.plan(migrations.states(conn, has_ledger=server.has_ledger), to)
        else:
            with migrations.migration_lock(
                conn,
                settings.schema,
                timeout,
                lambda holder: out.note(f"waiting for the migration lock held by {holder}"),
            ):
                todo = migrations.apply(
                    conn, settings.schema, to, lambda done: out.note(f"applied {done.version:04}_{done.name}")
                )
    out.rows(
        ["version", "name", "state"],
        [{"version": m.version, "name": m.name, "state": "pending" if dry_run else "applied"} for m in todo],
        empty=f"schema {settings.schema} is up to date",
    )


@command(app, "status")
def status(
    ctx: typer.Context,
    check: Annotated[bool, typer.Option("--check", help="Exit 3 if migrations are pending.")] = False,
) -> None:
    """List the migrations and their states: applied, pending, edited, unknown, breaking.

    Exit 1 if a file was edited after it was applied, 7 if the schema was renamed or has a breaking migration of a newer
    pgcoord.

    \b
    Examples:
      pgcoord migrate status
      pgcoord migrate status --check -q || pgcoord migrate up
    """
    from pgcoord_cli.core.database import migrations, session

    settings, out = output_of(ctx)
    with session.migration_session(settings, read_only=True) as (conn, server):
        states = migrations.states(conn, has_ledger=server.has_ledger)
    pending = [state for state in states if state.state == "pending"]
    out.rows(COLUMNS, [state._asdict() for state in states])
    try:
        session.require_own_name(server, settings)
        migrations.verify(states)
    except PgcoordError as error:
        error.answered = True
        raise
    if check and pending:
        raise ConditionFalse(
            f"{len(pending)} migration(s) are pending",
            hint=f"apply them with: {migrations.migrate_command(settings.schema)}",
            answered=True,
        )


@command(app, "sql")
def sql(
    ctx: typer.Context,
    to: Annotated[int | None, typer.Option("--to", metavar="N", help="Stop after migration N.")] = None,
) -> None:
    """Print the migrations as a psql script, for DDL that is run by hand. Needs no database.

    \b
    Examples:
      pgcoord migrate sql | less
      pgcoord migrate sql | psql mydb
    """
    from pgcoord_cli.core.database import migrations

    settings, out = output_of(ctx)
    script = migrations.script(settings.schema, migrations.plan(migrations.compare([]), to))
    if out.is_json:
        out.document({"schema": settings.schema, "sql": script})
    else:
        typer.echo(script, nl=False)


@command(app, "verify")
def verify(ctx: typer.Context) -> None:
    """Compare the applied migrations with those of this program: equal checksums, and no unknown breaking one.

    \b
    Examples:
      pgcoord migrate verify
      pgcoord migrate verify -o json
    """
    from pgcoord_cli.core.database import migrations, session

    settings, out = output_of(ctx)
    with session.migration_session(settings, read_only=True) as (conn, server):
        session.require_ledger(conn, server, settings)
        states = migrations.states(conn, has_ledger=True)
    migrations.verify(states)
    count = Counter(state.state for state in states)
    out.document(
        {
            "schema": settings.schema,
            "verified": count["applied"],
            "pending": count["pending"],
            "unknown": count["unknown"],
        }
    )


@command(app, "grant")
def grant(
    ctx: typer.Context,
    reader: Annotated[
        list[str] | None, typer.Option("--reader", metavar="ROLE", help="May run status commands, lists and tails.")
    ] = None,
    client: Annotated[
        list[str] | None,
        typer.Option("--client", metavar="ROLE", help="May also read data, commit, and insert events."),
    ] = None,
    operator: Annotated[
        list[str] | None,
        typer.Option("--operator", metavar="ROLE", help="May also run leaders, reconcile and collect garbage."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the GRANT statements; change nothing.")] = False,
) -> None:
    """Grant existing roles the rights that their work needs. Repeat an option for several roles.

    \b
    Examples:
      pgcoord migrate grant --reader grafana --client app --operator pgcoord_ops
      pgcoord migrate grant --client app --dry-run
    """
    from pgcoord_cli.core.database import grants, session

    settings, out = output_of(ctx)
    wanted = {"reader": reader or [], "client": client or [], "operator": operator or []}
    if not any(wanted.values()):
        raise UsageError("give at least one of --reader, --client, --operator")
    with session.command_session(settings, "migrate grant", writes=not dry_run) as conn:
        given = grants.grant(conn, wanted, dry_run=dry_run)
    out.rows(["kind", "role", "statement"], [item._asdict() for item in given])

"""`pgcoord subscription`: look at checkpoints, and set them."""

from __future__ import annotations

from typing import Annotated

import typer

from pgcoord_cli.commands.framework import command, noun, output_of
from pgcoord_cli.errors import UsageError
from pgcoord_cli.settings import check_text

app = noun("Look at the checkpoints of subscriptions, and set them.")

SubscriptionName = Annotated[str, typer.Argument(metavar="NAME", help="As subscription list prints it.")]


@command(app, "list")
def list_(ctx: typer.Context) -> None:
    """List subscriptions: where each stands, and how many events of its outbox lie ahead.

    \b
    Examples:
      pgcoord subscription list
      pgcoord subscription list -o json | jq '.[].lag'
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.events import subscriptions

    settings, out = output_of(ctx)
    with session.command_session(settings, "subscription list", writes=False) as conn:
        found = subscriptions.list_subscriptions(conn)
    columns = ["subscription_name", "outbox", "last_position", "cursor", "lag", "fence", "updated_at"]
    out.rows(columns, found, empty="there are no subscriptions")


@command(app, "show")
def show(ctx: typer.Context, name: SubscriptionName) -> None:
    """Show one subscription and who owns it; exit 3 when there is none.

    \b
    Examples:
      pgcoord subscription show mailer
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.events import subscriptions

    settings, out = output_of(ctx)
    check_text(name, "NAME")
    with session.command_session(settings, "subscription show", writes=False) as conn:
        out.document(subscriptions.subscription_record(conn, settings.schema, name))


@command(app, "set")
def set_(
    ctx: typer.Context,
    name: SubscriptionName,
    position: Annotated[str, typer.Argument(metavar="CURSOR", help="A cursor, or an event id.")],
    force: Annotated[bool, typer.Option("--force", help="Also backwards: what lies between comes again.")] = False,
) -> None:
    """Move a checkpoint; exit 5 while somebody owns it.

    \b
    Examples:
      pgcoord subscription set mailer 02000000000000002a
      pgcoord subscription set mailer 0 --force
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.events import subscriptions

    settings, out = output_of(ctx)
    check_text(name, "NAME")
    wanted = _position(position)
    with session.command_session(settings, "subscription set", writes=True) as conn:
        before = subscriptions.set_position(conn, settings.schema, name, wanted, force=force)
    out.document({"subscription_name": name, "last_position": wanted, "before": before})


def _position(text: str) -> int:
    from pgcoord_cli.core.events.cursor import MAX_POSITION, from_cursor, looks_like_cursor

    if looks_like_cursor(text):
        return from_cursor(text, "CURSOR")
    if not text.isdecimal() or int(text) > MAX_POSITION:
        raise UsageError(f"CURSOR: {text!r} is neither a cursor nor an event id")
    return int(text)


@command(app, "reset")
def reset(
    ctx: typer.Context,
    name: SubscriptionName,
    force: Annotated[bool, typer.Option("--force", help="It cannot be undone; this says that you know.")] = False,
) -> None:
    """Forget a subscription: the next one of that name begins anew, and garbage collection no longer waits for it.

    \b
    Examples:
      pgcoord subscription reset mailer --force
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.events import subscriptions

    settings, out = output_of(ctx)
    check_text(name, "NAME")
    if not force:
        raise UsageError("a subscription that was reset cannot be got back", hint="say --force")
    with session.command_session(settings, "subscription reset", writes=True) as conn:
        subscriptions.remove(conn, settings.schema, name)
    out.document({"subscription_name": name, "reset": True})

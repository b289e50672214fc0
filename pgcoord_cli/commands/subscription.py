"""`pgcoord subscription`: shows and sets the checkpoints of subscriptions."""

from __future__ import annotations

from typing import Annotated

import typer

from pgcoord_cli.commands.framework import command, noun, output_of
from pgcoord_cli.errors import UsageError
from pgcoord_cli.settings import check_text

app = noun("Show and set the checkpoints of subscriptions.")

SubscriptionName = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the subscription, as subscription list prints it.")
]


@command(app, "list")
def list_(ctx: typer.Context) -> None:
    """List subscriptions: their positions, and the number of events of the outbox after each.

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
    """Show one subscription and its owner; exit 3 if there is no such subscription.

    \b
    Examples:
      pgcoord subscription show mailer
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.events import subscriptions
    from pgcoord_cli.core.locks.ownership import check_name

    settings, out = output_of(ctx)
    check_text(name, "NAME")
    check_name(name, "NAME")
    with session.command_session(settings, "subscription show", writes=False) as conn:
        out.document(subscriptions.subscription_record(conn, settings.schema, name))


@command(app, "set")
def set_(
    ctx: typer.Context,
    name: SubscriptionName,
    position: Annotated[str, typer.Argument(metavar="CURSOR", help="A cursor, or an event id.")],
    force: Annotated[
        bool, typer.Option("--force", help="Allow a move backwards, which delivers events again.")
    ] = False,
) -> None:
    """Move a checkpoint; exit 5 if a session owns the subscription.

    \b
    Examples:
      pgcoord subscription set mailer 02000000000000002a
      pgcoord subscription set mailer 0 --force
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.events import subscriptions
    from pgcoord_cli.core.locks.ownership import check_name

    settings, out = output_of(ctx)
    check_text(name, "NAME")
    check_name(name, "NAME")
    wanted = _position(position)
    with session.command_session(settings, "subscription set", writes=True) as conn:
        before = subscriptions.set_position(conn, settings.schema, name, wanted, force=force)
    out.document({"subscription_name": name, "last_position": wanted, "before": before})


def _position(text: str) -> int:
    from pgcoord_cli.core.events.cursor import MALFORMED_HINT, MAX_POSITION, from_cursor, looks_like_cursor

    if looks_like_cursor(text):
        return from_cursor(text, "CURSOR")
    # Python refuses to convert more than 4,300 digits.
    if not text.isdecimal() or len(text) > len(str(MAX_POSITION)) or int(text) > MAX_POSITION:
        raise UsageError(f"CURSOR: {text[:80]!r} is neither a cursor nor an event id", hint=MALFORMED_HINT)
    return int(text)


@command(app, "reset")
def reset(
    ctx: typer.Context,
    name: SubscriptionName,
    force: Annotated[bool, typer.Option("--force", help="Required: a reset cannot be undone.")] = False,
) -> None:
    """Delete the checkpoint of a subscription: the next tail starts anew, and garbage collection ignores it.

    \b
    Examples:
      pgcoord subscription reset mailer --force
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.events import subscriptions
    from pgcoord_cli.core.locks.ownership import check_name

    settings, out = output_of(ctx)
    check_text(name, "NAME")
    check_name(name, "NAME")
    if not force:
        raise UsageError("a reset deletes the checkpoint, which cannot be restored", hint="add --force")
    with session.command_session(settings, "subscription reset", writes=True) as conn:
        subscriptions.remove(conn, settings.schema, name)
    out.document({"subscription_name": name, "reset": True})

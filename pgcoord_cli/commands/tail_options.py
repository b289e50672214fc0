"""The options of `pgcoord tail`: how they are written, which of them go together, and what they mean for a tail."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from pgcoord_cli.errors import UsageError
from pgcoord_cli.settings import LONGEST_DURATION, check_text, parse_duration

if TYPE_CHECKING:
    from pgcoord_cli.core.events.filters import Filters
    from pgcoord_cli.core.events.start_position import StartPosition

FromOption = Annotated[
    str | None, typer.Option("--from", metavar="CURSOR", help="Start after this cursor. [default: from now on]")
]
FromStart = Annotated[bool, typer.Option("--from-start", help="Start at the oldest event that is stored.")]
Since = Annotated[
    str | None,
    typer.Option(
        "--since", metavar="TIME", help="Start at the first event inserted this long ago (10m) or at this time."
    ),
]
Until = Annotated[
    str | None,
    typer.Option(
        "--until",
        metavar="TIME|CURSOR",
        help="End with the events inserted before this time (at most now), or at this cursor.",
    ),
]
Max = Annotated[int | None, typer.Option("--max", metavar="N", min=1, help="End after N events.")]
NoFollow = Annotated[bool, typer.Option("--no-follow", help="End when all stored events have been printed.")]
Partition = Annotated[list[int] | None, typer.Option("--partition", metavar="N", help="Only these; repeatable.")]
Namespace = Annotated[list[str] | None, typer.Option("--namespace", metavar="NS", help="Only these; repeatable.")]
InstanceTag = Annotated[list[str] | None, typer.Option("--instance-tag", metavar="V", help="Only these; repeatable.")]
CursorFileOption = Annotated[
    Path | None,
    typer.Option(
        "--cursor-file",
        metavar="FILE",
        help="Resume from the cursor in FILE, and save it there. FILE is a regular file, used by one tail at a time.",
    ),
]
SubscriptionOption = Annotated[
    str | None,
    typer.Option(
        "--subscription", metavar="NAME", help="Resume from the checkpoint NAME in the database, and save it there."
    ),
]
Lag = Annotated[bool, typer.Option("--lag", help="Only print the number of events after the given cursor.")]
MaxLag = Annotated[
    int | None, typer.Option("--max-lag", metavar="N", min=0, help="With --lag: exit 3 if there are more events.")
]

Exec = Annotated[
    bool, typer.Option("--exec", help="Run CMD for each event, which is on its stdin; exit code 0 moves the position.")
]
BatchSize = Annotated[
    int | None, typer.Option("--batch", metavar="N", min=1, help="With --exec: at most N events for each run.")
]
Attempts = Annotated[
    int | None,
    typer.Option(
        "--attempts", metavar="N", min=1, help="With --exec: exit after N failed runs in a row. [default: no limit]"
    ),
]
Words = Annotated[
    list[str] | None, typer.Argument(metavar="[-- CMD...]", help="With --exec: the command and its arguments.")
]


class Call(NamedTuple):
    """The options of one call, which both commands share."""

    from_cursor: str | None
    from_start: bool
    since: str | None
    until: str | None
    most: int | None
    no_follow: bool
    partitions: list[int]
    namespaces: list[str]
    instance_tags: list[str]
    kinds: list[str]
    cursor_file: Path | None
    subscription: str | None
    lag: bool
    max_lag: int | None
    exec_: bool
    batch: int | None
    attempts: int | None
    words: list[str]


def check(call: Call) -> None:
    """Raises UsageError for options that exclude each other, or that need another one."""
    starts = {"--from": call.from_cursor, "--from-start": call.from_start or None, "--since": call.since}
    if len(given := [name for name, value in starts.items() if value is not None]) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other", hint="give one place to start from")
    if call.cursor_file and call.subscription:
        raise UsageError(
            "--cursor-file and --subscription exclude each other", hint="give one place to store the cursor"
        )
    if call.max_lag is not None and not call.lag:
        raise UsageError("--max-lag requires --lag")
    _check_exec(call)
    texts = {
        "--namespace": call.namespaces,
        "--instance-tag": call.instance_tags,
        "--event-type or --outcome": call.kinds,
    }
    for option, values in texts.items():
        for value in values:
            check_text(value, option)


def _check_exec(call: Call) -> None:
    if not call.exec_:
        given = {"--batch": call.batch, "--attempts": call.attempts, "CMD": call.words or None}
        if unused := [name for name, value in given.items() if value is not None]:
            raise UsageError(f"{' and '.join(unused)} requires --exec", hint="write: --exec -- CMD...")
        return
    if not call.words:
        raise UsageError("--exec needs a command", hint="write: --exec -- CMD...")
    if call.lag:
        raise UsageError("--exec and --lag exclude each other")
    if not call.cursor_file and call.subscription is None:
        raise UsageError(
            "--exec needs a place to store the position",
            hint="give --subscription NAME or --cursor-file FILE: the next tail has to know what was handled",
        )


def filters(call: Call) -> Filters:
    """Returns the filters of a call."""
    from pgcoord_cli.core.events.filters import Filters

    return Filters(call.partitions, call.namespaces, call.instance_tags, call.kinds)


def start(call: Call) -> StartPosition:
    """Returns where a tail without a stored position starts. Raises UsageError."""
    from pgcoord_cli.core.events.cursor import from_cursor
    from pgcoord_cli.core.events.start_position import StartPosition

    if call.from_cursor is not None:
        return StartPosition.position(from_cursor(call.from_cursor, "--from"))
    if call.since is not None:
        return StartPosition.time(_moment(call.since, "--since"))
    return StartPosition.beginning() if call.from_start else StartPosition.now()


def until(text: str) -> StartPosition:
    """Parses --until: a cursor, or a time. Raises UsageError."""
    from pgcoord_cli.core.events.cursor import from_cursor, looks_like_cursor
    from pgcoord_cli.core.events.start_position import StartPosition

    if looks_like_cursor(text):
        return StartPosition.position(from_cursor(text, "--until"))
    return StartPosition.time(_moment(text, "--until"))


def _moment(text: str, option: str) -> datetime | timedelta:
    """Parses `10m` (ago) or a time in ISO 8601, in UTC if it has no zone. Raises UsageError."""
    with suppress(ValueError):
        moment = datetime.fromisoformat(text)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    try:
        return timedelta(seconds=parse_duration(text, option, LONGEST_DURATION))
    except UsageError as error:
        raise UsageError(
            error.message, hint="give a duration, like 10m for 10 minutes ago, or a time, like 2026-01-31T12:00Z"
        ) from None

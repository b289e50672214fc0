"""`pgcoord tail`: follows an event outbox from a cursor on, without missing an event."""

from __future__ import annotations

from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol

import typer

from pgcoord_cli.commands.framework import (
    command,
    ended_by_signal,
    noun,
    output_of,
    spare_the_collector,
    stdout_reader,
    stop_on_signals,
)
from pgcoord_cli.errors import ConditionFalse, CursorExpired, HistoryChanged, UsageError
from pgcoord_cli.settings import LONGEST_DURATION, Settings, check_text, parse_duration

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from logging import Logger

    from pgcoord_cli.core.events.filters import Filters
    from pgcoord_cli.core.events.history import PassedEvent
    from pgcoord_cli.core.events.notices import Notice
    from pgcoord_cli.core.events.outbox import Event, Outbox
    from pgcoord_cli.core.events.start_position import StartPosition
    from pgcoord_cli.core.events.tail import Tail
    from pgcoord_cli.render import Output

DIGIT = b"\0"
"""Replaces every hexadecimal digit before comparison; a text in PostgreSQL never contains it."""

DIGITS_MARKED = bytes.maketrans(b"0123456789abcdefABCDEF", DIGIT * 22)
SHAPE_OF_UUID = b"-".join(DIGIT * length for length in (8, 4, 4, 4, 12)) + b"\n"

RESUMES = "stopped; the same command resumes here"

UNCHECKED = (
    "nothing is known of the event at the stored cursor, so it cannot be checked that the cursor belongs to this "
    "history of the database; from now on it is"
)

app = noun("Follow an event outbox from a cursor on, without missing an event.")

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


class PositionStore(Protocol):
    """Stores the position of a tail: a cursor file or a subscription."""

    passed: PassedEvent | None
    """The last event passed before the position that was loaded; None: not known."""

    def load(self) -> int | None:
        """Returns the stored position, or None if there is none."""

    def save(self, position: int, passed: PassedEvent | None = None) -> None:
        """Stores the position and the last event passed."""

    def stop(self) -> None:
        """Aborts a save that waits for a lost connection."""

    def close(self) -> None:
        """Releases the file or the connection."""


LEASE_HELP = """Follow the lease events: acquired, renewed, expired, reclaimed, revoked. One line each, with its cursor.

Each event is printed at least once, in order. A lost connection is replaced. Ctrl-C and SIGTERM finish the current
batch and print how to resume. A stored cursor (--cursor-file, --subscription) takes precedence over --from.

Through a pipe, the stored cursor tells what was written into the pipe, not what its reader has handled: a reader that
crashes loses what it had not handled. --exec runs CMD for each event, or each --batch, with JSON lines on its stdin,
and moves the cursor when CMD exits with 0; until then CMD is run again, so that it gets each event at least once.

\b
Examples:
  pgcoord tail lease
  pgcoord tail lease --from-start --no-follow -o jsonl > leases.jsonl
  pgcoord tail lease --since 10m --event-type expired --event-type reclaimed
  pgcoord tail lease --cursor-file /var/lib/app/lease.cursor --exec --batch 100 -- app-import
  pgcoord tail lease --lag --subscription importer --max-lag 1000
"""

COMPLETION_HELP = """Follow the completion events: success, failed, cancelled, skipped. One line each, with its cursor.

Through a pipe, the stored cursor tells what was written into the pipe, not what its reader has handled: a reader that
crashes loses what it had not handled. --exec runs CMD for each event, or each --batch, with JSON lines on its stdin,
and moves the cursor when CMD exits with 0; until then CMD is run again, so that it gets each event at least once.

\b
Examples:
  pgcoord tail completion
  pgcoord tail completion --from 02000000000000002a --max 10 -o json
  pgcoord tail completion --namespace deploys --outcome failed
  pgcoord tail completion --subscription mailer --from-start --exec -- send-mail
  pgcoord tail completion --lag --cursor-file mailer.cursor
"""


def _register(name: str, kind_option: str, metavar: str, text: str) -> None:
    """Registers one command; the two differ in the outbox, the option for the kind of event, and the help."""

    def follow(
        ctx: typer.Context,
        from_cursor: FromOption = None,
        from_start: FromStart = False,
        since: Since = None,
        until: Until = None,
        most: Max = None,
        no_follow: NoFollow = False,
        partition: Partition = None,
        namespace: Namespace = None,
        instance_tag: InstanceTag = None,
        kind: list[str] | None = typer.Option(None, kind_option, metavar=metavar, help="Only these; repeatable."),  # noqa: B008
        cursor_file: CursorFileOption = None,
        subscription: SubscriptionOption = None,
        lag: Lag = False,
        max_lag: MaxLag = None,
        exec_: Exec = False,
        batch: BatchSize = None,
        attempts: Attempts = None,
        words: Words = None,
    ) -> None:
        from pgcoord_cli.core.events.outbox import OUTBOXES

        _tail(ctx, OUTBOXES[name], Call(
            from_cursor, from_start, since, until, most, no_follow, partition or [], namespace or [],
            instance_tag or [], kind or [], cursor_file, subscription, lag, max_lag, exec_, batch, attempts,
            words or [],
        ))  # fmt: skip

    follow.__doc__ = text
    command(app, name)(follow)


_register("lease", "--event-type", "TYPE", LEASE_HELP)
_register("completion", "--outcome", "OUTCOME", COMPLETION_HELP)


def _tail(ctx: typer.Context, outbox: Outbox, call: Call) -> None:
    settings, out = output_of(ctx, is_daemon=not call.lag)
    _check(call)
    _warn_of_unknown_kinds(outbox, call.kinds)
    if call.lag:
        _show_lag(settings, out, outbox, call)
        return
    checkpoint = _open_checkpoint(settings, out, outbox, call)
    try:
        position = checkpoint.load() if checkpoint else None
        passed = checkpoint.passed if checkpoint else None
        if position and passed is None:
            _log().warning(UNCHECKED)
        with closing(_make_tail(settings, out, outbox, call, position, passed)) as tail:
            if call.exec_ and checkpoint:
                _follow_with_command(tail, outbox, call, checkpoint)
            else:
                _follow(tail, out, outbox, call, checkpoint)
    except CursorExpired as error:
        error.hint = _resume_hint(call, error) or error.hint
        raise
    finally:
        if checkpoint:
            checkpoint.close()


def _log() -> Logger:
    """Returns the logger of what this module reports, in addition to the tail's own."""
    import logging

    return logging.getLogger("pgcoord.tail")


def _warn_of_unknown_kinds(outbox: Outbox, kinds: list[str]) -> None:
    """Warns of kinds that this version does not know: a newer one may, otherwise the tail matches no event."""
    for kind in kinds:
        if kind not in outbox.kinds:
            _log().warning("%r is not a known kind of event (%s)", kind, ", ".join(sorted(outbox.kinds)))


def _resume_hint(call: Call, error: CursorExpired) -> str | None:
    """Returns how to move a stored cursor, which takes precedence over --from; None without one."""
    if call.subscription is not None:
        force = " --force" if isinstance(error, HistoryChanged) else ""
        return f"{error.resume_reason}: pgcoord subscription set {call.subscription} {error.resume_at}{force}"
    if call.cursor_file:
        return f"{error.resume_reason}: write {error.resume_at} into {call.cursor_file}"
    return None


def _check(call: Call) -> None:
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
    filters = {
        "--namespace": call.namespaces,
        "--instance-tag": call.instance_tags,
        "--event-type or --outcome": call.kinds,
    }
    for option, values in filters.items():
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


def _open_checkpoint(settings: Settings, out: Output, outbox: Outbox, call: Call) -> PositionStore | None:
    from pgcoord_cli.core.events.cursor_file import CursorFile
    from pgcoord_cli.core.events.subscriptions import Subscription
    from pgcoord_cli.core.locks.ownership import check_name

    if call.cursor_file:
        file = CursorFile(call.cursor_file)
        file.lock()
        return file
    if call.subscription is not None:
        check_text(call.subscription, "--subscription")
        name = check_name(call.subscription, "--subscription")
        return Subscription(settings, name, outbox, lambda notice: _report(out, notice, call), filters=_filters(call))
    return None


def _filters(call: Call) -> Filters:
    from pgcoord_cli.core.events.filters import Filters

    return Filters(call.partitions, call.namespaces, call.instance_tags, call.kinds)


def _make_tail(
    settings: Settings, out: Output, outbox: Outbox, call: Call, position: int | None, passed: PassedEvent | None
) -> Tail:
    from pgcoord_cli.core.events.start_position import StartPosition
    from pgcoord_cli.core.events.tail import Tail

    return Tail(
        settings,
        outbox,
        start=_start(call) if position is None else StartPosition.position(position, passed),
        until=None if call.until is None else _until(call.until),
        filters=_filters(call),
        follow=not call.no_follow,
        report=lambda notice: _report(out, notice, call),
    )


def _start(call: Call) -> StartPosition:
    from pgcoord_cli.core.events.cursor import from_cursor
    from pgcoord_cli.core.events.start_position import StartPosition

    if call.from_cursor is not None:
        return StartPosition.position(from_cursor(call.from_cursor, "--from"))
    if call.since is not None:
        return StartPosition.time(_moment(call.since, "--since"))
    return StartPosition.beginning() if call.from_start else StartPosition.now()


def _until(text: str) -> StartPosition:
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


# -- following


def _follow(tail: Tail, out: Output, outbox: Outbox, call: Call, checkpoint: PositionStore | None) -> None:
    """Writes each batch and then saves its position, so that a saved position has been written."""
    from pgcoord_cli.core.events.history import PassedEvent
    from pgcoord_cli.render.events import EventStream

    stream, checks = EventStream(out, outbox.noun), EventChecks(outbox)

    def stop() -> None:
        tail.stop()
        if checkpoint:
            checkpoint.stop()

    received = stop_on_signals(stop)
    spare_the_collector()
    left = call.most
    position = None
    with stdout_reader(tail.stop, is_needed=not call.no_follow) as reader:
        stream.begin()
        for batch in tail.batches():
            events, position, passed = batch.events[:left], batch.position, batch.passed
            if left is not None and len(events) == left and events:
                position, passed = events[-1].event_id, PassedEvent.of(events[-1])
            checks.warn_of(events)
            stream.write(events)
            is_last = left is not None and (left := left - len(events)) == 0
            reader.is_needed &= not is_last
            if checkpoint:
                checkpoint.save(position, passed)
            if is_last:
                break
    if received:
        _log_how_to_resume(outbox, call, position)
        raise ended_by_signal(received[0])


def _follow_with_command(tail: Tail, outbox: Outbox, call: Call, store: PositionStore) -> None:
    """Runs the command for each batch and saves the position once the command has handled it."""
    from pgcoord_cli.core.concurrency.delivery import Delivery
    from pgcoord_cli.core.events.history import PassedEvent
    from pgcoord_cli.render.events import json_line_maker

    line, checks = json_line_maker(outbox.noun), EventChecks(outbox)

    def stop() -> None:
        tail.stop()
        store.stop()
        delivery.signal(received[-1])

    with closing(Delivery(call.words, call.attempts, "the batch")) as delivery:
        received = stop_on_signals(stop)
        left = call.most
        for batch in tail.batches():
            events = batch.events[:left]
            checks.warn_of(events)
            for part in _parts(events, call.batch or 1):
                if code := delivery.deliver("".join(map(line, part)).encode()):
                    command, event_id = call.words[0], part[0].event_id
                    _log().warning("%s exited with %d; the position stays before event %d", command, code, event_id)
                    raise typer.Exit(code)
                if code is None:
                    _log().info(RESUMES)
                    raise ended_by_signal(received[0])
                store.save(part[-1].event_id, PassedEvent.of(part[-1]))
            if left is not None and (left := left - len(events)) == 0:
                break
            store.save(batch.position, batch.passed)
        if received:
            _log().info(RESUMES)
            raise ended_by_signal(received[0])


def _parts(events: list[Event], size: int) -> Iterator[list[Event]]:
    for first in range(0, len(events), size):
        yield events[first : first + size]


def _log_how_to_resume(outbox: Outbox, call: Call, position: int | None) -> None:
    from pgcoord_cli.core.events.cursor import to_cursor

    if call.cursor_file or call.subscription is not None:
        _log().info(RESUMES)
    elif position is not None:
        cursor = to_cursor(position)
        fields = {"cursor": cursor}
        _log().info("stopped; resume with: pgcoord tail %s --from %s", outbox.noun, cursor, extra=fields)


def _report(out: Output, notice: Notice, call: Call) -> None:
    if out.is_json and not call.exec_:  # under --exec, stdout belongs to the command
        record = notice._asdict()
        if notice.held_event_id is None:
            record = {name: record[name] for name in ("type", "cursor", "message")}
        else:
            record["holders"] = [holder._asdict() for holder in notice.holders]
        out.next_document(record)


class EventChecks:
    """Warns of events with unknown kinds or malformed execution ids, which are printed all the same; once each."""

    def __init__(self, outbox: Outbox) -> None:
        self._known = set(outbox.kinds)
        self._warned_of_ids = False

    def warn_of(self, events: list[Event]) -> None:
        """Warns once per unknown kind, and once of an execution id that is no UUID."""
        if not {event.kind for event in events} <= self._known:
            self._warn_of_kinds(events)
        if not self._warned_of_ids:
            self._warn_of_ids(events)

    def _warn_of_kinds(self, events: list[Event]) -> None:
        for event in events:
            if event.kind not in self._known:
                self._known.add(event.kind)
                _log().warning("event %d: %r is not a known kind of event", event.event_id, event.kind)

    def _warn_of_ids(self, events: list[Event]) -> None:
        if not are_uuids([event.execution_id for event in events]):
            first = next(event for event in events if not are_uuids([event.execution_id]))
            self._warned_of_ids = True
            _log().warning(
                "event %d: execution id %r is not a UUID; others are not reported", first.event_id, first.execution_id
            )


def are_uuids(ids: Sequence[str]) -> bool:
    """Whether all texts are UUIDs. Checks a whole batch in two passes over bytes, since a catch-up has millions."""
    lines = "".join(f"{text}\n" for text in ids).encode()
    return lines.translate(DIGITS_MARKED) == SHAPE_OF_UUID * len(ids)


# -- lag


def _show_lag(settings: Settings, out: Output, outbox: Outbox, call: Call) -> None:
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.events.tail import lag_document

    with session.command_session(settings, "tail", writes=False) as conn:
        document = lag_document(conn, outbox, *_given_position(conn, outbox, call))
    out.document(document)
    holder = document["holder"]
    if holder and holder["since"] is None and holder["application"] is not None:
        out.note("since is hidden: to see that of other roles, this role needs a GRANT of pg_read_all_stats")
    if call.max_lag is not None and document["lag"] > call.max_lag:
        raise ConditionFalse(f"the lag of {document['lag']} events exceeds {call.max_lag}", answered=True)


def _given_position(conn: Any, outbox: Outbox, call: Call) -> tuple[int, PassedEvent | None]:
    from pgcoord_cli.core.events import subscriptions
    from pgcoord_cli.core.events.cursor import from_cursor
    from pgcoord_cli.core.events.cursor_file import CursorFile

    if call.from_cursor is not None:
        return from_cursor(call.from_cursor, "--from"), None
    position = passed = None
    if call.subscription is not None:
        position, passed = subscriptions.checkpoint(conn, call.subscription, outbox)
    elif call.cursor_file:
        file = CursorFile(call.cursor_file)
        position, passed = file.load(), file.passed
    if position is None:
        raise UsageError(
            "--lag needs a cursor to count from",
            hint="give --from CURSOR, --cursor-file FILE or --subscription NAME",
        )
    return position, passed

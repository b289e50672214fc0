"""`pgcoord tail`: follows an event outbox from a cursor on, without missing an event."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol

import typer

from pgcoord_cli.commands import tail_options
from pgcoord_cli.commands.framework import (
    command,
    ended_by_signal,
    noun,
    output_of,
    spare_the_collector,
    stdout_reader,
    stop_on_signals,
)
from pgcoord_cli.commands.tail_options import (
    Attempts,
    BatchSize,
    Call,
    CursorFileOption,
    Exec,
    FromOption,
    FromStart,
    InstanceTag,
    Lag,
    Max,
    MaxLag,
    Namespace,
    NoFollow,
    Partition,
    Since,
    SubscriptionOption,
    Until,
    Words,
)
from pgcoord_cli.errors import ConditionFalse, CursorExpired, HistoryChanged, UsageError
from pgcoord_cli.settings import Settings, check_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from logging import Logger

    from pgcoord_cli.core.events.history import PassedEvent
    from pgcoord_cli.core.events.notices import Notice
    from pgcoord_cli.core.events.outbox import Event, Outbox
    from pgcoord_cli.core.events.tail import Tail
    from pgcoord_cli.render import Output

RESUMES = "stopped; the same command resumes here"

UNCHECKED = (
    "nothing is known of the event at the stored cursor, so it cannot be checked that the cursor belongs to this "
    "history of the database; from now on it is"
)

app = noun("Follow an event outbox from a cursor on, without missing an event.")


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
    tail_options.check(call)
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
        return Subscription(
            settings, name, outbox, lambda notice: _report(out, notice, call), filters=tail_options.filters(call)
        )
    return None


def _make_tail(
    settings: Settings, out: Output, outbox: Outbox, call: Call, position: int | None, passed: PassedEvent | None
) -> Tail:
    from pgcoord_cli.core.events.start_position import StartPosition
    from pgcoord_cli.core.events.tail import Tail

    return Tail(
        settings,
        outbox,
        start=tail_options.start(call) if position is None else StartPosition.position(position, passed),
        until=None if call.until is None else tail_options.until(call.until),
        filters=tail_options.filters(call),
        follow=not call.no_follow,
        report=lambda notice: _report(out, notice, call),
    )


# -- following


def _follow(tail: Tail, out: Output, outbox: Outbox, call: Call, checkpoint: PositionStore | None) -> None:
    """Writes each batch and then saves its position, so that a saved position has been written."""
    from pgcoord_cli.core.events.event_checks import EventChecks
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
    from pgcoord_cli.core.events.event_checks import EventChecks
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

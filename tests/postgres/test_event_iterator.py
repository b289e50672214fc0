"""Iterating over an outbox, blocking and in asyncio: what both deliver, and what they leave behind when they end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from pgcoord_cli.core.events import async_tail
from pgcoord_cli.core.events.async_tail import AsyncEventIterator, tail_async
from pgcoord_cli.core.events.cursor import to_cursor
from pgcoord_cli.core.events.event_iterator import tail
from pgcoord_cli.core.events.filters import Filters
from pgcoord_cli.core.events.notices import Notice
from pgcoord_cli.core.events.outbox import CompletionEvent, LeaseEvent
from pgcoord_cli.core.events.start_position import StartPosition
from pgcoord_cli.core.events.tail import BATCH_LIMIT, Batch, Tail
from pgcoord_cli.errors import CursorExpired, HistoryChanged, PgcoordError, SchemaMissing, UsageError
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, until_async, value

Conn = psycopg.Connection[Any]

BEGINNING = StartPosition.beginning()


@pytest.fixture(autouse=True)
def environ(settings: Settings, sql: Conn, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The database is found by the environment alone; no thread, session or descriptor of a tail outlives a test."""
    monkeypatch.setenv("PGCOORD_DSN", settings.dsn)
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    yield
    assert threads() == 0
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208
    until(lambda: not sessions(sql))


def threads() -> int:
    """How many asynchronous tails have a thread."""
    return sum(1 for thread in threading.enumerate() if thread.name == "pgcoord/tail")


def sessions(sql: Conn) -> list[int]:
    """The backends of the test's tails."""
    query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pgcoord/tail' AND datname = current_database()"
    return [row[0] for row in sql.execute(query)]


def write(sql: Conn, count: int = 1, event_type: str = "acquired") -> None:
    query = "INSERT INTO pgcoord.lease_events (execution_id, event_type) SELECT 'job', %s FROM generate_series(1, %s)"
    sql.execute(query, [event_type, count])


def run(scenario: Awaitable[None]) -> None:
    """Runs a scenario in an event loop of its own; fails it after TIMEOUT seconds."""

    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT):
            await scenario

    asyncio.run(bounded())


# -- what is delivered


def everything(sql: Conn) -> tuple[list[LeaseEvent], list[LeaseEvent]]:
    """All lease events, by each of the two."""

    async def collect() -> list[LeaseEvent]:
        async with tail_async("lease", start=BEGINNING, follow=False) as events:
            return [event async for event in events]

    return list(tail("lease", start=BEGINNING, follow=False)), asyncio.run(collect())


def test_i10_both_deliver_every_event_in_order_with_its_cursor(sql: Conn) -> None:
    write(sql, 2 * BATCH_LIMIT + 1)
    blocking, asynchronous = everything(sql)
    assert [event.event_id for event in blocking] == list(range(1, 2 * BATCH_LIMIT + 2))
    assert asynchronous == blocking
    for event in (blocking[0], blocking[-1]):
        rest = tail("lease", start=StartPosition.cursor(event.cursor), follow=False)
        assert sum(1 for _ in rest) == 2 * BATCH_LIMIT + 1 - event.event_id


def test_the_events_of_each_outbox_have_their_own_type(sql: Conn) -> None:
    """mypy checks the attributes, too: an event of the wrong type has no such attribute."""
    write(sql)
    sql.execute("INSERT INTO pgcoord.completion_events (execution_id, outcome) VALUES (gen_random_uuid(), 'success')")
    leases: list[LeaseEvent] = list(tail("lease", start=BEGINNING, follow=False))
    completions: list[CompletionEvent] = list(tail("completion", start=BEGINNING, follow=False))
    assert ([event.event_type for event in leases], [event.outcome for event in completions]) == (
        ["acquired"],
        ["success"],
    )


def test_the_cursor_of_an_iterator_moves_past_what_its_filters_leave_out(sql: Conn) -> None:
    wanted = Filters(kinds={"expired"})
    write(sql, 3)
    write(sql, 1, "expired")
    write(sql, 3)
    with tail("lease", start=BEGINNING, filters=wanted, follow=False) as events:
        assert events.cursor is None
        assert next(events).event_id == 4
        assert events.cursor == to_cursor(4)
        assert next(events, None) is None
        assert events.cursor == to_cursor(7)

    async def scenario() -> None:
        async with tail_async("lease", start=BEGINNING, filters=wanted, follow=False) as events:
            assert events.cursor is None
            assert (await anext(events)).event_id == 4
            assert events.cursor == to_cursor(4)
            assert await anext(events, None) is None
            assert events.cursor == to_cursor(7)

    run(scenario())


async def numbers(events: AsyncEventIterator[LeaseEvent], count: int) -> list[int]:
    """The ids of the next events."""
    return [(await anext(events)).event_id for _ in range(count)]


def test_both_wait_for_events_that_come_later(sql: Conn) -> None:
    write(sql)
    with tail("lease", start=BEGINNING) as events, ThreadPoolExecutor(1) as pool:
        assert next(events).event_id == 1
        later = pool.submit(next, events)
        write(sql)
        assert later.result(TIMEOUT).event_id == 2

    async def scenario() -> None:
        async with tail_async("lease", start=BEGINNING) as events:
            assert await numbers(events, 2) == [1, 2]
            later = asyncio.create_task(numbers(events, 1))
            await until_async(lambda: len(sessions(sql)) == 1)
            assert not later.done(), "the event loop is free while the tail waits"
            write(sql)
            assert await later == [3]

    run(scenario())


def test_a_slow_caller_slows_the_reading_down(sql: Conn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller is in the first batch of events; the second one has a place, and the third one waits for one."""
    read: list[int] = []

    class CountingTail(Tail):
        def batches(self) -> Iterator[Batch]:
            for batch in super().batches():
                read.append(len(batch.events))
                yield batch

    monkeypatch.setattr(async_tail, "Tail", CountingTail)
    write(sql, 6 * BATCH_LIMIT)

    async def scenario() -> None:
        async with tail_async("lease", start=BEGINNING, follow=False) as events:
            assert await numbers(events, 1) == [1]
            await until_async(lambda: len(read) == 4)
            # Time for the thread to read on, if it does not wait: as much as it takes to read everything.
            assert len(await asyncio.to_thread(list, tail("lease", start=BEGINNING, follow=False))) == 6 * BATCH_LIMIT
            assert read == [0, *3 * [BATCH_LIMIT]]
            assert len(await numbers(events, 6 * BATCH_LIMIT - 1)) == 6 * BATCH_LIMIT - 1

    run(scenario())


def test_a_lost_connection_is_reported_in_the_event_loop_and_reopened(sql: Conn) -> None:
    write(sql)
    notices: list[tuple[str, str, bool]] = []

    def report(notice: Notice) -> None:
        notices.append((notice.type, notice.cursor, asyncio.current_task() is not None))

    async def scenario() -> None:
        async with tail_async("lease", start=BEGINNING, report=report) as events:
            assert await numbers(events, 1) == [1]
            (pid,) = sessions(sql)
            assert value(sql, "SELECT pg_terminate_backend(%s, 30000)", pid)
            write(sql)
            assert await numbers(events, 1) == [2]

    run(scenario())
    assert notices == [("disconnected", to_cursor(1), True), ("connected", to_cursor(1), True)]


# -- the end


async def cancelled_while_it_waits_for_an_event(sql: Conn) -> None:
    async def follow() -> None:
        async for _ in tail_async("lease"):
            raise AssertionError("there is no event")

    task = asyncio.create_task(follow())
    await until_async(lambda: sessions(sql))
    await cancel(task)
    # The generator was closed before the cancellation reached its caller.
    assert threads() == 0


async def cancelled_before_it_is_connected(_sql: Conn) -> None:
    async def follow() -> None:
        async for _ in tail_async("lease"):
            raise AssertionError("there is no event")

    task = asyncio.create_task(follow())
    await asyncio.sleep(0)
    await cancel(task)
    assert threads() == 0


async def cancelled_while_its_thread_waits_for_room(sql: Conn) -> None:
    write(sql, 6 * BATCH_LIMIT)
    handling = asyncio.Event()

    async def follow() -> None:
        async with tail_async("lease", start=BEGINNING) as events:
            async for _ in events:
                handling.set()
                await asyncio.get_running_loop().create_future()

    task = asyncio.create_task(follow())
    await handling.wait()
    await cancel(task)
    assert threads() == 0


async def cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def closed_in_the_middle(sql: Conn) -> None:
    write(sql, 2)
    events = tail_async("lease", start=BEGINNING)
    assert await numbers(events, 1) == [1]
    await events.aclose()
    assert threads() == 0
    assert await anext(events, None) is None
    await events.aclose()


async def closed_before_the_first_event(_sql: Conn) -> None:
    await tail_async("lease").aclose()


async def left_by_break_and_dropped(sql: Conn) -> None:
    write(sql, 2)
    async for _ in tail_async("lease", start=BEGINNING):
        break
    await until_async(lambda: threads() == 0)


async def left_by_break_at_the_end_of_the_program(sql: Conn) -> None:
    write(sql, 2)
    async for _ in tail_async("lease", start=BEGINNING):
        break


async def stopped_by_another_task(sql: Conn) -> None:
    write(sql, 2)
    async with tail_async("lease", start=BEGINNING) as events:
        following = asyncio.create_task(numbers(events, 3))
        await until_async(lambda: events.cursor == to_cursor(2))
        events.stop()
        with pytest.raises(StopAsyncIteration):
            await following


@pytest.mark.parametrize(
    "scenario",
    [
        cancelled_while_it_waits_for_an_event,
        cancelled_before_it_is_connected,
        cancelled_while_its_thread_waits_for_room,
        closed_in_the_middle,
        closed_before_the_first_event,
        left_by_break_and_dropped,
        left_by_break_at_the_end_of_the_program,
        stopped_by_another_task,
    ],
)
def test_an_asynchronous_tail_leaves_no_thread_and_no_session(
    scenario: Callable[[Conn], Awaitable[None]], sql: Conn
) -> None:
    """The fixture `environ` checks sessions and descriptors."""
    run(scenario(sql))


def test_a_blocking_tail_that_is_dropped_leaves_no_session(sql: Conn) -> None:
    write(sql, 2)
    tail("lease")
    for _ in tail("lease", start=BEGINNING):
        break
    until(lambda: not sessions(sql))


def test_another_thread_stops_a_blocking_tail_that_waits(sql: Conn) -> None:
    with tail("lease") as events, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(list[LeaseEvent], events)
        until(lambda: sessions(sql))
        events.stop()
        assert waiting.result(TIMEOUT) == []


# -- refusals


def test_arguments_that_make_no_sense_are_refused_at_the_call() -> None:
    calls: list[tuple[str, Callable[[], object]]] = [
        ("outbox: 'leases' is not one of lease, completion", lambda: tail("leases")),
        ("outbox: 'leases' is not one of lease, completion", lambda: tail_async("leases")),
        ("schema: 'a.b' cannot be a pgcoord schema", lambda: tail("lease", schema="a.b")),
        ("schema: 'a.b' cannot be a pgcoord schema", lambda: tail_async("lease", schema="a.b")),
        ("cursor: 'x' is not a cursor", lambda: StartPosition.cursor("x")),
        ("filters: namespaces='deploys' is not a set", lambda: Filters(namespaces="deploys")),
    ]
    for message, call in calls:
        with pytest.raises(UsageError) as refused:
            call()
        assert refused.value.message == message


def first_error(dsn: str | None, start: StartPosition) -> list[PgcoordError]:
    """What the first event of each of the two raises."""
    errors = []
    with pytest.raises(PgcoordError) as raised:
        next(tail("lease", dsn, start=start))
    errors.append(raised.value)

    async def scenario() -> None:
        await anext(tail_async("lease", dsn, start=start))

    with pytest.raises(PgcoordError) as raised:
        run(scenario())
    return [*errors, raised.value]


def test_both_raise_at_the_first_event_what_is_wrong_with_the_start(sql: Conn, empty_settings: Settings) -> None:
    assert {type(error) for error in first_error(empty_settings.dsn, BEGINNING)} == {SchemaMissing}
    assert {type(error) for error in first_error(None, StartPosition.position(7))} == {HistoryChanged}
    write(sql, 3)
    sql.execute("UPDATE pgcoord.outbox_floors SET collected_through = 2 WHERE outbox = 'lease_events'")
    expired = first_error(None, StartPosition.position(1))
    assert [getattr(error, "resume_at", None) for error in expired] == [to_cursor(2), to_cursor(2)]
    assert {type(error) for error in expired} == {CursorExpired}


def test_a_set_of_filters_may_be_any_collection() -> None:
    assert Filters(partitions=[1, 2], kinds=("expired",)) == Filters(frozenset({2, 1}), kinds={"expired"})


# -- a fork

FORKING = """
import asyncio, os, sys
from pgcoord_cli import StartPosition, UsageError, connect, tail, tail_async

def refused(call):
    try:
        call()
    except BaseException as error:
        if not isinstance(error, UsageError):
            print("instead:", repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        assert f"was opened by process {os.getppid()}" in error.message, error
        assert error.hint
        return
    print("not refused:", call, file=sys.stderr)
    os._exit(1)

def in_child(*calls):
    if (child := os.fork()) == 0:
        for call in calls:
            refused(call)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "a child was not refused"

def step(coroutine):
    # The child has no running loop to wait in; each of these is refused before it waits.
    try:
        coroutine.send(None)
    except StopIteration:
        pass

with tail("lease", start=StartPosition.beginning()) as events:
    print(next(events).event_id)
    in_child(lambda: next(events))
    print(next(events).event_id)

async def scenario():
    async with tail_async("lease", start=StartPosition.beginning()) as events:
        print((await anext(events)).event_id)
        in_child(lambda: step(events.__anext__()))
        print((await anext(events)).event_id)
    async with await connect() as database:
        await database.read_version()
        in_child(lambda: step(database.read_version()), lambda: step(database.transaction().get(b"a")))
        print(await database.read_version())

asyncio.run(scenario())
"""


def test_after_a_fork_the_child_is_refused_and_the_parent_goes_on(sql: Conn) -> None:
    write(sql, 2)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (done.stderr, done.returncode, done.stdout.split()) == ("", 0, ["1", "2", "1", "2", "0"])

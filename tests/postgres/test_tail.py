"""Tails on a real database: writers that end in every order, and what a tail may deliver meanwhile (rule I10).

No test measures time. A tail sets a sequence whenever it requests wakeups and reads, so a test waits for a number of
reads (`wait_for_reads`), and then checks which events have been delivered and which have not.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import permutations, product, takewhile
from threading import Barrier, Condition, Thread
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.sql import SQL, Identifier, Literal

from pgcoord_cli.core.database.session import command_session
from pgcoord_cli.core.embedded.server import EmbeddedServer, StopMode
from pgcoord_cli.core.events import stall_detector
from pgcoord_cli.core.events.cursor import from_cursor, to_cursor
from pgcoord_cli.core.events.event_iterator import tail
from pgcoord_cli.core.events.filters import Filters
from pgcoord_cli.core.events.notices import Notice
from pgcoord_cli.core.events.outbox import (
    COMPLETION,
    LEASE,
    CompletionEvent,
    Event,
    LeaseEvent,
    Outbox,
    append_completion_event,
    append_lease_event,
)
from pgcoord_cli.core.events.start_position import StartPosition
from pgcoord_cli.core.events.tail import BATCH_LIMIT, GAP_LIMIT, Batch, Tail
from pgcoord_cli.core.events.tail_connection import WAKEUP_REQUEST_SECONDS, TailConnection
from pgcoord_cli.core.gc import collect_events
from pgcoord_cli.errors import ConnectionFailed, CursorExpired, HistoryChanged, PgcoordError, SchemaMissing
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, value
from tests.faults.tail_process import wake_until

if TYPE_CHECKING:
    from pytest_postgresql.executors import NoopExecutor


MANY = BATCH_LIMIT * 5 // 2
"""More events than fit into two batches."""

LONG_BEFORE = 100_000_000
"""Milliseconds: more than a day."""

Conn = psycopg.Connection[Any]


# -- a tail under observation


class Reader:
    """A tail in its own thread, with the batches and notices so far."""

    def __init__(self, settings: Settings, outbox: Outbox = LEASE, **how: Any) -> None:
        self.batches: list[Batch] = []
        self.notices: list[Notice] = []
        self.error: PgcoordError | None = None
        self.has_ended = False
        self._news = Condition()
        self.tail = Tail(settings, outbox, report=self._on_notice, **how)
        self._thread = Thread(target=self._read)
        self._thread.start()
        self.until(lambda: self.batches or self.has_ended)

    def _read(self) -> None:
        try:
            for batch in self.tail.batches():
                self._record(partial(self.batches.append, batch))
        except PgcoordError as error:
            self.error = error
        finally:
            self._record(partial(setattr, self, "has_ended", True))

    def _on_notice(self, notice: Notice) -> None:
        self._record(partial(self.notices.append, notice))

    def _record(self, change: Callable[[], object]) -> None:
        with self._news:
            change()
            self._news.notify_all()

    @property
    def events(self) -> list[Event]:
        return [event for batch in list(self.batches) for event in batch.events]

    @property
    def ids(self) -> list[int]:
        return [event.event_id for event in self.events]

    @property
    def notice_types(self) -> list[str]:
        return [notice.type for notice in list(self.notices)]

    def until(self, condition: Callable[[], object]) -> None:
        with self._news:
            assert self._news.wait_for(condition, TIMEOUT), (self.ids[-10:], self.notices, self.error)

    def wait_for(self, ids: list[int]) -> None:
        """Waits until as many events have been delivered, and checks that they are these."""
        self.until(lambda: len(self.ids) >= len(ids) or self.has_ended)
        assert self.ids == ids

    def wait_for_end(self) -> None:
        self.until(lambda: self.has_ended)

    def end(self) -> None:
        self.tail.stop()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        self.tail.close()


StartReader = Callable[..., Reader]


@pytest.fixture
def start_reader(request: pytest.FixtureRequest) -> Iterator[StartReader]:
    """Starts tails, on the test's database by default, and ends them after the test."""
    started: list[Reader] = []

    def start(*args: Any, settings: Settings | None = None, **how: Any) -> Reader:
        started.append(Reader(settings or request.getfixturevalue("settings"), *args, **how))
        return started[-1]

    yield start
    for reader in started:
        reader.end()


def wait_for_reads(sql: Conn, count: int = 3) -> None:
    """Waits until the tail of the lease events has completed that many reads with a gap check."""

    def next_request(last: int | None) -> int | None:
        query = "SELECT pg_sequence_last_value('lease_events_wake_until'), pg_notify('pgcoord.lease_events', '')"
        until(lambda: value(sql, query) != last)
        return wake_until(sql)

    requested = wake_until(sql)
    for _ in range(count + 1):  # the request of one more read shows that the read before it is complete
        requested = next_request(requested)


def connect(settings: Settings, **options: Any) -> Conn:
    """Opens a session whose lock_timeout is TIMEOUT, so that a blocked test fails instead of hanging."""
    conn = psycopg.connect(make_conninfo(settings.dsn, **options), autocommit=True)
    conn.execute("SELECT set_config('lock_timeout', %s, false)", [f"{TIMEOUT:g}s"])
    return conn


def connect_to_schema(settings: Settings) -> Conn:
    """Opens a connection with the search_path of the fixture `sql`."""
    return connect(settings, options="-c search_path=pgcoord")


@pytest.fixture
def writer(settings: Settings) -> Iterator[Conn]:
    """The session of a service that writes events."""
    with connect(settings, application_name="a service") as conn:
        yield conn


@pytest.fixture
def prepares(sql: Conn) -> Iterator[None]:
    """Rolls back prepared transactions after the test; one that is left would block DROP DATABASE."""
    yield
    for (gid,) in sql.execute("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()").fetchall():
        sql.execute(SQL("ROLLBACK PREPARED {}").format(Literal(gid)))


def write(conn: Conn, count: int = 1, **columns: Any) -> list[int]:
    """Inserts lease events in one statement, in the current transaction of `conn` if any; returns their ids."""
    columns = {"execution_id": str(uuid4()), "event_type": "acquired"} | columns
    statement = SQL("INSERT INTO pgcoord.lease_events ({}) SELECT {} FROM generate_series(1, {}) RETURNING event_id")
    names, values = SQL(", ").join(map(Identifier, columns)), SQL(", ").join(map(Literal, columns.values()))
    return [row[0] for row in conn.execute(statement.format(names, values, count))]


def roll_back(conn: Conn, count: int = 1) -> list[int]:
    """Draws ids in a transaction that rolls back; returns them."""
    with conn.transaction(force_rollback=True):
        return write(conn, count)


def write_before(conn: Conn, milliseconds: int) -> list[int]:
    """Inserts an event that looks as if it had been inserted that long ago; returns its id."""
    ids = write(conn)
    conn.execute(
        "UPDATE pgcoord.lease_events SET committed_at_ms = committed_at_ms - %s WHERE event_id = ANY (%s)",
        [milliseconds, ids],
    )
    return ids


@contextmanager
def uncommitted_event(conn: Conn) -> Iterator[int]:
    """Inserts an event, yields its id and commits when the block ends."""
    with conn.transaction():
        (event_id,) = write(conn)
        yield event_id


def prepare(conn: Conn, gid: str, *, writes: Callable[[Conn], list[int]] = write) -> list[int]:
    """Inserts events in a transaction and prepares it; returns their ids."""
    conn.execute("BEGIN")
    conn.execute("SET LOCAL pgcoord.notify = off")
    ids = writes(conn)
    conn.execute(SQL("PREPARE TRANSACTION {}").format(Literal(gid)))
    return ids


def tail_pid(sql: Conn) -> int:
    """Waits for the tail's session and returns its backend pid."""
    query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pgcoord/tail' AND datname = current_database()"
    until(lambda: sql.execute(query).fetchone())
    (pid,) = sql.execute(query).fetchone() or (0,)
    return int(pid)


def is_waiting(sql: Conn, pid: int) -> bool:
    """Returns whether a session waits for a lock."""
    return sql.execute("SELECT FROM pg_locks WHERE pid = %s AND NOT granted", [pid]).fetchone() is not None


# -- five writers, every order, every outcome


class TransactionEnd(NamedTuple):
    """How a writer's transaction ends, and whether it is prepared first; `early`: before any transaction ends."""

    commits: bool
    prepared: bool = False
    early: bool = False

    @property
    def verb(self) -> str:
        return "COMMIT" if self.commits else "ROLLBACK"


class Case(NamedTuple):
    """The order in which the five transactions end, and how each ends."""

    order: tuple[int, ...]
    ends: tuple[TransactionEnd, ...]


ORDERS = list(permutations(range(5)))
PLAIN = [TransactionEnd(True), TransactionEnd(False)]
PREPARED = [TransactionEnd(commits, True, early) for commits in (True, False) for early in (True, False)]
ALL_PLAIN = [Case(order, ends) for order, ends in product(ORDERS, product(PLAIN, repeat=5))]


def sample(number: int, seed: int) -> list[Case]:
    """Returns random cases of plain and prepared transactions."""
    chance = random.Random(seed)
    return [Case(chance.choice(ORDERS), tuple(chance.choices(PLAIN + PREPARED, k=5))) for _ in range(number)]


class FiveWriters:
    """FiveWriters open transactions, each with one uncommitted event, and a tail that reads meanwhile."""

    def __init__(self, sql: Conn, writers: list[Conn], reader: Reader, case: Case) -> None:
        self._sql = sql
        self._reader = reader
        self._case = case
        # Delivered before the five begin, so that no gap of an earlier case is left.
        (first,) = write(sql)
        reader.until(lambda: reader.ids[-1:] == [first])
        self._before = len(reader.ids)
        self._writers = writers
        self._ids = [self._begin(*each) for each in zip(writers, case.ends, strict=True)]
        self._committed: set[int] = set()
        self._open = set(self._ids)

    def play(self) -> None:
        """Ends the transactions in order and checks after each step what has been delivered."""
        self._check()
        for place, end in enumerate(self._case.ends):
            if end.early:
                self._prepare(place)
        for place in self._case.order:
            end = self._case.ends[place]
            if end.prepared and not end.early:
                self._prepare(place)
            self._end(place, end)
            self._check()
        self._reader.until(lambda: self._delivered == sorted(self._committed))

    def _begin(self, conn: Conn, end: TransactionEnd) -> int:
        conn.execute("BEGIN")
        if end.prepared:
            conn.execute("SET LOCAL pgcoord.notify = off")
        return write(conn)[0]

    def _prepare(self, place: int) -> None:
        self._writers[place].execute(SQL("PREPARE TRANSACTION {}").format(self._gid(place)))
        self._check()

    def _end(self, place: int, end: TransactionEnd) -> None:
        gid = self._gid(place)
        if end.prepared:
            self._sql.execute(SQL("{} PREPARED {}").format(SQL(end.verb), gid))
        else:
            self._writers[place].execute(end.verb)
        self._open.remove(self._ids[place])
        if end.commits:
            self._committed.add(self._ids[place])

    def _gid(self, place: int) -> Literal:
        return Literal(f"{self._sql.info.dbname} {self._ids[place]}")

    @property
    def _delivered(self) -> list[int]:
        return self._reader.ids[self._before :]

    def _check(self) -> None:
        wait_for_reads(self._sql)
        delivered = self._delivered
        first_open = min(self._open, default=max(self._ids) + 1)
        allowed = sorted(event_id for event_id in self._committed if event_id < first_open)
        assert delivered == allowed[: len(delivered)], self._case
        # Contiguous ids must be delivered at once, whatever is open above them.
        contiguous = list(takewhile(self._committed.__contains__, self._ids))
        assert delivered[: len(contiguous)] == contiguous, self._case


PlayAll = Callable[[list[Case]], None]


@pytest.fixture
def play_all(settings: Settings, sql: Conn, start_reader: StartReader, prepares: None) -> Iterator[PlayAll]:
    """Runs cases one after the other on one database, under one tail that starts from now."""
    writers = [connect(settings) for _ in range(5)]

    def play(cases: list[Case]) -> None:
        reader = start_reader()
        for case in cases:
            FiveWriters(sql, writers, reader, case).play()
        stored = [row[0] for row in sql.execute("SELECT event_id FROM lease_events ORDER BY event_id")]
        assert reader.ids == stored
        assert set(reader.notice_types) <= {"held_up"}

    yield play
    for conn in writers:
        conn.close()


def test_i10_five_writers_that_end_in_any_order_and_way(play_all: PlayAll) -> None:
    play_all(random.Random(5).sample(ALL_PLAIN, 20) + sample(25, seed=5))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(5))
def test_i10_five_writers_that_end_in_every_order_and_way(play_all: PlayAll, first: int) -> None:
    play_all([case for case in ALL_PLAIN if case.order[0] == first])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_i10_five_writers_of_which_some_prepare(play_all: PlayAll, seed: int) -> None:
    play_all(sample(400, seed))


def isolate(sql: Conn, isolation: str) -> None:
    """Sets the database's default isolation level, for later connections."""
    statement = SQL("ALTER DATABASE {} SET default_transaction_isolation = {}")
    sql.execute(statement.format(Identifier(sql.info.dbname), Literal(isolation)))


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_i10_five_writers_on_a_database_with_a_stricter_default_isolation(
    sql: Conn, isolation: str, request: pytest.FixtureRequest
) -> None:
    isolate(sql, isolation)
    play_all: PlayAll = request.getfixturevalue("play_all")  # connects after the setting
    play_all(sample(8, seed=8))


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
def test_i10_a_writer_that_ends_while_a_tail_is_about_to_list_the_writers(
    settings: Settings, sql: Conn, writer: Conn, start_reader: StartReader, isolation: str
) -> None:
    """The tail must read rows at least as new as its list. A lock delays its wakeup request until the writer ends."""
    isolate(sql, isolation)
    writer.execute("SET pgcoord.notify = off")  # so that it leaves the sequence alone
    reader = start_reader()
    pid = tail_pid(sql)
    with connect(settings) as obstacle:
        with uncommitted_event(writer) as held:
            (seen,) = write(sql)
            wait_for_reads(sql)
            obstacle.execute("BEGIN")
            obstacle.execute("ALTER SEQUENCE pgcoord.lease_events_wake_until CACHE 1")
            until(lambda: is_waiting(sql, pid))
        obstacle.execute("COMMIT")
        reader.wait_for([held, seen])


def test_i10_many_writers_at_once(settings: Settings, sql: Conn, start_reader: StartReader) -> None:
    reader = start_reader()
    together = Barrier(8)

    def work(seed: int) -> None:
        chance = random.Random(seed)
        with connect(settings) as conn:
            together.wait(TIMEOUT)
            for _ in range(60):
                with conn.transaction(force_rollback=chance.random() < 0.1):
                    for _ in range(chance.randint(1, 3)):
                        write(conn)

    threads = [Thread(target=work, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    reader.wait_for([row[0] for row in sql.execute("SELECT event_id FROM lease_events ORDER BY event_id")])


# -- which transactions hold a tail up


def gap_and_event(conn: Conn) -> list[int]:
    """Draws an id that rolls back, then inserts an event, so that the tail needs a list; returns the event's id."""
    roll_back(conn)
    return write(conn)


@pytest.fixture
def twin(migrated_template: NoopExecutor, settings: Settings, sql: Conn) -> Iterator[Conn]:
    """Another database made from the same template, so that its tables have the same oids."""
    name = f"{sql.info.dbname}_twin"
    template = Identifier(str(migrated_template.template_dbname))
    sql.execute(SQL("CREATE DATABASE {} TEMPLATE {}").format(Identifier(name), template))
    with connect(settings, dbname=name) as conn:
        yield conn
    sql.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(Identifier(name)))


def test_i10_a_transaction_in_another_database_does_not_hold_the_tail_up(
    sql: Conn, twin: Conn, start_reader: StartReader
) -> None:
    oid = "SELECT 'pgcoord.lease_events'::regclass::oid"
    assert sql.execute(oid).fetchone() == twin.execute(oid).fetchone()
    with twin.transaction():
        write(twin)
        reader = start_reader(start=StartPosition.beginning())
        reader.wait_for(gap_and_event(sql))
        reader.wait_for([2, *gap_and_event(sql)])
        assert reader.notice_types == []


@pytest.mark.parametrize(
    "statements",
    [
        pytest.param(["CREATE TABLE unrelated (number int)", "INSERT INTO unrelated VALUES (1)"], id="another table"),
        pytest.param(["LOCK pgcoord.kv IN ACCESS EXCLUSIVE MODE"], id="a lock"),
        pytest.param(["SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", "TABLE pgcoord.lease_events"], id="a reader"),
        pytest.param(["INSERT INTO pgcoord.completion_events (execution_id, outcome)"
                      " VALUES (gen_random_uuid(), 'success')"], id="a writer of the other outbox"),
        pytest.param(["SELECT pg_advisory_xact_lock_shared('pgcoord.lease_events'::regclass::bigint << 32)"],
                     id="an advisory lock of one key with the same bits"),
        pytest.param(["SELECT pg_advisory_xact_lock_shared('pgcoord.lease_events'::regclass::integer, 1)"],
                     id="an advisory lock with another second key"),
        pytest.param(["SAVEPOINT one", "INSERT INTO pgcoord.lease_events (execution_id, event_type) VALUES ('', '')",
                      "ROLLBACK TO SAVEPOINT one"], id="a savepoint that was rolled back to"),
    ],
)  # fmt: skip
def test_i10_an_unrelated_transaction_does_not_hold_the_tail_up(
    sql: Conn, writer: Conn, start_reader: StartReader, statements: list[str]
) -> None:
    with writer.transaction():
        for statement in statements:
            writer.execute(statement.encode())
        reader = start_reader(start=StartPosition.beginning())
        first = gap_and_event(sql)
        reader.wait_for(first)
        reader.wait_for([*first, *gap_and_event(sql)])
        assert reader.notice_types == []


def test_i10_a_transaction_that_began_after_the_gap_was_seen_does_not_hold_the_tail_up(
    settings: Settings, sql: Conn, writer: Conn, start_reader: StartReader
) -> None:
    reader = start_reader()
    with connect(settings) as late:
        with writer.transaction(force_rollback=True):
            write(writer)
            (second,) = write(sql)
            wait_for_reads(sql)
            late.execute("BEGIN")
            write(late)
        reader.wait_for([second])


def test_i10_every_event_of_a_transaction_that_writes_repeatedly_is_delivered(
    sql: Conn, writer: Conn, start_reader: StartReader
) -> None:
    reader = start_reader()
    with writer.transaction():
        for _ in range(3):
            write(writer)
            write(sql)
            wait_for_reads(sql)
            assert reader.ids == []
    reader.wait_for([1, 2, 3, 4, 5, 6])


# -- held up


@pytest.fixture
def stall_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a tail report a stall at its first wait instead of after STALL_SECONDS."""
    monkeypatch.setattr(stall_detector, "STALL_SECONDS", 0.0)


def test_a_tail_that_does_not_follow_ends_at_a_gap_and_names_the_open_transaction(
    sql: Conn, writer: Conn, start_reader: StartReader
) -> None:
    (first,) = write(sql)
    with uncommitted_event(writer) as missing:
        write(sql)
        reader = start_reader(start=StartPosition.beginning(), follow=False)
        reader.wait_for_end()
        pid = writer.info.backend_pid
        since = sql.execute("SELECT xact_start FROM pg_stat_activity WHERE pid = %s", [pid])
        (notice,) = reader.notices
        assert (notice.type, notice.held_event_id, notice.cursor) == ("held_up", missing, to_cursor(first))
        assert notice.holders == ((pid, "a service", *(since.fetchone() or ())),)
    assert f"event {missing} may still be committed by pid {pid} (a service), open since " in notice.message
    assert reader.ids == [first]


def test_a_tail_that_is_held_up_by_a_prepared_transaction_names_it(
    sql: Conn, writer: Conn, start_reader: StartReader, prepares: None
) -> None:
    gid = f"{sql.info.dbname} transfer"
    (missing,) = prepare(writer, gid)
    write(sql)
    reader = start_reader(start=StartPosition.beginning(), follow=False)
    reader.wait_for_end()
    since = sql.execute("SELECT prepared FROM pg_prepared_xacts WHERE gid = %s", [gid]).fetchone() or ()
    (notice,) = reader.notices
    assert notice.held_event_id == missing
    assert notice.holders == ((None, gid, *since),)
    assert f"prepared transaction {gid}, open since " in notice.message


def test_several_blocking_transactions_are_named_oldest_first(
    settings: Settings, sql: Conn, writer: Conn, start_reader: StartReader
) -> None:
    with connect(settings, application_name="another") as later, uncommitted_event(writer), uncommitted_event(later):
        write(sql)
        reader = start_reader(start=StartPosition.beginning(), follow=False)
        reader.wait_for_end()
    assert [holder.application for holder in reader.notices[0].holders] == ["a service", "another"]


def test_a_following_tail_reports_a_stall_once_and_continues_when_the_gap_is_filled(
    sql: Conn, writer: Conn, start_reader: StartReader, stall_at_once: None
) -> None:
    reader = start_reader()
    with uncommitted_event(writer) as missing:
        write(sql)
        reader.until(lambda: reader.notices)
        wait_for_reads(sql, count=5)
        assert reader.notice_types == ["held_up"]
        assert reader.notices[0].held_event_id == missing
        assert reader.ids == []
    reader.wait_for([1, 2])


def test_an_open_transaction_without_a_gap_is_not_reported(
    sql: Conn, writer: Conn, start_reader: StartReader, stall_at_once: None
) -> None:
    reader = start_reader()
    written = write(sql)
    with uncommitted_event(writer):
        wait_for_reads(sql, count=5)
        assert (reader.ids, reader.notice_types) == (written, [])


def test_rolled_back_ids_do_not_hold_the_tail_up(sql: Conn, start_reader: StartReader) -> None:
    roll_back(sql, 3)
    written = [*write(sql), *gap_and_event(sql)]
    roll_back(sql)
    reader = start_reader(start=StartPosition.beginning(), follow=False)
    reader.wait_for_end()
    assert (reader.ids, reader.notice_types) == (written, [])


# -- where a tail starts


def test_from_now_leaves_out_the_events_that_were_visible(sql: Conn, start_reader: StartReader) -> None:
    write(sql, 3)
    reader = start_reader()
    assert reader.batches[0][:2] == ([], 3)
    reader.wait_for(write(sql))


@pytest.mark.parametrize("how", ["committed", "prepared"])
def test_i10_from_now_delivers_events_of_open_transactions_and_not_those_that_were_visible(
    sql: Conn, writer: Conn, start_reader: StartReader, prepares: None, how: str
) -> None:
    write(sql, 3)
    gid = f"{sql.info.dbname} under way"
    if how == "prepared":
        (held,) = prepare(writer, gid)
    else:
        writer.execute("BEGIN")
        (held,) = write(writer)
    write(sql, 2)
    reader = start_reader()
    assert reader.batches[0][:2] == ([], held - 1)
    (new,) = write(sql)
    wait_for_reads(sql)
    assert reader.ids == []
    sql.execute(SQL("COMMIT PREPARED {}").format(Literal(gid))) if how == "prepared" else writer.execute("COMMIT")
    reader.wait_for([held, new])


def test_i10_from_now_skips_gaps_that_a_rollback_left_beside_an_open_transaction(
    sql: Conn, writer: Conn, start_reader: StartReader
) -> None:
    write(sql)
    roll_back(sql)
    write(sql)
    with uncommitted_event(writer) as held:
        write(sql)
        reader = start_reader()
    reader.wait_for([held])
    reader.wait_for([held, *write(sql)])


def test_from_now_begins_at_the_head_when_no_transaction_is_open(sql: Conn, start_reader: StartReader) -> None:
    (last,) = gap_and_event(sql)
    roll_back(sql)
    assert start_reader().batches[0][:2] == ([], last)


def test_from_the_beginning_and_from_a_position(sql: Conn, start_reader: StartReader) -> None:
    ids = write(sql, 5)
    for start, expected in (
        (StartPosition.beginning(), ids),
        (StartPosition.position(3), ids[3:]),
        (StartPosition.position(5), []),
    ):
        reader = start_reader(start=start, follow=False)
        reader.wait_for_end()
        assert reader.ids == expected


def test_from_the_beginning_starts_at_the_oldest_event_that_is_kept(
    settings: Settings, sql: Conn, start_reader: StartReader
) -> None:
    write_before(sql, LONG_BEFORE)
    kept = write(sql)
    collect(settings)
    reader = start_reader(start=StartPosition.beginning(), follow=False)
    reader.wait_for_end()
    assert (reader.batches[0].position, reader.ids) == (1, kept)


@pytest.mark.parametrize(
    ("start", "first"),
    [
        pytest.param(timedelta(hours=3), 1, id="before all"),
        pytest.param(timedelta(minutes=90), 2, id="in between"),
        pytest.param(timedelta(0), 4, id="after all"),
        pytest.param(datetime(2020, 1, 1, tzinfo=UTC), 1, id="a time before all"),
        pytest.param(datetime(2120, 1, 1, tzinfo=UTC), 4, id="a future time, which is now"),
    ],
)
def test_from_a_time(sql: Conn, start_reader: StartReader, start: datetime | timedelta, first: int) -> None:
    for hours in (2, 1, 0.5):
        write_before(sql, round(hours * 3_600_000))
    reader = start_reader(start=StartPosition.time(start))
    write(sql)
    reader.wait_for(list(range(first, 5)))


@pytest.mark.parametrize("clock", [0.0, 4e9], ids=["1970", "2096"])
def test_i12_a_time_ago_is_measured_by_the_clock_of_the_server(
    sql: Conn, start_reader: StartReader, monkeypatch: pytest.MonkeyPatch, clock: float
) -> None:
    write_before(sql, 3_600_000)
    young = write(sql)
    monkeypatch.setattr(time, "time", lambda: clock)
    reader = start_reader(start=StartPosition.time(timedelta(minutes=10)), follow=False)
    reader.wait_for_end()
    assert reader.ids == young


def test_i10_from_a_time_delivers_events_of_open_transactions_below_the_first_visible_one(
    sql: Conn, writer: Conn, start_reader: StartReader
) -> None:
    write_before(sql, LONG_BEFORE)
    with uncommitted_event(writer) as held:
        (seen,) = write(sql)
        reader = start_reader(start=StartPosition.time(timedelta(hours=1)))
        wait_for_reads(sql)
    reader.until(lambda: seen in reader.ids)
    assert reader.ids == [held, seen]


def test_i21_a_cursor_ahead_of_the_last_id_is_of_another_history(sql: Conn, settings: Settings) -> None:
    write(sql, 3)
    with pytest.raises(HistoryChanged, match=f"{to_cursor(4)} is ahead of the outbox, whose last id is {to_cursor(3)}"):
        list(tail("lease", settings.dsn, start=StartPosition.position(4), follow=False))


# -- where it ends


def test_until_a_position_ends_a_following_tail(sql: Conn, start_reader: StartReader) -> None:
    ids = write(sql, 5)
    reader = start_reader(start=StartPosition.beginning(), until=StartPosition.position(3))
    reader.wait_for_end()
    assert reader.ids == ids[:3]


def test_until_a_future_position_waits_for_it(sql: Conn, start_reader: StartReader) -> None:
    write(sql, 2)
    reader = start_reader(start=StartPosition.beginning(), until=StartPosition.position(4))
    wait_for_reads(sql)
    assert reader.ids == [1, 2]
    assert not reader.has_ended
    write(sql, 3)
    reader.wait_for_end()
    assert reader.ids == [1, 2, 3, 4]


def test_until_an_id_that_was_rolled_back_ends_with_the_first_event_beyond(
    sql: Conn, start_reader: StartReader
) -> None:
    ids = write(sql, 2)
    roll_back(sql, 3)
    reader = start_reader(start=StartPosition.beginning(), until=StartPosition.position(5))
    wait_for_reads(sql)
    assert not reader.has_ended
    write(sql)
    reader.wait_for_end()
    assert reader.ids == ids


def test_i10_until_an_id_that_may_still_commit_waits_for_it(sql: Conn, writer: Conn, start_reader: StartReader) -> None:
    write(sql)
    with uncommitted_event(writer) as last:
        reader = start_reader(start=StartPosition.beginning(), until=StartPosition.position(last))
        wait_for_reads(sql)
        assert reader.ids == [1]
        assert not reader.has_ended
    reader.wait_for_end()
    assert reader.ids == [1, last]


@pytest.mark.parametrize(
    ("end", "last"),
    [
        pytest.param(timedelta(hours=3), 0, id="before all"),
        pytest.param(timedelta(minutes=90), 1, id="in between"),
        pytest.param(timedelta(minutes=10), 3, id="after all, and after a rollback"),
        pytest.param(datetime(2120, 1, 1, tzinfo=UTC), 3, id="a future time, which is now"),
    ],
)
def test_until_a_time(sql: Conn, start_reader: StartReader, end: datetime | timedelta, last: int) -> None:
    for hours in (2, 1, 0.5):
        write_before(sql, round(hours * 3_600_000))
    roll_back(sql)
    reader = start_reader(start=StartPosition.beginning(), until=StartPosition.time(end))
    write(sql)
    reader.wait_for_end()
    assert reader.ids == list(range(1, last + 1))


# -- filters


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        pytest.param(Filters(), [1, 2, 3, 4], id="none"),
        pytest.param(Filters(partitions=frozenset({0})), [1, 4], id="partition 0 is a partition"),
        pytest.param(Filters(partitions=frozenset({7, 8})), [2, 3], id="several partitions"),
        pytest.param(Filters(namespaces=frozenset({"deploys"})), [2], id="namespace; a row without one never matches"),
        pytest.param(Filters(namespaces=frozenset({""})), [4], id="the empty namespace is not the missing one"),
        pytest.param(Filters(instance_tags=frozenset({"blue", "green"})), [2, 3], id="instance tags"),
        pytest.param(Filters(kinds=frozenset({"expired"})), [3], id="event type"),
        pytest.param(Filters(frozenset({7}), frozenset({"deploys"}), frozenset({"green"})), [], id="all must pass"),
    ],
)
def test_filters_select_events_and_the_position_passes_the_rest(
    sql: Conn, start_reader: StartReader, filters: Filters, expected: list[int]
) -> None:
    write(sql)
    write(sql, partition_key=7, namespace="deploys", instance_tag="blue", event_type="acquired")
    write(sql, partition_key=8, namespace="builds", instance_tag="green", event_type="expired")
    write(sql, namespace="", instance_tag="")
    reader = start_reader(start=StartPosition.beginning(), follow=False, filters=filters)
    reader.wait_for_end()
    assert reader.ids == expected
    assert reader.batches[-1].position == 4


def test_outcomes_of_completion_events_are_filtered_too(sql: Conn, settings: Settings) -> None:
    for outcome in ("success", "failed", "success"):
        append_completion_event(sql, uuid4(), outcome)
    wanted = Filters(kinds=frozenset({"success"}))
    events = list(tail("completion", settings.dsn, start=StartPosition.beginning(), follow=False, filters=wanted))
    assert [(event.event_id, event.kind) for event in events] == [(1, "success"), (3, "success")]


# -- garbage collection


def collect(settings: Settings) -> int:
    """Deletes lease events older than an hour; returns how many."""
    with command_session(settings, "gc", writes=True) as conn:
        return collect_events(conn, LEASE, 3_600, 1_000, lambda _: True).deleted


def test_i10_an_expired_cursor_is_refused_with_the_cursor_to_resume_from(settings: Settings, sql: Conn) -> None:
    for _ in range(3):
        write_before(sql, LONG_BEFORE)
    kept = write(sql)
    collect(settings)
    for position in (0, 2):
        with (
            closing(Tail(settings, LEASE, start=StartPosition.position(position))) as expired,
            pytest.raises(CursorExpired) as caught,
        ):
            next(expired.batches())  # the first batch would already state a position
        assert (caught.value.exit_code, to_cursor(position) in caught.value.message) == (8, True)
    assert caught.value.hint
    resume = StartPosition.position(from_cursor(caught.value.hint.split()[-1], "hint"))
    assert [event.event_id for event in tail("lease", settings.dsn, start=resume, follow=False)] == kept


def test_i10_a_tail_at_a_gap_whose_events_are_deleted_raises_cursor_expired(
    settings: Settings, sql: Conn, writer: Conn, start_reader: StartReader
) -> None:
    reader = start_reader()
    with uncommitted_event(writer):
        # Older than the open transaction, which happens only if the server's clock was set back.
        write_before(sql, LONG_BEFORE)
        wait_for_reads(sql)
        assert collect(settings) == 1
        reader.wait_for_end()
    assert isinstance(reader.error, CursorExpired)
    assert reader.ids == []


def test_collection_below_the_position_of_a_tail_does_not_disturb_it(
    settings: Settings, sql: Conn, start_reader: StartReader
) -> None:
    reader = start_reader()
    old = write_before(sql, LONG_BEFORE)
    reader.wait_for(old)
    assert collect(settings) == 1
    reader.wait_for([*old, *write(sql)])


# -- batches


def test_batches_are_bounded(sql: Conn, start_reader: StartReader) -> None:
    ids = write(sql, MANY)
    reader = start_reader(start=StartPosition.beginning(), follow=False)
    reader.wait_for_end()
    assert [len(batch.events) for batch in reader.batches] == [0, BATCH_LIMIT, BATCH_LIMIT, BATCH_LIMIT // 2]
    assert reader.ids == ids


@pytest.mark.parametrize("place", [0, BATCH_LIMIT - 1, MANY // 2])
def test_i10_a_gap_that_is_filled_before_more_than_a_batch_of_events(
    sql: Conn, writer: Conn, start_reader: StartReader, place: int
) -> None:
    reader = start_reader()
    reader.wait_for(write(sql, place))
    with uncommitted_event(writer):
        write(sql, MANY)
        wait_for_reads(sql)
    (last,) = write(sql)
    reader.until(lambda: last in reader.ids)
    assert reader.ids == list(range(1, last + 1))


def test_a_tail_that_is_held_up_reads_with_a_small_limit(
    sql: Conn, writer: Conn, start_reader: StartReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, rows_of = [], TailConnection._rows

    def recorded(connection: TailConnection, position: int, limit: int) -> Any:
        limits.append(limit)
        return rows_of(connection, position, limit)

    monkeypatch.setattr(TailConnection, "_rows", recorded)
    reader = start_reader()
    with uncommitted_event(writer) as held:
        ids = write(sql, 10 * GAP_LIMIT)
        wait_for_reads(sql)
        limits.clear()
        wait_for_reads(sql)
        assert set(limits) == {GAP_LIMIT}
    reader.wait_for([held, *ids])
    assert limits.count(BATCH_LIMIT) <= 10, "full batches after the gap is filled"
    limits.clear()
    reader.wait_for([held, *ids, *write(sql)])
    assert set(limits) == {BATCH_LIMIT}


def test_i10_an_end_far_beyond_a_rolled_back_id(sql: Conn, start_reader: StartReader) -> None:
    roll_back(sql)
    ids = write(sql, MANY)
    reader = start_reader(start=StartPosition.beginning(), until=StartPosition.position(MANY + 1))
    reader.wait_for_end()
    assert reader.ids == ids


def test_i10_many_rolled_back_ids_before_many_events(sql: Conn, start_reader: StartReader) -> None:
    ids = write(sql)
    roll_back(sql, MANY)
    ids += write(sql, MANY)
    reader = start_reader(start=StartPosition.beginning(), follow=False)
    reader.wait_for_end()
    assert reader.ids == ids


# -- lost notifications and connections


def test_i7_a_tail_that_is_woken_repeatedly_renews_its_wakeup_request_in_time(
    sql: Conn, start_reader: StartReader
) -> None:
    reader, written, requested = start_reader(), [], set()
    wait_for_reads(sql)
    wakes: list[psycopg.Notify] = []
    sql.execute('LISTEN "pgcoord.lease_events"')
    sql.add_notify_handler(wakes.append)

    def has_renewed_but_not_every_time() -> bool:
        written.extend(write(sql))
        reader.wait_for(written)
        requested.add(wake_until(sql))
        return len(requested) > 4 and len(written) > 3 * len(
            requested
        )  # an event that arrives during a renewal causes another

    until(has_renewed_but_not_every_time)
    assert len(wakes) == len(written), "every write found an unexpired request"


def test_i7_a_wakeup_request_expires_after_the_stated_seconds(sql: Conn, start_reader: StartReader) -> None:
    start_reader()
    wait_for_reads(sql)
    requested = wake_until(sql)
    now = value(sql, "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
    assert requested and requested <= now + WAKEUP_REQUEST_SECONDS * 1_000_000


def test_i7_a_tail_that_ends_leaves_the_wakeup_request_for_others(sql: Conn, start_reader: StartReader) -> None:
    reader = start_reader()
    wait_for_reads(sql)
    reader.end()
    now = value(sql, "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
    requested = wake_until(sql)
    assert requested and requested > now


def test_i7_without_follow_a_tail_never_requests_wakeups(sql: Conn, start_reader: StartReader) -> None:
    roll_back(sql)  # a gap, so that it needs a list
    written = write(sql, 3)
    reader = start_reader(start=StartPosition.beginning(), follow=False)
    reader.wait_for_end()
    assert (reader.ids, wake_until(sql)) == (written, None)


def test_i10_without_follow_a_rolled_back_gap_is_passed_although_some_transaction_is_always_open(
    settings: Settings, sql: Conn, writer: Conn, start_reader: StartReader
) -> None:
    roll_back(sql)
    seen = write(sql)
    has_read = "SELECT state = 'idle' AND strpos(query, 'outbox_floors') > 0 FROM pg_stat_activity WHERE pid = %s"
    with connect(settings) as next_writer, ExitStack() as later:
        with uncommitted_event(writer):
            reader = start_reader(start=StartPosition.beginning(), follow=False)
            until(lambda: reader.has_ended or value(sql, has_read, tail_pid(sql)))
            held = later.enter_context(uncommitted_event(next_writer))
        reader.wait_for_end()
    assert reader.ids[:1] == seen
    assert held not in reader.ids
    assert reader.notice_types == []


def test_i10_events_beyond_the_end_are_not_counted_as_passed(sql: Conn, start_reader: StartReader) -> None:
    written = write(sql, 10)
    reader = start_reader(start=StartPosition.beginning(), until=StartPosition.position(written[4]))
    reader.wait_for_end()
    assert (reader.ids, reader.batches[-1].position) == (written[:5], written[4])


def test_i7_without_any_notification_a_tail_delivers_everything(
    settings: Settings, sql: Conn, start_reader: StartReader
) -> None:
    sql.execute(SQL("ALTER DATABASE {} SET pgcoord.notify = off").format(Identifier(sql.info.dbname)))
    reader = start_reader()
    with connect(settings) as silent:
        ids = write(silent)
        reader.wait_for(ids)
        roll_back(silent)
        ids += write(silent)
        reader.wait_for(ids)


def test_i10_a_terminated_backend_causes_no_gap_and_no_duplicate(sql: Conn, start_reader: StartReader) -> None:
    reader = start_reader()
    ids: list[int] = []

    def is_disconnected(times: int) -> bool:
        return reader.notice_types.count("disconnected") == times

    for number in range(3):
        ids += write(sql)
        reader.wait_for(ids)
        with sql.transaction():  # its events become visible while no connection reads
            sql.execute("SELECT pg_terminate_backend(%s)", [tail_pid(sql)])
            ids += write(sql, 2)
            reader.until(partial(is_disconnected, number + 1))
        reader.wait_for(ids)
    reader.until(lambda: len(reader.notices) == 6)
    assert reader.notice_types == ["disconnected", "connected"] * 3
    assert [notice.cursor for notice in reader.notices[::2]] == [to_cursor(position) for position in (1, 4, 7)]


def test_i10_a_backend_terminated_at_a_gap_leaves_the_tail_at_that_gap(
    sql: Conn, writer: Conn, start_reader: StartReader
) -> None:
    reader = start_reader()
    with uncommitted_event(writer) as held:
        (seen,) = write(sql)
        wait_for_reads(sql)
        sql.execute("SELECT pg_terminate_backend(%s)", [tail_pid(sql)])
        reader.until(lambda: "connected" in reader.notice_types)
        wait_for_reads(sql)
        assert reader.ids == []
    reader.wait_for([held, seen])


def test_i10_ids_beyond_a_gap_that_a_crash_lost_are_waited_for_again(
    sql: Conn, writer: Conn, start_reader: StartReader
) -> None:
    """A crash loses visible ids above the position, and the server assigns them to other events."""
    reader = start_reader()
    reader.wait_for(write(sql))
    with uncommitted_event(writer):
        write(sql, 5)
        wait_for_reads(sql)
        sql.execute("DELETE FROM lease_events WHERE event_id > 1")
        sql.execute("SELECT setval('lease_events_event_id_seq', 1)")
        sql.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'a service'")
        sql.execute("SELECT pg_terminate_backend(%s)", [tail_pid(sql)])
        with pytest.raises(psycopg.OperationalError):
            writer.execute("SELECT 1")
    reader.until(lambda: "connected" in reader.notice_types)
    wait_for_reads(sql)
    assert write(sql, 3) == [2, 3, 4]
    reader.wait_for([1, 2, 3, 4])


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_i10_a_prepared_transaction_holds_the_tail_up_across_a_restart_that_renames_it(
    own_server: EmbeddedServer, own_settings: Settings, start_reader: StartReader, mode: StopMode
) -> None:
    reader = start_reader(settings=own_settings)
    with connect_to_schema(own_settings) as sql:
        (held,) = prepare(sql, "transfer")
        (seen,) = write(sql)
        wait_for_reads(sql)
    own_server.stop(mode)
    own_server.start()
    reader.until(lambda: "connected" in reader.notice_types)
    with connect_to_schema(own_settings) as sql:
        wait_for_reads(sql)
        assert reader.ids == []
        sql.execute("COMMIT PREPARED 'transfer'")
        (new,) = write(sql)
    reader.wait_for([held, seen, new])


def test_i17_a_statement_that_cannot_succeed_is_reported_until_it_can(sql: Conn, start_reader: StartReader) -> None:
    reader = start_reader()
    sql.execute("ALTER TABLE lease_events RENAME COLUMN namespace TO hidden")
    sql.execute("SELECT pg_notify('pgcoord.lease_events', '')")
    reader.until(lambda: "disconnected" in reader.notice_types)
    sql.execute("ALTER TABLE lease_events RENAME COLUMN hidden TO namespace")
    reader.wait_for(write(sql))
    assert reader.notice_types[-1] == "connected"


def test_a_statement_that_is_cancelled_is_tried_again(sql: Conn, start_reader: StartReader) -> None:
    reader = start_reader()
    pid = tail_pid(sql)
    with sql.transaction():
        sql.execute("LOCK lease_events IN ACCESS EXCLUSIVE MODE")
        until(lambda: is_waiting(sql, pid))
        sql.execute("SELECT pg_cancel_backend(%s)", [pid])
        reader.until(lambda: "disconnected" in reader.notice_types)
    reader.wait_for(write(sql))
    assert reader.notice_types[:2] == ["disconnected", "connected"]


def test_an_error_of_the_first_connection_is_raised(settings: Settings, empty_settings: Settings) -> None:
    with pytest.raises(SchemaMissing):
        next(tail("lease", empty_settings.dsn))
    with pytest.raises(ConnectionFailed):
        next(tail("lease", "host=/nowhere"))


# -- what is delivered


def test_unknown_types_and_ids_that_are_not_uuids_are_delivered_unchanged(sql: Conn, settings: Settings) -> None:
    write(sql, execution_id="job 7 \u00e4\n", event_type="teleported", lease_id="", namespace="", partition_key=-1)
    (event,) = tail("lease", settings.dsn, start=StartPosition.beginning(), follow=False)
    assert isinstance(event, LeaseEvent)
    assert event[:4] == (1, "job 7 \u00e4\n", "", "teleported")
    assert (event.kind, event.partition_key, event.namespace, event.instance_tag) == ("teleported", -1, "", None)


def test_the_values_of_a_completion_event_are_those_that_were_written(sql: Conn, settings: Settings) -> None:
    execution, flow = uuid4(), uuid4()
    then = datetime(2026, 1, 31, 12, tzinfo=UTC)
    append_completion_event(
        sql, execution, "skipped", flow_id=flow, partition_key=3, namespace="n", instance_tag="t", occurred_at=then
    )
    (event,) = tail("completion", settings.dsn, start=StartPosition.beginning(), follow=False)
    assert isinstance(event, CompletionEvent)
    written = (1, str(execution), str(flow), "skipped", round(then.timestamp() * 1000), 3, "n", "t")
    assert event[:-1] == written
    assert event.committed_at_ms > event.occurred_at_ms


def test_the_two_outboxes_are_separate(sql: Conn, settings: Settings) -> None:
    append_lease_event(sql, "job", "acquired")
    append_completion_event(sql, uuid4(), "success")
    append_completion_event(sql, uuid4(), "failed")
    counts = {noun: len(list(tail(noun, settings.dsn, start=StartPosition.beginning(), follow=False)))
              for noun in ("lease", "completion")}  # fmt: skip
    assert counts == {"lease": 1, "completion": 2}


def test_i10_the_cursor_of_any_event_resumes_after_it(sql: Conn, settings: Settings) -> None:
    write(sql, 3)
    gap_and_event(sql)
    events = list(tail("lease", settings.dsn, start=StartPosition.beginning(), follow=False))
    for place, event in enumerate(events, start=1):
        start = StartPosition.position(from_cursor(event.cursor, "--from"))
        assert list(tail("lease", settings.dsn, start=start, follow=False)) == events[place:]


def test_a_closed_tail_closes_its_connection(sql: Conn, settings: Settings) -> None:
    write(sql)
    with tail("lease", settings.dsn, start=StartPosition.beginning()) as events:
        assert next(events).event_id == 1
        pid = tail_pid(sql)
    until(lambda: not sql.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", [pid]).fetchone())


def test_stop_ends_a_tail_that_waits_or_has_not_begun(settings: Settings, sql: Conn, start_reader: StartReader) -> None:
    reader = start_reader(COMPLETION)
    reader.tail.stop()
    reader.wait_for_end()
    with closing(Tail(settings, LEASE)) as stopped:
        stopped.stop()
        assert list(stopped.batches()) == []

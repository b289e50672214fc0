"""The decisions of the resolver, against a model that compares each request with every earlier commit.

The model states rule I1: a transaction commits if and only if no commit after its read version wrote anything that it
read. So the commits are serialisable in version order, and no request is refused without need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pgcoord_cli.core.commits import codec
from pgcoord_cli.core.commits.codec import Mutation, Op, Range, Request
from pgcoord_cli.core.commits.conflict_window import ConflictWindow
from pgcoord_cli.core.commits.mutations import versionstamp, with_stamps, writes_of
from pgcoord_cli.core.commits.recent_commits import CommitPeriods, RecentCommits, StoredCommit, stored_writes
from pgcoord_cli.core.leader.resolver import (
    Claimed,
    QueueFloor,
    Verdict,
    decide,
)

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)

BOUNDS = [first + second for first in (b"a", b"b", b"c") for second in (b"", b"\0", b"x")] + [b"", b"\xff"]
STAMPED = [b"b" + versionstamp(version) for version in range(1, 60)]
UNIVERSE = sorted({*BOUNDS, *STAMPED})
"""Every begin of a range is one of these keys, so two ranges that share a key share one of these."""

keys = st.sampled_from(BOUNDS)
keys_to_read = keys | keys | st.sampled_from(STAMPED[:8])
ordered_ranges = st.tuples(keys, st.none() | keys).filter(lambda bounds: bounds[1] is None or bounds[0] <= bounds[1])
mutations = st.one_of(
    st.builds(Mutation, st.sampled_from([Op.SET, Op.ADD, Op.BYTE_MIN, Op.COMPARE_AND_CLEAR]), keys, st.just(b"1")),
    st.builds(Mutation, st.just(Op.CLEAR), keys, st.none()),
    st.just(Mutation(Op.SET_VERSIONSTAMPED_KEY, b"b" + b"?" * 10 + b"\1\0\0\0", b"")),
    keys.map(lambda key: Mutation(Op.SET_VERSIONSTAMPED_VALUE, key, b"?" * 10 + b"\0\0\0\0")),
    ordered_ranges.map(lambda bounds: Mutation(Op.CLEAR_RANGE, *bounds)),
)


def without_conflicts_at(request: Request, places: set[int]) -> Request:
    return request._replace(no_conflict=tuple(sorted(place for place in places if place < len(request.mutations))))


requests = st.builds(
    without_conflicts_at,
    st.builds(
        Request,
        st.lists(keys_to_read, max_size=2).map(tuple),
        st.lists(ordered_ranges, max_size=1).map(tuple),
        st.lists(ordered_ranges, max_size=1).map(tuple),
        st.lists(mutations, max_size=2).map(tuple),
        st.just(()),
    ),
    st.just(set[int]()) | st.sets(st.integers(0, 1)),
)

GARBAGE = b"\x01\xc1"


class Asked(NamedTuple):
    """A request that read `back` versions before the durable version of its batch; None: an undecodable payload."""

    back: int
    request: Request | None


questions = st.builds(Asked, st.integers(-1, 6) | st.integers(0, 2), requests | requests | requests | st.none())
batches = st.lists(st.lists(questions, min_size=1, max_size=6), max_size=5)


def claimed(number: int, read_version: int, payload: bytes) -> Claimed:
    return Claimed(number, None, read_version, payload, NOON)


def covered(interval: Range) -> set[bytes]:
    begin, end = interval
    return {key for key in UNIVERSE if begin <= key and (end is None or key < end)}


def keys_read(request: Request) -> set[bytes]:
    return set(request.read_keys).union(*map(covered, request.read_ranges))


def keys_written(request: Request, version: int) -> set[bytes]:
    """The keys of UNIVERSE that a request writes, computed apart from the resolver, so that an omission there shows."""
    written = set().union(*map(covered, request.write_ranges))
    for place, (op, key, operand) in enumerate(request.mutations):
        if place in request.no_conflict:
            continue
        if op == Op.SET_VERSIONSTAMPED_KEY:
            written.add(b"b" + versionstamp(version))
        else:
            written |= covered((key, operand)) if op == Op.CLEAR_RANGE else {key}
    return written


class Model:
    """Every commit, by version, with the keys that it wrote."""

    def __init__(self) -> None:
        self.written: list[set[bytes]] = []

    @property
    def version(self) -> int:
        return len(self.written)

    def decide(self, floor: int, read_version: int, request: Request | None) -> str:
        if read_version < floor:
            return "too_old"
        if read_version > self.version or request is None:
            return "rejected"
        if any(keys_read(request) & written for written in self.written[read_version:]):
            return "conflict"
        self.written.append(keys_written(request, self.version + 1))
        return "committed"


@given(batches, st.lists(st.integers(0, 8), max_size=5))
@settings(max_examples=400, deadline=None)
def test_i1_a_transaction_commits_exactly_when_nothing_it_read_was_written_since(
    asked: list[list[Asked]], floors: list[int]
) -> None:
    window, model, number = ConflictWindow(0), Model(), 0
    for batch in asked:
        if floors:
            window.raise_floor(model.version - floors.pop())
        durable, now, expected = model.version, [], []
        for question in batch:
            number += 1
            # Read versions are those that exist before the batch, and one that has not been committed.
            read_version = durable - question.back
            now.append(claimed(number, read_version, codec.encode(question.request) if question.request else GARBAGE))
        for question, request in zip(batch, now, strict=True):
            expected.append(model.decide(window.floor, request.read_version, question.request))
        verdicts = decide(window, durable, now)
        assert [verdict.status for verdict in verdicts] == expected
        assert [verdict.id for verdict in verdicts] == [request.id for request in now]
        versions = [verdict.version for verdict in verdicts if verdict.version is not None]
        assert versions == list(range(durable + 1, model.version + 1)), "rule I5: dense, in queue order"


def decided(window: ConflictWindow, durable_version: int, *asked: tuple[int, bytes]) -> list[Verdict]:
    batch = [claimed(n, *question) for n, question in enumerate(asked, start=1)]
    return decide(window, durable_version, batch)


SET_A = codec.encode(Request((), (), (), (Mutation(Op.SET, b"a", b"1"),)))
READ_A_SET_B = codec.encode(Request((b"a",), (), (), (Mutation(Op.SET, b"b", b"1"),)))


def test_i5_the_first_write_of_a_fresh_database_commits_as_version_1() -> None:
    assert decided(ConflictWindow(0), 0, (0, SET_A)) == [
        Verdict(1, "committed", 1, None, codec.decode(SET_A)),
    ]


def test_i1_a_request_conflicts_with_one_before_it_in_its_own_batch() -> None:
    verdicts = decided(ConflictWindow(7), 7, (7, SET_A), (7, READ_A_SET_B), (7, SET_A))
    assert [(verdict.status, verdict.version) for verdict in verdicts] == [
        ("committed", 8),
        ("conflict", None),
        ("committed", 9),
    ]


def test_i4_a_read_below_the_floor_is_too_old_even_if_nothing_it_read_was_written() -> None:
    window = ConflictWindow(5)
    verdicts = decided(window, 9, (4, SET_A), (5, SET_A), (-1, SET_A), (4, GARBAGE))
    assert [verdict.status for verdict in verdicts] == ["too_old", "committed", "too_old", "too_old"]
    assert verdicts[0].reason == "read at 4, checkable from 5"


def test_i2_what_was_read_of_a_term_beyond_its_last_version_here_is_too_old() -> None:
    """Limits: 4 is the last version of the term read under; -1: the term is unknown; None: it is the present one."""
    read_b = codec.encode(Request((b"b",), (), (), ()))
    asked = [(4, 4), (4, 5), (-1, 6), (-1, 0), (None, 5), (None, 6), (0, 0)]
    batch = [Claimed(n, limit, version, read_b, NOON) for n, (limit, version) in enumerate(asked, start=1)]
    statuses = [verdict.status for verdict in decide(ConflictWindow(0), 6, batch)]
    assert statuses == ["committed", "too_old", "too_old", "too_old", "committed", "committed", "committed"]


def test_i4_a_read_version_from_the_future_is_rejected_and_the_rest_unaffected() -> None:
    verdicts = decided(ConflictWindow(0), 3, (3, SET_A), (5, SET_A), (4, SET_A), (3, SET_A))
    assert [verdict.status for verdict in verdicts] == ["committed", "rejected", "committed", "committed"]
    assert [verdict.version for verdict in verdicts] == [4, None, 5, 6]


def test_i1_a_versionstamped_key_conflicts_as_the_key_that_its_commit_makes_of_it() -> None:
    template = b"b" + b"?" * 10
    writer = Mutation(Op.SET_VERSIONSTAMPED_KEY, template + b"\1\0\0\0", b"")
    readers = [
        codec.encode(Request((key,), (), (), ())) for key in (STAMPED[0], STAMPED[1], template, template + b"\1\0\0\0")
    ]
    verdicts = decided(
        ConflictWindow(0), 0, (0, codec.encode(Request((), (), (), (writer,)))), *[(0, reader) for reader in readers]
    )
    assert [verdict.status for verdict in verdicts] == ["committed", "conflict", *["committed"] * 3]
    assert verdicts[0].request
    assert verdicts[0].request.mutations == ((Op.SET, STAMPED[0], b""),)


@pytest.mark.parametrize("bad", [b"", b"\x00", b"\x01", GARBAGE, b"\x01\x94\x90\x90\x90\x91\x93\x63\xc4\x01k\xc0"])
def test_i6_a_payload_that_cannot_be_decoded_is_rejected_and_the_rest_unaffected(bad: bytes) -> None:
    verdicts = decided(ConflictWindow(0), 0, (0, bad), (0, SET_A), (0, bad), (0, READ_A_SET_B), (0, SET_A))
    assert [verdict.status for verdict in verdicts] == ["rejected", "committed", "rejected", "conflict", "committed"]
    assert [verdict.version for verdict in verdicts] == [None, 1, None, None, 2]
    assert all(verdict.reason for verdict in verdicts if verdict.status == "rejected")


def test_a_write_conflict_range_conflicts_like_a_write() -> None:
    pretends = codec.encode(Request((), (), ((b"a", b"b"),), ()))
    verdicts = decided(ConflictWindow(0), 0, (0, pretends), (0, READ_A_SET_B))
    assert [verdict.status for verdict in verdicts] == ["committed", "conflict"]


# -- rule I8: a leader that takes over


def history(asked: Sequence[Sequence[Asked]], floor_behind: int) -> tuple[ConflictWindow, list[Claimed], list[Verdict]]:
    """The window of a leader after some batches, all requests of those batches, and their verdicts."""
    window, everything, verdicts = ConflictWindow(0), list[Claimed](), list[Verdict]()
    durable = 0
    for batch in asked:
        window.raise_floor(durable - floor_behind)
        requests = [
            claimed(
                len(everything) + place,
                max(0, durable - question.back),
                codec.encode(question.request) if question.request else GARBAGE,
            )
            for place, question in enumerate(batch, start=1)
        ]
        outcome = decide(window, durable, requests)
        durable = max([durable, *(verdict.version for verdict in outcome if verdict.version)])
        everything += requests
        verdicts += outcome
    return window, everything, verdicts


def stored(everything: Iterable[Claimed], verdicts: Iterable[Verdict]) -> list[StoredCommit]:
    """The committed requests as the table has them, in version order."""
    return [
        StoredCommit(request.id, verdict.version, request.payload, NOON + timedelta(seconds=verdict.version / 10))
        for request, verdict in zip(everything, verdicts, strict=True)
        if verdict.version is not None
    ]


@given(st.builds(without_conflicts_at, requests, st.sets(st.integers(0, 1))), st.integers(1, 40))
def test_i8_a_stored_commit_wrote_what_its_leader_recorded(request: Request, version: int) -> None:
    keys, ranges = stored_writes(codec.encode(request), version)
    recorded_keys, recorded_ranges = writes_of(with_stamps(request, version))
    assert (sorted(keys), set(ranges)) == (sorted(recorded_keys), set(recorded_ranges))


@given(batches, st.integers(0, 12), st.lists(st.tuples(st.integers(-1, 12), st.none() | requests), max_size=8))
def test_i8_a_window_rebuilt_from_stored_commits_decides_like_the_warm_one(
    asked: list[list[Asked]], floor_behind: int, later: list[tuple[int, Request | None]]
) -> None:
    warm, everything, verdicts = history(asked, floor_behind)
    commits = stored(everything, verdicts)
    durable = len(commits)
    rebuilt = RecentCommits(
        warm.floor, durable, 0, [commit for commit in commits if commit.version > warm.floor]
    ).window
    assert rebuilt.floor == warm.floor
    batch = [
        claimed(1_000 + n, durable - back, codec.encode(request) if request else GARBAGE)
        for n, (back, request) in enumerate(later)
    ]
    assert decide(rebuilt, durable, batch) == decide(warm, durable, batch)


@given(batches, st.data())
def test_i8_commits_that_are_no_longer_stored_raise_the_floor_and_hide_no_conflict(
    asked: list[list[Asked]], data: st.DataObject
) -> None:
    _, everything, verdicts = history(asked, 100)
    commits = stored(everything, verdicts)
    kept = [commit for commit in commits if data.draw(st.booleans(), label=f"keep version {commit[1]}")]
    durable = len(commits)
    recent = RecentCommits(0, durable, 0, kept)
    rebuilt = recent.window
    missing = {version for _, version, _, _ in commits} - {version for _, version, _, _ in kept}
    assert rebuilt.floor == max(missing, default=0)
    for _, version, payload, _ in commits:
        for key in keys_written(codec.decode(payload), version):
            if version > rebuilt.floor:
                assert rebuilt.conflicts(version - 1, [key], [])
    assert [period.version for period in recent.periods][-1:] == ([durable] if durable > rebuilt.floor else [])


def test_i8_the_floor_that_the_last_leader_stored_is_never_lowered() -> None:
    commits = [StoredCommit(n, n, SET_A, NOON) for n in range(1, 10)]
    window = RecentCommits(6, 9, 0, commits).window
    assert window.floor == 6
    assert [verdict.status for verdict in decided(window, 9, (5, SET_A), (6, SET_A))] == ["too_old", "committed"]


@pytest.mark.parametrize(
    "payload",
    [b"", b"\x02garbage", b"\x02\x94\x90\x90\x90\x91\x93\x00\xc0\xc0", b"\x02\x94\x90\x90\x91\x92\xc0\xc0\x90"],
)
def test_i8_below_a_stored_commit_that_cannot_be_read_nothing_can_be_checked(payload: bytes) -> None:
    """A row that was changed by hand must not keep the next leader from leading."""
    commits = [StoredCommit(n, n, payload if n == 5 else SET_A, NOON) for n in range(1, 8)]
    recent = RecentCommits(0, 7, 0, commits)
    assert (recent.window.floor, recent.durable_version) == (5, 7)
    read_a = codec.encode(Request((b"a",), (), (), ()))
    asked = [(4, SET_A), (5, read_a), (7, read_a)]
    assert [v.status for v in decided(recent.window, 7, *asked)] == ["too_old", "conflict", "committed"]


def test_writes_are_the_keys_of_mutations_and_both_kinds_of_ranges() -> None:
    request = Request(
        (b"read",),
        ((b"r", b"s"),),
        ((b"x", None),),
        (Mutation(Op.SET, b"a", b"1"), Mutation(Op.CLEAR, b"b", None), Mutation(Op.CLEAR_RANGE, b"c", b"d")),
    )
    assert writes_of(request) == ([b"a", b"b"], [(b"c", b"d"), (b"x", None)])
    assert writes_of(request._replace(no_conflict=(0, 2))) == ([b"b"], [(b"x", None)])


# -- periods

commit_times = st.lists(st.floats(0, 3), max_size=20)


@given(commit_times, st.floats(0, 30))
def test_i4_periods_drop_no_commit_younger_than_asked_for_and_keep_none_much_older(
    pauses: list[float], back: float
) -> None:
    periods, now, commits = CommitPeriods(), NOON, list[tuple[datetime, int]]()
    for version, pause in enumerate(pauses, start=1):
        now += timedelta(seconds=pause)
        periods.add(now, version, version)
        commits.append((now, version))
    before = now - timedelta(seconds=back)
    floor = periods.forget(before)
    assert all(version > floor for time, version in commits if time >= before)
    surely_old = [version for time, version in commits if time < before - CommitPeriods.LENGTH]
    assert floor >= max(surely_old, default=0)
    assert periods.forget(before) == floor, "a version that was dropped stays dropped"


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 100)), max_size=20), st.floats(0, 30))
def test_i8_periods_hold_the_smallest_id_of_the_commits_that_they_cover(
    commits: list[tuple[float, int]], back: float
) -> None:
    periods, now, ids = CommitPeriods(), NOON, dict[int, int]()
    for version, (pause, first_id) in enumerate(commits, start=1):
        now += timedelta(seconds=pause)
        periods.add(now, version, first_id)
        ids[version] = first_id
    floor = periods.forget(now - timedelta(seconds=back))
    held = [first_id for version, first_id in ids.items() if version > floor]
    assert min((period.first_id for period in periods), default=None) == min(held, default=None)
    assert [period.version for period in periods][-1:] == ([len(commits)] if held else [])


def test_periods_are_few_however_many_commits_there_are() -> None:
    periods = CommitPeriods()
    for number in range(10_000):
        periods.add(NOON + timedelta(milliseconds=number), number, number)
    assert len(list(periods)) == 20


def test_periods_tolerate_a_clock_that_was_set_back() -> None:
    periods = CommitPeriods()
    periods.add(NOON, 1, 1)
    periods.add(NOON - timedelta(hours=1), 2, 2)
    periods.add(NOON, 3, 3)
    assert periods.forget(NOON - timedelta(seconds=1)) == 0
    assert periods.forget(NOON + timedelta(seconds=1)) == 3


# -- the queue floor


class QueueMachine(RuleBasedStateMachine):
    """Writers draw ids and end in any order while a resolver claims and settles: no request is passed over.

    The model of PostgreSQL: a writer is listed in pg_locks under one name from before its first id until it ends; once
    prepared, under another. Its rows are visible from its commit on.
    """

    @initialize(floor=st.integers(0, 3))
    def begin(self, floor: int) -> None:
        self.last_id = floor
        self.floor = QueueFloor(floor)
        self.writers: dict[str, list[int]] = {}
        self.pending: set[int] = set()
        self.names = 0

    @rule()
    def a_writer_begins(self) -> None:
        self.names += 1
        self.writers[f"7/{self.names}"] = []

    @rule(data=st.data())
    def a_writer_draws_an_id(self, data: st.DataObject) -> None:
        if self.writers:
            self.last_id += 1
            self.writers[data.draw(st.sampled_from(sorted(self.writers)))].append(self.last_id)

    @rule(data=st.data(), commits=st.booleans())
    def a_writer_ends(self, data: st.DataObject, commits: bool) -> None:
        if self.writers:
            ids = self.writers.pop(data.draw(st.sampled_from(sorted(self.writers))))
            self.pending |= set(ids) if commits else set()

    @rule(data=st.data())
    def a_writer_is_prepared(self, data: st.DataObject) -> None:
        if self.writers:
            self.names += 1
            name = data.draw(st.sampled_from(sorted(self.writers)))
            self.writers[f"-1/{self.names}"] = self.writers.pop(name)

    @rule(limit=st.integers(1, 4), races=st.booleans(), data=st.data())
    def the_resolver_takes_a_batch(self, limit: int, races: bool, data: st.DataObject) -> None:
        def meanwhile() -> None:
            if races:
                self.a_writer_ends(data, commits=True)

        self._take_a_batch(limit, meanwhile)

    def _take_a_batch(self, limit: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        if not self.floor.is_clear:
            self.floor.observe(self.last_id, list(self.writers))
        meanwhile()
        batch = sorted(number for number in self.pending if number > self.floor.id)[:limit]
        meanwhile()
        self.pending -= set(batch)
        if batch:
            self.floor.settled_up_to(batch[-1])
        if len(batch) < limit:
            self.floor.everything_settled()

    @invariant()
    def nothing_pending_is_at_or_below_the_floor(self) -> None:
        if hasattr(self, "floor"):
            hidden = [number for ids in self.writers.values() for number in ids]
            assert self.floor.id <= min([*self.pending, *hidden, self.last_id + 1]) - 1

    def teardown(self) -> None:
        """Ends all writers and drains the queue; the floor then reaches the last id that was drawn."""
        if not hasattr(self, "floor"):
            return
        for ids in self.writers.values():
            self.pending |= set(ids)
        self.writers.clear()
        while self.pending:
            self._take_a_batch(2)
        for _ in range(3):
            self._take_a_batch(2)
        assert self.floor.id == self.last_id


TestQueueFloor = QueueMachine.TestCase
TestQueueFloor.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

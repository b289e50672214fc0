"""The conflict window against an oracle that keeps every write and compares each read with all of them.

Both directions are checked: a missed conflict breaks rule I1, a false one costs a client a needless retry.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgcoord_cli.core.commits.codec import Range
from pgcoord_cli.core.commits.conflict_window import ConflictWindow

BOUNDS = [b"", b"\0", b"a", b"a\0", b"b", b"b\0", b"\xff"]
INTERVALS: list[Range] = [(begin, end) for begin in BOUNDS for end in [*BOUNDS, None]]
"""All ranges between the bounds, including empty ones, backward ones and those without an end."""

keys = st.sampled_from(BOUNDS)
intervals = st.sampled_from(INTERVALS)
some_keys = st.lists(keys, max_size=3)
some_intervals = st.lists(intervals, max_size=1)


def overlap(one: Range, other: Range) -> bool:
    """Whether two half-open ranges share a key; if they do, the greater of their begins is one that they share."""
    begin = max(one[0], other[0])
    return all(end is None or begin < end for _, end in (one, other))


def point(key: bytes) -> Range:
    """The range that contains only `key`: the next key after k is k followed by a zero byte."""
    return key, key + b"\0"


class Oracle:
    """Keeps every write, and answers by comparing a read with each of them."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, Range]] = []

    def record(self, version: int, written_keys: Iterable[bytes], ranges: Iterable[Range]) -> None:
        self.writes += [(version, interval) for interval in [*map(point, written_keys), *ranges]]

    def last_write(self, read: Range) -> int:
        """Returns the newest version that wrote a key of the range, or 0."""
        return max((version for version, written in self.writes if overlap(read, written)), default=0)


def check_everything(window: ConflictWindow, oracle: Oracle, version: int) -> None:
    """Compares window and oracle for every key and every range, at read versions from the floor on."""
    written = {key: oracle.last_write(point(key)) for key in BOUNDS}
    for read_version in range(window.floor, version + 1):
        for key in BOUNDS:
            assert window.conflicts(read_version, [key], []) == (written[key] > read_version), key
    for interval in INTERVALS:
        last = oracle.last_write(interval)
        for read_version in {window.floor, max(window.floor, last - 1), max(window.floor, last)}:
            assert window.conflicts(read_version, [], [interval]) == (last > read_version), interval


class Commit(NamedTuple):
    """A step of a test: a commit whose version is `gap` above the last."""

    gap: int
    keys: list[bytes]
    ranges: list[Range]


class Raise(NamedTuple):
    """A step of a test: the floor rises to `back` versions below the last commit, unless it is higher already."""

    back: int


commits = st.builds(Commit, st.integers(1, 2), some_keys, some_intervals)
raises = st.builds(Raise, st.integers(0, 6))


@given(st.integers(0, 3), st.lists(commits | commits | commits | raises, max_size=14))
@settings(max_examples=500, deadline=None)
def test_i1_the_window_finds_every_conflict_above_its_floor_and_no_other(
    floor: int, steps: list[Commit | Raise]
) -> None:
    window, oracle, version = ConflictWindow(floor), Oracle(), floor
    for step in steps:
        if isinstance(step, Commit):
            version += step.gap
            window.record(version, step.keys, step.ranges)
            oracle.record(version, step.keys, step.ranges)
        else:
            floor = max(floor, version - step.back)
            window.raise_floor(version - step.back)
            assert window.floor == floor
            check_everything(window, oracle, version)
    check_everything(window, oracle, version)


@given(
    st.lists(commits, min_size=1, max_size=6), st.integers(0, 12), st.lists(keys, max_size=3), some_intervals,
)  # fmt: skip
def test_i1_several_reads_conflict_when_any_of_them_does(
    writes: list[Commit], read_version: int, read_keys: list[bytes], ranges: list[Range]
) -> None:
    window, version = ConflictWindow(0), 0
    for commit in writes:
        version += commit.gap
        window.record(version, commit.keys, commit.ranges)
    one_by_one = [window.conflicts(read_version, [key], []) for key in read_keys]
    one_by_one += [window.conflicts(read_version, [], [interval]) for interval in ranges]
    assert window.conflicts(read_version, read_keys, ranges) == any(one_by_one)


@given(st.lists(st.tuples(some_keys, some_intervals), max_size=30))
def test_a_window_whose_floor_is_the_last_version_is_empty(writes: list[tuple[list[bytes], list[Range]]]) -> None:
    window = ConflictWindow(0)
    for version, (written, ranges) in enumerate(writes, start=1):
        window.record(version, written, ranges)
    window.raise_floor(len(writes))
    assert len(window) == 1, "one step over the whole key space, and no key"
    assert not window.conflicts(len(writes), [b"a"], [(b"", None)])


@pytest.mark.parametrize(
    ("written", "read", "expected"),
    [
        ((b"b", b"d"), (b"a", b"b"), False),
        ((b"b", b"d"), (b"d", b"e"), False),
        ((b"b", b"d"), (b"a", b"b\0"), True),
        ((b"b", b"d"), (b"c\xff\xff", b"z"), True),
        ((b"b", None), (b"\xff" * 20, None), True),
        ((b"b", None), (b"", b"b"), False),
        ((b"b", b"b"), (b"", None), False),
        ((b"d", b"b"), (b"", None), False),
        ((b"", None), (b"x", b"x"), False),
        ((b"", None), (b"y", b"x"), False),
        ((b"", None), (b"", b"\0"), True),
    ],
)
def test_i1_ranges_conflict_exactly_where_they_share_a_key(written: Range, read: Range, expected: bool) -> None:
    window = ConflictWindow(0)
    window.record(1, [], [written])
    assert window.conflicts(0, [], [read]) is expected
    assert not window.conflicts(1, [], [read])

"""The conflict window against an oracle that keeps every write and looks at all of them.

Two-sided: a conflict that is missed breaks rule I1; one that is not there costs a client a retry for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pgcoord_cli.core.codec import Range
from pgcoord_cli.core.conflicts import ConflictWindow

keys = st.sampled_from([b"", b"\0", b"a", b"a\0", b"aa", b"b", b"b\0", b"c", b"\xff", b"\xff\0"])
intervals = st.tuples(keys, st.none() | keys)
"""Open ends, empty ones and those that run backwards included."""

some_keys = st.lists(keys, max_size=3)
some_intervals = st.lists(intervals, max_size=2)


def overlap(one: Range, other: Range) -> bool:
    """Whether two half-open ranges have a key in common: if so, the greater of the two begins is one."""
    begin = max(one[0], other[0])
    return all(end is None or begin < end for _, end in (one, other))


def point(key: bytes) -> Range:
    """The range that holds one key: the next key after k is k followed by a zero byte."""
    return key, key + b"\0"


class Oracle:
    """Every write ever, and the question answered by looking at each."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, Range]] = []

    def record(self, version: int, written_keys: Iterable[bytes], ranges: Iterable[Range]) -> None:
        self.writes += [(version, interval) for interval in [*map(point, written_keys), *ranges]]

    def conflicts(self, read_version: int, read_keys: Iterable[bytes], ranges: Iterable[Range]) -> bool:
        return any(
            version > read_version and overlap(read, written)
            for read in [*map(point, read_keys), *ranges]
            for version, written in self.writes
        )


class WindowMachine(RuleBasedStateMachine):
    """A window and an oracle are told the same and have to agree at every moment."""

    @initialize(floor=st.integers(0, 3))
    def begin(self, floor: int) -> None:
        self.window = ConflictWindow(floor)
        self.oracle = Oracle()
        self.version = floor

    @rule(gap=st.integers(1, 3), written=some_keys, ranges=some_intervals)
    def commit(self, gap: int, written: list[bytes], ranges: list[Range]) -> None:
        self.version += gap
        self.window.record(self.version, written, ranges)
        self.oracle.record(self.version, written, ranges)

    @rule(back=st.integers(0, 8))
    def raise_floor(self, back: int) -> None:
        before = self.window.floor
        self.window.raise_floor(self.version - back)
        assert self.window.floor == max(before, self.version - back)

    @rule(above=st.integers(0, 10), read=some_keys, ranges=some_intervals)
    def ask(self, above: int, read: list[bytes], ranges: list[Range]) -> None:
        read_version = self.window.floor + above
        assert self.window.conflicts(read_version, read, ranges) == self.oracle.conflicts(read_version, read, ranges)

    @rule(above=st.integers(0, 4), read=intervals)
    def ask_about_one_range(self, above: int, read: Range) -> None:
        self.ask(above, [], [read])

    @rule(above=st.integers(0, 4), read=keys)
    def ask_about_one_key(self, above: int, read: bytes) -> None:
        self.ask(above, [read], [])

    @invariant()
    def a_reader_of_the_newest_version_never_conflicts(self) -> None:
        if hasattr(self, "window"):
            assert not self.window.conflicts(max(self.version, self.window.floor), [b"a"], [(b"", None)])


TestWindow = WindowMachine.TestCase
TestWindow.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


@given(st.lists(st.tuples(some_keys, some_intervals), max_size=30))
def test_a_window_whose_floor_has_caught_up_holds_nothing(commits: list[tuple[list[bytes], list[Range]]]) -> None:
    window = ConflictWindow(0)
    for version, (written, ranges) in enumerate(commits, start=1):
        window.record(version, written, ranges)
    window.raise_floor(len(commits))
    assert len(window) == 1, "one step over the whole key space, and no key"
    assert not window.conflicts(len(commits), [b"a"], [(b"", None)])


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

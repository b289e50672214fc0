"""Mutations folded into one write set have the effect that they have one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgcoord_cli.core.commits.codec import MAX_VALUE_BYTES, Mutation, Op, Range
from pgcoord_cli.core.commits.mutations import WriteSet, apply, covers, fold, stamped, versionstamp

Data = dict[bytes, bytes]

keys = st.sampled_from([b"", b"\0", b"a", b"a\0", b"aa", b"b", b"b\xff", b"c", b"\xff", b"\xff\xff"])
values = st.binary(max_size=3) | st.sampled_from([b"\0\0", b"\xff\xff", b"\x01", b"v" * MAX_VALUE_BYTES])
stored = st.dictionaries(keys, values)
intervals = st.tuples(keys, st.none() | keys)
"""Includes backward ranges, which contain no key."""

ATOMIC = [op for op in Op if Op.CLEAR_RANGE < op < Op.SET_VERSIONSTAMPED_KEY]

mutations = st.lists(
    st.one_of(
        st.builds(Mutation, st.just(Op.SET), keys, values),
        st.builds(Mutation, st.just(Op.CLEAR), keys, st.none()),
        st.builds(Mutation, st.sampled_from(ATOMIC), keys, values),
        intervals.map(lambda bounds: Mutation(Op.CLEAR_RANGE, *bounds)),
    ),
    max_size=12,
)


def within(interval: Range, key: bytes) -> bool:
    begin, end = interval
    return key >= begin and (end is None or key < end)


def digits(value: bytes, length: int) -> list[int]:
    """Returns the bytes as numbers, the least significant first, cut or zero-filled to a length."""
    return [value[place] if place < len(value) else 0 for place in range(length)]


def added(one: list[int], other: list[int]) -> list[int]:
    """Adds two numbers digit by digit with a carry; the last carry is dropped."""
    total, carry = [], 0
    for a, b in zip(one, other, strict=True):
        total.append((a + b + carry) % 256)
        carry = (a + b + carry) // 256
    return total


def expected(op: Op, before: bytes | None, operand: bytes) -> bytes | None:  # noqa: PLR0911 - one for each operation
    """Computes one operation as FoundationDB defines it, by other means than the program: a list of digits."""
    mine, theirs = digits(before or b"", len(operand)), digits(operand, len(operand))
    greater = mine if mine[::-1] > theirs[::-1] else theirs
    if op == Op.APPEND_IF_FITS:
        return before if len(before or b"") + len(operand) > MAX_VALUE_BYTES else (before or b"") + operand
    if op == Op.COMPARE_AND_CLEAR:
        return None if before == operand else before
    if before is None:
        return operand
    if op == Op.BYTE_MAX:
        return sorted([before, operand])[1]
    if op == Op.BYTE_MIN:
        return sorted([before, operand])[0]
    if op == Op.MIN:
        return bytes(theirs if greater == mine else mine)
    number = {
        Op.ADD: added(mine, theirs),
        Op.BIT_AND: [a & b for a, b in zip(mine, theirs, strict=True)],
        Op.BIT_OR: [a | b for a, b in zip(mine, theirs, strict=True)],
        Op.BIT_XOR: [a ^ b for a, b in zip(mine, theirs, strict=True)],
        Op.MAX: greater,
    }
    return bytes(number[op])


def one_by_one(data: Data, changes: Iterable[Mutation]) -> Data:
    """The model: applies each mutation to a dictionary before the next."""
    data = dict(data)
    for op, key, operand in changes:
        if op == Op.CLEAR_RANGE:
            data = {kept: value for kept, value in data.items() if not within((key, operand), kept)}
            continue
        value = None if op == Op.CLEAR else operand if op == Op.SET else expected(op, data.get(key), operand or b"")
        data.pop(key, None)
        if value is not None:
            data[key] = value
    return data


def in_three_steps(data: Data, write_set: WriteSet) -> Data:
    """Applies a write set as the resolver does: decides keys, removes ranges, removes keys, writes keys."""
    write_set.decide({key: data.get(key) for key in write_set.undecided})
    assert write_set.undecided == []
    data = {key: value for key, value in data.items() if not any(within(cleared, key) for cleared in write_set.ranges)}
    data = {key: value for key, value in data.items() if key not in write_set.removed}
    return data | write_set.written


@given(stored, mutations)
@settings(max_examples=400, deadline=None)
@example({b"a": b""}, [Mutation(Op.SET, b"a", b"1"), Mutation(Op.CLEAR_RANGE, b"", None), Mutation(Op.SET, b"b", b"2")])
@example(
    {b"a": b""}, [Mutation(Op.CLEAR_RANGE, b"", None), Mutation(Op.SET, b"a", b"1"), Mutation(Op.CLEAR, b"a", None)]
)
@example(
    {b"a": b"5"}, [Mutation(Op.ADD, b"a", b"\1"), Mutation(Op.CLEAR_RANGE, b"a", b"b"), Mutation(Op.ADD, b"a", b"\2")]
)
def test_folded_mutations_leave_the_data_that_they_leave_one_by_one(data: Data, changes: list[Mutation]) -> None:
    assert in_three_steps(data, fold(changes)) == one_by_one(data, changes)


@given(stored, mutations, keys)
@settings(max_examples=200, deadline=None)
def test_lookup_knows_a_key_exactly_when_the_mutations_decide_it(
    data: Data, changes: list[Mutation], key: bytes
) -> None:
    write_set = fold(changes)
    after = one_by_one(data, changes).get(key)
    decided, value = write_set.lookup(key)
    assert value == (after if decided else None)
    assert write_set.value(key, data.get(key)) == after
    touching = [m for m in changes if (within((m.key, m.operand), key) if m.op == Op.CLEAR_RANGE else m.key == key)]
    assert decided == any(m.op in (Op.SET, Op.CLEAR, Op.CLEAR_RANGE) for m in touching)
    assert (key in write_set.undecided) == (bool(touching) and not decided)


@given(stored, mutations, intervals)
@settings(max_examples=200, deadline=None)
def test_over_shows_a_range_as_the_mutations_would_leave_it(
    data: Data, changes: list[Mutation], interval: Range
) -> None:
    rows = {key: value for key, value in data.items() if within(interval, key)}
    after = {key: value for key, value in one_by_one(data, changes).items() if within(interval, key)}
    assert fold(changes).over(rows, *interval) == after


@given(mutations)
def test_cleared_ranges_neither_overlap_nor_touch(changes: list[Mutation]) -> None:
    ranges = fold(changes).ranges
    for (begin, end), (following, _) in pairwise(ranges):
        assert end is not None
        assert begin < end < following
    assert all(end is None or begin < end for begin, end in ranges)


@given(mutations, mutations)
def test_reading_a_write_set_between_mutations_changes_nothing(first: list[Mutation], later: list[Mutation]) -> None:
    grown = fold(first)
    _ = grown.ranges, grown.removed, grown.written, grown.undecided
    for mutation in later:
        grown.add(mutation)
    assert_same(grown, fold([*first, *later]))


def assert_same(one: WriteSet, other: WriteSet) -> None:
    assert one.ranges == other.ranges
    assert sorted(one.removed) == sorted(other.removed)
    assert one.written == other.written
    assert sorted(one.undecided) == sorted(other.undecided)


@given(mutations)
def test_a_write_set_is_empty_only_when_it_would_change_nothing(changes: list[Mutation]) -> None:
    write_set = fold(changes)
    assert bool(write_set) == bool(write_set.ranges or write_set.removed or write_set.written or write_set.undecided)


@given(mutations)
def test_no_key_is_both_removed_and_written(changes: list[Mutation]) -> None:
    """Each row is touched at most once in a batch."""
    write_set = fold(changes)
    assert not {*write_set.removed, *write_set.written} & {*write_set.undecided}
    assert not set(write_set.removed) & write_set.written.keys()
    assert len(write_set.removed) == len(set(write_set.removed))


@given(intervals, keys)
def test_a_range_holds_its_begin_and_not_its_end(interval: Range, key: bytes) -> None:
    assert covers(interval, key) == within(interval, key)
    begin, end = interval
    assert end is None or not covers(interval, end)
    assert covers(interval, begin) == (end is None or begin < end)


@given(st.sampled_from(ATOMIC), st.none() | values, values)
@settings(max_examples=400, deadline=None)
def test_operations_compute_what_foundationdb_computes(op: Op, before: bytes | None, operand: bytes) -> None:
    assert apply(op, before, operand) == expected(op, before, operand)


@pytest.mark.parametrize(
    ("op", "before", "operand", "after"),
    [
        (Op.ADD, None, b"\1", b"\1"),
        (Op.ADD, b"\xff", b"\1", b"\0"),
        (Op.ADD, b"\xff", b"\1\0", b"\0\1"),
        (Op.ADD, b"\1\2\3", b"\1", b"\2"),
        (Op.ADD, b"\1", b"", b""),
        (Op.BIT_AND, None, b"\x0f", b"\x0f"),
        (Op.BIT_AND, b"\xff", b"\x0f\x0f", b"\x0f\0"),
        (Op.BIT_OR, b"\x10\xff", b"\1", b"\x11"),
        (Op.BIT_XOR, b"\xff", b"\x0f", b"\xf0"),
        (Op.MAX, b"\0\1", b"\xff\0", b"\0\1"),
        (Op.MAX, b"\0\1", b"\1", b"\1"),
        (Op.MIN, None, b"\7", b"\7"),
        (Op.MIN, b"", b"\7", b"\0"),
        (Op.BYTE_MAX, b"a", b"b", b"b"),
        (Op.BYTE_MAX, b"ab", b"a", b"ab"),
        (Op.BYTE_MIN, b"", b"a", b""),
        (Op.COMPARE_AND_CLEAR, b"a", b"a", None),
        (Op.COMPARE_AND_CLEAR, b"a", b"ab", b"a"),
        (Op.COMPARE_AND_CLEAR, None, b"", None),
        (Op.APPEND_IF_FITS, None, b"a", b"a"),
        (Op.APPEND_IF_FITS, b"v" * MAX_VALUE_BYTES, b"a", b"v" * MAX_VALUE_BYTES),
    ],
)
def test_examples_of_operations(op: Op, before: bytes | None, operand: bytes, after: bytes | None) -> None:
    assert apply(op, before, operand) == after


@given(st.integers(1, 2**63 - 1), st.binary(max_size=20), st.binary(max_size=20))
def test_a_versionstamp_replaces_ten_bytes_and_sorts_by_version(version: int, before: bytes, after: bytes) -> None:
    template = before + b"?" * 10 + after + len(before).to_bytes(4, "little")
    expected = before + versionstamp(version) + after
    assert stamped(Mutation(Op.SET_VERSIONSTAMPED_KEY, template, b"v"), version) == (Op.SET, expected, b"v")
    assert stamped(Mutation(Op.SET_VERSIONSTAMPED_VALUE, b"k", template), version) == (Op.SET, b"k", expected)
    assert versionstamp(version - 1) < versionstamp(version)


@given(mutations, st.integers(1, 100))
def test_other_mutations_are_not_stamped(changes: list[Mutation], version: int) -> None:
    assert [stamped(mutation, version) for mutation in changes] == changes

"""Mutations folded into one write set do what they do one after the other."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import example, given
from hypothesis import strategies as st

from pgcoord_cli.core.codec import Mutation, Op, Range
from pgcoord_cli.core.mutations import WriteSet, covers, fold

Data = dict[bytes, bytes]

keys = st.sampled_from([b"", b"\0", b"a", b"a\0", b"aa", b"b", b"b\xff", b"c", b"\xff", b"\xff\xff"])
values = st.binary(max_size=2)
stored = st.dictionaries(keys, values)
intervals = st.tuples(keys, st.none() | keys)
"""Also those that run backwards: they hold nothing."""

mutations = st.lists(
    st.one_of(
        st.builds(Mutation, st.just(Op.SET), keys, values),
        st.builds(Mutation, st.just(Op.CLEAR), keys, st.none()),
        intervals.map(lambda bounds: Mutation(Op.CLEAR_RANGE, *bounds)),
    ),
    max_size=12,
)


def within(interval: Range, key: bytes) -> bool:
    begin, end = interval
    return key >= begin and (end is None or key < end)


def one_by_one(data: Data, changes: Iterable[Mutation]) -> Data:
    """The model: each mutation applied to a dictionary before the next."""
    data = dict(data)
    for op, key, operand in changes:
        if op == Op.SET:
            assert operand is not None
            data[key] = operand
        elif op == Op.CLEAR:
            data.pop(key, None)
        else:
            data = {kept: value for kept, value in data.items() if not within((key, operand), kept)}
    return data


def in_three_steps(data: Data, write_set: WriteSet) -> Data:
    """What the resolver's statements do: remove ranges, remove keys, write keys."""
    data = {key: value for key, value in data.items() if not any(within(cleared, key) for cleared in write_set.ranges)}
    data = {key: value for key, value in data.items() if key not in write_set.removed}
    return data | write_set.written


@given(stored, mutations)
@example({b"a": b""}, [Mutation(Op.SET, b"a", b"1"), Mutation(Op.CLEAR_RANGE, b"", None), Mutation(Op.SET, b"b", b"2")])
@example(
    {b"a": b""}, [Mutation(Op.CLEAR_RANGE, b"", None), Mutation(Op.SET, b"a", b"1"), Mutation(Op.CLEAR, b"a", None)]
)
def test_folded_mutations_leave_what_one_after_the_other_leaves(data: Data, changes: list[Mutation]) -> None:
    assert in_three_steps(data, fold(changes)) == one_by_one(data, changes)


@given(stored, mutations, keys)
def test_lookup_knows_a_key_exactly_when_the_mutations_decide_it(
    data: Data, changes: list[Mutation], key: bytes
) -> None:
    decided, value = fold(changes).lookup(key)
    after = one_by_one(data, changes).get(key)
    if decided:
        assert value == after
    else:
        assert after == data.get(key)
    touched = any(within((m.key, m.operand), key) if m.op == Op.CLEAR_RANGE else m.key == key for m in changes)
    assert decided == touched


@given(stored, mutations, intervals)
def test_over_shows_a_range_as_the_mutations_would_leave_it(
    data: Data, changes: list[Mutation], interval: Range
) -> None:
    rows = {key: value for key, value in data.items() if within(interval, key)}
    after = {key: value for key, value in one_by_one(data, changes).items() if within(interval, key)}
    assert fold(changes).over(rows, *interval) == after


@given(mutations, mutations)
def test_a_write_set_can_be_asked_at_any_time(first: list[Mutation], later: list[Mutation]) -> None:
    grown = fold(first)
    _ = grown.ranges, grown.removed, grown.written
    for mutation in later:
        grown.add(mutation)
    whole = fold([*first, *later])
    assert (grown.ranges, grown.removed, grown.written) == (whole.ranges, whole.removed, whole.written)


@given(mutations)
def test_no_key_is_both_removed_and_written(changes: list[Mutation]) -> None:
    """PostgreSQL would otherwise have to be told twice about one row in one batch."""
    write_set = fold(changes)
    assert not set(write_set.removed) & write_set.written.keys()
    assert len(write_set.removed) == len(set(write_set.removed))


@given(intervals, keys)
def test_a_range_holds_its_begin_and_not_its_end(interval: Range, key: bytes) -> None:
    assert covers(interval, key) == within(interval, key)
    begin, end = interval
    assert end is None or not covers(interval, end)
    assert covers(interval, begin) == (end is None or begin < end)

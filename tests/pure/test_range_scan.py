"""Range scans against brute force: they return what the transaction leaves, and conflict with what that depends on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgcoord_cli.core.commits.codec import Mutation, Op
from pgcoord_cli.core.commits.mutations import apply, covers
from pgcoord_cli.core.kv.own_writes import OwnWrites
from pgcoord_cli.core.kv.range_scan import RangeScan, ScannedPage
from pgcoord_cli.core.kv.snapshots import Page, RangeRead, ReadSet, ReadVersion, Snapshot
from pgcoord_cli.errors import Rejected

Data = Mapping[bytes, bytes]

KEYS = [bytes([letter]) for letter in b"abcdefgh"]
keys = st.sampled_from(KEYS)
ends = st.one_of(st.none(), keys)
values = st.sampled_from([b"1", b"2", b"\xff"])
mutations = st.one_of(
    st.builds(Mutation, st.just(Op.SET), keys, values),
    st.builds(Mutation, st.just(Op.CLEAR), keys, st.none()),
    st.builds(Mutation, st.sampled_from([Op.ADD, Op.COMPARE_AND_CLEAR, Op.BYTE_MAX]), keys, values),
    st.builds(Mutation, st.just(Op.CLEAR_RANGE), keys, ends),
)
stored_rows = st.dictionaries(keys, values)
limits = st.one_of(st.none(), st.integers(1, 4))


def left_by(stored: Data, written: list[Mutation]) -> dict[bytes, bytes]:
    """Applies mutations one by one, without a write set."""
    rows = dict(stored)
    for op, key, operand in written:
        if op == Op.CLEAR_RANGE:
            rows = {other: value for other, value in rows.items() if not covers((key, operand), other)}
            continue
        value = None if op == Op.CLEAR else apply(op, rows.get(key), operand or b"")
        rows.pop(key, None)
        if value is not None:
            rows[key] = value
    return rows


def page_of(stored: Data, read: RangeRead) -> Page:
    in_range = [row for row in sorted(stored.items(), reverse=read.reverse) if covers((read.begin, read.end), row[0])]
    rows = tuple(in_range[: read.limit])
    has_more = read.limit is not None and len(rows) == read.limit
    return Page(rows, read.up_to(rows[-1][0]) if has_more else (read.begin, read.end), has_more)


def scan(
    stored: Data, own: OwnWrites, begin: bytes, end: bytes | None, limit: int | None, page_rows: int | None,
    reverse: bool,
) -> list[ScannedPage]:  # fmt: skip
    async def read(read_set: ReadSet) -> Snapshot:
        pages = {interval: page_of(stored, interval) for interval in read_set.ranges}
        return Snapshot(ReadVersion(1, None, 1), {}, pages)

    async def all_pages() -> list[ScannedPage]:
        return [page async for page in RangeScan(read, own, limit, page_rows, reverse=reverse).pages(begin, end)]

    return asyncio.run(all_pages())


def written_by(written: list[Mutation]) -> OwnWrites:
    own = OwnWrites()
    for mutation in written:
        own.add(mutation)
    return own


@given(stored_rows, st.lists(mutations, max_size=6), keys, ends, limits, limits, st.booleans())
def test_a_scan_returns_the_range_as_the_transaction_leaves_it(
    stored: Data, written: list[Mutation], begin: bytes, end: bytes | None, limit: int | None, page_rows: int | None,
    reverse: bool,
) -> None:  # fmt: skip
    pages = scan(stored, written_by(written), begin, end, limit, page_rows, reverse)
    rows = [row for page in pages for row in page.rows]
    expected = {key: value for key, value in left_by(stored, written).items() if covers((begin, end), key)}
    assert rows == sorted(expected.items(), reverse=reverse)[:limit]


@given(stored_rows, st.lists(mutations, max_size=6), keys, ends, limits, limits, st.booleans())
def test_a_scan_conflicts_with_exactly_what_its_rows_depend_on(
    stored: Data, written: list[Mutation], begin: bytes, end: bytes | None, limit: int | None, page_rows: int | None,
    reverse: bool,
) -> None:  # fmt: skip
    def rows_and_conflicts(rows: Data) -> tuple[list[tuple[bytes, bytes]], set[bytes]]:
        pages = scan(rows, written_by(written), begin, end, limit, page_rows, reverse)
        ranges = [interval for page in pages for interval in page.conflicts]
        checked = {key for key in KEYS if any(covers(interval, key) for interval in ranges)}
        return [row for page in pages for row in page.rows], checked

    before, checked = rows_and_conflicts(stored)
    for key in KEYS:
        if key not in checked:  # another transaction may write this key without a conflict
            without = {other: value for other, value in stored.items() if other != key}
            assert rows_and_conflicts(without)[0] == before
            assert rows_and_conflicts({**stored, key: b"9"})[0] == before
    decided = {key for key in KEYS if written_by(written).lookup(key)[0]}
    assert not checked & decided, "own writes alone decide these keys"


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_cleared_range_is_not_read(limit: int | None, reverse: bool) -> None:
    own = written_by([Mutation(Op.CLEAR_RANGE, b"a", None), Mutation(Op.SET, b"c", b"own")])

    async def read(_read_set: ReadSet) -> Snapshot:
        raise AssertionError

    async def pages() -> list[ScannedPage]:
        return [page async for page in RangeScan(read, own, limit, None, reverse=reverse).pages(b"a", None)]

    assert asyncio.run(pages()) == [ScannedPage([(b"c", b"own")], ())]


STAMPED_KEY = Mutation(Op.SET_VERSIONSTAMPED_KEY, b"log/" + bytes(10) + (4).to_bytes(4, "little"), b"v")
STAMPED_VALUE = Mutation(Op.SET_VERSIONSTAMPED_VALUE, b"y", bytes(14))


@pytest.mark.parametrize(
    ("mutation", "begin", "end"),
    [(STAMPED_KEY, b"log/", b"log0"), (STAMPED_KEY, b"a", None), (STAMPED_VALUE, b"a", b"z")],
)
def test_a_range_with_the_own_versionstamp_cannot_be_read(mutation: Mutation, begin: bytes, end: bytes | None) -> None:
    with pytest.raises(Rejected, match="versionstamp"):
        scan({}, written_by([mutation]), begin, end, None, None, False)
    # A range that ends before it can, and a read that returns enough before it is one.
    assert scan({b"a": b"1"}, written_by([mutation]), b"a", b"log/", None, None, False)[0].rows == [(b"a", b"1")]
    assert scan({b"a": b"1"}, written_by([mutation]), b"a", None, 1, None, False)[0].rows == [(b"a", b"1")]


def test_a_cleared_key_can_be_read_although_its_value_held_the_versionstamp() -> None:
    for clearing in (
        Mutation(Op.SET, b"y", b"1"),
        Mutation(Op.CLEAR, b"y", None),
        Mutation(Op.CLEAR_RANGE, b"x", b"z"),
    ):
        scan({}, written_by([STAMPED_VALUE, clearing]), b"a", b"z", None, None, False)
    with pytest.raises(Rejected):
        scan({}, written_by([STAMPED_VALUE, Mutation(Op.ADD, b"y", b"1")]), b"a", b"z", None, None, False)
    cut = written_by([STAMPED_KEY, Mutation(Op.CLEAR_RANGE, b"log/", b"log0")])
    assert scan({}, cut, b"a", b"z", None, None, False)[0].rows == []

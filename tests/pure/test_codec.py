"""The encoding of commit requests: encode and decode are inverse, and any other bytes are refused with a reason."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgcoord_cli.core.commits import codec
from pgcoord_cli.core.commits.codec import Mutation, Op, Request, Undecodable

LONGEST_REASON = 300
"""Characters of the longest reason: it is stored with the request and shown on one screen."""

keys = st.binary(max_size=6)
long_keys = st.just(b"k" * codec.MAX_KEY_BYTES)
values = st.binary(max_size=8) | st.just(b"v" * codec.MAX_VALUE_BYTES)


def ordered(bounds: tuple[bytes, bytes | None]) -> tuple[bytes, bytes | None]:
    """Swaps the bounds if the first is greater; an end of None stays."""
    begin, end = bounds
    return bounds if end is None else (min(begin, end), max(begin, end))


ranges = st.tuples(keys | long_keys, st.none() | keys | long_keys).map(ordered)
PLAIN = [op for op in Op if op not in (Op.CLEAR, Op.CLEAR_RANGE) and op < Op.SET_VERSIONSTAMPED_KEY]


@st.composite
def templates(draw: st.DrawFn) -> bytes:
    """Draws a versionstamp template: bytes with ten to replace, and their offset."""
    before, after = draw(keys), draw(keys)
    return before + b"?" * codec.VERSIONSTAMP_BYTES + after + len(before).to_bytes(4, "little")


mutations = st.one_of(
    st.builds(Mutation, st.sampled_from(PLAIN), keys | long_keys, values),
    st.builds(Mutation, st.just(Op.SET_VERSIONSTAMPED_KEY), templates(), values),
    st.builds(Mutation, st.just(Op.SET_VERSIONSTAMPED_VALUE), keys | long_keys, templates()),
    st.builds(Mutation, st.just(Op.CLEAR), keys | long_keys, st.none()),
    ranges.map(lambda bounds: Mutation(Op.CLEAR_RANGE, *bounds)),
)


def several(items: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(items, max_size=5).map(tuple)


def without_conflicts_at(request: Request, places: set[int]) -> Request:
    return request._replace(no_conflict=tuple(sorted(place for place in places if place < len(request.mutations))))


requests = st.builds(
    without_conflicts_at,
    st.builds(Request, several(keys | long_keys), several(ranges), several(ranges), several(mutations)),
    st.sets(st.integers(0, 4), max_size=2),
)

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(max_size=5)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
shaped_like_a_request = st.tuples(*[st.lists(anything, max_size=3)] * 3, st.lists(st.lists(anything, max_size=4)))


def packed(fields: Any) -> bytes:
    """Packs any content as a payload of the current format version."""
    return bytes([codec.FORMAT_VERSION]) + bytes(msgpack.packb(fields))


def assert_decoded_or_refused(payload: bytes) -> None:
    """Checks that `decode` returns a request that round-trips, or raises Undecodable with a storable reason."""
    try:
        request = codec.decode(payload)
    except Undecodable as error:
        assert 0 < len(str(error)) <= LONGEST_REASON
        assert "\0" not in str(error), "PostgreSQL stores no text with a zero byte"
        str(error).encode("utf-8")
    else:
        assert codec.decode(codec.encode(request)) == request


@given(requests)
def test_a_request_survives_encode_and_decode(request: Request) -> None:
    codec.check(request)
    again = codec.decode(codec.encode(request))
    assert again == request
    assert all(isinstance(mutation.op, Op) for mutation in again.mutations)


@given(st.binary())
@example(b"")
@example(b"\x00")
@example(b"\x02")
@example(b"\x01")
@example(b"\x01\xc1")
def test_i6_arbitrary_bytes_are_decoded_or_refused_with_a_reason(payload: bytes) -> None:
    assert_decoded_or_refused(payload)


@given(st.binary())
def test_i6_arbitrary_bytes_of_the_right_version_are_decoded_or_refused(body: bytes) -> None:
    assert_decoded_or_refused(bytes([codec.FORMAT_VERSION]) + body)


@given(anything)
def test_i6_any_messagepack_is_decoded_or_refused(content: Any) -> None:
    assert_decoded_or_refused(packed(content))


@given(shaped_like_a_request)
def test_i6_anything_in_the_shape_of_a_request_is_decoded_or_refused(content: Any) -> None:
    assert_decoded_or_refused(packed(content))


@pytest.mark.parametrize("places", [[1], [-1], [True], ["0"], [None], 0, None, [2**63]])
def test_i6_a_place_of_no_mutation_is_refused(places: Any) -> None:
    mutations = [[0, b"k", b"v"]]
    assert codec.decode(b"\x03" + msgpack.packb([[], [], [], mutations, [0]])).no_conflict == (0,)
    with pytest.raises(Undecodable):
        codec.decode(b"\x03" + msgpack.packb([[], [], [], mutations, places]))


def test_only_a_request_that_needs_it_has_version_3() -> None:
    request = Request((), (), (), (Mutation(Op.SET, b"k", b"v"),))
    assert codec.encode(request)[0] == 2
    assert codec.encode(request._replace(no_conflict=(0,)))[0] == 3
    with pytest.raises(Undecodable, match="4 fields"):
        codec.decode(b"\x02" + codec.encode(request._replace(no_conflict=(0,)))[1:])


@given(st.data(), requests)
def test_i6_a_request_with_flipped_bytes_is_decoded_or_refused(data: st.DataObject, request: Request) -> None:
    payload = bytearray(codec.encode(request))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    assert_decoded_or_refused(bytes(payload))


@given(requests, st.data())
def test_i6_a_request_cut_short_is_refused(request: Request, data: st.DataObject) -> None:
    payload = codec.encode(request)
    with pytest.raises(Undecodable):
        codec.decode(payload[: data.draw(st.integers(0, len(payload) - 1))])


@pytest.mark.parametrize("depth", [10, 500, 900, 990, 1000, 1010, 1020, 1030, 100_000])
@pytest.mark.parametrize("place", ["payload", "key", "range", "mutation", "op", "operand"])
def test_i6_deep_nesting_is_refused(depth: int, place: str) -> None:
    nest = b"\x91" * depth + b"\xc0"
    bodies = {
        "payload": nest,
        "key": b"\x94\x91" + nest + b"\x90\x90\x90",
        "range": b"\x94\x90\x91" + nest + b"\x90\x90",
        "mutation": b"\x94\x90\x90\x90\x91" + nest,
        "op": b"\x94\x90\x90\x90\x91\x93" + nest + b"\xc4\x01k\xc0",
        "operand": b"\x94\x90\x90\x90\x91\x93\x00\xc4\x01k" + nest,
    }
    with pytest.raises(Undecodable) as refused:
        codec.decode(b"\x01" + bodies[place])
    assert len(str(refused.value)) <= LONGEST_REASON


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of 4,294,967,295 items
        b"\xdf\xff\xff\xff\xff",  # a map of as many items
        b"\xc6\xff\xff\xff\xff",  # as many bytes
        b"\xdb\xff\xff\xff\xff",  # as much text
        b"\xc9\xff\xff\xff\xff\x01",  # an extension of that size
        b"\x94\xdd\xff\xff\xff\xff\x90\x90\x90",
        b"\x94\x90\x90\x90\x91\x93\x00\xc6\xff\xff\xff\xff",
        b"\x94\xdd\x00\xff\xff\xff" + b"\x90" * 100,
    ],
)
def test_i6_a_length_that_is_not_there_is_refused(body: bytes) -> None:
    with pytest.raises(Undecodable):
        codec.decode(b"\x01" + body)


@pytest.mark.parametrize(
    "op", [max(Op) + 1, 255, -1, 2**63, 2**64 - 1, None, True, False, 0.0, 1.0, float("nan"), "SET", b"\0", {}, []]
)
def test_i6_an_unknown_mutation_is_refused(op: Any) -> None:
    with pytest.raises(Undecodable, match="mutation"):
        codec.decode(packed([[], [], [], [[op, b"k", b"v"]]]))


def test_i6_the_reason_stays_short_whatever_was_sent() -> None:
    with pytest.raises(Undecodable) as refused:
        codec.decode(packed([[], [], [], [[b"x" * 1_000_000, b"k", b"v"]]]))
    assert len(str(refused.value)) <= LONGEST_REASON


@pytest.mark.parametrize("op", list(Op))
def test_i6_a_format_version_has_only_its_own_operations(op: Op) -> None:
    """An operation that an older leader does not know must not be sent under a version that it reads."""
    template = b"?" * 10 + b"\0" * 4
    operand = None if op in (Op.CLEAR, Op.CLEAR_RANGE) else template
    fields = bytes(msgpack.packb([[], [], [], [[op, template, operand]]]))
    assert codec.decode(b"\x02" + fields).mutations == ((op, template, operand),)
    if op <= Op.CLEAR_RANGE:
        assert codec.decode(b"\x01" + fields).mutations == ((op, template, operand),)
    else:
        with pytest.raises(Undecodable, match="version 1"):
            codec.decode(b"\x01" + fields)


@pytest.mark.parametrize(
    "template", [b"", b"\0" * 3, b"\0" * 13, b"?" * 10 + b"\1\0\0\0", b"?" * 10 + b"\xff" * 4, b"?" * 9 + b"\0" * 4]
)
def test_i6_a_versionstamp_without_room_is_refused(template: bytes) -> None:
    for mutation in (
        Mutation(Op.SET_VERSIONSTAMPED_KEY, template, b"v"),
        Mutation(Op.SET_VERSIONSTAMPED_VALUE, b"k", template),
    ):
        with pytest.raises(Undecodable, match="versionstamp"):
            codec.decode(packed([[], [], [], [list(mutation)]]))


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request((b"k" * 2_601,), (), (), ()), "longer than"),
        (Request((), ((b"k" * 2_602, None),), (), ()), "longer than"),
        (Request((), ((b"", b"k" * 2_602),), (), ()), "longer than"),
        (Request((), ((b"b", b"a"),), (), ()), "begins after"),
        (Request((), (), ((b"b", b"a"),), ()), "begins after"),
        (Request((), (), (), (Mutation(Op.CLEAR_RANGE, b"b", b"a"),)), "begins after"),
        *[(Request((), (), (), (Mutation(op, b"k", None),)), "no operand") for op in PLAIN],
        (Request((), (), (), (Mutation(Op.SET_VERSIONSTAMPED_KEY, b"k" * 2_611 + b"\0" * 4, b""),)), "longer than"),
        (Request((), (), (), (Mutation(Op.SET, b"k" * 2_601, b""),)), "longer than"),
        (Request((), (), (), (Mutation(Op.CLEAR, b"k" * 2_601, None),)), "longer than"),
        (Request((), (), (), (Mutation(Op.SET, b"k", b"v" * 100_001),)), "longer than"),
    ],
)
def test_i6_what_cannot_be_applied_is_refused(request_: Request, reason: str) -> None:
    with pytest.raises(Undecodable, match=reason):
        codec.check(request_)
    with pytest.raises(Undecodable, match=reason):
        codec.decode(codec.encode(request_))


def test_i6_a_transaction_that_is_too_large_is_refused_before_it_is_unpacked() -> None:
    with pytest.raises(Undecodable, match="more than"):
        codec.decode(b"\x01" + b"\xc1" * codec.MAX_TRANSACTION_BYTES)

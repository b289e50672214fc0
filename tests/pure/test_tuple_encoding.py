"""The tuple encoding: the bytes of the specification, which sort like the tuples, and any others are refused."""

from __future__ import annotations

import math
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgcoord_cli.tuples import (
    SingleFloat,
    Subspace,
    Versionstamp,
    pack,
    pack_with_versionstamp,
    range_of,
    unpack,
)

STAMP = bytes(range(1, 11))
LONGEST = 256**255 - 1
DEPTH = 5000
"""Deeper than the stack of the interpreter."""

VECTORS: list[tuple[tuple[Any, ...], str]] = [
    ((), ""),
    ((None,), "00"),
    ((None, None), "00 00"),
    ((b"",), "01 00"),
    ((b"foo\0bar",), "01 66 6f 6f 00 ff 62 61 72 00"),
    ((b"\0",), "01 00 ff 00"),
    ((b"\xff\0\xff",), "01 ff 00 ff ff 00"),
    (("",), "02 00"),
    (("F\u00d4O\0bar",), "02 46 c3 94 4f 00 ff 62 61 72 00"),
    (("\U0001f600",), "02 f0 9f 98 80 00"),
    (((),), "05 00"),
    (((None,),), "05 00 ff 00"),
    (((b"foo\0bar", None, ()),), "05 01 66 6f 6f 00 ff 62 61 72 00 00 ff 05 00 00"),
    ((((None,), None), None), "05 05 00 ff 00 00 ff 00 00"),
    ((-(2**64),), "0b f6 fe ff ff ff ff ff ff ff ff"),
    ((-LONGEST,), "0b 00" + " 00" * 255),
    ((-(2**64) + 1,), "0c 00 00 00 00 00 00 00 00"),
    ((-(2**63),), "0c 7f ff ff ff ff ff ff ff"),
    ((-5551212,), "11 ab 4b 93"),
    ((-65536,), "11 fe ff ff"),
    ((-65535,), "12 00 00"),
    ((-256,), "12 fe ff"),
    ((-255,), "13 00"),
    ((-1,), "13 fe"),
    ((0,), "14"),
    ((1,), "15 01"),
    ((255,), "15 ff"),
    ((256,), "16 01 00"),
    ((65535,), "16 ff ff"),
    ((65536,), "17 01 00 00"),
    ((2**32,), "19 01 00 00 00 00"),
    ((2**63,), "1c 80 00 00 00 00 00 00 00"),
    ((2**64 - 1,), "1c ff ff ff ff ff ff ff ff"),
    ((2**64,), "1d 09 01 00 00 00 00 00 00 00 00"),
    ((LONGEST,), "1d ff" + " ff" * 255),
    ((SingleFloat(-42),), "20 3d d7 ff ff"),
    ((SingleFloat(1.5),), "20 bf c0 00 00"),
    ((-math.inf,), "21 00 0f ff ff ff ff ff ff"),
    ((-1.0,), "21 40 0f ff ff ff ff ff ff"),
    ((-0.0,), "21 7f ff ff ff ff ff ff ff"),
    ((0.0,), "21 80 00 00 00 00 00 00 00"),
    ((1.0,), "21 bf f0 00 00 00 00 00 00"),
    ((math.inf,), "21 ff f0 00 00 00 00 00 00"),
    ((False,), "26"),
    ((True,), "27"),
    (
        (UUID("00112233-4455-6677-8899-aabbccddeeff"),),
        "30 00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff",
    ),
    ((Versionstamp(STAMP, 0x0B0C),), "33 01 02 03 04 05 06 07 08 09 0a 0b 0c"),
    (("orders", 17, None, (True, "x")), "02 6f 72 64 65 72 73 00 15 11 00 05 27 02 78 00 00"),
]
"""Tuples, and their bytes worked out by hand from the specification; its own test cases are among them."""


@pytest.mark.parametrize(("elements", "packed"), VECTORS)
def test_a_tuple_has_the_bytes_of_the_specification(elements: tuple[Any, ...], packed: str) -> None:
    assert pack(elements).hex(" ") == packed
    # repr distinguishes 1, 1.0 and True, and -0.0 from 0.0.
    assert repr(unpack(bytes.fromhex(packed))) == repr(elements)


# -- any tuple

powers = st.builds(
    lambda exponent, more, sign: sign * (2**exponent + more),
    st.integers(0, 8 * 255 - 1),
    st.integers(-1, 1),
    st.sampled_from((-1, 1)),
)
integers = st.integers(-70_000, 70_000) | st.integers() | powers | st.integers(-LONGEST, LONGEST)
texts = st.text() | st.text(st.sampled_from("\0\x01a\x7f\u0080\u07ff\uffff\U00010000\U0010ffff"))
strings = st.binary() | st.lists(st.sampled_from((b"\0", b"\1", b"\xfe", b"\xff"))).map(b"".join)
stamps = st.builds(
    Versionstamp, st.binary(min_size=10, max_size=10).filter(lambda data: data != b"\xff" * 10), st.integers(0, 65535)
)
singles = st.floats(width=32, allow_nan=False).map(SingleFloat)
scalars = st.one_of(
    st.none(), strings, texts, integers, st.floats(allow_nan=False), singles, st.booleans(), st.uuids(), stamps
)
tuples = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4).map(tuple)).flatmap(
    lambda element: st.lists(scalars, max_size=3).map(lambda others: (element, *others))
)


@given(tuples)
def test_unpack_is_the_inverse_of_pack(elements: tuple[Any, ...]) -> None:
    assert repr(unpack(pack(elements))) == repr(elements)


@given(tuples, tuples)
def test_packed_tuples_join_like_tuples(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert pack(one + other) == pack(one) + pack(other) == pack(other, pack(one))


def of_one_type() -> st.SearchStrategy[st.SearchStrategy[Any]]:
    """Draws a strategy whose values Python compares. Zeros have no sign: -0.0 and 0.0 are equal, their keys differ."""
    unsigned = st.floats(allow_nan=False).map(lambda number: number + 0.0)
    single = st.floats(width=32, allow_nan=False).map(lambda number: SingleFloat(number + 0.0))
    alike = st.sampled_from(
        [st.none(), strings, texts, integers, unsigned, single, st.booleans(), st.uuids(), stamps],
    )
    return st.recursive(alike, lambda inner: st.lists(inner, max_size=3).map(some_of), max_leaves=6)


def some_of(types: list[st.SearchStrategy[Any]]) -> st.SearchStrategy[tuple[Any, ...]]:
    """Draws tuples of these types, or of the first of them."""
    return st.integers(0, len(types)).flatmap(lambda length: st.tuples(*types[:length]))


@st.composite
def comparable(draw: st.DrawFn) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Draws two tuples with the same types at the same places, of which one may be longer, and with a common begin."""
    alike = some_of(draw(st.lists(of_one_type(), max_size=4)))
    one, other = draw(alike), draw(alike)
    common = draw(st.integers(0, min(len(one), len(other))))
    return one, one[:common] + other[common:]


@given(comparable())
@example(((2**64 - 1,), (2**64,)))
@example(((-(2**64) + 1,), (-(2**64),)))
@example(((("a",), 1), (("a", "b"), 0)))
@example((("\uffff",), ("\U00010000",)))
@example(((b"a",), (b"a\0",)))
@example(((b"a\0",), (b"a\0\0",)))
def test_packed_tuples_sort_like_tuples(both: tuple[tuple[Any, ...], tuple[Any, ...]]) -> None:
    one, other = both
    assert (pack(one) < pack(other)) == (one < other)
    assert (pack(one) == pack(other)) == (one == other)


def test_types_sort_by_their_codes_and_negative_zero_before_zero() -> None:
    nan = math.nan
    ascending: list[Any] = [
        None, b"", b"\xff", "", "\U0010ffff", (), (None,), (b"",), -(2**70), -1, 0, 1, 2**70, SingleFloat(-1),
        SingleFloat(1), -math.copysign(nan, 1), -math.inf, -5e-324, -0.0, 0.0, 5e-324, math.inf, math.copysign(nan, 1),
        False, True, UUID(int=0), UUID(int=2**128 - 1), Versionstamp(bytes(10)), Versionstamp(STAMP),
    ]  # fmt: skip
    packed = [pack((element,)) for element in ascending]
    assert packed == sorted(packed)
    assert len(set(packed)) == len(packed)
    assert math.isnan(unpack(pack((nan,)))[0])


def test_lists_and_buffers_are_packed_as_what_they_hold() -> None:
    assert unpack(pack([[b"a", ["b"]], bytearray(b"c"), memoryview(b"d")])) == ((b"a", ("b",)), b"c", b"d")
    assert unpack(memoryview(pack(("a",)))) == unpack(bytearray(pack(("a",)))) == ("a",)


def test_no_depth_exhausts_the_stack() -> None:
    packed = b"\x05" * DEPTH + b"\x00" * DEPTH
    elements = unpack(packed)
    assert pack(elements) == packed
    with pytest.raises(ValueError, match=f"the nested tuple at byte {DEPTH - 1} has no end"):
        unpack(b"\x05" * DEPTH)


# -- refusals


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ((1, object()), r"element \[1\] is of type object, which has no tuple encoding"),
        ((1, ("a", ({},))), r"element \[1\]\[1\]\[0\] is of type dict"),
        ("text", r"a tuple is packed, not str: write \(element,\)"),
        (b"bytes", "a tuple is packed, not bytes"),
    ],
)
def test_other_types_are_refused_with_their_place(elements: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        pack(elements)


@pytest.mark.parametrize("length", [LONGEST + 1, -LONGEST - 1])
def test_values_without_an_encoding_are_refused_with_their_place(length: int) -> None:
    with pytest.raises(ValueError, match=r"element \[1\]\[0\]: an integer of 256 bytes is longer than 255"):
        pack((1, (length,)))
    with pytest.raises(ValueError, match=r"element \[0\]: .* surrogates not allowed"):
        pack(("\ud800",))


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        ("03", "the byte 03 at 0 is no type code"),
        ("14 ff", "the byte ff at 1 is no type code"),
        ("00 ff", "the byte ff at 1 is no type code"),
        ("0a", "the byte 0a at 0 is no type code"),
        ("1e", "the byte 1e at 0 is no type code"),
        ("14 32", "the byte 32 at 1 is no type code"),
        ("14 01 61", "the string at byte 1 has no end"),
        ("01 61 00 ff", "the string at byte 0 has no end"),
        ("14 02 ff 00", "the text at byte 1 is not UTF-8: invalid start byte"),
        ("02 ed a0 80 00", "the text at byte 0 is not UTF-8"),
        ("14 05 05 00", "the nested tuple at byte 1 has no end"),
        ("05 00 ff", "the nested tuple at byte 0 has no end"),
        ("14 16 01", "the element at byte 1 ends after 1 of the 2 bytes"),
        ("0c", "the element at byte 0 ends after 0 of the 8 bytes"),
        ("1d", "the element at byte 0 ends after 0 of the 1 bytes"),
        ("1d 09 01", "the element at byte 0 ends after 1 of the 9 bytes"),
        ("0b f6 01", "the element at byte 0 ends after 1 of the 9 bytes"),
        ("20 00", "the element at byte 0 ends after 1 of the 4 bytes"),
        ("21 00", "the element at byte 0 ends after 1 of the 8 bytes"),
        ("30 00", "the element at byte 0 ends after 1 of the 16 bytes"),
        ("33 00", "the element at byte 0 ends after 1 of the 12 bytes"),
    ],
)
def test_malformed_bytes_are_refused_with_their_position(packed: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(bytes.fromhex(packed))


@given(st.binary() | st.lists(st.sampled_from(b"\0\1\2\5\x0b\x14\x15\x1d\x26\xff")).map(bytes))
@example(b"\x20\x00\x10\x00\x00")
def test_any_bytes_are_a_tuple_or_a_value_error(data: bytes) -> None:
    try:
        elements = unpack(data)
    except ValueError:
        return
    assert isinstance(elements, tuple)


def test_integers_with_more_bytes_than_they_need_are_read() -> None:
    assert unpack(bytes.fromhex("17 00 00 05 12 ff fe 1d 01 07 0b fe fe 1d 00")) == (5, -1, 7, -1, 0)


def test_text_where_bytes_are_needed_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="a packed tuple must be bytes, not str"):
        unpack("text")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a prefix must be bytes, not int"):
        pack((), 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a key must be bytes, not str"):
        Subspace().contains("text")  # type: ignore[arg-type]


# -- single floats and versionstamps


def test_a_single_float_is_rounded_when_it_is_made() -> None:
    assert SingleFloat(0.1).value == 0.10000000149011612
    assert unpack(pack((SingleFloat(0.1),))) == (SingleFloat(0.1),)
    with pytest.raises(ValueError, match=r"1e\+39 is too large for a float of 4 bytes"):
        SingleFloat(1e39)
    with pytest.raises(TypeError, match="a SingleFloat holds a number, not 'x'"):
        SingleFloat("x")  # type: ignore[arg-type]


def test_a_template_ends_with_the_offset_of_its_incomplete_stamp() -> None:
    template = pack_with_versionstamp(("a", (None, Versionstamp(user_version=7)), 1), b"prefix")
    assert template.hex(" ") == (
        "70 72 65 66 69 78 02 61 00 05 00 ff 33 ff ff ff ff ff ff ff ff ff ff 00 07 00 15 01 0d 00 00 00"
    )
    (offset,) = template[-4:-3]
    key = template[:offset] + STAMP + template[offset + 10 : -4]
    completed = Versionstamp(user_version=7).completed(STAMP)
    assert unpack(key, len(b"prefix")) == ("a", (None, completed), 1)
    assert key == pack(("a", (None, completed), 1), b"prefix")


def test_exactly_one_stamp_of_a_template_is_incomplete() -> None:
    with pytest.raises(ValueError, match="exactly one incomplete Versionstamp; the tuple has: none"):
        pack_with_versionstamp((1, Versionstamp(STAMP)))
    with pytest.raises(ValueError, match=r"the tuple has: element \[0\], element \[1\]\[0\]"):
        pack_with_versionstamp((Versionstamp(), (Versionstamp(),)))
    with pytest.raises(ValueError, match=r"element \[1\]\[0\] is an incomplete Versionstamp: use"):
        pack((1, (Versionstamp(),)))
    assert pack_with_versionstamp((Versionstamp(STAMP), Versionstamp()))[-4:].hex(" ") == "0e 00 00 00"


@given(stamps, stamps)
def test_versionstamps_sort_like_their_bytes_and_incomplete_ones_last(one: Versionstamp, other: Versionstamp) -> None:
    assert (one < other) == (bytes(one) < bytes(other))
    assert Versionstamp.from_bytes(bytes(one)) == one < Versionstamp()
    assert Versionstamp.from_bytes(bytes(Versionstamp(user_version=3))) == Versionstamp(user_version=3)


def test_versionstamps_that_cannot_be_are_refused() -> None:
    for transaction in (b"", bytes(9), bytes(11), b"\xff" * 10):
        with pytest.raises(ValueError, match="the transaction of a Versionstamp has 10 bytes"):
            Versionstamp(transaction)
    for user_version in (-1, 65536):
        with pytest.raises(ValueError, match=f"0 to 65535, not {user_version}"):
            Versionstamp(None, user_version)
    with pytest.raises(ValueError, match="12 bytes, not 10"):
        Versionstamp.from_bytes(STAMP)
    with pytest.raises(ValueError, match="is complete already"):
        Versionstamp(STAMP).completed(STAMP)
    with pytest.raises(TypeError, match="is bytes or None"):
        Versionstamp("text")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is an int"):
        Versionstamp(None, 1.0)  # type: ignore[arg-type]


# -- ranges and subspaces


@given(tuples, tuples)
def test_a_range_holds_exactly_the_longer_tuples(elements: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    begin, end = range_of(elements)
    assert not begin <= pack(elements) < end
    assert begin <= pack(elements + other) < end
    assert (begin <= pack(other) < end) == (len(other) > len(elements) and pack(other).startswith(pack(elements)))


@given(st.binary(max_size=4), tuples, tuples)
def test_a_subspace_packs_and_unpacks_what_follows_its_prefix(
    raw: bytes, prefix: tuple[Any, ...], elements: tuple[Any, ...]
) -> None:
    space = Subspace(prefix, raw)
    key = space.pack(elements)
    assert space.key() == space.pack() == raw + pack(prefix)
    assert key == raw + pack(prefix + elements)
    assert repr(space.unpack(key)) == repr(elements)
    assert space.contains(key)
    assert key in space
    begin, end = space.range()
    assert begin <= key < end
    assert space.range(elements) == range_of(prefix + elements, raw)


def test_subspaces_nest_and_are_equal_by_their_prefix() -> None:
    space = Subspace(("orders",))
    assert space["alice"][17] == space.subspace(("alice", 17)) == Subspace(("orders", "alice", 17))
    assert len({space["alice"], Subspace(("alice",), space.key())}) == 1
    assert space["alice"] != space["bob"]
    assert space != space.key()
    assert repr(Subspace((1,), b"x")) == r"Subspace(raw_prefix=b'x\x15\x01')"
    template = space["log"].pack_with_versionstamp((Versionstamp(),))
    assert template == pack_with_versionstamp(("orders", "log", Versionstamp()))


def test_keys_of_another_subspace_are_refused_and_errors_count_from_the_begin_of_the_key() -> None:
    space = Subspace(("orders",))
    other = Subspace(("order",)).pack((1,))
    assert other not in space
    with pytest.raises(ValueError, match=r"the key b'.*' is not of the subspace with the prefix b'.*orders"):
        space.unpack(other)
    with pytest.raises(ValueError, match="the byte ff at 8 is no type code"):
        space.unpack(space.key() + b"\xff")


def test_a_subspace_is_not_iterated() -> None:
    """Without this, Python would ask for its elements 0, 1, 2 … without end."""
    with pytest.raises(TypeError):
        iter(Subspace())

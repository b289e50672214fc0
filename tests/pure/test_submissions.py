"""The ids that clients make for their requests."""

from __future__ import annotations

import time
from uuid import RFC_4122, UUID

import pytest

from pgcoord_cli.core.kv.submissions import new_request_id


def test_a_request_id_is_a_uuid_of_version_7() -> None:
    for _ in range(1_000):
        request_id = UUID(bytes=new_request_id())
        assert (request_id.version, request_id.variant) == (7, RFC_4122)


def test_request_ids_differ_although_they_are_made_in_the_same_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_000_000)
    ids = {new_request_id() for _ in range(10_000)}
    assert len(ids) == 10_000
    assert {request_id[:6] for request_id in ids} == {(1_700_000_000_000).to_bytes(6, "big")}


@pytest.mark.parametrize("clock", [-1, 0, 2**80], ids=["before 1970", "1970", "far off"])
def test_i12_a_clock_that_is_wrong_spoils_no_request_id(monkeypatch: pytest.MonkeyPatch, clock: int) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: clock)
    assert UUID(bytes=new_request_id()).version == 7


def test_request_ids_of_one_time_lie_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    for millisecond in range(1_700_000_000_000, 1_700_000_000_100):
        monkeypatch.setattr(time, "time_ns", lambda now=millisecond * 1_000_000: now)
        ids.append(new_request_id())
    assert ids == sorted(ids)

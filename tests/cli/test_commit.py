"""`pgcoord commit`: pending requests, and the outcomes of settled ones."""

from __future__ import annotations

import csv
import io
import uuid
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from pgcoord_cli.core.commits.codec import Request, encode
from pgcoord_cli.core.commits.requests import Status

if TYPE_CHECKING:
    from tests.conftest import Call

KEYS = {
    "id", "request_id", "status", "commit_version", "read_version", "epoch", "reason", "created_at", "resolved_at",
}  # fmt: skip
COLUMNS = ["id", "request_id", "status", "commit_version", "read_version", "epoch", "created_at", "reason"]


@pytest.fixture
def offline(offline: Call) -> Call:
    """Runs `pgcoord commit …`."""
    return partial(offline, "commit")


def store(sql: psycopg.Connection[Any], status: str, reason: str | None = None) -> uuid.UUID:
    """Inserts a request; returns its request id."""
    request_id = uuid.uuid4()
    sql.execute(
        """
        INSERT INTO commit_requests
               (request_id, epoch, read_version, payload, status, reason, commit_version, resolved_at)
        SELECT %s, 1, 0, '', status, %s,
               CASE WHEN status = 'committed' THEN 7 END, CASE WHEN status <> 'pending' THEN clock_timestamp() END
          FROM (SELECT %s AS status) AS given
        """,
        [request_id, reason, status],
    )
    return request_id


def test_a_list_starts_with_the_newest_and_respects_the_limit(call: Call, sql: psycopg.Connection[Any]) -> None:
    ids = [str(store(sql, "pending")) for _ in range(25)]
    listed = call("list", "-o", "json").document
    assert [request["request_id"] for request in listed] == ids[:-21:-1]
    assert all(request.keys() == KEYS for request in listed)
    assert [request["request_id"] for request in call("list", "--limit", "2", "-o", "json").document] == ids[:-3:-1]
    assert len(call("list", "--limit", "2147483647", "-o", "jsonl").out.splitlines()) == 25


def test_a_list_can_be_filtered_by_status(call: Call, sql: psycopg.Connection[Any]) -> None:
    stored = {status: str(store(sql, status)) for status in Status}
    for status, request_id in stored.items():
        (found,) = call("list", "--status", status, "-o", "json").document
        assert (found["request_id"], found["status"]) == (request_id, status)
    assert len(call("list", "-o", "json").document) == len(Status)


def test_an_empty_list_is_a_success(call: Call) -> None:
    assert call("list") == (0, "", "no commit requests\n")
    assert call("list", "-q", "-o", "plain") == (0, "", "")
    assert call("list", "--status", "orphaned", "-o", "json") == (0, "[]\n", "")
    assert call("list", "-o", "csv").out == ",".join(COLUMNS) + "\n"


def test_a_request_is_shown_for_every_notation_of_its_id(call: Call, sql: psycopg.Connection[Any]) -> None:
    request_id = store(sql, "committed")
    shown = call("show", str(request_id), "-o", "json").document
    assert shown.keys() == KEYS
    assert (shown["request_id"], shown["status"], shown["commit_version"]) == (str(request_id), "committed", 7)
    for spelling in (str(request_id).upper(), request_id.hex, request_id.urn):
        assert call("show", spelling, "-o", "json").document == shown
    assert f"  request_id      {request_id}\n" in call("show", str(request_id)).out


def test_a_pending_request_is_a_success(call: Call, sql: psycopg.Connection[Any]) -> None:
    shown = call("show", str(store(sql, "pending")), "-o", "json")
    assert (shown.code, shown.document["commit_version"], shown.document["resolved_at"]) == (0, None, None)


def test_a_reason_is_complete_and_on_one_line(call: Call, sql: psycopg.Connection[Any]) -> None:
    reason = "not a payload:\n\x1b[31m" + "x" * 300
    request_id = str(store(sql, "rejected", reason))
    assert call("show", request_id, "-o", "json").document["reason"] == reason
    escaped = r"not a payload:\n\x1b[31m" + "x" * 300
    for words in (("list",), ("list", "-o", "plain"), ("list", "-o", "markdown"), ("show", request_id)):
        (line,) = [line for line in call(*words).out.splitlines() if "payload" in line]
        assert escaped in line
    (record,) = csv.DictReader(io.StringIO(call("list", "-o", "csv").out, newline=""))
    assert record["reason"] == reason.replace("\x1b", r"\x1b"), "the line feed is kept, within quotes"


def test_an_unknown_request_is_a_false_condition(call: Call) -> None:
    unknown = uuid.uuid4()
    shown = call("show", str(unknown), "-o", "json")
    assert (shown.code, shown.error["code"]) == (3, "condition_false")
    assert shown.error["message"] == f"there is no request {unknown}"
    assert call("show", str(unknown)).out == ""


def test_the_keys_with_the_most_conflicts_are_listed(call: Call, sql: psycopg.Connection[Any]) -> None:
    for key, minutes in ((b"older", 30), (b"hot", 0), (b"\xff", 0), (b"hot", 0)):
        sql.execute(
            "UPDATE commit_requests SET payload = %s, created_at = created_at - %s WHERE request_id = %s",
            [encode(Request((key,), (), (), ())), timedelta(minutes=minutes), store(sql, "conflict")],
        )
    listed = call("explain", "--hot", "-o", "json").document
    assert [(key["key"], key["conflicts"], key["encoding"]) for key in listed] == [
        ("hot", 2, "utf-8"), ("ff", 1, "hex"),
    ]  # fmt: skip
    listed = call("explain", "--hot", "--since", "1h", "--limit", "1", "-o", "json").document
    assert [key["key"] for key in listed] == ["hot"]
    assert len(call("explain", "--hot", "--since", "1h", "-o", "json").document) == 3
    assert call("explain", "--hot", "--since", "1ms") == (0, "", "no conflicts among 0 requests\n")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("explain",), "give either REQUEST_ID or --hot"),
        (("explain", str(uuid.uuid4()), "--hot"), "give either REQUEST_ID or --hot"),
        (("explain", "--hot", "--since", "soon"), "--since"),
        (("show", "1234"), "REQUEST_ID: '1234' is not a UUID"),
        (("show", ""), "REQUEST_ID: '' is not a UUID"),
        (("show", "\udcff"), r"REQUEST_ID: '\udcff' is not a UUID"),
        (("show",), "REQUEST_ID"),
        (("list", "--status", "done"), "--status: 'done' is not one of pending, committed"),
        (("list", "--status", ""), "--status: '' is not one of"),
        (("list", "--limit", "0"), "--limit"),
        (("list", "--limit", "2147483648"), "--limit: 2147483648 is too many"),
    ],
)
def test_an_invalid_argument_is_named_before_a_connection_is_opened(
    words: tuple[str, ...], named: str, offline: Call
) -> None:
    assert named in offline(*words, "-o", "json").refusal

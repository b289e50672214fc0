"""`pgcoord kv`: keys and values as text and as hexadecimal, with and without a leader."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from pgcoord_cli.core.commits.codec import MAX_KEY_BYTES, MAX_VALUE_BYTES
from tests.asking import until

if TYPE_CHECKING:
    from tests.conftest import Call, Cli, LeaderProcess, StartLeader

AWKWARD = 'two lines:\n\t"quoted", with | and é✓😀\u00a0\u200d'
"""Text that each format quotes differently."""


@pytest.fixture
def offline(offline: Call) -> Call:
    """Runs `pgcoord kv …`."""
    return partial(offline, "kv")


@pytest.fixture
def leader(start_leader: StartLeader) -> LeaderProcess:
    """An elected leader whose lease outlasts a test that freezes it."""
    started = start_leader("n1", "--ttl", "60s")
    started.wait_for("elected epoch 1")
    return started


def store(sql: psycopg.Connection[Any], entries: dict[bytes, bytes]) -> None:
    """Inserts data without a leader."""
    with sql.cursor() as cursor:
        cursor.executemany("INSERT INTO kv VALUES (%s, %s)", list(entries.items()))


def freeze(leader: LeaderProcess) -> None:
    """Stops the process by SIGSTOP; returns when it is stopped."""
    leader.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, leader.process.pid, os.WSTOPPED | os.WNOWAIT)


def queue(sql: psycopg.Connection[Any]) -> list[Any]:
    return sql.execute("SELECT request_id::text, status FROM commit_requests ORDER BY id").fetchall()


# Through the leader


@pytest.mark.usefixtures("leader")
def test_i5_writes_are_read_back_at_the_printed_versions(call: Call) -> None:
    assert call("set", "greeting", "hello", "-o", "json").document == {"key": "greeting", "version": 1}
    assert call("set", "00FF", "cafe", "--hex", "-o", "json").document == {"key": "00FF", "version": 2}
    assert call("set", "", "", "-o", "plain").out == "3\n"
    assert call("set", "greeting", AWKWARD, "-o", "plain").out == "4\n"
    assert call("get", "greeting", "-o", "json").document == {
        "key": "greeting", "value": AWKWARD, "version": 4, "encoding": "utf-8",
    }  # fmt: skip
    assert call("get", "00ff", "--hex", "-o", "json").document == {
        "key": "00ff", "value": "cafe", "version": 4, "encoding": "hex",
    }  # fmt: skip
    assert call("get", "", "-o", "json").document == {"key": "", "value": "", "version": 4, "encoding": "utf-8"}
    assert call("clear", "greeting", "-o", "json").document == {"key": "greeting", "version": 5}
    assert call("clear", "never there", "-o", "plain").out == "6\n"
    assert call("get", "greeting").code == 3
    assert [entry["key"] for entry in call("range", "-o", "json").document] == ["", "00ff"]


@pytest.mark.usefixtures("leader")
def test_i4_a_value_can_be_read_at_a_version_of_the_last_seconds(call: Call) -> None:
    versions = [call("set", "a", value, "-o", "json").document["version"] for value in ("first", "second")]
    for version, value in zip(versions, ("first", "second"), strict=True):
        document = call("get", "a", "--at", str(version), "-o", "json").document
        assert (document["value"], document["version"]) == (value, version)
    missing = call("get", "a", "--at", "0")
    assert (missing.code, missing.out) == (3, "")
    future = call("get", "a", "--at", str(versions[1] + 1))
    assert future.code == 1
    assert "has not been committed" in future.err


@pytest.mark.usefixtures("leader")
def test_the_longest_key_and_value_are_written_and_read_back(call: Call) -> None:
    key, value = "k" * MAX_KEY_BYTES, "v" * MAX_VALUE_BYTES
    assert call("set", key, value).code == 0
    assert call("get", key, "-o", "plain").out == value + "\n"


@pytest.mark.usefixtures("leader")
def test_values_written_through_a_shell_are_read_back_byte_for_byte(cli: Cli) -> None:
    assert cli("kv", "set", AWKWARD, AWKWARD).returncode == 0
    assert cli("kv", "get", AWKWARD, "-o", "plain").stdout == AWKWARD + "\n"


# Reading


def test_bytes_that_are_not_text_are_shown_as_hexadecimal(call: Call, sql: psycopg.Connection[Any]) -> None:
    store(sql, {b"\x00\xff": b"text", b"bell": b"\x07", b"latin": b"\xe9", b"plain": b"text", b"del": b"\x7f"})
    assert call("get", "00ff", "--hex", "-o", "json").document["value"] == b"text".hex()
    for key, shown in {"bell": "07", "latin": "e9", "del": "7f"}.items():
        found = call("get", key, "-o", "json").document
        assert (found["key"], found["value"], found["encoding"]) == (key.encode().hex(), shown, "hex")
    listed = call("range", "-o", "json").document
    assert {entry["key"]: entry["encoding"] for entry in listed} == {
        "00ff": "hex", b"bell".hex(): "hex", b"latin".hex(): "hex", b"del".hex(): "hex", "plain": "utf-8",
    }  # fmt: skip
    assert {entry["encoding"] for entry in call("range", "--hex", "-o", "json").document} == {"hex"}
    assert call("range", "plain", "-o", "plain").out == "plain\ttext\tutf-8\n"


def test_a_missing_key_is_a_false_condition_in_every_format(call: Call) -> None:
    found = call("get", "nokey", "-o", "json")
    assert (found.code, found.document["value"], found.document["version"]) == (3, None, 0)
    for output in ("table", "plain", "csv", "markdown"):
        assert call("get", "nokey", "-o", output) == (3, "", "error: there is no key 'nokey'\n")


def test_plain_prints_the_value_only(call: Call, sql: psycopg.Connection[Any]) -> None:
    store(sql, {b"text": b"  two words ", b"empty": b"", b"binary": b"\x00\x01", b"lines": b"a\nb\n"})
    assert call("get", "text", "-o", "plain").out == "  two words \n"
    assert call("get", "empty", "-o", "plain").out == "\n"
    assert call("get", "binary", "-o", "plain").out == "0001\n"
    assert call("get", "lines", "-o", "plain").out == "a\nb\n\n"
    assert call("get", b"lines".hex(), "--hex", "-o", "plain").out == b"a\nb\n".hex() + "\n"


def test_lines_tabs_quotes_and_unicode_are_kept_in_every_format(call: Call, sql: psycopg.Connection[Any]) -> None:
    store(sql, {b"a": AWKWARD.encode(), b"b": b"x" * 300})
    assert [entry["value"] for entry in call("range", "-o", "json").document] == [AWKWARD, "x" * 300]
    lines = call("range", "-o", "jsonl").out.splitlines()
    assert [json.loads(line)["value"] for line in lines] == [AWKWARD, "x" * 300]
    assert list(csv.reader(io.StringIO(call("range", "-o", "csv").out, newline=""))) == [
        ["key", "value", "encoding"], ["a", AWKWARD, "utf-8"], ["b", "x" * 300, "utf-8"],
    ]  # fmt: skip
    escaped = r'two lines:\n\t"quoted", with | and é✓😀\xa0\u200d'
    assert call("range", "-o", "plain").out.splitlines() == [f"a\t{escaped}\tutf-8", f"b\t{'x' * 300}\tutf-8"]
    table = call("range").out.splitlines()
    assert len(table) == 4
    assert escaped in table[2]
    assert "x" * 300 in table[3]
    markdown = call("range", "-o", "markdown").out.splitlines()
    assert len(markdown) == 4
    assert escaped.replace("|", r"\|") in markdown[2]
    assert f"  value     {escaped}\n" in call("get", "a").out


def test_a_range_is_half_open_ordered_and_limited(call: Call, sql: psycopg.Connection[Any]) -> None:
    store(sql, {key.encode(): b"" for key in ("a", "b", "ba", "c", "é")})

    def keys(*words: str) -> list[str]:
        return [entry["key"] for entry in call("range", *words, "-o", "json").document]

    assert keys() == ["a", "b", "ba", "c", "é"]
    assert keys("b") == ["b", "ba", "c", "é"]
    assert keys("b", "c") == ["b", "ba"]
    assert keys("", "b") == ["a"]
    assert keys("", "") == keys("c", "b") == keys("x", "y") == []
    assert keys("--limit", "2") == ["a", "b"]
    assert keys("--limit", "2", "--reverse") == ["é", "c"]
    assert keys("b", "c", "--reverse") == ["ba", "b"]
    assert keys("62", "6261", "--hex") == ["62"]


def test_an_empty_range_is_reported_on_stderr(call: Call) -> None:
    assert call("range") == (0, "", "no keys in this range at version 0\n")
    assert call("range", "-q") == (0, "", "")
    assert call("range", "-o", "csv").out == "key,value,encoding\n"
    assert call("range", "-o", "json").document == []


# Bad input


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("get", "0", "--hex"), "KEY"),
        (("get", "0g", "--hex"), "KEY"),
        (("set", "0", "00", "--hex"), "KEY"),
        (("set", "00", "000", "--hex"), "VALUE"),
        (("clear", "é", "--hex"), "KEY"),
        (("range", "xx", "--hex"), "BEGIN"),
        (("range", "00", "0", "--hex"), "END"),
        (("get", "\udcff"), "KEY"),
        (("set", "a", "\udcff"), "VALUE"),
        (("get", "\udcff", "--hex"), "KEY"),
        (("range", "a", "\udcff"), "END"),
        (("get", "k" * (MAX_KEY_BYTES + 1)), "KEY"),
        (("set", "é" * (MAX_KEY_BYTES // 2 + 1), "v"), "KEY"),
        (("set", "k", "v" * (MAX_VALUE_BYTES + 1)), "VALUE"),
        (("range", "--limit", "0"), "--limit"),
        (("range", "--limit", "-1"), "--limit"),
        (("range", "--limit", "ten"), "--limit"),
        (("range", "--limit", "9" * 30), "--limit"),
        (("set", "a", "b", "--timeout", "0"), "--timeout"),
        (("set", "a", "b", "--timeout", "soon"), "--timeout"),
        (("clear", "a", "--timeout", "25d"), "--timeout"),
        (("set", "a"), "VALUE"),
        (("get",), "KEY"),
    ],
)
def test_an_invalid_argument_is_named_before_a_connection_is_opened(
    words: tuple[str, ...], named: str, offline: Call
) -> None:
    assert named in offline(*words, "-o", "json").refusal


def test_arguments_that_are_not_utf_8_are_refused_and_shown_as_escapes(cli: Cli) -> None:
    refused = cli("kv", "get", "a\udcff", "-o", "json")  # the byte ff, as subprocess passes it
    assert (refused.returncode, json.loads(refused.stdout)["error"]["message"]) == (2, "KEY: not UTF-8 text")
    refused = cli("kv", "get", "a", "b\udcff", "-o", "json")
    assert refused.returncode == 2
    assert "(b\udcff)" in json.loads(refused.stdout)["error"]["message"]


# Without a leader


def test_nothing_is_enqueued_without_a_leader(call: Call, sql: psycopg.Connection[Any]) -> None:
    for words in (("set", "a", "b"), ("clear", "a")):
        refused = call(*words, "--timeout", "50ms", "-o", "json")
        assert (refused.code, refused.error["code"]) == (3, "no_leader")
        assert refused.error["hint"] == "start a leader with: pgcoord leader run"
    assert queue(sql) == []


def test_i3_a_commit_under_a_frozen_leader_is_unknown_and_can_be_queried(
    call: Call, cli: Cli, leader: LeaderProcess, sql: psycopg.Connection[Any]
) -> None:
    freeze(leader)
    unknown = call("add", "a", "1", "--timeout", "2s", "-o", "json")
    assert (unknown.code, unknown.error["code"]) == (10, "outcome_unknown")
    hint = re.fullmatch(r"ask again with: pgcoord (commit show (\S+))", unknown.error["hint"])
    assert hint
    assert queue(sql) == [(hint[2], "pending")]
    ask = (*hint[1].split(), "-o", "json")
    assert json.loads(cli(*ask).stdout)["status"] == "pending"
    leader.signal(signal.SIGCONT)
    # Before another commit, which would be a direct one while the leader has not looked at the queue yet.
    until(lambda: queue(sql) != [(hint[2], "pending")])
    assert call("set", "c", "d").code == 0
    answer = json.loads(cli(*ask).stdout)
    assert (answer["status"], answer["commit_version"]) == ("committed", 1)
    assert call("get", "a", "--integer", "-o", "plain").out == "1\n"

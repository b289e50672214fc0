"""`pgcoord kv txn`: comparisons and mutations that are made at once or not at all."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from pgcoord_cli.core.commits.codec import MAX_VALUE_BYTES, Op
from pgcoord_cli.core.kv.transaction_file import MUTATIONS

if TYPE_CHECKING:
    from tests.conftest import Answer, Call, LeaderProcess, StartLeader

Run = Callable[..., "Answer"]


@pytest.fixture
def leader(start_leader: StartLeader) -> LeaderProcess:
    """An elected leader whose lease outlasts the test."""
    started = start_leader("n1", "--ttl", "60s")
    started.wait_for("elected epoch 1")
    return started


@pytest.fixture
def offline(offline: Call) -> Call:
    """Runs `pgcoord kv …`; so does `call`, on the test's database."""
    return partial(offline, "kv")


def write(path: Path, lines: tuple[dict[str, Any] | str, ...]) -> str:
    """Writes lines, records as JSON; returns the name of the file."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def run(call: Call, tmp_path: Path) -> Run:
    """Runs a transaction of these lines, with JSON output."""
    return lambda *lines: call("txn", write(tmp_path / "txn.jsonl", lines), "-o", "json")


@pytest.fixture
def refuse(offline: Call, tmp_path: Path) -> Callable[..., str]:
    """Returns the message with which these lines are refused, without a server."""
    return lambda *lines: offline("txn", write(tmp_path / "txn.jsonl", lines), "-o", "json").refusal


def data(sql: psycopg.Connection[Any]) -> dict[bytes, bytes]:
    return dict(sql.execute("SELECT key, value FROM kv ORDER BY key").fetchall())


def store(sql: psycopg.Connection[Any], **entries: str) -> None:
    """Inserts data without a leader."""
    with sql.cursor() as cursor:
        cursor.executemany("INSERT INTO kv VALUES (%s, %s)", [(k.encode(), v.encode()) for k, v in entries.items()])


# Committing


@pytest.mark.usefixtures("leader")
def test_all_mutations_are_made_if_every_comparison_is_true(run: Run, sql: psycopg.Connection[Any]) -> None:
    store(sql, a="1", c="old", d1="", d2="", e="")
    done = run(
        {"compare": {"key": "a", "value": "1"}},
        {"compare": {"key": "b", "absent": True}},
        {"compare": {"key": "c", "exists": True}},
        "",
        {"set": {"key": "a", "value": "2"}},
        {"set": {"key": "00ff", "value": "cafe", "encoding": "hex"}},
        {"clear": {"key": "c"}},
        {"clear_range": {"prefix": "d"}},
        {"add": {"key": "n", "amount": 5}},
    )
    assert (done.code, done.document) == (0, {"committed": True, "version": 1, "failed": []})
    assert data(sql) == {b"a": b"2", b"\0\xff": b"\xca\xfe", b"e": b"", b"n": (5).to_bytes(8, "little")}


@pytest.mark.usefixtures("leader")
def test_nothing_is_written_if_a_comparison_is_false(run: Run, call: Call, sql: psycopg.Connection[Any]) -> None:
    store(sql, a="1", b="\x07")
    lines = (
        {"set": {"key": "a", "value": "2"}},
        {"compare": {"key": "a", "value": "1"}},
        {"compare": {"key": "b", "absent": True}},
        {"compare": {"key": "c", "value": ""}},
    )
    refused = run(*lines)
    assert refused.code == 3
    assert refused.document == {
        "committed": False,
        "version": 0,
        "failed": [
            {"line": 3, "key": "62", "value": "07", "encoding": "hex"},
            {"line": 4, "key": "c", "value": None, "encoding": "utf-8"},
        ],
    }
    assert refused.err == "error: line 3: the comparison of '62' is false\nhint: nothing was written\n"
    assert data(sql) == {b"a": b"1", b"b": b"\x07"}
    assert call("get", "a", "-o", "json").document["version"] == 0  # not even a version was taken


@pytest.mark.usefixtures("leader")
@pytest.mark.parametrize(
    ("op", "true_for"), [("=", "b"), ("!=", "ac"), ("<", "a"), ("<=", "ab"), (">", "c"), (">=", "bc")]
)
def test_a_value_is_compared_byte_by_byte(op: str, true_for: str, run: Run, sql: psycopg.Connection[Any]) -> None:
    store(sql, **{f"key {value}": value for value in "abc"})
    for value in "abc":
        compared = run({"compare": {"key": f"key {value}", "op": op, "value": "b"}})
        assert compared.document["committed"] is (value in true_for)
    # Whatever the op, an absent key has no value.
    assert run({"compare": {"key": "absent", "op": op, "value": "b"}}).code == 3


@pytest.mark.usefixtures("leader")
def test_every_mutation_of_the_client_can_be_written(run: Run, sql: psycopg.Connection[Any]) -> None:
    store(sql, **dict.fromkeys(MUTATIONS, "b"))
    stamp = bytes(10) + (0).to_bytes(4, "little")
    values: dict[str, dict[str, Any]] = {
        "clear_range": {"begin": "clear_range", "end": "clear_rangf"},
        "clear": {"key": "clear"},
        "compare_and_clear": {"key": "compare_and_clear", "value": "b"},
        "add": {"key": "add", "amount": -1},
        "max": {"key": "max", "value": "c"},
        "min": {"key": "min", "amount": 3},
        "set_versionstamped_key": {"key": stamp.hex(), "value": "00", "encoding": "hex"},
        "set_versionstamped_value": {"key": b"v".hex(), "value": stamp.hex(), "encoding": "hex"},
    }
    done = run(*({name: values.get(name, {"key": name, "value": "a"})} for name in MUTATIONS))
    assert (done.code, set(MUTATIONS)) == (0, {op.name.lower() for op in Op})
    version = done.document["version"].to_bytes(8, "big") + b"\0\0"
    untouched = {b"set_versionstamped_key": b"b", b"set_versionstamped_value": b"b"}
    assert data(sql) == untouched | {
        version: b"\0",
        b"v": version,
        b"set": b"a",
        b"append_if_fits": b"ba",
        b"add": (ord("b") - 1).to_bytes(8, "little"),
        b"max": b"c",
        b"min": (3).to_bytes(8, "little"),
        b"byte_max": b"b",
        b"byte_min": b"a",
        b"bit_and": bytes([ord("a") & ord("b")]),
        b"bit_or": b"c",
        b"bit_xor": b"\x03",
    }


@pytest.mark.usefixtures("leader")
def test_an_end_of_null_is_past_the_last_key(run: Run, sql: psycopg.Connection[Any]) -> None:
    store(sql, a="", b="", ÿ="")
    assert run({"clear_range": {"begin": "b", "end": None}}).code == 0
    assert data(sql) == {b"a": b""}


@pytest.mark.usefixtures("leader")
def test_a_transaction_is_read_from_stdin(
    call: Call, sql: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"set": {"key": "k", "value": "\xc3\xa9"}}')))
    assert call("txn", "-").code == 0
    assert data(sql) == {b"k": "é".encode()}


def test_a_transaction_typed_on_a_terminal_is_asked_for(offline: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    with os.fdopen(slave) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        os.write(master, b"no\n\x04")
        refused = offline("txn", "-")
    os.close(master)
    assert refused.code == 2
    assert refused.err.startswith("reading the transaction from the terminal; end it with Ctrl-D")
    assert "FILE: stdin, line 1: not JSON" in refused.err


def test_a_transaction_needs_a_leader(call: Call, tmp_path: Path, sql: psycopg.Connection[Any]) -> None:
    file = write(tmp_path / "txn.jsonl", ({"set": {"key": "a", "value": "b"}},))
    refused = call("txn", file, "--timeout", "50ms", "-o", "json")
    assert (refused.code, refused.error["code"]) == (3, "no_leader")
    assert sql.execute("SELECT count(*) FROM commit_requests").fetchone() == (0,)


@pytest.mark.usefixtures("leader")
def test_a_transaction_beyond_the_limit_is_refused_whole(run: Run, sql: psycopg.Connection[Any]) -> None:
    value = "v" * MAX_VALUE_BYTES
    refused = run(*({"set": {"key": f"{number}", "value": value}} for number in range(101)))
    assert "line 100: the transaction has more than 10000000 bytes up to here" in refused.refusal
    # Its parts fit, but not what the commit request has between them.
    refused = run(*({"set": {"key": "", "value": value}} for _ in range(100)))
    assert (refused.code, refused.error["code"]) == (1, "transaction_too_large")
    assert data(sql) == {}


# Malformed lines


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "not JSON: "),
        ('{"set": ' + "[" * 100_000, "not JSON: "),
        ("[]", "not a JSON object with one name"),
        ("{}", "not a JSON object with one name"),
        ({"set": {"key": "a", "value": "b"}, "clear": {"key": "c"}}, "not a JSON object with one name"),
        ('{"clear": {"key": "a"}, "clear": {"key": "b"}}', "a name occurs twice"),
        ({"get": {"key": "a"}}, "'get' is neither compare nor a mutation (set, clear, "),
        ({"set": "a"}, "'set' is not an object"),
        ({"set": {"key": "a"}}, "set has no 'value'"),
        ({"set": {"value": "a"}}, "set has no 'key'"),
        ({"set": {"key": "a", "value": 1}}, "'value' of set is not a string"),
        ({"set": {"key": "a", "value": "b", "ttl": 1}}, "set takes no 'ttl' here"),
        ({"set": {"key": "a", "amount": 1}}, "set has no 'value'"),
        ({"set": {"key": "0g", "value": "", "encoding": "hex"}}, "'key' of set is not hexadecimal"),
        ({"set": {"key": "a", "value": "", "encoding": "base1"}}, "the encoding 'base1' is neither utf-8 nor hex"),
        ('{"set": {"key": "\\ud800", "value": ""}}', "'key' of set is not UTF-8"),
        ({"set": {"key": "k" * 2601, "value": ""}}, "a key of 2601 bytes is longer than 2600"),
        ({"set": {"key": "k", "value": "v" * 100_001}}, "a value of 100001 bytes is longer than 100000"),
        ({"set": {"key": "k", "value": "v" * 1_000_001}}, "longer than 1000000 bytes"),
        ({"clear": {"key": "a", "value": "b"}}, "clear takes no 'value' here"),
        ({"clear_range": {"begin": "a"}}, "clear_range has no 'end'"),
        ({"clear_range": {"begin": "b", "end": "a"}}, "a range begins after its end"),
        ({"clear_range": {"prefix": "a", "end": "b"}}, "clear_range takes no 'end' here"),
        ({"add": {"key": "a", "amount": 1.5}}, "'amount' is not an integer of eight bytes"),
        ({"add": {"key": "a", "amount": True}}, "'amount' is not an integer of eight bytes"),
        ({"add": {"key": "a", "amount": 1 << 63}}, "'amount' is not an integer of eight bytes"),
        ({"add": {"key": "a", "amount": 1, "value": "a"}}, "add takes no 'value' here"),
        ({"max": {"key": "a", "amount": -1}}, "'amount' of max is negative"),
        ({"compare": {"key": "a"}}, "compare has no 'value', 'absent' or 'exists'"),
        ({"compare": {"key": "a", "absent": False}}, "'absent' of compare is not true"),
        ({"compare": {"key": "a", "absent": True, "value": "b"}}, "compare takes no 'value' here"),
        ({"compare": {"key": "a", "op": "~", "value": "b"}}, "the op '~' is not one of = != < <= > >="),
        ({"compare": {"key": "k" * 2601, "exists": True}}, "a key of 2601 bytes is longer than 2600"),
        ({"set_versionstamped_value": {"key": "a", "value": "b"}}, "there is no room for a versionstamp"),
    ],
)
def test_a_malformed_line_is_named_before_a_connection_is_opened(
    line: dict[str, Any] | str, reason: str, refuse: Callable[..., str]
) -> None:
    message = refuse({"set": {"key": "a", "value": "b"}}, "", line)
    assert ", line 3: " in message
    assert reason in message


def test_a_file_without_a_line_is_refused(offline: Call, refuse: Callable[..., str]) -> None:
    assert refuse("").endswith("has neither a comparison nor a mutation")
    refused = offline("txn", "/no/such", "-o", "json").refusal
    assert refused == "FILE: cannot read '/no/such': No such file or directory"

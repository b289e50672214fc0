"""`pgcoord kv`: values from standard input and files, raw output, and prefixes of keys."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from pgcoord_cli.core.commits.codec import MAX_VALUE_BYTES
from pgcoord_cli.core.kv.reading import prefix_range
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT
from tests.faults.program_process import environment

if TYPE_CHECKING:
    from tests.conftest import Call, LeaderProcess, StartLeader

BINARY = bytes(range(256)) + b"\r\n\n"
"""Every byte, and line ends that text mode would change."""

Kv = Callable[..., "subprocess.CompletedProcess[bytes]"]


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


@pytest.fixture
def kv(settings: Settings) -> Kv:
    """Runs `pgcoord kv …` in a process of its own, with bytes as standard input and output."""

    def run(*words: str, stdin: bytes | None = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "pgcoord_cli", "kv", *words],
            env=environment(settings.dsn), input=stdin, capture_output=True, timeout=TIMEOUT, check=False,
        )  # fmt: skip

    return run


def keys(sql: psycopg.Connection[Any]) -> list[bytes]:
    return [key for (key,) in sql.execute("SELECT key FROM kv ORDER BY key").fetchall()]


def store(sql: psycopg.Connection[Any], entries: dict[bytes, bytes]) -> None:
    """Inserts data without a leader."""
    with sql.cursor() as cursor:
        cursor.executemany("INSERT INTO kv VALUES (%s, %s)", list(entries.items()))


# Values


@pytest.mark.usefixtures("leader")
def test_a_value_from_stdin_or_a_file_is_kept_byte_for_byte(kv: Kv, tmp_path: Path) -> None:
    file = tmp_path / "value"
    file.write_bytes(BINARY)
    for words in (("stdin", "-"), ("file", "--value-file", str(file)), ("6865786b6579", "-", "--hex")):
        assert kv("set", *words, stdin=BINARY).returncode == 0
    for key in ("stdin", "file", "hexkey"):
        assert kv("get", key, "--raw", "-o", "json").stdout == BINARY
    assert kv("set", "empty", "-", stdin=b"").returncode == 0
    assert (kv("get", "empty", "--raw").returncode, kv("get", "empty", "--raw").stdout) == (0, b"")


@pytest.mark.usefixtures("leader")
def test_the_longest_value_is_taken_from_stdin_and_one_byte_more_is_refused(kv: Kv, tmp_path: Path) -> None:
    longest = b"\xff" * MAX_VALUE_BYTES
    assert kv("set", "k", "-", stdin=longest).returncode == 0
    assert kv("get", "k", "--raw").stdout == longest
    refused = kv("set", "k", "-", stdin=longest + b"\n")
    assert (refused.returncode, refused.stdout) == (2, b"")
    assert b"VALUE: standard input has more than 100000 bytes, the limit of a value" in refused.stderr
    (tmp_path / "long").write_bytes(longest + b"\n")
    refused = kv("set", "k", "--value-file", str(tmp_path / "long"))
    assert (refused.returncode, b"has more than 100000 bytes, the limit of a value" in refused.stderr) == (2, True)
    assert kv("get", "k", "--raw").stdout == longest


def test_an_endless_stdin_is_refused(offline: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/zero").open() as zeros:
        monkeypatch.setattr(sys, "stdin", zeros)
        assert "more than 100000 bytes" in offline("set", "k", "-", "-o", "json").refusal


def test_a_value_typed_on_a_terminal_is_asked_for(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    with os.fdopen(slave) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        os.write(master, b"hello\n\x04")
        refused = call("set", "k", "-", "--timeout", "50ms")
    os.close(master)
    assert refused.code == 3  # no leader
    assert "reading the value from the terminal; end it with Ctrl-D" in refused.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("set", "k"), "VALUE"),
        (("set", "k", "v", "--value-file", "f"), "VALUE and --value-file exclude each other"),
        (("set", "k", "--value-file", "/no/such"), "--value-file: cannot read '/no/such': No such file or directory"),
        (("set", "k", "--value-file", "/"), "--value-file: cannot read '/': Is a directory"),
        (("get", "k", "--raw", "--integer"), "--raw and --integer exclude each other"),
        (("clear",), "give either KEY or --prefix"),
        (("clear", "k", "--prefix", "p"), "give either KEY or --prefix"),
        (("range", "a", "--prefix", "p"), "--prefix and BEGIN or END exclude each other"),
        (("export", "a", "--prefix", "p"), "--prefix and BEGIN or END exclude each other"),
        (("range", "--prefix", "0g", "--hex"), "--prefix: '0g' is not hexadecimal"),
    ],
)
def test_what_does_not_go_together_is_refused(words: tuple[str, ...], named: str, offline: Call) -> None:
    assert named in offline(*words, "-o", "json").refusal


def test_raw_output_of_an_absent_key_is_empty(kv: Kv) -> None:
    absent = kv("get", "nokey", "--raw", "-o", "json")
    assert (absent.returncode, absent.stdout) == (3, b"")
    assert b"there is no key 'nokey'" in absent.stderr


# Prefixes


@pytest.mark.parametrize(
    ("prefix", "end"),
    [(b"a", b"b"), (b"", None), (b"\xff", None), (b"a\xff\xff", b"b"), (b"\xff\xff", None), (b"a\x00", b"a\x01")],
)
def test_the_range_of_a_prefix_ends_behind_it(prefix: bytes, end: bytes | None) -> None:
    assert prefix_range(prefix) == (prefix, end)


def test_a_range_with_a_prefix_has_its_keys_only(call: Call, sql: psycopg.Connection[Any]) -> None:
    store(sql, dict.fromkeys([b"a", b"a\xff", b"a\xff\xff\x01", b"b", b"\xfe", b"\xff", b"\xff\xffz"], b""))

    def found(prefix: bytes, *words: str) -> list[str]:
        answer = call(words[0] if words else "range", "--prefix", prefix.hex(), "--hex", "-o", "jsonl")
        return [line.split('"')[3] for line in answer.out.splitlines()]

    assert found(b"a") == ["61", "61ff", "61ffff01"]
    assert found(b"a\xff") == ["61ff", "61ffff01"]
    assert found(b"\xff") == ["ff", "ffff7a"]
    assert found(b"") == ["61", "61ff", "61ffff01", "62", "fe", "ff", "ffff7a"]
    assert found(b"a", "export") == ["61", "61ff", "61ffff01"]
    assert call("range", "--prefix", "b", "-o", "plain").out.startswith("b\t")


@pytest.mark.usefixtures("leader")
def test_a_prefix_is_cleared_at_once(call: Call, sql: psycopg.Connection[Any]) -> None:
    store(sql, dict.fromkeys([b"a", b"a\xff\xff", b"b", b"\xff", b"\xff\xff"], b""))
    assert call("clear", "--prefix", "a", "--yes", "-o", "json").document == {"prefix": "a", "version": 1}
    assert keys(sql) == [b"b", b"\xff", b"\xff\xff"]
    assert call("clear", "--prefix", "ff", "--hex", "-y").code == 0
    assert keys(sql) == [b"b"]


def test_clearing_a_prefix_needs_a_confirmation(sql: psycopg.Connection[Any], kv: Kv) -> None:
    store(sql, {b"a": b""})
    refused = kv("clear", "--prefix", "", "-o", "json")
    assert refused.returncode == 2
    assert b"kv clear --prefix clears all keys, and standard input is no terminal" in refused.stdout
    assert keys(sql) == [b"a"]


@pytest.mark.usefixtures("leader")
@pytest.mark.parametrize(("answer", "code", "left"), [(b"y\n", 0, []), (b"n\n", 1, [b"a"]), (b"\x04", 130, [b"a"])])
def test_the_confirmation_is_asked_on_the_terminal(
    answer: bytes, code: int, left: list[bytes], call: Call, sql: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    store(sql, {b"a": b""})
    master, slave = os.openpty()
    with os.fdopen(slave) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        os.write(master, answer)
        asked = call("clear", "--prefix", "a", "-o", "plain")
    os.close(master)
    assert (asked.code, keys(sql)) == (code, left), asked.err
    assert "Clear all keys that begin with 'a'? [y/N] " in asked.err

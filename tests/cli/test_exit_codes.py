"""Every call ends with the documented exit code, and under `-o json` with one JSON document, also on failure."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from pgcoord_cli import errors
from pgcoord_cli.commands.framework import EXIT_CODES
from pgcoord_cli.errors import PgcoordError
from pgcoord_cli.settings import Settings
from tests.cli.command_tree import NAMES

if TYPE_CHECKING:
    from tests.conftest import Answer, Call, Cli, StartLeader

REQUEST_ID = str(uuid.uuid4())

ARGUMENTS = {
    "kv get": ("key",), "kv set": ("key", "value"), "kv clear": ("key",), "kv clear-range": ("x", "y"),
    "kv add": ("counter", "1"), "kv load": ("/dev/null",), "kv txn": ("docs/transaction.jsonl",),
    "kv watch": ("key", "--max", "1"), "leader assert": ("--epoch", "1"),
    "tail lease": ("--no-follow",), "tail completion": ("--no-follow",),
    "flow create": ("docs/flow.yaml",), "flow show": (REQUEST_ID,), "flow cancel": (REQUEST_ID,),
    "execution renew": (REQUEST_ID, "--epoch", "1"), "execution complete": (REQUEST_ID, "--epoch", "1"),
    "execution fail": (REQUEST_ID, "--epoch", "1"), "execution revoke": (REQUEST_ID,),
    "execution show": (REQUEST_ID,), "worker run": ("--once",), "lock run": ("name", "true"), "lock who": ("name",),
    "lock break": ("name", "--yes"), "subscription show": ("name",), "subscription set": ("name", "1"),
    "subscription reset": ("name", "--force"),
    "commit show": (REQUEST_ID,), "commit explain": (REQUEST_ID,),
    "migrate grant": ("--reader", "postgres", "--dry-run"), "dev up": ("--server-version", "9"),
}  # fmt: skip
"""The required arguments of each command. A new command needs a line here only if it has some."""

STREAMS = {"demo", "leader run", "kv export"}
"""Commands that print a stream of records."""

LEFT_OUT = {"bench", "leader step-down", "tail lease", "tail completion", "worker run", "lock run"}
"""Commands that take long, end the leader that later calls need, or print nothing."""

LOGS_ITS_ERROR = {"tail lease", "tail completion", "worker run", "lock run", "kv watch"}
"""Daemons: their stderr is a log, which may be kept elsewhere than stdout."""

TAKES_ANY_WORDS = {"worker run", "lock run", "kv watch"}

NEED_NO_SERVER = {"migrate sql", "dev up", "dev down", "dev dsn", "dev status"}

CODES = {
    "dev up": 1, "dev dsn": 3, "dev status": 3, "flow show": 3, "flow cancel": 3, "execution show": 3,
    "execution revoke": 3, "execution renew": 3, "execution complete": 3, "execution fail": 3,
    "lock who": 3, "lock break": 3, "subscription show": 3, "subscription set": 3, "subscription reset": 3,
    "kv txn": 3,
}  # fmt: skip
"""Exit codes of the calls on a database with a leader, where they are not 0."""

LEADER_KEYS = {"held", "leader_addr", "epoch", "durable_version", "expires_at", "expires_in_seconds"}
QUEUE_KEYS = {"pending", "oldest_pending_seconds"}


@pytest.fixture
def offline(offline: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """The same, with a directory of the test for `pgcoord dev`."""
    monkeypatch.setenv("PGCOORD_DEV_DIR", str(tmp_path))
    return offline


CALLS = {name: (*name.split(), *ARGUMENTS.get(name, ())) for name in NAMES if name not in STREAMS}


# Success


def test_every_command_prints_one_document(call: Call, sql: psycopg.Connection[Any], start_leader: StartLeader) -> None:
    start_leader("n1").wait_for("elected epoch 1")
    assert call("kv", "set", "key", "value").code == 0
    sql.execute("UPDATE commit_requests SET request_id = %s", [REQUEST_ID])
    for name in [name for name in CALLS if name not in LEFT_OUT]:
        answer = call(*CALLS[name], "-o", "json")
        assert (name, answer.code) == (name, CODES.get(name, 0)), answer.out
        assert isinstance(answer.document, list | dict), name
        assert "Traceback" not in answer.err


# Failure


def assert_refused(answer: Answer, name: str, exit_code: int, code: str) -> None:
    error = answer.document["error"]
    assert error.keys() == {"code", "message", "hint"}, name
    assert (name, answer.code, error["code"]) == (name, exit_code, code)
    assert error["message"], name
    logged = [line for line in answer.err.splitlines() if "ERROR [pgcoord]" in line]
    assert len(logged) == (name in LOGS_ITS_ERROR and code != "usage") == len(answer.err.splitlines()), name


def test_every_command_refuses_a_wrong_call_in_one_document(offline: Call) -> None:
    for name, words in CALLS.items():
        many = () if name in TAKES_ANY_WORDS else (("too", "many", "of", "them"),)
        for wrong in (("--no-such-option",), ("--color", "purple"), ("--schema", 'a"b'), *many):
            assert_refused(offline(*words, *wrong, "-o", "json"), name, 2, "usage")
    for words in ((), ("kv",), ("no-such-command",), ("kv", "no-such-command"), ("--no-such-option",)):
        assert_refused(offline(*words, "-o", "json"), " ".join(words), 2, "usage")


def test_every_command_reports_an_unreachable_server_in_one_document(offline: Call) -> None:
    for name, words in CALLS.items():
        if name not in NEED_NO_SERVER:
            refused = offline(*words, "-o", "json", "--dsn", "host=/nowhere")
            assert_refused(refused, name, 4, "cannot_connect")


def test_an_error_of_the_parser_is_json_for_every_way_to_request_json(
    offline: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (
        ("-o", "json"), ("-ojson",), ("--output", "json"), ("--output=json",), ("-qo", "json"), ("-qvojson",),
        ("-o", "jsonl"), ("-o", "csv", "-o", "json"),
    ):  # fmt: skip
        for line in ((*words, "kv", "--wrong"), ("kv", *words, "get", "--wrong"), ("kv", "get", "--wrong", *words)):
            assert_refused(offline(*line), " ".join(line), 2, "usage")
    for line in (("kv", "--wrong", "-o", "json", "-o", "csv"), ("kv", "--wrong", "--", "-o", "json")):
        assert offline(*line).out == ""
    monkeypatch.setenv("PGCOORD_OUTPUT", "json")
    for line in ((), ("kv",), ("kv", "get", "--wrong")):
        assert_refused(offline(*line), " ".join(line), 2, "usage")


def test_a_call_without_a_command_prints_help_to_stderr(offline: Call) -> None:
    for words in ((), ("kv",), ("leader",)):
        helped = offline(*words)
        assert (helped.code, helped.out) == (2, "")
        assert helped.err.startswith("Usage: pgcoord")


# The status of the leader, as a runbook queries it


def test_the_status_is_one_document_in_every_state(
    cli: Cli, settings: Settings, empty_settings: Settings, start_leader: StartLeader
) -> None:
    def status(*words: str, on: Settings = settings) -> tuple[int, Any]:
        done = cli("leader", "status", "-o", "json", *words, settings=on)
        return done.returncode, json.loads(done.stdout)

    code, document = status()
    assert code == 3
    assert_status(document, held=False)
    code, document = status(on=empty_settings)
    assert (code, document["error"]["code"]) == (7, "schema_missing")
    code, document = status("--dsn", "host=/nowhere")
    assert (code, document["error"]["code"]) == (4, "cannot_connect")
    start_leader("n1").wait_for("elected epoch 1")
    code, document = status()
    assert code == 0
    assert_status(document, held=True)
    assert (document["leader"]["leader_addr"], document["leader"]["epoch"]) == ("n1", 1)
    assert 0 < document["leader"]["expires_in_seconds"] <= 10


def assert_status(document: Any, *, held: bool) -> None:
    assert document.keys() >= {"leader", "queue"}
    assert document["leader"].keys() >= LEADER_KEYS
    assert document["queue"].keys() >= QUEUE_KEYS
    assert document["leader"]["held"] is held
    assert document["queue"] == {"pending": 0, "oldest_pending_seconds": None}


# The table of codes


def subclasses(kind: type[PgcoordError]) -> Iterator[type[PgcoordError]]:
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from subclasses(child)


def test_the_hierarchy_in_the_docstring_is_that_of_the_classes() -> None:
    drawn = dict(re.findall(r"^ *[│├└─ ]*(\w+) +(\d*)", (errors.__doc__ or "").split("`code`")[0], re.MULTILINE))
    for kind in subclasses(PgcoordError):
        assert kind.__name__ in drawn
        if number := drawn[kind.__name__]:
            assert (kind.__name__, int(number)) == (kind.__name__, kind.exit_code)
        else:
            assert kind.__base__ is not None
            assert kind.exit_code == getattr(kind.__base__, "exit_code", None)


def test_every_exit_code_is_in_the_manual() -> None:
    told = {*EXIT_CODES, 143}
    assert {kind.exit_code for kind in subclasses(PgcoordError)} | {0} == told


def test_every_error_class_has_its_own_code() -> None:
    words = [kind.__dict__["code"] for kind in subclasses(PgcoordError) if "code" in kind.__dict__]
    assert len(words) == len(set(words))
    assert all(re.fullmatch(r"[a-z_]+", word) for word in words)

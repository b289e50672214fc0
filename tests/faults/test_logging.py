"""What daemons log while their server is stopped, and the form of each line on stderr."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import pytest

from pgcoord_cli.core.embedded.server import EmbeddedServer
from pgcoord_cli.settings import Settings

if TYPE_CHECKING:
    from tests.conftest import Cli, StartLeader

ATTEMPTS = 3
"""Failures that a test waits for before it starts the server again: the lost connection and two attempts at another."""

WAITING = "west-1: candidate: waiting for the leader lock"


class Line(NamedTuple):
    """What every line has, in either format."""

    level: str
    component: str
    message: str


def in_text(line: str) -> Line:
    match = re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ([A-Z]+) \[([a-z]+)\] (.+)\n", line)
    assert match, line
    return Line(*match.groups())


def in_json(line: str) -> Line:
    document = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", document["time"])
    return Line(document["level"], document["component"], document["message"])


@pytest.mark.parametrize(("log_format", "parsed"), [("text", in_text), ("json", in_json)])
def test_i17_an_outage_is_a_few_lines_and_one_at_its_end_with_the_count(
    log_format: str, parsed: Callable[[str], Line],
    own_settings: Settings, own_server: EmbeddedServer, start_leader: StartLeader,
) -> None:  # fmt: skip
    # At DEBUG every attempt is a line, so that the test can tell how many there were.
    leader = start_leader("west-1", "-v", "--log-format", log_format, settings=own_settings)
    leader.wait_for("west-1: elected epoch 1")
    own_server.stop("immediate")
    leader.wait_for(f"(attempt {ATTEMPTS})")
    own_server.start()
    again = parsed(leader.wait_for("leader lock again"))
    leader.wait_for("west-1: elected epoch 2")

    found = re.fullmatch(rf"{WAITING} again, after (\d+) attempts over [0-9.]+s", again.message)
    assert found and int(found[1]) >= ATTEMPTS
    lines = [parsed(line) for line in leader.written]
    assert [line.message for line in lines if (line.level, line.component) == ("INFO", "candidate")] == [
        WAITING,
        "west-1: elected epoch 1: durable version 0",
        again.message,
        "west-1: elected epoch 2: durable version 0",
    ]
    # The connection that was lost, and each reason why there was no other: stopping, absent, starting.
    warnings = [line.message for line in lines if line.level == "WARNING"]
    assert len(warnings) == len(set(warnings)) <= 5
    assert {line.level for line in lines} <= {"DEBUG", "INFO", "WARNING"}


def test_the_fields_of_an_event_are_keys_in_json(settings: Settings, start_leader: StartLeader) -> None:
    line = json.loads(start_leader("west-1", "--log-format", "json").wait_for("elected epoch 1"))
    assert {name: line[name] for name in ("event", "node", "epoch")} == {
        "event": "elected", "node": "west-1", "epoch": 1,
    }  # fmt: skip


@pytest.mark.parametrize(("log_format", "parsed"), [("text", in_text), ("json", in_json)])
def test_the_error_that_ends_a_daemon_has_the_form_too(
    log_format: str, parsed: Callable[[str], Line], cli: Cli, empty_settings: Settings
) -> None:
    ended = cli("leader", "run", "--log-format", log_format, "-o", "json", settings=empty_settings)
    line = parsed(ended.stderr)
    assert (ended.returncode, line.level, line.component) == (7, "ERROR", "pgcoord")
    assert line.message.endswith("; create it with: pgcoord migrate up")
    assert json.loads(ended.stdout)["error"]["code"] == "schema_missing"

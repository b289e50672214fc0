"""What daemons log while their server is stopped, and the form of each line on stderr."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import psycopg
import pytest

from pgcoord_cli.core.concurrency.outage import MAX_REASONS
from pgcoord_cli.core.embedded.server import EmbeddedServer
from pgcoord_cli.settings import Settings
from tests.asking import until, value
from tests.faults.program_process import ProgramProcess, starter

if TYPE_CHECKING:
    from tests.conftest import Cli, StartLeader

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
    repeated = attempt_in(leader.wait_for("(attempt "))
    own_server.start()
    again = parsed(leader.wait_for("leader lock again"))
    leader.wait_for("west-1: elected epoch 2")

    found = re.fullmatch(rf"{WAITING} again, after (\d+) attempts over [0-9.]+s", again.message)
    assert found and int(found[1]) >= repeated >= 2
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


SLOTS = 4
SESSIONS = """SELECT count(*) FROM pg_stat_activity
               WHERE datname = current_database() AND (application_name, state) = ('pgcoord/worker', 'idle')"""


def test_i17_slots_that_lose_the_server_together_log_that_once(
    own_settings: Settings, own_server: EmbeddedServer
) -> None:
    with starter(ProgramProcess, ["worker", "run"], lambda: own_settings) as start:
        worker = start("-v", "--concurrency", str(SLOTS))
        with psycopg.connect(own_settings.dsn, autocommit=True) as sql:
            until(lambda: value(sql, SESSIONS) == SLOTS)
        own_server.stop("immediate")
        # More failures than slots: each has lost its session, and some have tried to connect.
        lines = read_until(worker, lambda line: attempt_in(line) > SLOTS)
        own_server.start()
        lines += read_until(worker, lambda line: "[worker] working again" in line)
        assert worker.end(signal.SIGTERM)[0] == 0
    found = re.fullmatch(r"working again, after (\d+) attempts over [0-9.]+s", lines[-1].message)
    assert found and int(found[1]) > SLOTS
    loud = [line for line in lines if line.component == "worker" and line.level != "DEBUG"]
    assert [line.message for line in loud if line.level == "INFO"] == [lines[-1].message]
    warnings = [line.message for line in loud if line.level == "WARNING"]
    assert 1 <= len(warnings) == len(set(warnings)) <= MAX_REASONS


def attempt_in(line: str) -> int:
    """Returns the number of the attempt that a line at DEBUG repeats the reason of; 0 for any other line."""
    match = re.search(r"\(attempt (\d+)\)", line)
    return int(match[1]) if match else 0


def read_until(process: ProgramProcess, is_last: Callable[[str], bool]) -> list[Line]:
    """Returns the lines on stderr up to the next one that `is_last`."""
    lines = []
    for line in iter(process.stderr.next, None):
        lines.append(in_text(line))
        if is_last(line):
            return lines
    raise AssertionError(f"the process ended after {lines}")


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

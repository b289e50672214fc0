"""No command writes a control or bidirectional character of a text that another user has chosen, except in JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.cli.command_tree import NAMES

if TYPE_CHECKING:
    from pgcoord_cli.settings import Settings
    from tests.conftest import Call

UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]",
)

OWN_STYLE = re.compile(r"\x1b\[(?:0|1|2|31|32|33)m")

BAD = "a\x1b[31mRED\x1b[0m\x07b\x9b2Jc\u202ed\re\u2066\u061c\u200f\u2028f\x7f"
"""Without a line feed and without a NUL, so that it can be a name, a word of a command line and a file name."""

FLOW, UPSTREAM, DOWNSTREAM, REQUEST = (f"00000000-0000-0000-0000-0000000000{end}" for end in ("f1", "e1", "e2", "c1"))
FORMATS = ("table", "plain", "csv", "markdown")

ROWS = (
    "INSERT INTO subscriptions (subscription_name, outbox, fence, last_position)"
    " VALUES (%(bad)s || E'\\n', 'completion_events', 1, 0)",
    "INSERT INTO completion_events (execution_id, outcome, namespace, instance_tag)"
    " VALUES (%(up)s, %(bad)s, %(bad)s, %(bad)s)",
    "INSERT INTO lease_events (execution_id, event_type, lease_id, namespace, instance_tag)"
    " VALUES (%(bad)s, %(bad)s, %(bad)s, %(bad)s, %(bad)s)",
    "INSERT INTO flows (flow_id, namespace, instance_tag) VALUES (%(flow)s, %(bad)s, %(bad)s)",
    "INSERT INTO executions (execution_id, flow_id, name, state, command, reason, ended_at)"
    " VALUES (%(up)s, %(flow)s, %(bad)s, 'failed', ARRAY[%(bad)s], %(bad)s, now())",
    "INSERT INTO executions (execution_id, flow_id, name, state)"
    " VALUES (%(down)s, %(flow)s, 'y' || %(bad)s, 'blocked')",
    "INSERT INTO executions (execution_id, flow_id, name, state, namespace, instance_tag, command)"
    " VALUES (gen_random_uuid(), %(flow)s, 'z' || %(bad)s, 'eligible', %(bad)s, %(bad)s,"
    " ARRAY['/nonexistent' || %(bad)s])",
    "INSERT INTO edge_groups (downstream_id, flow_id, policy, required, running_count)"
    ' VALUES (%(down)s, %(flow)s, \'{"kind": "all_of"}\', 1, 1)',
    "INSERT INTO edges (flow_id, upstream_id, downstream_id) VALUES (%(flow)s, %(up)s, %(down)s)",
    "INSERT INTO dispatch_failures (event_id, last_error, retry_at, quarantined_at)"
    " SELECT event_id, %(bad)s, now(), now() FROM completion_events",
    "INSERT INTO commit_requests (request_id, epoch, read_version, payload, status, reason, resolved_at)"
    " VALUES (%(request)s, 0, 0, '', 'rejected', %(bad)s, clock_timestamp())",
    "INSERT INTO kv VALUES (convert_to(%(bad)s, 'UTF8'), convert_to(%(bad)s, 'UTF8')),"
    " ('c1', convert_to(%(c1)s, 'UTF8'))",
    "UPDATE leader_lease SET epoch = 1, term_id = gen_random_uuid(), leader_addr = %(bad)s,"
    " acquired_at = clock_timestamp(), renewed_at = clock_timestamp(),"
    " expires_at = clock_timestamp() + interval '1 hour'",
    "INSERT INTO lock_names VALUES (777, %(bad)s)",
)


@pytest.fixture
def hostile(sql: psycopg.Connection[Any], settings: Settings) -> Iterator[None]:
    """Rows with hostile texts in every column that another user can fill, and a session that holds a lock."""
    values = {"bad": BAD, "flow": FLOW, "up": UPSTREAM, "down": DOWNSTREAM, "request": REQUEST, "c1": "\x9b\u202e"}
    for row in ROWS:
        sql.execute(row, values)
    name = make_conninfo(settings.dsn, application_name="app\x1b[31m")
    with psycopg.connect(name, autocommit=True) as holder:
        holder.execute("SELECT pg_advisory_lock(777)")
        yield


SHOWN: dict[str, list[tuple[str, ...]]] = {
    "migrate up": [("--schema", BAD), ("--to", BAD)],
    "migrate status": [(), ("--schema", BAD)],
    "migrate sql": [("--to", BAD)],
    "migrate verify": [(), ("--schema", BAD)],
    "migrate grant": [("--reader", BAD)],
    "leader run": [("--ttl", BAD), ("--with", BAD)],
    "leader status": [(), ("--schema", BAD), ("--dsn", f"host={BAD}"), (f"--{BAD}",)],
    "leader wait": [("--timeout", BAD)],
    "leader step-down": [(BAD,), ()],
    "leader history": [(), ("--limit", BAD)],
    "leader assert": [("--epoch", "7"), ("--epoch", BAD)],
    "kv get": [(BAD,), ("c1",), (f"no{BAD}",)],
    "kv set": [("k", BAD, "--hex"), ("k", "v", "--timeout", BAD)],
    "kv clear": [("k", "--timeout", BAD)],
    "kv clear-range": [(BAD, "--hex"), ("a", "b", "--timeout", BAD)],
    "kv add": [("k", BAD)],
    "kv load": [(f"/nonexistent/{BAD}",)],
    "kv txn": [(f"/nonexistent/{BAD}",)],
    "kv watch": [(BAD, "--max", "1"), ("c1", "--max", "1"), (BAD, "--hex")],
    "kv export": [(BAD, "--hex")],
    "kv range": [(), (BAD, "--hex")],
    "commit list": [(), ("--status", BAD)],
    "commit show": [(REQUEST,), (BAD,)],
    "commit explain": [(REQUEST,), (BAD,)],
    "flow create": [(f"/nonexistent/{BAD}",)],
    "flow show": [(FLOW,), (BAD,), *((FLOW, "--format", drawing) for drawing in ("tree", "mermaid", "dot"))],
    "flow list": [(), ("--state", BAD)],
    "flow cancel": [(BAD,), (FLOW, "--reason", BAD)],
    "execution claim": [("--owner", BAD), ("--lease", BAD)],
    "execution renew": [(BAD, "--epoch", "1"), (UPSTREAM, "--epoch", BAD)],
    "execution complete": [(BAD, "--epoch", "1"), (UPSTREAM, "--epoch", "1")],
    "execution fail": [(BAD, "--epoch", "1"), (UPSTREAM, "--epoch", "1", "--reason", BAD)],
    "execution revoke": [(BAD,), (DOWNSTREAM, "--reason", BAD)],
    "execution show": [(UPSTREAM,), (DOWNSTREAM,), (BAD,)],
    "worker run": [("--once", "--owner", BAD), ("--lease", BAD)],
    "reconcile": [("--list-quarantined",), ("--once",), ("--interval", BAD)],
    "tail lease": [
        ("--from-start", "--no-follow"), ("--from-start", "--no-follow", "--color", "always"),
        ("--no-follow", "--cursor-file", f"/nonexistent/{BAD}"), ("--from", BAD), ("--event-type", BAD, "--no-follow"),
        ("--no-follow", "--subscription", f"{BAD}\n"),
    ],
    "tail completion": [("--from-start", "--no-follow"), ("--subscription", BAD, "--no-follow"), ("--since", BAD)],
    "lock run": [(BAD, "--", f"/nonexistent/{BAD}"), (BAD * 200, "--", "true")],
    "lock list": [()],
    "lock who": [(BAD,), ("another",)],
    "lock break": [(BAD,), (BAD, "--yes")],
    "subscription list": [()],
    "subscription show": [(f"{BAD}\n",), (BAD,)],
    "subscription set": [(f"{BAD}\n", BAD), (BAD, "020000000000000000")],
    "subscription reset": [(BAD, "--force"), (f"{BAD}\n",)],
    "gc commit-requests": [("--dry-run",), ("--older-than", BAD)],
    "gc lease-events": [("--dry-run",), ("--batch-size", BAD)],
    "gc completion-events": [("--dry-run",), ("--max-runtime", BAD)],
    "gc all": [("--dry-run",), ("--older-than", BAD)],
    "dev up": [("--name", f"../{BAD}"), ("--server-version", BAD)],
    "dev down": [("--name", f"../{BAD}"), ()],
    "dev dsn": [("--name", f"../{BAD}"), ()],
    "dev status": [("--name", f"../{BAD}"), ()],
    "bench": [("--duration", BAD)],
    "demo": [(BAD,)],
}  # fmt: skip
"""Calls of every command that show stored texts, or that refuse a hostile word of the command line."""


def test_every_command_has_calls() -> None:
    assert set(SHOWN) == set(NAMES)


def unsafe(text: str, *, coloured: bool = False) -> list[str]:
    """Returns the unsafe characters of a text; if it is coloured, without the sequences of our own styles."""
    return UNSAFE.findall(OWN_STYLE.sub("", text) if coloured else text)


@pytest.mark.usefixtures("hostile")
@pytest.mark.parametrize("name", SHOWN)
def test_no_command_writes_an_unsafe_character(name: str, call: Call, tmp_path: Path) -> None:
    everything = ""
    for words in SHOWN[name]:
        for output in FORMATS:
            answer = call(*name.split(), "-o", output, *words, PGCOORD_DEV_DIR=str(tmp_path / BAD))
            for text in (answer.out, answer.err):
                assert unsafe(text, coloured="always" in words) == [], (words, output, text)
                everything += text
    assert "\\x1b" in everything, "no call has shown a hostile text"


@pytest.mark.parametrize(
    "text",
    [
        '- name: "{bad}"\n- name: "{bad}"',
        '- name: a\n  "{bad}": 1',
        '- name: "{bad}"\n- name: b\nedges:\n- {{from: "{bad}", to: b}}\n- {{from: b, to: "{bad}"}}',
        "- name: *\x1b",
        "- !<\x1b[31mtag> x",
        "- name: *und\u202eefined",
        "- name: *und\x9befined",
    ],
)
def test_a_flow_file_is_refused_without_its_unsafe_characters(text: str, offline: Call, tmp_path: Path) -> None:
    path = tmp_path / "flow.yaml"
    path.write_text("executions:\n" + text.format(bad=r"a\e[31m\N\_b\u202e"), encoding="utf-8")
    answer = offline("flow", "create", str(path))
    assert answer.code == 2, answer
    assert unsafe(answer.out + answer.err) == []


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_log_line_in_text_has_no_unsafe_character(log_format: str, call: Call) -> None:
    answer = call("tail", "lease", "--event-type", BAD, "--no-follow", "--log-format", log_format)
    assert "is not a known kind of event" in answer.err
    assert log_format == "json" or unsafe(answer.err) == []


@pytest.mark.parametrize("variable", ["PGCOORD_OUTPUT", "PGCOORD_DSN", "PGCOORD_SCHEMA", "PGCOORD_COLOR"])
def test_a_refused_variable_is_shown_without_unsafe_characters(variable: str, offline: Call) -> None:
    answer = offline("leader", "status", **{variable: BAD})
    assert answer.code != 0
    assert unsafe(answer.out + answer.err) == []

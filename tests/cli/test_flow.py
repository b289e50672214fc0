"""`pgcoord flow` and `pgcoord execution`: output, refusals, and that a lost lease changes nothing."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from tests.asking import value
from tests.postgres.flow_world import Conn, everything

if TYPE_CHECKING:
    from tests.conftest import Answer, Call

DIAMOND = """\
namespace: deploys
instance_tag: eu
executions:
  - name: build
    command: [make, all]
  - name: test
    max_attempts: 2
  - name: lint
  - name: release
edges:
  - {from: build, to: test}
  - {from: build, to: lint}
  - {from: test, to: release}
  - {from: lint, to: release}
policies:
  release: {kind: quorum, k: 1}
"""

TREE = """\
build  eligible
├── test  blocked
│   └── release  blocked  (quorum 1)
└── lint  blocked
    └── release (see above)
"""

SINGLE = "executions: [{name: only}]"

Document = dict[str, Any]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """Writes a flow file; returns its path."""

    def write(text: str) -> str:
        (tmp_path / "flow.yaml").write_text(text)
        return str(tmp_path / "flow.yaml")

    return write


Write = Callable[[str], str]
Create = Callable[..., Document]


@pytest.fixture
def create(call: Call, write: Write) -> Create:
    """Creates a flow from a text; returns the output."""

    def create(text: str = SINGLE) -> Document:
        answer = call("flow", "create", write(text), "-o", "json")
        assert answer.code == 0, answer
        return dict(answer.document)

    return create


@pytest.fixture
def claim(call: Call) -> Callable[..., Document]:
    """Claims the oldest execution; returns the output."""
    return lambda *words: dict(call("execution", "claim", *words, "-o", "json").document)


Claim = Callable[..., Document]


def counted(sql: Conn) -> tuple[int, ...]:
    return tuple(value(sql, f"SELECT count(*) FROM {table}") for table in ("flows", "executions", "edges"))


# -- create


def test_a_flow_is_created_completely(create: Create, sql: Conn) -> None:
    created = create(DIAMOND)
    assert list(created["executions"]) == ["build", "test", "lint", "release"]
    assert counted(sql) == (1, 4, 4)
    rows = sql.execute("SELECT name, state, command, max_attempts, namespace, instance_tag FROM executions ORDER BY 1")
    assert rows.fetchall() == [
        ("build", "eligible", ["make", "all"], 1, "deploys", "eu"),
        ("lint", "blocked", None, 1, "deploys", "eu"),
        ("release", "blocked", None, 1, "deploys", "eu"),
        ("test", "blocked", None, 2, "deploys", "eu"),
    ]


def test_plain_output_is_the_id_for_scripts(call: Call, write: Write, sql: Conn) -> None:
    answer = call("flow", "create", write(SINGLE), "-o", "plain")
    assert answer.out.strip() == str(value(sql, "SELECT flow_id FROM flows"))


def test_json_is_read_from_standard_input(call: Call, monkeypatch: pytest.MonkeyPatch, sql: Conn) -> None:
    text = json.dumps({"executions": [{"name": "once", "command": ["date"]}]})
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert call("flow", "create", "-").code == 0
    assert value(sql, "SELECT command FROM executions") == ["date"]


def test_a_check_needs_no_server_and_creates_nothing(offline: Call, write: Write) -> None:
    answer = offline("flow", "create", write(DIAMOND), "--check")  # an address without a server
    assert (answer.code, answer.out) == (0, "")
    assert "4 executions, 4 edges" in answer.err
    assert offline("flow", "create", write(DIAMOND), "--check", "-q").err == ""


@pytest.mark.parametrize("check", [[], ["--check"]])
@pytest.mark.parametrize(
    ("text", "line", "complaint"),
    [
        (DIAMOND.replace("from: lint", "from: lnit"), 14, "no execution 'lnit'"),
        (DIAMOND.replace("k: 1", "k: 3"), 16, "`k` is 3, but 'release' has 2 upstreams"),
        (DIAMOND.replace("to: test", "to: build"), 11, "a cycle: build → build"),
        (DIAMOND.replace("name: lint", "name: test"), 8, "duplicate execution 'test'"),
        (DIAMOND.replace("max_attempts: 2", "max_attempts: 0"), 7, "`max_attempts` must be an integer from 1 to"),
        ("executions: [", 1, "invalid YAML"),
    ],
)
def test_an_invalid_file_is_refused_with_its_line(
    call: Call, write: Write, sql: Conn, text: str, line: int, complaint: str, check: list[str]
) -> None:
    file = write(text)
    refusal = call("flow", "create", file, "-o", "json", *check).refusal
    assert refusal.startswith(f"{file}:{line}: ")
    assert complaint in refusal
    assert counted(sql) == (0, 0, 0)


def test_standard_input_is_named_in_a_refusal(offline: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\nexecutions: []")))
    assert offline("flow", "create", "-", "-o", "json").refusal.startswith("standard input:2: ")


@pytest.mark.parametrize(
    ("data", "complaint"), [(None, "cannot read"), (b"\xff\xfe", "not UTF-8"), (b"", "the file is empty")]
)
def test_a_file_that_cannot_be_read_is_refused(
    offline: Call, tmp_path: Path, data: bytes | None, complaint: str
) -> None:
    file = tmp_path / "flow.yaml"
    if data is not None:
        file.write_bytes(data)
    assert complaint in offline("flow", "create", str(file), "-o", "json").refusal


# -- show, list, cancel


def test_a_flow_is_shown_as_a_tree(call: Call, create: Create) -> None:
    shown = call("flow", "show", create(DIAMOND)["flow_id"])
    assert (shown.code, shown.out, shown.err) == (0, TREE, "")


def test_a_tree_shows_owners_and_reasons(call: Call, create: Create, claim: Claim) -> None:
    flow_id = create("executions: [{name: a}, {name: b}]")["flow_id"]
    lost = claim()
    call("execution", "fail", lost["execution_id"], "--epoch", "1", "--reason", "disk full")
    claim("--owner", "host-1")
    assert call("flow", "show", flow_id).out == "a  failed  - disk full\nb  running  by host-1\n"


def test_a_flow_is_shown_for_documents(call: Call, create: Create) -> None:
    flow_id = create(DIAMOND)["flow_id"]
    mermaid = call("flow", "show", flow_id, "--format", "mermaid").out.splitlines()
    assert mermaid[:2] == ["flowchart TD", '  n0["build<br/>eligible"]:::eligible']
    dot = call("flow", "show", flow_id, "--format", "dot").out.splitlines()
    assert (dot[0], dot[-1]) == ("digraph flow {", "}")
    assert "  n2 -> n3" in dot


def test_a_flow_is_shown_as_json_by_either_option(call: Call, create: Create) -> None:
    created = create(DIAMOND)
    shown = call("flow", "show", created["flow_id"], "--format", "json")
    assert shown.out == call("flow", "show", created["flow_id"], "-o", "json").out
    document = shown.document
    assert (document["flow_id"], document["namespace"], document["cancelled_at"]) == (
        created["flow_id"], "deploys", None,
    )  # fmt: skip
    assert {row["name"]: row["execution_id"] for row in document["executions"]} == created["executions"]
    assert document["edges"][0] == {"upstream": "build", "downstream": "test", "outcome": None}


def test_flows_are_listed_newest_first(call: Call, create: Create, claim: Claim) -> None:
    first = create(DIAMOND)["flow_id"]
    second = create("executions: [{name: a}, {name: b}]")["flow_id"]
    claim()
    call("execution", "fail", claim()["execution_id"], "--epoch", "1")  # a, the second's
    listed = call("flow", "list", "-o", "json").document
    assert [row["flow_id"] for row in listed] == [second, first]
    assert [(row["executions"], row["unfinished"], row["failed"]) for row in listed] == [(2, 1, 1), (4, 4, 0)]
    assert [row["flow_id"] for row in call("flow", "list", "--limit", "1", "-o", "json").document] == [second]
    deploys = call("flow", "list", "--namespace", "deploys", "-o", "json").document
    assert [row["flow_id"] for row in deploys] == [first]


def test_an_empty_list_of_flows_is_a_success(call: Call) -> None:
    assert call("flow", "list") == (0, "", "there are no flows\n")
    assert call("flow", "list", "-o", "json").document == []


def test_cancelling_ends_what_has_not_ended_and_only_once(call: Call, create: Create, claim: Claim) -> None:
    flow_id = create(DIAMOND)["flow_id"]
    ended = claim()["execution_id"]
    call("execution", "complete", ended, "--epoch", "1")
    assert call("flow", "cancel", flow_id, "-o", "json").document == {"flow_id": flow_id, "cancelled": 3}
    assert call("flow", "cancel", flow_id, "-o", "json").document["cancelled"] == 0
    states = {row["name"]: row["state"] for row in call("flow", "show", flow_id, "-o", "json").document["executions"]}
    assert states == {"build": "success", "test": "cancelled", "lint": "cancelled", "release": "cancelled"}


@pytest.mark.parametrize(
    "words", [["flow", "show"], ["flow", "cancel"], ["execution", "show"], ["execution", "revoke"]]
)
def test_what_does_not_exist_is_a_false_condition(call: Call, words: list[str]) -> None:
    answer = call(*words, str(uuid4()), "-o", "json")
    assert (answer.code, answer.error["code"]) == (3, "condition_false")


EPOCH_VERBS = [f"execution {verb} --epoch 1" for verb in ("renew", "complete", "fail")]


@pytest.mark.parametrize("words", ["flow show", "flow cancel", "execution show", "execution revoke", *EPOCH_VERBS])
def test_an_invalid_uuid_is_refused_before_a_connection_is_opened(offline: Call, words: str) -> None:
    assert "is not a UUID" in offline(*words.split(), "6f1c", "-o", "json").refusal


# -- executions


def test_nothing_to_claim_is_a_false_condition(call: Call, create: Create, claim: Claim) -> None:
    assert call("execution", "claim").code == 3
    create()
    claim()
    answer = call("execution", "claim", "-o", "json")
    assert (answer.code, answer.error["message"]) == (3, "no execution is eligible")


def test_a_claim_prints_what_a_worker_needs(call: Call, create: Create, claim: Claim) -> None:
    created = create(DIAMOND)
    claimed = claim("--owner", "me", "--lease", "5m")
    told = {name: claimed[name] for name in ("execution_id", "flow_id", "name", "command", "attempt", "lease_epoch")}
    assert told == {
        "execution_id": created["executions"]["build"], "flow_id": created["flow_id"], "name": "build",
        "command": ["make", "all"], "attempt": 1, "lease_epoch": 1,
    }  # fmt: skip
    shown = call("execution", "show", claimed["execution_id"], "-o", "json").document
    assert (shown["state"], shown["owner"], shown["lease_id"]) == ("running", "me", claimed["lease_id"])
    assert shown["expires_at"] == claimed["expires_at"]


def test_a_claim_can_be_limited_to_a_namespace_and_a_tag(call: Call, create: Create, claim: Claim) -> None:
    for namespace, tag in (("n1", "t1"), ("n1", "t2"), ("n2", "t1")):
        create(f"{{namespace: {namespace}, instance_tag: {tag}, executions: [{{name: {namespace}{tag}}}]}}")
    assert claim("--namespace", "n2")["name"] == "n2t1"
    assert claim("--instance-tag", "t2")["name"] == "n1t2"
    assert call("execution", "claim", "--namespace", "n2").code == 3


def test_a_lease_is_renewed_and_its_execution_completed(call: Call, create: Create, claim: Claim) -> None:
    create()
    claimed = claim()
    words = claimed["execution_id"], "--epoch", "1", "-o", "json"
    renewed = call("execution", "renew", *words, "--lease", "10m").document
    assert renewed["expires_at"] > claimed["expires_at"]
    completed = call("execution", "complete", *words)
    assert completed.document == {"execution_id": claimed["execution_id"], "state": "success"}


def test_a_failed_attempt_is_repeated_until_the_last(call: Call, create: Create, claim: Claim, sql: Conn) -> None:
    create("executions: [{name: a, max_attempts: 2}]")
    states = []
    for epoch in ("1", "2"):
        sql.execute("UPDATE executions SET eligible_from = '-infinity'")  # no backoff
        failed = call("execution", "fail", claim()["execution_id"], "--epoch", epoch, "--reason", "no", "-o", "json")
        states.append(failed.document["state"])
    assert states == ["eligible", "failed"]
    assert value(sql, "SELECT reason FROM executions") == "no"


def test_a_revoked_execution_can_be_claimed_again(call: Call, create: Create, claim: Claim) -> None:
    create()
    execution_id = claim()["execution_id"]
    revoked = call("execution", "revoke", execution_id, "-o", "json")
    assert revoked.document == {"execution_id": execution_id, "state": "eligible"}
    again = call("execution", "revoke", execution_id, "-o", "json")
    assert (again.code, "it is eligible" in again.error["message"]) == (3, True)
    assert claim()["lease_epoch"] == 2


ENDINGS = ["renew", "complete", "fail"]


@pytest.mark.parametrize("verb", ENDINGS)
@pytest.mark.parametrize("is_claimed_again", [False, True])
def test_i9_a_lost_lease_changes_nothing(
    call: Call, create: Create, claim: Claim, sql: Conn, verb: str, is_claimed_again: bool
) -> None:
    create(DIAMOND)
    lost = claim()
    call("execution", "revoke", lost["execution_id"])
    if is_claimed_again:
        claim("--owner", "another")
    before = everything(sql)
    answer: Answer = call("execution", verb, lost["execution_id"], "--epoch", "1", "-o", "json")
    assert (answer.code, answer.error["code"]) == (6, "fenced")
    assert everything(sql) == before


@pytest.mark.parametrize("verb", ENDINGS)
def test_i9_an_execution_that_has_ended_does_not_change(
    call: Call, create: Create, claim: Claim, sql: Conn, verb: str
) -> None:
    create()
    claimed = claim()
    call("execution", "complete", claimed["execution_id"], "--epoch", "1")
    before = everything(sql)
    assert call("execution", verb, claimed["execution_id"], "--epoch", "1").code == 6
    assert everything(sql) == before

"""Flow files: the plan in a valid file, and the line and message for an invalid one."""

from __future__ import annotations

import json
from itertools import pairwise
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgcoord_cli.core.flows.flow_file import MAX_NAME, FlowPlan, PlannedExecution, parse_flow
from pgcoord_cli.core.flows.join_policy import JoinPolicy, OnSatisfied, PolicyKind
from pgcoord_cli.errors import UsageError

EXAMPLE = """\
namespace: deploys            # optional, like instance_tag
executions:
  - name: build
    command: [make, build]    # optional; max_attempts, instance_tag too
  - name: test
  - name: release
edges:
  - {from: build, to: test}
  - {from: test, to: release}
policies:                     # per downstream; all_of where none is given
  release: {kind: quorum, k: 1, on_satisfied: let_run}
"""


def parse(text: str) -> FlowPlan:
    return parse_flow(dedent(text), "flow.yaml")


def refusal(text: str) -> str:
    """Returns the message for an invalid file."""
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert caught.value.exit_code == 2
    return caught.value.message


# -- valid files


def test_the_documented_example() -> None:
    plan = parse(EXAMPLE)
    assert plan == FlowPlan(
        "deploys", None,
        [PlannedExecution("build", ["make", "build"]), PlannedExecution("test"), PlannedExecution("release")],
        [("build", "test"), ("test", "release")],
        {"release": JoinPolicy(PolicyKind.QUORUM, 1, OnSatisfied.LET_RUN)},
    )  # fmt: skip
    assert plan.upstreams() == {"test": ["build"], "release": ["test"]}


def test_every_key_is_read() -> None:
    plan = parse("""\
        namespace: ci
        instance_tag: blue
        executions:
          - {name: a, command: [sh, -c, "echo 'ä'"], max_attempts: 3, instance_tag: green}
          - {name: b}
          - {name: c}
        edges:
          - {from: a, to: c}
          - {from: b, to: c}
        policies:
          c: {kind: any_of, on_satisfied: cancel_remaining}
        """)
    assert (plan.namespace, plan.instance_tag) == ("ci", "blue")
    assert plan.executions[0] == PlannedExecution("a", ["sh", "-c", "echo 'ä'"], 3, "green")
    assert plan.policies == {"c": JoinPolicy(PolicyKind.ANY_OF, None, OnSatisfied.CANCEL_REMAINING)}


def test_names_that_yaml_resolves_to_other_types_are_strings() -> None:
    plan = parse("executions: [{name: 1.50}, {name: yes}, {name: 2024-01-01, command: [sleep, 010]}]")
    assert [execution.name for execution in plan.executions] == ["1.50", "yes", "2024-01-01"]
    assert plan.executions[2].command == ["sleep", "010"]


def test_an_empty_policy_has_the_defaults() -> None:
    text = "executions: [{name: a}, {name: b}]\nedges: [{from: a, to: b}]\npolicies: {b: {}}"
    assert parse(text).policies == {"b": JoinPolicy()}


def test_the_longest_name_is_accepted() -> None:
    assert parse(f"executions: [{{name: {'x' * MAX_NAME}}}]").executions[0].name == "x" * MAX_NAME


# -- JSON


def document(name: str = "build") -> dict[str, Any]:
    return {
        "namespace": "deploys",
        "executions": [{"name": name, "command": ["make", "a/b"]}, {"name": "test", "max_attempts": 2}],
        "edges": [{"from": name, "to": "test"}],
        "policies": {"test": {"kind": "quorum", "k": 1}},
    }


def expected_plan(name: str = "build") -> FlowPlan:
    executions = [PlannedExecution(name, ["make", "a/b"]), PlannedExecution("test", None, 2)]
    return FlowPlan("deploys", None, executions, [(name, "test")], {"test": JoinPolicy(PolicyKind.QUORUM, 1)})


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"indent": 2},
        {"separators": (",", ":")},
        pytest.param({"indent": "\t"}),
    ],
    ids=["one line", "indented", "dense", "tabs"],
)  # fmt: skip
def test_json_is_read_in_every_layout(how: dict[str, Any]) -> None:
    assert parse(json.dumps(document(), **how)) == expected_plan()


@pytest.mark.parametrize(
    "name",
    [
        'say "a\\b" / \n\t', "ä ÿ 中",
        pytest.param("🚀"),
    ],
)  # fmt: skip
def test_json_escapes_are_decoded(name: str) -> None:
    assert parse(json.dumps(document(name))) == expected_plan(name)


def test_the_message_for_an_invalid_json_file_names_its_line() -> None:
    text = json.dumps(document() | {"edges": [{"from": "build", "to": "tset"}]}, indent=2)
    line = next(number for number, line in enumerate(text.splitlines(), start=1) if "tset" in line)
    assert refusal(text) == f"flow.yaml:{line}: there is no execution 'tset'"


# -- invalid files


THREE = """\
executions:
  - name: a
  - name: b
  - name: c
edges:
  - {from: a, to: c}
  - {from: b, to: c}
"""
"""Seven valid lines, to which the cases add an error."""


def cases(*lines: tuple[str, str, int, str]) -> pytest.MarkDecorator:
    """Makes cases of an id, the file, the line that the message must name, and text that it must contain."""
    parameters = [pytest.param(text, line, words, id=name) for name, text, line, words in lines]
    return pytest.mark.parametrize(("text", "line", "words"), parameters)


def assert_refused(text: str, line: int, words: str) -> None:
    message = refusal(text)
    assert message.startswith(f"flow.yaml:{line}: ")
    assert words in message


@cases(
    ("two", THREE + "  - {from: c, to: b}\n", 8, "a cycle: c → b → c"),
    ("itself", THREE + "  - {from: b, to: b}\n", 8, "a cycle: b → b"),
    ("unknown from", THREE + "  - {from: x, to: b}\n", 8, "there is no execution 'x'"),
    ("unknown to", THREE + "  - from: b\n    to: x\n", 9, "there is no execution 'x'"),
    ("twice", THREE + "  - {from: a, to: b}\n  - {to: c, from: a}\n", 9, "duplicate edge: a → c"),
    ("no to", THREE + "  - {from: a}\n", 8, "an edge must have `from` and `to`, for example {from: build, to: test}"),
    ("empty", THREE + "  - {}\n", 8, "an edge must have `from` and `to`, for example {from: build, to: test}"),
    ("a name", THREE + "  - a\n", 8, "an edge must be a mapping, for example {from: build, to: test}"),
    ("unknown key", THREE + "  - {from: a, to: b, if: c}\n", 8, "unknown key 'if' in an edge"),
    ("key twice", THREE + "  - from: a\n    to: b\n    from: a\n", 10, "duplicate key 'from' in an edge"),
    ("null", THREE + "  - {from: null, to: b}\n", 8, "the name of an execution must be a string, not null"),
    ("list", THREE + "  - {from: [a], to: b}\n", 8, "the name of an execution must be a string, not a list"),
    ("no list", "executions: [{name: a}]\nedges: a\n", 2, "`edges` must be a list of edges"),
)
def test_invalid_edges(text: str, line: int, words: str) -> None:
    assert_refused(text, line, words)


def test_a_long_cycle_is_named_completely() -> None:
    """It may start anywhere; the line is that of its first edge."""
    names = "abcdef"
    edges = [f"  - {{from: {names[i]}, to: {names[(i + 1) % 6]}}}\n" for i in range(6)]
    text = "executions: [" + ", ".join(f"{{name: {name}}}" for name in names + "xy") + "]\nedges:\n"
    message = refusal(text + "  - {from: x, to: a}\n" + "".join(edges) + "  - {from: d, to: y}\n")
    position, cycle = message.removeprefix("flow.yaml:").split(": a cycle: ")
    found = cycle.split(" → ")
    assert len(found) == 7 and found[0] == found[-1] and set(found) == set(names)
    assert all(names[(names.index(one) + 1) % 6] == next_one for one, next_one in pairwise(found))
    assert int(position) == 4 + names.index(found[0])


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (THREE.replace("name: b", "nmae: b"), "did you mean 'name'?"),
        (THREE.replace("from: a", "from: A"), None),
        (
            THREE.replace("edges:", "vertices:"),
            "keys of a flow file: edges, executions, instance_tag, namespace, policies",
        ),
        (THREE.replace("name: c", "name: release").replace("to: c", "to: relase"), "did you mean 'release'?"),
        (THREE + "  - {from: c, to: a}\n", "each of these executions would wait for itself; remove one of the edges"),
    ],
    ids=["key", "short name", "no near key", "name", "cycle"],
)
def test_a_hint_says_what_to_write(text: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert caught.value.hint == hint


POLICIES = THREE + "policies:\n"


@cases(
    (
        "k too small",
        POLICIES + "  c: {kind: quorum, k: 0}\n",
        9,
        "`k` must be an integer from 1 to 2147483647, not '0'",
    ),
    ("k negative", POLICIES + "  c:\n    kind: quorum\n    k: -1\n", 11, "not '-1'"),
    ("k too large", POLICIES + "  c:\n    kind: quorum\n    k: 3\n", 11, "`k` is 3, but 'c' has 2 upstreams"),
    ("k missing", POLICIES + "  c: {kind: quorum}\n", 9, "kind quorum needs `k`"),
    ("k no number", POLICIES + "  c: {kind: quorum, k: two}\n", 9, "not 'two'"),
    ("k a fraction", POLICIES + "  c: {kind: quorum, k: 1.5}\n", 9, "not '1.5'"),
    ("k null", POLICIES + "  c: {kind: quorum, k: }\n", 9, "`k` must be a string, not null"),
    ("k of all_of", POLICIES + "  c: {kind: all_of, k: 2}\n", 9, "`k` belongs to kind quorum, not to all_of"),
    ("k of any_of", POLICIES + "  c: {kind: any_of, k: 2}\n", 9, "`k` belongs to kind quorum, not to any_of"),
    ("k without a kind", POLICIES + "  c: {k: 2}\n", 9, "`k` belongs to kind quorum"),
    (
        "unknown kind",
        POLICIES + "  c: {kind: most_of}\n",
        9,
        "`kind` must be one of all_of, any_of, quorum, not 'most_of'",
    ),
    (
        "unknown on_satisfied",
        POLICIES + "  c: {on_satisfied: stop}\n",
        9,
        "`on_satisfied` must be one of cancel_remaining, let_run",
    ),
    ("unknown key", POLICIES + "  c: {kind: any_of, when: now}\n", 9, "unknown key 'when' in a policy"),
    ("unknown name", POLICIES + "  x: {kind: any_of}\n", 9, "there is no execution 'x'"),
    (
        "no upstreams",
        POLICIES + "  c: {}\n  a: {kind: any_of}\n",
        10,
        "'a' has no upstreams, so it cannot have a policy",
    ),
    ("name twice", POLICIES + "  c: {}\n  c: {}\n", 10, "duplicate key 'c' in `policies`"),
    ("key twice", POLICIES + "  c: {kind: any_of, kind: any_of}\n", 9, "duplicate key 'kind' in a policy"),
    ("a word", POLICIES + "  c: any_of\n", 9, "a policy must be a mapping"),
    ("a list", POLICIES + "  - any_of\n", 9, "`policies` must be a mapping"),
)
def test_invalid_policies(text: str, line: int, words: str) -> None:
    assert_refused(text, line, words)


@cases(
    ("name twice", "executions:\n  - name: a\n  - name: b\n  - name: a\n", 4, "duplicate execution 'a'"),
    ("no name", "executions:\n  - name: a\n  - command: [b]\n", 3, "the execution has no `name`"),
    ("empty name", "executions:\n  - name: ''\n", 2, f"`name` must have 1 to {MAX_NAME} characters, not 0"),
    (
        "long name",
        f"executions:\n  - max_attempts: 1\n    name: {'x' * (MAX_NAME + 1)}\n",
        3,
        "1 to 200 characters, not 201",
    ),
    ("null name", "executions:\n  - name: ~\n", 2, "`name` must be a string, not null"),
    ("zero byte", 'executions:\n  - name: "a\\0"\n', 2, "`name` must not contain a null byte"),
    ("a word", "executions:\n  - a\n", 2, "an execution must be a mapping, for example {name: build}"),
    ("a mapping of them", "executions:\n  a: {command: [b]}\n", 2, "`executions` must be a list of executions"),
    (
        "command a text",
        "executions:\n  - name: a\n    command: make all\n",
        3,
        '`command` must be a list of words, for example [sh, -c, "echo hi"]',
    ),
    ("command empty", "executions:\n  - name: a\n    command: []\n", 3, "`command` is empty"),
    (
        "command nested",
        "executions:\n  - name: a\n    command:\n    - a\n    - [b]\n",
        5,
        "a word of `command` must be a string, not a list",
    ),
    ("no attempts", "executions:\n  - name: a\n    max_attempts: 0\n", 3, "`max_attempts` must be an integer"),
    ("too many attempts", "executions:\n  - name: a\n    max_attempts: 2147483648\n", 3, "not '2147483648'"),
    ("unknown key", "executions:\n  - name: a\n    comand: [b]\n", 3, "unknown key 'comand' in an execution"),
    ("key twice", "executions:\n  - name: a\n    name: b\n", 3, "duplicate key 'name' in an execution"),
    (
        "dependencies in an execution",
        "executions:\n  - name: a\n    needs: [b]\n",
        3,
        "unknown key 'needs'; edges are listed under 'edges'",
    ),
)
def test_invalid_executions(text: str, line: int, words: str) -> None:
    assert_refused(text, line, words)


@cases(
    ("no executions", "edges: []\n", 1, "`executions` is missing"),
    ("none in the list", "executions: []\n", 1, "`executions` is empty"),
    ("nothing in it", "# a comment\nexecutions:\n", 2, "`executions` is empty"),
    ("a list", "# a comment\n- name: a\n", 2, "a flow file must be a mapping"),
    ("a text", "build, then test\n", 1, "a flow file must be a mapping"),
    ("unknown key", THREE + "edge: []\n", 8, "unknown key 'edge' in a flow file"),
    ("key twice", THREE + "edges: []\n", 8, "duplicate key 'edges' in a flow file"),
    ("namespace a list", "executions: [{name: a}]\nnamespace: [a]\n", 2, "`namespace` must be a string, not a list"),
    ("instance_tag null", "executions: [{name: a}]\ninstance_tag:\n", 2, "`instance_tag` must be a string, not null"),
    ("not YAML", "executions:\n  - name: a\n  - {name: b\n", 4, "invalid YAML"),
    ("not YAML: a tab", "executions:\n\t- name: a\n", 2, "invalid YAML"),
    ("two documents", "executions: [{name: a}]\n---\nexecutions: []\n", 2, "invalid YAML"),
    ("an unknown alias", "executions:\n- *a\n", 2, "invalid YAML"),
    ("itself", "executions: &all\n- *all\n", 1, "an execution must be a mapping"),
    ("Windows", "executions:\r\n- name: a\r\n  x: y\r\n", 3, "unknown key 'x' in an execution"),
)
def test_invalid_files(text: str, line: int, words: str) -> None:
    assert_refused(text, line, words)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n"])
def test_an_empty_file_is_refused(text: str) -> None:
    message = refusal(text)
    assert message.startswith("flow.yaml:")
    assert "empty" in message or "a mapping" in message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        pytest.param("namespace: x\nexecutions: []\n", 2, id="an empty list further down"),
        pytest.param("executions:\n- name: a\a\n", 2, id="a control character"),
        pytest.param("executions:\n- ? [a]\n  : b\n", 2, id="a list for a key"),
        pytest.param("executions:\n- name: a\n  max_attempts: " + "9" * 5_000, 3, id="5,000 digits"),
        pytest.param('executions:\n- name: "\\ud800"\n', 2, id="an unpaired surrogate"),
        pytest.param("executions:\n  " + "[" * 5_000, 2, id="deep nesting"),
    ],
)
def test_the_message_for_a_rare_error_names_its_line(text: str, line: int) -> None:
    assert_refused(text, line, "")


# -- random files


words = st.sampled_from(["a", "b", "name", "from", "to", "kind", "k", "quorum", "executions", "edges", "policies", "1"])
nodes = st.recursive(
    words | st.none() | st.integers(-1, 3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["executions", "edges", "policies", "namespace"]), nodes))
def test_a_random_file_is_parsed_or_refused_with_a_line(value: dict[str, Any]) -> None:
    try:
        parse(json.dumps(value))
    except UsageError as error:
        assert error.message.startswith("flow.yaml:1: ")

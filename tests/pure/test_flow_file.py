"""Flow files: what a right one means, and where exactly a wrong one is wrong."""

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

DESIGN = """\
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
    """What is said of a wrong file."""
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert caught.value.exit_code == 2
    return caught.value.message


# -- right files


def test_the_form_that_the_design_shows() -> None:
    plan = parse(DESIGN)
    assert plan == FlowPlan(
        "deploys", None,
        [PlannedExecution("build", ["make", "build"]), PlannedExecution("test"), PlannedExecution("release")],
        [("build", "test"), ("test", "release")],
        {"release": JoinPolicy(PolicyKind.QUORUM, 1, OnSatisfied.LET_RUN)},
    )  # fmt: skip
    assert plan.upstreams() == {"test": ["build"], "release": ["test"]}


def test_everything_that_can_be_said() -> None:
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


def test_names_that_yaml_takes_for_something_else_are_texts() -> None:
    plan = parse("executions: [{name: 1.50}, {name: yes}, {name: 2024-01-01, command: [sleep, 010]}]")
    assert [execution.name for execution in plan.executions] == ["1.50", "yes", "2024-01-01"]
    assert plan.executions[2].command == ["sleep", "010"]


def test_a_policy_may_leave_out_what_has_a_default() -> None:
    text = "executions: [{name: a}, {name: b}]\nedges: [{from: a, to: b}]\npolicies: {b: {}}"
    assert parse(text).policies == {"b": JoinPolicy()}


def test_the_longest_name_there_can_be() -> None:
    assert parse(f"executions: [{{name: {'x' * MAX_NAME}}}]").executions[0].name == "x" * MAX_NAME


# -- JSON


def document(name: str = "build") -> dict[str, Any]:
    return {
        "namespace": "deploys",
        "executions": [{"name": name, "command": ["make", "a/b"]}, {"name": "test", "max_attempts": 2}],
        "edges": [{"from": name, "to": "test"}],
        "policies": {"test": {"kind": "quorum", "k": 1}},
    }


def meant(name: str = "build") -> FlowPlan:
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
def test_json_is_read_however_it_is_laid_out(how: dict[str, Any]) -> None:
    assert parse(json.dumps(document(), **how)) == meant()


@pytest.mark.parametrize(
    "name",
    [
        'say "a\\b" / \n\t', "ä ÿ 中",
        pytest.param("🚀"),
    ],
)  # fmt: skip
def test_json_escapes_mean_what_they_mean_in_json(name: str) -> None:
    assert parse(json.dumps(document(name))) == meant(name)


def test_a_wrong_json_file_is_told_its_line_too() -> None:
    text = json.dumps(document() | {"edges": [{"from": "build", "to": "tset"}]}, indent=2)
    line = next(number for number, line in enumerate(text.splitlines(), start=1) if "tset" in line)
    assert refusal(text) == f"flow.yaml:{line}: there is no execution 'tset'"


# -- wrong files


THREE = """\
executions:
  - name: a
  - name: b
  - name: c
edges:
  - {from: a, to: c}
  - {from: b, to: c}
"""
"""Seven lines, to which something wrong is added."""


def cases(*lines: tuple[str, str, int, str]) -> pytest.MarkDecorator:
    """For each: its id, the file, the line that has to be named, and words that have to be said of it."""
    parameters = [pytest.param(text, line, words, id=name) for name, text, line, words in lines]
    return pytest.mark.parametrize(("text", "line", "words"), parameters)


def assert_refused(text: str, line: int, words: str) -> None:
    message = refusal(text)
    assert message.startswith(f"flow.yaml:{line}: ")
    assert words in message


@cases(
    ("two", THREE + "  - {from: c, to: b}\n", 8, "a circle: c → b → c"),
    ("itself", THREE + "  - {from: b, to: b}\n", 8, "a circle: b → b"),
    ("unknown from", THREE + "  - {from: x, to: b}\n", 8, "there is no execution 'x'"),
    ("unknown to", THREE + "  - from: b\n    to: x\n", 9, "there is no execution 'x'"),
    ("twice", THREE + "  - {from: a, to: b}\n  - {to: c, from: a}\n", 9, "the edge from 'a' to 'c' is there twice"),
    ("no to", THREE + "  - {from: a}\n", 8, "a from and a to"),
    ("empty", THREE + "  - {}\n", 8, "a from and a to"),
    ("a name", THREE + "  - a\n", 8, "a mapping"),
    ("unknown key", THREE + "  - {from: a, to: b, if: c}\n", 8, "'if' means nothing here"),
    ("key twice", THREE + "  - from: a\n    to: b\n    from: a\n", 10, "'from' is there twice"),
    ("null", THREE + "  - {from: null, to: b}\n", 8, "a text"),
    ("list", THREE + "  - {from: [a], to: b}\n", 8, "a text"),
    ("no list", "executions: [{name: a}]\nedges: a\n", 2, "a list"),
)
def test_edges_that_are_wrong(text: str, line: int, words: str) -> None:
    assert_refused(text, line, words)


def test_a_long_circle_is_named_whole() -> None:
    """Where it starts does not matter, but the line is that of an edge of it."""
    names = "abcdef"
    edges = [f"  - {{from: {names[i]}, to: {names[(i + 1) % 6]}}}\n" for i in range(6)]
    text = "executions: [" + ", ".join(f"{{name: {name}}}" for name in names + "xy") + "]\nedges:\n"
    message = refusal(text + "  - {from: x, to: a}\n" + "".join(edges) + "  - {from: d, to: y}\n")
    position, circle = message.removeprefix("flow.yaml:").split(": a circle: ")
    found = circle.split(" → ")
    assert len(found) == 7 and found[0] == found[-1] and set(found) == set(names)
    assert all(names[(names.index(one) + 1) % 6] == next_one for one, next_one in pairwise(found))
    assert int(position) == 4 + names.index(found[0])


POLICIES = THREE + "policies:\n"


@cases(
    ("k too small", POLICIES + "  c: {kind: quorum, k: 0}\n", 9, "k: '0' is not a number from 1 on"),
    ("k negative", POLICIES + "  c:\n    kind: quorum\n    k: -1\n", 11, "k: '-1'"),
    ("k too large", POLICIES + "  c:\n    kind: quorum\n    k: 3\n", 11, "k is 3, but only 2 are waited for"),
    ("k missing", POLICIES + "  c: {kind: quorum}\n", 9, "a quorum needs k"),
    ("k no number", POLICIES + "  c: {kind: quorum, k: two}\n", 9, "k: 'two'"),
    ("k a fraction", POLICIES + "  c: {kind: quorum, k: 1.5}\n", 9, "k: '1.5'"),
    ("k null", POLICIES + "  c: {kind: quorum, k: }\n", 9, "a text"),
    ("k of all_of", POLICIES + "  c: {kind: all_of, k: 2}\n", 9, "k belongs to a quorum, not to all_of"),
    ("k of any_of", POLICIES + "  c: {kind: any_of, k: 2}\n", 9, "k belongs to a quorum, not to any_of"),
    ("k without a kind", POLICIES + "  c: {k: 2}\n", 9, "k belongs to a quorum"),
    ("unknown kind", POLICIES + "  c: {kind: most_of}\n", 9, "'most_of' is none of all_of, any_of, quorum"),
    ("unknown ending", POLICIES + "  c: {on_satisfied: stop}\n", 9, "'stop' is none of cancel_remaining, let_run"),
    ("unknown key", POLICIES + "  c: {kind: any_of, when: now}\n", 9, "'when' means nothing here"),
    ("unknown name", POLICIES + "  x: {kind: any_of}\n", 9, "there is no execution 'x'"),
    ("waits for nothing", POLICIES + "  c: {}\n  a: {kind: any_of}\n", 10, "'a' waits for nothing"),
    ("name twice", POLICIES + "  c: {}\n  c: {}\n", 10, "'c' is there twice"),
    ("key twice", POLICIES + "  c: {kind: any_of, kind: any_of}\n", 9, "'kind' is there twice"),
    ("a word", POLICIES + "  c: any_of\n", 9, "a mapping"),
    ("a list", POLICIES + "  - any_of\n", 9, "a mapping"),
)
def test_policies_that_are_wrong(text: str, line: int, words: str) -> None:
    assert_refused(text, line, words)


@cases(
    ("name twice", "executions:\n  - name: a\n  - name: b\n  - name: a\n", 4, "execution 'a' is there twice"),
    ("no name", "executions:\n  - name: a\n  - command: [b]\n", 3, "needs a name"),
    ("empty name", "executions:\n  - name: ''\n", 2, f"1 to {MAX_NAME} characters"),
    ("long name", f"executions:\n  - max_attempts: 1\n    name: {'x' * (MAX_NAME + 1)}\n", 3, "1 to 200 characters"),
    ("null name", "executions:\n  - name: ~\n", 2, "a text"),
    ("zero byte", 'executions:\n  - name: "a\\0"\n', 2, "zero byte"),
    ("a word", "executions:\n  - a\n", 2, "a mapping"),
    ("a mapping of them", "executions:\n  a: {command: [b]}\n", 2, "a list"),
    ("command a text", "executions:\n  - name: a\n    command: make all\n", 3, "a list"),
    ("command empty", "executions:\n  - name: a\n    command: []\n", 3, "the command is empty"),
    ("command nested", "executions:\n  - name: a\n    command:\n    - a\n    - [b]\n", 5, "a text"),
    ("no attempts", "executions:\n  - name: a\n    max_attempts: 0\n", 3, "max_attempts: '0'"),
    ("too many attempts", "executions:\n  - name: a\n    max_attempts: 2147483648\n", 3, "max_attempts"),
    ("unknown key", "executions:\n  - name: a\n    comand: [b]\n", 3, "'comand' means nothing here"),
    ("key twice", "executions:\n  - name: a\n    name: b\n", 3, "'name' is there twice"),
)
def test_executions_that_are_wrong(text: str, line: int, words: str) -> None:
    assert_refused(text, line, words)


@cases(
    ("no executions", "edges: []\n", 1, "there are no executions"),
    ("none in the list", "executions: []\n", 1, "there are no executions"),
    ("nothing in it", "# a comment\nexecutions:\n", 2, "there are no executions"),
    ("a list", "# a comment\n- name: a\n", 2, "a mapping"),
    ("a text", "build, then test\n", 1, "a mapping"),
    ("unknown key", THREE + "edge: []\n", 8, "'edge' means nothing here"),
    ("key twice", THREE + "edges: []\n", 8, "'edges' is there twice"),
    ("namespace a list", "executions: [{name: a}]\nnamespace: [a]\n", 2, "a text"),
    ("instance_tag null", "executions: [{name: a}]\ninstance_tag:\n", 2, "a text"),
    ("not YAML", "executions:\n  - name: a\n  - {name: b\n", 4, "not YAML"),
    ("not YAML: a tab", "executions:\n\t- name: a\n", 2, "not YAML"),
    ("two documents", "executions: [{name: a}]\n---\nexecutions: []\n", 2, "not YAML"),
    ("an unknown alias", "executions:\n- *a\n", 2, "not YAML"),
    ("itself", "executions: &all\n- *all\n", 1, "a mapping"),
    ("Windows", "executions:\r\n- name: a\r\n  x: y\r\n", 3, "'x' means nothing here"),
)
def test_files_that_are_wrong(text: str, line: int, words: str) -> None:
    assert_refused(text, line, words)


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing but words\n", "---\n"])
def test_a_file_with_nothing_in_it_has_no_line_to_name(text: str) -> None:
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
        pytest.param('executions:\n- name: "\\ud800"\n', 2, id="half a surrogate pair"),
        pytest.param("executions:\n  " + "[" * 5_000, 2, id="brackets in brackets"),
    ],
)
def test_rare_mistakes_are_told_their_line_as_well(text: str, line: int) -> None:
    assert_refused(text, line, "")


# -- anything at all


words = st.sampled_from(["a", "b", "name", "from", "to", "kind", "k", "quorum", "executions", "edges", "policies", "1"])
nodes = st.recursive(
    words | st.none() | st.integers(-1, 3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["executions", "edges", "policies", "namespace"]), nodes))
def test_whatever_is_in_a_file_it_is_taken_or_refused_with_a_line(value: dict[str, Any]) -> None:
    try:
        parse(json.dumps(value))
    except UsageError as error:
        assert error.message.startswith("flow.yaml:1: ")

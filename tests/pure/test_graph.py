"""Drawings of flows from documents: trees, Mermaid and Graphviz."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from pgcoord_cli.render.graph import dot_lines, mermaid_lines, tree_lines

STATES = ["success", "failed", "cancelled", "skipped", "running", "eligible", "blocked"]
AWKWARD = 'say "hi" \\ [x] <b> & \n\x1b[31m'


def document(names: str | list[str], edges: str = "", **parts: Any) -> dict[str, Any]:
    """Returns a flow document, like `document("a b", "a>b", b={"state": "failed"})`; the rest is as in a new flow."""
    executions = [
        {"name": name, "state": "eligible", "policy": None, "owner": None, "reason": None} | parts.get(name, {})
        for name in (names.split() if isinstance(names, str) else names)
    ]
    return {"executions": executions, "edges": edges_of(*(tuple(edge.split(">")) for edge in edges.split()))}


def edges_of(*ends: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"upstream": upstream, "downstream": downstream} for upstream, downstream in ends]


def tree(drawn: dict[str, Any], *, colored: bool = False) -> list[str]:
    return list(tree_lines(drawn, colored=colored))


# -- trees


def test_an_execution_with_two_upstreams_is_drawn_once_and_then_only_named() -> None:
    assert tree(document("top left right end", "top>left top>right left>end right>end")) == [
        "top  eligible",
        "├── left  eligible",
        "│   └── end  eligible",
        "└── right  eligible",
        "    └── end (see above)",
    ]


def test_a_subtree_is_drawn_at_its_first_occurrence() -> None:
    assert tree(document("a b c d", "a>c b>c c>d")) == [
        "a  eligible",
        "└── c  eligible",
        "    └── d  eligible",
        "b  eligible",
        "└── c (see above)",
    ]


def test_a_line_shows_policy_owner_and_reason() -> None:
    parts: dict[str, Any] = {
        "all": {"policy": {"kind": "all_of"}, "state": "success"},
        "any": {"policy": {"kind": "any_of"}, "state": "running", "owner": "host-1"},
        "some": {"policy": {"kind": "quorum", "k": 2}, "state": "failed", "reason": "exit status 3"},
    }
    assert tree(document("all any some", **parts)) == [
        "all  success",
        "any  running  (any_of)  by host-1",
        "some  failed  (quorum 2)  - exit status 3",
    ]


def test_states_are_coloured_only_on_request() -> None:
    drawn = document("a", a={"state": "failed"})
    assert tree(drawn) == ["a  failed"]
    assert tree(drawn, colored=True) == ["a  \x1b[31mfailed\x1b[0m"]


def test_a_tree_contains_no_control_characters() -> None:
    parts: dict[str, Any] = {AWKWARD: {"reason": "\x1b[2J\nup", "owner": "\r"}}
    drawn = document([AWKWARD], **parts)
    (line,) = tree(drawn)
    assert line.isprintable()
    assert "\\x1b[2J\\nup" in line


def test_a_chain_of_two_thousand_is_drawn_completely() -> None:
    names = [f"n{number}" for number in range(2_000)]
    drawn = document(names) | {"edges": edges_of(*pairwise(names))}
    lines = tree(drawn)
    assert len(lines) == 2_000
    assert lines[-1].endswith("└── n1999  eligible")
    assert len(list(mermaid_lines(drawn))) > 3_999
    assert len(list(dot_lines(drawn))) > 3_999


def test_a_wide_flow_keeps_the_order_of_the_document() -> None:
    names = [f"n{number}" for number in range(50)]
    drawn = document(["root", *names]) | {"edges": edges_of(*(("root", name) for name in names))}
    assert [line.split()[1] for line in tree(drawn)[1:]] == names


# -- Mermaid and Graphviz


def test_mermaid_has_numbered_nodes_and_a_class_for_each_state() -> None:
    lines = list(mermaid_lines(document("a b", "a>b", a={"state": "success"}, b={"state": "blocked"})))
    assert lines[:4] == [
        "flowchart TD",
        '  n0["a<br/>success"]:::success',
        '  n1["b<br/>blocked"]:::blocked',
        "  n0 --> n1",
    ]
    classes = [line.split()[1] for line in lines[4:]]
    assert sorted(classes) == sorted(STATES)


def test_dot_is_a_digraph_of_labelled_boxes() -> None:
    lines = list(dot_lines(document("a b", "a>b", a={"state": "success"})))
    assert (lines[0], lines[-1]) == ("digraph flow {", "}")
    assert '  n0 [label="a\\nsuccess", fillcolor="#b7e1b0"]' in lines
    assert "  n0 -> n1" in lines


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_drawn(state: str) -> None:
    drawn = document("a", a={"state": state})
    for lines in (tree(drawn), list(mermaid_lines(drawn)), list(dot_lines(drawn))):
        assert any(state in line for line in lines)


def test_mermaid_labels_are_quoted() -> None:
    node = list(mermaid_lines(document([AWKWARD, "b"])))[1]
    assert node.isprintable()
    assert node.count('"') == 2  # the quotes around the label
    assert "say &quot;hi&quot;" in node


def test_mermaid_escapes_markup_in_names() -> None:
    node = list(mermaid_lines(document(["a<b>&lt;"])))[1]
    assert node.replace("<br/>", "").count("<") == 0
    assert "&amp;lt;" in node


def test_dot_labels_are_quoted() -> None:
    node = list(dot_lines(document([AWKWARD])))[2]
    assert node.isprintable()
    assert node.startswith('  n0 [label="say \\"hi\\" \\\\ [x] <b> & \\\\n\\\\x1b[31m\\neligible", ')

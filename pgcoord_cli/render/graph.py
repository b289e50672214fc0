"""Draws a flow: as a tree for terminals, in Mermaid or Graphviz for documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from pgcoord_cli.render import paint, scalar

STATE_STYLES = {
    "success": "good", "failed": "bad", "cancelled": "bad", "skipped": "warn", "running": "bold", "eligible": "",
    "blocked": "dim",
}  # fmt: skip

_FILLS = {
    "success": "#b7e1b0", "failed": "#f2b8b5", "cancelled": "#e0c3c3", "skipped": "#f4e3ae", "running": "#b9d7f5",
    "eligible": "#ffffff", "blocked": "#dddddd",
}  # fmt: skip

Document = Mapping[str, Any]


def tree_lines(document: Document, *, colored: bool) -> Iterator[str]:
    """Yields one line per execution, below one of its upstream executions; further occurrences are references."""
    executions = {execution["name"]: execution for execution in document["executions"]}
    below: dict[str, list[str]] = {}
    waiting: set[str] = set()
    for edge in document["edges"]:
        below.setdefault(edge["upstream"], []).append(edge["downstream"])
        waiting.add(edge["downstream"])
    seen: set[str] = set()
    # An explicit stack: a chain of a thousand executions exceeds the recursion limit of Python.
    stack = [(name, "", "") for name in reversed(executions) if name not in waiting]
    while stack:
        name, lead, indent = stack.pop()
        if name in seen:
            yield f"{lead}{scalar(name)} (see above)"
            continue
        seen.add(name)
        yield lead + _line(executions[name], colored=colored)
        children = below.get(name, [])
        for place, child in reversed(list(enumerate(children, start=1))):
            is_last = place == len(children)
            stack.append((child, indent + ("└── " if is_last else "├── "), indent + ("    " if is_last else "│   ")))


def _line(execution: Mapping[str, Any], *, colored: bool) -> str:
    state = execution["state"]
    words = [scalar(execution["name"]), paint(state, STATE_STYLES.get(state, ""), colored)]
    if policy := execution["policy"]:
        k = f" {policy['k']}" if "k" in policy else ""
        if policy["kind"] != "all_of":
            words.append(f"({policy['kind']}{k})")
    if execution["owner"]:
        words.append(f"by {scalar(execution['owner'])}")
    if execution["reason"]:
        words.append(f"- {scalar(execution['reason'])}")
    return "  ".join(words)


def mermaid_lines(document: Document) -> Iterator[str]:
    """Yields the lines of a Mermaid flowchart."""
    numbers = _numbers(document)
    yield "flowchart TD"
    for execution in document["executions"]:
        label = escape(scalar(execution["name"]))
        yield f'  n{numbers[execution["name"]]}["{label}<br/>{execution["state"]}"]:::{execution["state"]}'
    for edge in document["edges"]:
        yield f"  n{numbers[edge['upstream']]} --> n{numbers[edge['downstream']]}"
    for state, fill in _FILLS.items():
        yield f"  classDef {state} fill:{fill},stroke:#555"


def dot_lines(document: Document) -> Iterator[str]:
    """Yields the lines of a Graphviz digraph."""
    numbers = _numbers(document)
    yield "digraph flow {"
    yield "  node [shape=box, style=filled]"
    for execution in document["executions"]:
        label = scalar(execution["name"]).replace("\\", "\\\\").replace('"', '\\"')
        fill = _FILLS[execution["state"]]
        yield f'  n{numbers[execution["name"]]} [label="{label}\\n{execution["state"]}", fillcolor="{fill}"]'
    for edge in document["edges"]:
        yield f"  n{numbers[edge['upstream']]} -> n{numbers[edge['downstream']]}"
    yield "}"


def _numbers(document: Document) -> dict[str, int]:
    names: Sequence[str] = [execution["name"] for execution in document["executions"]]
    return {name: number for number, name in enumerate(names)}

"""Flow files: executions, edges between them and a policy for each downstream, in YAML or JSON.

The whole file is read and judged before anything is written, and whatever is wrong is said with its line: a word that
means nothing here, a name that is there twice or not at all, an edge that is there twice, a circle, a quorum that can
never be reached.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple

from pgcoord_cli.core.flows.join_policy import JoinPolicy, OnSatisfied, PolicyKind
from pgcoord_cli.errors import UsageError

MAX_NAME = 200
"""Characters."""


class PlannedExecution(NamedTuple):
    """An execution as a file asks for it."""

    name: str
    command: list[str] | None = None
    max_attempts: int = 1
    instance_tag: str | None = None


class FlowPlan(NamedTuple):
    """A whole file. Edges are (upstream, downstream) names; a downstream without a policy waits for all."""

    namespace: str | None
    instance_tag: str | None
    executions: list[PlannedExecution]
    edges: list[tuple[str, str]]
    policies: dict[str, JoinPolicy]

    def upstreams(self) -> dict[str, list[str]]:
        """What each execution waits for; those that wait for nothing are not in it."""
        found: dict[str, list[str]] = {}
        for upstream, downstream in self.edges:
            found.setdefault(downstream, []).append(upstream)
        return found


def parse_flow(text: str, source: str) -> FlowPlan:
    """The plan in a file's text. UsageError, which begins with `source` and the line, when anything is wrong."""
    return _Reader(source).flow(text)


class _Reader:
    """Walks the nodes of a document, each of which knows its line."""

    def __init__(self, source: str) -> None:
        self._source = source

    def flow(self, text: str) -> FlowPlan:
        root = self._compose(text)
        if root is None:
            raise UsageError(
                f"{self._source}: the file is empty", hint="see the flow file in the documentation: docs/flows.md"
            )
        fields = self._mapping(root, {"namespace", "instance_tag", "executions", "edges", "policies"})
        executions = self._executions(root, fields)
        names = {execution.name for execution in executions}
        edges = self._edges(fields, names)
        plan = FlowPlan(
            self._optional_text(fields, "namespace"), self._optional_text(fields, "instance_tag"), executions, edges, {}
        )
        return plan._replace(policies=self._policies(fields, plan.upstreams(), names))

    def _compose(self, text: str) -> Any:
        import yaml

        try:
            return yaml.compose(_without_tabs(text), Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise UsageError(f"{self._source}:{line}: not YAML: {error.problem}") from None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise UsageError(f"{self._source}:{line}: not YAML: {error.reason}") from None
        except RecursionError:
            raise UsageError(
                f"{self._source}:{_deepest_line(text)}: not a flow file: brackets within brackets"
            ) from None

    def _wrong(self, node: Any, message: str, hint: str | None = None) -> UsageError:
        return UsageError(f"{self._source}:{node.start_mark.line + 1}: {message}", hint=hint)

    # -- parts of the file

    def _executions(self, root: Any, fields: Mapping[str, Any]) -> list[PlannedExecution]:
        if "executions" not in fields or not fields["executions"].value:
            raise self._wrong(
                fields.get("executions", root),
                "there are no executions",
                hint="write executions: and a list with a name in each",
            )
        found: dict[str, PlannedExecution] = {}
        for node in self._sequence(fields["executions"]):
            execution = self._execution(node)
            if execution.name in found:
                raise self._wrong(node, f"execution {execution.name!r} is there twice")
            found[execution.name] = execution
        return list(found.values())

    def _execution(self, node: Any) -> PlannedExecution:
        fields = self._mapping(node, {"name", "command", "max_attempts", "instance_tag"})
        if "name" not in fields:
            raise self._wrong(node, "an execution needs a name")
        name = self._text(fields["name"])
        if not 0 < len(name) <= MAX_NAME:
            raise self._wrong(fields["name"], f"a name has 1 to {MAX_NAME} characters")
        command = [self._text(word) for word in self._sequence(fields["command"])] if "command" in fields else None
        if command == []:
            raise self._wrong(fields["command"], "the command is empty")
        attempts = self._number(fields["max_attempts"], "max_attempts", 1) if "max_attempts" in fields else 1
        return PlannedExecution(name, command, attempts, self._optional_text(fields, "instance_tag"))

    def _edges(self, fields: Mapping[str, Any], names: set[str]) -> list[tuple[str, str]]:
        found: dict[tuple[str, str], Any] = {}
        for node in self._sequence(fields["edges"]) if "edges" in fields else ():
            ends = self._mapping(node, {"from", "to"})
            if ends.keys() != {"from", "to"}:
                raise self._wrong(node, "an edge has a from and a to")
            edge = self._known(ends["from"], names), self._known(ends["to"], names)
            if edge in found:
                raise self._wrong(node, f"the edge from {edge[0]!r} to {edge[1]!r} is there twice")
            found[edge] = node
        self._refuse_cycles(found)
        return list(found)

    def _refuse_cycles(self, edges: Mapping[tuple[str, str], Any]) -> None:
        graph: dict[str, list[str]] = {}
        for upstream, downstream in edges:
            graph.setdefault(downstream, []).append(upstream)
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle: Sequence[str] = error.args[1]
            raise self._wrong(edges[circle[0], circle[1]], f"a circle: {' → '.join(circle)}") from None

    def _policies(
        self, fields: Mapping[str, Any], upstreams: Mapping[str, Sequence[str]], names: set[str]
    ) -> dict[str, JoinPolicy]:
        found: dict[str, JoinPolicy] = {}
        for key, node in self._pairs(fields["policies"]) if "policies" in fields else ():
            name = self._known(key, names)
            if name not in upstreams:
                raise self._wrong(key, f"{name!r} waits for nothing, so it can have no policy")
            found[name] = self._policy(node, len(upstreams[name]))
        return found

    def _policy(self, node: Any, size: int) -> JoinPolicy:
        fields = self._mapping(node, {"kind", "k", "on_satisfied"})
        kind = PolicyKind(self._choice(fields["kind"], list(PolicyKind))) if "kind" in fields else PolicyKind.ALL_OF
        then = OnSatisfied.LET_RUN
        if "on_satisfied" in fields:
            then = OnSatisfied(self._choice(fields["on_satisfied"], list(OnSatisfied)))
        if kind != PolicyKind.QUORUM:
            if "k" in fields:
                raise self._wrong(fields["k"], f"k belongs to a quorum, not to {kind}")
            return JoinPolicy(kind, None, then)
        if "k" not in fields:
            raise self._wrong(node, "a quorum needs k")
        k = self._number(fields["k"], "k", 1)
        if k > size:
            raise self._wrong(fields["k"], f"k is {k}, but only {size} are waited for")
        return JoinPolicy(kind, k, then)

    # -- kinds of nodes

    def _pairs(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.id != "mapping":
            raise self._wrong(node, "here belongs a mapping, name: value")
        seen: set[str] = set()
        for key, value in node.value:
            if key.id != "scalar":
                raise self._wrong(key, "here belongs a name")
            if key.value in seen:
                raise self._wrong(key, f"{key.value!r} is there twice")
            seen.add(key.value)
            yield key, value

    def _mapping(self, node: Any, known: set[str]) -> dict[str, Any]:
        found = {}
        for key, value in self._pairs(node):
            if key.value not in known:
                raise self._wrong(key, f"{key.value!r} means nothing here", hint=f"known: {', '.join(sorted(known))}")
            found[key.value] = value
        return found

    def _sequence(self, node: Any) -> list[Any]:
        if node.id != "sequence":
            raise self._wrong(node, "here belongs a list")
        return list(node.value)

    def _text(self, node: Any) -> str:
        if node.id != "scalar" or node.tag == "tag:yaml.org,2002:null":
            raise self._wrong(node, "here belongs a text")
        if "\0" in node.value:
            raise self._wrong(node, "a text cannot hold a zero byte")
        try:
            return str(node.value).encode("utf-16", "surrogatepass").decode("utf-16")  # JSON's pairs are one character
        except UnicodeDecodeError:
            raise self._wrong(node, "half a character: a surrogate without its other") from None

    def _optional_text(self, fields: Mapping[str, Any], name: str) -> str | None:
        return self._text(fields[name]) if name in fields else None

    def _number(self, node: Any, name: str, least: int) -> int:
        text = self._text(node)
        if not text.isdecimal() or len(text) > 10 or not least <= int(text) <= 2**31 - 1:
            raise self._wrong(node, f"{name}: {text[:20]!r} is not a number from {least} on")
        return int(text)

    def _choice(self, node: Any, choices: Sequence[str]) -> str:
        text = self._text(node)
        if text not in choices:
            raise self._wrong(node, f"{text!r} is none of {', '.join(choices)}")
        return text

    def _known(self, node: Any, names: set[str]) -> str:
        name = self._text(node)
        if name not in names:
            raise self._wrong(node, f"there is no execution {name!r}")
        return name


def _without_tabs(text: str) -> str:
    """JSON may be indented by tabs, which YAML refuses; within its strings it has none."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text.replace("\t", " ")


def _deepest_line(text: str) -> int:
    """The line with the most opening brackets."""
    counts = [line.count("[") + line.count("{") for line in text.splitlines()]
    return counts.index(max(counts)) + 1

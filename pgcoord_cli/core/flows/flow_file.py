"""Flow files: executions, the edges between them and a join policy for each downstream, in YAML or JSON.

The whole file is read and checked before anything is written. Each error names the file and the line: an unknown key, a
duplicate or unknown name, a duplicate edge, a cycle, a quorum that can never be reached.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple

from pgcoord_cli.core.flows.join_policy import JoinPolicy, OnSatisfied, PolicyKind
from pgcoord_cli.errors import UsageError

MAX_NAME = 200
"""Characters in the name of an execution."""

MAX_INTEGER = 2**31 - 1
"""The largest `integer`, the type of `max_attempts` and `required`."""

DEPENDENCY_KEYS = ("needs", "depends_on", "dependencies", "upstream", "upstreams", "after")
"""Keys that other workflow formats use in a task for what is an edge here."""


class PlannedExecution(NamedTuple):
    """An execution of a flow file. Without a `command`, the worker runs its own."""

    name: str
    command: list[str] | None = None
    max_attempts: int = 1
    instance_tag: str | None = None


class FlowPlan(NamedTuple):
    """The contents of a flow file. Edges are (upstream, downstream) names; the default policy is all_of."""

    namespace: str | None
    instance_tag: str | None
    executions: list[PlannedExecution]
    edges: list[tuple[str, str]]
    policies: dict[str, JoinPolicy]

    def upstreams(self) -> dict[str, list[str]]:
        """Returns the upstreams of each execution that has any, by name."""
        found: dict[str, list[str]] = {}
        for upstream, downstream in self.edges:
            found.setdefault(downstream, []).append(upstream)
        return found


def parse_flow(text: str, source: str) -> FlowPlan:
    """Returns the plan in the text of a flow file. Raises UsageError; its message begins with `source` and the line."""
    return _Reader(source).flow(text)


class _Reader:
    """Converts the YAML nodes of a document, each of which knows its line, and checks them."""

    def __init__(self, source: str) -> None:
        self._source = source

    def flow(self, text: str) -> FlowPlan:
        root = self._compose(text)
        if root is None:
            raise UsageError(
                f"{self._source}: the file is empty", hint="a flow file lists at least one execution; see docs/flows.md"
            )
        fields = self._mapping(
            root, "a flow file", "executions: [{name: build}]",
            {"namespace", "instance_tag", "executions", "edges", "policies"},
        )  # fmt: skip
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
            # Nodes instead of values: they keep their lines, and scalars keep their text, so that the name 1.50 or
            # yes stays a string.
            return yaml.compose(_without_tabs(text), Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise UsageError(f"{self._source}:{line}: invalid YAML: {error.problem}") from None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise UsageError(f"{self._source}:{line}: invalid YAML: {error.reason}") from None
        except RecursionError:
            raise UsageError(
                f"{self._source}:{_deepest_line(text)}: not a flow file: lists or mappings are nested too deeply"
            ) from None

    def _error(self, node: Any, message: str, hint: str | None = None) -> UsageError:
        return UsageError(f"{self._source}:{node.start_mark.line + 1}: {message}", hint=hint)

    # -- parts of the file

    def _executions(self, root: Any, fields: Mapping[str, Any]) -> list[PlannedExecution]:
        example = "executions: [{name: build}]"
        if "executions" not in fields:
            raise self._error(root, "`executions` is missing", hint=f"list at least one, for example {example}")
        nodes = fields["executions"]
        if not nodes.value:
            raise self._error(nodes, "`executions` is empty", hint=f"list at least one, for example {example}")
        found: dict[str, PlannedExecution] = {}
        for node in self._sequence(nodes, "`executions`", "executions", "[{name: build}]"):
            execution = self._execution(node)
            if execution.name in found:
                raise self._error(node, f"duplicate execution {execution.name!r}", hint="names are unique in a flow")
            found[execution.name] = execution
        return list(found.values())

    def _execution(self, node: Any) -> PlannedExecution:
        fields = self._mapping(
            node, "an execution", "{name: build}", {"name", "command", "max_attempts", "instance_tag"}
        )
        if "name" not in fields:
            raise self._error(node, "the execution has no `name`")
        name = self._text(fields["name"], "`name`")
        if not 0 < len(name) <= MAX_NAME:
            raise self._error(fields["name"], f"`name` must have 1 to {MAX_NAME} characters, not {len(name)}")
        attempts = self._number(fields["max_attempts"], "`max_attempts`") if "max_attempts" in fields else 1
        command = self._command(fields["command"]) if "command" in fields else None
        return PlannedExecution(name, command, attempts, self._optional_text(fields, "instance_tag"))

    def _command(self, node: Any) -> list[str]:
        words = self._sequence(node, "`command`", "words", '[sh, -c, "echo hi"]')
        if not words:
            raise self._error(node, "`command` is empty", hint="leave it out to run the command of the worker")
        return [self._text(word, "a word of `command`") for word in words]

    def _edges(self, fields: Mapping[str, Any], names: set[str]) -> list[tuple[str, str]]:
        found: dict[tuple[str, str], Any] = {}
        example = "{from: build, to: test}"
        nodes = self._sequence(fields["edges"], "`edges`", "edges", f"[{example}]") if "edges" in fields else []
        for node in nodes:
            ends = self._mapping(node, "an edge", example, {"from", "to"})
            if ends.keys() != {"from", "to"}:
                raise self._error(node, f"an edge must have `from` and `to`, for example {example}")
            edge = self._execution_name(ends["from"], names), self._execution_name(ends["to"], names)
            if edge in found:
                raise self._error(node, f"duplicate edge: {edge[0]} → {edge[1]}")
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
            # graphlib lists the cycle from predecessor to successor, the direction of the edges.
            cycle: Sequence[str] = error.args[1]
            raise self._error(
                edges[cycle[0], cycle[1]],
                f"a cycle: {' → '.join(cycle)}",
                hint="each of these executions would wait for itself; remove one of the edges",
            ) from None

    def _policies(
        self, fields: Mapping[str, Any], upstreams: Mapping[str, Sequence[str]], names: set[str]
    ) -> dict[str, JoinPolicy]:
        found: dict[str, JoinPolicy] = {}
        pairs = (
            self._pairs(fields["policies"], "`policies`", "{release: {kind: any_of}}") if "policies" in fields else ()
        )
        for key, node in pairs:
            name = self._execution_name(key, names)
            if name not in upstreams:
                raise self._error(key, f"{name!r} has no upstreams, so it cannot have a policy")
            found[name] = self._policy(node, name, len(upstreams[name]))
        return found

    def _policy(self, node: Any, name: str, size: int) -> JoinPolicy:
        fields = self._mapping(node, "a policy", "{kind: quorum, k: 2}", {"kind", "k", "on_satisfied"})
        kind, then = PolicyKind.ALL_OF, OnSatisfied.LET_RUN
        if "kind" in fields:
            kind = PolicyKind(self._choice(fields["kind"], "`kind`", list(PolicyKind)))
        if "on_satisfied" in fields:
            then = OnSatisfied(self._choice(fields["on_satisfied"], "`on_satisfied`", list(OnSatisfied)))
        if kind != PolicyKind.QUORUM:
            if "k" in fields:
                raise self._error(fields["k"], f"`k` belongs to kind quorum, not to {kind}")
            return JoinPolicy(kind, None, then)
        if "k" not in fields:
            raise self._error(node, "kind quorum needs `k`, the number of upstreams that must succeed")
        k = self._number(fields["k"], "`k`")
        if k > size:
            upstreams = "1 upstream" if size == 1 else f"{size} upstreams"
            raise self._error(fields["k"], f"`k` is {k}, but {name!r} has {upstreams}: it could never run")
        return JoinPolicy(kind, k, then)

    # -- kinds of nodes; `what` names the node in messages

    def _pairs(self, node: Any, what: str, example: str) -> Iterator[tuple[Any, Any]]:
        if node.id != "mapping":
            raise self._error(node, f"{what} must be a mapping, for example {example}")
        seen: set[str] = set()
        for key, value in node.value:
            if key.id != "scalar":
                raise self._error(key, f"a key of {what} must be a string, not a list or a mapping")
            if key.value in seen:
                raise self._error(key, f"duplicate key {key.value!r} in {what}")
            seen.add(key.value)
            yield key, value

    def _mapping(self, node: Any, what: str, example: str, known: set[str]) -> dict[str, Any]:
        found = {}
        for key, value in self._pairs(node, what, example):
            if key.value not in known:
                raise self._unknown_key(key, what, known)
            found[key.value] = value
        return found

    def _unknown_key(self, key: Any, what: str, known: set[str]) -> UsageError:
        hint = f"keys of {what}: {', '.join(sorted(known))}"
        if key.value in DEPENDENCY_KEYS:
            return self._error(key, f"unknown key {key.value!r}; edges are listed under 'edges'", hint)
        return self._error(key, f"unknown key {key.value!r} in {what}", _suggestion(key.value, known) or hint)

    def _sequence(self, node: Any, what: str, items: str, example: str) -> list[Any]:
        if node.id != "sequence":
            raise self._error(node, f"{what} must be a list of {items}, for example {example}")
        return list(node.value)

    def _text(self, node: Any, what: str) -> str:
        if node.id != "scalar" or node.tag == "tag:yaml.org,2002:null":
            found = "null" if node.id == "scalar" else f"a {'list' if node.id == 'sequence' else 'mapping'}"
            raise self._error(node, f"{what} must be a string, not {found}")
        # PostgreSQL's text cannot hold it; refused here, the error names the line.
        if "\0" in node.value:
            raise self._error(node, f"{what} must not contain a null byte (\\0)")
        try:
            # JSON writes a character beyond U+FFFF as two escapes, which YAML reads as two surrogates.
            return str(node.value).encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise self._error(node, f"{what} contains an unpaired surrogate, which is not a character") from None

    def _optional_text(self, fields: Mapping[str, Any], name: str) -> str | None:
        return self._text(fields[name], f"`{name}`") if name in fields else None

    def _number(self, node: Any, what: str) -> int:
        text = self._text(node, what)
        # The length is checked first: int() of thousands of digits is slow, and Python refuses it.
        if not text.isdecimal() or len(text) > 10 or not 1 <= int(text) <= MAX_INTEGER:
            raise self._error(node, f"{what} must be an integer from 1 to {MAX_INTEGER}, not {text[:20]!r}")
        return int(text)

    def _choice(self, node: Any, what: str, choices: Sequence[str]) -> str:
        text = self._text(node, what)
        if text not in choices:
            raise self._error(node, f"{what} must be one of {', '.join(choices)}, not {text!r}")
        return text

    def _execution_name(self, node: Any, names: set[str]) -> str:
        name = self._text(node, "the name of an execution")
        if name not in names:
            raise self._error(node, f"there is no execution {name!r}", _suggestion(name, names))
        return name


def _suggestion(text: str, known: Collection[str]) -> str | None:
    from difflib import get_close_matches

    near = get_close_matches(text, sorted(known), n=1)
    return f"did you mean {near[0]!r}?" if near else None


def _without_tabs(text: str) -> str:
    """Replaces the tabs of a JSON document by spaces: YAML refuses tabs as indentation, and JSON strings hold none."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text.replace("\t", " ")


def _deepest_line(text: str) -> int:
    """Returns the number, from 1, of the line with the most opening brackets."""
    counts = [line.count("[") + line.count("{") for line in text.splitlines()]
    return counts.index(max(counts)) + 1

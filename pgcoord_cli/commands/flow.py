"""`pgcoord flow`: creates, shows and cancels flows, graphs of executions that depend on each other."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pgcoord_cli.commands.framework import Limit, command, identifier, noun, output_of
from pgcoord_cli.errors import UsageError
from pgcoord_cli.settings import OutputFormat, check_text

app = noun("Create, show and cancel flows: graphs of executions that depend on each other.")

FlowId = Annotated[
    str, typer.Argument(metavar="FLOW_ID", help="The UUID of the flow, as flow create and flow list print it.")
]


class Drawing(StrEnum):
    """The formats in which a flow is drawn."""

    TREE = "tree"
    MERMAID = "mermaid"
    DOT = "dot"
    JSON = "json"


@command(app, "create")
def create(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A flow file in YAML or JSON; - for standard input.")],
    check: Annotated[bool, typer.Option("--check", help="Only check the file; needs no database.")] = False,
) -> None:
    """Create a flow from a file: executions, the edges between them, and their join policies.

    The whole file is checked before anything is written; errors name the line. Executions without upstream executions
    are eligible at once.

    \b
    Examples:
      pgcoord flow create release.yaml
      pgcoord flow create release.yaml --check
      echo '{"executions": [{"name": "once", "command": ["date"]}]}' | pgcoord flow create - -o plain
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.flows import flows
    from pgcoord_cli.core.flows.flow_file import parse_flow

    settings, out = output_of(ctx)
    plan = parse_flow(_text_of(file), "standard input" if file == "-" else file)
    if check:
        out.note(f"{file}: {len(plan.executions)} executions, {len(plan.edges)} edges")
        return
    with session.command_session(settings, "flow create", writes=True) as conn:
        created = flows.create(conn, plan)
    ids = {name: str(execution_id) for name, execution_id in created.executions.items()}
    out.value({"flow_id": str(created.flow_id), "executions": ids}, str(created.flow_id))


def _text_of(file: str) -> str:
    from pgcoord_cli.commands.standard_input import stdin_bytes

    try:
        data = stdin_bytes().read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise UsageError(f"FILE: cannot read {file}: {error.strerror}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{file}: not UTF-8 text") from None


@command(app, "show")
def show(
    ctx: typer.Context,
    flow_id: FlowId,
    drawing: Annotated[
        Drawing, typer.Option("--format", metavar="|".join(Drawing), help="Format of the drawing.")
    ] = Drawing.TREE,
) -> None:
    """Draw a flow with the states of its executions.

    \b
    Examples:
      pgcoord flow show 6f1c…
      pgcoord flow show 6f1c… --format mermaid > flow.mmd
      pgcoord flow show 6f1c… -o json | jq '.executions[] | select(.state == "failed")'
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.flows import flows
    from pgcoord_cli.render import graph

    settings, out = output_of(ctx)
    if drawing == Drawing.JSON:
        out.format = OutputFormat.JSON
    wanted = identifier(flow_id, "FLOW_ID")
    with session.command_session(settings, "flow show", writes=False) as conn:
        document = flows.flow_document(conn, wanted)
    if drawing == Drawing.MERMAID:
        out.lines(graph.mermaid_lines(document))
    elif drawing == Drawing.DOT:
        out.lines(graph.dot_lines(document))
    elif out.format == OutputFormat.TABLE:
        out.lines(graph.tree_lines(document, colored=out.colored(sys.stdout)))
    else:
        out.document(document)


@command(app, "list")
def list_(
    ctx: typer.Context,
    namespace: Annotated[str | None, typer.Option("--namespace", metavar="NS", help="Only of this namespace.")] = None,
    limit: Limit = 20,
) -> None:
    """List flows, newest first, with the numbers of their executions, unfinished and failed.

    \b
    Examples:
      pgcoord flow list
      pgcoord flow list --namespace deploys -o jsonl
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.flows import flows

    settings, out = output_of(ctx)
    check_text(namespace, "--namespace")
    with session.command_session(settings, "flow list", writes=False) as conn:
        found = flows.list_flows(conn, namespace, limit)
    columns = ["flow_id", "namespace", "instance_tag", "created_at", "executions", "unfinished", "failed"]
    out.rows(columns, found, empty="there are no flows")


@command(app, "cancel")
def cancel(ctx: typer.Context, flow_id: FlowId) -> None:
    """Cancel the executions of a flow that have not ended; workers stop their commands at the next renewal.

    \b
    Examples:
      pgcoord flow cancel 6f1c…
    """
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.flows import flows

    settings, out = output_of(ctx)
    wanted = identifier(flow_id, "FLOW_ID")
    with session.command_session(settings, "flow cancel", writes=True) as conn:
        cancelled = flows.cancel(conn, wanted)
    out.document({"flow_id": str(wanted), "cancelled": cancelled})

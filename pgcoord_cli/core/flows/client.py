"""Flows from a program: create flows, and be a worker for their executions, over one connection.

    with open_flows() as flows:
        flows.create(text)
        for claim in flows.claim("worker-1", seconds=60):
            do(claim.name)
            flows.complete(claim)

Each call is one statement or transaction of its own. `core.flows.flows` and `core.flows.executions` describe what they
do; completions are dispatched to the executions that wait for them by `pgcoord leader run --with dispatch`,
`pgcoord worker run` or `pgcoord reconcile`.
"""

from __future__ import annotations

from datetime import datetime
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from psycopg import Connection

from pgcoord_cli.core.database.session import open_session
from pgcoord_cli.core.flows import executions
from pgcoord_cli.core.flows import flows as graphs
from pgcoord_cli.core.flows.executions import DEFAULT_LEASE_SECONDS, Claim
from pgcoord_cli.core.flows.flow_file import parse_flow
from pgcoord_cli.core.flows.flows import CreatedFlow
from pgcoord_cli.db.connection import mapped_errors
from pgcoord_cli.settings import resolve_arguments


def open_flows(dsn: str | None = None, *, schema: str | None = None, application: str = "flows") -> Flows:
    """Opens a connection for flows of the cluster in `schema` of the database at `dsn`, a connection string of libpq.

    What is left out comes from PGCOORD_DSN, PGCOORD_SCHEMA and libpq's environment. The session is named
    `pgcoord/<application>` in pg_stat_activity. Use the result with `with`, or close it.

    Raises UsageError for a malformed argument, ConnectionFailed, SchemaMissing, SchemaUnknown, UnsuitableServer.
    """
    return Flows(open_session(resolve_arguments(dsn, schema), application, writes=True))


class Flows:
    """Flows and their executions, over one connection; threads that share it take turns. Made by `open_flows`.

    Every method raises ConnectionFailed once the connection is lost or closed: open another one. A statement that was
    under way may have taken effect.
    """

    def __init__(self, conn: Connection[Any]) -> None:
        self._conn = conn

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection. Leases that were claimed stay until they expire."""
        self._conn.close()

    def create(self, text: str) -> CreatedFlow:
        """Creates a flow from the text of a flow file, YAML or JSON; returns the ids of the flow and its executions.

        Raises UsageError, with the line, if anything in the text is wrong; nothing is created then.
        """
        with mapped_errors():
            return graphs.create(self._conn, parse_flow(text, "flow"))

    def show(self, flow_id: UUID) -> dict[str, Any]:
        """Returns a flow with its executions and edges, as `pgcoord flow show -o json` has them.

        Raises ConditionFalse if there is no such flow.
        """
        with mapped_errors():
            return graphs.flow_document(self._conn, flow_id)

    def cancel(self, flow_id: UUID) -> int:
        """Cancels the executions of a flow that have not ended; returns how many those were.

        Raises ConditionFalse if there is no such flow.
        """
        with mapped_errors():
            return graphs.cancel(self._conn, flow_id)

    def claim(
        self,
        owner: str,
        seconds: float = DEFAULT_LEASE_SECONDS,
        *,
        limit: int = 1,
        namespace: str | None = None,
        instance_tag: str | None = None,
    ) -> list[Claim]:
        """Leases up to `limit` eligible executions to `owner` for `seconds`, the oldest first; returns the claims.

        Returns an empty list at once if there are none. `namespace` and `instance_tag` restrict the executions.
        """
        with mapped_errors():
            return executions.claim(
                self._conn, owner, seconds, limit=limit, namespace=namespace, instance_tag=instance_tag
            )

    def renew(self, claim: Claim, seconds: float = DEFAULT_LEASE_SECONDS) -> datetime:
        """Renews a lease for `seconds` from now on; returns when it expires. Raises Fenced if the lease has ended."""
        with mapped_errors():
            return executions.renew(self._conn, claim.execution_id, claim.lease_epoch, seconds)

    def complete(self, claim: Claim) -> None:
        """Ends an execution with success. Raises Fenced if the lease has ended; nothing is changed then."""
        with mapped_errors():
            executions.complete(self._conn, claim.execution_id, claim.lease_epoch)

    def fail(self, claim: Claim, reason: str | None = None) -> str:
        """Ends an attempt with a failure; returns `eligible` if another attempt follows, else `failed`.

        Raises Fenced if the lease has ended; nothing is changed then.
        """
        with mapped_errors():
            return executions.fail(self._conn, claim.execution_id, claim.lease_epoch, reason)

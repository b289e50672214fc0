"""Explaining the outcome of a commit request: its reads, writes, epoch and times, and the commit that it lost to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple
from uuid import UUID

from psycopg import Connection

from pgcoord_cli.core.commits import codec
from pgcoord_cli.core.commits.codec import Op, Range, Request, Undecodable
from pgcoord_cli.core.commits.conflict_window import ConflictWindow
from pgcoord_cli.core.commits.mutations import with_stamps, writes_of
from pgcoord_cli.core.commits.requests import CommitRequest, Status, find_request
from pgcoord_cli.db.sqlfiles import sql


class ConflictingCommit(NamedTuple):
    """The commit that a request conflicted with; `wrote` lists the reads of the request that it wrote."""

    request_id: UUID
    commit_version: int
    wrote: list[str]


def explain(conn: Connection[Any], request_id: UUID) -> dict[str, Any] | None:
    """Returns all that is stored about a request as a nested record, or None if there is no such request.

    The record of a conflict has `lost_to`: the conflicting commit, or a reason if it has been garbage-collected.
    """
    found = find_request(conn, request_id)
    if found is None:
        return None
    (payload,) = conn.execute(sql("commits", "payload"), [request_id]).fetchone() or (b"",)
    record: dict[str, Any] = {"request": found._asdict(), "timeline": _timeline(found)}
    try:
        request = codec.decode(payload)
    except Undecodable as error:
        return record | {"payload": {"bytes": len(payload), "undecodable": str(error)}}
    record |= {"reads": _reads(request), "writes": _writes(request)}
    if found.status == Status.CONFLICT:
        commit = _conflicting_commit(conn, found, request)
        record["lost_to"] = commit._asdict() if commit else {"request_id": None, "reason": "garbage-collected since"}
    return record


def _timeline(found: CommitRequest) -> dict[str, Any]:
    waited = (found.resolved_at - found.created_at).total_seconds() if found.resolved_at else None
    return {"created_at": found.created_at, "resolved_at": found.resolved_at, "seconds_to_resolve": waited}


def _reads(request: Request) -> dict[str, Any]:
    return {"keys": [shown(key) for key in request.read_keys], "ranges": [_interval(r) for r in request.read_ranges]}


def _writes(request: Request) -> dict[str, Any]:
    return {
        "mutations": [f"{m.op.name.lower()} {_target(m.op, m.key, m.operand)}" for m in request.mutations],
        "conflict_ranges": [_interval(interval) for interval in request.write_ranges],
    }


def _target(op: Op, key: bytes, operand: bytes | None) -> str:
    return _interval((key, operand)) if op == Op.CLEAR_RANGE else shown(key)


def shown(key: bytes) -> str:
    """Returns a key as text, or as hexadecimal with 0x in front if it is not text."""
    return key.decode() if codec.is_text(key) else f"0x{key.hex()}"


def _interval(interval: Range) -> str:
    begin, end = interval
    return f"[{shown(begin)}, {'…' if end is None else shown(end)})"


def _conflicting_commit(conn: Connection[Any], found: CommitRequest, request: Request) -> ConflictingCommit | None:
    """Returns the first stored commit above the read version that wrote a key or range that the request read."""
    (last,) = conn.execute(sql("commits", "version_before"), [found.request_id]).fetchone() or (0,)
    for request_id, version, payload in conn.execute(sql("commits", "commits_between"), [found.read_version, last]):
        keys, ranges = writes_of(with_stamps(codec.decode(payload), version))
        if wrote := list(_overlap(request, keys, ranges)):
            return ConflictingCommit(request_id, version, wrote)
    return None


def _overlap(request: Request, keys: list[bytes], ranges: list[Range]) -> Iterable[str]:
    """Returns the reads of the request that conflict with the writes, as text."""
    # The window itself is asked, so that the explanation cannot differ from the decision of the resolver.
    window = ConflictWindow(0)
    window.record(1, keys, ranges)
    yield from (shown(key) for key in request.read_keys if window.conflicts(0, [key], []))
    yield from (_interval(interval) for interval in request.read_ranges if window.conflicts(0, [], [interval]))

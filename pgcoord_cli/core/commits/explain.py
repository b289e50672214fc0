"""Explaining the outcome of a commit request: its reads, writes, epoch and times, and the commit that it lost to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from uuid import UUID

from psycopg import Connection

from pgcoord_cli.core.commits import codec
from pgcoord_cli.core.commits.codec import Op, Range, Request, Undecodable
from pgcoord_cli.core.commits.conflict_window import ConflictWindow
from pgcoord_cli.core.commits.mutations import with_stamps, writes_of
from pgcoord_cli.core.commits.requests import CommitRequest, Status, find_request
from pgcoord_cli.db.sqlfiles import sql

PAGE = 500
"""Requests that one statement reads."""

MAX_PAGES = 200
"""Pages that are read at most on each side of a request."""


NOT_STORED = "garbage-collected since"
"""Why the conflicting commit is not shown."""


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
        record["lost_to"] = commit._asdict() if commit else {"request_id": None, "reason": NOT_STORED}
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
    first: ConflictingCommit | None = None
    for request_id, version, payload in _commits_around(conn, found):
        if first is None or version < first.commit_version:
            keys, ranges = writes_of(with_stamps(codec.decode(payload), version))
            if wrote := list(_overlap(request, keys, ranges)):
                first = ConflictingCommit(request_id, version, wrote)
    return first


Commit = tuple[UUID, int, bytes]
"""Request id, commit version and payload."""


def _commits_around(conn: Connection[Any], found: CommitRequest) -> Iterator[Commit]:
    """Yields the commits above the read version of a request that were settled before it, in no particular order.

    No index has the versions, which every commit would have to maintain. But requests are claimed in the order of
    their ids, so versions ascend with ids but for requests that became visible late: those that are wanted have ids
    near the one of the request. At most MAX_PAGES pages are read on each side.
    """
    yield from _earlier_commits(conn, found)
    yield from _overtaking_commits(conn, found)


def _earlier_commits(conn: Connection[Any], found: CommitRequest) -> Iterator[Commit]:
    """Yields commits with lower ids, down to a page of which all commits were visible to the request's reads."""
    last_id = found.id
    for _ in range(MAX_PAGES):
        page = conn.execute(sql("commits", "requests_before"), [last_id, PAGE, found.read_version]).fetchall()
        # Ascending, so that the first one that is found spares the caller most others of the page.
        commits = ((request_id, version, payload) for request_id, version, _, payload in reversed(page))
        yield from (commit for commit in commits if commit[2] is not None)
        versions = [version for _, version, _, _ in page if version is not None]
        if len(page) < PAGE or (versions and max(versions) <= found.read_version):
            return
        last_id = page[-1][2]


def _overtaking_commits(conn: Connection[Any], found: CommitRequest) -> Iterator[Commit]:
    """Yields commits with higher ids that were settled before the request, up to a page that was enqueued later."""
    last_id = found.id
    for _ in range(MAX_PAGES):
        page = conn.execute(sql("commits", "requests_after"), [last_id, PAGE, found.read_version, found.id]).fetchall()
        yield from ((request_id, version, payload) for request_id, version, *_, payload in page if payload is not None)
        if len(page) < PAGE or all(is_later for *_, is_later, _ in page):
            return
        last_id = page[-1][2]


def _overlap(request: Request, keys: list[bytes], ranges: list[Range]) -> Iterable[str]:
    """Returns the reads of the request that conflict with the writes, as text."""
    # The window itself is asked, so that the explanation cannot differ from the decision of the resolver.
    window = ConflictWindow(0)
    window.record(1, keys, ranges)
    yield from (shown(key) for key in request.read_keys if window.conflicts(0, [key], []))
    yield from (_interval(interval) for interval in request.read_ranges if window.conflicts(0, [], [interval]))

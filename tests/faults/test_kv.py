"""`pgcoord kv txn` and `pgcoord kv watch`: raced against other writers, and killed."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from pgcoord_cli.settings import Settings
from tests.asking import until, value
from tests.faults.program_process import ProgramProcess, starter

if TYPE_CHECKING:
    from tests.conftest import Call, LeaderProcess, StartLeader

Sql = psycopg.Connection[Any]
StartKv = Callable[..., ProgramProcess]


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[StartKv]:
    """Starts `pgcoord kv …` on the test's database."""
    with starter(ProgramProcess, ["kv"], partial(request.getfixturevalue, "settings")) as starter_:
        yield starter_


@pytest.fixture
def leader(start_leader: StartLeader) -> LeaderProcess:
    """An elected leader whose lease outlasts the test."""
    started = start_leader("n1", "--ttl", "60s")
    started.wait_for("elected epoch 1")
    return started


@pytest.fixture
def commits_blocked(settings: Settings) -> Callable[[], Any]:
    """Blocks every commit while the block runs: they all write the row of the lease. Reads go on."""

    @contextmanager
    def block() -> Iterator[None]:
        with psycopg.connect(settings.dsn, options="-c search_path=pgcoord") as conn:
            conn.execute("SELECT FROM leader_lease FOR UPDATE")
            yield

    return block


def under_way(sql: Sql) -> int:
    """Returns how many `kv txn` have sent their commit: by a statement that is blocked, or into the queue."""
    blocked = "datname = current_database() AND application_name = 'pgcoord/kv txn' AND wait_event_type = 'Lock'"
    text = f"SELECT count(*) FROM pg_stat_activity WHERE {blocked}"
    pending = value(sql, "SELECT count(*) FROM commit_requests WHERE status = 'pending'")
    return int(value(sql, text)) + int(pending)


def data(sql: Sql) -> dict[bytes, bytes]:
    return dict(sql.execute("SELECT key, value FROM kv").fetchall())


def write(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(path)


# kv txn


@pytest.mark.usefixtures("leader")
def test_i1_of_two_transactions_that_compare_the_same_value_one_commits(
    start: StartKv, sql: Sql, tmp_path: Path, commits_blocked: Callable[[], Any]
) -> None:
    sql.execute("INSERT INTO kv VALUES ('owner', 'none')")
    claims = [
        write(
            tmp_path / name,
            {"compare": {"key": "owner", "value": "none"}},
            {"set": {"key": "owner", "value": name}},
            {"set": {"key": f"by {name}", "value": ""}},
        )
        for name in ("one", "two")
    ]
    with commits_blocked():
        racing = [start("txn", claim, "-o", "json", "--timeout", "60s") for claim in claims]
        until(lambda: under_way(sql) == 2)
    ends = [process.ended() for process in racing]
    assert sorted(code for code, _, _ in ends) == [0, 3]
    winner = "one" if ends[0][0] == 0 else "two"
    assert data(sql) == {b"owner": winner.encode(), f"by {winner}".encode(): b""}
    (lost,) = [json.loads("".join(out)) for code, out, _ in ends if code == 3]
    assert lost == {
        "committed": False,
        "version": 1,
        "failed": [{"line": 1, "key": "owner", "value": winner, "encoding": "utf-8"}],
    }


@pytest.mark.usefixtures("leader")
def test_a_transaction_that_conflicts_is_run_again(
    start: StartKv, sql: Sql, tmp_path: Path, commits_blocked: Callable[[], Any]
) -> None:
    additions = [
        write(
            tmp_path / name,
            {"compare": {"key": "log", "exists": True}},
            {"append_if_fits": {"key": "log", "value": name}},
        )
        for name in ("one", "two")
    ]
    sql.execute("INSERT INTO kv VALUES ('log', '')")
    with commits_blocked():
        racing = [start("txn", addition, "-o", "json", "--timeout", "60s") for addition in additions]
        until(lambda: under_way(sql) == 2)
    ends = [process.ended() for process in racing]
    assert [code for code, _, _ in ends] == [0, 0]
    assert {json.loads("".join(out))["version"] for _, out, _ in ends} == {1, 2}
    assert data(sql)[b"log"] in (b"onetwo", b"twoone")
    assert value(sql, "SELECT count(*) FROM commit_requests WHERE status = 'conflict'") == 1


@pytest.mark.usefixtures("leader")
def test_i3_a_transaction_that_is_killed_is_made_whole_or_not_at_all(
    start: StartKv, call: Call, sql: Sql, tmp_path: Path, commits_blocked: Callable[[], Any]
) -> None:
    sql.execute("INSERT INTO kv SELECT convert_to('old/' || i, 'UTF8'), '' FROM generate_series(1, 100) AS i")
    before = data(sql)
    moves: list[dict[str, Any]] = [
        {"compare": {"key": "old/1", "exists": True}},
        {"clear_range": {"prefix": "old/"}},
        *({"set": {"key": f"new/{number}", "value": ""}} for number in range(100)),
    ]
    file = write(tmp_path / "txn", *moves)
    with commits_blocked():
        running = start("txn", file, "--timeout", "60s")
        until(lambda: under_way(sql) == 1)
        running.signal(signal.SIGKILL)
        running.process.wait()
        assert data(sql) == before
    settled = "datname = current_database() AND application_name = 'pgcoord/kv txn'"
    until(lambda: value(sql, f"SELECT count(*) FROM pg_stat_activity WHERE {settled}") == 0 and under_way(sql) == 0)
    after = {f"new/{number}".encode(): b"" for number in range(100)}
    assert data(sql) in (before, after)
    # The same call again ends in the same state, whether the first was made or not.
    assert call("kv", "txn", file).code in (0, 3)
    assert data(sql) == after

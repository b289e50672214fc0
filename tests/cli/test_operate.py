"""Operation of a running cluster: bulk data, explanations, stepping down, fences for scripts."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
import pytest

from pgcoord_cli.core.kv.client import open_database
from pgcoord_cli.errors import Conflict

if TYPE_CHECKING:
    from pgcoord_cli.settings import Settings
    from tests.conftest import Cli, StartLeader


def lines_of(count: int) -> str:
    """Returns `count` lines as `kv load` reads them, the last one binary."""
    records: list[dict[str, str]] = [{"key": f"k{number:03}", "value": f"v{number}"} for number in range(count - 1)]
    records.append({"key": "fe01", "value": "fe", "encoding": "hex"})
    return "".join(json.dumps(record) + "\n" for record in records)


def test_an_export_is_loaded_without_a_difference(
    cli: Cli, start_leader: StartLeader, tmp_path: Path, sql: psycopg.Connection[Any]
) -> None:
    start_leader("A").wait_for("elected epoch")
    file = tmp_path / "data.jsonl"
    file.write_text(lines_of(25))
    loaded = cli("kv", "load", str(file), "--batch-size", "10", "-o", "json")
    assert json.loads(loaded.stdout) == {"loaded": 25, "transactions": 3, "resumed_at": 0}
    exported = cli("kv", "export").stdout
    records = [json.loads(line) for line in exported.splitlines()]
    assert len(records) == 25
    assert {record["version"] for record in records} == {durable_version(sql)}
    assert cli("kv", "clear-range", "k", "l").returncode == 0
    assert sql.execute("SELECT count(*) FROM kv").fetchone() == (1,)
    assert cli("kv", "load", "-", stdin=exported).returncode == 0
    again = [json.loads(line) for line in cli("kv", "export").stdout.splitlines()]
    assert again == [record | {"version": durable_version(sql)} for record in records]


def durable_version(sql: psycopg.Connection[Any]) -> int:
    """Returns the durable version."""
    (version,) = sql.execute("SELECT durable_version FROM leader_lease").fetchone() or (0,)
    return int(version)


@pytest.mark.parametrize("encoding", ["HEX", "base64", 5, None])
def test_a_load_does_not_guess_at_an_encoding(
    encoding: object, cli: Cli, start_leader: StartLeader, sql: psycopg.Connection[Any]
) -> None:
    start_leader("A").wait_for("elected epoch")
    refused = cli("kv", "load", "-", stdin=json.dumps({"key": "00", "value": "ff", "encoding": encoding}))
    assert refused.returncode == 2
    assert "stdin, line 1: the encoding" in refused.stderr
    assert sql.execute("SELECT count(*) FROM kv").fetchone() == (0,)


def test_an_aborted_load_resumes_after_its_last_commit(
    cli: Cli, start_leader: StartLeader, tmp_path: Path, sql: psycopg.Connection[Any]
) -> None:
    start_leader("A").wait_for("elected epoch")
    good, file = lines_of(20), tmp_path / "data.jsonl"
    # The twelfth line cannot be decoded: one batch of ten is committed, with its progress.
    broken = good.splitlines(keepends=True)
    broken[11] = "{}\n"
    file.write_text("".join(broken))
    refused = cli("kv", "load", str(file), "--batch-size", "10")
    assert refused.returncode == 2
    assert "line 12" in refused.stderr
    sql.execute("DELETE FROM kv WHERE key = 'k000'")  # lines before the stored progress are not written again
    again = cli("kv", "load", str(file), "--batch-size", "10")
    assert re.search(r"line 2 after byte \d+: not a JSON object", again.stderr)
    assert sql.execute("SELECT count(*) FROM kv WHERE key < '\\xff'").fetchone() == (9,)


def test_additions_add_up_and_may_be_negative(cli: Cli, start_leader: StartLeader) -> None:
    start_leader("A").wait_for("elected epoch")
    assert cli("kv", "add", "visits", "7").returncode == 0
    assert cli("kv", "add", "visits", "--", "-2").returncode == 0
    assert cli("kv", "get", "visits", "--integer", "-o", "plain").stdout == "5\n"


def test_a_conflict_is_explained_by_the_commit_that_caused_it(
    cli: Cli, start_leader: StartLeader, settings: Settings, sql: psycopg.Connection[Any]
) -> None:
    start_leader("A").wait_for("elected epoch")

    async def lose() -> None:
        async with await open_database(settings) as database:
            first, second = database.transaction(), database.transaction()
            for transaction in (first, second):
                await transaction.get(b"key")
                transaction.set(b"key", b"value")
            await first.commit()
            with pytest.raises(Conflict):
                await second.commit()

    asyncio.run(lose())
    ids: dict[str, UUID] = dict(sql.execute("SELECT status, request_id FROM commit_requests").fetchall())
    explained = json.loads(cli("commit", "explain", str(ids["conflict"]), "-o", "json").stdout)
    assert explained["lost_to"] == {"request_id": str(ids["committed"]), "commit_version": 1, "wrote": ["key"]}
    assert explained["reads"] == {"keys": ["key"], "ranges": []}
    assert explained["writes"]["mutations"] == ["set key"]
    assert explained["request"]["epoch"] == 1


def test_a_leader_that_steps_down_hands_over_and_the_history_records_it(cli: Cli, start_leader: StartLeader) -> None:
    start_leader("A", "--ttl", "60s").wait_for("elected epoch 1")
    standby = start_leader("B", "--ttl", "60s")
    standby.wait_for("candidate:")
    handed = json.loads(cli("leader", "step-down", "--wait", "-o", "json").stdout)
    assert (handed["asked_epoch"], handed["asked_leader"], handed["epoch"]) == (1, "A", 2)
    newest, oldest = json.loads(cli("leader", "history", "-o", "json").stdout)
    assert (oldest["leader_addr"], oldest["end_reason"]) == ("A", "stepped down")
    assert (newest["epoch"], newest["end_reason"]) == (2, None)
    assert cli("kv", "set", "after", "it").returncode == 0


def test_i2_an_epoch_is_asserted_only_during_its_term(cli: Cli, start_leader: StartLeader) -> None:
    leader = start_leader("A")
    leader.wait_for("elected epoch 1")
    assert cli("leader", "assert", "--epoch", "1").returncode == 0
    assert cli("leader", "assert", "--epoch", "2").returncode == 6
    leader.signal(signal.SIGTERM)
    leader.wait_for("released")
    gone = cli("leader", "assert", "--epoch", "1", "-o", "json")
    assert gone.returncode == 6
    assert json.loads(gone.stdout)["error"]["code"] == "fenced"


def test_waiting_for_a_leader_ends_at_its_deadline_and_at_once_when_there_is_one(
    cli: Cli, start_leader: StartLeader
) -> None:
    assert cli("leader", "wait", "--timeout", "100ms").returncode == 124
    start_leader("A").wait_for("candidate:")
    waited = cli("leader", "wait", "-o", "json")
    assert json.loads(waited.stdout) == {"epoch": 1, "leader_addr": "A"}


def test_a_leader_that_renews_but_does_not_drain_is_unhealthy(
    cli: Cli, start_leader: StartLeader, sql: psycopg.Connection[Any]
) -> None:
    start_leader("A").wait_for("elected epoch")
    with sql.transaction():
        sql.execute("LOCK TABLE kv IN SHARE MODE")
        assert cli("kv", "add", "stuck", "1", "--timeout", "200ms").returncode == 10
        with psycopg.connect(sql.info.dsn, autocommit=True) as other:
            other.execute("UPDATE pgcoord.commit_requests SET created_at = created_at - interval '1 minute'")
        status = cli("leader", "status", "-o", "json")
    assert status.returncode == 3
    document = json.loads(status.stdout)
    assert document["leader"]["held"] is True
    assert "pending for 6" in document["health"]["reason"]


def test_the_benchmark_measures_and_removes_its_keys(
    cli: Cli, start_leader: StartLeader, sql: psycopg.Connection[Any]
) -> None:
    start_leader("A").wait_for("elected epoch")
    measured = json.loads(cli("bench", "--duration", "300ms", "--in-flight", "4", "-o", "json").stdout)["bench"]
    assert measured["commits"] > 0
    assert len(measured["rates"]) == 10
    assert sql.execute("SELECT count(*) FROM kv").fetchone() == (0,)

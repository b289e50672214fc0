"""What CONTRIBUTING.md says of failing tests: kept servers stay, and the query for locks shows who waits for whom."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import psycopg

from tests.asking import until, value

if TYPE_CHECKING:
    from pgcoord_cli.settings import Settings

ROOT = Path(__file__).resolve().parents[2]

ONE_TEST = "tests/postgres/test_gc.py::test_a_run_on_an_empty_table_deletes_nothing"


def test_a_kept_server_stays_with_its_databases_and_log_until_it_is_ended() -> None:
    words = [sys.executable, "-m", "pytest", "-q", "-n", "1", "--keep-server", ONE_TEST]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    (kept,) = re.findall(r"^dsn  (\S+)\nlog  (\S+)\npid  (\d+)\nend  (.+)$", done.stdout, re.MULTILINE)
    dsn, log, pid, end = kept
    try:
        with psycopg.connect(dsn, autocommit=True) as conn:
            copies = value(conn, "SELECT array_agg(datname) FROM pg_database WHERE datname ~ '^test_'")
            assert len(copies) == 1
            assert int(pid) == int((Path(log).parent / "data" / "postmaster.pid").read_text().split()[0])
        assert "FROM commit_requests" in Path(log).read_text()
    finally:
        subprocess.run([sys.executable, *shlex.split(end)[1:]], cwd=ROOT, check=True)
    assert not Path(log).parent.exists()


def test_the_query_for_locks_shows_holder_and_waiter(settings: Settings, sql: psycopg.Connection[Any]) -> None:
    (query,) = re.findall(r"```sql\n(SELECT activity.pid.*?;)\n```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)

    def wait() -> None:
        with psycopg.connect(settings.dsn, application_name="waiter") as conn:
            conn.execute("UPDATE pgcoord.leader_lease SET epoch = epoch")

    def found() -> dict[tuple[str, bool], list[int]]:
        cursor = sql.execute(query)
        columns = [column.name for column in cursor.description or ()]
        rows = [dict(zip(columns, row, strict=True)) for row in cursor]
        return {(row["application"], row["granted"]): row["blocked_by"] for row in rows}

    with psycopg.connect(settings.dsn, application_name="holder") as holder:
        holder.execute("SELECT FROM pgcoord.leader_lease FOR UPDATE")
        waiter = Thread(target=wait)
        waiter.start()
        until(lambda: ("waiter", False) in found())
        assert found()["waiter", False] == [holder.info.backend_pid]
        assert ("holder", True) in found()
        holder.rollback()
        waiter.join()

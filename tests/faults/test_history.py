"""Histories of an outbox that end: crashes, failovers, restores and truncations that give ids out again (rule I21)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from pgcoord_cli.core.database.upgrade import upgrade
from pgcoord_cli.core.embedded.installation import Installation
from pgcoord_cli.core.embedded.server import temporary_server
from pgcoord_cli.settings import Settings
from tests.asking import until, value
from tests.faults.replication import Pair, a_pair
from tests.faults.tail_process import Sql, StartTail, add, add_named, tail_starter, until_asleep

if TYPE_CHECKING:
    from tests.conftest import Answer, Call

Tail = Callable[..., "Answer"]


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[StartTail]:
    """Starts `pgcoord tail …` on the test's database."""
    with tail_starter(partial(request.getfixturevalue, "settings")) as starter:
        yield starter


@pytest.fixture
def tail(call: Call) -> Tail:
    """Runs `pgcoord tail lease --no-follow -o json …` in this process."""
    return lambda *words: call("tail", "lease", "--no-follow", "-o", "json", *words)


@pytest.fixture(params=["--cursor-file", "--subscription"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """The option that stores the position of a tail, and its value."""
    return request.param, str(tmp_path / "cursor") if request.param == "--cursor-file" else "mailer"


@contextmanager
def connected(settings: Settings) -> Iterator[Sql]:
    with psycopg.connect(settings.dsn, autocommit=True, options="-c search_path=pgcoord") as conn:
        yield conn


def executions(answer: Answer) -> list[str]:
    """The executions of the events that were printed."""
    assert answer.code == 0, answer
    return [json.loads(line)["execution_id"] for line in answer.out.splitlines()]


def restart_identity(sql: Sql) -> None:
    sql.execute("TRUNCATE lease_events RESTART IDENTITY")


def resumed_at(answer: Answer) -> str:
    """The cursor that the refusal of a position suggests; fails unless it is one of another history."""
    assert (answer.code, answer.error["code"]) == (8, "history_changed"), answer
    hint = str(answer.error["hint"])
    assert hint.startswith("resume at the first event inserted since"), hint
    return next(word for word in hint.split() if word.startswith("02"))


# -- stored positions


def test_i21_a_stored_position_of_a_truncated_outbox_is_refused(tail: Tail, sql: Sql, store: tuple[str, str]) -> None:
    """Ids are given out again, beyond the position even."""
    add(sql, 3)
    assert len(executions(tail(*store, "--from-start"))) == 3
    restart_identity(sql)
    new = add_named(sql, 5)
    cursor = resumed_at(tail(*store))
    assert executions(tail("--from", cursor)) == new


def test_i21_what_a_filter_left_out_counts_as_passed(tail: Tail, sql: Sql, store: tuple[str, str]) -> None:
    add(sql, 3)
    words = (*store, "--namespace", "none")
    assert executions(tail(*words, "--from-start")) == []
    restart_identity(sql)
    add(sql, 5)
    assert tail(*words).code == 8


def test_i21_the_hint_moves_the_stored_position(tail: Tail, call: Call, sql: Sql) -> None:
    add(sql, 3)
    assert tail("--subscription", "mailer", "--from-start").code == 0
    restart_identity(sql)
    new = add_named(sql, 5)
    hint = str(tail("--subscription", "mailer").error["hint"])
    assert call(*hint.split(": pgcoord ")[1].split()).code == 0
    assert executions(tail("--subscription", "mailer")) == new


def test_i21_a_cursor_file_from_before_a_restore_is_refused(
    tail: Tail, settings: Settings, sql: Sql, installation: Installation, tmp_path: Path
) -> None:
    file, dump = str(tmp_path / "cursor"), str(tmp_path / "dump")
    add(sql, 5)
    subprocess.run([installation.bin_dir / "pg_dump", "-Fc", "-f", dump, settings.dsn], check=True)
    add(sql, 5)
    assert len(executions(tail("--cursor-file", file, "--from-start"))) == 10
    sql.execute("DROP SCHEMA pgcoord CASCADE")
    subprocess.run([installation.bin_dir / "pg_restore", "-d", settings.dsn, dump], check=True)
    assert tail("--cursor-file", file).code == 8, "the event is gone"
    new = add_named(sql, 6)
    cursor = resumed_at(tail("--cursor-file", file))
    Path(file).write_text(cursor)
    assert executions(tail("--cursor-file", file)) == new


@pytest.mark.parametrize("is_same", [True, False])
def test_i21_a_position_at_the_floor_of_garbage_collection_is_compared(
    is_same: bool, tail: Tail, call: Call, sql: Sql, tmp_path: Path
) -> None:
    words = ("--cursor-file", str(tmp_path / "cursor"))
    collect = ("gc", "lease-events", "--older-than", "1h")
    add(sql, 3, committed_at_ms=1)
    assert tail(*words, "--from-start").code == 0
    assert call(*collect).code == 0
    if not is_same:
        restart_identity(sql)
        add(sql, 3, committed_at_ms=2)
        assert call(*collect).code == 0
    assert value(sql, "SELECT collected_through FROM outbox_floors WHERE outbox = 'lease_events'") == 3
    new = add_named(sql, 2)
    answer = tail(*words)
    if is_same:
        assert executions(answer) == new
    else:
        assert answer.code == 8


def test_i21_where_nothing_is_known_to_compare_with_that_is_said_once(
    tail: Tail, call: Call, sql: Sql, store: tuple[str, str]
) -> None:
    add(sql, 5)
    if store[0] == "--cursor-file":
        Path(store[1]).write_text("020000000000000002\n")
    else:
        assert tail(*store, "--max", "1").code == 0
        assert call("subscription", "set", store[1], "2", "--force").code == 0
    first, second = tail(*store, "--max", "1"), tail(*store, "--max", "1")
    assert "nothing is known of the event" in first.err
    assert (second.code, second.err) == (0, "")


def test_i21_a_subscription_with_other_filters_says_so(tail: Tail, sql: Sql) -> None:
    words = ("--subscription", "mailer")
    for given, is_other in (("a", False), ("a", False), ("b", True), ("a", False)):
        answer = tail(*words, "--namespace", given)
        assert answer.code == 0
        assert ("filters_changed" in answer.out) == is_other


def test_i10_a_restarted_identity_lowers_the_floor_of_the_outbox(tail: Tail, call: Call, sql: Sql) -> None:
    """Events below it would not be delivered."""
    add(sql, 5, committed_at_ms=1)
    assert call("gc", "lease-events", "--older-than", "1h").code == 0
    restart_identity(sql)
    new = add_named(sql, 2)
    assert executions(tail("--from-start")) == new


# -- running tails


def test_i21_a_running_tail_ends_when_its_outbox_is_truncated(start: StartTail, sql: Sql) -> None:
    add(sql, 3)
    running = start("lease", "--from-start", "-o", "json")
    running.ids(3)
    restart_identity(sql)
    code, lines, _ = running.ended()
    assert (code, json.loads(lines[-1])["error"]["code"]) == (8, "history_changed")


def test_i21_a_running_tail_ends_after_a_crash_that_lost_what_it_had_delivered(
    installation: Installation, start: StartTail
) -> None:
    with temporary_server(installation, {"wal_writer_delay": "10s"}) as server:
        settings = Settings(dsn=server.dsn)
        upgrade(settings)
        with connected(settings) as sql:
            add(sql, 2)
            running = start("lease", "--from-start", "-o", "json", settings_=settings)
            running.ids(2)
            until_asleep(sql)
            sql.execute("CHECKPOINT")
            sql.execute("SET synchronous_commit = off")
            lost = add(sql, 5)
            assert running.ids(5) == lost
        server.stop("immediate")
        server.start()
        with connected(settings) as sql:
            new = add(sql, 10)
        assert new[0] <= lost[-1], "the ids are given out again"
        code, lines, _ = running.ended()
        assert (code, json.loads(lines[-1])["error"]["code"]) == (8, "history_changed")


def test_i21_a_running_tail_ends_after_a_failover_that_lost_what_it_had_delivered(
    installation: Installation, start: StartTail
) -> None:
    with a_pair(installation) as pair:
        upgrade(Settings(dsn=pair.primary.dsn))
        fail_over_under_a_tail(pair, start)


def fail_over_under_a_tail(pair: Pair, start: StartTail) -> None:
    with pair.on(pair.primary) as sql, pair.on(pair.standby) as copy:
        kept = add_named(sql, 2)
        until(lambda: value(copy, "SELECT count(*) FROM lease_events") == len(kept))
        words = ("lease", "--subscription", "mailer", "--from-start", "-o", "json")
        running = start(*words, settings_=Settings(dsn=pair.dsn))
        running.ids(2)
        until(lambda: value(copy, "SELECT count(*) FROM subscriptions WHERE last_position = 2"))
        pair.stall()
        add(sql, 40)
        running.ids(40)
    pair.fail_over()
    with pair.on(pair.standby) as sql:
        add(sql, 80)
    code, lines, _ = running.ended()
    assert (code, json.loads(lines[-1])["error"]["code"]) == (8, "history_changed")

"""`pgcoord kv watch`: no change is missed, whatever happens between two reads."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from pgcoord_cli.core.database import channels
from pgcoord_cli.core.database.listener import Listener
from pgcoord_cli.core.embedded.server import EmbeddedServer
from pgcoord_cli.core.kv.key_changes import KeyChanges, Watched
from pgcoord_cli.db.pipeline import Pipeline
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, value
from tests.faults.program_process import ProgramProcess, starter
from tests.faults.tail_process import terminate

if TYPE_CHECKING:
    from tests.conftest import Call, StartLeader

Sql = psycopg.Connection[Any]
StartWatch = Callable[..., ProgramProcess]

SESSION = "pgcoord/kv watch"


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[StartWatch]:
    """Starts `pgcoord kv watch …` on the test's database."""
    with starter(ProgramProcess, ["kv", "watch"], partial(request.getfixturevalue, "settings")) as starter_:
        yield starter_


def commit(sql: Sql, **entries: str | None) -> None:
    """Writes keys (None: removes one) as a commit does: with the next version, and notified."""
    with sql.transaction():
        for key, text in entries.items():
            sql.execute("DELETE FROM pgcoord.kv WHERE key = %s", [key.encode()])
            if text is not None:
                sql.execute("INSERT INTO pgcoord.kv VALUES (%s, %s)", [key.encode(), text.encode()])
        sql.execute("UPDATE pgcoord.leader_lease SET durable_version = durable_version + 1")
        sql.execute("SELECT pg_notify('pgcoord.data', '')")


def record(watch: ProgramProcess) -> tuple[str, str | None, int]:
    """Returns key, value and version of the next line, which is JSON."""
    line = json.loads(watch.line())
    assert line.keys() == {"key", "value", "version", "encoding"}
    return line["key"], line["value"], line["version"]


def until_waiting(sql: Sql) -> None:
    """Waits until the watch has read, and waits for a notification."""
    waiting = "application_name = %s AND datname = current_database() AND state = 'idle' AND query ~ 'AS watched ON'"
    until(lambda: value(sql, f"SELECT count(*) FROM pg_stat_activity WHERE {waiting}", SESSION) == 1)


# The state and its changes


def test_a_key_is_printed_at_once_and_at_each_change(start: StartWatch, call: Call, start_leader: StartLeader) -> None:
    start_leader("n1", "--ttl", "60s").wait_for("elected epoch 1")
    watch = start("a", "-o", "json")
    assert record(watch) == ("a", None, 0)
    call("kv", "set", "a", "1")
    assert record(watch) == ("a", "1", 1)
    call("kv", "set", "b", "not watched")
    call("kv", "set", "a", "")
    assert record(watch) == ("a", "", 3)
    call("kv", "clear", "a")
    assert record(watch) == ("a", None, 4)
    assert watch.end(signal.SIGTERM)[:2] == (-signal.SIGTERM, [])


def test_a_prefix_is_printed_in_key_order_and_only_what_changes(start: StartWatch, sql: Sql) -> None:
    commit(sql, **{"p/b": "2", "p/a": "1", "q": "", "o": ""})
    watch = start("--prefix", "p/", "-o", "jsonl")
    assert [record(watch), record(watch)] == [("p/a", "1", 1), ("p/b", "2", 1)]
    commit(sql, **{"p/c": "3", "p/b": None, "p/a": "1", "q": None})
    assert [record(watch), record(watch)] == [("p/b", None, 2), ("p/c", "3", 2)]
    assert watch.end(signal.SIGINT)[:2] == (-signal.SIGINT, [])


def test_the_present_state_can_be_left_out(start: StartWatch, sql: Sql) -> None:
    commit(sql, a="1")
    watch = start("a", "--changes-only", "--max", "1", "-o", "json")
    until_waiting(sql)
    commit(sql, a="2")
    assert record(watch) == ("a", "2", 2)
    assert watch.ended()[:2] == (0, [])


def test_every_format_has_a_line_for_each_change(call: Call, sql: Sql) -> None:
    commit(sql, a="1|\n", b="x")
    commit(sql, b=None)
    for output, expected in {
        "table": "2  a = 1|\\n\n",
        "plain": "a\t1|\\n\t2\tutf-8\n",
        "csv": 'key,value,version,encoding\na,"1|\n",2,utf-8\n',
        "markdown": "| key | value | version | encoding |\n| --- | --- | --- | --- |\n| a | 1\\|\\n | 2 | utf-8 |\n",
        "json": '{"key": "a", "value": "1|\\n", "version": 2, "encoding": "utf-8"}\n',
    }.items():
        assert call("kv", "watch", "a", "--max", "1", "-o", output)[:2] == (0, expected)
    assert call("kv", "watch", "b", "--max", "1").out == "2  b is absent\n"
    assert json.loads(call("kv", "watch", "61", "--hex", "--max", "1", "-o", "json").out)["value"] == b"1|\n".hex()


def test_a_watch_that_times_out_says_so(call: Call) -> None:
    ended = call("kv", "watch", "a", "--changes-only", "--timeout", "50ms", "-o", "json")
    assert (ended.code, ended.error["code"]) == (124, "timed_out")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "KEY"),
        (("0g", "--hex"), "KEY: '0g' is not hexadecimal"),
        (("--prefix", "0g", "--hex"), "--prefix: '0g' is not hexadecimal"),
        (("a", "--attempts", "2"), "--attempts requires a command"),
        (("a", "--max", "0"), "--max"),
        (("a", "--timeout", "0"), "--timeout"),
    ],
)
def test_what_does_not_go_together_is_refused(words: tuple[str, ...], named: str, offline: Call) -> None:
    assert named in offline("kv", "watch", *words, "-o", "json").refusal


# Races


@pytest.fixture
def without_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only notifications wake."""
    monkeypatch.setattr(channels, "POLL_SECONDS", 3600.0)


@pytest.mark.usefixtures("without_polls")
def test_i7_a_change_between_the_read_and_the_listen_is_not_missed(
    settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen, fetch = Listener.listen, Pipeline.fetch
    pending = iter("23")

    def listen_after_a_commit(*arguments: Any) -> None:
        for text in pending:
            commit(sql, a=text)
            break
        listen(*arguments)

    def fetch_before_a_commit(*arguments: Any) -> Any:
        rows = fetch(*arguments)
        for text in pending:
            commit(sql, a=text)
            break
        return rows

    commit(sql, a="1")
    with closing(KeyChanges(settings, Watched.single(b"a"), is_state_wanted=True, seconds=TIMEOUT)) as watch:
        monkeypatch.setattr(Listener, "listen", listen_after_a_commit)
        monkeypatch.setattr(Pipeline, "fetch", fetch_before_a_commit)
        changes = watch.changes()
        assert [next(changes).value, next(changes).value] == [b"2", b"3"]
        pending = iter(["4", ""])  # after the next LISTEN, while nothing is left to report, and after that read
        assert [next(changes).value, next(changes).value] == [b"4", b""]


def test_i7_without_notifications_a_poll_interval_is_enough(
    settings: Settings, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Listener, "listen", lambda *_: None)
    with closing(KeyChanges(settings, Watched.single(b"a"), seconds=TIMEOUT)) as watch:
        changes = watch.changes()
        assert next(changes).value is None
        commit(sql, a="1")
        assert next(changes).value == b"1"


def test_what_changed_while_the_connection_was_lost_is_printed(start: StartWatch, sql: Sql) -> None:
    commit(sql, a="1", b="1")
    watch = start("--prefix", "", "-o", "json")
    assert [record(watch), record(watch)] == [("a", "1", 1), ("b", "1", 1)]
    until_waiting(sql)
    with sql.transaction():  # what it reads when it is back
        assert terminate(sql, SESSION) == 1
        commit(sql, a="2", b=None)
    assert [record(watch), record(watch)] == [("a", "2", 2), ("b", None, 2)]
    assert "connected again" in watch.message("connected again")


def test_a_watch_survives_a_restart_of_the_server(
    own_settings: Settings, own_server: EmbeddedServer, start: StartWatch
) -> None:
    with psycopg.connect(own_settings.dsn, autocommit=True) as sql:
        commit(sql, a="1")
        watch = start("a", "-o", "json", settings_=own_settings)
        assert record(watch) == ("a", "1", 1)
        own_server.stop("immediate")
    watch.message("disconnected")
    own_server.start()
    with psycopg.connect(own_settings.dsn, autocommit=True) as sql:
        commit(sql, a="2")
        assert record(watch) == ("a", "2", 2)
    assert watch.end(signal.SIGTERM)[:2] == (-signal.SIGTERM, [])


def test_i21_a_version_that_goes_back_is_said(start: StartWatch, sql: Sql) -> None:
    commit(sql, a="1")
    commit(sql, a="2")
    watch = start("a", "-o", "json")
    assert record(watch) == ("a", "2", 2)
    until_waiting(sql)
    with sql.transaction():
        sql.execute("UPDATE pgcoord.leader_lease SET durable_version = 0")
        commit(sql, a="1")
        terminate(sql, SESSION)
    assert record(watch) == ("a", "1", 1)
    assert "the version went back from 2 to 1" in watch.message("went back")
    until_waiting(sql)
    with sql.transaction():  # another database, at the same version
        sql.execute("UPDATE pgcoord.kv SET value = '3'")
        terminate(sql, SESSION)
    assert record(watch) == ("a", "3", 1)


def test_i17_a_watch_is_refused_at_its_first_session(offline: Call, call: Call, sql: Sql) -> None:
    assert offline("kv", "watch", "a", PGCOORD_DSN="host=/nowhere").code == 4
    sql.execute("ALTER SCHEMA pgcoord RENAME TO elsewhere")
    assert call("kv", "watch", "a").code == 7


# With a command

SHOW = 'printf "%s %s %s %s: " "$PGCOORD_KEY" "$PGCOORD_ENCODING" "$PGCOORD_VERSION" "$PGCOORD_CHANGE"; cat; echo'
"""Writes what a command gets as one line."""


def test_a_command_gets_the_value_and_what_changed(start: StartWatch, sql: Sql) -> None:
    commit(sql, **{"p/a": "1", "p/\x01": ""})
    watch = start("--prefix", "p/", "--", "sh", "-c", SHOW)
    assert [watch.line(), watch.line()] == ["702f01 hex 1 set: \n", "p/a utf-8 1 set: 1\n"]
    commit(sql, **{"p/a": None})
    assert watch.line() == "p/a utf-8 2 removed: \n"


def test_a_command_runs_once_at_a_time_and_then_for_the_last_of_several_changes(
    start: StartWatch, sql: Sql, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    commit(sql, a="1")
    watch = start("a", "--max", "2", "--", "sh", "-c", f"cat; echo; read _ < {go}; echo done")
    assert watch.line() == "1\n"
    for text in "234":
        commit(sql, a=text)
    # Notifications that the watch does not read would pile up in the server, so it does not listen meanwhile.
    assert value(sql, "SELECT query FROM pg_stat_activity WHERE application_name = %s", SESSION) == "UNLISTEN *"
    for expected in (["done\n", "4\n"], ["done\n"]):
        go.write_text("\n")
        assert [watch.line() for _ in expected] == expected
    assert watch.ended()[:2] == (0, [])


def test_a_command_that_fails_gets_the_same_value_again(start: StartWatch, sql: Sql, tmp_path: Path) -> None:
    commit(sql, a="1")
    fail_once = f"cat; echo; [ -e {tmp_path}/tried ] || {{ touch {tmp_path}/tried; exit 3; }}"
    watch = start("a", "--max", "1", "--attempts", "2", "--", "sh", "-c", fail_once)
    assert "exited with 3; the change is delivered again" in watch.message("exited with")
    assert watch.ended()[:2] == (0, ["1\n", "1\n"])


def test_a_command_that_goes_on_failing_ends_the_watch(call: Call, sql: Sql) -> None:
    commit(sql, a="1")
    ended = call("kv", "watch", "a", "--attempts", "1", "--", "sh", "-c", "exit 9")
    assert (ended.code, "sh exited with 9; the watch ends" in ended.err) == (9, True)


@pytest.mark.parametrize(("command", "code"), [("no-such-command", 127), (__file__, 126)])
def test_a_command_that_cannot_be_run(command: str, code: int, call: Call) -> None:
    ended = call("kv", "watch", "a", "--", command)
    assert (ended.code, "cannot run" in ended.err) == (code, True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_is_forwarded_to_the_command(
    number: int, code: int, start: StartWatch, sql: Sql, tmp_path: Path
) -> None:
    trap = f"trap 'echo got it >> {tmp_path}/got; exit 1' INT TERM; echo running; while :; do sleep 0.05; done"
    watch = start("a", "--", "sh", "-c", trap)
    assert watch.line() == "running\n"
    assert watch.end(number)[0] == code
    assert (tmp_path / "got").read_text() == "got it\n"

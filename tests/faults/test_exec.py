"""`pgcoord tail --exec`: the position moves only when the command has handled its events (rule I10)."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.faults.tail_process import Sql, StartTail, add, tail_starter

if TYPE_CHECKING:
    from tests.conftest import Cli

Store = tuple[str, str]


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[StartTail]:
    """Starts `pgcoord tail …` on the test's database."""
    with tail_starter(partial(request.getfixturevalue, "settings")) as starter:
        yield starter


@pytest.fixture(params=["--cursor-file", "--subscription"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return request.param, str(tmp_path / "cursor") if request.param == "--cursor-file" else "mailer"


@pytest.fixture
def handled(tmp_path: Path) -> Callable[[], list[int]]:
    """The ids of the events that the command has got."""
    return lambda: [json.loads(line)["event_id"] for line in (tmp_path / "handled").read_text().splitlines()]


def test_i10_a_command_that_crashes_gets_its_batch_again(
    cli: Cli, sql: Sql, store: Store, tmp_path: Path, handled: Callable[[], list[int]]
) -> None:
    ids = add(sql, 5)
    words = ("tail", "lease", "--no-follow", "--from-start", *store, "--exec", "--batch", "2", "--attempts", "1", "--")
    append = f"cat >> {tmp_path}/handled"
    crash = f"{append}; [ $(wc -l < {tmp_path}/handled) -lt 4 ] || exit 9"
    assert cli(*words, "sh", "-c", crash).returncode == 9
    assert cli(*words, "sh", "-c", append).returncode == 0
    assert handled() == [*ids[:4], *ids[2:]]


def test_i10_a_tail_that_is_killed_in_the_middle_of_a_batch_delivers_it_again(
    cli: Cli, start: StartTail, sql: Sql, tmp_path: Path, handled: Callable[[], list[int]]
) -> None:
    ids = add(sql, 3)
    words = ("--from-start", "--cursor-file", str(tmp_path / "cursor"), "--exec", "--")
    running = start("lease", *words, "sh", "-c", "cat; exec sleep 60 <&- >/dev/null 2>&1")
    assert json.loads(running.line())["event_id"] == ids[0]
    running.signal(signal.SIGKILL)
    result = cli("tail", "lease", "--no-follow", *words, "sh", "-c", f"cat >> {tmp_path}/handled")
    assert (result.returncode, handled()) == (0, ids)


def test_a_failed_batch_is_tried_again_until_it_succeeds(cli: Cli, sql: Sql, store: Store, tmp_path: Path) -> None:
    add(sql)
    script = f"if [ -e {tmp_path}/tried ]; then exit 0; fi; touch {tmp_path}/tried; exit 3"
    result = cli("tail", "lease", "--no-follow", "--from-start", *store, "--exec", "--", "sh", "-c", script)
    assert result.returncode == 0
    assert "exited with 3; the batch is delivered again" in result.stderr


def test_a_signal_ends_the_command_and_leaves_the_position(start: StartTail, sql: Sql, tmp_path: Path) -> None:
    add(sql)
    file = tmp_path / "cursor"
    words = ("--cursor-file", str(file), "--exec", "--", "sh", "-c", "cat; exec sleep 60")
    running = start("lease", "--from-start", *words)
    running.line()
    assert running.end(signal.SIGTERM)[0] == -signal.SIGTERM
    assert file.read_text().startswith("020000000000000000")


@pytest.mark.parametrize(("command", "code"), [("no-such-command", 127), (__file__, 126)])
def test_a_command_that_cannot_be_run(command: str, code: int, cli: Cli, sql: Sql, store: Store) -> None:
    add(sql)
    result = cli("tail", "lease", "--no-follow", "--from-start", *store, "--exec", "--", command)
    assert (result.returncode, "cannot run" in result.stderr) == (code, True)


@pytest.mark.parametrize("words", [("--exec", "--", "cat"), ("--cursor-file", "f", "--exec"), ("--batch", "2")])
def test_what_does_not_go_together_is_refused(words: tuple[str, ...], cli: Cli) -> None:
    assert cli("tail", "lease", *words).returncode == 2

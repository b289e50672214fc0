"""`pgcoord tail` as a process: its output, where it starts and ends, and the positions that it stores."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgcoord_cli.core.events.tail import BATCH_LIMIT
from pgcoord_cli.settings import Settings
from tests.asking import TIMEOUT, until, value
from tests.faults.program_process import environment
from tests.faults.tail_process import (
    EXECUTION,
    Record,
    Sql,
    StartTail,
    add,
    add_and_roll_back,
    tail_starter,
    until_asleep,
    until_gone,
)

if TYPE_CHECKING:
    from tests.conftest import Answer, Call, Cli

LEASE = "00000000-0000-0000-0000-000000000002"
ODD = 'quote " backslash \\ line\nbreak \r tab \t bell \x07 del \x7f é 漢 😀 \u2028 </script>'

LEASE_KEYS = [
    "type", "event_id", "cursor", "event_type", "execution_id", "lease_id", "occurred_at_ms", "committed_at_ms",
    "partition_key", "namespace", "instance_tag",
]  # fmt: skip
COMPLETION_KEYS = [{"event_type": "outcome", "lease_id": "flow_id"}.get(key, key) for key in LEASE_KEYS]

FULL: Record = {
    "execution_id": EXECUTION, "lease_id": LEASE, "event_type": "renewed", "occurred_at_ms": 1_700_000_000_123,
    "committed_at_ms": 1_700_000_000_456, "partition_key": 7, "namespace": "deploys", "instance_tag": "eu",
}  # fmt: skip
BARE: Record = {"event_type": "expired", "occurred_at_ms": 0, "committed_at_ms": 1}

Show = Callable[..., list[Record]]


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[StartTail]:
    """Starts `pgcoord tail …` on the database of the test."""
    with tail_starter(partial(request.getfixturevalue, "settings")) as starter:
        yield starter


@pytest.fixture
def tail(call: Call) -> Callable[..., Answer]:
    """Runs `pgcoord tail lease … --no-follow -o json` in this process."""
    return lambda *words: call("tail", "lease", "--no-follow", "-o", "json", *words)


@pytest.fixture
def show(tail: Callable[..., Answer]) -> Show:
    """Returns the records that it prints."""
    return lambda *words: records(tail(*words))


@pytest.fixture
def refused(offline: Call) -> Callable[..., str]:
    """Returns the message of a tail that is refused before a connection is opened."""
    return lambda *words: offline("tail", "lease", *words, "-o", "json").refusal


def records(answer: Answer) -> list[Record]:
    """Returns the objects of a stream that ended successfully, one per line."""
    assert answer.code == 0, answer
    return parsed(answer.out)


def parsed(text: str) -> list[Record]:
    # Not splitlines, which splits at U+2028 too.
    return [json.loads(line) for line in text.removesuffix("\n").split("\n") if text]


def ids(found: list[Record]) -> list[int]:
    return [record["event_id"] for record in found if record["type"] == "event"]


def messages(err: str) -> list[str]:
    """Returns the log lines on stderr without their times; fails if there is another line."""
    lines = [re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (.+)", line) for line in err.splitlines()]
    assert all(lines), err
    return [line[1] for line in lines if line]


def cursor(position: int) -> str:
    return f"02{position:016x}"


# -- the format of a line


@pytest.mark.parametrize("output", ["json", "jsonl"])
def test_json_is_one_object_a_line_with_every_key(call: Call, sql: Sql, output: str) -> None:
    add(sql, **FULL)
    add(sql, **BARE)
    full, bare = records(call("tail", "lease", "--from-start", "--no-follow", "-o", output))
    assert list(full) == list(bare) == LEASE_KEYS
    assert full == {"type": "event", "event_id": 1, "cursor": cursor(1)} | FULL
    assert bare == {"type": "event", "event_id": 2, "cursor": cursor(2), "execution_id": EXECUTION} | BARE | {
        "lease_id": None, "partition_key": 0, "namespace": None, "instance_tag": None,
    }  # fmt: skip


def test_completions_have_an_outcome_and_a_flow(call: Call, sql: Sql) -> None:
    add(sql, table="completion_events", outcome="failed", flow_id=LEASE, partition_key=3)
    add(sql, table="completion_events")
    first, second = records(call("tail", "completion", "--from-start", "--no-follow", "-o", "json"))
    assert list(first) == list(second) == COMPLETION_KEYS
    assert (first["outcome"], first["flow_id"], first["partition_key"]) == ("failed", LEASE, 3)
    assert (second["outcome"], second["flow_id"], second["partition_key"]) == ("success", None, 0)


def odd_event(sql: Sql) -> Record:
    """An event with texts that every format has to quote or escape."""
    texts: Record = dict.fromkeys(("execution_id", "lease_id", "event_type", "namespace", "instance_tag"), ODD)
    add(sql, **texts)
    return texts


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_json_keeps_every_character_in_every_encoding(cli: Cli, sql: Sql, encoding: str) -> None:
    texts = odd_event(sql)
    done = cli(
        "tail", "lease", "--from-start", "--no-follow", "-o", "json",
        env={"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
    )  # fmt: skip
    (event,) = parsed(done.stdout)
    assert {name: event[name] for name in texts} == texts


def test_csv_has_a_header_and_keeps_every_character(call: Call, sql: Sql) -> None:
    texts = odd_event(sql)
    add(sql, **BARE)
    printed = call("tail", "lease", "--from-start", "--no-follow", "-o", "csv")
    odd, bare = csv.DictReader(printed.out.splitlines(keepends=True))
    assert list(odd) == LEASE_KEYS[1:]
    assert {name: bare[name] for name in ("event_id", "cursor", "lease_id", "namespace", "committed_at_ms")} == {
        "event_id": "2", "cursor": cursor(2), "lease_id": "", "namespace": "", "committed_at_ms": "1",
    }  # fmt: skip
    assert odd.keys() >= texts.keys()


def test_csv_cells_survive_quotes_commas_and_line_breaks(cli: Cli, sql: Sql) -> None:
    text = 'a,"b"\nc; é'
    add(sql, execution_id=text)
    printed = cli("tail", "lease", "--from-start", "--no-follow", "-o", "csv").stdout
    header, row = csv.reader(iter(printed.splitlines(keepends=True)))
    assert row[header.index("execution_id")] == text


def test_markdown_has_a_header_and_escapes_the_bar(call: Call, sql: Sql) -> None:
    add(sql, namespace="a|b\nc")
    header, rule, row = call("tail", "lease", "--from-start", "--no-follow", "-o", "markdown").out.splitlines()
    assert header == "| " + " | ".join(LEASE_KEYS[1:]) + " |"
    assert rule == "|" + " --- |" * 10
    assert row.startswith(f"| 1 | {cursor(1)} | acquired | {EXECUTION} | - |")
    assert row.endswith("| a\\|b\\nc | - |")


def test_plain_lines_are_fields_between_tabs(call: Call, sql: Sql) -> None:
    add(sql, **FULL)
    add(sql, namespace="a\tb\nc")
    full, odd = call("tail", "lease", "--from-start", "--no-follow", "-o", "plain").out.splitlines()
    assert full.split("\t") == ["1", cursor(1), *(str(FULL[key]) for key in LEASE_KEYS[3:])]
    assert odd.split("\t")[-2:] == ["a\\tb\\nc", "-"]


def test_a_table_line_shows_the_time_the_cursor_and_the_attributes(call: Call, sql: Sql) -> None:
    add(sql, **FULL)
    add(sql, **BARE)
    full, bare = call("tail", "lease", "--from-start", "--no-follow").out.splitlines()
    assert full.split() == [
        "2023-11-14", "22:13:20.123Z", cursor(1), "renewed", EXECUTION,
        "partition=7", "namespace=deploys", "tag=eu", f"lease={LEASE}",
    ]  # fmt: skip
    assert bare.split() == ["1970-01-01", "00:00:00.000Z", cursor(2), "expired", EXECUTION, "partition=0"]


def test_a_table_line_is_coloured_on_request_and_escapes_control_characters(call: Call, sql: Sql) -> None:
    add(sql, event_type="revoked", execution_id="\x1b[2Jgone", occurred_at_ms=2**62)
    words = ("tail", "lease", "--from-start", "--no-follow")
    assert "\x1b" not in call(*words).out
    coloured = call(*words, "--color", "always").out
    assert "\x1b[31mrevoked" in coloured
    assert "\\x1b[2Jgone" in coloured
    assert f"{2**62} ms" in coloured


@pytest.mark.parametrize("output", ["table", "plain", "csv", "markdown", "json", "jsonl"])
def test_a_line_reaches_a_pipe_at_once(start: StartTail, sql: Sql, output: str) -> None:
    tail = start("lease", "--from-start", "-o", output)
    for _ in range({"csv": 1, "markdown": 2}.get(output, 0)):
        tail.line()
    for _ in range(3):
        (event_id,) = add(sql)
        assert cursor(event_id) in tail.line()
    assert tail.process.poll() is None


# -- where it starts and ends


def test_the_default_is_to_start_now(start: StartTail, sql: Sql) -> None:
    add(sql, 3)
    tail = start("lease", "-o", "json")
    until_asleep(sql)
    assert add(sql, 2) == tail.ids(2)


def test_i10_a_start_now_includes_uncommitted_events(start: StartTail, sql: Sql, settings: Settings) -> None:
    """Its id is below the last one drawn when the tail started, and it was not visible yet."""
    with psycopg.connect(settings.dsn) as writer:
        under_way = add(writer)
        before = add(sql)
        tail = start("lease", "-o", "json")
        until_asleep(sql)
        writer.commit()
    after = add(sql)
    assert under_way < before < after
    assert tail.ids(2) == under_way + after


def test_no_follow_ends_after_the_stored_events(show: Show, sql: Sql) -> None:
    assert show("--from-start") == []
    assert ids(show("--from-start")) == []
    first = add(sql, 2)
    assert ids(show("--from-start")) == first
    assert show() == [], "from now"


def test_i10_resuming_from_every_printed_cursor_leaves_no_gap_and_no_duplicate(show: Show, sql: Sql) -> None:
    for _ in range(5):
        add_and_roll_back(sql, 2)
        add(sql, 3)
    everything = show("--from-start")
    assert len(everything) == 15
    for number, record in enumerate(everything, start=1):
        assert show("--from", record["cursor"]) == everything[number:]
    assert show("--from", cursor(0)) == everything
    assert show("--from", everything[4]["cursor"].upper()) == everything[5:]


def at_hours(sql: Sql) -> list[int]:
    """Events at one, two, three, four and five o'clock on a day in the past."""
    moments = [datetime(2026, 1, 31, hour, tzinfo=UTC) for hour in range(1, 6)]
    return [add(sql, committed_at_ms=round(moment.timestamp() * 1000))[0] for moment in moments]


PARTS = {
    ("--since", "2026-01-31T03:00Z"): [3, 4, 5],
    ("--since", "2026-01-31T03:00:00.001Z"): [4, 5],
    ("--since", "2026-01-31 04:00"): [4, 5],
    ("--since", "2026-01-31T06:00+02:00"): [4, 5],
    ("--since", "36500d"): [1, 2, 3, 4, 5],
    ("--since", "1969-12-31"): [1, 2, 3, 4, 5],
    ("--since", "2026-01-31T06:00Z"): [],
    ("--since", "10m"): [],
    ("--from-start", "--until", "2026-01-31T03:00Z"): [1, 2],
    ("--from-start", "--until", "2026-01-31T03:00:00.001Z"): [1, 2, 3],
    ("--from-start", "--until", "10m"): [1, 2, 3, 4, 5],
    ("--from-start", "--until", cursor(4)): [1, 2, 3, 4],
    ("--from-start", "--until", cursor(0)): [],
    ("--from", cursor(1), "--until", cursor(3)): [2, 3],
    ("--from", cursor(3), "--until", cursor(2)): [],
    ("--since", "2026-01-31T02:00Z", "--until", "2026-01-31T04:00Z"): [2, 3],
    ("--from-start", "--max", "2"): [1, 2],
    ("--from-start", "--max", "9"): [1, 2, 3, 4, 5],
}


def test_parts_of_the_past(show: Show, sql: Sql) -> None:
    hour_of = {event_id: hour for hour, event_id in enumerate(at_hours(sql), start=1)}
    assert {words: [hour_of[event_id] for event_id in ids(show(*words))] for words in PARTS} == PARTS


def test_i12_a_duration_for_since_is_measured_by_the_clock_of_the_server(show: Show, sql: Sql) -> None:
    milliseconds = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
    old, young = (value(sql, f"SELECT {milliseconds}") - minutes * 60_000 for minutes in (20, 5))
    add(sql, committed_at_ms=old)
    recent = add(sql, committed_at_ms=young) + add(sql)
    assert ids(show("--since", "10m")) == recent


@pytest.mark.parametrize("end", [("--max", "3"), ("--until", cursor(3))])
def test_a_following_tail_ends_at_its_end(start: StartTail, sql: Sql, end: tuple[str, str]) -> None:
    tail = start("lease", "--from-start", "-o", "json", *end)
    add(sql)
    assert tail.ids(1) == [1]
    add(sql, 3)
    code, lines, _ = tail.ended()
    assert (code, [json.loads(line)["event_id"] for line in lines]) == (0, [2, 3])


def test_an_end_at_a_rolled_back_id_ends_the_tail(start: StartTail, sql: Sql) -> None:
    shown = add(sql, 2)
    (end,) = add_and_roll_back(sql)
    add(sql)
    tail = start("lease", "--from-start", "-o", "json", "--until", cursor(end))
    code, lines, _ = tail.ended()
    assert (code, [json.loads(line)["event_id"] for line in lines]) == (0, shown)


# -- filters


@pytest.fixture
def labelled(sql: Sql) -> None:
    """Events 1 to 6, each with other attributes."""
    add(sql, partition_key=1, namespace="a", instance_tag="x", event_type="acquired")
    add(sql, partition_key=2, namespace="b", instance_tag="y", event_type="renewed")
    add(sql, partition_key=3, namespace="a", instance_tag="y", event_type="expired")
    add(sql, partition_key=1, namespace="b", instance_tag=None, event_type="expired")
    add(sql, partition_key=2, namespace=None, instance_tag="x", event_type="revoked")
    add(sql, partition_key=-4, namespace="", instance_tag="", event_type="novel")


FILTERED = {
    ("--partition", "1"): [1, 4],
    ("--partition", "1", "--partition", "3"): [1, 3, 4],
    ("--partition", "-4"): [6],
    ("--partition", "9"): [],
    ("--namespace", "a"): [1, 3],
    ("--namespace", "a", "--namespace", "b"): [1, 2, 3, 4],
    ("--namespace", ""): [6],
    ("--instance-tag", "x"): [1, 5],
    ("--instance-tag", "x", "--instance-tag", "y"): [1, 2, 3, 5],
    ("--event-type", "expired"): [3, 4],
    ("--event-type", "expired", "--event-type", "novel"): [3, 4, 6],
    ("--partition", "1", "--namespace", "b"): [4],
    ("--event-type", "expired", "--instance-tag", "y"): [3],
    ("--event-type", "expired", "--max", "1"): [3],
    ("--namespace", "A"): [],
}


@pytest.mark.usefixtures("labelled")
def test_events_must_match_all_filters(show: Show) -> None:
    assert {words: ids(show("--from-start", *words)) for words in FILTERED} == FILTERED


def test_completions_are_filtered_by_outcome(call: Call, sql: Sql) -> None:
    for outcome in ("success", "failed", "cancelled", "failed"):
        add(sql, table="completion_events", outcome=outcome)
    words = ("--from-start", "--no-follow", "-o", "json", "--outcome", "failed", "--outcome", "cancelled")
    assert ids(records(call("tail", "completion", *words))) == [2, 3, 4]


@pytest.mark.usefixtures("labelled")
def test_the_cursor_passes_filtered_events(show: Show, tmp_path: Path) -> None:
    file = tmp_path / "cursor"
    assert show("--from-start", "--namespace", "nobody", "--cursor-file", str(file)) == []
    assert file.read_text().splitlines()[0] == cursor(6)


# -- signals, and readers that close the pipe

both = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, -signal.SIGTERM)], ids=["SIGINT", "SIGTERM"]
)


@both
def test_i10_a_signal_ends_it_with_the_cursor_to_resume_from(
    number: signal.Signals, code: int, start: StartTail, sql: Sql, show: Show
) -> None:
    tail = start("lease", "--from-start", "-o", "json")
    shown = add(sql, 3)
    assert tail.ids(3) == shown
    until_asleep(sql)
    ended, lines, err = tail.end(number)
    assert (ended, lines) == (code, [])
    assert messages(err) == [f"INFO [tail] stopped; resume with: pgcoord tail lease --from {cursor(shown[-1])}"]
    later = add(sql, 2)
    assert ids(show("--from", err.split()[-1])) == later


@both
def test_i10_a_signal_in_a_backlog_leaves_whole_lines_and_the_cursor_of_the_last(
    number: signal.Signals, code: int, start: StartTail, sql: Sql, show: Show
) -> None:
    total = 50_000
    add(sql, total)
    tail = start("lease", "--from-start", "-o", "json")
    first = tail.line()
    ended, lines, err = tail.end(number)
    assert ended == code
    shown = [json.loads(line)["event_id"] for line in [first, *lines]]
    assert shown == list(range(1, len(shown) + 1))
    assert len(shown) < total, "it did not go on to the end"
    assert err.split()[-1] == cursor(shown[-1])


@both
def test_with_a_checkpoint_the_same_command_resumes(
    number: signal.Signals, code: int, start: StartTail, sql: Sql, tmp_path: Path
) -> None:
    words = ("lease", "--from-start", "-o", "json", "--cursor-file", str(tmp_path / "cursor"))
    tail = start(*words)
    assert add(sql, 2) == tail.ids(2)
    until_asleep(sql)
    ended, _, err = tail.end(number)
    assert (ended, messages(err)) == (code, ["INFO [tail] stopped; the same command resumes here"])
    assert add(sql, 2) == start(*words).ids(2)


def test_quiet_suppresses_the_note_on_how_to_resume(start: StartTail, sql: Sql) -> None:
    tail = start("lease", "--from-start", "-q")
    until_asleep(sql)
    assert tail.end(signal.SIGTERM) == (-signal.SIGTERM, [], "")


def run_piped(settings: Settings, words: str, reader: str) -> tuple[int, str, str]:
    """Runs `pgcoord tail … | reader` in a shell: the tail's exit code, the reader's stdout, and stderr of both."""
    script = f'{sys.executable} -m pgcoord_cli tail {words} | {reader}; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["bash", "-c", script], env=environment(settings.dsn), capture_output=True, text=True, timeout=TIMEOUT,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("output", ["table", "json"])
@pytest.mark.parametrize("number", [1, 5_000], ids=["and no further event ever comes", "of many"])
def test_head_ends_the_tail_silently(settings: Settings, sql: Sql, number: int, output: str) -> None:
    add(sql, number)
    code, out, err = run_piped(settings, f"lease --from-start -o {output}", "head -1")
    assert (code, out.count("\n"), err) == (128 + signal.SIGPIPE, 1, "")
    assert cursor(1) in out


@pytest.mark.parametrize("option", ["--no-follow", "--max 1"])
def test_head_is_no_failure_of_a_tail_that_ends_by_itself(settings: Settings, sql: Sql, option: str) -> None:
    add(sql, 5_000)
    code, out, err = run_piped(settings, f"lease --from-start {option} -o json", "head -1")
    assert (code, out.count("\n"), err) == (0, 1, "")


def test_i10_a_position_does_not_move_past_what_could_be_written(settings: Settings, sql: Sql, tmp_path: Path) -> None:
    file = tmp_path / "cursor"
    words = f"lease --from-start --cursor-file {file}"
    add(sql, 2)
    run_piped(settings, f"{words} --max 2", "cat")
    add(sql, 5_000)
    assert run_piped(settings, f"{words} -o json", "head -1 >/dev/null")[0] == 128 + signal.SIGPIPE
    assert file.read_text().split()[0] == cursor(2), "no batch fits into a pipe"


def test_a_reader_that_reads_nothing_ends_the_tail_silently(settings: Settings) -> None:
    assert run_piped(settings, "lease --from-start", "true") == (128 + signal.SIGPIPE, "", "")


# -- checkpoints


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The path of a cursor file."""
    return tmp_path / "a place" / "cursor"


@pytest.fixture(params=["--cursor-file", "--subscription"])
def checkpoint(request: pytest.FixtureRequest, file: Path) -> tuple[str, str]:
    """The options for one of the two ways to store a cursor."""
    file.parent.mkdir()
    return request.param, str(file) if request.param == "--cursor-file" else "importer é"


def test_i10_a_checkpoint_resumes_after_the_last_event_shown(checkpoint: tuple[str, str], show: Show, sql: Sql) -> None:
    words = ("--from-start", *checkpoint)
    assert show(*words) == []
    first = add(sql, 5)
    assert ids(show(*words, "--max", "2")) == first[:2]
    assert ids(show(*words, "--max", "2")) == first[2:4]
    assert ids(show(*words)) == first[4:]
    assert show(*words) == []
    assert add(sql, 2) == ids(show(*checkpoint)), "without --from-start, it does not begin with now again"


def test_a_checkpoint_takes_precedence_over_the_start_options(
    checkpoint: tuple[str, str], show: Show, sql: Sql
) -> None:
    add(sql, 4)
    assert ids(show("--from", cursor(1), *checkpoint, "--max", "1")) == [2]
    assert ids(show("--from", cursor(1), *checkpoint)) == [3, 4]
    assert ids(show("--since", "1d", *checkpoint)) == []


def test_a_start_now_is_saved_before_the_first_event(checkpoint: tuple[str, str], show: Show, sql: Sql) -> None:
    add(sql, 2)
    assert show(*checkpoint) == []
    assert add(sql, 2) == ids(show(*checkpoint))


def test_i10_a_checkpoint_is_never_ahead_of_what_was_written(
    checkpoint: tuple[str, str], start: StartTail, sql: Sql, call: Call
) -> None:
    """Killed during a backlog, when the pipe holds a part of a batch: no cursor is beyond the last line."""
    everything = add(sql, 20_000)
    words = ("--from-start", "-o", "json", *checkpoint)
    shown: set[int] = set()
    for reads in (1, 1_500, 2_500):
        tail = start("lease", *words)
        lines = [tail.line() for _ in range(reads)]
        code, rest, _ = tail.end(signal.SIGKILL)
        assert code == -signal.SIGKILL
        run = [json.loads(line)["event_id"] for line in lines + rest]
        shown |= set(run)
        until_gone(sql, "pgcoord/subscription")
        kept = call("tail", "lease", "--lag", *checkpoint, "-o", "json").document["position"]
        assert kept <= cursor(run[-1])
        assert len(shown) == int(kept[2:], 16) or kept < cursor(max(shown))
    assert shown | set(ids(records(call("tail", "lease", "--no-follow", *words)))) == set(everything)


def test_a_cursor_file_is_replaced_and_never_changed(show: Show, sql: Sql, file: Path) -> None:
    """A process that has the old file open still reads a complete cursor."""
    file.parent.mkdir()
    file.write_text(f"{cursor(0)}\n")
    add(sql, 3)
    with file.open() as old:
        assert ids(show("--cursor-file", str(file))) == [1, 2, 3]
        assert old.read() == f"{cursor(0)}\n"
    assert file.read_text().splitlines()[0] == cursor(3)
    assert list(file.parent.iterdir()) == [file], "nothing else is left there"


def test_an_empty_cursor_file_counts_as_missing(show: Show, sql: Sql, file: Path) -> None:
    file.parent.mkdir()
    file.touch()
    add(sql, 2)
    assert ids(show("--from-start", "--cursor-file", str(file))) == [1, 2]


@pytest.mark.parametrize("content", ["garbage", "02", cursor(1)[:-1], f"{cursor(1)}\n{cursor(2)}", "\ufeff\0é"])
def test_a_malformed_cursor_file_is_named_and_not_changed(content: str, offline: Call, file: Path) -> None:
    file.parent.mkdir()
    file.write_text(content)
    answer = offline("tail", "lease", "--cursor-file", str(file), "-o", "json")
    assert f"--cursor-file {file}: " in answer.refusal
    assert cursor(42) in answer.error["hint"]
    assert file.read_text() == content


def test_a_cursor_file_that_cannot_be_written_ends_the_tail_before_the_first_event(
    tail: Callable[..., Answer], sql: Sql, file: Path
) -> None:
    add(sql)
    answer = tail("--from-start", "--cursor-file", str(file))
    assert answer.code == 1
    assert answer.error["message"] == f"--cursor-file: cannot write {str(file)!r}: No such file or directory"


def test_a_second_tail_of_a_cursor_file_names_the_holder(
    start: StartTail, sql: Sql, tail: Callable[..., Answer], file: Path
) -> None:
    file.parent.mkdir()
    first = start("lease", "--cursor-file", str(file), "-o", "json")
    until_asleep(sql)
    second = tail("--cursor-file", str(file))
    assert (second.code, second.error["code"]) == (5, "busy")
    assert second.error["message"] == f"--cursor-file {file} is in use by pid {first.process.pid}"
    assert second.error["hint"] == "stop that process, or give each tail a file of its own"
    assert tail("--lag", "--cursor-file", str(file)).code == 0, "to count needs no lock"
    assert add(sql) == first.ids(1), "the first one is not disturbed"


def test_a_second_tail_of_a_subscription_names_the_holder(
    start: StartTail, sql: Sql, tail: Callable[..., Answer]
) -> None:
    first = start("lease", "--subscription", "mailer", "-o", "json")
    until_asleep(sql)
    holder = value(sql, "SELECT pid FROM pg_stat_activity WHERE application_name = 'pgcoord/subscription'")
    second = tail("--subscription", "mailer")
    assert (second.code, second.error["code"]) == (5, "busy")
    assert f"'mailer' is held by pid {holder} (pgcoord/subscription" in second.error["message"]
    assert tail("--subscription", "another").code == 0
    assert add(sql) == first.ids(1), "the first one is not disturbed"


def test_a_subscription_belongs_to_one_outbox(call: Call, sql: Sql) -> None:
    assert call("tail", "lease", "--no-follow", "--subscription", "mailer").code == 0
    before = sql.execute("SELECT outbox, last_position FROM subscriptions").fetchall()
    refused = call("tail", "completion", "--no-follow", "--subscription", "mailer", "-o", "json").refusal
    assert refused == "--subscription: 'mailer' is a subscription of lease_events, not of completion_events"
    assert call("tail", "completion", "--lag", "--subscription", "mailer", "-o", "json").refusal == refused
    assert sql.execute("SELECT outbox, last_position FROM subscriptions").fetchall() == before


# -- refused arguments


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cursor-file", "f", "--subscription", "s"), "--cursor-file and --subscription exclude each other"),
        (("--from", cursor(1), "--since", "1h"), "--from and --since exclude each other"),
        (("--from", cursor(1), "--from-start"), "--from and --from-start exclude each other"),
        (("--from-start", "--since", "1h"), "--from-start and --since exclude each other"),
        (("--max-lag", "1"), "--max-lag requires --lag"),
        (("--since", "yesterday"), "--since: 'yesterday' is not a duration"),
        (("--until", "36501d"), "--until: '36501d' is too long; the most is 36500d"),
        (("--since", "0xff"), "--since: '0xff' is not a duration"),
    ],
)
def test_an_invalid_argument_is_named(words: tuple[str, ...], message: str, refused: Callable[..., str]) -> None:
    assert refused(*words) == message


@pytest.mark.parametrize("words", [("--max", "0"), ("--max", "x"), ("--partition", "x"), ("--max-lag", "-1")])
def test_an_invalid_number_is_named(words: tuple[str, ...], refused: Callable[..., str]) -> None:
    assert words[0] in refused(*words)


@pytest.mark.parametrize("words", [("--subscription", ""), ("--subscription", "x" * 201)])
def test_an_empty_subscription_name_is_refused(words: tuple[str, ...], refused: Callable[..., str]) -> None:
    assert refused(*words) == "--subscription: a name must have 1 to 200 characters, none of them a null byte"


def test_arguments_that_are_not_utf_8_are_refused(refused: Callable[..., str]) -> None:
    for option in ("--namespace", "--instance-tag", "--event-type", "--subscription"):
        assert option in refused(option, "a\udcff")


# -- invalid and expired cursors


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("42", "is not a cursor"),
        (cursor(42)[:-2], "is not a cursor"),
        (cursor(42) + "00", "is not a cursor"),
        (cursor(42).replace("2", "g"), "is not a cursor"),
        ("01" + cursor(42)[2:], "is a cursor of version 01; this pgcoord reads version 02"),
        ("02ffffffffffffffff", "is not a cursor: its position is negative"),
    ],
    ids=["number", "truncated", "too long", "no hex", "foreign", "negative"],
)
def test_an_invalid_cursor_is_refused_and_the_hint_shows_a_valid_one(text: str, why: str, offline: Call) -> None:
    answer = offline("tail", "lease", "--from", text, "-o", "json")
    assert answer.refusal == f"--from: {text!r} {why}"
    assert answer.error["hint"].endswith(f"like {cursor(42)}")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("01" + cursor(42)[2:], "is a cursor of version 01; this pgcoord reads version 02"),
        ("02ffffffffffffffff", "is not a cursor: its position is negative"),
    ],
)
def test_an_invalid_cursor_is_refused_as_an_end_too(text: str, why: str, offline: Call) -> None:
    answer = offline("tail", "lease", "--until", text, "-o", "json")
    assert answer.refusal == f"--until: {text!r} {why}"
    assert answer.error["hint"].endswith(f"like {cursor(42)}")


def test_i21_a_cursor_ahead_of_the_last_id_is_refused(tail: Callable[..., Answer], sql: Sql) -> None:
    add(sql, 3)
    ahead = tail("--from", cursor(4))
    assert (ahead.code, ahead.error["code"]) == (8, "history_changed")
    assert f"cursor {cursor(4)} is ahead of the outbox, whose last id is {cursor(3)}" in ahead.error["message"]
    assert "another outbox or database" in ahead.error["message"]
    assert tail("--from", cursor(3)) == (0, "", "")


def test_i21_a_subscription_ahead_of_the_last_id_is_refused(tail: Callable[..., Answer], sql: Sql) -> None:
    assert tail("--subscription", "s").code == 0
    sql.execute("UPDATE subscriptions SET last_position = 7")
    assert f"cursor {cursor(7)} is ahead" in tail("--subscription", "s").error["message"]


def collected(sql: Sql, call: Call) -> list[int]:
    """The ids that are left of ten events after gc has deleted the first six."""
    add(sql, 6, committed_at_ms=0)
    left = add(sql, 4)
    document = call("gc", "lease-events", "-o", "json").document
    assert document["lease_events"]["deleted"] == 6
    return left


def test_i10_an_expired_cursor_is_refused_with_one_to_resume_from(
    tail: Callable[..., Answer], show: Show, sql: Sql, call: Call
) -> None:
    left = collected(sql, call)
    for position in (0, 3, 5):
        answer = tail("--from", cursor(position))
        assert (answer.code, answer.error["code"]) == (8, "cursor_expired")
        assert cursor(position) in answer.error["message"]
        resume = answer.error["hint"].split()[-2:]
        assert resume == ["--from", cursor(6)]
        assert ids(show(*resume)) == left


def test_an_expired_stored_cursor_is_moved_as_the_hint_says(
    tail: Callable[..., Answer], show: Show, sql: Sql, call: Call, tmp_path: Path
) -> None:
    """It takes precedence over --from, so that --from does not help."""
    file = tmp_path / "lease.cursor"
    file.write_text(cursor(3))
    left = collected(sql, call)
    hint = tail("--cursor-file", str(file)).error["hint"]
    assert hint.endswith(f"write {cursor(6)} into {file}")
    file.write_text(cursor(6))
    assert ids(show("--cursor-file", str(file))) == left
    assert tail("--subscription", "s").code == 0
    sql.execute("UPDATE subscriptions SET last_position = 3")
    hint = tail("--subscription", "s").error["hint"]
    assert hint.endswith(f"pgcoord subscription set s {cursor(6)}")
    assert call(*hint.partition("pgcoord ")[2].split()).code == 0
    assert ids(show("--subscription", "s")) == left


@pytest.mark.parametrize("option", ["--from", "--since", "--until"])
def test_an_empty_cursor_or_time_does_not_count_as_missing(option: str, tail: Callable[..., Answer]) -> None:
    answer = tail(option, "")
    assert answer.code == 2
    assert option in answer.error["message"]


def test_a_filter_for_an_unknown_kind_causes_a_warning(call: Call) -> None:
    answer = call("tail", "lease", "--event-type", "gone", "--no-follow")
    assert answer.code == 0
    assert "'gone' is not a known kind of event (acquired, expired" in answer.err


def test_i10_the_stored_events_can_be_read_from_the_start(show: Show, sql: Sql, call: Call) -> None:
    left = collected(sql, call)
    assert ids(show("--from-start")) == left
    assert ids(show("--since", "36500d")) == left
    assert ids(show("--from", cursor(6))) == left


def test_i10_an_expired_checkpoint_is_refused_too(
    tail: Callable[..., Answer], sql: Sql, call: Call, tmp_path: Path
) -> None:
    collected(sql, call)
    file = tmp_path / "cursor"
    file.write_text(cursor(2))
    assert tail("--cursor-file", str(file)).code == 8
    assert file.read_text() == cursor(2)


@pytest.mark.parametrize("output", ["json", "jsonl"])
def test_errors_are_one_document_on_stdout(call: Call, sql: Sql, output: str) -> None:
    collected(sql, call)
    answer = call("tail", "lease", "--from", cursor(1), "-o", output)
    assert (answer.code, answer.document.keys()) == (8, {"error"})
    people = call("tail", "lease", "--from", cursor(1))
    assert (people.code, people.out) == (8, "")
    (line,) = messages(people.err)
    assert line.startswith("ERROR [pgcoord] ")
    assert line.endswith(f"; resume at the oldest event that is kept: --from {cursor(6)}")
    assert messages(answer.err) == [line]


def test_without_a_server_it_cannot_connect(offline: Call) -> None:
    answer = offline("tail", "lease", "-o", "json")
    assert (answer.code, answer.error["code"], len(messages(answer.err))) == (4, "cannot_connect", 1)


# -- malformed events


def test_an_unknown_kind_is_delivered_with_one_warning_each(tail: Callable[..., Answer], sql: Sql) -> None:
    kinds = ["acquired", "novel", "novel", "Acquired", "novel", "expired", "Acquired"]
    for kind in kinds:
        add(sql, event_type=kind)
    answer = tail("--from-start")
    assert [record["event_type"] for record in records(answer)] == kinds
    assert messages(answer.err) == [
        "WARNING [tail] event 2: 'novel' is not a known kind of event",
        "WARNING [tail] event 4: 'Acquired' is not a known kind of event",
    ]


def test_an_unknown_outcome_is_delivered_with_a_warning(call: Call, sql: Sql) -> None:
    add(sql, table="completion_events", outcome="acquired")
    answer = call("tail", "completion", "--from-start", "--no-follow", "-o", "json")
    assert [record["outcome"] for record in records(answer)] == ["acquired"]
    assert "'acquired' is not a known kind" in answer.err


def test_an_execution_id_that_is_no_uuid_is_delivered_with_one_warning(tail: Callable[..., Answer], sql: Sql) -> None:
    executions = [EXECUTION, "job 7", "job 8", EXECUTION.replace("-", ""), ""]
    for execution in executions:
        add(sql, execution_id=execution)
    answer = tail("--from-start", "-q")
    assert [record["execution_id"] for record in records(answer)] == executions
    assert messages(answer.err) == [
        "WARNING [tail] event 2: execution id 'job 7' is not a UUID; others are not reported"
    ]


# -- held up


@pytest.fixture
def writer(settings: Settings) -> Iterator[Sql]:
    """A service with an open transaction that has inserted an event."""
    with psycopg.connect(settings.dsn, application_name="slow service") as conn:
        add(conn)
        yield conn


def test_i10_the_transactions_that_hold_a_tail_up_are_named_on_stderr(start: StartTail, sql: Sql, writer: Sql) -> None:
    add(sql)
    tail = start("lease", "--from-start", "-o", "plain")
    said = tail.message("held up")
    who = f"pid {writer.info.backend_pid} (slow service)"
    assert f" WARNING [tail] held up at {cursor(0)}: event 1 may still be committed by {who}" in said
    assert "open since 20" in said
    writer.commit()
    assert [tail.line().split("\t")[0] for _ in range(2)] == ["1", "2"]
    assert tail.message("held up").endswith(f" INFO [tail] goes on at {cursor(2)}: no longer held up\n")


def test_i10_the_transactions_that_hold_a_tail_up_are_a_record_in_json(start: StartTail, sql: Sql, writer: Sql) -> None:
    add(sql)
    tail = start("lease", "--from-start", "-o", "json")
    held = json.loads(tail.line())
    assert list(held) == ["type", "cursor", "message", "held_event_id", "holders"]
    assert (held["type"], held["cursor"], held["held_event_id"]) == ("held_up", cursor(0), 1)
    (holder,) = held["holders"]
    assert (holder["pid"], holder["application"]) == (writer.info.backend_pid, "slow service")
    began = value(sql, "SELECT xact_start FROM pg_stat_activity WHERE pid = %s", writer.info.backend_pid)
    assert datetime.fromisoformat(holder["since"]) == began
    writer.rollback()
    assert tail.ids(1) == [2]
    assert tail.end(signal.SIGTERM)[0] == -signal.SIGTERM


def test_i10_without_following_it_ends_before_a_held_up_event_and_reports_it(show: Show, sql: Sql, writer: Sql) -> None:
    add(sql)
    (held,) = show("--from-start")
    assert (held["type"], held["held_event_id"]) == ("held_up", 1)
    writer.commit()
    assert ids(show("--from-start")) == [1, 2]


def test_i10_a_start_now_skips_no_held_up_event(show: Show, sql: Sql, writer: Sql, tmp_path: Path) -> None:
    """The tail ends while the event is uncommitted; the next one, with the same cursor, prints it."""
    words = ("--cursor-file", str(tmp_path / "cursor"))
    add(sql)
    assert ids(show(*words)) == []
    writer.commit()
    assert 1 in ids(show(*words))


def test_i10_a_gap_that_is_filled_before_a_full_batch_hides_no_event_behind_it(
    start: StartTail, sql: Sql, writer: Sql
) -> None:
    """With the gap filled, the next reading ends one event before the last one visible earlier."""
    add(sql, BATCH_LIMIT)
    everything = range(1, BATCH_LIMIT + 2)
    tail = start("lease", "--from-start", "-o", "json", "--until", cursor(everything[-1]))
    until_asleep(sql)
    writer.commit()
    code, lines, _ = tail.ended()
    assert (code, [json.loads(line)["event_id"] for line in lines]) == (0, [*everything])


# -- lag


@pytest.fixture
def lag(call: Call) -> Callable[..., Answer]:
    """Runs `pgcoord tail lease --lag -o json`."""
    return lambda *words: call("tail", "lease", "--lag", "-o", "json", *words)


def test_lag_counts_the_events_after_a_cursor(lag: Callable[..., Answer], sql: Sql) -> None:
    add(sql, 3)
    add_and_roll_back(sql, 2)
    add(sql, 2)
    assert lag("--from", cursor(2)).document == {
        "outbox": "lease_events", "position": cursor(2), "head": cursor(7), "lag": 3, "holder": None,
    }  # fmt: skip
    assert lag("--from", cursor(7)).document["lag"] == 0


def test_lag_is_measured_from_a_checkpoint_that_may_be_in_use(
    checkpoint: tuple[str, str], lag: Callable[..., Answer], start: StartTail, sql: Sql
) -> None:
    tail = start("lease", "--from-start", "-o", "json", *checkpoint)
    assert add(sql, 2) == tail.ids(2)
    until(lambda: lag(*checkpoint).document["lag"] == 0)
    tail.freeze()
    add(sql, 3)
    measured = lag(*checkpoint).document
    assert (measured["position"], measured["head"], measured["lag"]) == (cursor(2), cursor(5), 3)
    tail.signal(signal.SIGCONT)
    assert tail.ids(3) == [3, 4, 5]


def test_lag_names_the_transactions_that_hold_a_tail_up(lag: Callable[..., Answer], sql: Sql, writer: Sql) -> None:
    add(sql)
    measured = lag("--from", cursor(0)).document
    assert (measured["lag"], measured["head"]) == (1, cursor(2))
    assert measured["holder"].keys() == {"pid", "application", "since"}
    assert (measured["holder"]["pid"], measured["holder"]["application"]) == (writer.info.backend_pid, "slow service")


def test_what_a_role_may_not_see_of_a_writer_is_said(
    lag: Callable[..., Answer], start: StartTail, call: Call, settings: Settings, sql: Sql, writer: Sql
) -> None:
    role = f"reader_{uuid.uuid4().hex[:8]}"
    sql.execute(f"CREATE ROLE {role} LOGIN")
    assert call("migrate", "grant", "--reader", role).code == 0
    add(sql)
    reader = make_conninfo(settings.dsn, user=role)
    hidden = lag("--from", cursor(0), "--dsn", reader)
    assert hidden.document["holder"]["since"] is None
    assert "since is hidden" in hidden.err
    assert "needs a GRANT of pg_read_all_stats" in hidden.err
    assert lag("--from", cursor(0)).err == ""
    said = start("lease", "--from-start", "-o", "plain", "--dsn", reader).message("held up")
    assert "(slow service), open since a time that only a role with pg_read_all_stats sees" in said


def test_a_lag_above_the_maximum_is_exit_code_3(lag: Callable[..., Answer], sql: Sql) -> None:
    add(sql, 3)
    for most, code in (("0", 3), ("2", 3), ("3", 0), ("4", 0)):
        answer = lag("--from", cursor(0), "--max-lag", most)
        assert (answer.code, answer.document["lag"]) == (code, 3)
        assert ("lag of 3 events" in answer.err) == (code == 3)


def test_lag_without_a_cursor_is_refused(lag: Callable[..., Answer], tmp_path: Path) -> None:
    assert lag().refusal == "--lag needs a cursor to count from"
    assert lag("--cursor-file", str(tmp_path / "none")).refusal == "--lag needs a cursor to count from"
    assert lag("--subscription", "none").refusal == "--subscription: there is no subscription 'none'"


def test_lag_of_an_invalid_cursor_is_refused(lag: Callable[..., Answer], sql: Sql, call: Call) -> None:
    collected(sql, call)
    assert (lag("--from", cursor(2)).code, lag("--from", cursor(11)).code) == (8, 8)
    assert "is not a cursor" in lag("--from", "2").refusal


def test_lag_in_table_format_has_one_line_per_field(call: Call, sql: Sql) -> None:
    add(sql, 2)
    lines = call("tail", "lease", "--lag", "--from", cursor(1)).out.splitlines()
    assert [line.split() for line in lines] == [
        ["outbox", "lease_events"], ["position", cursor(1)], ["head", cursor(2)], ["lag", "1"], ["holder", "-"],
    ]  # fmt: skip


# -- garbage collection of events


def test_gc_of_lease_events_keeps_young_events_and_those_after_a_subscription(call: Call, show: Show, sql: Sql) -> None:
    add(sql, 5, committed_at_ms=0)
    young = add(sql)
    show("--from-start", "--subscription", "slow", "--max", "3")
    kept_back = call("gc", "lease-events", "--batch-size", "2", "-o", "json").document["lease_events"]
    assert kept_back.keys() == {
        "table", "deleted", "batches", "oldest_kept", "furthest_behind", "dry_run", "held_back",
    }  # fmt: skip
    assert (kept_back["deleted"], kept_back["batches"], kept_back["furthest_behind"]) == (2, 1, "slow"), (
        "it keeps the third"
    )
    show("--subscription", "slow")
    assert call("gc", "lease-events", "--dry-run", "-o", "json").document["lease_events"]["deleted"] == 3
    rest = call("gc", "lease-events", "-o", "json").document["lease_events"]
    assert (rest["deleted"], rest["furthest_behind"]) == (3, None)
    assert ids(show("--from-start")) == young


def test_gc_of_completion_events_ends_at_the_first_that_was_not_dispatched(call: Call, sql: Sql) -> None:
    for dispatched in (1, None, 1):
        add(sql, table="completion_events", committed_at_ms=0, dispatched_at_ms=dispatched)
    assert call("gc", "completion-events", "-o", "json").document["completion_events"]["deleted"] == 1
    assert sql.execute("SELECT event_id FROM completion_events ORDER BY event_id").fetchall() == [(2,), (3,)]


def test_i10_completions_that_gc_kept_do_not_break_a_tail_with_since(call: Call, sql: Sql) -> None:
    for dispatched in (1, None, 1):
        add(sql, table="completion_events", committed_at_ms=0, dispatched_at_ms=dispatched)
    young = add(sql, table="completion_events")
    assert call("gc", "completion-events", "-o", "json").document["completion_events"]["deleted"] == 1
    answer = call("tail", "completion", "--since", "36500d", "--no-follow", "-o", "json")
    assert ids(records(answer)) == [2, 3, *young]


def test_gc_all_is_one_document_and_quiet_when_nothing_was_done(call: Call, sql: Sql) -> None:
    add(sql, 2, committed_at_ms=0)
    add(sql, 1, table="completion_events", committed_at_ms=0, dispatched_at_ms=1)
    counted = call("gc", "all", "--dry-run", "-o", "json").document
    done = call("gc", "all", "-o", "json").document
    for document in (counted, done):
        assert {name: table["deleted"] for name, table in document.items()} == {
            "commit_requests": 0, "lease_events": 2, "completion_events": 1,
        }  # fmt: skip
    assert call("gc", "all", "-q") == (0, "", "")

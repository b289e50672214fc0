"""Output: six formats, colour, terminals and pipes, and the modules that a call imports for it."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
import pytest

from pgcoord_cli.render import Output
from pgcoord_cli.settings import ColorMode, OutputFormat, Presentation, Settings

if TYPE_CHECKING:
    from tests.conftest import Call

LONG = "x" * 300
ESCAPE = "\x1b["
COLOR = re.compile(r"\x1b\[[0-9;]*m")

DOCUMENTS = (("leader", "status"), ("gc", "commit-requests", "--dry-run"))
LISTINGS = (("migrate", "status"), ("commit", "list"), ("kv", "range"))

Environment = dict[str, str]


@pytest.fixture
def stored(sql: psycopg.Connection[Any]) -> None:
    """A long name, a long value and a long reason, and a lease that outlasts the test."""
    sql.execute("INSERT INTO kv VALUES ('key', %s), ('smile', ':smile: [bold]')", [LONG.encode()])
    sql.execute(
        """
        INSERT INTO commit_requests (request_id, epoch, read_version, payload, status, reason, resolved_at)
        VALUES (gen_random_uuid(), 0, 0, '', 'rejected', %s, clock_timestamp())
        """,
        [LONG],
    )
    sql.execute(
        """
        UPDATE leader_lease
           SET epoch = 1, term_id = gen_random_uuid(), leader_addr = %s, acquired_at = clock_timestamp(),
               renewed_at = clock_timestamp(), expires_at = clock_timestamp() + interval '1 hour'
        """,
        [LONG],
    )


def environment(settings: Settings, **variables: str) -> Environment:
    """The environment of a terminal session."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PG", "NO_COLOR", "COLUMNS", "LINES", "PYTHONUNBUFFERED"))
    }
    return clean | {"PGCOORD_DSN": settings.dsn, "TERM": "xterm-256color"} | variables


def on_terminal(words: tuple[str, ...], columns: int, env: Environment) -> str:
    """Returns what `pgcoord …` writes to a terminal of that width: stdout and stderr, interleaved."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "pgcoord_cli", *words], env=env, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65_536):
            shown += chunk
    except OSError:  # Linux reports so that the other end is closed
        pass
    os.close(ours)
    process.wait()
    return shown.decode().replace("\r\n", "\n")


# Formats


@pytest.mark.usefixtures("stored")
def test_a_document_is_the_same_in_every_format(call: Call) -> None:
    for words in DOCUMENTS:
        whole = json.loads(call(*words, "-o", "json").out)
        (line,) = call(*words, "-o", "jsonl").out.splitlines()
        assert json.loads(line).keys() == whole.keys()
        leaves = [f"{section}.{name}" for section, fields in whole.items() for name in fields]
        assert [line.split(" ")[0] for line in call(*words, "-o", "plain").out.splitlines()] == leaves
        records = list(csv.DictReader(io.StringIO(call(*words, "-o", "csv").out)))
        assert [record["field"] for record in records] == leaves
        markdown = call(*words, "-o", "markdown").out.splitlines()
        assert [line.split("|")[1].strip() for line in markdown[2:]] == leaves
        for table in (call(*words).out, call(*words, "-o", "table").out):
            assert [line for line in table.splitlines() if not line.startswith(" ")] == list(whole)
            names = [line.split()[0] for line in table.splitlines() if line.startswith(" ")]
            assert names == [leaf.split(".")[1] for leaf in leaves]


@pytest.mark.usefixtures("stored")
def test_a_listing_has_the_same_columns_and_rows_in_every_format(call: Call) -> None:
    for words in LISTINGS:
        records = json.loads(call(*words, "-o", "json").out)
        assert [json.loads(line) for line in call(*words, "-o", "jsonl").out.splitlines()] == records
        columns, *rows = csv.reader(io.StringIO(call(*words, "-o", "csv").out))
        assert set(columns) <= records[0].keys()
        assert len(rows) == len(records)
        plain = [line.split("\t") for line in call(*words, "-o", "plain").out.splitlines()]
        assert [len(row) for row in plain] == [len(columns)] * len(records)
        for output, extra in (("table", 2), ("markdown", 2)):
            lines = call(*words, "-o", output).out.splitlines()
            assert len(lines) == len(records) + extra
            assert lines[0].replace("|", " ").split() == columns


def test_times_are_iso_8601_in_utc_for_programs(call: Call, sql: psycopg.Connection[Any]) -> None:
    sql.execute("UPDATE schema_migrations SET applied_at = '2026-07-01 02:00:00.5+02'")
    assert json.loads(call("migrate", "status", "-o", "json").out)[0]["applied_at"] == "2026-07-01T00:00:00.500000Z"
    assert "2026-07-01T00:00:00.500000Z" in call("migrate", "status", "-o", "csv").out
    assert "2026-07-01 00:00:00.500Z" in call("migrate", "status").out


def test_an_unknown_format_is_refused_with_its_source(call: Call) -> None:
    for words in (("-o", "xml"), ("--output", "JSON"), ("-o", ""), ("--output=yaml",)):
        refused = call("leader", "status", *words)
        assert (refused.code, refused.out) == (2, "")
        assert refused.err.startswith("error: --output: ")
        assert "table, plain, json, jsonl, csv, markdown" in refused.err
    refused = call("leader", "status", PGCOORD_OUTPUT="xml")
    assert (refused.code, refused.err.split(": ")[1]) == (2, "PGCOORD_OUTPUT")


# Global options


def test_global_options_mean_the_same_in_every_place(call: Call) -> None:
    expected = call("kv", "range", "-o", "csv", "--quiet")
    assert expected == (0, "key,value,encoding\n", "")
    for words in (
        ("-o", "csv", "-q", "kv", "range"), ("kv", "-q", "--output=csv", "range"), ("-q", "kv", "range", "-ocsv"),
        ("-qo", "csv", "kv", "range"), ("-o", "json", "-q", "kv", "range", "-o", "csv"),
    ):  # fmt: skip
        assert call(*words) == expected


def test_flags_win_over_the_environment_and_that_over_the_defaults(call: Call, settings: Settings) -> None:
    assert call("kv", "range", "-q", PGCOORD_OUTPUT="json").out == "[]\n"
    assert call("kv", "range", "-q", "-o", "csv", PGCOORD_OUTPUT="json").out == "key,value,encoding\n"
    assert call("kv", "range", PGCOORD_QUIET="1").err == ""
    assert call("kv", "range", PGCOORD_QUIET="0").err != ""
    assert call("kv", "range", "--dsn", "host=/nowhere").code == 4
    assert call("kv", "range", "--dsn", settings.dsn, PGCOORD_DSN="host=/nowhere").code == 0
    assert call("kv", "range", PGCOORD_SCHEMA="elsewhere").code == 7
    assert call("--schema", "elsewhere", "kv", "range").code == 7
    assert call("kv", "range", "--schema", "pgcoord", PGCOORD_SCHEMA="elsewhere").code == 0
    assert call("kv", "range", PGCOORD_COLOR="sometimes").code == 2


def test_verbose_and_quiet_affect_stderr_only(call: Call) -> None:
    plain = call("gc", "commit-requests")
    assert (plain.code, plain.err) == (0, "")
    assert call("gc", "commit-requests", "-v") == (0, plain.out, "commit_requests: 0 deleted\n")
    assert call("commit", "list", "-v", "-q") == (0, "", "")


def test_the_version_is_printed_in_every_place_of_the_option(call: Call) -> None:
    for words in (("--version",), ("kv", "--version"), ("kv", "get", "--version")):
        assert re.fullmatch(r"pgcoord \d+\.\d+\.\d+\n", call(*words).out)


# Pipes


@pytest.mark.usefixtures("stored")
def test_a_pipe_is_neither_coloured_nor_truncated(call: Call) -> None:
    for words in (*DOCUMENTS, *LISTINGS):
        for output in OutputFormat:
            out = call(*words, "-o", output, COLUMNS="80", TERM="xterm-256color").out
            assert "\x1b" not in out
            assert "…" not in out
            assert (LONG in out) == (words not in (("migrate", "status"), ("gc", "commit-requests", "--dry-run")))


@pytest.mark.usefixtures("stored")
def test_colour_follows_the_option(call: Call) -> None:
    document, listing, refused = ("gc", "commit-requests", "--dry-run"), ("kv", "range"), ("kv", "get", "nokey")
    for words in (document, listing):
        colored = call(*words, "--color", "always").out
        assert ESCAPE in colored
        assert COLOR.sub("", colored).split() == call(*words).out.split()
        assert call(*words, PGCOORD_COLOR="always", NO_COLOR="1").out == colored
        for never in (("--color", "never"), ("--color", "auto"), ()):
            assert ESCAPE not in call(*words, *never).out
    assert ESCAPE in call(*refused, "--color", "always").err
    assert ESCAPE in call(*refused, PGCOORD_COLOR="always").err
    assert ESCAPE not in call(*refused, "--color=never", PGCOORD_COLOR="always").err
    for output in set(OutputFormat) - {OutputFormat.TABLE}:
        assert ESCAPE not in call(*listing, "--color", "always", "-o", output).out


@pytest.mark.usefixtures("stored")
def test_control_characters_are_shown_as_escapes(call: Call, sql: psycopg.Connection[Any]) -> None:
    sql.execute("UPDATE leader_lease SET leader_addr = E'a\\nb\\x1b[2J|\\u202e'")
    for output in (OutputFormat.TABLE, OutputFormat.PLAIN, OutputFormat.MARKDOWN):
        out = call("leader", "status", "-o", output).out
        assert r"a\nb\x1b[2J" in out
        assert r"\u202e" in out
    assert json.loads(call("leader", "status", "-o", "json").out)["leader"]["leader_addr"] == "a\nb\x1b[2J|\u202e"


@pytest.mark.parametrize("output", ["csv", "plain", "markdown", "table"])
def test_nested_values_are_shown_as_json(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = {"executions": [{"id": UUID(int=7), "at": datetime(2026, 1, 31, tzinfo=UTC)}], "rates": [1, 2]}
    Output(Presentation(output=OutputFormat(output), color=ColorMode.NEVER)).document(document)
    shown = capsys.readouterr().out
    assert "UUID(" not in shown
    assert "datetime" not in shown
    assert f"{UUID(int=7)}" in shown
    assert "2026-01-31T00:00:00Z" in shown


@pytest.mark.parametrize(
    "words", [("kv", "load", "-"), ("flow", "create", "-"), ("dev", "down", "--destroy"), ("lock", "break", "nobody")]
)
def test_a_closed_stdin_causes_no_traceback(words: tuple[str, ...], settings: Settings, tmp_path: Path) -> None:
    command = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-m", "pgcoord_cli", *words]
    variables = environment(settings) | {"PGCOORD_DEV_DIR": str(tmp_path)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1, 2, 3), done
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("words", ["leader status", "--help", "kv range --limit 9999 -o jsonl"])
def test_a_closed_pipe_is_no_failure(words: str, settings: Settings, sql: psycopg.Connection[Any]) -> None:
    sql.execute("INSERT INTO kv SELECT int4send(n), %s FROM generate_series(1, 3000) AS n", [LONG.encode()])
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pgcoord_cli", *words.split()]
    done = subprocess.run(
        command, env=environment(settings), stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_pipe_that_is_closed_after_the_first_line_is_no_failure(
    settings: Settings, sql: psycopg.Connection[Any]
) -> None:
    sql.execute("INSERT INTO kv SELECT int4send(n), %s FROM generate_series(1, 3000) AS n", [LONG.encode()])
    line = f"{sys.executable} -m pgcoord_cli kv range --limit 9999 | head -1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], env=environment(settings), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_and_a_closed_stdout_cause_no_traceback(settings: Settings) -> None:
    pgcoord = f"{sys.executable} -m pgcoord_cli"
    for line, code, said in (
        (f"{pgcoord} migrate status > /dev/full", 1, "No space left on device"),
        (f"{pgcoord} migrate status -o json > /dev/full", 1, "No space left on device"),
        (f"{pgcoord} migrate status >&-", 0, ""),
        (f"{pgcoord} kv get nokey 2>&-", 3, ""),
        (f"{pgcoord} kv get nokey 2>/dev/full", 3, ""),
    ):
        done = subprocess.run(
            ["bash", "-c", line], env=environment(settings), capture_output=True, text=True, check=False
        )
        assert (line, done.returncode) == (line, code)
        assert "Traceback" not in done.stderr
        assert said in done.stderr


def test_json_is_valid_in_a_locale_without_unicode(
    call: Call, settings: Settings, sql: psycopg.Connection[Any]
) -> None:
    sql.execute("INSERT INTO kv VALUES ('key', 'é✓😀')")
    for line, expected in (("kv get key -o json", "é✓😀"), ("kv get key -o plain", "\\xe9\\u2713\\U0001f600\n")):
        done = subprocess.run(
            [sys.executable, "-m", "pgcoord_cli", *line.split()],
            env=environment(settings, PYTHONIOENCODING="ascii"), capture_output=True, check=True,
        )  # fmt: skip
        text = done.stdout.decode("ascii")
        assert (json.loads(text)["value"] if "json" in line else text) == expected
    assert "é✓😀" in call("kv", "get", "key", "-o", "json").out


# Terminals


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("columns", [80, 200])
def test_output_to_a_terminal_is_coloured_and_wrapped(columns: int, settings: Settings) -> None:
    env = environment(settings)
    status = on_terminal(("leader", "status"), columns, env)
    assert "\x1b[1mleader\x1b[0m" in status
    assert LONG in status
    for words in (("kv", "range"), ("commit", "list")):
        listing = on_terminal(words, columns, env)
        assert ESCAPE in listing
        assert "…" not in listing
        lines = COLOR.sub("", listing).splitlines()
        assert max(map(len, lines)) <= columns
        assert sum(line.count("x") for line in lines) >= len(LONG)
        assert len([line for line in lines if "xxx" in line]) > 1
    assert ":smile: [bold]" in on_terminal(("kv", "range"), columns, env)


@pytest.mark.usefixtures("stored")
def test_output_without_colour_has_the_same_layout(settings: Settings) -> None:
    env = environment(settings)
    assert "\x1b" not in on_terminal(("leader", "status"), 80, env | {"NO_COLOR": "1"})
    assert "\x1b" not in on_terminal(("leader", "status", "--color", "never"), 80, env)
    assert "\x1b" not in on_terminal(("kv", "get", "nokey", "--color", "never"), 80, env)
    colored, bare = (on_terminal(("kv", "range"), 80, env | {"PGCOORD_COLOR": mode}) for mode in ("always", "never"))
    assert COLOR.sub("", colored) == bare
    assert "\x1b" in on_terminal(("kv", "get", "nokey"), 80, env)
    assert "\x1b" not in on_terminal(("leader", "status"), 80, env | {"TERM": "dumb"})


# What a call imports

SCRIPT = """
import sys
from pgcoord_cli.cli import run
try:
    code = run(sys.argv[1:])
finally:
    print(*sys.modules, file=sys.stderr)
"""


# Some versions of Typer import it to convert each parameter; that takes longer than the rest of a call.
PYDANTIC = {"pydantic", "pydantic_core"}
HEAVY = PYDANTIC | {"psycopg", "rich", "tabulate", "asyncio", "msgpack", "pgcoord_cli.render"}


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        (("--help",), HEAVY | {"pgcoord_cli.commands.kv"}),
        (("leader", "--help"), HEAVY),
        (("--version",), HEAVY),
        # psycopg itself imports asyncio.
        (("leader", "status"), PYDANTIC | {"rich", "tabulate", "msgpack", "pgcoord_cli.core.kv.client"}),
        (("leader", "status", "-o", "json"), PYDANTIC | {"rich", "tabulate", "msgpack", "pgcoord_cli.core.kv.client"}),
        (("kv", "get", "key", "-o", "plain"), PYDANTIC | {"rich", "tabulate", "pgcoord_cli.core.kv.client"}),
        # Every kind of parameter: numbers and lists of them, choices, paths, flags, texts, invalid and missing ones.
        (("leader", "history", "--limit", "5", "-q"), PYDANTIC),
        (("tail", "lease", "--partition", "1", "--cursor-file", "/nowhere/cursor", "--no-follow"), PYDANTIC),
        (("flow", "show", "x", "--format", "dot"), PYDANTIC),
        (("lock", "run", "--wait", "1s", "name", "--", "true"), PYDANTIC),
        (("leader", "history", "--limit", "x"), PYDANTIC),
        (("leader", "assert"), PYDANTIC),
    ],
)
def test_a_call_loads_no_more_than_it_needs(words: tuple[str, ...], unwanted: set[str], settings: Settings) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words], env=environment(settings), capture_output=True, text=True, check=False
    )
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "pgcoord_cli.cli" in loaded
    assert loaded & unwanted == set()

"""Invalid arguments: exit 2, a message that names them, no effect, no traceback, and never a password."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from typer.core import TyperArgument, TyperOption

from pgcoord_cli.commands.global_options import GLOBAL_NAMES
from pgcoord_cli.settings import Settings
from tests.cli.command_tree import LEAVES, NAMES
from tests.cli.test_exit_codes import ARGUMENTS

if TYPE_CHECKING:
    from tests.conftest import Answer, Call, Cli

SECRET = "s3cr3t-w0rd"


def assert_refused(answer: Answer, *said: str) -> None:
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ")
    assert "Traceback" not in answer.err
    for text in said:
        assert text in answer.err


# Arguments


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("leadr", "status"), ["No such command 'leadr'", "Did you mean 'leader'?", "see: pgcoord --help"]),
        (("leader", "stauts"), ["Did you mean 'status'?", "see: pgcoord leader --help"]),
        (("gc", "commit-request"), ["Did you mean 'commit-requests'?"]),
        (("leader", "status", "--wacth"), ["--watch"]),
        (("--outptu", "json", "leader", "status"), ["--output"]),
        (("xyzzy",), ["No such command 'xyzzy'"]),
        (("kv", "set"), ["Missing argument 'KEY'", "see: pgcoord kv set --help"]),
        (("kv", "set", "key"), ["Missing argument 'VALUE'"]),
        (("commit", "show"), ["Missing argument 'REQUEST_ID'"]),
        (("kv", "get", "a", "b"), ["unexpected extra argument", "(b)"]),
        (("leader", "status", "--dsn"), ["--dsn", "requires an argument"]),
        (("kv", "set", "key", "-5"), ["-5"]),
        (("leader", "status", "--color", "purple"), ["--color: 'purple' is not one of auto, always, never"]),
        (("leader", "status", "--log-format", "xml"), ["--log-format: 'xml' is not one of text, json"]),
        (("leader", "history", "--limit", "99999999999"), ["--limit: 99999999999 is too many"]),
        (("migrate", "up", "--to", "two"), ["Invalid value for '--to': 'two' is not an integer.", "migrate up --help"]),
        (("kv", "add", "key", "1.5"), ["Invalid value for 'AMOUNT': '1.5' is not an integer."]),
        (("kv", "range", "--limit", "0"), ["Invalid value for '--limit': 0 is not in the range x>=1."]),
        (("worker", "run", "--concurrency", "257"), ["'--concurrency': 257 is not in the range 1<=x<=256."]),
        (("leader", "assert"), ["Missing option '--epoch'.", "see: pgcoord leader assert --help"]),
        (("lock", "run", "name"), ["Missing argument '-- CMD...'."]),
        (
            ("flow", "show", "x", "--format", "xml"),
            ["'--format': 'xml' is not one of 'tree', 'mermaid', 'dot', 'json'."],
        ),
        (("reconcile", "ALL"), ["Invalid value for 'WHICH': 'ALL' is not one of 'dependency', 'lease-expiry'"]),
        (("leader", "run", "--with", "dispatch", "--with", "gc"), ["'--with': 'gc' is not one of 'dispatch'."]),
        (("tail", "lease", "--partition", "1", "--partition", "x"), ["'--partition': 'x' is not an integer."]),
        (("leader", "run", "--node-id", "\udcff"), ["--node-id: not UTF-8 text"]),
        (("leader", "status", "--dsn", "host=\udcff"), ["--dsn: not UTF-8 text"]),
        (("migrate", "grant", "--reader", "\udcff"), ["--reader: not UTF-8 text", "see: pgcoord migrate grant --help"]),
    ],
)
def test_an_invalid_argument_is_named(words: tuple[str, ...], said: list[str], offline: Call) -> None:
    assert_refused(offline(*words), *said)


OPTIONS = [
    (name, option)
    for name, command in zip(NAMES, LEAVES.values(), strict=True)
    for option in command.params
    if isinstance(option, TyperOption) and not option.is_flag and option.name not in GLOBAL_NAMES
]


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=[f"{name} {option.name}" for name, option in OPTIONS])
def test_no_value_of_an_option_is_a_traceback(
    name: str, option: TyperOption, offline: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A number that is out of range, no number, an empty value, bytes that are not UTF-8: named, or the server is."""
    monkeypatch.chdir(tmp_path)  # for options that name a file
    monkeypatch.setenv("PGCOORD_DEV_DIR", str(tmp_path))
    declared = LEAVES[f"pgcoord {name}"].declaration(option)
    for value in ("\udcff", "", "9" * 30, "-1", "nan", "1e999", "\x1b[31m"):
        answer = offline(*name.split(), option.opts[-1], value, *ARGUMENTS.get(name, ()))
        assert answer.code in (0, 1, 2, 3, 4), (value, answer)
        assert "Traceback" not in answer.err
        if declared.type is str and value == "\udcff":
            assert_refused(answer, f"{option.opts[-1]}: not UTF-8 text", f"hint: see: pgcoord {name} --help")


@pytest.mark.parametrize(
    "text", ["0", "0s", "0.5s", "999ms", "-5s", "", "soon", "10 s", "1s5", "5w", "1e3", "١s", "nan", "inf", "9" * 400]
)
def test_an_invalid_time_to_live_is_refused(text: str, offline: Call) -> None:
    assert_refused(offline("leader", "run", "--ttl", text), "--ttl")


@pytest.mark.parametrize("option", ["leader status --watch --interval", "leader run --ttl", "kv set a b --timeout"])
def test_a_wait_longer_than_postgresql_can_count_is_refused(option: str, offline: Call) -> None:
    *words, name = option.split()
    assert_refused(offline(*words, name, "25d"), f"{name}: '25d' is too long; the most is 24d")
    assert offline(*words, name, "24d").code == 4


@pytest.mark.parametrize("schema", ["", 'a"b', "a'b", "A", "a b", "a;b", "pg_x", "é", "\udcff", "x" * 41])
def test_a_schema_that_needs_quotes_is_refused(schema: str, offline: Call) -> None:
    assert_refused(offline("leader", "status", "--schema", schema), "--schema: ")
    if schema:
        assert_refused(offline("leader", "status", PGCOORD_SCHEMA=schema), "PGCOORD_SCHEMA: ")


@pytest.mark.parametrize("variable", ["CONNECT_TIMEOUT", "STATEMENT_TIMEOUT", "LOCK_TIMEOUT"])
def test_an_invalid_variable_is_named(variable: str, offline: Call) -> None:
    for text in ("soon", "-1s", "25d", "9" * 400):
        assert_refused(offline("leader", "status", **{f"PGCOORD_{variable}": text}), f"PGCOORD_{variable}: ")


def test_variables_that_are_no_settings_are_ignored(offline: Call) -> None:
    assert offline("leader", "status", PGCOORD_DSN_SOURCE="me", PGCOORD_SCHEMA_GIVEN="1", PGCOORD_FOO="bar").code == 4


# Connection strings

MALFORMED = [
    f"postgresql://u:{SECRET}@[::1/db",
    f"postgresql://u:{SECRET}@localhost:port/db",
    f"postgresql://u:{SECRET}@localhost/db?bogus=1",
    f"postgresql://u:{SECRET}@localhost/db?sslmode=bogus",
    f"postgresql://u:{SECRET}%zz@localhost/db",
    f"postgresql://u:{SECRET}@with@localhost/db",
    f"host=localhost password='{SECRET}",
    f"host=localhost password={SECRET} bogus=1",
    f"host=localhost password={SECRET} port=99999999",
    f"host=localhost password={SECRET} connect_timeout=soon",
    f"{SECRET}",
    f"password {SECRET}",
]

UNREACHABLE = [
    f"postgresql://u:{SECRET}@127.0.0.1:1/db",
    f"host=127.0.0.1 port=1 user=u password={SECRET}",
    f"host=/nowhere password='{SECRET}'",
    f"postgresql://u@127.0.0.1:1/db?password={SECRET}",
]


def shown(answer: Answer) -> str:
    return answer.out + answer.err


@pytest.mark.parametrize("dsn", MALFORMED)
def test_a_malformed_connection_string_is_refused_without_its_password(dsn: str, offline: Call) -> None:
    for words in (("leader", "status"), ("kv", "set", "a", "b")):
        by_flag = offline(*words, "-v", "--dsn", dsn)
        by_variable = offline(*words, "-v", PGCOORD_DSN=dsn)
        assert_refused(by_flag, "--dsn: ")
        assert_refused(by_variable, "PGCOORD_DSN: ")
        assert SECRET not in shown(by_flag) + shown(by_variable) + shown(offline(*words, "-o", "json", "--dsn", dsn))


@pytest.mark.parametrize(
    ("dsn", "said"),
    [
        ("host=/nowhere bogus=1", ['invalid connection option "bogus"']),
        ("host=/nowhere prot=5432", ['invalid connection option "prot"', "did you mean port?"]),
        (f"password={SECRET} prot=5432", ['invalid connection option "prot"', "did you mean port?"]),
        (f"password=x {SECRET}=1", ["invalid connection option after the password, which needs quotes"]),
        ("postgresql:///db?bogus=1", ['invalid URI query parameter: "bogus"']),
        ("host=/nowhere port", ['missing "=" after a word']),
        ("host='/nowhere", ["unterminated quoted string"]),
        ("postgresql://[::1/db", ['end of string reached when looking for matching "]" in IPv6 host address']),
        (f"postgresql://u:{SECRET}%zz@/db", ["invalid percent-encoded token"]),
        ("postgresql:///db\n", ["the URI contains a line break"]),
        ("service=none", ['definition of service "none" not found']),
        ("host=/nowhere sslmode=perhaps", ["sslmode"]),
    ],
)
def test_the_reason_of_libpq_is_passed_on(dsn: str, said: list[str], offline: Call) -> None:
    refused = offline("leader", "status", PGCOORD_DSN=dsn)
    assert_refused(refused, "PGCOORD_DSN: ", "hint: ", *said)
    assert SECRET not in refused.err


@pytest.mark.parametrize("text", ["[none]\nhost\n", "[none]\nbogus=1\n", "[none]\nport=many\n", "[other]\n"])
def test_a_service_that_cannot_be_used_is_named(text: str, offline: Call, tmp_path: Path) -> None:
    (tmp_path / "services").write_text(text)
    refused = offline("leader", "status", PGCOORD_DSN="service=none", PGSERVICEFILE=str(tmp_path / "services"))
    assert_refused(refused, "PGCOORD_DSN: ", "hint: ")


def test_an_unknown_home_directory_is_named(offline: Call) -> None:
    refused = offline("dev", "status", PGCOORD_DEV_DIR="~no-such-user/dev")
    assert_refused(refused, "PGCOORD_DEV_DIR: no home directory is known for '~no-such-user/dev'", "hint: ")


@pytest.mark.parametrize("dsn", UNREACHABLE)
def test_an_unreachable_server_is_named_without_the_password(dsn: str, offline: Call) -> None:
    for words in (("leader", "status"), ("leader", "run"), ("kv", "set", "a", "b"), ("migrate", "up")):
        for output in ("table", "json"):
            failed = offline(*words, "-v", "-o", output, PGCOORD_DSN=dsn)
            assert failed.code == 4
            assert ("127.0.0.1" if "127" in dsn else "/nowhere") in shown(failed)
            assert SECRET not in shown(failed)


def test_no_error_of_a_real_process_shows_a_password(
    cli: Cli, settings: Settings, empty_settings: Settings, sql: psycopg.Connection[Any]
) -> None:
    stranger = f"stranger_{uuid.uuid4().hex[:8]}"
    sql.execute(f"CREATE ROLE {stranger} LOGIN")
    with_secret = {"PGCOORD_DSN": f"{settings.dsn} password={SECRET}"}
    for words, env in (
        (("kv", "get", "nokey"), with_secret),
        (("kv", "set", "a", "b", "--timeout", "50ms"), with_secret),
        (("leader", "status", "-o", "json"), with_secret),
        (("leader", "status"), {"PGCOORD_DSN": f"{settings.dsn} password={SECRET} user={stranger}"}),
        (("leader", "status"), {"PGCOORD_DSN": f"{empty_settings.dsn} password={SECRET}"}),
        (("leader", "status"), {"PGCOORD_DSN": "host=/nowhere", "PGPASSWORD": SECRET}),
    ):
        failed = cli(*words, "-v", env=env)
        assert failed.returncode != 0
        assert SECRET not in failed.stdout + failed.stderr
        assert "Traceback" not in failed.stderr


# Every positional argument

POSITIONS = [
    (name, index, argument.name)
    for name, command in zip(NAMES, LEAVES.values(), strict=True)
    for index, argument in enumerate(each for each in command.params if isinstance(each, TyperArgument))
]
# No null byte: an argument of a process cannot contain one.
VALUES = {"no UTF-8": "\udcff", "empty": "", "huge": "9" * 5000, "terminal": "\x1b[31m"}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize(
    ("name", "index", "argument"), POSITIONS, ids=[f"{name} {last}" for name, _, last in POSITIONS]
)
def test_no_value_of_an_argument_is_a_traceback(
    name: str, index: int, argument: str, value: str, offline: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Exit code 2 names the argument; a value that is accepted gets as far as the server, which is not there."""
    words = list(ARGUMENTS.get(name, ()))
    words[index : index + 1] = [value]
    answer = offline(*name.split(), *words)
    assert "Traceback" not in answer.err
    assert "\x1b" not in answer.err
    assert answer.code in (2, 4), answer
    assert answer.out == ""
    assert ("hint: " if answer.code == 2 else "the address comes from PGCOORD_DSN") in answer.err


@pytest.mark.parametrize("value", ["", "x" * 201, "a\0b", "\udcff"])
@pytest.mark.parametrize(
    "words",
    [
        ("lock", "run", "", "true"), ("lock", "who", ""), ("lock", "break", "", "--yes"), ("subscription", "show", ""),
        ("subscription", "set", "", "1"), ("subscription", "reset", "", "--force"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_name_that_no_lock_can_have_is_refused(words: tuple[str, ...], value: str, offline: Call) -> None:
    assert_refused(offline(*(word or value for word in words)), "NAME: ")


# The environment

BAD_VALUES = {
    "SCHEMA": ("", "a b", "\udcff"),
    "OUTPUT": ("", "xml", "\udcff"),
    "COLOR": ("", "purple", "\udcff"),
    "LOG_FORMAT": ("", "xml", "\udcff"),
    "CONNECT_TIMEOUT": ("", "soon", "\udcff"),
    "STATEMENT_TIMEOUT": ("", "soon", "\udcff"),
    "LOCK_TIMEOUT": ("", "soon", "\udcff"),
    "DSN": ("host", "\udcff"),
}


@pytest.mark.parametrize("variable", BAD_VALUES)
def test_every_variable_with_a_bad_value_is_named(variable: str, offline: Call) -> None:
    for value in BAD_VALUES[variable]:
        answer = offline("leader", "status", **{f"PGCOORD_{variable}": value})
        if value:
            assert_refused(answer, f"PGCOORD_{variable}: ")
        else:  # counts as unset
            assert answer.code == 4
        assert "Traceback" not in answer.err

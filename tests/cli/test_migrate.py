"""`pgcoord migrate`, and the errors of every other command on an unsuitable schema."""

from __future__ import annotations

import json
import runpy
import subprocess
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgcoord_cli.core.database.advisory_keys import lock_key
from pgcoord_cli.core.database.migrations import migration_files
from pgcoord_cli.core.database.upgrade import upgrade
from pgcoord_cli.core.embedded.installation import find_installation
from pgcoord_cli.settings import Settings
from tests.cli.command_tree import NAMES
from tests.conftest import Answer

if TYPE_CHECKING:
    from tests.conftest import Call, Cli, StartLeader


REPOSITORY = Path(__file__).resolve().parents[2]
FILES = migration_files()
STATES_COLUMNS = ["version", "name", "state", "applied_at", "applied_by", "execution_ms"]

NEED_A_SCHEMA = {
    "migrate up": (), "migrate status": (), "migrate verify": (), "migrate grant": ("--reader", "postgres"),
    "leader run": (), "leader status": (), "leader wait": (), "leader step-down": (), "leader history": (),
    "leader assert": ("--epoch", "1"),
    "kv get": ("key",), "kv set": ("key", "value"), "kv clear": ("key",), "kv clear-range": ("key", "kez"),
    "kv add": ("key", "1"), "kv range": (), "kv export": (), "kv load": ("/dev/null",),
    "kv txn": ("docs/transaction.jsonl",), "kv watch": ("key", "--max", "1"),
    "commit list": (), "commit show": (str(uuid.uuid4()),), "commit explain": (str(uuid.uuid4()),),
    "gc commit-requests": (), "gc lease-events": (), "gc completion-events": (), "gc all": (), "bench": (),
    "flow create": ("docs/flow.yaml",), "flow list": (),
    "flow show": (str(uuid.uuid4()),), "flow cancel": (str(uuid.uuid4()),),
    "execution claim": (), "execution show": (str(uuid.uuid4()),), "execution revoke": (str(uuid.uuid4()),),
    "execution renew": (str(uuid.uuid4()), "--epoch", "1"), "execution complete": (str(uuid.uuid4()), "--epoch", "1"),
    "execution fail": (str(uuid.uuid4()), "--epoch", "1"), "worker run": ("--once",), "reconcile": (),
    "lock run": ("name", "true"), "lock list": (), "lock who": ("name",), "lock break": ("name", "--yes"),
    "subscription list": (), "subscription show": ("name",), "subscription set": ("name", "1"),
    "subscription reset": ("name", "--force"),
    "tail lease": ("--no-follow",), "tail completion": ("--no-follow",),
}  # fmt: skip
"""Every command that works on a schema, with its required arguments."""

NEED_NONE = {"migrate sql", "dev up", "dev down", "dev dsn", "dev status", "demo"}


@pytest.fixture
def call(offline: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs `pgcoord …` on the database of `settings`, in this process: hundreds of starts would take minutes."""
    monkeypatch.delenv("PGCOORD_SCHEMA", raising=False)

    def run(settings: Settings, *words: str, **variables: str) -> Answer:
        return offline(*words, **{"PGCOORD_DSN": settings.dsn, **variables})

    return run


def connect(settings: Settings, **options: Any) -> psycopg.Connection[Any]:
    return psycopg.connect(settings.dsn, autocommit=True, options=f"-c search_path={settings.schema}", **options)


def as_new_role(settings: Settings, *grants: str) -> Settings:
    """Settings of a new role, after the statements have been executed with its name for `ROLE`."""
    role = f"role_{uuid.uuid4().hex[:8]}"
    with connect(settings) as conn:
        conn.execute(f"CREATE ROLE {role} LOGIN")
        for statement in grants:
            conn.execute(statement.replace("ROLE", role))
    return replace(settings, dsn=make_conninfo(settings.dsn, user=role))


def picture(settings: Settings) -> dict[str, Any]:
    """Everything in the schema: the rows of each table, and the privileges."""
    with connect(settings) as conn:
        tables = conn.execute("SELECT tablename FROM pg_tables WHERE schemaname = %s", [settings.schema]).fetchall()
        rows = {table: conn.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for (table,) in tables}
        rights = conn.execute(
            "SELECT relname, relacl::text FROM pg_class WHERE relnamespace = to_regnamespace(%s) ORDER BY 1",
            [settings.schema],
        )
        return {**rows, "rights": rights.fetchall()}


# Every command and every schema


def test_i14_no_command_is_missing_from_these_tests() -> None:
    assert set(NAMES) == NEED_A_SCHEMA.keys() | NEED_NONE


def codes(call: Call, settings: Settings, *words: str, without: set[str] | None = None) -> dict[str, int]:
    """Exit code of each command that works on a schema."""
    commands = {name: more for name, more in NEED_A_SCHEMA.items() if name not in (without or set())}
    return {name: call(settings, *name.split(), *more, *words).code for name, more in commands.items()}


def test_i14_every_command_on_an_unmigrated_database_names_the_repair(call: Call, empty_settings: Settings) -> None:
    looking = {"migrate status", "migrate up"}
    assert set(codes(call, empty_settings, without=looking).values()) == {7}
    for name, more in NEED_A_SCHEMA.items():
        if name not in looking:
            error = call(empty_settings, *name.split(), *more, "-o", "json").document["error"]
            assert (error["code"], error["hint"]) == ("schema_missing", "create it with: pgcoord migrate up"), name
    assert picture(empty_settings) == {"rights": []}


def test_i14_every_command_on_an_older_schema_names_the_repair(call: Call, empty_settings: Settings) -> None:
    assert call(empty_settings, "migrate", "up", "--to", "1").code == 0
    before = picture(empty_settings)
    looking = {"migrate status", "migrate up", "migrate verify"}
    assert set(codes(call, empty_settings, without=looking).values()) == {7}
    answer = call(empty_settings, "kv", "set", "key", "value")
    assert answer.err.splitlines() == [
        f"error: schema 'pgcoord' lacks {len(FILES) - 1} migration(s), from 0002_commits on",
        "hint: bring it up to date with: pgcoord migrate up",
    ]
    assert picture(empty_settings) == before
    assert call(empty_settings, "migrate", "verify", "-o", "json").document == {
        "schema": "pgcoord", "verified": 1, "pending": len(FILES) - 1, "unknown": 0,
    }  # fmt: skip


def test_i14_every_command_refuses_a_schema_with_an_unknown_breaking_migration(call: Call, settings: Settings) -> None:
    add_newer_migration(settings, breaking=True)
    before = picture(settings)
    assert set(codes(call, settings).values()) == {7}
    assert set(codes(call, settings, "-o", "json").values()) == {7}
    error = call(settings, "leader", "status", "-o", "json").document["error"]
    assert error["code"] == "schema_unknown"
    assert "9001_new" in error["message"]
    assert "upgrade pgcoord" in error["hint"]
    listing = call(settings, "migrate", "status", "-o", "json")
    assert listing.document[-1]["state"] == "breaking"
    assert "9001_new" in listing.err
    assert call(settings, "migrate", "up", "--dry-run").code == 7
    assert picture(settings) == before


def test_every_command_works_beside_an_unknown_migration_that_is_not_breaking(
    call: Call, settings: Settings, start_leader: StartLeader
) -> None:
    add_newer_migration(settings, breaking=False)
    start_leader("one").wait_for("elected epoch")
    special = {
        "leader run", "leader step-down", "leader assert", "commit show", "commit explain", "kv get", "kv txn", "bench",
        "flow show", "flow cancel", "worker run", "lock who", "lock break", "subscription show", "subscription set",
        "subscription reset", *(name for name in NEED_A_SCHEMA if name.startswith("execution ")),
    }  # fmt: skip
    assert codes(call, settings, without=special) == dict.fromkeys(NEED_A_SCHEMA.keys() - special, 0)
    assert call(settings, "kv", "set", "key", "value").code == 0
    assert call(settings, "kv", "get", "key", "-o", "plain").out == "value\n"
    (request, *_) = call(settings, "commit", "list", "-o", "json").document
    for word in ("show", "explain"):
        assert call(settings, "commit", word, request["request_id"]).code == 0
    assert call(settings, "leader", "assert", "--epoch", "1").code == 0
    assert call(settings, "bench", "--duration", "100ms").code == 0
    (flow, *_) = call(settings, "flow", "list", "-o", "json").document
    claimed = call(settings, "execution", "claim", "-o", "json").document["execution_id"]
    assert call(settings, "execution", "complete", claimed, "--epoch", "1").code == 0
    assert call(settings, "flow", "show", flow["flow_id"]).code == 0
    assert call(settings, "leader", "step-down", "--wait").code == 0
    assert call(settings, "migrate", "status", "--check").code == 0
    assert call(settings, "migrate", "verify", "-o", "json").document == {
        "schema": "pgcoord", "verified": len(FILES), "pending": 0, "unknown": 1,
    }  # fmt: skip
    assert call(settings, "migrate", "up", "-o", "json").document == []


def add_newer_migration(settings: Settings, *, breaking: bool) -> None:
    with connect(settings) as conn:
        conn.execute("INSERT INTO schema_migrations VALUES (9001, 'new', 'x', now(), 'x', 1, %s)", [breaking])


def test_i14_a_mistyped_schema_is_distinguished_from_an_unmigrated_one(call: Call, settings: Settings) -> None:
    looking = {"migrate status", "migrate up"}
    assert set(codes(call, settings, "--schema", "pgcrood", without=looking).values()) == {7}
    error = call(settings, "kv", "set", "key", "value", "--schema", "pgcrood", "-o", "json").document["error"]
    assert error["code"] == "schema_missing"
    assert error["message"].startswith("--schema or PGCOORD_SCHEMA: there is no pgcoord schema 'pgcrood'")
    assert error["hint"] == "found: pgcoord; create a new one with: pgcoord migrate up --schema pgcrood"
    with connect(settings) as conn:
        assert conn.execute("SELECT to_regnamespace('pgcrood')").fetchone() == (None,)


def test_i14_a_renamed_schema_is_reported_with_its_cure(call: Call, settings: Settings) -> None:
    with connect(settings) as conn:
        conn.execute("ALTER SCHEMA pgcoord RENAME TO coord")
    listed = call(settings, "migrate", "status", "--schema", "coord")
    assert (listed.code, listed.out.count("applied ")) == (7, len(FILES))
    cure = 'ALTER SCHEMA "coord" RENAME TO "pgcoord"'
    assert f"hint: rename it back: {cure}" in listed.err
    assert set(codes(call, settings, "--schema", "coord").values()) == {7}
    for words in (("migrate", "up", "--dry-run"), ("migrate", "verify"), ("kv", "set", "a", "b")):
        error = call(settings, *words, "--schema", "coord", "-o", "json").document["error"]
        assert error["code"] == "schema_unknown"
        assert error["message"].startswith("schema 'coord' was named 'pgcoord' when it was migrated")
        assert cure in error["hint"]
    with connect(settings) as conn:
        conn.execute(cure)
    assert call(settings, "migrate", "verify").code == 0


def test_the_default_schema_is_unmigrated_even_beside_another_one(call: Call, empty_settings: Settings) -> None:
    upgrade(replace(empty_settings, schema="staging"))
    answer = call(empty_settings, "leader", "status")
    assert (answer.code, answer.err.splitlines()[1]) == (7, "hint: create it with: pgcoord migrate up")


@pytest.mark.parametrize("name", ['we"ird', "it's", "Upper", "", "s" * 41, "pg_mine", "1st", "a-b", "a b", "ä", "a;b"])
def test_a_name_that_cannot_be_a_schema_is_refused(name: str, call: Call) -> None:
    nowhere = Settings(dsn="host=/nowhere")
    answer = call(nowhere, "migrate", "up", "--schema", name)
    assert answer.code == 2
    assert answer.err.startswith(f"error: --schema: {name!r} cannot be a pgcoord schema\nhint: use up to 40 ")
    if name:  # an empty variable counts as not set
        answer = call(nowhere, "migrate", "up", PGCOORD_SCHEMA=name)
        assert answer.code == 2
        assert answer.err.startswith(f"error: PGCOORD_SCHEMA: {name!r} cannot be a pgcoord schema\n")


@pytest.mark.parametrize("name", ["s" * 40, "order"])
def test_a_name_that_can_be_a_schema_is_accepted(name: str, call: Call, empty_settings: Settings) -> None:
    assert call(empty_settings, "migrate", "up", "--schema", name).code == 0
    assert call(empty_settings, "migrate", "status", "--check", "--schema", name).code == 0
    assert call(empty_settings, "gc", "commit-requests", "--schema", name).code == 0


# up


def test_up_lists_what_it_applied_and_then_that_the_schema_is_up_to_date(call: Call, empty_settings: Settings) -> None:
    first = call(empty_settings, "migrate", "up", "-o", "json")
    assert first.document == [{"version": file.version, "name": file.name, "state": "applied"} for file in FILES]
    assert first.err.splitlines() == [f"applied {file.version:04}_{file.name}" for file in FILES]
    assert call(empty_settings, "migrate", "up", "-o", "json") == Answer(0, "[]\n", "")
    assert call(empty_settings, "migrate", "up") == Answer(0, "", "schema pgcoord is up to date\n")
    assert call(empty_settings, "migrate", "up", "-q") == Answer(0, "", "")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--to", "9001"), "--to"), (("--to", "0"), "--to"), (("--to", "one"), "--to"),
        (("--lock-timeout", "0"), "--lock-timeout"), (("--lock-timeout", "soon"), "--lock-timeout"),
        (("--lock-timeout", "-1s"), "--lock-timeout"),
    ],
)  # fmt: skip
def test_up_refuses_an_invalid_argument_and_names_its_option(
    words: tuple[str, ...], named: str, call: Call, empty_settings: Settings
) -> None:
    for more in ((), ("--dry-run",)):
        answer = call(empty_settings, "migrate", "up", *words, *more)
        assert answer.code == 2
        assert named in answer.err
    assert picture(empty_settings) == {"rights": []}


def test_up_names_the_run_that_it_waits_for_and_times_out(cli: Cli, empty_settings: Settings) -> None:
    with connect(empty_settings, application_name="deploy job 7") as other:
        other.execute("SELECT pg_advisory_lock(%s)", [lock_key("pgcoord", "migrate")])
        holder = f"pid {other.info.backend_pid} (deploy job 7, local) since "
        words = ("migrate", "up", "--lock-timeout", "100ms")
        plain = cli(*words, settings=empty_settings)
        as_json = cli(*words, "-o", "json", settings=empty_settings)
    assert (plain.returncode, plain.stdout) == (5, "")
    waiting, error, hint = plain.stderr.splitlines()
    assert waiting.startswith(f"waiting for the migration lock held by {holder}")
    assert error.startswith(f"error: another migration run holds the lock: {holder}")
    assert "--lock-timeout" in hint
    assert as_json.returncode == 5
    assert json.loads(as_json.stdout)["error"]["code"] == "busy"


# --dry-run


def test_a_dry_run_needs_the_right_to_read_only(call: Call, empty_settings: Settings) -> None:
    upgrade(empty_settings, to=1)
    looker = as_new_role(
        empty_settings, "GRANT USAGE ON SCHEMA pgcoord TO ROLE", "GRANT SELECT ON schema_migrations TO ROLE"
    )
    before = picture(empty_settings)
    planned = call(looker, "migrate", "up", "--dry-run", "-o", "json")
    assert planned.document == [{"version": f.version, "name": f.name, "state": "pending"} for f in FILES[1:]]
    assert call(looker, "migrate", "status", "--check").code == 3
    assert call(looker, "migrate", "verify").code == 0
    assert call(looker, "migrate", "up").code == 1
    assert picture(empty_settings) == before


def test_a_dry_run_needs_no_rights_on_an_empty_database(call: Call, empty_settings: Settings) -> None:
    role = as_new_role(empty_settings)
    planned = call(role, "migrate", "up", "--dry-run", "-o", "json")
    assert [each["version"] for each in planned.document] == [file.version for file in FILES]
    assert call(role, "migrate", "up", "--dry-run", "--to", "1", "-o", "plain").out == "1\tleader\tpending\n"
    refused = call(role, "migrate", "up", "-o", "json")
    assert (refused.code, refused.document["error"]["code"]) == (1, "permission_denied")
    assert "it lacks CREATE on database" in refused.document["error"]["message"]
    assert "GRANT CREATE ON DATABASE" in refused.document["error"]["hint"]
    assert picture(empty_settings) == {"rights": []}


def test_i15_a_default_of_read_only_transactions_has_no_effect(call: Call, empty_settings: Settings) -> None:
    with connect(empty_settings) as conn:
        conn.execute(f"ALTER DATABASE {conn.info.dbname} SET default_transaction_read_only = on")
    assert call(empty_settings, "migrate", "up").code == 0
    assert call(empty_settings, "migrate", "status", "--check").code == 0


def test_a_role_without_the_right_to_read_is_refused(call: Call, settings: Settings) -> None:
    error = call(as_new_role(settings), "migrate", "up", "--dry-run", "-o", "json").document["error"]
    assert error["code"] == "permission_denied"
    assert error["message"] == "permission denied for schema pgcoord"
    assert "pgcoord migrate grant" in error["hint"]


# status and verify


def test_status_lists_every_migration(call: Call, empty_settings: Settings) -> None:
    unmigrated = call(empty_settings, "migrate", "status", "-o", "json")
    assert unmigrated.code == 0
    assert unmigrated.document == [
        dict.fromkeys(STATES_COLUMNS) | {"version": file.version, "name": file.name, "state": "pending"}
        for file in FILES
    ]
    checked = call(empty_settings, "migrate", "status", "--check", "-o", "json")
    assert (checked.code, checked.document) == (3, unmigrated.document)
    assert checked.err.splitlines() == [
        f"error: {len(FILES)} migration(s) are pending", "hint: apply them with: pgcoord migrate up",
    ]  # fmt: skip

    upgrade(empty_settings)
    migrated = call(empty_settings, "migrate", "status", "--check", "-o", "json")
    assert (migrated.code, migrated.err) == (0, "")
    for row, file in zip(migrated.document, FILES, strict=True):
        assert list(row) == STATES_COLUMNS
        assert (row["version"], row["name"], row["state"]) == (file.version, file.name, "applied")
        assert (row["applied_by"], row["applied_at"][-1]) == ("postgres", "Z")
        assert isinstance(row["execution_ms"], int)
    assert call(empty_settings, "migrate", "status", "-o", "csv").out.splitlines()[0] == ",".join(STATES_COLUMNS)


def test_verify_counts_the_migrations(call: Call, settings: Settings) -> None:
    answer = call(settings, "migrate", "verify", "-o", "json")
    assert answer.code == 0
    assert answer.document == {"schema": "pgcoord", "verified": len(FILES), "pending": 0, "unknown": 0}


def test_an_edited_migration_is_found_by_its_checksum(call: Call, settings: Settings) -> None:
    with connect(settings) as conn:
        conn.execute("UPDATE schema_migrations SET checksum = repeat('0', 64) WHERE version = 2")
    before = picture(settings)
    for words in (("up",), ("up", "--dry-run"), ("verify",)):
        answer = call(settings, "migrate", *words, "-o", "json")
        assert (answer.code, answer.document["error"]["code"]) == (1, "migration_edited")
        assert "0002_commits" in answer.document["error"]["message"]
    listing = call(settings, "migrate", "status", "-o", "json")
    assert (listing.code, [row["state"] for row in listing.document][:2]) == (1, ["applied", "edited"])
    assert "0002_commits" in listing.err
    assert picture(settings) == before


# sql


def psql(settings: Settings, script: str) -> subprocess.CompletedProcess[str]:
    program = find_installation(18).bin_dir / "psql"
    return subprocess.run(
        [program, "--no-psqlrc", "--quiet", "--dbname", settings.dsn],
        input=script, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("schema", ["pgcoord", "order"])
def test_the_printed_script_creates_the_same_schema(schema: str, call: Call, empty_settings: Settings) -> None:
    nowhere = Settings(dsn="host=/nowhere")
    script = call(nowhere, "migrate", "sql", "--schema", schema)
    assert (script.code, script.err) == (0, "")
    assert call(nowhere, "migrate", "sql", "--schema", schema, "-o", "json").document == {
        "schema": schema, "sql": script.out,
    }  # fmt: skip

    done = psql(empty_settings, script.out)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert call(empty_settings, "migrate", "status", "--check", "--schema", schema).code == 0
    assert call(empty_settings, "migrate", "verify", "--schema", schema).code == 0
    assert call(empty_settings, "migrate", "up", "-o", "json", "--schema", schema).document == []
    if schema == "pgcoord":
        dump_schema = runpy.run_path(str(REPOSITORY / ".ci" / "dump_schema.py"))
        assert dump_schema["dump"](empty_settings.dsn) == (REPOSITORY / "sql" / "schema.sql").read_text()


def test_the_printed_script_changes_nothing_the_second_time(call: Call, settings: Settings) -> None:
    before = picture(settings)
    done = psql(settings, call(settings, "migrate", "sql").out)
    assert done.returncode == 3
    assert "schema_migrations_pkey" in done.stderr
    assert picture(settings) == before


def test_the_printed_script_ends_at_the_first_error_and_up_goes_on_from_there(
    call: Call, empty_settings: Settings
) -> None:
    assert psql(empty_settings, call(empty_settings, "migrate", "sql", "--to", "1").out).returncode == 0
    with connect(empty_settings) as conn:
        conn.execute("DELETE FROM schema_migrations")
        done = psql(empty_settings, call(empty_settings, "migrate", "sql").out)
        assert done.returncode == 3
        assert 'relation "leader_lease" already exists' in done.stderr
        assert conn.execute("SELECT to_regclass('kv')").fetchone() == (None,)
        conn.execute("DROP SCHEMA pgcoord CASCADE")
    assert psql(empty_settings, call(empty_settings, "migrate", "sql", "--to", "1").out).returncode == 0
    assert call(empty_settings, "migrate", "up", "-o", "plain").out.splitlines()[0] == "2\tcommits\tapplied"


def test_the_printed_script_stops_at_the_given_migration(call: Call) -> None:
    answer = call(Settings(), "migrate", "sql", "--to", "1")
    assert "CREATE TABLE leader_lease" in answer.out
    assert "CREATE TABLE kv" not in answer.out
    assert call(Settings(), "migrate", "sql", "--to", "9001").code == 2

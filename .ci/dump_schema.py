"""Writes sql/schema.sql, the golden dump, from the sum of the migrations, or checks that they are equal.

    python .ci/dump_schema.py            write
    python .ci/dump_schema.py --check    exit 1 with a unified diff if the file differs

A temporary PostgreSQL 18 is migrated, and its schema is dumped by the pg_dump of the same version. The parts of a dump
that depend on the program and the server are removed, so that all supported versions give the same text.
"""

from __future__ import annotations

import argparse
import difflib
import re
import subprocess
import sys
from pathlib import Path

from pgcoord_cli.core.database.upgrade import upgrade
from pgcoord_cli.core.embedded.installation import find_installation
from pgcoord_cli.core.embedded.server import temporary_server
from pgcoord_cli.settings import Settings

VERSION = 18
"""Major version of the pg_dump that makes every dump, of a server of any version."""

GOLDEN = Path(__file__).resolve().parent.parent / "sql" / "schema.sql"

HEADER = """\
-- The sum of sql/migrations/, for readers and tests; `pgcoord migrate up` does not use it.
-- Generated: change the schema with a migration, then run: python .ci/dump_schema.py
"""

_BODY = re.compile(r"(\$\w*\$).*?\1", re.DOTALL)
_NOISE = re.compile(r"(?:--|SET |SELECT pg_catalog\.set_config\(|\\(?:un)?restrict ).*\n?")


def main() -> int:
    """Writes or checks the golden dump; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write sql/schema.sql from the migrations, or check it.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 with a diff if it differs")
    check = parser.parse_args().check
    with temporary_server(find_installation(VERSION)) as server:
        upgrade(Settings(dsn=server.dsn))
        fresh = dump(server.dsn)
    return compare(fresh) if check else write(fresh)


def write(fresh: str) -> int:
    """Replaces the golden dump."""
    GOLDEN.write_text(fresh, encoding="utf-8")
    return 0


def compare(fresh: str) -> int:
    """Compares a fresh dump with the golden one. Returns 0, or 1 after printing a diff."""
    stored = GOLDEN.read_text(encoding="utf-8") if GOLDEN.exists() else ""
    diff = difflib.unified_diff(
        stored.splitlines(True), fresh.splitlines(True), "sql/schema.sql", "the sum of sql/migrations/"
    )
    sys.stdout.writelines(diff)
    return int(stored != fresh)


def dump(dsn: str, schema: str = "pgcoord") -> str:
    """Returns the normalised dump of one schema, below HEADER."""
    pg_dump = find_installation(VERSION).bin_dir / "pg_dump"
    words = ["--schema-only", "--no-owner", "--no-privileges", f"--schema={schema}", f"--dbname={dsn}"]
    done = subprocess.run([pg_dump, *words], stdout=subprocess.PIPE, text=True, check=True)
    return f"{HEADER}\n{normalised(done.stdout)}"


def normalised(text: str) -> str:
    """Returns a dump without comments, session settings and psql commands, with unchanged function bodies."""
    parts, end = [], 0
    for body in _BODY.finditer(text):
        parts += [_without_noise(text[end : body.start()]), body[0]]
        end = body.end()
    parts.append(_without_noise(text[end:]))
    return "".join(parts).strip() + "\n"


def _without_noise(text: str) -> str:
    kept = "".join(line for line in text.splitlines(keepends=True) if not _NOISE.fullmatch(line))
    return re.sub(r"\n{3,}", "\n\n", kept)


if __name__ == "__main__":
    sys.exit(main())

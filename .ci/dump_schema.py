"""Write sql/schema.sql, the golden dump, from the sum of the migrations; or check that it still equals it.

    python .ci/dump_schema.py            write
    python .ci/dump_schema.py --check    exit 1 with a unified diff where the file differs

A temporary PostgreSQL 18 is migrated and its schema dumped by the pg_dump of the same version. What a dump says of
the program and server that made it is left out, so that servers of all supported versions give the same text.
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
"""Major version of the pg_dump that makes every dump, whatever server it is made of."""

GOLDEN = Path(__file__).resolve().parent.parent / "sql" / "schema.sql"

HEADER = """\
-- The sum of sql/migrations/, for people to read and for tests to compare; `pgcoord migrate up` does not use it.
-- Generated: change the schema with a migration, then run: python .ci/dump_schema.py
"""

_BODY = re.compile(r"(\$\w*\$).*?\1", re.DOTALL)
_NOISE = re.compile(r"(?:--|SET |SELECT pg_catalog\.set_config\(|\\(?:un)?restrict ).*\n?")


def main() -> int:
    """Writes or checks; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write sql/schema.sql from the migrations, or check it.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 with a diff where it differs")
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
    """1 with a diff on stdout where the golden dump is not the fresh one, else 0."""
    stored = GOLDEN.read_text(encoding="utf-8") if GOLDEN.exists() else ""
    diff = difflib.unified_diff(
        stored.splitlines(True), fresh.splitlines(True), "sql/schema.sql", "the sum of sql/migrations/"
    )
    sys.stdout.writelines(diff)
    return int(stored != fresh)


def dump(dsn: str, schema: str = "pgcoord") -> str:
    """The normalised dump of one schema, under the header that says where it comes from."""
    pg_dump = find_installation(VERSION).bin_dir / "pg_dump"
    words = ["--schema-only", "--no-owner", "--no-privileges", f"--schema={schema}", f"--dbname={dsn}"]
    done = subprocess.run([pg_dump, *words], stdout=subprocess.PIPE, text=True, check=True)
    return f"{HEADER}\n{normalised(done.stdout)}"


def normalised(text: str) -> str:
    """A dump without comments, session settings and psql commands; function bodies stay as they are."""
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

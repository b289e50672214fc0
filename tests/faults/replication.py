"""A primary with a streaming standby, which can stall, and be promoted when the primary is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg

from pgcoord_cli.core.embedded.installation import Installation, server_account
from pgcoord_cli.core.embedded.server import EmbeddedServer, temporary_server
from tests.asking import until

Sql = psycopg.Connection[Any]


@contextmanager
def standby_of(primary: EmbeddedServer, installation: Installation) -> Iterator[EmbeddedServer]:
    """A streaming standby of a server."""
    with tempfile.TemporaryDirectory(prefix="pgcoord-standby-", dir="/tmp") as name:
        root = Path(name)
        root.chmod(0o711)
        standby = EmbeddedServer(root, installation)
        standby.data.mkdir(mode=0o700)
        identity: dict[str, Any] = {}
        if account := server_account():
            os.chown(standby.data, account.uid, account.gid)
            identity = {"user": account.uid, "group": account.gid, "extra_groups": []}
        subprocess.run(
            [installation.bin_dir / "pg_basebackup", "--pgdata", standby.data, "--dbname", primary.dsn,
             "--write-recovery-conf", "--checkpoint=fast", "--no-sync"],
            cwd="/", check=True, **identity,
        )  # fmt: skip
        standby.start()
        try:
            yield standby
        finally:
            standby.stop("immediate")


class Pair:
    """A primary and its standby; `dsn` leads to whichever of them can be written."""

    def __init__(self, primary: EmbeddedServer, standby: EmbeddedServer) -> None:
        self.primary = primary
        self.standby = standby
        self._stopped: list[int] = []
        hosts = ",".join(quote(str(server.socket_directory)) for server in (primary, standby))
        self.dsn = f"postgresql://postgres@/postgres?host={hosts}&target_session_attrs=read-write"

    @contextmanager
    def on(self, server: EmbeddedServer) -> Iterator[Sql]:
        with psycopg.connect(server.dsn, autocommit=True, options="-c search_path=pgcoord") as conn:
            yield conn

    def confirm_commits(self) -> None:
        """Has every commit on the primary wait for the standby."""
        with self.on(self.primary) as conn:
            conn.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            conn.execute("SELECT pg_reload_conf()")
            until(lambda: conn.execute("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'").fetchone())

    def stall(self) -> None:
        """Freezes the standby's receiver: it confirms nothing more, and gets nothing more."""
        with self.on(self.standby) as conn:
            (pid,) = conn.execute("SELECT pid FROM pg_stat_wal_receiver").fetchone() or (0,)
        os.kill(pid, signal.SIGSTOP)
        self._stopped.append(pid)

    def resume(self) -> None:
        """Ends the stall."""
        while self._stopped:
            with suppress(ProcessLookupError):
                os.kill(self._stopped.pop(), signal.SIGCONT)

    def fail_over(self) -> None:
        """Loses the primary, at once, and promotes the standby with what it has got."""
        self.primary.stop("immediate")
        for pid in self._stopped:  # what lies unread in its socket is lost with the primary
            os.kill(pid, signal.SIGKILL)
        self._stopped.clear()
        until(self._is_promoted)

    def _is_promoted(self) -> bool:
        # The standby may be starting anew after the end of its receiver.
        with suppress(psycopg.OperationalError), self.on(self.standby) as conn:
            if conn.execute("SELECT pg_is_in_recovery()").fetchone() == (False,):
                return True
            conn.execute("SELECT pg_promote(wait => false)")
        return False


@contextmanager
def a_pair(installation: Installation) -> Iterator[Pair]:
    """A primary and a standby that follows it."""
    with temporary_server(installation) as primary, standby_of(primary, installation) as standby:
        pair = Pair(primary, standby)
        try:
            yield pair
        finally:
            pair.resume()

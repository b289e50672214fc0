"""The fixtures of commits and flows, for the tests of this folder."""

from __future__ import annotations

from tests.postgres.commit_scenarios import leader_running
from tests.postgres.flow_world import conn, make, no_retry

__all__ = ["conn", "leader_running", "make", "no_retry"]

"""The fixtures of commits and flows, for the tests of this folder."""

from __future__ import annotations

from tests.postgres.commit_world import some_leader
from tests.postgres.flow_world import conn, make, no_second_try

__all__ = ["conn", "make", "no_second_try", "some_leader"]

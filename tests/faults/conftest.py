"""The fixtures of flows, for the tests of this folder."""

from __future__ import annotations

from tests.postgres.flow_world import conn, make, no_retry

__all__ = ["conn", "make", "no_retry"]

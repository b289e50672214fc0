"""How long settled requests are kept at least. Pure.

Three things reach back in time: a client that asks for its outcome, a new leader that rebuilds the conflict window, and
a client that submits again what a crash lost. Garbage collection never goes below the sum of what they need
(rule I11), and a client gives up its question at half of it.
"""

SHORTEST_RETENTION = 60.0
"""Seconds."""

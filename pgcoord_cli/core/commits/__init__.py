"""Commit requests: their encoding, their mutations, and the conflict window that decides whether they commit."""

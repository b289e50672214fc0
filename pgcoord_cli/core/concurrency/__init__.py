"""How callers are grouped, woken, retried and kept apart. Knows nothing of pgcoord's tables."""

"""Benchmarks: pgcoord and its baselines, measured in one run on one server, as ratios. Durability is on everywhere."""

"""The limit of attempts in flight, decided by simulated outcomes: with contention, without it, and after it."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from pgcoord_cli.core.kv.conflict_limit import FEWEST, LIFTED, MAX_SHARE, SAMPLE, ConflictLimit


def play(limit: ConflictLimit, callers: int, rounds: int, chance: float, seed: int = 1) -> tuple[int, int]:
    """Plays rounds in which all callers that are admitted attempt a transaction; returns commits and conflicts.

    An attempt commits unless it conflicts, by `chance`, with one that committed before it in its round.
    """
    chances = random.Random(seed)
    commits = conflicts = 0
    for _ in range(rounds):
        in_flight = 0
        while in_flight < callers and limit.admits(in_flight):
            in_flight += 1
        window = limit.window
        committed = 0
        for _ in range(in_flight):
            conflicted = chances.random() > (1 - chance) ** committed
            committed += not conflicted
            limit.note(window, in_flight, conflicted=conflicted)
        commits += committed
        conflicts += in_flight - committed
    return commits, conflicts


def test_nothing_is_limited_without_conflicts() -> None:
    limit = ConflictLimit()
    play(limit, 256, 100, chance=0.0)
    assert limit.limit is None
    assert limit.admits(1_000_000)


def test_few_conflicts_limit_nothing() -> None:
    limit = ConflictLimit()
    play(limit, 256, 100, chance=0.0005)
    assert limit.limit is None


@pytest.mark.parametrize("callers", [64, 256, 512, 4096])
@pytest.mark.parametrize("seed", range(5))
def test_under_contention_about_the_permitted_share_conflicts_with_any_number_of_callers(
    callers: int, seed: int
) -> None:
    limit = ConflictLimit()
    play(limit, callers, 100, chance=0.01, seed=seed)
    commits, conflicts = play(limit, callers, 500, chance=0.01, seed=seed)
    assert conflicts / (commits + conflicts) < MAX_SHARE + 0.05
    assert commits / 500 > 20, "the limit is no lower than the conflicts demand"


@pytest.mark.parametrize(("conflicts", "expected"), [(16, None), (17, 47), (24, 40), (32, 32), (64, 32)])
def test_the_first_window_with_too_many_conflicts_sets_a_limit_from_the_number_in_flight(
    conflicts: int, expected: int | None
) -> None:
    limit = ConflictLimit()
    for number in range(64):
        assert limit.limit is None
        limit.note(0, 64, conflicted=number < conflicts)
    assert limit.limit == expected


def test_a_window_has_a_least_number_of_outcomes() -> None:
    limit = ConflictLimit()
    for _ in range(SAMPLE - 1):
        limit.note(0, 8, conflicted=True)
    assert limit.limit is None
    limit.note(0, 8, conflicted=True)
    assert limit.limit == FEWEST


def test_outcomes_of_attempts_that_were_admitted_before_the_last_decision_do_not_count() -> None:
    limit = ConflictLimit()
    for _ in range(64):
        limit.note(0, 64, conflicted=True)
    assert limit.limit == 32
    for _ in range(1000):
        limit.note(0, 64, conflicted=True)
    assert (limit.limit, limit.window) == (32, 1)


def test_conflicts_without_end_leave_the_fewest_attempts() -> None:
    limit = ConflictLimit()
    commits, _ = play(limit, 256, 200, chance=1.0)
    assert limit.limit == FEWEST
    assert commits == 200, "one in each round"


def test_after_the_contention_the_limit_grows_slowly_and_is_lifted() -> None:
    limit = ConflictLimit()
    play(limit, 256, 200, chance=1.0)
    grown = []
    for _ in range(1000):
        if limit.limit is None:
            break
        grown.append(limit.limit)
        play(limit, 256, 1, chance=0.0)
    assert limit.limit is None
    assert grown == sorted(grown)
    assert max(grown) < LIFTED
    assert all(after <= before + max(1, before / 16) + 1 for before, after in pairwise(grown))

"""What "one owner a name" means, whatever keeps it: a class of tests to inherit from.

A subclass says how names are owned, by a fixture `implementation`, and pytest collects it under a name of its own:

    class TestByDsn(OwnershipContract):
        @pytest.fixture
        def implementation(self, settings: Settings) -> Implementation: ...

**At once.** The server frees a name when it sees the owner's connection end, which is moments after the owner has gone.
So a test that is about a name that has become free again asks until it gets it, and fails when it never does.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Protocol

import pytest

from pgcoord_cli.errors import CoordinationError, LockNotAcquired
from tests.asking import TIMEOUT

CONTENDERS = 50
HERE, ELSEWHERE = "pgcoord", "elsewhere"


class Owner(Protocol):
    """Whoever owns a name."""

    def release(self) -> None:
        """Gives it back."""


class Implementation(Protocol):
    """A way to own names."""

    def acquire(self, name: str, schema: str) -> Owner:
        """Owns the name; LockNotAcquired when somebody else does."""

    def acquire_without_a_server(self, name: str) -> Owner:
        """The same where the database cannot be reached."""

    def holder(self, name: str) -> Sequence[str]:
        """A command that owns the name, prints a line, and stays until it is killed."""

    def end_session(self, name: str) -> None:
        """Ends the owner's session in schema `pgcoord` by pg_terminate_backend; returns when it has ended."""


Acquire = Callable[..., Owner]


class OwnershipContract:
    """One owner a name, at every moment.

    There is no `implementation` here, so that pytest names what a subclass lacks; abstract ones it would pass over.
    """

    @pytest.fixture
    def acquire(self, implementation: Implementation) -> Iterator[Acquire]:
        """Owns a name; gives back those that are left when the test is over."""
        owners: list[Owner] = []

        def own(name: str = "mailer", schema: str = HERE) -> Owner:
            owners.append(implementation.acquire(name, schema))
            return owners[-1]

        yield own
        for owner in owners:
            owner.release()

    @pytest.fixture
    def acquire_again(self, acquire: Acquire) -> Acquire:
        """Owns a name that has just become free, and that nobody else wants."""

        def own(name: str = "mailer") -> Owner:
            deadline = time.monotonic() + TIMEOUT
            while True:
                try:
                    return acquire(name)
                except LockNotAcquired:
                    assert time.monotonic() < deadline, f"{name} never became free"

        return own

    def test_the_first_acquires_and_the_second_is_refused(self, acquire: Acquire) -> None:
        acquire()
        with pytest.raises(LockNotAcquired) as refused:
            acquire()
        assert refused.value.subscription_name == "mailer"
        assert refused.value.exit_code == 5

    def test_a_refusal_leaves_the_first_in_its_place(self, acquire: Acquire) -> None:
        acquire()
        for _ in range(3):
            with pytest.raises(LockNotAcquired):
                acquire()

    def test_a_name_is_acquired_again_after_its_release(self, acquire: Acquire, acquire_again: Acquire) -> None:
        acquire().release()
        for _ in range(3):
            acquire_again().release()

    def test_releasing_twice_is_no_harm_to_the_next(self, acquire: Acquire, acquire_again: Acquire) -> None:
        first = acquire()
        first.release()
        first.release()
        acquire_again()
        first.release()
        with pytest.raises(LockNotAcquired):
            acquire()

    def test_a_crash_frees_the_name(self, implementation: Implementation, acquire_again: Acquire) -> None:
        with subprocess.Popen(implementation.holder("mailer"), stdout=subprocess.PIPE, stdin=subprocess.PIPE) as holder:
            assert holder.stdout
            assert holder.stdout.readline(), "it never owned the name"
            with pytest.raises(LockNotAcquired):
                implementation.acquire("mailer", HERE)
            holder.kill()
        acquire_again()

    def test_an_ended_session_frees_the_name(self, implementation: Implementation, acquire: Acquire) -> None:
        """No asking until it is free here: where the session has ended, so has the ownership."""
        acquire()
        implementation.end_session("mailer")
        acquire()

    def test_different_names_are_independent(self, acquire: Acquire, acquire_again: Acquire) -> None:
        names = ["mailer", "Mailer", "mailer ", "é", "'; DROP TABLE subscriptions; --", "x" * 200]
        owners = [acquire(name) for name in names]
        owners[0].release()
        acquire_again()
        for name in names:
            with pytest.raises(LockNotAcquired) as refused:
                acquire(name)
            assert refused.value.subscription_name == name

    def test_the_same_name_in_two_schemas_is_two(self, acquire: Acquire) -> None:
        for schema in (HERE, ELSEWHERE):
            acquire(schema=schema)
        for schema in (HERE, ELSEWHERE):
            with pytest.raises(LockNotAcquired):
                acquire(schema=schema)

    def test_of_fifty_who_come_at_once_one_wins(self, acquire: Acquire) -> None:
        together = Barrier(CONTENDERS)

        def come() -> str | None:
            together.wait(TIMEOUT)
            try:
                acquire()
            except LockNotAcquired as refused:
                return refused.subscription_name
            return None

        with ThreadPoolExecutor(CONTENDERS) as pool:
            came = [future.result() for future in [pool.submit(come) for _ in range(CONTENDERS)]]
        assert sorted(came, key=str) == [None, *["mailer"] * (CONTENDERS - 1)]

    def test_trouble_with_the_database_is_no_refusal(self, implementation: Implementation) -> None:
        with pytest.raises(CoordinationError) as trouble:
            implementation.acquire_without_a_server("mailer")
        assert not isinstance(trouble.value, LockNotAcquired)

"""The contract of ownership: a class of tests that each implementation inherits.

A subclass provides the fixture `implementation`, and pytest collects it under its own name:

    class TestByDsn(OwnershipContract):
        @pytest.fixture
        def implementation(self, settings: Settings) -> Implementation: ...

**Release.** The server releases a name when it detects the end of the owner's connection, shortly after the owner has
closed it. A test that acquires a released name therefore retries until it succeeds, and fails after TIMEOUT.
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
    """The owner of a name."""

    def release(self) -> None:
        """Releases the name."""


class Implementation(Protocol):
    """One way to own names."""

    def acquire(self, name: str, schema: str) -> Owner:
        """Acquires the name. Raises LockNotAcquired if it has another owner."""

    def acquire_without_a_server(self, name: str) -> Owner:
        """The same with a server that cannot be reached."""

    def holder(self, name: str) -> Sequence[str]:
        """Returns a command that acquires the name, prints a line and runs until it is killed."""

    def end_session(self, name: str) -> None:
        """Terminates the owner's session in schema `pgcoord` with pg_terminate_backend, and waits for its end."""


Acquire = Callable[..., Owner]


class OwnershipContract:
    """At most one owner of a name at any time.

    The class defines no fixture `implementation`, so that pytest reports a subclass without one as an error.
    """

    @pytest.fixture
    def acquire(self, implementation: Implementation) -> Iterator[Acquire]:
        """Acquires names, and releases them after the test."""
        owners: list[Owner] = []

        def own(name: str = "mailer", schema: str = HERE) -> Owner:
            owners.append(implementation.acquire(name, schema))
            return owners[-1]

        yield own
        for owner in owners:
            owner.release()

    @pytest.fixture
    def acquire_again(self, acquire: Acquire) -> Acquire:
        """Acquires a name that has just been released, for which no other owner competes."""

        def own(name: str = "mailer") -> Owner:
            deadline = time.monotonic() + TIMEOUT
            while True:
                try:
                    return acquire(name)
                except LockNotAcquired:
                    assert time.monotonic() < deadline, f"{name} was not released"

        return own

    def test_the_first_acquires_and_the_second_is_refused(self, acquire: Acquire) -> None:
        acquire()
        with pytest.raises(LockNotAcquired) as refused:
            acquire()
        assert refused.value.subscription_name == "mailer"
        assert refused.value.exit_code == 5

    def test_a_refusal_leaves_the_first_owner_in_place(self, acquire: Acquire) -> None:
        acquire()
        for _ in range(3):
            with pytest.raises(LockNotAcquired):
                acquire()

    def test_a_name_is_acquired_again_after_its_release(self, acquire: Acquire, acquire_again: Acquire) -> None:
        acquire().release()
        for _ in range(3):
            acquire_again().release()

    def test_releasing_twice_does_not_release_the_next_owner(self, acquire: Acquire, acquire_again: Acquire) -> None:
        first = acquire()
        first.release()
        first.release()
        acquire_again()
        first.release()
        with pytest.raises(LockNotAcquired):
            acquire()

    def test_a_crash_releases_the_name(self, implementation: Implementation, acquire_again: Acquire) -> None:
        with subprocess.Popen(implementation.holder("mailer"), stdout=subprocess.PIPE, stdin=subprocess.PIPE) as holder:
            assert holder.stdout
            assert holder.stdout.readline(), "it did not acquire the name"
            with pytest.raises(LockNotAcquired):
                implementation.acquire("mailer", HERE)
            holder.kill()
        acquire_again()

    def test_a_terminated_session_releases_the_name(self, implementation: Implementation, acquire: Acquire) -> None:
        """No retry here: a session that has ended has released its locks."""
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

    def test_the_same_name_in_two_schemas_is_two_names(self, acquire: Acquire) -> None:
        for schema in (HERE, ELSEWHERE):
            acquire(schema=schema)
        for schema in (HERE, ELSEWHERE):
            with pytest.raises(LockNotAcquired):
                acquire(schema=schema)

    def test_of_fifty_concurrent_acquisitions_one_succeeds(self, acquire: Acquire) -> None:
        together = Barrier(CONTENDERS)

        def compete() -> str | None:
            together.wait(TIMEOUT)
            try:
                acquire()
            except LockNotAcquired as refused:
                return refused.subscription_name
            return None

        with ThreadPoolExecutor(CONTENDERS) as pool:
            refusals = [future.result() for future in [pool.submit(compete) for _ in range(CONTENDERS)]]
        assert sorted(refusals, key=str) == [None, *["mailer"] * (CONTENDERS - 1)]

    def test_a_server_that_cannot_be_reached_is_not_a_refusal(self, implementation: Implementation) -> None:
        with pytest.raises(CoordinationError) as failed:
            implementation.acquire_without_a_server("mailer")
        assert not isinstance(failed.value, LockNotAcquired)

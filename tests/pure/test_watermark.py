"""The watermark against a simulated database, step by step, in which every drawn and visible id is known.

Two-sided: an id that is passed while it may still commit is lost; a watermark that never passes a gap stalls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from itertools import cycle, pairwise
from typing import NamedTuple

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgcoord_cli.core.database.open_transactions import OpenTransactions
from pgcoord_cli.core.events.watermark import Watermark


class Transaction:
    """A transaction that holds the outbox lock, and the ids that it drew."""

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name
        self.ids: list[int] = []

        self.is_prepared = False

    def prepare(self) -> None:
        """Prepares it: it draws no more ids. Its name stays the same until a restart."""
        self.is_prepared = True


class SimulatedServer:
    """The state of the server: open transactions, drawn ids and visible ids."""

    def __init__(self) -> None:
        self.open: list[Transaction] = []
        self.visible: list[int] = []
        self.head = 0
        self._begun = 0
        self._begun_since_restart = 0

    def begin(self) -> Transaction:
        self._begun += 1
        self._begun_since_restart += 1
        self.open.append(Transaction(self._begun, f"3/{self._begun_since_restart}"))
        return self.open[-1]

    def draw(self, transaction: Transaction) -> None:
        if not transaction.is_prepared:
            self.head += 1
            transaction.ids.append(self.head)

    def restart(self) -> None:
        """Ends the transactions that are not prepared and renames the others; virtual ids start again from 1."""
        self.open = [transaction for transaction in self.open if transaction.is_prepared]
        for transaction in self.open:
            transaction.name = f"-1/{700 + transaction.number}"
        self._begun_since_restart = 0

    def commit(self, transaction: Transaction) -> None:
        self.visible = sorted([*self.visible, *transaction.ids])
        self.open.remove(transaction)

    def roll_back(self, transaction: Transaction) -> None:
        self.open.remove(transaction)

    def open_transactions(self) -> list[str]:
        return [transaction.name for transaction in self.open]

    def uncommitted(self) -> list[int]:
        """Ids that may still become visible."""
        return [event_id for transaction in self.open for event_id in transaction.ids]


class Reader:
    """Reads the simulated database through a watermark and checks the invariants after each reading."""

    def __init__(self, server: SimulatedServer, limit: int | None = None) -> None:
        self.server = server
        self.limit = limit
        self.watermark = Watermark(0)
        self.delivered: list[int] = []

    def read(self, open_transactions: Iterable[str] | None) -> None:
        """Reads once. `open_transactions` was listed before; None: it was not listed."""
        ids = [event_id for event_id in self.server.visible if event_id > self.watermark.position][: self.limit]
        is_whole = self.limit is None or len(ids) < self.limit
        self.delivered += ids[: self.watermark.advance(ids, open_transactions, is_whole=is_whole)]
        self.check()

    def list_and_read(self) -> None:
        self.read(self.server.open_transactions())

    def check(self) -> None:
        position = self.watermark.position
        assert all(event_id > position for event_id in self.server.uncommitted()), (
            "an id that may still commit was passed"
        )
        assert all(one < next_one for one, next_one in pairwise(self.delivered)), "ascending, each once"
        assert self.delivered == [event_id for event_id in self.server.visible if event_id <= position], (
            "no visible id skipped"
        )


class Do(Enum):
    """An action of the server or of the reader."""

    BEGIN = "begin"
    DRAW = "draw"
    COMMIT = "commit"
    ROLL_BACK = "roll back"
    PREPARE = "prepare"
    RESTART = "restart"
    LIST = "list"
    READ = "read"
    NOTE_HEAD = "note head"


class Step(NamedTuple):
    """One action; `place` selects the open transaction that performs it, where a transaction does."""

    action: Do
    place: int = 0


steps = st.builds(Step, st.sampled_from([*Do, Do.BEGIN, Do.COMMIT, Do.ROLL_BACK, Do.LIST, Do.READ]), st.integers(0, 5))
histories = st.lists(steps, max_size=60) | st.lists(steps, min_size=25, max_size=60)
"""With a minimum size in half of the cases: Hypothesis draws lists of about five elements without one."""


def play(server: SimulatedServer, reader: Reader, history: Iterable[Step]) -> None:
    """Performs the steps in order. A list belongs to the next reading, whatever is performed in between."""
    listed: list[str] | None = None
    of_transaction: dict[Do, Callable[[Transaction], None]] = {
        Do.DRAW: server.draw, Do.COMMIT: server.commit, Do.ROLL_BACK: server.roll_back, Do.PREPARE: Transaction.prepare,
    }  # fmt: skip
    for action, place in history:
        if action is Do.BEGIN:
            server.draw(server.begin())
        elif action is Do.RESTART:
            server.restart()
            listed = None  # a restart closes the connection, and with it the reading
        elif action is Do.LIST:
            listed = server.open_transactions()
        elif action is Do.READ:
            reader.read(listed)
            listed = None
        elif action is Do.NOTE_HEAD:
            reader.watermark.note_drawn(server.head)
            listed = None  # a list proves nothing about ids that were drawn after it
        elif server.open:
            of_transaction[action](server.open[place % len(server.open)])


def end_all(server: SimulatedServer) -> None:
    """Commits and rolls back the open transactions in turn."""
    for place, transaction in enumerate(list(server.open)):
        (server.roll_back if place % 2 else server.commit)(transaction)


def check_that_all_is_delivered(server: SimulatedServer, reader: Reader, readings: int) -> None:
    """Checks that the reader reaches the end within `readings` once every transaction has ended."""
    end_all(server)
    for _ in range(readings):
        reader.list_and_read()
    assert reader.delivered == server.visible
    assert not reader.watermark.is_at_gap
    assert not reader.watermark.needs_list


def drawn_between_list_and_reading() -> list[Step]:
    """Id 1 belongs to a transaction that began after the list of the reading that first shows 2."""
    return [Step(Do.LIST), Step(Do.BEGIN), Step(Do.BEGIN), Step(Do.COMMIT, 1), Step(Do.READ)]


def restarted_between_two_lists() -> list[Step]:
    """Id 1 belongs to a transaction that is listed under one name first and under another in the next list."""
    listed = [Step(Do.LIST), Step(Do.READ)]
    return [Step(Do.BEGIN), Step(Do.BEGIN), Step(Do.COMMIT, 1), Step(Do.READ), Step(Do.PREPARE),
            *listed, Step(Do.RESTART), *listed]  # fmt: skip


def filled_below_the_highest_drawn_id() -> list[Step]:
    """Id 1 commits, so that a reading of two ids ends before 3, which an earlier reading has shown."""
    written = [Step(Do.BEGIN), Step(Do.BEGIN), Step(Do.BEGIN), Step(Do.COMMIT, 1), Step(Do.COMMIT, 1)]
    return [*written, Step(Do.READ), Step(Do.COMMIT), Step(Do.LIST), Step(Do.READ)]


@given(histories)
@example(drawn_between_list_and_reading())
@example(restarted_between_two_lists())
@settings(max_examples=800, deadline=None)
def test_i10_no_id_that_may_still_commit_is_passed_and_every_committed_id_is_delivered(history: list[Step]) -> None:
    server = SimulatedServer()
    reader = Reader(server)
    play(server, reader, history)
    check_that_all_is_delivered(server, reader, readings=3)


@given(histories, st.integers(1, 3))
@example(filled_below_the_highest_drawn_id(), 2)
@settings(max_examples=800, deadline=None)
def test_i10_readings_that_end_at_a_limit_lose_nothing(history: list[Step], limit: int) -> None:
    server = SimulatedServer()
    reader = Reader(server, limit)
    play(server, reader, history)
    check_that_all_is_delivered(server, reader, readings=3 + 3 * server.head)


@given(histories, st.lists(st.integers(1, 4) | st.none(), min_size=1, max_size=7))
@settings(max_examples=800, deadline=None)
def test_i10_readings_of_changing_limits_lose_nothing(history: list[Step], limits: list[int | None]) -> None:
    """A tail reads with a small limit while it is held up at a gap."""
    server = SimulatedServer()
    reader = Reader(server)
    next_limit = cycle(limits)
    for step in history:
        reader.limit = next(next_limit)
        play(server, reader, [step] if step.action is not Do.READ else [Step(Do.LIST), step])
    reader.limit = None
    check_that_all_is_delivered(server, reader, readings=3)


def test_i10_a_list_whose_transactions_have_ended_counts_for_later_readings_with_a_list() -> None:
    watermark = Watermark(0)
    assert watermark.advance([2, 4, 6], []) == 0
    assert watermark.advance([2], [], is_whole=False) == 1, "no transaction is left that could commit 1, 3 or 5"
    assert watermark.advance([4, 6], None) == 0, "garbage collection may have deleted events since that list"
    assert watermark.advance([4, 6], ["3/7"]) == 2
    assert watermark.position == 6


def test_i10_ids_without_a_gap_are_delivered_without_a_list() -> None:
    watermark = Watermark(6)
    assert watermark.advance([7, 8, 10, 11], None) == 2
    assert (watermark.position, watermark.is_at_gap, watermark.needs_list) == (8, True, True)
    assert watermark.advance([9, 10, 11], None) == 3
    assert (watermark.position, watermark.is_at_gap, watermark.needs_list) == (11, False, False)


def test_i10_no_list_is_needed_when_no_id_lies_above_the_position() -> None:
    watermark = Watermark(6)
    assert watermark.advance([], ["3/1"]) == 0
    assert (watermark.position, watermark.is_at_gap, watermark.needs_list) == (6, False, False)


def test_i10_the_list_of_the_reading_that_first_shows_a_gap_proves_nothing() -> None:
    """The transaction that drew 1 may have begun between that list and the read of the rows, and still be open."""
    watermark = Watermark(0)
    assert watermark.advance([2], []) == 0
    assert watermark.advance([2], []) == 1


def test_i10_a_transaction_that_began_after_the_list_does_not_hold_the_watermark() -> None:
    server = SimulatedServer()
    reader = Reader(server)
    rolled_back, committed = server.begin(), server.begin()
    server.draw(rolled_back)
    server.draw(committed)
    server.commit(committed)
    reader.list_and_read()
    reader.list_and_read()
    server.begin()  # and stays open
    server.roll_back(rolled_back)
    reader.list_and_read()
    assert reader.delivered == [2]


def test_i10_the_watermark_advances_although_some_transaction_is_always_open() -> None:
    """Each begins before the previous one ends; every second one rolls back."""
    server = SimulatedServer()
    reader = Reader(server)
    before = server.begin()
    for number in range(100):
        after = server.begin()
        server.draw(after)
        (server.roll_back if number % 2 else server.commit)(before)
        reader.list_and_read()
        before = after
    assert reader.watermark.position > server.head - 10


def test_i10_the_new_names_of_prepared_transactions_after_a_restart_are_kept() -> None:
    transactions = OpenTransactions(["3/1", "4/1"])
    transactions.keep(["3/1", "5/1", "-1/700"])
    transactions.keep(["-1/700"])
    assert transactions
    transactions.keep([])
    assert not transactions


def test_a_transaction_that_has_ended_is_not_counted_when_its_name_is_used_again() -> None:
    transactions = OpenTransactions(["3/1", "4/1"])
    transactions.keep(["4/1", "5/1"])
    transactions.keep(["3/1", "5/1"])
    assert not transactions


def test_an_empty_list_holds_no_open_transaction() -> None:
    assert not OpenTransactions([])


def test_a_list_of_open_transactions_may_be_any_iterable() -> None:
    transactions = OpenTransactions(name for name in ["3/1"])
    transactions.keep(name for name in ["3/1", "4/1"])
    assert transactions
    transactions.keep(name for name in ["4/1"])
    assert not transactions

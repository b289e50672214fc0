"""The frontier against a world of transactions that is simulated step by step, where everything is known.

Two-sided: an id that is passed before its time is lost for good; a reader that never passes one stands still.
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
    """A transaction that has announced itself, and the ids that it drew."""

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name
        self.ids: list[int] = []

        self.is_prepared = False

    def prepare(self) -> None:
        """It draws no more. Its name stays the same until a restart."""
        self.is_prepared = True


class World:
    """What PostgreSQL knows: who writes, what was drawn, and what can be seen."""

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
        """Ends what is not prepared and names the rest anew; names that were used before are used again."""
        self.open = [transaction for transaction in self.open if transaction.is_prepared]
        for transaction in self.open:
            transaction.name = f"-1/{700 + transaction.number}"
        self._begun_since_restart = 0

    def commit(self, transaction: Transaction) -> None:
        self.visible = sorted([*self.visible, *transaction.ids])
        self.open.remove(transaction)

    def roll_back(self, transaction: Transaction) -> None:
        self.open.remove(transaction)

    def writers(self) -> list[str]:
        return [transaction.name for transaction in self.open]

    def owed(self) -> list[int]:
        """Ids that may still come."""
        return [event_id for transaction in self.open for event_id in transaction.ids]


class Reader:
    """Reads the world through a frontier, and checks after each reading that nothing was passed before its time."""

    def __init__(self, world: World, limit: int | None = None) -> None:
        self.world = world
        self.limit = limit
        self.frontier = Watermark(0)
        self.delivered: list[int] = []

    def read(self, writers: Iterable[str] | None) -> None:
        """A reading whose list was made before, or that has none."""
        ids = [event_id for event_id in self.world.visible if event_id > self.frontier.position][: self.limit]
        is_whole = self.limit is None or len(ids) < self.limit
        self.delivered += ids[: self.frontier.advance(ids, writers, is_whole=is_whole)]
        self.check()

    def list_and_read(self) -> None:
        self.read(self.world.writers())

    def check(self) -> None:
        position = self.frontier.position
        assert all(event_id > position for event_id in self.world.owed()), "what may still come was passed by"
        assert all(one < next_one for one, next_one in pairwise(self.delivered)), "in order, each once"
        assert self.delivered == [event_id for event_id in self.world.visible if event_id <= position], "none skipped"


class Do(Enum):
    """What may happen next in a world with a reader."""

    BEGIN = "begin"
    DRAW = "draw"
    COMMIT = "commit"
    ROLL_BACK = "roll back"
    PREPARE = "prepare"
    RESTART = "restart"
    LIST = "list"
    READ = "read"
    LOOK_AT_HEAD = "look at head"


class Step(NamedTuple):
    """One thing that happens; `who` of the open transactions does it, if it is theirs to do."""

    what: Do
    who: int = 0


steps = st.builds(Step, st.sampled_from([*Do, Do.BEGIN, Do.COMMIT, Do.ROLL_BACK, Do.LIST, Do.READ]), st.integers(0, 5))
histories = st.lists(steps, max_size=60) | st.lists(steps, min_size=25, max_size=60)
"""Long ones on purpose: lists without a least size come out with five steps or so."""


def play(world: World, reader: Reader, history: Iterable[Step]) -> None:
    """Lets a history happen. A list goes with the reading after it, whatever happens in between."""
    listed: list[str] | None = None
    of_one: dict[Do, Callable[[Transaction], None]] = {
        Do.DRAW: world.draw, Do.COMMIT: world.commit, Do.ROLL_BACK: world.roll_back, Do.PREPARE: Transaction.prepare,
    }  # fmt: skip
    for what, who in history:
        if what is Do.BEGIN:
            world.draw(world.begin())
        elif what is Do.RESTART:
            world.restart()
            listed = None  # a reading does not outlive its connection
        elif what is Do.LIST:
            listed = world.writers()
        elif what is Do.READ:
            reader.read(listed)
            listed = None
        elif what is Do.LOOK_AT_HEAD:
            reader.frontier.saw(world.head)
            listed = None  # a list proves nothing about what was drawn after it
        elif world.open:
            of_one[what](world.open[who % len(world.open)])


def everybody_ends(world: World) -> None:
    """Every other one with a commit."""
    for place, transaction in enumerate(list(world.open)):
        (world.roll_back if place % 2 else world.commit)(transaction)


def check_that_all_comes(world: World, reader: Reader, readings: int) -> None:
    """A reader gets to the end once everybody has ended, in so many readings at most."""
    everybody_ends(world)
    for _ in range(readings):
        reader.list_and_read()
    assert reader.delivered == world.visible
    assert not reader.frontier.is_at_gap
    assert not reader.frontier.wants_list


def drawn_between_list_and_reading() -> list[Step]:
    """The id 1 belongs to somebody who came after the list that goes with the first sight of 2."""
    return [Step(Do.LIST), Step(Do.BEGIN), Step(Do.BEGIN), Step(Do.COMMIT, 1), Step(Do.READ)]


def restarted_between_two_lists() -> list[Step]:
    """The id 1 belongs to somebody who is listed under one name, and under another in the next list."""
    listed = [Step(Do.LIST), Step(Do.READ)]
    return [Step(Do.BEGIN), Step(Do.BEGIN), Step(Do.COMMIT, 1), Step(Do.READ), Step(Do.PREPARE),
            *listed, Step(Do.RESTART), *listed]  # fmt: skip


def filled_behind_what_was_seen_last() -> list[Step]:
    """The id 1 comes, so that a reading of two ends before 3, which has been seen."""
    written = [Step(Do.BEGIN), Step(Do.BEGIN), Step(Do.BEGIN), Step(Do.COMMIT, 1), Step(Do.COMMIT, 1)]
    return [*written, Step(Do.READ), Step(Do.COMMIT), Step(Do.LIST), Step(Do.READ)]


@given(histories)
@example(drawn_between_list_and_reading())
@example(restarted_between_two_lists())
@settings(max_examples=800, deadline=None)
def test_i10_nothing_that_may_still_come_is_passed_and_all_comes_in_the_end(history: list[Step]) -> None:
    world = World()
    reader = Reader(world)
    play(world, reader, history)
    check_that_all_comes(world, reader, readings=3)


@given(histories, st.integers(1, 3))
@example(filled_behind_what_was_seen_last(), 2)
@settings(max_examples=800, deadline=None)
def test_i10_readings_that_are_cut_off_at_a_limit_lose_nothing(history: list[Step], limit: int) -> None:
    world = World()
    reader = Reader(world, limit)
    play(world, reader, history)
    check_that_all_comes(world, reader, readings=3 + 3 * world.head)


@given(histories, st.lists(st.integers(1, 4) | st.none(), min_size=1, max_size=7))
@settings(max_examples=800, deadline=None)
def test_i10_readings_that_are_now_short_and_now_long_lose_nothing(
    history: list[Step], limits: list[int | None]
) -> None:
    """As a tail makes them that reads little while it is held up."""
    world = World()
    reader = Reader(world)
    next_limit = cycle(limits)
    for step in history:
        reader.limit = next(next_limit)
        play(world, reader, [step] if step.what is not Do.READ else [Step(Do.LIST), step])
    reader.limit = None
    check_that_all_comes(world, reader, readings=3)


def test_i10_what_a_list_has_settled_stays_settled_for_readings_with_a_list() -> None:
    frontier = Watermark(0)
    assert frontier.advance([2, 4, 6], []) == 0
    assert frontier.advance([2], [], is_whole=False) == 1, "nobody is left who could bring 1, 3 or 5"
    assert frontier.advance([4, 6], None) == 0, "garbage collection may have been at work since that list"
    assert frontier.advance([4, 6], ["3/7"]) == 2
    assert frontier.position == 6


def test_i10_ids_without_a_gap_are_delivered_without_a_list() -> None:
    frontier = Watermark(6)
    assert frontier.advance([7, 8, 10, 11], None) == 2
    assert (frontier.position, frontier.is_at_gap, frontier.wants_list) == (8, True, True)
    assert frontier.advance([9, 10, 11], None) == 3
    assert (frontier.position, frontier.is_at_gap, frontier.wants_list) == (11, False, False)


def test_i10_no_list_is_wanted_where_nothing_lies_beyond_the_position() -> None:
    frontier = Watermark(6)
    assert frontier.advance([], ["3/1"]) == 0
    assert (frontier.position, frontier.is_at_gap, frontier.wants_list) == (6, False, False)


def test_i10_the_list_that_goes_with_the_first_sight_of_a_gap_proves_nothing() -> None:
    """Who drew 1 may have announced itself, drawn and not yet ended between that list and those rows."""
    frontier = Watermark(0)
    assert frontier.advance([2], []) == 0
    assert frontier.advance([2], []) == 1


def test_i10_a_writer_that_came_after_the_list_holds_nothing_up() -> None:
    world = World()
    reader = Reader(world)
    rolled_back, committed = world.begin(), world.begin()
    world.draw(rolled_back)
    world.draw(committed)
    world.commit(committed)
    reader.list_and_read()
    reader.list_and_read()
    world.begin()  # and stays open
    world.roll_back(rolled_back)
    reader.list_and_read()
    assert reader.delivered == [2]


def test_i10_a_reader_keeps_up_with_writers_of_whom_one_is_always_open() -> None:
    """Each begins before the one before it ends; every other one rolls back."""
    world = World()
    reader = Reader(world)
    before = world.begin()
    for number in range(100):
        after = world.begin()
        world.draw(after)
        (world.roll_back if number % 2 else world.commit)(before)
        reader.list_and_read()
        before = after
    assert reader.frontier.position > world.head - 10


def test_i10_the_names_that_a_restart_gives_to_prepared_transactions_stay_although_they_are_new() -> None:
    writers = OpenTransactions(["3/1", "4/1"])
    writers.keep(["3/1", "5/1", "-1/700"])
    writers.keep(["-1/700"])
    assert writers
    writers.keep([])
    assert not writers


def test_writers_are_forgotten_for_good_when_they_have_ended() -> None:
    writers = OpenTransactions(["3/1", "4/1"])
    writers.keep(["4/1", "5/1"])
    writers.keep(["3/1", "5/1"])
    assert not writers


def test_nobody_is_writing_in_an_empty_list() -> None:
    assert not OpenTransactions([])


def test_a_list_is_read_once_and_may_be_any_iterable() -> None:
    writers = OpenTransactions(name for name in ["3/1"])
    writers.keep(name for name in ["3/1", "4/1"])
    assert writers
    writers.keep(name for name in ["4/1"])
    assert not writers

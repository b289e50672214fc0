"""`pgcoord subscription`: showing and moving checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from pgcoord_cli.core.events.cursor import to_cursor
from pgcoord_cli.core.locks.ownership import Ownership, acquire_leadership
from pgcoord_cli.errors import Fenced
from pgcoord_cli.settings import Settings
from tests.asking import value
from tests.faults.lock_process import end_holder
from tests.faults.tail_process import Sql, add

if TYPE_CHECKING:
    from tests.conftest import Call


@pytest.fixture
def mailer(sql: Sql) -> list[int]:
    """The ids of five lease events; the position of the subscription `mailer` is the second."""
    ids = add(sql, 5)
    subscribe(sql, "mailer", "lease_events", ids[1])
    return ids


@pytest.fixture
def owner(settings: Settings, mailer: list[int]) -> Iterator[Ownership]:
    """The owner of that subscription."""
    with acquire_leadership(settings.dsn, "mailer") as one:
        yield one


def subscribe(sql: Sql, name: str, outbox: str | None, position: int | None) -> None:
    """Inserts a subscription without an owner."""
    sql.execute(
        "INSERT INTO subscriptions (subscription_name, outbox, last_position, fence) VALUES (%s, %s, %s, 3)",
        [name, outbox, position],
    )


def position(sql: Sql) -> Any:
    """Returns the position of `mailer`."""
    return value(sql, "SELECT last_position FROM subscriptions WHERE subscription_name = 'mailer'")


# -- list and show


def test_a_list_shows_the_lag_of_each(call: Call, sql: Sql, mailer: list[int]) -> None:
    completions = add(sql, 2, "completion_events")
    subscribe(sql, "at the end", "lease_events", mailer[-1])
    subscribe(sql, "new", "completion_events", None)
    subscribe(sql, "of its own", None, 7)
    listed = call("subscription", "list", "-o", "json").document
    assert [(each["subscription_name"], each["last_position"], each["lag"]) for each in listed] == [
        ("at the end", mailer[-1], 0),
        ("mailer", mailer[1], 3),
        ("new", None, len(completions)),
        ("of its own", 7, None),
    ]
    assert listed[1]["cursor"] == to_cursor(mailer[1])
    assert listed[2]["cursor"] is None
    assert listed[1]["fence"] == 3


def test_the_lag_grows_with_the_outbox_of_the_subscription_only(call: Call, sql: Sql, mailer: list[int]) -> None:
    for table, expected in (("lease_events", 4), ("completion_events", 4)):
        add(sql, 1, table)
        (listed,) = call("subscription", "list", "-o", "json").document
        assert listed["lag"] == expected


def test_an_empty_list_is_reported(call: Call) -> None:
    assert call("subscription", "list", "-o", "table") == (0, "", "there are no subscriptions\n")
    assert call("subscription", "list", "-o", "json").document == []


def test_a_subscription_is_shown_with_its_owner(call: Call, settings: Settings, mailer: list[int]) -> None:
    shown = call("subscription", "show", "mailer", "-o", "json").document
    assert (shown["last_position"], shown["lag"], shown["owner"]) == (mailer[1], 3, None)
    with acquire_leadership(settings.dsn, "mailer"):
        shown = call("subscription", "show", "mailer", "-o", "json").document
    assert shown["owner"]["application"] == "pgcoord/leadership"
    assert shown["fence"] == 4


@pytest.mark.parametrize("words", [("show",), ("set", "7"), ("reset", "--force")], ids=" ".join)
def test_an_unknown_subscription_is_exit_code_3(words: tuple[str, ...], call: Call, sql: Sql) -> None:
    verb, *rest = words
    answer = call("subscription", verb, "mailer", *rest, "-o", "json")
    assert (answer.code, answer.error["message"]) == (3, "there is no subscription 'mailer'")
    assert value(sql, "SELECT count(*) FROM subscriptions") == 0


# -- set


def test_a_checkpoint_is_set_forward_by_event_id_or_cursor(call: Call, sql: Sql, mailer: list[int]) -> None:
    for before, wanted, text in (
        (mailer[1], mailer[3], str(mailer[3])), (mailer[3], mailer[4], to_cursor(mailer[4])),
        (mailer[4], mailer[4], str(mailer[4])),
    ):  # fmt: skip
        answer = call("subscription", "set", "mailer", text, "-o", "json").document
        assert answer == {"subscription_name": "mailer", "last_position": wanted, "before": before}
        assert position(sql) == wanted


def test_a_checkpoint_goes_back_by_force_only(call: Call, sql: Sql, mailer: list[int]) -> None:
    refused = call("subscription", "set", "mailer", "0", "-o", "json").refusal
    assert f"is at {to_cursor(mailer[1])}, and {to_cursor(0)} is before that" in refused
    assert position(sql) == mailer[1]
    assert call("subscription", "set", "mailer", "0", "--force", "-o", "json").document["before"] == mailer[1]
    assert position(sql) == 0


def test_a_checkpoint_is_not_set_beyond_the_end_of_its_outbox(call: Call, sql: Sql, mailer: list[int]) -> None:
    """Its lag would be zero, although events follow."""
    end = mailer[-1]
    assert call("subscription", "set", "mailer", str(end)).code == 0
    refused = call("subscription", "set", "mailer", str(end + 1), "--force")
    assert refused.code == 2
    assert "is beyond the last event of lease_events" in refused.err
    assert call("subscription", "show", "mailer", "-o", "json").document["last_position"] == end


def test_a_checkpoint_without_a_position_is_set_without_force(call: Call, sql: Sql) -> None:
    subscribe(sql, "mailer", "lease_events", None)
    assert call("subscription", "set", "mailer", "0", "-o", "json").document["before"] is None
    assert position(sql) == 0


@pytest.mark.parametrize("text", ["", "x", "1.5", "-1", "2e3", str(2**63), "0" * 18, "01" + "0" * 16])
def test_what_is_neither_a_cursor_nor_an_id_is_refused(text: str, offline: Call) -> None:
    answer = offline("subscription", "set", "-o", "json", "mailer", "--", text)
    assert answer.refusal.startswith("CURSOR: ")


@pytest.mark.parametrize("words", [("set", "9"), ("set", "0", "--force"), ("reset", "--force")], ids=" ".join)
def test_a_subscription_with_an_owner_is_not_changed(
    words: tuple[str, ...], call: Call, sql: Sql, owner: Ownership, mailer: list[int]
) -> None:
    verb, *rest = words
    answer = call("subscription", verb, "mailer", *rest, "-o", "json")
    assert (answer.code, answer.error["code"]) == (5, "busy")
    assert "'mailer' is held by pid" in answer.error["message"]
    assert position(sql) == mailer[1]
    assert value(sql, "SELECT fence FROM subscriptions") == owner.fence


def test_i13_setting_a_checkpoint_fences_an_owner_that_has_not_noticed_its_end(
    call: Call, sql: Sql, owner: Ownership, settings: Settings
) -> None:
    end_holder(sql)
    assert call("subscription", "set", "mailer", "0", "--force").code == 0
    with psycopg.connect(settings.dsn) as service, pytest.raises(Fenced):
        owner.checkpoint.save(99, service)
    assert position(sql) == 0


# -- reset


def test_a_subscription_is_reset_by_force_only(call: Call, sql: Sql, mailer: list[int]) -> None:
    assert "cannot be restored" in call("subscription", "reset", "mailer", "-o", "json").refusal
    assert position(sql) == mailer[1]
    answer = call("subscription", "reset", "mailer", "--force", "-o", "json")
    assert answer.document == {"subscription_name": "mailer", "reset": True}
    assert position(sql) is None
    assert call("subscription", "list", "-o", "json").document == []
    assert call("subscription", "show", "mailer").code == 3


def test_only_the_named_subscription_is_set_or_reset(call: Call, sql: Sql, mailer: list[int]) -> None:
    subscribe(sql, "billing", "lease_events", mailer[0])
    assert call("subscription", "set", "billing", str(mailer[4])).code == 0
    assert call("subscription", "reset", "billing", "--force").code == 0
    assert position(sql) == mailer[1]


def test_i13_an_owner_before_a_reset_saves_nothing_after_it(
    call: Call, sql: Sql, owner: Ownership, settings: Settings
) -> None:
    """Later owners must not draw the fence of an earlier one."""
    end_holder(sql)
    assert call("subscription", "reset", "mailer", "--force").code == 0
    with psycopg.connect(settings.dsn) as service:
        with pytest.raises(Fenced):
            owner.checkpoint.save(99, service)
        service.rollback()
        for _ in range(owner.fence):
            with acquire_leadership(settings.dsn, "mailer"):
                end_holder(sql)
        with pytest.raises(Fenced):
            owner.checkpoint.save(99, service)
    assert position(sql) is None

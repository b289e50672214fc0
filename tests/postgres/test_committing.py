"""What surrounds a commit: the types of arguments, the life of a transaction, its options, its watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pgcoord_cli.core.kv.client import Database, Transaction
from pgcoord_cli.core.kv.key_selector import KeySelector
from tests.postgres.commit_scenarios import Sql, data, needs_leader, put, scenario_test

# -- types


WRITES: dict[str, Callable[[Transaction, Any], object]] = {
    "set a key": lambda tr, it: tr.set(it, b""),
    "set a value": lambda tr, it: tr.set(b"k", it),
    "add a key": lambda tr, it: tr.add(it, b"1"),
    "add an operand": lambda tr, it: tr.add(b"k", it),
    "append an operand": lambda tr, it: tr.append_if_fits(b"k", it),
    "clear": lambda tr, it: tr.clear(it),
    "clear a range from": lambda tr, it: tr.clear_range(it, b"k"),
    "stamp a key": lambda tr, it: tr.set_versionstamped_key(it, b"v"),
    "stamp a value": lambda tr, it: tr.set_versionstamped_value(b"k", it),
    "read conflict key": lambda tr, it: tr.add_read_conflict_key(it),
    "read conflict range": lambda tr, it: tr.add_read_conflict_range(it, b"k"),
    "write conflict key": lambda tr, it: tr.add_write_conflict_key(it),
    "write conflict range": lambda tr, it: tr.add_write_conflict_range(it, b"k"),
}

ENDS: dict[str, Callable[[Transaction, Any], object]] = {
    "clear a range to": lambda tr, it: tr.clear_range(b"", it),
    "read conflict range to": lambda tr, it: tr.add_read_conflict_range(b"", it),
    "write conflict range to": lambda tr, it: tr.add_write_conflict_range(b"", it),
}
"""None is allowed here: past the last key."""

READS: dict[str, Callable[[Transaction, Any], Any]] = {
    "get": lambda tr, it: tr.get(it),
    "watch": lambda tr, it: tr.watch(it),
    "get_range from": lambda tr, it: tr.get_range(it, b"k"),
    "get_range from a selector": lambda tr, it: tr.get_range(KeySelector.first_greater_than(it), b"k"),
    "get_key": lambda tr, it: tr.get_key(KeySelector.last_less_than(it)),
    "get_key without a selector": lambda tr, it: tr.get_key(it),
}


@scenario_test
async def test_i6_what_is_not_bytes_is_refused_where_it_enters(db: Database) -> None:
    for wrong in ("text", 1, None, 1.5, [b"k"], (b"k",)):
        for write in WRITES.values():
            with pytest.raises(TypeError, match="bytes"):
                write(db.transaction(), wrong)
        for read in READS.values():
            with pytest.raises(TypeError, match=r"bytes|KeySelector"):
                await read(db.transaction(), wrong)
        for end in ENDS.values():
            if wrong is not None:
                with pytest.raises(TypeError, match="bytes"):
                    end(db.transaction(), wrong)
        if wrong is not None:
            with pytest.raises(TypeError, match="bytes"):
                await db.transaction().get_range(b"", wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a number"):
        await db.transaction().get_key(KeySelector(b"k", False, "1"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"not str; encode it"):
        db.transaction().set(b"k", "text")  # type: ignore[arg-type]


@needs_leader
@pytest.mark.parametrize("how", ["set", "add"])
@scenario_test
async def test_i6_a_value_that_is_not_bytes_stops_no_later_commit(db: Database, sql: Sql, how: str) -> None:
    tr = db.transaction()
    with pytest.raises(TypeError):
        getattr(tr, how)(b"k", "text")
    tr.set(b"fine", b"1")
    assert await tr.commit() == 1, "nothing was buffered by the call that was refused"
    assert await put(db, a=b"1") == 2
    assert data(sql) == {b"a": b"1", b"fine": b"1"}


@needs_leader
@scenario_test
async def test_a_bytearray_or_memoryview_is_copied(db: Database, sql: Sql) -> None:
    key, written = bytearray(b"k"), bytearray(b"v")
    tr = db.transaction()
    tr.set(key, memoryview(written))  # type: ignore[arg-type]
    tr.add_write_conflict_key(memoryview(key))  # type: ignore[arg-type]
    key[0] = written[0] = 0
    assert await tr.get(bytearray(b"k")) == b"v"  # type: ignore[arg-type]
    await tr.commit()
    assert data(sql) == {b"k": b"v"}

"""Keys made of tuples, stored and read back in the order of the tuples."""

from __future__ import annotations

from pgcoord_cli.core.kv.client import Database
from pgcoord_cli.tuples import Subspace, Versionstamp
from tests.postgres.commit_scenarios import needs_leader, scenario_test


@needs_leader
@scenario_test
async def test_keys_of_subspaces_are_read_in_the_order_of_their_tuples(db: Database) -> None:
    orders, log = Subspace(("orders",)), Subspace(("log",), b"raw")
    ascending = [
        (None,),
        (b"\0",),
        ("a",),
        ("a", 1),
        ("a\0",),
        (("a", None), 2),
        (-(2**64),),
        (-1,),
        (0,),
        (300,),
        (1.5,),
    ]
    stamps = []
    for round_ in range(2):
        tr = db.transaction()
        for elements in reversed(ascending):
            tr.set(orders.pack(elements), b"")
        for number in (1, 0):
            template = log.pack_with_versionstamp(("entry", Versionstamp(user_version=number), round_))
            tr.set_versionstamped_key(template, b"%d" % number)
        await tr.commit()
        stamps += [Versionstamp(user_version=number).completed(tr.versionstamp) for number in (0, 1)]

    tr = db.transaction()
    assert [orders.unpack(key) for key, _ in await tr.get_range(*orders.range())] == ascending
    assert [orders.unpack(key) for key, _ in await tr.get_range(*orders.range(("a",)))] == [("a", 1)]
    entries = [(*log.unpack(key), value) for key, value in await tr.get_range(*log.range(("entry",)))]
    assert entries == [("entry", stamps[place], place // 2, b"%d" % (place % 2)) for place in range(4)]
    assert len(await tr.get_range(b"", None)) == len(ascending) + len(entries)

"""Keys made of tuples, in FoundationDB's tuple encoding: packed tuples sort like the tuples.

    from pgcoord_cli.tuples import Subspace

    orders = Subspace(("orders",))
    transaction.set(orders.pack(("alice", 17)), b"shipped")
    await transaction.get_range(*orders.range(("alice",)))

An element is None, bytes, str, int, float, bool, UUID, `SingleFloat`, `Versionstamp` or a tuple of such. Elements of
another type raise TypeError, bytes that are no packed tuple ValueError. `Subspace` and `Versionstamp` are those of
`pgcoord_cli`; `pgcoord_cli.core.kv.tuple_encoding` describes the bytes.
"""

from pgcoord_cli.core.kv.subspace import Subspace
from pgcoord_cli.core.kv.tuple_encoding import (
    SingleFloat,
    Versionstamp,
    pack,
    pack_with_versionstamp,
    range_of,
    unpack,
)

__all__ = ["SingleFloat", "Subspace", "Versionstamp", "pack", "pack_with_versionstamp", "range_of", "unpack"]

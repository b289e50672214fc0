"""The transaction client for programs without an event loop.

    from pgcoord_cli.sync import connect

    with connect() as database:
        database.run(lambda transaction: transaction.add(b"visits", (1).to_bytes(8, "little")))

`Database`, `Transaction` and `Watch` are those of `pgcoord_cli`, with calls that block instead of coroutines, and
`transactional` decorates functions that block. One Database serves all threads of a program;
`pgcoord_cli.core.kv.blocking` describes how. Errors, `KeySelector` and `TransactionOptions` are those of `pgcoord_cli`.
"""

from pgcoord_cli.core.kv.blocking import Database, Transaction, Watch, connect, transactional
from pgcoord_cli.core.kv.key_selector import KeySelector

__all__ = ["Database", "KeySelector", "Transaction", "Watch", "connect", "transactional"]

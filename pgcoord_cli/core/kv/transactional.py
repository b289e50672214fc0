"""`transactional`: functions that run in a transaction of their own, or join that of their caller.

    @transactional
    async def deposit(tr, account, amount):
        balance = int(await tr[account] or 0)
        tr[account] = b"%d" % (balance + amount)

    @transactional
    async def transfer(tr, source, target, amount):
        await deposit(tr, source, -amount)
        await deposit(tr, target, amount)

    await transfer(database, b"alice", b"bob", 10)

`transfer` is given a Database: it runs by `Database.run`, which commits and retries. The two calls of `deposit` are
given the transaction of `transfer`, and join it: they neither commit nor retry.

This module has the decorator for asyncio; `core.kv.blocking` has the one for functions that block.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, Generic, TypeVar, Unpack, overload

from pgcoord_cli.core.kv.client import Database
from pgcoord_cli.core.kv.options import OptionChanges, TransactionOptions
from pgcoord_cli.core.kv.transaction import Transaction

T = TypeVar("T")

NAMES = ("tr", "transaction")
"""Names of the argument that is the Database or Transaction; without one of them it is the first argument."""


class Work(Generic[T]):
    """A call of a decorated function, without the transaction: what `Database.run` runs.

    `__wrapped__` is the function. It tells the work of one decorated function from that of another
    (`core.kv.hot_keys.kind_of`), which the class of this object would not.
    """

    def __init__(self, function: Callable[..., T], call: inspect.BoundArguments, name: str) -> None:
        self.__wrapped__ = function
        self._call = call
        self._name = name

    def __call__(self, transaction: object) -> T:
        self._call.arguments[self._name] = transaction
        return self.__wrapped__(*self._call.args, **self._call.kwargs)


class TransactionArgument:
    """The argument of a function that is given a database or a transaction.

    Raises TypeError for a function without such an argument, and for a generator, which would run after the commit.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._signature = inspect.signature(function)
        self._function_name = getattr(function, "__qualname__", repr(function))
        self.name = self._find()
        unwrapped = inspect.unwrap(function)
        if inspect.isgeneratorfunction(unwrapped) or inspect.isasyncgenfunction(unwrapped):
            raise TypeError(f"{self._function_name}() is a generator, which would run after the commit")

    def _find(self) -> str:
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names = [each.name for each in self._signature.parameters.values() if each.kind not in kinds]
        # Methods are plain functions while their class is being made: only the names of their arguments tell.
        candidates = names[1:] if names[:1] in (["self"], ["cls"]) else names
        found = [name for name in candidates if name in NAMES] or candidates
        if not found:
            raise TypeError(f"{self._function_name}() has no argument for a transaction")
        return found[0]

    def bind(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[inspect.BoundArguments, Any]:
        """Returns the bound arguments of a call, and the one that is a database or a transaction (None: left out).

        Raises TypeError for arguments that the function does not take.
        """
        call = self._signature.bind(*args, **named)
        return call, call.arguments.get(self.name)

    def refusal(self, given: object) -> TypeError:
        """Returns the error for an argument that is neither a database nor a transaction."""
        kind = type(given)
        return TypeError(
            f"{self._function_name}(): {self.name!r} must be a Database or a Transaction of the same interface as the"
            f" decorator, not {kind.__module__}.{kind.__qualname__}"
        )


@overload
def transactional(
    function: Callable[..., Awaitable[T]], /, **options: Unpack[OptionChanges]
) -> Callable[..., Awaitable[T]]: ...


@overload
def transactional(
    **options: Unpack[OptionChanges],
) -> Callable[[Callable[..., Awaitable[T]]], Callable[..., Awaitable[T]]]: ...


def transactional(function: Callable[..., Awaitable[T]] | None = None, /, **options: Unpack[OptionChanges]) -> Any:
    """Decorates a coroutine function that is given a Database or a Transaction.

    The argument is the one named `tr` or `transaction`, else the first; of a method, the first after `self` or `cls`.
    Given a Database, the function runs by `Database.run`: it is given a transaction, which is then committed, and runs
    again after a conflict. Given a Transaction, it joins it: the caller of the outermost function commits and retries.

    The options are those of TransactionOptions, as in `@transactional(retry_limit=3)`; a function that joins a
    transaction does not change its options. Raises TypeError for a function without such an argument and for a
    generator, UsageError for an option out of range.
    """
    TransactionOptions(**options)

    def decorate(function: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
        argument = TransactionArgument(function)

        @wraps(function)
        async def in_transaction(*args: Any, **named: Any) -> T:
            call, given = argument.bind(args, named)
            if isinstance(given, Transaction):
                return await function(*args, **named)
            if isinstance(given, Database):
                return await given.run(Work(function, call, argument.name), **options)
            raise argument.refusal(given)

        return in_transaction

    return decorate if function is None else decorate(function)

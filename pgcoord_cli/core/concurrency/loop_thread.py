"""An event loop in a thread of its own, and the resource that lives in it: asyncio code for blocking callers.

**Start.** The thread runs one event loop. Its main task opens the resource, hands it out, and waits until it is
cancelled. Creating a LoopThread waits until the resource is open, and raises what opening it raised.

**Calls.** Any number of threads submit coroutines, and each waits for its own result. An interruption of the waiting
thread (Ctrl-C raises KeyboardInterrupt in the main thread) cancels its coroutine and nothing else: loop, resource and
the calls of other threads go on.

**Close.** From the moment of `close` submissions are refused. The main task is cancelled, and closes the resource. That
ends the calls that depend on it, each with the error that the resource raises; a call that has not ended
DRAIN_SECONDS later is cancelled, and its thread gets ConnectionFailed. Then the thread ends. A LoopThread that is
dropped without `close` ends its thread in the same way, without waiting for it. The thread is a daemon, so that a
program that forgets to close ends anyway.

**Fork.** A child process has no such thread: calls there are refused, and `close` does nothing.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from typing import Any, Generic, NamedTuple, TypeVar

from pgcoord_cli.core.concurrency import event_loop
from pgcoord_cli.errors import ConnectionFailed, UsageError

R = TypeVar("R")
T = TypeVar("T")

CLOSED = "this client was closed"

DRAIN_SECONDS = 0.5
"""Seconds for which calls under way may end by themselves once the resource is closed."""

ResourceOpener = Callable[[], Awaitable[AbstractAsyncContextManager[R]]]


class _Loop(NamedTuple):
    """A running event loop and its main task."""

    loop: asyncio.AbstractEventLoop
    main: asyncio.Task[Any]

    def stop(self, pid: int) -> None:
        """Cancels the main task, if the process is still the one that started it."""
        if os.getpid() == pid:
            with suppress(RuntimeError):  # the loop is closed already
                self.loop.call_soon_threadsafe(self.main.cancel)


class LoopThread(Generic[R]):
    """Runs coroutines on the resource that `opener` opens, in one event loop for all threads.

    Every method but `close` raises ConnectionFailed once it is closed, and UsageError in a forked process.
    """

    def __init__(self, opener: ResourceOpener[R], name: str) -> None:
        started: Future[_Loop] = Future()
        opened: Future[R] = Future()
        self._pid = os.getpid()
        # Reentrant, so that a signal handler may close while its own thread submits.
        self._lock = threading.RLock()
        self._closed = False
        # The thread must not refer to this object, so that an object that is dropped ends its thread.
        self._thread = threading.Thread(target=_run, args=(opener, started, opened), name=name, daemon=True)
        self._thread.start()
        self._loop = started.result()
        self._stop = weakref.finalize(self, self._loop.stop, self._pid)
        try:
            self._resource = opened.result()
        except BaseException:
            self.close()
            raise

    @property
    def resource(self) -> R:
        """The resource, for what needs no event loop."""
        self._check()
        return self._resource

    def submit(self, function: Callable[[R], Coroutine[Any, Any, T]]) -> Future[T]:
        """Starts `function(resource)` in the loop."""
        # Under the lock, so that nothing is submitted to a loop that will run nothing any more.
        with self._checked_lock():
            return asyncio.run_coroutine_threadsafe(function(self._resource), self._loop.loop)

    def call(self, function: Callable[[R], Coroutine[Any, Any, T]]) -> T:
        """Runs `function(resource)` in the loop and returns its result. Also raises what it raises."""
        return wait_for(self.submit(function))

    def call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        """Has the loop call `callback(*args)`."""
        with self._checked_lock():
            self._loop.loop.call_soon_threadsafe(callback, *args)

    def close(self) -> None:
        """Closes the resource and ends the thread; waits for both. Repeated calls do nothing."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
        self._stop()
        self._thread.join()

    @contextmanager
    def _checked_lock(self) -> Iterator[None]:
        self._check()  # before the lock: in a forked process another thread's lock is never released
        with self._lock:
            self._check()
            yield

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise UsageError(
                f"this client was opened by process {self._pid} and cannot be used in process {os.getpid()}",
                hint="a forked process opens a client of its own",
            )
        if self._closed:
            raise ConnectionFailed(CLOSED, hint="nothing was sent")


def wait_for(future: Future[T]) -> T:
    """Waits for a submitted coroutine. Raises ConnectionFailed if it was cancelled because of `close`.

    If this thread is interrupted meanwhile, the coroutine is cancelled.
    """
    try:
        return future.result()
    except CancelledError:
        raise ConnectionFailed(CLOSED) from None
    except BaseException:
        future.cancel()  # does nothing if it is the coroutine that raised
        raise


def _run(opener: ResourceOpener[R], started: Future[_Loop], opened: Future[R]) -> None:
    """Runs the loop until its main task ends."""
    try:
        event_loop.run(_serve(opener, started, opened))
    except asyncio.CancelledError:  # stopped before the resource was open
        opened.cancel()
    except BaseException as error:
        if opened.done():
            raise
        opened.set_exception(error)


async def _serve(opener: ResourceOpener[R], started: Future[_Loop], opened: Future[R]) -> None:
    main = asyncio.current_task()
    assert main is not None
    started.set_result(_Loop(asyncio.get_running_loop(), main))
    async with await opener() as resource:
        opened.set_result(resource)
        with suppress(asyncio.CancelledError):
            await asyncio.get_running_loop().create_future()
    if calls := asyncio.all_tasks() - {main}:
        await asyncio.wait(calls, timeout=DRAIN_SECONDS)

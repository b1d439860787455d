"""Calls of other people's functions: side by side, within a time limit, and no exception of theirs
ends the caller.
"""

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

GRACE = 1.0  # seconds that an event loop has to report what ran out of time

Outcome = tuple[Any, str | None]  # a result and None, or None and what went wrong


async def attempt(fn: Callable, *args, timeout: float) -> Outcome:
    """What `fn(*args)` returns, and None; or None, and what went wrong.

    A plain function runs in a daemon thread of its own, an async one on the running event loop.

    Args:
      timeout: seconds; what still runs then is left behind.

    >>> asyncio.run(attempt(divmod, 7, 2, timeout=1.0)), asyncio.run(attempt(divmod, 7, 0, timeout=1.0))
    (((3, 1), None), (None, 'ZeroDivisionError: integer division or modulo by zero'))
    """
    limit = asyncio.timeout(timeout)
    try:
        async with limit:
            value, error = await asyncio.wrap_future(in_thread(fn, *args))
            if error is not None:
                raise error
            return (await value if inspect.isawaitable(value) else value), None
    # BaseException, since a tool that calls exit() raises SystemExit, which must not end the loop.
    except BaseException as error:
        if cancelled_from_outside(error):
            raise
        return (
            None,
            f"no answer within {timeout:g} seconds"
            if limit.expired()
            else f"{type(error).__name__}: {error}",
        )


def cancelled_from_outside(error: BaseException) -> bool:
    """Whether an exception tells the running task to end; all others are what its function raised,
    of whatever kind.
    """
    # A function may raise CancelledError itself: only a task that is being cancelled counts.
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def in_thread(fn: Callable, *args, **kwargs) -> Future:
    """`(value, None)` or `(None, exception)` of a call, in a thread that keeps no process alive as
    a pool's would.
    """
    future: Future = Future()
    # A running future cannot be cancelled: a result that comes after the time-out still has a place
    # to go to, and raises nothing.
    future.set_running_or_notify_cancel()

    def work():
        try:
            outcome = fn(*args, **kwargs), None
        except BaseException as error:
            outcome = None, error
        future.set_result(outcome)

    # A pool would wait for its threads when Python ends, and one of them may hang for ever.
    threading.Thread(target=work, daemon=True).start()
    return future


@contextlib.contextmanager
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One event loop for all turns, in a thread: what an environment opens in one serves it in the
    next.
    """
    started: Future = Future()

    async def serve():
        stop = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), stop))
        await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    loop, stop = started.result()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(GRACE)


def attempt_all(
    loop: asyncio.AbstractEventLoop, fn: Callable, calls: list[tuple], timeout: float
) -> list[Outcome]:
    """`attempt` of all calls at the same time."""
    # Filled in place, so that what is there counts where the loop itself does not return.
    outcomes: list[Outcome] = [(None, f"no answer within {timeout:g} seconds")] * len(calls)

    async def one(i, args):
        outcomes[i] = await attempt(fn, *args, timeout=timeout)

    async def every():
        await asyncio.gather(
            *(one(i, args) for i, args in enumerate(calls)), return_exceptions=True
        )

    # An async function that blocks holds the loop, and with it every time limit. The caller's own
    # limit then ends the wait, and what is there is taken.
    with contextlib.suppress(TimeoutError):
        asyncio.run_coroutine_threadsafe(every(), loop).result(timeout + GRACE)
    return list(outcomes)

"""Requests to stop: Ctrl-C at a terminal, SIGTERM from a scheduler that wants the machine back."""

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import current_thread, main_thread
from types import FrameType

STOPPING = "stopping after this step, and saving; once more stops at once"


class Stopped(ValueError):
    """Raised within a step that cannot be taken, and before it has changed anything: a run saves
    what it has, and ends.
    """


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether a stop was requested, so that a loop can end between two steps.

    Of one process as `requested` has it.  Where several compute together all stop at the same step,
    whichever of them was asked: all must call the function equally often.  There SIGTERM, which JAX
    listens for, asks as often as it comes, and a second Ctrl-C ends the process at once.

    >>> with stop_requests() as stop_requested:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     stop_requested()
    True
    """
    # Here: the command line handles signals before JAX is loaded.
    from rlhf import hosts

    if not hosts.several():
        with requested(STOPPING) as stop_requested:
            yield stop_requested
        return
    from jax.experimental.multihost_utils import reached_preemption_sync_point

    calls = itertools.count()
    reached: list[bool] = []

    def stop_at_this_step() -> bool:
        # True at one call alone, which all processes have agreed on; from there on it stays.
        if not reached and reached_preemption_sync_point(next(calls)):
            reached.append(True)
        return bool(reached)

    def pass_on_to_all() -> None:
        # What JAX's service takes for the machine's being taken away.
        os.kill(os.getpid(), signal.SIGTERM)

    with _handled(_first_request(STOPPING, [], pass_on_to_all), signal.SIGINT):
        yield stop_at_this_step


def _first_request(
    said: str, received: list[int], pass_on: Callable[[], object] = lambda: None
) -> Callable[[int, FrameType | None], None]:
    """A handler that notes the first request, says so and passes it on; the second ends the process
    where it is.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        # A list and no flag: the handler runs between two bytecodes, and an append needs no lock.
        received.append(number)
        _say(f"\n{said}\n")
        pass_on()

    return handle


@contextmanager
def requested(said: str) -> Iterator[Callable[[], bool]]:
    """Whether a stop was requested of this process by Ctrl-C or SIGTERM; a second request stops it
    where it is.

    Signals belong to a process's main thread; elsewhere they do what they did before; so do those
    that are ignored, as Ctrl-C is in a shell's background.

    Args:
      said: what the user is told at the first request.

    >>> with requested("stopping") as stop_requested:
    ...     stop_requested()
    False
    """
    received: list[int] = []
    with _handled(_first_request(said, received), signal.SIGINT, signal.SIGTERM):
        yield lambda: bool(received)


@contextmanager
def terminable(leave: Callable[[], object] | None = None) -> Iterator[None]:
    """Makes SIGTERM raise KeyboardInterrupt, as Ctrl-C does.

    Args:
      leave: called in place of raising, at both signals, by a process that has nothing to lose:
        libraries that are being loaded swallow what is raised in them, or abort the process.

    >>> with terminable():
    ...     try:
    ...         signal.raise_signal(signal.SIGTERM)
    ...     except KeyboardInterrupt:
    ...         print("stop requested")
    stop requested
    """

    def handle(number, frame):
        if leave is not None:
            leave()
        raise KeyboardInterrupt

    signals = (signal.SIGTERM,) if leave is None else (signal.SIGINT, signal.SIGTERM)
    with _handled(handle, *signals):
        yield


@contextmanager
def _handled(
    handler: Callable[[int, FrameType | None], None], *signals: signal.Signals
) -> Iterator[bool]:
    """Signals with another handler, where this thread may set one and they are not ignored; whether
    any has it.
    """
    # Python sets handlers from the main thread alone, and raises elsewhere (notebooks, servers).
    ours = signals if current_thread() is main_thread() else ()
    # SIG_IGN: `nohup` and a shell's background want the signal ignored.  None: a handler that C
    # set, which Python could not put back.
    heeded = [number for number in ours if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield bool(heeded)
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def _say(text: str) -> None:
    with suppress(OSError):  # whoever reads may be gone already
        # Not `print`: a handler may interrupt a write to the same buffer, which raises
        # RuntimeError.
        os.write(2, text.encode())

"""Requests to stop: Ctrl-C at a terminal, SIGTERM from a scheduler that wants the machine back."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import current_thread, main_thread
from types import FrameType

SEVERAL = (
    "several processes compute together, and do not stop together yet: the first SIGTERM is noted, "
    "a second one ends this "
    "process at once; --save_every keeps what --resume goes on from"
)


class Stopped(ValueError):
    """Raised within a step that cannot be taken, and before it has changed anything: a run saves
    what it has, and ends.
    """


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether a stop was requested of this process, so that a loop can end between two steps; a
    second request stops it where it is.

    Signals belong to a process's main thread; elsewhere they do what they did before; so do those
    that are ignored, as Ctrl-C is in a shell's background.  Where several processes compute
    together they would have to stop at the same step: there the first SIGTERM changes nothing,
    which is said at the start, and the second ends the process.

    >>> with stop_requests() as stop_requested:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     stop_requested()
    True
    """
    # Here: the command line handles signals before JAX is loaded.
    import jax

    # A list and no flag: the handler runs between two bytecodes, and an append needs no lock.
    received: list[int] = []

    def handle(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)
        _say("\nstopping after this step, and saving; once more stops at once\n")

    def handle_first(number, frame):
        # The default handler and no exception: the process may be waiting for the others inside a
        # program, where Python would never raise it.
        signal.signal(number, signal.SIG_DFL)
        _say(f"\n{SEVERAL}\n")

    if jax.process_count() > 1:
        # `jax.distributed.initialize` has SIGTERM caught by a handler of its own, which swallows
        # every one.
        with _handled(handle_first, signal.SIGTERM) as handled:
            if handled:
                _say(f"{SEVERAL}\n")
            yield lambda: False
    else:
        with _handled(handle, signal.SIGINT, signal.SIGTERM):
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

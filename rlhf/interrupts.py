"""Being told to stop: Ctrl-C at a terminal, SIGTERM from a scheduler that wants the machine back."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import current_thread, main_thread
from types import FrameType

SEVERAL = (
    "several processes compute together, and do not stop together yet: the first SIGTERM is noted, a second one ends this "
    "process at once; --save_every keeps what --resume goes on from"
)


class Stopped(ValueError):
    """Raised within a step that cannot be taken, and before it has changed anything: a run saves what it has, and ends."""


@contextmanager
def told_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether this process was told to stop, so that a loop can end between two steps; told twice, it stops where it is.

    Signals belong to a process's main thread; elsewhere they do what they did before; so do those that are ignored, as Ctrl-C
    is in a shell's background.  Where several processes compute together they would have to stop at the same step: there the
    first SIGTERM changes nothing, which is said at the start, and the second ends the process.

    >>> with told_to_stop() as told:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     told()
    True
    """
    import jax  # here: the command line hears signals before JAX is there

    heard: list[int] = []

    def hear(number, frame):
        if heard:
            raise KeyboardInterrupt
        heard.append(number)
        _say("\nstopping after this step, and saving; once more stops at once\n")

    def hear_alone(number, frame):
        signal.signal(number, signal.SIG_DFL)  # not an exception: the process may be waiting for the others inside a program
        _say(f"\n{SEVERAL}\n")

    if jax.process_count() > 1:
        # `jax.distributed.initialize` has SIGTERM caught by a handler of its own, which swallows every one.
        with _handled(hear_alone, signal.SIGTERM) as handled:
            if handled:
                _say(f"{SEVERAL}\n")
            yield lambda: False
    else:
        with _handled(hear, signal.SIGINT, signal.SIGTERM):
            yield lambda: bool(heard)


@contextmanager
def terminable(leave: Callable[[], object] | None = None) -> Iterator[None]:
    """Makes SIGTERM raise KeyboardInterrupt, as Ctrl-C does.

    Args:
      leave: called in place of raising, at both signals, by a process that has nothing to lose: libraries that are being loaded
        swallow what is raised in them, or abort the process.

    >>> with terminable():
    ...     try:
    ...         signal.raise_signal(signal.SIGTERM)
    ...     except KeyboardInterrupt:
    ...         print("told")
    told
    """

    def hear(number, frame):
        if leave is not None:
            leave()
        raise KeyboardInterrupt

    signals = (signal.SIGTERM,) if leave is None else (signal.SIGINT, signal.SIGTERM)
    with _handled(hear, *signals):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *signals: signal.Signals) -> Iterator[bool]:
    """Signals with another handler, where this thread may set one and they are not ignored; whether any has it."""
    ours = signals if current_thread() is main_thread() else ()
    heeded = [number for number in ours if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield bool(heeded)
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def _say(text: str) -> None:
    with suppress(OSError):  # whoever reads may be gone already
        os.write(2, text.encode())

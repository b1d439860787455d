"""Being told to stop: Ctrl-C at a terminal, SIGTERM from a scheduler that wants the machine back."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import current_thread, main_thread

import jax


class Stopped(ValueError):
    """Raised within a step that cannot be taken, and before it has changed anything: a run saves what it has, and ends."""


@contextmanager
def told_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether this process was told to stop, so that a loop can end between two steps; told twice, it stops where it is.

    Signals belong to a process's main thread; elsewhere, and where several processes compute together and would have to stop
    at the same step, they do what they did before; so do those that are ignored, as Ctrl-C is in a shell's background.

    >>> with told_to_stop() as told:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     told()
    True
    """
    heard: list[int] = []

    def hear(number, frame):
        if heard:
            raise KeyboardInterrupt
        heard.append(number)
        with suppress(OSError):  # whoever reads may be gone already
            os.write(2, b"\nstopping after this step, and saving; once more stops at once\n")

    ours = (signal.SIGINT, signal.SIGTERM) if current_thread() is main_thread() and jax.process_count() == 1 else ()
    heeded = [number for number in ours if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, hear) for number in heeded}
    try:
        yield lambda: bool(heard)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Compilations: counted, since a run that compiles at every step stalls, and kept on disk, so that
a second start is quick.
"""

import os
from functools import cache
from pathlib import Path

import jax

# JAX records this event of every program that it compiles or finds on disk.
EVENT = "/jax/core/compile/backend_compile_duration"

_events: list[float] = []


@cache
def _listen() -> None:
    """JAX takes listeners back in no public way, so that there is one for the whole process."""

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == EVENT:
            _events.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)


def count() -> int:
    """Programs that this process has compiled, or loaded from disk, since this was first called.

    >>> before = count()
    >>> _ = jax.jit(lambda x: x + 1.25)(jax.numpy.ones(3))
    >>> count() > before
    True
    """
    _listen()
    return len(_events)


def keep_on_disk(folder: str | None) -> None:
    """JAX's persistent compilation cache in a folder; None: none.  `JAX_COMPILATION_CACHE_DIR`,
    where it is set, holds.

    Programs of all sizes are kept: a run compiles dozens of small ones beside its step.
    """
    if folder is None:
        # Without this a cache of the environment would go on being used.
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
    # JAX's defaults leave out programs that compile within a second, which are most of a run's.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

"""Saving and restoring whole runs, with Orbax: every leaf of the state, keys included, bit for
bit.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


class Checkpoints:
    """The checkpoints of one run, `folder/<step>`; the last `keep` are kept.

    Args:
      folder: made where missing.
      keep: how many stay; older ones are deleted when a new one is complete.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        # Here: importing Orbax takes seconds, which tools without checkpoints need not wait for.
        import orbax.checkpoint as ocp

        self._manager = ocp.CheckpointManager(
            Path(folder).absolute(),
            # Synchronous: where a step counts as saved it is on disk, also if a kill comes next.
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False
            ),
        )

    def save(self, state: Any) -> None:
        """Writes a `TrainState` under its step; complete when it returns."""
        import orbax.checkpoint as ocp

        self._manager.save(int(state.step), args=ocp.args.StandardSave(_keys_to_data(state)))

    def restore(self, like: Any) -> Any:
        """The newest state, in the structure, types and shardings of `like`.

        Args:
          like: a state of the same run, for example a fresh one; only its form is read.

        Raises: FileNotFoundError where the folder holds none, ValueError (Orbax's) where the
        structure differs.
        """
        import orbax.checkpoint as ocp

        step = self._manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self._manager.directory}")
        # Shapes with shardings: every array is read straight into its place.
        form = jax.tree.map(_form, _keys_to_data(like))
        return _data_to_keys(self._manager.restore(step, args=ocp.args.StandardRestore(form)), like)

    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self._manager.latest_step()


def _form(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _is_key(x) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


# Orbax writes arrays of numbers; typed keys are unwrapped, and wrapped again by the form of `like`.
def _keys_to_data(state):
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, state)


def _data_to_keys(data, like):
    def wrap(x, old):
        return jax.random.wrap_key_data(x, impl=jax.random.key_impl(old)) if _is_key(old) else x

    return jax.tree.map(wrap, data, like)

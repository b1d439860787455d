"""What recipes on data that is there before the run share."""

from typing import Any

import jax
from jax.sharding import Mesh

from rlhf import losses
from rlhf.sharding import jit_step
from rlhf.train import TrainState
from rlhf.training.programs import Step
from rlhf.typing import StepFn


def counts(segment_ids: jax.Array) -> dict[str, jax.Array]:
    """The `tokens` and `sequences` of a batch `[..., T]`: what the speed is reckoned by."""
    # Pairs are [P, 2, T]; a packed row holds several sequences.
    rows = segment_ids.reshape(-1, segment_ids.shape[-1])
    return {"tokens": (rows != 0).sum(), "sequences": losses.segments.starts(rows).sum()}


def make_step(update: StepFn, mesh: Mesh, state: TrainState) -> Step:
    """`(state, batch) -> (state, metrics)` in one program for a mesh; the metrics gain
    `counts` of the batch.

    Args:
      update: a recipe's `make_update`.
      mesh: where the state is.
      state: of the run; only where its arrays are is read.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict]:
        state, metrics = update(state, batch)
        # Counted inside the program: on the host the batch is split over devices.
        return state, {**metrics, **counts(batch.segment_ids)}

    jitted = jit_step(step, mesh, state)

    def trace(state: TrainState, batch: Any) -> dict[str, jax.stages.Traced]:
        return {"update": jitted.trace(state, batch)}

    return Step(jitted, trace)

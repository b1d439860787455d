"""What recipes on data that is there before the run share."""

from typing import Any

from jax.sharding import Mesh

from rlhf.sharding import jit_step
from rlhf.train import TrainState
from rlhf.typing import StepFn


def make_step(update: StepFn, mesh: Mesh, state: TrainState) -> StepFn:
    """`(state, batch) -> (state, metrics)` in one program for a mesh; the metrics gain `tokens`,
    those of the batch.

    Args:
      update: a recipe's `make_update`.
      mesh: where the state is.
      state: of the run; only where its arrays are is read.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict]:
        state, metrics = update(state, batch)
        # Counted inside the program: on the host the batch is split over devices.
        return state, {**metrics, "tokens": (batch.segment_ids != 0).sum()}

    return jit_step(step, mesh, state)

"""Objectives that couple rows, as steps and evaluations: scores row by row, then one loss of those of all rows together."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlhf.loop import Training
from rlhf.recipes import setup
from rlhf.train import TrainState, coupled_train_step


def step(
    scores_fn: Callable,
    objective: Callable,
    training: Training,
    *,
    prepare: Callable = lambda batch: batch,
    update_context: Callable | None = None,
) -> Callable:
    """`make_step` of `rlhf.loop.fit`: `setup.offline_step` for the arguments of `rlhf.coupled_train_step`."""
    knobs: dict[str, Any] = dict(micro_batches=training.micro_batches, update_context=update_context)
    return setup.prepared_step(lambda optimizer: coupled_train_step(scores_fn, objective, optimizer, **knobs), prepare)


def evaluation(
    scores_fn: Callable, objective: Callable, prepared: Any, size: int
) -> Callable[[TrainState], dict[str, Any]] | None:
    """`(state) -> loss and metrics` of rows that are not trained on, scored `size` at a time; None where there are none."""
    if prepared is None:
        return None
    scores = jax.jit(lambda params, context, part: scores_fn(params, context, part, None))
    whole = jax.jit(objective)

    def evaluate(state: TrainState) -> dict[str, Any]:
        loss, metrics = whole(
            in_parts(lambda part: scores(state.params, state.context, part), prepared, size), state.context, prepared
        )
        return {"loss": loss, **metrics}

    return evaluate


def in_parts(fn: Callable, arrays: Any, size: int) -> Any:
    """`fn` of all rows, `size` at a time, as arrays of NumPy."""
    found = [jax.device_get(fn(part)) for part in setup.parts(arrays, size)]
    return jax.tree.map(lambda *x: np.concatenate(x), *found)

"""Evaluations on held-out rows: a loss, an objective that couples rows, or the rewards of sampled
completions.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf.train import TrainState
from rlhf.training import collecting, datasets, meshes
from rlhf.training.collecting import Collector
from rlhf.training.options import TrainingOptions
from rlhf.training.prompts import PromptSet
from rlhf.training.runs import RunFolder
from rlhf.training.sampling import completion_metrics
from rlhf.typing import Evaluate, LossFn, ScoresFn, ScoresObjective


def of_loss(loss_fn: LossFn, held_out: Any, size: int, mesh: Mesh) -> Evaluate | None:
    """`(state) -> loss and metrics` of held-out rows, `size` at a time; None where there are none.

    Args:
      loss_fn: `(params, context, batch, key) -> (loss, metrics)`, weighted sums over rows.
      held_out: arrays, among them `weights`, or several fields whose names end so: they are those
        of all rows together, so that the parts add up to the loss of all.
      size: rows at a time.
      mesh: where they are evaluated.
    """
    if held_out is None:
        return None

    # Parameters and context are arguments and no closure: constants in a program would be compiled
    # into it, a copy of the model at every evaluation.
    @jax.jit
    def one(params, context, part):
        loss, metrics = loss_fn(params, context, part, None)
        return {"loss": loss, **metrics}

    def evaluate(state: TrainState) -> dict[str, Any]:
        found = []
        for part, real in datasets.parts(held_out, size):
            part = _without_filling(part, size, real)
            found.append(jax.device_get(one(state.params, state.context, meshes.place(part, mesh))))
        # Weights are those of all rows together, so that parts add up; a mean of means would weigh
        # the last, smaller part too much.
        return jax.tree.map(lambda *values: sum(values), *found)

    return evaluate


def _without_filling(part: Any, size: int, real: int) -> Any:
    """A part of which all rows but the first `real` weigh nothing: those that fill up the last
    part.
    """

    def weigh(path, x):
        # By name, since a batch may have several: `weights`, `nll_weights`.
        if not getattr(path[-1], "name", "").endswith("weights"):
            return x
        # `[size, 1, …]`, to broadcast over weights of rows, of tokens and of packed pairs.
        return np.asarray(x) * (np.arange(size) < real).reshape(-1, *[1] * (np.ndim(x) - 1))

    return jax.tree_util.tree_map_with_path(weigh, part)


def of_scores(
    scores_fn: ScoresFn, objective: ScoresObjective, held_out: Any, size: int, mesh: Mesh
) -> Evaluate | None:
    """`(state) -> loss and metrics` of an objective that couples held-out rows, scored `size` at a
    time.

    Args:
      scores_fn: `(params, context, batch, key) -> scores`, row by row.
      objective: `(scores, context, batch) -> (loss, metrics)` of all rows.
      held_out: arrays; None where there are none.
      size: rows at a time.
      mesh: where they are evaluated.
    """
    if held_out is None:
        return None
    # The scores of all rows first: such an objective sorts or averages over rows, and is no sum
    # over parts.
    jitted = jax.jit(lambda params, context, part: scores_fn(params, context, part, None))
    of_all_rows = jax.jit(objective)

    def evaluate(state: TrainState) -> dict[str, Any]:
        scores = datasets.in_parts(
            lambda part: jitted(state.params, state.context, part), held_out, size, mesh
        )
        loss, metrics = of_all_rows(scores, state.context, held_out)
        return {"loss": loss, **metrics}

    return evaluate


def of_completions(
    run: RunFolder,
    collector: Collector,
    held_out: PromptSet | None,
    training: TrainingOptions,
    tokenizer: Any,
) -> Evaluate | None:
    """`(state) -> metrics` of completions of held-out prompts, which go to `samples/`; None where
    there are none.
    """
    if held_out is None:
        return None
    # A batch of a step's size, so that sampling needs no second compiled program.
    number = min(len(held_out.rows), training.batch_size)

    def evaluate(state: TrainState) -> dict[str, Any]:
        # The same prompts and the same key every time: evaluations differ by the parameters alone.
        batch = held_out.select(range(number), jax.random.key(training.seed))
        scored = collector.collect(state, batch)
        run.samples(int(state.step), collecting.table(tokenizer, scored))
        metrics = completion_metrics(jax.device_get(scored.rollout))
        # These are for the speed of training steps.
        del metrics["tokens"], metrics["sequences"]
        return {**scored.metrics, **metrics}

    return evaluate

"""Odds ratio preference optimisation: imitates the chosen completion and keeps the odds of the
rejected one below its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import optax

from rlhf import tasks
from rlhf.losses import reference_free
from rlhf.ranges import Length, Strength
from rlhf.shared_prefix import SharedPrefix
from rlhf.train import train_step
from rlhf.training import datasets, evaluation, meshes, model_info, offline
from rlhf.training import pairs as pair_rows
from rlhf.training import reference_free as pair_losses
from rlhf.training.loading import load_policy
from rlhf.training.loop import fit
from rlhf.training.model_info import load_seq2seq, load_tokenizer
from rlhf.training.optimizers import make_optimizer
from rlhf.training.options import (
    Callbacks,
    DatasetOptions,
    MeshOptions,
    ModelOptions,
    TrainingOptions,
)
from rlhf.training.policy import Policy
from rlhf.training.recipe import recipe
from rlhf.training.runs import RunFolder
from rlhf.training.trained import Trained, result
from rlhf.typing import StepFn


def make_update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    beta: float = 0.1,
    max_segments: int = 1,
    shared: SharedPrefix | None = None,
    micro_batches: int = 1,
) -> StepFn:
    """ORPO: `NLL of prompt and chosen completion - beta log σ(log odds ratio)`  (arXiv:2403.07691).

    The default beta is TRL 1.16's, and the paper's of its Mistral models.

    Args:
      policy: what is trained.
      optimizer: any optax transformation.
      beta: weight of the odds, the paper's λ.
      max_segments: the most sequences of a packed row.
      shared: what the two completions of a pair have in common, read once.
      micro_batches: parts of a step, taken one after the other; the result is the same.

    Returns: `update(state, pairs) -> (state, metrics)`, pure.  The pairs need no weights.
    """
    loss_fn = make_loss(policy, beta=beta, max_segments=max_segments, shared=shared)
    step = train_step(loss_fn, optimizer, micro_batches=micro_batches)

    def update(state, pairs):
        # Weights are of the whole mini-batch: made before the step cuts it into micro-batches.
        return step(state, with_weights(pairs, max_segments=max_segments))

    return update


def make_loss(
    policy: Policy, *, beta: float = 0.1, max_segments: int = 1, shared: SharedPrefix | None = None
) -> Callable:
    """The `loss_fn` of pairs that `with_weights` made."""
    return pair_losses.make_loss(
        policy,
        loss=partial(reference_free.orpo, beta=beta),
        prompts_too=True,
        max_segments=max_segments,
        shared=shared,
    )


# The prompt is imitated with its completion, as TRL has it.
with_weights = partial(pair_losses.with_weights, prompts_too=True)


@recipe
def main(
    model: ModelOptions,
    dataset: DatasetOptions,
    *,
    training: TrainingOptions = TrainingOptions(learning_rate=1e-6),
    mesh: MeshOptions,
    output: str,
    beta: Strength = 0.1,
    max_length: Length = 1024,
    packing: Literal["none", "bfd"] = "none",
    resume: bool = False,
    callbacks: Callbacks = (),
) -> Trained:
    """Preference pairs and imitation in one, without a reference: ORPO.

    Rows have `prompt`, `chosen` and `rejected`, or `chosen` and `rejected` that both begin with the
    prompt.  The prompt with its chosen completion is imitated.  The learning rate is TRL 1.16's.

    Args:
      output: a new folder for the run.
      beta: weight of the odds beside the negative log-likelihood, the paper's lambda.
      max_length: tokens of a prompt with its completion; longer ones are cut.
      packing: several pairs in a row: bfd (best fit).
      resume: go on with the run in the folder.
      callbacks: `(step, metrics)` functions, called with every line of the log.
    """
    # 1. Everything that can be wrong is found before the model loads.
    run = RunFolder(output, options=locals())
    pair_rows.check(partial(reference_free.orpo, beta=beta), references=0)
    devices = meshes.make(mesh, rows=training.batch_size, micro_batches=training.micro_batches)
    tokenizer = load_tokenizer(model)
    seq2seq = load_seq2seq(model, tokenizer)

    def to_arrays(rows):
        return pair_rows.lay_out(tokenizer, rows, packing, max_length, run.say, seq2seq=seq2seq)

    train, held_out = datasets.load_arrays(dataset, tasks.preferences, to_arrays)
    total = training.total_steps(len(train.tokens), has_held_out=held_out is not None)
    model_info.check_tokens(model, tokenizer, train, held_out)

    # 2. The model and its optimizer state, born sharded.
    loaded = load_policy(model, training.seed, devices, say=run.say)
    optimizer = make_optimizer(training, total)
    state = loaded.init_state(optimizer, training.seed)

    # 3. The step, and the evaluation of the same loss.
    max_segments = pair_rows.segments(train, held_out)
    shared = pair_rows.shared_prefix(train, held_out)
    options: dict[str, Any] = {"beta": beta, "max_segments": max_segments, "shared": shared}
    update = make_update(loaded.policy, optimizer, micro_batches=training.micro_batches, **options)
    weighted = held_out and with_weights(held_out, max_segments=max_segments)
    evaluate = evaluation.of_loss(
        make_loss(loaded.policy, **options), weighted, training.batch_size, devices
    )

    # 4. The shared loop: metrics, evaluations, checkpoints, export.
    state = fit(
        run,
        training,
        state,
        offline.make_step(update, devices, state),
        datasets.batches(train, training, devices),
        total=total,
        callbacks=callbacks,
        shown=("loss", "nll", "rewards/accuracies"),
        evaluate=evaluate,
        export=partial(loaded.export, run.path, tokenizer),
        mesh=devices,
    )
    return result(run, model, loaded, tokenizer, state)

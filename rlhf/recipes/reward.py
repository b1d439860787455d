"""Reward modelling: Bradley–Terry on preference pairs, a head on the hidden state of the last
token.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import optax

from rlhf import losses, rollouts, tasks
from rlhf.lm import LM, Head
from rlhf.ranges import Coefficient, Length
from rlhf.rollouts import Batch, Rollout
from rlhf.shared_prefix import SharedPrefix
from rlhf.train import train_step
from rlhf.training import datasets, evaluation, meshes, model_info, offline
from rlhf.training import pairs as pair_rows
from rlhf.training.loading import load_classifier
from rlhf.training.loop import fit
from rlhf.training.model_info import load_tokenizer
from rlhf.training.optimizers import make_optimizer
from rlhf.training.options import (
    Callbacks,
    DatasetOptions,
    MeshOptions,
    ModelOptions,
    TrainingOptions,
)
from rlhf.training.policy import Policy
from rlhf.training.preference import with_weights
from rlhf.training.recipe import recipe
from rlhf.training.runs import RunFolder
from rlhf.training.trained import Trained, result
from rlhf.typing import StepFn


def scores(
    lm: LM,
    head: Head,
    params,
    batch: Batch | Rollout,
    *,
    max_segments: int = 1,
    shared: SharedPrefix | None = None,
):
    """The reward of every sequence, `[B * max_segments]`; `params` is `{"lm": …, "head": …}`."""
    # An encoder reads both ways: what follows a prompt changes its states, which cannot be shared.
    return rollouts.classify(
        lm,
        head,
        params,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        inputs=batch.inputs,
        shared=shared if head.reads == "last" else None,
        max_segments=max_segments,
    )


def make_loss(
    policy: Policy,
    *,
    center_coef: float = 0.0,
    max_segments: int = 1,
    shared: SharedPrefix | None = None,
) -> Callable:
    """The `loss_fn` of pairs with weights:
    `-log σ(r_chosen - r_rejected) + center_coef (r_chosen + r_rejected)²`.

    Args:
      policy: with a head; `params` is `{"lm": …, "head": …}`.
      center_coef: pulls the two rewards of a pair towards a sum of 0.
      max_segments: the most sequences of a packed row.
      shared: what the two completions of a pair have in common, read once.
    """

    def loss_fn(params, context, pairs, key):
        full = policy.full_params(params, context, key)
        rows = rollouts.pair_rows(pairs)
        rewards = scores(
            policy.lm, policy.head, full, rows, max_segments=max_segments, shared=shared
        )
        # Rows of a pair lie side by side, so that its two rewards are neighbours: `[R, N, 2]`.
        rewards = rewards.reshape(*pairs.weights.shape, 2)
        chosen = rewards[..., 0]
        rejected = rewards[..., 1]
        per_pair = losses.bradley_terry(chosen, rejected, center_coef=center_coef)
        metrics = {
            "accuracy": losses.weighted_sum(chosen > rejected, pairs.weights),
            "margin": losses.weighted_sum(chosen - rejected, pairs.weights),
            "mean_reward": losses.weighted_sum((chosen + rejected) / 2, pairs.weights),
        }
        return losses.weighted_sum(per_pair, pairs.weights), metrics

    return loss_fn


def make_update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    center_coef: float = 0.0,
    max_segments: int = 1,
    shared: SharedPrefix | None = None,
    micro_batches: int = 1,
) -> StepFn:
    """Reward modelling on preference pairs  (Bradley and Terry; arXiv:2203.02155, eq. 1).

    The default center_coef is TRL 1.16's, which has no such term unless it is given.

    Args:
      policy: with a head.
      optimizer: any optax transformation.
      center_coef: pulls the two rewards of a pair towards a sum of 0.
      max_segments: the most sequences of a packed row.
      shared: what the two completions of a pair have in common, read once.
      micro_batches: parts of a step, taken one after the other; the result is the same.

    Returns: `update(state, pairs) -> (state, metrics)`, pure.  The pairs need no weights.
    """
    loss_fn = make_loss(policy, center_coef=center_coef, max_segments=max_segments, shared=shared)
    step = train_step(loss_fn, optimizer, micro_batches=micro_batches)

    def update(state, pairs):
        # Weights are of the whole mini-batch: made before the step cuts it into micro-batches.
        return step(state, with_weights(pairs, max_segments=max_segments))

    return update


@recipe
def main(
    model: ModelOptions,
    dataset: DatasetOptions,
    *,
    training: TrainingOptions = TrainingOptions(learning_rate=1e-4),
    mesh: MeshOptions,
    output: str,
    max_length: Length = 1024,
    packing: Literal["none", "bfd"] = "none",
    center_coef: Coefficient = 0.0,
    resume: bool = False,
    callbacks: Callbacks = (),
) -> Trained:
    """Reward modelling: teaches a model to give the better of two completions the higher number
    (Bradley and Terry).

    Rows have `prompt`, `chosen` and `rejected`, or `chosen` and `rejected` that both begin with the
    prompt.  The model is a language model, an encoder (BERT, RoBERTa, DistilBERT), or a reward
    model that is trained further.  The learning rate is TRL 1.16's.

    Args:
      output: a new folder for the run.
      max_length: tokens of a prompt with its completion; longer ones are cut, for an encoder after
        their first token.
      packing: several pairs in a row: bfd (best fit).
      center_coef: pulls the two rewards of a pair towards a sum of 0.
      resume: go on with the run in the folder.
      callbacks: `(step, metrics)` functions, called with every line of the log.
    """
    # 1. Everything that can be wrong is found before the model loads.
    run = RunFolder(output, options=locals())
    devices = meshes.make(mesh, rows=training.batch_size, micro_batches=training.micro_batches)
    tokenizer = load_tokenizer(model)
    encoder_length = model_info.encoder_length(model, max_length)

    def to_arrays(rows):
        if encoder_length is not None:
            return pair_rows.lay_out_encoder_pairs(
                tokenizer, rows, packing, encoder_length, run.say
            )
        # Completions are only read: a template without an end token is no mistake here.
        return pair_rows.lay_out(tokenizer, rows, packing, max_length, run.say, imitated=False)

    train, held_out = datasets.load_arrays(dataset, tasks.preferences, to_arrays)
    total = training.total_steps(len(train.tokens), has_held_out=held_out is not None)
    model_info.check_tokens(model, tokenizer, train, held_out)

    # 2. The model with its head, and its optimizer state, born sharded.
    loaded = load_classifier(model, training.seed, devices, say=run.say)
    optimizer = make_optimizer(training, total)
    state = loaded.init_state(optimizer, training.seed)

    # 3. The step, and the evaluation of the same loss.
    max_segments = pair_rows.segments(train, held_out)
    shared = pair_rows.shared_prefix(train, held_out)
    options: dict[str, Any] = {
        "center_coef": center_coef,
        "max_segments": max_segments,
        "shared": shared,
    }
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
        shown=("loss", "accuracy"),
        evaluate=evaluate,
        export=partial(loaded.export, run.path, tokenizer),
        mesh=devices,
    )
    return result(run, model, loaded, tokenizer, state)

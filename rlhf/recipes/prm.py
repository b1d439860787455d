"""Process reward modelling: the cross-entropy of right and wrong at the end of every step, on a
two-class head.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import optax

from rlhf import data, losses, rollouts, tasks
from rlhf.data.types import Row
from rlhf.fields import documented
from rlhf.ranges import Length
from rlhf.rollouts.types import Array
from rlhf.train import train_step
from rlhf.training import datasets, evaluation, meshes, model_info, offline
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
from rlhf.training.recipe import recipe
from rlhf.training.runs import RunFolder
from rlhf.training.trained import Trained, result
from rlhf.typing import StepFn


@documented
class Solutions(NamedTuple):
    """Completions in steps, with a label where a step ends.

    Attributes:
      tokens: [B, T] int32.
      mask: [B, T] bool, True on the last token of every step.
      positions: [B, T] int32.
      segment_ids: [B, T] int32, 0 = padding.
      labels: [B, T] int32, there 1 for a right step, 0 for a wrong one.
      weights: [B, T] float32, of the whole optimizer mini-batch.
    """

    tokens: Array
    mask: Array
    positions: Array
    segment_ids: Array
    labels: Array
    weights: Array | None = None


def with_weights(batch: Solutions, *, last_step_only: bool = False) -> Solutions:
    """An optimizer mini-batch with its weights: every step counts the same, or of each solution the
    last alone.
    """
    mask = batch.mask
    if last_step_only:
        # The last step's label alone makes an outcome reward model.
        mask = losses.segments.last_trained(batch.mask, batch.segment_ids)
    return batch._replace(mask=mask, weights=losses.weights.token_mean(mask, batch.segment_ids))


def make_loss(policy: Policy) -> Callable:
    """The `loss_fn` of `Solutions` with weights: the cross-entropy of the labels
    (arXiv:2211.14275).

    Args:
      policy: with a head of two classes that reads every token.
    """

    def loss_fn(params, context, batch, key):
        full = policy.full_params(params, context, key)
        logits = rollouts.classify(
            policy.lm,
            policy.head,
            full,
            batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
        )
        per_step = losses.reward_model.process_reward(logits, batch.labels, batch.mask)
        is_right = losses.logits.is_top1(logits, batch.labels)
        metrics = {
            "accuracy": losses.weighted_sum(is_right, batch.weights),
            # The share of right steps in the data: the accuracy of always saying right.
            "right": losses.weighted_sum(batch.labels, batch.weights),
        }
        return losses.weighted_sum(per_step, batch.weights), metrics

    return loss_fn


def make_update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    last_step_only: bool = False,
    micro_batches: int = 1,
) -> StepFn:
    """Process reward modelling: a verdict after every step of a solution.

    The default is that of TRL 1.13, the last with this trainer.

    Args:
      policy: with a head of two classes that reads every token.
      optimizer: any optax transformation.
      last_step_only: train on the last step of each solution alone.
      micro_batches: parts of a step, taken one after the other; the result is the same.

    Returns: `update(state, batch) -> (state, metrics)`, pure.  The batch needs no weights.
    """
    step = train_step(make_loss(policy), optimizer, micro_batches=micro_batches)

    def update(state, batch):
        # Weights are of the whole mini-batch: made before the step cuts it into micro-batches.
        return step(state, with_weights(batch, last_step_only=last_step_only))

    return update


def lay_out(
    tokenizer, rows: list[Row], separator: str, packing: str, length: int, say: Callable
) -> Solutions:
    """Stepwise rows as arrays; what is cut or left out is said."""
    fitting = datasets.truncated(
        data.tokenize_steps(tokenizer, rows, separator=separator), length=length, say=say
    )
    steps = fitting.sides[0]
    arranged = partial(data.best_fit, length=length) if packing == "bfd" else data.batch
    # Labels go through the same packing in the place of tokens, and so lie where their tokens do.
    labels = arranged([step._replace(tokens=step.labels) for step in steps]).tokens
    arrays = arranged(steps)
    return Solutions(
        tokens=arrays.tokens,
        mask=arrays.mask,
        positions=arrays.positions,
        segment_ids=arrays.segment_ids,
        labels=labels,
    )


@recipe
def main(
    model: ModelOptions,
    dataset: DatasetOptions,
    *,
    training: TrainingOptions,
    mesh: MeshOptions,
    output: str,
    step_separator: str | None = None,
    last_step_only: bool = False,
    max_length: Length = 1024,
    packing: Literal["none", "bfd"] = "none",
    resume: bool = False,
    callbacks: Callbacks = (),
) -> Trained:
    """Process reward modelling: teaches a model to tell, after every step of a completion, whether
    it was right.

    Rows have `prompt`, `completions` and `labels`: a list of steps, and a list of true and false,
    one a step.  The learning rate is TRL 1.13's, the last with this trainer.

    Args:
      output: a new folder for the run.
      step_separator: ends a step, and the model scores it at its last token; null: a new line, for
        a generated task its own.
      last_step_only: train on the last step of each completion alone.
      max_length: tokens of a prompt with its completion; longer ones are cut.
      packing: several completions in a row: bfd (best fit).
      resume: go on with the run in the folder.
      callbacks: `(step, metrics)` functions, called with every line of the log.
    """
    # 1. Everything that can be wrong is found before the model loads.
    run = RunFolder(output, options=locals())
    devices = meshes.make(mesh, rows=training.batch_size, micro_batches=training.micro_batches)
    tokenizer = load_tokenizer(model)
    # An encoder has learned positions, and reads no more tokens than those.
    length = model_info.encoder_length(model, max_length) or max_length
    if step_separator is None:
        # A generated task knows where its steps end.
        step_separator = tasks.find(dataset.task).step_separator if dataset.task else "\n"

    def to_arrays(rows):
        return lay_out(tokenizer, rows, step_separator, packing, length, run.say)

    train, held_out = datasets.load_arrays(dataset, tasks.stepwise, to_arrays)
    total = training.total_steps(len(train.tokens), has_held_out=held_out is not None)
    model_info.check_tokens(model, tokenizer, train, held_out)

    # 2. The model with its head, and its optimizer state, born sharded.
    loaded = load_classifier(model, training.seed, devices, labels=2, of_tokens=True, say=run.say)
    optimizer = make_optimizer(training, total)
    state = loaded.init_state(optimizer, training.seed)

    # 3. The step, and the evaluation of the same loss.
    update = make_update(
        loaded.policy,
        optimizer,
        last_step_only=last_step_only,
        micro_batches=training.micro_batches,
    )
    weighted = held_out and with_weights(held_out, last_step_only=last_step_only)
    evaluate = evaluation.of_loss(make_loss(loaded.policy), weighted, training.batch_size, devices)

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

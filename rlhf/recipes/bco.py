"""Binary classifier optimisation: is a completion good?  The reward says, measured from the mean of
all rewards so far.
"""

from collections.abc import Callable
from functools import partial

import optax

from rlhf import losses, tasks
from rlhf.losses import moments
from rlhf.losses.moments import MomentsState
from rlhf.ranges import Length, Strength
from rlhf.train import coupled_train_step
from rlhf.training import datasets, evaluation, meshes, model_info, offline, unpaired
from rlhf.training.loading import load_policy
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


def objective(*, beta: float = 0.1, moving: bool = True) -> Callable:
    """The `objective` of `rlhf.coupled_train_step` on `unpaired.scores` of the whole mini-batch.

    `context["rewards"]` holds the moments of all rewards so far; `moving` ones count those of the
    mini-batch first.
    """

    def classify(scores, context, rows):
        # K = 1: column 0 is a row's own completion; BCO has no others.
        logprobs = scores[:, 0]
        ref_logprobs = rows.ref_logprobs[:, 0]
        rewards = beta * (logprobs - ref_logprobs)
        # In training the mini-batch's rewards move the mean before it is used; an evaluation leaves
        # the state as it is.
        running = (
            moments.running().update(context["rewards"], rewards) if moving else context["rewards"]
        )
        per_row = losses.unpaired.bco(
            logprobs, ref_logprobs, rows.desirable, running.mean, beta=beta
        )
        metrics = {
            "delta": running.mean,
            "rewards_count": running.number,
            "rewards_variance": running.variance,
        }
        return per_row.mean(), metrics | unpaired.reward_metrics(rewards, rows.desirable)

    return classify


def move(context, params, metrics):
    """The `update_context` that keeps the moments of the rewards."""
    # The new moments travel as metrics: of an objective nothing else leaves the step, and a skipped
    # step keeps the old context.
    running = MomentsState(metrics["rewards_count"], metrics["delta"], metrics["rewards_variance"])
    return context | {"rewards": running}


def initial_context() -> dict[str, MomentsState]:
    """What `make_update` keeps in the state's context: the moments of all rewards."""
    return {"rewards": moments.running().init()}


def make_update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    beta: float = 0.1,
    micro_batches: int = 1,
) -> StepFn:
    """BCO: a classifier of good and bad completions, the reward from the mean of all rewards so far
    (arXiv:2404.04656).

    The default beta is that of TRL 1.13, the last with this trainer.

    Args:
      policy: what is trained; `initial_context()` is in the state's context.
      optimizer: any optax transformation.
      beta: strength of the pull towards the reference, per nat.
      micro_batches: parts of a step, taken one after the other; the result is the same.

    Returns: `update(state, batch) -> (state, metrics)`, pure; the batch has the reference's
    log-probs.
    """
    return coupled_train_step(
        unpaired.make_scores(policy),
        objective(beta=beta),
        optimizer,
        micro_batches=micro_batches,
        update_context=move,
    )


@recipe
def main(
    model: ModelOptions,
    dataset: DatasetOptions,
    *,
    training: TrainingOptions = TrainingOptions(learning_rate=5e-7),
    mesh: MeshOptions,
    output: str,
    beta: Strength = 0.1,
    max_length: Length = 1024,
    resume: bool = False,
    callbacks: Callbacks = (),
) -> Trained:
    """Completions with a label, good or bad, told apart by a classifier that is the policy itself:
    BCO.

    Rows have `prompt`, `completion` and `label`; preference rows are taken apart.  The learning
    rate is TRL 1.13's, the last with this trainer.

    Args:
      output: a new folder for the run.
      beta: strength of the pull towards the reference, per nat.
      max_length: tokens of a prompt with its completion; longer ones are cut.
      resume: go on with the run in the folder.
      callbacks: `(step, metrics)` functions, called with every line of the log.
    """
    # 1. Everything that can be wrong is found before the model loads.
    run = RunFolder(output, options=locals())
    model_info.check_decoder(model)
    # Traced on shapes, with the context that the objective reads.
    unpaired.check(objective(beta=beta), initial_context())
    devices = meshes.make(mesh, rows=training.batch_size, micro_batches=training.micro_batches)
    tokenizer = load_tokenizer(model)

    def to_arrays(rows):
        return unpaired.lay_out(tokenizer, rows, max_length, run.say)

    train, held_out = datasets.load_arrays(dataset, tasks.unpaired, to_arrays)
    total = training.total_steps(len(train.tokens), has_held_out=held_out is not None)
    model_info.check_tokens(model, tokenizer, train, held_out)

    # 2. The model and its optimizer state, born sharded.
    loaded = load_policy(model, training.seed, devices, say=run.say)
    # The reference stays: its log-probs are computed once, before the first step.
    train = unpaired.with_reference(loaded, train, training.batch_size)
    held_out = held_out and unpaired.with_reference(loaded, held_out, training.batch_size)
    optimizer = make_optimizer(training, total)
    state = loaded.init_state(optimizer, training.seed, {**loaded.context(), **initial_context()})

    # 3. The step, and the evaluation of the same loss.
    update = make_update(loaded.policy, optimizer, beta=beta, micro_batches=training.micro_batches)
    scores_fn = unpaired.make_scores(loaded.policy)
    compare = objective(beta=beta, moving=False)
    evaluate = evaluation.of_scores(scores_fn, compare, held_out, training.batch_size, devices)

    # 4. The shared loop: metrics, evaluations, checkpoints, export.
    state = fit(
        run,
        training,
        state,
        offline.make_step(update, devices, state),
        datasets.batches(train, training, devices),
        total=total,
        callbacks=callbacks,
        shown=("loss", "rewards/margins", "delta"),
        evaluate=evaluate,
        export=partial(loaded.export, run.path, tokenizer),
        mesh=devices,
    )
    return result(run, model, loaded, tokenizer, state)

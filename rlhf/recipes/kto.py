"""Kahneman–Tversky optimisation: completions with a label, each held against how far the policy is
from the reference.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import optax

from rlhf import losses, tasks
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


def objective(
    *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Callable:
    """The `objective` of `rlhf.coupled_train_step` on `unpaired.scores` of the whole mini-batch.

    The KL is that of the completions of other rows; without them, K = 1, it is 0, which is
    APO-zero.
    """
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}

    def compare(scores, context, rows):
        # Column 0 is a row's own completion, column 1 its prompt with that of another row: texts
        # that nobody chose say how far the policy has moved in general.
        kl = losses.unpaired.kto_kl(scores[:, 1:], rows.ref_logprobs[:, 1:])
        logprobs = scores[:, 0]
        ref_logprobs = rows.ref_logprobs[:, 0]
        per_row = losses.unpaired.kto(
            logprobs, ref_logprobs, rows.desirable, kl, beta=beta, **weights
        )
        rewards = beta * (logprobs - ref_logprobs)
        return per_row.mean(), {"kl": kl, **unpaired.reward_metrics(rewards, rows.desirable)}

    return compare


def make_update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    micro_batches: int = 1,
) -> StepFn:
    """KTO: each completion against how far the policy is from the reference, on average
    (arXiv:2402.01306).

    Defaults are TRL 1.16's.

    Args:
      policy: what is trained.
      optimizer: any optax transformation.
      beta: strength of the pull towards the reference, per nat.
      desirable_weight: of rows labelled true.
      undesirable_weight: of rows labelled false.
      micro_batches: parts of a step, taken one after the other; the result is the same.

    Returns: `update(state, batch) -> (state, metrics)`, pure; the batch has the reference's
    log-probs, and for the KL of KTO each prompt with another's completion, K = 2.
    """
    compare = objective(
        beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
    # The KL is a mean over the mini-batch, so that the loss is no sum over micro-batches.
    return coupled_train_step(
        unpaired.make_scores(policy), compare, optimizer, micro_batches=micro_batches
    )


def advice(desirable, desirable_weight: float, undesirable_weight: float) -> str | None:
    """What to tell of weights under which one label counts much more than the other: the first
    should count 1 to 4/3.
    """
    number = int(desirable.sum())
    others = int((~desirable).sum())
    if not number or not others:
        return f"all {number + others} rows are {'desirable' if number else 'undesirable'}; KTO learns from both"
    # The paper's rule: both sides weigh about the same  (arXiv:2402.01306).
    ratio = number * desirable_weight / (others * undesirable_weight)
    # Rounded: 4/3 itself, and what is near a bound, is no reason for a message.
    if 1.0 <= round(ratio, 1) <= 1.3:
        return None
    best = others * undesirable_weight / number
    return (
        f"{number} desirable rows weigh {ratio:.2f} times the {others} undesirable ones, and 1 to "
        "1.33 is best: "
        f"--desirable_weight {best:.3g} to {best * 4 / 3:.3g}"
    )


@recipe
def main(
    model: ModelOptions,
    dataset: DatasetOptions,
    *,
    training: TrainingOptions = TrainingOptions(learning_rate=1e-6),
    mesh: MeshOptions,
    output: str,
    loss: Literal["kto", "apo_zero"] = "kto",
    beta: Strength = 0.1,
    desirable_weight: Strength = 1.0,
    undesirable_weight: Strength = 1.0,
    max_length: Length = 1024,
    resume: bool = False,
    callbacks: Callbacks = (),
) -> Trained:
    """Completions with a label, good or bad, without pairs: KTO, and APO-zero.

    Rows have `prompt`, `completion` and `label`; preference rows are taken apart.  The learning
    rate is TRL 1.16's.

    Args:
      output: a new folder for the run.
      loss: kto, or apo_zero, which measures no KL.
      beta: strength of the pull towards the reference, per nat.
      desirable_weight: of rows labelled true.
      undesirable_weight: of rows labelled false.
      max_length: tokens of a prompt with its completion; longer ones are cut.
      resume: go on with the run in the folder.
      callbacks: `(step, metrics)` functions, called with every line of the log.
    """
    # 1. Everything that can be wrong is found before the model loads.
    run = RunFolder(output, options=locals())
    model_info.check_decoder(model)
    options = {
        "beta": beta,
        "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
    }
    unpaired.check(objective(**options))
    devices = meshes.make(mesh, rows=training.batch_size, micro_batches=training.micro_batches)
    tokenizer = load_tokenizer(model)

    def to_arrays(rows):
        return unpaired.lay_out(tokenizer, rows, max_length, run.say, mismatched=loss == "kto")

    train, held_out = datasets.load_arrays(dataset, tasks.unpaired, to_arrays)
    total = training.total_steps(len(train.tokens), has_held_out=held_out is not None)
    model_info.check_tokens(model, tokenizer, train, held_out)
    if warning := advice(train.desirable, desirable_weight, undesirable_weight):
        run.say(warning)

    # 2. The model and its optimizer state, born sharded.
    loaded = load_policy(model, training.seed, devices, say=run.say)
    # The reference stays: its log-probs are computed once, before the first step.
    train = unpaired.with_reference(loaded, train, training.batch_size)
    held_out = held_out and unpaired.with_reference(loaded, held_out, training.batch_size)
    optimizer = make_optimizer(training, total)
    state = loaded.init_state(optimizer, training.seed)

    # 3. The step, and the evaluation of the same loss.
    update = make_update(loaded.policy, optimizer, micro_batches=training.micro_batches, **options)
    scores_fn = unpaired.make_scores(loaded.policy)
    evaluate = evaluation.of_scores(
        scores_fn, objective(**options), held_out, training.batch_size, devices
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
        shown=("loss", "rewards/margins", "kl"),
        evaluate=evaluate,
        export=partial(loaded.export, run.path, tokenizer),
        mesh=devices,
    )
    return result(run, model, loaded, tokenizer, state)

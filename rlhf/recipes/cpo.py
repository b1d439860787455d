"""Preference pairs without a reference: CPO, SimPO, AlphaPO and TPO, beside the likelihood of the
better completion.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import optax

from rlhf import tasks
from rlhf.losses import preference, reference_free
from rlhf.ranges import Coefficient, Length, Share, Strength, between
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

LOSSES = {
    "sigmoid": reference_free.cpo,
    "hinge": pair_rows.without_reference(preference.hinge),
    "ipo": pair_rows.without_reference(preference.ipo),
    "simpo": reference_free.simpo,
    "alphapo": reference_free.alphapo,
    "tpo": reference_free.tpo,
    "tpo_l": reference_free.tpo_l,
}
# Losses on triples: the likelihood beside them is that of a third completion.
TRIPLES = ("tpo", "tpo_l")
# These stand alone: their default nll_coef is 0.
ALONE = ("simpo", "alphapo")


def make_update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    loss: Callable = reference_free.cpo,
    nll_coef: float = 1.0,
    max_segments: int = 1,
    shared: SharedPrefix | None = None,
    micro_batches: int = 1,
) -> StepFn:
    """CPO and its kin: `loss(chosen, rejected) + nll_coef · NLL of the chosen completion`
    (arXiv:2401.08417).

    Defaults are TRL 1.16's, which are the paper's.

    Args:
      policy: what is trained.
      optimizer: any optax transformation.
      loss: of `losses.reference_free`.
      nll_coef: of the negative log-likelihood; of triples it is the third completion's.
      max_segments: the most sequences of a packed row.
      shared: what the completions of a pair have in common, read once.
      micro_batches: parts of a step, taken one after the other; the result is the same.

    Returns: `update(state, pairs) -> (state, metrics)`, pure.  The pairs need no weights.
    """
    loss_fn = pair_losses.make_loss(
        policy, loss=loss, nll_coef=nll_coef, max_segments=max_segments, shared=shared
    )
    step = train_step(loss_fn, optimizer, micro_batches=micro_batches)

    def update(state, pairs):
        # Weights are of the whole mini-batch: made before the step cuts it into micro-batches.
        return step(state, pair_losses.with_weights(pairs, max_segments=max_segments))

    return update


def chosen_loss(name: str, **options) -> Callable:
    """A loss by name with those of its options that are given.

    Raises: ValueError for a loss that is not known, an option that means nothing to it, and one
    that it does not take.
    """
    loss = datasets.named(name, LOSSES, "loss")
    # None: not given, so that each loss keeps its own default.
    given = {option: value for option, value in options.items() if value is not None}
    if useless := [option for option in given if option not in inspect.signature(loss).parameters]:
        raise ValueError(f"{', '.join(useless)} means nothing to {name}; leave it out")
    chosen = partial(loss, **given)
    pair_rows.check(chosen, references=0)
    return chosen


@recipe
def main(
    model: ModelOptions,
    dataset: DatasetOptions,
    *,
    training: TrainingOptions = TrainingOptions(learning_rate=1e-6),
    mesh: MeshOptions,
    output: str,
    loss: str = "sigmoid",
    beta: Strength | None = None,
    gamma: Coefficient | None = None,
    alpha: Annotated[float, between(-100, 100)] | None = None,
    label_smoothing: Share | None = None,
    nll_coef: Coefficient | None = None,
    max_length: Length = 1024,
    packing: Literal["none", "bfd"] = "none",
    resume: bool = False,
    callbacks: Callbacks = (),
) -> Trained:
    """Preference pairs without a reference: CPO, SimPO, AlphaPO, TPO.

    Rows have `prompt`, `chosen` and `rejected`, or `chosen` and `rejected` that both begin with the
    prompt; for tpo and tpo_l also `reference`, the completion to imitate.  Defaults are TRL 1.16's,
    but for simpo and alphapo: beta and nll_coef are those of SimPO's own code, alpha is that of
    AlphaPO's paper.

    Args:
      output: a new folder for the run.
      loss: sigmoid (CPO), hinge, ipo, simpo, alphapo, tpo or tpo_l.
      beta: strength; null: the loss's own, 0.1, for simpo and alphapo 2, for tpo and tpo_l 0.01.
      gamma: the margin that simpo, alphapo and tpo_l want to reach; null: 0.5.
      alpha: shape of alphapo's reward; null: 0.25.
      label_smoothing: the share of pairs thought to be labelled the wrong way round; null: 0.
      nll_coef: of the chosen completion's negative log-likelihood; null: 1, for simpo and alphapo
        0.
      max_length: tokens of a prompt with its completion; longer ones are cut.
      packing: several pairs in a row: bfd (best fit).
      resume: go on with the run in the folder.
      callbacks: `(step, metrics)` functions, called with every line of the log.
    """
    # 1. Everything that can be wrong is found before the model loads.
    run = RunFolder(output, options=locals())
    per_pair = chosen_loss(
        loss, beta=beta, gamma=gamma, alpha=alpha, label_smoothing=label_smoothing
    )
    if loss in TRIPLES and packing != "none":
        raise ValueError(
            f"packing {packing} is of pairs, but {loss} has three completions a prompt; leave it "
            "out"
        )
    columns = (*pair_rows.COLUMNS, "reference") if loss in TRIPLES else pair_rows.COLUMNS
    devices = meshes.make(mesh, rows=training.batch_size, micro_batches=training.micro_batches)
    tokenizer = load_tokenizer(model)
    seq2seq = load_seq2seq(model, tokenizer)

    def to_arrays(rows):
        return pair_rows.lay_out(
            tokenizer, rows, packing, max_length, run.say, columns, seq2seq=seq2seq
        )

    train, held_out = datasets.load_arrays(dataset, tasks.preferences, to_arrays)
    total = training.total_steps(len(train.tokens), has_held_out=held_out is not None)
    model_info.check_tokens(model, tokenizer, train, held_out)

    # 2. The model and its optimizer state, born sharded.
    loaded = load_policy(model, training.seed, devices, say=run.say)
    optimizer = make_optimizer(training, total)
    state = loaded.init_state(optimizer, training.seed)

    # 3. The step, and the evaluation of the same loss.
    default_nll_coef = 0.0 if loss in ALONE else 1.0
    # A static size of the program: the most sequences that any row of either set holds.
    max_segments = pair_rows.segments(train, held_out)
    options: dict[str, Any] = {
        "loss": per_pair,
        "nll_coef": default_nll_coef if nll_coef is None else nll_coef,
        "max_segments": max_segments,
        "shared": pair_rows.shared_prefix(train, held_out),
    }
    update = make_update(loaded.policy, optimizer, micro_batches=training.micro_batches, **options)
    weighted = held_out and pair_losses.with_weights(held_out, max_segments=max_segments)
    loss_fn = pair_losses.make_loss(loaded.policy, **options)
    evaluate = evaluation.of_loss(loss_fn, weighted, training.batch_size, devices)

    # 4. The shared loop: metrics, evaluations, checkpoints, export.
    state = fit(
        run,
        training,
        state,
        offline.make_step(update, devices, state),
        datasets.batches(train, training, devices),
        total=total,
        callbacks=callbacks,
        shown=("loss", "rewards/accuracies", "rewards/margins"),
        evaluate=evaluate,
        export=partial(loaded.export, run.path, tokenizer),
        mesh=devices,
    )
    return result(run, model, loaded, tokenizer, state)

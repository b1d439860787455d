"""Direct preference optimisation on pairs, with the reference's log-probs computed once."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import jax
import optax

from rlhf import tasks
from rlhf.losses import preference
from rlhf.ranges import Coefficient, Every, Length, Share, Strength, at_least, between
from rlhf.rollouts import Pairs
from rlhf.shared_prefix import SharedPrefix
from rlhf.train import coupled_train_step, train_step
from rlhf.training import datasets, evaluation, loading, meshes, model_info, offline
from rlhf.training import pairs as pair_rows
from rlhf.training import preference as pair_losses
from rlhf.training.loading import Loaded, load_policy
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
    loss: Callable = preference.sigmoid,
    beta: float = 0.1,
    couples_rows: bool = False,
    reference_in_step: bool = False,
    max_segments: int = 1,
    shared: SharedPrefix | None = None,
    micro_batches: int = 1,
) -> StepFn:
    """DPO: `-log σ(β (log π/π_ref of chosen - log π/π_ref of rejected))`, or another loss on pairs
    (arXiv:2305.18290).

    Defaults are TRL 1.16's; beta is the paper's too.

    Args:
      policy: what is trained.
      optimizer: any optax transformation.
      loss: of `losses.preference`.
      beta: strength of the pull towards the reference, per nat.
      couples_rows: whether the loss of a pair depends on others, as that of `preference.aot`, which
        sorts them.
      reference_in_step: log-probs of the reference are computed in every step, by that in the
        state's context; else the pairs have them, of `pair_losses.with_reference`.
      max_segments: the most sequences of a packed row.
      shared: what the two completions of a pair have in common, read once.
      micro_batches: parts of a step, taken one after the other; the result is the same.

    Returns: `update(state, pairs) -> (state, metrics)`, pure: jit, scan, vmap or shard it.

    Raises: ValueError for a loss that couples rows with a reference that moves.
    """
    if couples_rows and reference_in_step:
        raise ValueError(
            "a loss that couples rows takes a reference that stays; leave reference_in_step out"
        )
    # A loss that sorts over the mini-batch is no sum over micro-batches: all log-probs come first,
    # and the gradient flows back through them in a second pass.
    if couples_rows:
        compare = pair_losses.comparison(loss=loss, beta=beta, max_segments=max_segments)
        scores_fn = make_scores(policy, max_segments=max_segments, shared=shared)
        step = coupled_train_step(scores_fn, compare, optimizer, micro_batches=micro_batches)
    else:
        loss_fn = pair_losses.make_loss(
            policy,
            loss=loss,
            beta=beta,
            max_segments=max_segments,
            shared=shared,
            reference_in_step=reference_in_step,
        )
        step = train_step(loss_fn, optimizer, micro_batches=micro_batches)

    def update(state, pairs):
        # Weights are of the whole mini-batch: made before the step cuts it into micro-batches.
        return step(state, pair_losses.with_weights(pairs, max_segments=max_segments))

    return update


def make_scores(
    policy: Policy, *, max_segments: int = 1, shared: SharedPrefix | None = None
) -> Callable:
    """The `scores_fn` of `rlhf.coupled_train_step`: log-probs of whole completions."""

    def scores_fn(params, context, pairs, key):
        full = policy.full_params(params, context, key)
        return pair_losses.sequence_logprobs(
            policy.lm, full, pairs, max_segments=max_segments, shared=shared
        )

    return scores_fn


@recipe
def main(
    model: ModelOptions,
    dataset: DatasetOptions,
    *,
    training: TrainingOptions = TrainingOptions(learning_rate=1e-6),
    mesh: MeshOptions,
    output: str,
    loss: Annotated[list[str], at_least(1)] | None = None,
    loss_weights: Annotated[list[Coefficient], at_least(1)] | None = None,
    beta: Strength = 0.1,
    label_smoothing: Share | None = None,
    max_length: Length = 1024,
    packing: Literal["none", "bfd"] = "none",
    sync_every: Every = 0,
    sync_share: Annotated[float, between(0, 1, above=True)] = 0.6,
    resume: bool = False,
    callbacks: Callbacks = (),
) -> Trained:
    """Preference pairs without sampling: DPO and its kin.

    Rows have `prompt`, `chosen` and `rejected`, or `chosen` and `rejected` that both begin with the
    prompt.  The learning rate is TRL 1.16's.

    Args:
      output: a new folder for the run.
      loss: null for sigmoid, or a list of sigmoid, sigmoid_norm, hinge, ipo, exo, robust, discopop,
        nca, bco_pair, sppo, apo_zero, apo_down, aot, aot_unpaired, sft.
      loss_weights: of each loss in a mixture; null: 1 each.
      beta: strength of the pull towards the reference, per nat.
      label_smoothing: the share of pairs thought to be labelled the wrong way round; null: the
        loss's own.
      max_length: tokens of a prompt with its completion; longer ones are cut.
      packing: several pairs in a row: bfd (best fit).
      sync_every: steps after which the reference moves towards the policy (TR-DPO), and is computed
        in every step; 0: it stays.
      sync_share: how far.
      resume: go on with the run in the folder.
      callbacks: `(step, metrics)` functions, called with every line of the log.
    """
    # 1. Everything that can be wrong is found before the model loads.
    run = RunFolder(output, options=locals())
    names = loss or ["sigmoid"]
    of_losses = {} if label_smoothing is None else {"label_smoothing": label_smoothing}
    mixed = pair_rows.mixture(names, loss_weights or [1.0] * len(names), **of_losses)
    pair_rows.check(mixed, beta=beta)
    hooks = loading.following(model, sync_every, sync_share)
    coupling = [name for name in names if name in pair_rows.COUPLED]
    if coupling and packing != "none":
        raise ValueError(
            f"{coupling[0]} sorts the pairs of a batch, and packed rows have places without a "
            "pair; leave it out"
        )
    if coupling and hooks:
        raise ValueError(f"{coupling[0]} takes a reference that stays; leave out --sync_every")
    devices = meshes.make(mesh, rows=training.batch_size, micro_batches=training.micro_batches)
    tokenizer = load_tokenizer(model)
    seq2seq = load_seq2seq(model, tokenizer)

    def to_arrays(rows):
        return pair_rows.lay_out(tokenizer, rows, packing, max_length, run.say, seq2seq=seq2seq)

    train, held_out = datasets.load_arrays(dataset, tasks.preferences, to_arrays)
    total = training.total_steps(len(train.tokens), has_held_out=held_out is not None)
    model_info.check_tokens(model, tokenizer, train, held_out)
    shape: dict[str, Any] = {
        "max_segments": pair_rows.segments(train, held_out),
        "shared": pair_rows.shared_prefix(train, held_out),
    }

    # 2. The model, its reference and its optimizer state, born sharded.
    loaded = load_policy(model, training.seed, devices, say=run.say)
    policy = loaded.policy
    # A reference that stays scores every row once, before the first step: no second model in memory
    # while training, and a quarter less work a step.
    if not hooks:
        train = with_reference(loaded, train, training.batch_size, **shape)
        held_out = held_out and with_reference(loaded, held_out, training.batch_size, **shape)
    optimizer = make_optimizer(training, total)
    state = loaded.init_state(optimizer, training.seed, loaded.context(with_reference=bool(hooks)))

    # 3. The step, and the evaluation of the same loss.
    options: dict[str, Any] = {
        "loss": mixed,
        "beta": beta,
        "reference_in_step": bool(hooks),
        **shape,
    }
    update = make_update(
        policy,
        optimizer,
        couples_rows=bool(coupling),
        micro_batches=training.micro_batches,
        **options,
    )
    weighted = held_out and pair_losses.with_weights(held_out, max_segments=shape["max_segments"])
    if coupling:
        compare = pair_losses.comparison(loss=mixed, beta=beta, max_segments=shape["max_segments"])
        evaluate = evaluation.of_scores(
            make_scores(policy, **shape), compare, weighted, training.batch_size, devices
        )
    else:
        loss_fn = pair_losses.make_loss(policy, **options)
        evaluate = evaluation.of_loss(loss_fn, weighted, training.batch_size, devices)

    # 4. The shared loop: metrics, evaluations, checkpoints, export.
    state = fit(
        run,
        training,
        state,
        offline.make_step(update, devices, state),
        datasets.batches(train, training, devices),
        total=total,
        # A reference that moves belongs to the checkpoint; one that stays is loaded again.
        fixed=("frozen",) if hooks else ("frozen", "reference"),
        hooks=hooks,
        callbacks=callbacks,
        shown=("loss", "rewards/accuracies", "rewards/margins"),
        evaluate=evaluate,
        export=partial(loaded.export, run.path, tokenizer),
        mesh=devices,
    )
    return result(run, model, loaded, tokenizer, state)


def with_reference(loaded: Loaded, pairs: Pairs, size: int, **shape: Any) -> Pairs:
    """Pairs with sequence log-probs of the model as it is now, `size` rows at a time; `shape` as in
    `make_update`.
    """
    context = loaded.reference_context()
    # The context is an argument: closed over, the parameters would be constants in the program.

    @jax.jit
    def ref_logprobs(context, part):
        return pair_losses.with_reference(loaded.policy, context, part, **shape).ref_logprobs

    found = datasets.in_parts(ref_logprobs, pairs, size, loaded.mesh, context)
    return pairs._replace(ref_logprobs=found)

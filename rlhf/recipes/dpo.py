"""Direct preference optimisation on pairs, with the reference's log-probs computed once."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import jax

from rlhf import losses, rollouts, tasks
from rlhf.lm import LM, SharedPrefix
from rlhf.loop import Training, fit
from rlhf.losses import preference
from rlhf.ranges import Coefficient, Every, Length, Share, Strength, at_least, between, checked
from rlhf.recipes import coupled, reward, setup
from rlhf.recipes import pairs as pairs_of
from rlhf.rollouts import Pairs
from rlhf.runs import RunFolder


def sequence_logprobs(lm: LM, params, pairs: Pairs, *, max_segments: int = 1, shared: SharedPrefix | None = None):
    """`[R, N, 2]`: the sums of completion log-probs, chosen and rejected; `shared` of `pairs.shared_prefix`."""
    rows = rollouts.pair_rows(pairs)
    logprobs = rollouts.score_batch(lm, params, rows, shared=shared).logprobs
    return pairs_of.sums(logprobs, pairs, max_segments=max_segments)


def prepare(lm: LM, ref_params, pairs: Pairs, *, max_segments: int = 1, shared: SharedPrefix | None = None) -> Pairs:
    """The optimizer mini-batch with weights and the reference's sequence log-probs."""
    logprobs = sequence_logprobs(lm, ref_params, pairs, max_segments=max_segments, shared=shared)
    return reward.prepare(pairs, max_segments=max_segments)._replace(ref_logprobs=jax.lax.stop_gradient(logprobs))


def comparison(*, beta: float = 0.1, max_segments: int = 1, loss: Callable = preference.sigmoid) -> Callable:
    """`(sequence log-probs [R, N, 2], context, prepared pairs) -> (loss, metrics)`.

    `loss` is a preference objective; one that takes `chosen_length` and `rejected_length` is given them.  With one that couples
    rows, such as `preference.aot`, this is the `objective` of `rlhf.coupled_train_step`.
    """
    by_length = "chosen_length" in inspect.signature(loss).parameters

    def compare(logprobs, context, pairs):
        sides = lambda x: (x[..., 0].reshape(-1), x[..., 1].reshape(-1))
        (chosen, rejected), (ref_chosen, ref_rejected) = sides(logprobs), sides(pairs.ref_logprobs)
        lengths = sides(pairs_of.lengths(pairs, max_segments=max_segments)) if by_length else ()
        knobs = dict(zip(pairs_of.LENGTHS, lengths, strict=False))
        per_pair = loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta, **knobs)
        margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        mean = lambda values: losses.weighted_sum(values, pairs.weights.reshape(-1))
        return mean(per_pair), {"accuracy": mean(margin > 0), "margin": mean(margin)}

    return compare


def objective(lm: LM, *, max_segments: int = 1, shared: SharedPrefix | None = None, **knobs) -> Callable:
    """The `loss_fn` of prepared `Pairs`; `params` are the policy's, and `knobs` those of `comparison`, row by row."""
    compare = comparison(max_segments=max_segments, **knobs)

    def loss_fn(params, context, pairs, key):
        return compare(sequence_logprobs(lm, params, pairs, max_segments=max_segments, shared=shared), context, pairs)

    return loss_fn


@checked
def main(
    model: setup.Model,
    source: setup.Data,
    training: Training,
    output: str,
    *,
    loss: Annotated[list[str], at_least(1)] | None = None,
    loss_weights: Annotated[list[Coefficient], at_least(1)] | None = None,
    beta: Strength = 0.1,
    label_smoothing: Share | None = None,
    max_length: Length = 1024,
    packing: Literal["none", "bfd"] = "none",
    sync_every: Every = 0,
    sync_share: Annotated[float, between(0, 1, above=True)] = 0.6,
    resume: bool = False,
) -> dict[str, float]:
    """Preference pairs without sampling: DPO and its kin.

    Rows have `prompt`, `chosen` and `rejected`, or `chosen` and `rejected` that both begin with the prompt.

    Args:
      output: a new folder for the run.
      loss: null for sigmoid, or a list of sigmoid, sigmoid_norm, hinge, ipo, exo, robust, discopop, nca, bco_pair, sppo,
        apo_zero, apo_down, aot, aot_unpaired, sft.
      loss_weights: of each loss in a mixture; null: 1 each.
      beta: strength of the pull towards the reference, per nat.
      label_smoothing: the share of pairs thought to be labelled the wrong way round; null: the loss's own.
      max_length: tokens of a prompt with its answer; longer ones are cut.
      packing: several pairs in a row: bfd (best fit).
      sync_every: steps after which the reference moves towards the policy (TR-DPO), and is computed in every step; 0: it stays.
      sync_share: how far.
      resume: go on with the run in the folder.
    """
    run = RunFolder(output, options=locals())
    names = loss or ["sigmoid"]
    knobs = {} if label_smoothing is None else {"label_smoothing": label_smoothing}
    mixed = pairs_of.mixture(names, loss_weights or [1.0] * len(names), **knobs)
    pairs_of.check(mixed, beta=beta)
    coupling = [name for name in names if name in pairs_of.COUPLED]
    if coupling and packing != "none":
        raise ValueError(f"{coupling[0]} sorts the pairs of a batch, and packed rows have places without a pair; leave it out")
    hooks = setup.following(model, sync_every, sync_share)
    if coupling and hooks:
        raise ValueError(f"{coupling[0]} takes a reference that stays; leave out --sync_every")
    tokenizer = model.tokenizer()
    lay_out = partial(pairs_of.lay_out, tokenizer, seq2seq=model.seq2seq(tokenizer))
    train, test = source.laid_out(tasks.preferences, lambda rows: lay_out(rows, packing, max_length, run.say))
    total = training.total_steps(len(train.tokens), judged=test is not None)
    model.check(tokenizer, train, test)
    most, shared = pairs_of.segments(train, test), pairs_of.shared_prefix(train, test)
    policy = setup.policy(model, training.seed)
    scores = lambda params, context, pairs, key: sequence_logprobs(policy.lm, params, pairs, max_segments=most, shared=shared)
    referenced = jax.jit(lambda context, pairs: scores(policy.reference(context), context, pairs, None))

    def with_reference(pairs):  # once for every row, before the first step; one that moves is asked in the step
        if hooks:
            return pairs
        context = policy.context() or {"reference": policy.params}
        logprobs = coupled.in_parts(lambda part: referenced(context, part), pairs, training.batch_size)
        return pairs._replace(ref_logprobs=logprobs)

    train, test = with_reference(train), test and with_reference(test)
    weighted = partial(reward.prepare, max_segments=most)
    held = test and weighted(test)
    if coupling:
        compare = comparison(beta=beta, loss=mixed, max_segments=most)
        scores_fn = policy.of_whole(scores)
        make_step = coupled.step(scores_fn, compare, training, prepare=weighted)
        evaluate = coupled.evaluation(scores_fn, compare, held, training.batch_size)
    else:
        plain = objective(policy.lm, beta=beta, loss=mixed, max_segments=most, shared=shared)

        def compared(params, context, pairs, key):
            moved = pairs._replace(ref_logprobs=referenced(context, pairs)) if hooks else pairs
            return plain(params, context, moved, key)

        loss_fn = policy.of_whole(compared)
        make_step = setup.offline_step(loss_fn, weighted, training)
        evaluate = setup.evaluation(loss_fn, held, training.batch_size)

    _, figures = fit(
        run, training, make_step, policy.params, lambda number, size: setup.take(train, training.seed, number, size),
        total=total, shown=("loss", "accuracy", "margin"), evaluate=evaluate,
        **setup.kept(policy.context(with_reference=bool(hooks)), hooks),
        export=partial(policy.export, run.path, tokenizer),
    )  # fmt: skip
    return figures

"""Preference pairs without a reference: CPO, SimPO, AlphaPO and TPO, beside the likelihood of the better answer."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp

from rlhf import losses, rollouts, tasks
from rlhf.fields import documented
from rlhf.lm import LM, SharedPrefix
from rlhf.loop import Training, fit
from rlhf.losses import preference, reference_free
from rlhf.ranges import Coefficient, Length, Share, Strength, between, checked
from rlhf.recipes import pairs as pairs_of
from rlhf.recipes import setup
from rlhf.rollouts import Batch, Pairs
from rlhf.runs import RunFolder

LOSSES = {
    "sigmoid": reference_free.cpo,
    "hinge": pairs_of.without_reference(preference.hinge),
    "ipo": pairs_of.without_reference(preference.ipo),
    "simpo": reference_free.simpo,
    "alphapo": reference_free.alphapo,
    "tpo": reference_free.tpo,
    "tpo_l": reference_free.tpo_l,
}
TRIPLES = ("tpo", "tpo_l")  # the likelihood beside is that of a third answer
ALONE = ("simpo", "alphapo")  # nothing beside, unless it is asked for


@documented
class Weighted(NamedTuple):
    """The optimizer mini-batch with its weights.

    Attributes:
      pairs: with weights of the pairs.
      nll: [R, N] float32, weights of the imitated completions: each trained token of the mini-batch counts the
        same.
    """

    pairs: Pairs
    nll: Any


def imitated(of_completions):
    """`[R, N, 2]` -> `[R, N]`: what is the chosen completion's; of triples, `[R, 1, 3]`, the third's."""
    return of_completions[..., 2 if of_completions.shape[-1] == 3 else 0]


def prepare(pairs: Pairs, *, whole: bool = False, max_segments: int = 1) -> Weighted:
    """Weights: every pair the same, and every token that is imitated; with `whole` the prompt's too."""
    rows = rollouts.pair_rows(pairs)
    valid = (pairs_of.lengths(pairs, max_segments=max_segments) > 0).all(-1)
    tokens = imitable(rows, whole)
    number = jnp.sum(imitated(pairs_of.sums(tokens.astype(jnp.float32), pairs, tokens, max_segments=max_segments)) * valid)
    return Weighted(pairs._replace(weights=valid / jnp.maximum(valid.sum(), 1)), valid / jnp.maximum(number, 1))


def imitable(rows: Batch, whole: bool):
    """`[B, T]` bool: the tokens of completions; of whole texts those that have a log-prob, all but the first."""
    return (rows.segment_ids != 0) & ~losses.segments.starts(rows.segment_ids) if whole else rows.mask


def objective(
    lm: LM, *, loss: Callable = reference_free.cpo, nll_coef: float = 1.0, whole: bool = False, max_segments: int = 1,
    shared: SharedPrefix | None = None,
) -> Callable:  # fmt: skip
    """The `loss_fn` of a `Weighted` batch: `loss + nll_coef · NLL`; `params` are the policy's.

    `loss` is an objective of `losses.reference_free`.  With `whole`, as for `prepare`, prompts count to the NLL.
    """
    by_length = "chosen_length" in inspect.signature(loss).parameters

    def loss_fn(params, context, batch, key):
        rows = rollouts.pair_rows(batch.pairs)
        tokens = imitable(rows, whole)
        logprobs = rollouts.score_batch(lm, params, rows._replace(mask=tokens), shared=shared).logprobs
        of = partial(pairs_of.sums, logprobs, batch.pairs, max_segments=max_segments)
        lengths = pairs_of.lengths(batch.pairs, max_segments=max_segments)
        of_pair, of_lengths = [(x[..., 0], x[..., 1]) for x in (of(), lengths)]
        per_pair = loss(*of_pair, **(dict(zip(pairs_of.LENGTHS, of_lengths, strict=True)) if by_length else {}))
        chosen, rejected = preference.averages(*of_pair, *of_lengths) if by_length else of_pair
        nll = losses.weighted_sum(0.0 - imitated(of(tokens)), batch.nll)
        metrics = {
            "nll": nll,
            "accuracy": losses.weighted_sum(chosen > rejected, batch.pairs.weights),
            "margin": losses.weighted_sum(chosen - rejected, batch.pairs.weights),
        }
        return losses.weighted_sum(per_pair, batch.pairs.weights) + nll_coef * nll, metrics

    return loss_fn


def chosen_loss(name: str, **knobs) -> Callable:
    """A loss by name with those of its knobs that are given.

    Raises: ValueError for a loss that is not known, a knob that means nothing to it, and one that it does not take.
    """
    loss = setup.named(name, LOSSES, "loss")
    given = {knob: value for knob, value in knobs.items() if value is not None}
    if useless := [knob for knob in given if knob not in inspect.signature(loss).parameters]:
        raise ValueError(f"{', '.join(useless)} means nothing to {name}; leave it out")
    chosen = partial(loss, **given)
    pairs_of.check(chosen, references=0)
    return chosen


@checked
def main(
    model: setup.Model,
    source: setup.Data,
    training: Training,
    output: str,
    *,
    loss: str = "sigmoid",
    beta: Strength | None = None,
    gamma: Coefficient | None = None,
    alpha: Annotated[float, between(-100, 100)] | None = None,
    label_smoothing: Share | None = None,
    nll_coef: Coefficient | None = None,
    max_length: Length = 1024,
    packing: Literal["none", "bfd"] = "none",
    resume: bool = False,
) -> dict[str, float]:
    """Preference pairs without a reference: CPO, SimPO, AlphaPO, TPO.

    Rows have `prompt`, `chosen` and `rejected`, or `chosen` and `rejected` that both begin with the prompt; for tpo and tpo_l
    also `reference`, the answer to imitate.

    Args:
      output: a new folder for the run.
      loss: sigmoid (CPO), hinge, ipo, simpo, alphapo, tpo or tpo_l.
      beta: strength; null: the loss's own, 0.1, for simpo and alphapo 2, for tpo and tpo_l 0.01.
      gamma: the margin that simpo, alphapo and tpo_l want to reach; null: 0.5.
      alpha: shape of alphapo's reward; null: 0.25.
      label_smoothing: the share of pairs thought to be labelled the wrong way round; null: 0.
      nll_coef: of the better answer's negative log-likelihood; null: 1, for simpo and alphapo 0.
      max_length: tokens of a prompt with its answer; longer ones are cut.
      packing: several pairs in a row: bfd (best fit).
      resume: go on with the run in the folder.
    """
    run = RunFolder(output, options=locals())
    per_pair = chosen_loss(loss, beta=beta, gamma=gamma, alpha=alpha, label_smoothing=label_smoothing)
    if loss in TRIPLES and packing != "none":
        raise ValueError(f"packing {packing} is of pairs, but {loss} has three answers a prompt; leave it out")
    columns = (*pairs_of.COLUMNS, "reference") if loss in TRIPLES else pairs_of.COLUMNS
    tokenizer = model.tokenizer()
    lay_out = partial(pairs_of.lay_out, tokenizer, seq2seq=model.seq2seq(tokenizer))
    train, test = source.laid_out(tasks.preferences, lambda rows: lay_out(rows, packing, max_length, run.say, columns))
    total = training.total_steps(len(train.tokens), judged=test is not None)
    model.check(tokenizer, train, test)
    most, shared = pairs_of.segments(train, test), pairs_of.shared_prefix(train, test)
    policy = setup.policy(model, training.seed)
    amount = nll_coef if nll_coef is not None else 0.0 if loss in ALONE else 1.0
    loss_fn = policy.of_whole(objective(policy.lm, loss=per_pair, nll_coef=amount, max_segments=most, shared=shared))

    _, figures = fit(
        run, training, setup.offline_step(loss_fn, partial(prepare, max_segments=most), training), policy.params,
        lambda number, size: setup.take(train, training.seed, number, size),
        total=total, fixed=policy.context(), shown=("loss", "accuracy", "margin"),
        evaluate=setup.evaluation(loss_fn, test and prepare(test, max_segments=most), training.batch_size),
        export=partial(policy.export, run.path, tokenizer),
    )  # fmt: skip
    return figures

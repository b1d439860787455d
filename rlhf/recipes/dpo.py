"""Direct preference optimisation on pairs, with the reference's log-probs computed once."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import losses, rollouts, tasks
from rlhf.lm import LM
from rlhf.loop import Training, fit
from rlhf.losses import preference
from rlhf.models.huggingface import load_tokenizer
from rlhf.recipes import pairs as pairs_of
from rlhf.recipes import reward, setup
from rlhf.rollouts import Pairs
from rlhf.runs import RunFolder

LENGTHS = ("chosen_length", "rejected_length")


def sequence_logprobs(lm: LM, params, pairs: Pairs, *, max_segments: int = 1):
    """`[R, N, 2]`: the sums of completion log-probs, chosen and rejected."""
    rows = rollouts.pair_rows(pairs)
    logprobs = rollouts.token_logprobs(lm, params, rows.tokens, positions=rows.positions, segment_ids=rows.segment_ids)
    sums = losses.segment_sum(logprobs, rows.mask, rows.segment_ids, max_segments=max_segments)
    return sums.reshape(pairs.tokens.shape[0], -1, 2)


def prepare(lm: LM, ref_params, pairs: Pairs, *, max_segments: int = 1) -> Pairs:
    """The optimizer mini-batch with weights and the reference's sequence log-probs."""
    logprobs = sequence_logprobs(lm, ref_params, pairs, max_segments=max_segments)
    return reward.prepare(pairs, max_segments=max_segments)._replace(ref_logprobs=jax.lax.stop_gradient(logprobs))


def objective(lm: LM, *, beta: float = 0.1, max_segments: int = 1, loss: Callable = preference.sigmoid) -> Callable:
    """The `loss_fn` of prepared `Pairs`; `params` are the policy's.

    `loss` is an elementwise preference objective; one that takes `chosen_length` and `rejected_length` is given them.
    """
    by_length = "chosen_length" in inspect.signature(loss).parameters

    def loss_fn(params, context, pairs, key):
        logprobs = sequence_logprobs(lm, params, pairs, max_segments=max_segments)
        (chosen, rejected), (ref_chosen, ref_rejected) = (jnp.moveaxis(x, -1, 0) for x in (logprobs, pairs.ref_logprobs))
        lengths = dict(zip(LENGTHS, jnp.moveaxis(tokens_trained(pairs, max_segments), -1, 0), strict=True)) if by_length else {}
        per_pair = loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta, **lengths)
        margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        metrics = {
            "accuracy": losses.weighted_sum(margin > 0, pairs.weights),
            "margin": losses.weighted_sum(margin, pairs.weights),
        }
        return losses.weighted_sum(per_pair, pairs.weights), metrics

    return loss_fn


def tokens_trained(pairs: Pairs, max_segments: int):
    """`[R, N, 2]`: the trained tokens of each completion."""
    rows = rollouts.pair_rows(pairs)
    sums = losses.segment_sum(rows.mask.astype(jnp.float32), rows.mask, rows.segment_ids, max_segments=max_segments)
    return sums.reshape(pairs.tokens.shape[0], -1, 2)


def main(
    model: setup.Model, source: setup.Data, training: Training, output: str, *, loss: list[str] | None = None,
    loss_weights: list[float] | None = None, beta: float = 0.1, label_smoothing: float | None = None, max_length: int = 1024,
    packing: Literal["none", "bfd"] = "none", resume: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Preference pairs without sampling: DPO and its kin.

    Rows have `prompt`, `chosen` and `rejected`, or `chosen` and `rejected` that both begin with the prompt.

    Args:
      output: a new folder for the run.
      loss: null for sigmoid, or a list of sigmoid, sigmoid_norm, hinge, ipo, exo, robust, discopop, nca, bco_pair, sppo,
        apo_zero, apo_down, sft.
      loss_weights: of each loss in a mixture; null: 1 each.
      beta: strength of the pull towards the reference, per nat.
      label_smoothing: the share of pairs thought to be labelled the wrong way round; null: the loss's own.
      max_length: tokens of a prompt with its answer; longer ones are cut.
      packing: several pairs in a row: bfd (best fit).
      resume: go on with the run in the folder.
    """
    run = RunFolder(output, options=locals())
    names = loss or ["sigmoid"]
    knobs = {} if label_smoothing is None else {"label_smoothing": label_smoothing}
    mixed = pairs_of.mixture(names, loss_weights or [1.0] * len(names), **knobs)
    tokenizer = load_tokenizer(model.model)
    laid_out = lambda rows: pairs_of.lay_out(tokenizer, rows, packing, max_length, run.say)
    rows, held_out = source.rows(tasks.preferences)
    train, test = laid_out(rows), laid_out(held_out) if held_out else None
    total = training.total_steps(len(train.tokens))
    most = max(pairs_of.segments(pairs) for pairs in (train, test) if pairs is not None)
    policy = setup.policy(model, training.seed)
    loss_fn = policy.of_whole(objective(policy.lm, beta=beta, loss=mixed, max_segments=most))

    @jax.jit
    def referenced(context, pairs):  # once for every row, before the first step
        return prepare(policy.lm, policy.reference(context), pairs, max_segments=most).ref_logprobs

    def with_reference(pairs):
        context = policy.context() or {"reference": policy.params}
        parts = (
            setup.select(pairs, slice(i, i + training.batch_size)) for i in range(0, len(pairs.tokens), training.batch_size)
        )
        return pairs._replace(ref_logprobs=np.concatenate([np.asarray(referenced(context, part)) for part in parts]))

    train, test = with_reference(train), test and with_reference(test)

    state, figures = fit(
        run, training, setup.offline_step(loss_fn, partial(reward.prepare, max_segments=most), training), policy.params,
        lambda number, size: setup.take(train, training.seed, number, size),
        total=total, fixed=policy.context(), shown=("loss", "accuracy", "margin"),
        evaluate=setup.evaluation(loss_fn, test and reward.prepare(test, max_segments=most), training.batch_size),
    )  # fmt: skip
    policy.export(run.path, state, tokenizer)
    return figures

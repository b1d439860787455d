"""Reward modelling: Bradley–Terry on preference pairs, a head on the hidden state of the last token."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax.numpy as jnp

from rlhf import losses, rollouts, tasks
from rlhf.lm import LM, Head, SharedPrefix
from rlhf.loop import Training, fit
from rlhf.ranges import Coefficient, Length, checked
from rlhf.recipes import pairs as pairs_of
from rlhf.recipes import setup
from rlhf.rollouts import Batch, Pairs, Rollout
from rlhf.runs import RunFolder


def prepare(pairs: Pairs, *, max_segments: int = 1) -> Pairs:
    """The optimizer mini-batch with weights: every pair the same, none for a place in a packed row that holds no pair."""
    rows = rollouts.pair_rows(pairs)
    trained = losses.segment_sum(rows.mask, rows.mask, rows.segment_ids, max_segments=max_segments) > 0
    valid = trained.reshape(pairs.tokens.shape[0], -1, 2).all(-1)
    return pairs._replace(weights=valid / jnp.maximum(valid.sum(), 1).astype(jnp.float32))


def scores(lm: LM, head: Head, params, batch: Batch | Rollout, *, max_segments: int = 1, shared: SharedPrefix | None = None):
    """The reward of every sequence, `[B * max_segments]`; `params` is `{"lm": …, "head": …}`."""
    return rollouts.classify(
        lm,
        head,
        params,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        inputs=batch.inputs,
        shared=shared if head.reads == "last" else None,  # in an encoder what follows changes what came before
        max_segments=max_segments,
    )


def objective(
    lm: LM, head: Head, *, center_coef: float = 0.0, max_segments: int = 1, shared: SharedPrefix | None = None
) -> Callable:
    """The `loss_fn` of prepared `Pairs`; `params` is `{"lm": …, "head": …}`."""

    def loss_fn(params, context, pairs, key):
        r = scores(lm, head, params, rollouts.pair_rows(pairs), max_segments=max_segments, shared=shared)
        chosen, rejected = jnp.moveaxis(r.reshape(*pairs.weights.shape, 2), -1, 0)
        per_pair = losses.bradley_terry(chosen, rejected, center_coef=center_coef)
        metrics = {"accuracy": losses.weighted_sum(chosen > rejected, pairs.weights)}
        return losses.weighted_sum(per_pair, pairs.weights), metrics

    return loss_fn


@checked
def main(
    model: setup.Model, source: setup.Data, training: Training, output: str, *, max_length: Length = 1024,
    packing: Literal["none", "bfd"] = "none", center_coef: Coefficient = 0.0, resume: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Reward modelling: teaches a model to give the better of two answers the higher number (Bradley and Terry).

    Rows have `prompt`, `chosen` and `rejected`, or `chosen` and `rejected` that both begin with the prompt.  The model is a
    language model, an encoder (BERT, RoBERTa, DistilBERT), or a reward model that is trained further.

    Args:
      output: a new folder for the run.
      max_length: tokens of a prompt with its answer; longer ones are cut, for an encoder after their first token.
      packing: several pairs in a row: bfd (best fit).
      center_coef: pulls the two rewards of a pair towards a sum of 0.
      resume: go on with the run in the folder.
    """
    run = RunFolder(output, options=locals())
    tokenizer = model.tokenizer()
    read_whole = model.encoder(max_length)

    def lay_out(rows):
        if read_whole is not None:
            return pairs_of.lay_out_whole(tokenizer, rows, packing, read_whole, run.say)
        return pairs_of.lay_out(tokenizer, rows, packing, max_length, run.say, imitated=False)

    train, test = source.laid_out(tasks.preferences, lay_out)
    total = training.total_steps(len(train.tokens), judged=test is not None)
    model.check(tokenizer, train, test)
    most, shared = pairs_of.segments(train, test), pairs_of.shared_prefix(train, test)
    judge, head = setup.reward_model(model, training.seed)
    loss_fn = judge.of_whole(objective(judge.lm, head, center_coef=center_coef, max_segments=most, shared=shared))

    _, figures = fit(
        run, training, setup.offline_step(loss_fn, partial(prepare, max_segments=most), training), judge.params,
        lambda number, size: setup.take(train, training.seed, number, size),
        total=total, fixed=judge.context(), shown=("loss", "accuracy"),
        evaluate=setup.evaluation(loss_fn, test and prepare(test, max_segments=most), training.batch_size),
        export=partial(judge.export, run.path, tokenizer),
    )  # fmt: skip
    return figures

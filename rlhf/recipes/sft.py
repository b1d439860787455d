"""Supervised fine-tuning: the mean cross-entropy of the trained tokens."""

from collections.abc import Callable

from rlhf import losses, rollouts
from rlhf.lm import LM
from rlhf.rollouts import Batch


def prepare(batch: Batch) -> Batch:
    """The optimizer mini-batch with its weights; a sequence's first token has nothing before it and is not trained."""
    mask = batch.mask & ~losses.segments.starts(batch.segment_ids)
    return batch._replace(mask=mask, weights=losses.weights.token_mean(mask, batch.segment_ids))


def objective(lm: LM) -> Callable:
    """The `loss_fn` of a prepared `Batch`; `params` are the model's."""

    def loss_fn(params, context, batch, key):
        s = rollouts.score(lm, params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
        per_token = losses.cross_entropy(s.logprobs, batch.mask)
        return losses.weighted_sum(per_token, batch.weights), {"entropy": losses.weighted_sum(s.entropy, batch.weights)}

    return loss_fn

"""Supervised steps on sequences: what SFT, rejection sampling and distillation share."""

from collections.abc import Callable

from rlhf import losses
from rlhf.rollouts import Batch
from rlhf.training.policy import Policy


def with_weights(batch: Batch) -> Batch:
    """An optimizer mini-batch with its weights: every trained token the same.

    A sequence's first token has nothing before it to be predicted from, and is not trained.
    """
    # Packed rows have several first tokens: the model must not predict one text from another.
    mask = batch.mask & ~losses.segments.starts(batch.segment_ids)
    return batch._replace(mask=mask, weights=losses.weights.token_mean(mask, batch.segment_ids))


def make_loss(policy: Policy) -> Callable:
    """The `loss_fn` of a batch with weights, for `rlhf.train_step`: `-Σ w log p(token)`."""

    def loss_fn(params, context, batch, key):
        scored = policy.score(params, context, batch, key=key)
        per_token = losses.cross_entropy(scored.logprobs, batch.mask)
        metrics = {"entropy": losses.weighted_sum(scored.entropy, batch.weights)}
        return losses.weighted_sum(per_token, batch.weights), metrics

    return loss_fn

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

    def per_token(logprobs, entropy, batch):
        return losses.cross_entropy(logprobs, batch.mask)

    def loss_fn(params, context, batch, key):
        loss, scored = policy.score_loss(params, context, batch, per_token, key=key)
        return loss, {"entropy": losses.weighted_sum(scored.entropy, batch.weights)}

    return loss_fn

"""Preference objectives without a reference, beside the likelihood of the better completion: what
CPO and ORPO share.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from rlhf import losses, rollouts
from rlhf.fields import documented
from rlhf.losses import preference, reference_free
from rlhf.rollouts import Batch, Pairs
from rlhf.shared_prefix import SharedPrefix
from rlhf.training import preference as pair_losses
from rlhf.training.policy import Policy


@documented
class WeightedPairs(NamedTuple):
    """An optimizer mini-batch with its weights.

    Attributes:
      pairs: with weights of the pairs.
      nll_weights: [R, N] float32, of the imitated completions: each trained token of the mini-batch
        counts the same.
    """

    pairs: Pairs
    nll_weights: Any

    @property
    def segment_ids(self):
        """Of the pairs."""
        return self.pairs.segment_ids


def imitated(of_completions):
    """`[R, N, 2]` -> `[R, N]`: what is the chosen completion's; of triples, `[R, 1, 3]`, the
    third's.
    """
    # Triples are chosen, rejected, reference, in this order.
    return of_completions[..., 2 if of_completions.shape[-1] == 3 else 0]


def imitated_tokens(rows: Batch, prompts_too: bool):
    """`[B, T]` bool: the tokens of completions; with prompts all tokens that have a log-prob, which
    a first one has not.
    """
    if not prompts_too:
        return rows.mask
    # A first token has nothing before it to be predicted from.
    return (rows.segment_ids != 0) & ~losses.segments.starts(rows.segment_ids)


def with_weights(
    pairs: Pairs, *, prompts_too: bool = False, max_segments: int = 1
) -> WeightedPairs:
    """Weights: every pair the same, and every imitated token the same.

    Args:
      pairs: or triples, whose third completion is imitated.
      prompts_too: whether prompts are imitated with their completions.
      max_segments: the most sequences of a packed row.
    """
    rows = rollouts.pair_rows(pairs)
    valid = (pair_losses.lengths(pairs, max_segments=max_segments) > 0).all(-1)
    tokens = imitated_tokens(rows, prompts_too)
    lengths = pair_losses.completion_sums(
        tokens.astype(jnp.float32), pairs, tokens, max_segments=max_segments
    )
    # Two weights: pairs count the same in the preference term, tokens the same in the NLL.
    number = jnp.sum(imitated(lengths) * valid)
    pairs = pairs._replace(weights=valid / jnp.maximum(valid.sum(), 1))
    return WeightedPairs(pairs, nll_weights=valid / jnp.maximum(number, 1))


def make_loss(
    policy: Policy,
    *,
    loss: Callable = reference_free.cpo,
    nll_coef: float = 1.0,
    prompts_too: bool = False,
    max_segments: int = 1,
    shared: SharedPrefix | None = None,
) -> Callable:
    """The `loss_fn` of `WeightedPairs`: `loss + nll_coef · NLL of the imitated completions`.

    Args:
      policy: what is trained.
      loss: of `losses.reference_free`; one that takes `chosen_length` and `rejected_length` is
        given them.
      nll_coef: of the negative log-likelihood.
      prompts_too: whether prompts are imitated with their completions.
      max_segments: the most sequences of a packed row.
      shared: what the completions of a pair have in common, read once.
    """
    by_length = "chosen_length" in inspect.signature(loss).parameters

    def loss_fn(params, context, batch, key):
        rows = rollouts.pair_rows(batch.pairs)
        tokens = imitated_tokens(rows, prompts_too)
        full = policy.full_params(params, context, key)
        # One pass for both terms: log-probs of the wider mask, summed over the completion or over
        # all.
        scored = rollouts.score_batch(policy.lm, full, rows._replace(mask=tokens), shared=shared)

        def sums(mask=None):
            return pair_losses.completion_sums(
                scored.logprobs, batch.pairs, mask, max_segments=max_segments
            )

        logprobs = sums()
        lengths = pair_losses.lengths(batch.pairs, max_segments=max_segments)
        chosen = logprobs[..., 0]
        rejected = logprobs[..., 1]
        if by_length:
            chosen_length = lengths[..., 0]
            rejected_length = lengths[..., 1]
            per_pair = loss(
                chosen, rejected, chosen_length=chosen_length, rejected_length=rejected_length
            )
            # Metrics are in the loss's own units: means a token where it divides by lengths.
            chosen, rejected = preference.averages(chosen, rejected, chosen_length, rejected_length)
        else:
            per_pair = loss(chosen, rejected)
        nll = losses.weighted_sum(0.0 - imitated(sums(tokens)), batch.nll_weights)
        weights = batch.pairs.weights
        metrics = {"nll": nll, **pair_losses.reward_metrics(chosen, rejected, weights)}
        return losses.weighted_sum(per_pair, weights) + nll_coef * nll, metrics

    return loss_fn

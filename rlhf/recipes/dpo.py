"""Direct preference optimisation on pairs, with the reference's log-probs computed once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf import losses, rollouts
from rlhf.lm import LM
from rlhf.recipes import reward
from rlhf.rollouts import Pairs


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


def objective(lm: LM, *, beta: float = 0.1, max_segments: int = 1, loss: Callable = losses.preference.sigmoid) -> Callable:
    """The `loss_fn` of prepared `Pairs`; `params` are the policy's, `loss` an elementwise preference objective."""

    def loss_fn(params, context, pairs, key):
        logprobs = sequence_logprobs(lm, params, pairs, max_segments=max_segments)
        (chosen, rejected), (ref_chosen, ref_rejected) = (jnp.moveaxis(x, -1, 0) for x in (logprobs, pairs.ref_logprobs))
        per_pair = loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
        margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        metrics = {
            "accuracy": losses.weighted_sum(margin > 0, pairs.weights),
            "margin": losses.weighted_sum(margin, pairs.weights),
        }
        return losses.weighted_sum(per_pair, pairs.weights), metrics

    return loss_fn

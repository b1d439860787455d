"""Importance weights for recipes that sample: the filters of a sampler make its distribution
another than the trainer's.

Completions come from μ, the policy π cut to its `top_k`, `top_p` or `min_p` tokens, but the
gradient is of log π.  Without the weight π/μ the policy gradient is that of another objective.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp

from rlhf import losses
from rlhf.losses import ratios
from rlhf.ranges import Coefficient, Strength, check_fields
from rlhf.rollouts import Rollout, Sampler

Weigh = Callable[[Rollout], tuple[Any, dict[str, Any]]]
# Names in options, as TRL has them: a level of the ratio, and what happens beyond the bounds.
LOG_RATIOS = {"token": ratios.token_log_ratio, "sequence": ratios.product_log_ratio}
BOUNDS = {"truncate": losses.importance.truncated, "mask": losses.importance.masked}


@dataclasses.dataclass(frozen=True)
class ImportanceOptions:
    """Weights for tokens that the trainer's policy would have sampled with another probability.

    Args:
      importance: the weight π/μ of a token or a whole completion, beyond its bounds truncated or
        masked (set to 0); used where top_k, top_p or min_p filter the tokens.
      importance_max: upper bound of a weight.
      importance_min: lower bound of a weight.
    """

    # TRL's default is sequence_mask.  A filter that keeps a share Z of the probability gives every
    # token a weight of about Z, and a completion of n tokens Zⁿ: 0.95²⁵⁶ is 2e-6, and nothing would
    # be trained.
    importance: Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none"
    ] = "token_truncate"
    importance_max: Strength = 3.0
    importance_min: Coefficient = 0.0

    def __post_init__(self):
        check_fields(self)
        if self.importance_min >= self.importance_max:
            raise ValueError(
                f"importance_min must be below importance_max, but they are {self.importance_min} "
                f"and {self.importance_max}"
            )

    def weigh(self, sampler: Sampler) -> Weigh | None:
        """`(rollout) -> (weights [B, T], metrics)`; None where the sampler filters nothing, or no
        weights are wanted.
        """
        # A temperature is no filter: log-probs are taken at the rollout's temperature.
        if self.importance == "none" or not sampler.transforms:
            return None
        level, beyond = self.importance.split("_")

        def weights(rollout: Rollout) -> tuple[Any, dict[str, Any]]:
            arrays = rollout.logprobs, rollout.sampling_logprobs, rollout.mask
            ratio = losses.importance.weights(*arrays, log_ratio=LOG_RATIOS[level])
            bounded = BOUNDS[beyond](
                ratio, max_weight=self.importance_max, min_weight=self.importance_min
            )
            # Padding has ratio 0, which a lower bound above 0 would lift.
            bounded = jnp.where(rollout.mask, bounded, 0.0)
            return bounded, metrics(rollout, bounded)

        return weights


def weighted(weigh: Weigh | None, batch: Any, rollout: Rollout) -> tuple[Any, dict[str, Any]]:
    """The batch with importance weights, and metrics of how far sampler and policy are apart;
    without `weigh` as it is.
    """
    if weigh is None:
        return batch, {}
    importance, mismatch = weigh(rollout)
    return batch._replace(importance=importance), mismatch


def metrics(rollout: Rollout, weights: Any) -> dict[str, Any]:
    """How far the sampler is from the policy: KL(μ ‖ π) in nats a token, the mean weight, and the
    share of the batch that the weights leave (effective sample size)."""
    mismatch = losses.importance.mismatch(rollout.logprobs, rollout.sampling_logprobs, rollout.mask)
    return {
        "mismatch/kl": mismatch["kl"],
        "mismatch/max_difference": mismatch["max_difference"],
        "mismatch/mean_weight": losses.weighted_sum(
            weights, losses.weights.token_mean(rollout.mask)
        ),
        "mismatch/effective_sample_size": losses.importance.effective_sample_size(
            weights, rollout.mask
        ),
    }

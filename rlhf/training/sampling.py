"""Completions sampled by a policy, and what is logged of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import losses, rollouts
from rlhf.fields import documented
from rlhf.lm import LM
from rlhf.rollouts import Prompts, Rollout
from rlhf.train import TrainState
from rlhf.training import datasets, model_info
from rlhf.training.loading import Loaded
from rlhf.training.options import ModelOptions, SamplingOptions
from rlhf.typing import SampleFn

# Completions are cut to a multiple of so many columns: a program is compiled for each width.
BUCKET = 128
# Fields of a rollout that are [B, T].
PER_TOKEN = ("tokens", "mask", "positions", "segment_ids", "logprobs", "sampling_logprobs")


@documented
class StopCriteria(NamedTuple):
    """What ends a completion, beside its length.

    Attributes:
      eos_ids: tokens.
      strings: of `rollouts.stop_strings`, texts; None: none.
    """

    eos_ids: tuple[int, ...]
    strings: Any = None


def stop_criteria(model: ModelOptions, options: SamplingOptions, tokenizer: Any) -> StopCriteria:
    """The tokens that the model's files name, and the texts of the options.  Raises: ValueError
    where there are no tokens.
    """
    strings = rollouts.stop_strings(tokenizer, options.stop) if options.stop else None
    return StopCriteria(model_info.eos_ids(model, tokenizer), strings)


def make_sampler(
    lm: LM, params_of: Callable, options: SamplingOptions, stop: StopCriteria, num_samples: int = 1
) -> SampleFn:
    """`(state, prompts, key) -> Rollout` of `num_samples` completions a prompt.

    Args:
      lm: the language model that samples.
      params_of: `(state) -> params` of it.
      options: how it samples.
      stop: what ends a completion.
      num_samples: completions a prompt.
    """
    settings: dict[str, Any] = dict(
        max_new_tokens=options.max_new_tokens,
        sampler=options.sampler(stop.eos_ids),
        eos_ids=stop.eos_ids,
        stop=stop.strings,
        num_samples=num_samples,
    )

    def sample(state: TrainState, prompts: Prompts, key: Any) -> Rollout:
        return rollouts.generate(lm, params_of(state), prompts, key, **settings)

    return sample


def policy_sampler(
    loaded: Loaded, options: SamplingOptions, stop: StopCriteria, num_samples: int = 1
) -> SampleFn:
    """`make_sampler` of the policy as it is at each step."""
    policy = loaded.policy

    # Adapters and frozen parameters are joined at every call: the state moves from step to step.
    def params_of(state: TrainState) -> Any:
        return policy.lm_params(state.params, state.context)

    return make_sampler(policy.lm, params_of, options, stop, num_samples)


def pair_sampler(first: SampleFn, second: SampleFn) -> SampleFn:
    """`(state, prompts, key) -> Rollout` of two completions a prompt, one of each sampler: row 2p
    is the first's.
    """

    def sample(state: TrainState, prompts: Prompts, key: Any) -> Rollout:
        first_key, second_key = jax.random.split(key)
        one = first(state, prompts, first_key)
        other = second(state, prompts, second_key)
        return jax.tree.map(
            # Stacked on axis 1 and flattened: rows alternate, so that a prompt's two completions
            # are neighbours, as pairs need them.  Scalars (the temperature) are those of the first.
            lambda a, b: jnp.stack([a, b], 1).reshape(-1, *a.shape[1:]) if a.ndim else a,
            one,
            other,
        )

    return sample


def trimmed(rollout: Rollout, max_new_tokens: int, *, bucket: int = BUCKET) -> Rollout:
    """A rollout without the last columns, which no completion reaches.

    The columns of completions are cut to the least multiple of `bucket` that holds the longest of
    them, so that few widths occur.  A function of the rollout alone, the same in every process and
    in a resumed run.

    Args:
      rollout: `[B, T]`, all rows in this process.
      max_new_tokens: the last columns, which are those of completions.
      bucket: columns.

    Returns: the rollout with per-token fields `[B, T - max_new_tokens + width]`, in NumPy where
    they are cut; the same object where nothing is.

    >>> one = np.arange(300)[None, :] < 60
    >>> rollout = Rollout(one, one, one, one, one, one, np.ones(1), 1.0)
    >>> trimmed(rollout, 290).tokens.shape, trimmed(rollout, 290, bucket=32).tokens.shape
    ((1, 138), (1, 74))
    """
    if max_new_tokens <= bucket:
        return rollout
    prompt_columns = rollout.tokens.shape[1] - max_new_tokens
    # Segments and not the mask: what an environment says stands in a completion too.
    used = np.flatnonzero((np.asarray(rollout.segment_ids) != 0).any(0)[prompt_columns:])
    longest = int(used[-1]) + 1 if used.size else 1
    width = -(-longest // bucket) * bucket
    if width >= max_new_tokens:
        return rollout
    end = prompt_columns + width
    cut: dict[str, Any] = {name: np.asarray(getattr(rollout, name))[:, :end] for name in PER_TOKEN}
    return rollout._replace(**cut)


def completion_metrics(rollout: Rollout) -> dict[str, Any]:
    """Lengths of completions in tokens, the share of them that was truncated, and the tokens and
    sequences of the batch.
    """
    # The mask is True on sampled tokens alone: prompts and padding do not count.
    lengths = rollout.mask.sum(-1)
    return {
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1.0 - rollout.finished.mean(),
        "tokens": (rollout.segment_ids != 0).sum(),
        "sequences": len(rollout.tokens),
    }


def rollout_metrics(rollout: Rollout, rewards: Any, ref_logprobs: Any = None) -> dict[str, Any]:
    """`completion_metrics`, the mean reward, and where there is a reference the KL to it in nats a
    sequence.
    """
    metrics = {"reward": jnp.nanmean(rewards), **completion_metrics(rollout)}
    if ref_logprobs is not None:
        per_token = losses.kl.k1(rollout.logprobs, ref_logprobs, rollout.mask)
        metrics["objective/kl"] = losses.segment_sum(per_token, rollout.mask).mean()
    return metrics


def group_metrics(rewards: Any) -> dict[str, Any]:
    """Of rewards `[P, num_samples]`: the mean standard deviation within a group, and the share of
    groups in which it is 0, of those that have rewards.
    """
    # ddof 1, the sample's deviation, as TRL logs it; NaN of a group of one counts as 0 below.
    spread = jnp.nanstd(rewards, axis=1, ddof=1)
    # A group without any reward fills up a batch, or could not be scored, which is counted apart.
    scored = ~jnp.isnan(rewards).all(axis=1)
    return {
        "reward_std": jnp.nanmean(spread),
        "frac_reward_zero_std": (scored & (jnp.nan_to_num(spread) == 0)).sum()
        / jnp.maximum(scored.sum(), 1),
    }


def pair_metrics(rollout: Rollout, rewards: Any) -> dict[str, Any]:
    """`rollout_metrics` of the first completions of `pair_sampler`, and the mean reward of the
    others.
    """
    # Rows of policy and opponent alternate; metrics without a name are of the policy.
    first, first_rewards = datasets.select((rollout, rewards), slice(0, None, 2))
    metrics = rollout_metrics(first, first_rewards)
    of_both = completion_metrics(rollout)
    counts = {name: of_both[name] for name in ("tokens", "sequences")}
    return {**metrics, "opponent_reward": jnp.nanmean(rewards[1::2]), **counts}

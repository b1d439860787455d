"""The demo's steps on tiny models and batches, for the tests of exactness."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import rollouts
from rlhf.losses import presets
from rlhf.models import TransformerConfig, scalar_head, transformer
from rlhf.recipes import ppo, reward
from rlhf.training import policy_gradient, supervised
from rlhf.training import preference as pair_losses
from rlhf.training.policy import Policy

VOCAB, HIDDEN, ROWS, LENGTH = 16, 16, 8, 10


def models(dtype=jnp.float32, **knobs):
    """A policy and a value head whose parameters are all non-zero, with GPT-style learned positions left out."""
    settings = dict(num_layers=1, num_heads=4, num_kv_heads=2, mlp_size=32, qkv_bias=True) | knobs
    lm = transformer(TransformerConfig(VOCAB, HIDDEN, dtype=dtype, param_dtype=dtype, **settings))
    return lm, scalar_head(HIDDEN, scale=0.5, dtype=dtype)


def rows(rng: np.random.Generator, number: int = ROWS, length: int = LENGTH) -> rollouts.Batch:
    """Random right-padded rows of random lengths: a prompt of two tokens, then trained ones."""
    real = np.arange(length)[None, :] < rng.integers(4, length + 1, (number, 1))
    tokens = np.where(real, rng.integers(1, VOCAB, (number, length)), 0).astype(np.int32)
    return rollouts.unpacked_rows(tokens, real, real & (np.arange(length)[None, :] >= 2))


def on_policy(rng: np.random.Generator, dtype) -> rollouts.Batch:
    """Rows with everything that GRPO and PPO read, close enough to the policy that the clips bind for some."""
    batch = rows(rng)
    random = lambda scale, shift=0.0: (scale * rng.normal(size=batch.tokens.shape) + shift).astype(
        dtype
    )
    return batch._replace(
        old_logprobs=random(0.3, -2.8),
        ref_logprobs=random(0.3, -2.8),
        values=random(0.5),
        returns=random(0.5),
        advantages=random(1.0),
    )


def pairs(rng: np.random.Generator, number: int = ROWS) -> rollouts.Pairs:
    """Random preference pairs, unpacked."""
    batch = rows(rng, 2 * number)
    two = lambda x: np.reshape(x, (number, 2, LENGTH))
    return rollouts.Pairs(
        two(batch.tokens), two(batch.mask), two(batch.positions), two(batch.segment_ids)
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """An objective with its data: what a test of exactness varies is the form of the data."""

    loss_fn: Callable  # (max_segments) -> loss_fn
    prepare: Callable  # (batch, max_segments) -> the optimizer mini-batch
    params: Any
    data: Any


def all_steps(dtype=jnp.float32, **knobs) -> dict[str, Step]:
    """SFT, reward modelling, GRPO, PPO and DPO."""
    lm, head = models(dtype, **knobs)
    lm_params, other = lm.init(jax.random.key(0)), lm.init(jax.random.key(1))
    with_head = {"lm": lm_params, "head": head.init(jax.random.key(2))}
    rng = np.random.default_rng(0)
    text, sampled, preferred = rows(rng), on_policy(rng, dtype), pairs(rng)
    algorithm = presets.grpo()
    policy = Policy(lm)
    group_loss = policy_gradient.make_loss(policy, algorithm, kl_coef=0.04)

    def with_group_weights(batch):
        return batch._replace(weights=algorithm.weights(batch.mask, batch.segment_ids))

    def with_pair_weights(pairs, max_segments):
        pairs = pair_losses.with_reference(
            policy, {"reference": other}, pairs, max_segments=max_segments
        )
        return pair_losses.with_weights(pairs, max_segments=max_segments)

    return {
        "sft": Step(
            lambda s: supervised.make_loss(policy),
            lambda b, s: supervised.with_weights(b),
            lm_params,
            text,
        ),
        "reward": Step(
            lambda s: reward.make_loss(Policy(lm, head), max_segments=s),
            lambda b, s: pair_losses.with_weights(b, max_segments=s),
            with_head,
            preferred,
        ),
        "grpo": Step(lambda s: group_loss, lambda b, s: with_group_weights(b), lm_params, sampled),
        "ppo": Step(
            lambda s: ppo.make_loss(Policy(lm, head)),
            lambda b, s: ppo.with_weights(b),
            with_head,
            sampled,
        ),
        "dpo": Step(
            lambda s: pair_losses.make_loss(policy, max_segments=s),
            lambda b, s: with_pair_weights(b, s),
            lm_params,
            preferred,
        ),
    }


def iteration(policy: Policy, update: Callable, reward_fn: Callable, **sampling) -> Callable:
    """`(state, prompts, key) -> (state, metrics)`: samples, scores by `reward_fn(context, rollout, key)`, and updates."""

    def iterate(state, prompts, key):
        sample_key, reward_key, update_key = jax.random.split(key, 3)
        params = policy.lm_params(state.params, state.context)
        rollout = rollouts.generate(policy.lm, params, prompts, sample_key, **sampling)
        rewards = reward_fn(state.context, rollout, reward_key)
        return update(state, rollout, rewards, update_key)

    return iterate


def padded(data: Any) -> Any:
    """The same sequences, two columns further right, and three columns of padding after them, all filled with junk."""

    def pad(name, x):
        if not np.ndim(x):
            return x
        junk = {"tokens": 3, "positions": 7}.get(
            name, False if x.dtype == bool else 0 if name == "segment_ids" else np.nan
        )
        return np.pad(np.asarray(x), [(0, 0)] * (x.ndim - 1) + [(2, 3)], constant_values=junk)

    return type(data)(
        **{name: None if x is None else pad(name, x) for name, x in data._asdict().items()}
    )


def packed(data: Any) -> tuple[Any, int]:
    """The same sequences, those of row 2i and 2i + 1 in one row; and the number of sequences a row."""
    batch = isinstance(data, rollouts.Batch)
    sequences = 2 if batch else 4

    def pack(name, x):
        if x is None or not np.ndim(x):
            return x
        x = np.asarray(x).reshape(-1, sequences, LENGTH)
        if name == "segment_ids":
            x = x * (1 + np.arange(sequences, dtype=np.int32))[None, :, None]
        x = x.reshape(-1, sequences * LENGTH)
        return x if batch else x[:, None]

    return type(data)(**{name: pack(name, x) for name, x in data._asdict().items()}), sequences

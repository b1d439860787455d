"""What recipes make of a rollout, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import rollouts
from rlhf.recipes import grpo, ppo

import steps as tiny  # isort: skip


def one_rollout():
    """Three rows of one prompt token and three sampled ones; only the first row met an end token."""
    lm, head = tiny.models()
    params = {"lm": lm.init(jax.random.key(0)), "head": {"weight": jnp.zeros(tiny.HIDDEN), "bias": jnp.ones(())}}  # V = 1
    prompts = rollouts.Prompts(jnp.full((3, 1), 5), jnp.ones((3, 1), bool))
    rollout = rollouts.generate(lm, params["lm"], prompts, jax.random.key(1), max_new_tokens=3)
    return lm, head, params, rollout._replace(finished=jnp.array([True, False, False]))


def test_ppo_counts_a_score_once_and_bootstraps_what_has_none():
    lm, head, params, rollout = one_rollout()
    scores = jnp.array([1.0, 1.0, jnp.nan])
    batch, seen = ppo.experience(lm, head, params, params["lm"], rollout, scores, kl_coef=0.0, lam=1.0)
    np.testing.assert_allclose(batch.returns[:, 1:], 1.0, atol=1e-6)  # the value is right already, whoever vouches for it
    np.testing.assert_allclose(batch.advantages, 0.0, atol=1e-6)
    assert float(seen["reward"]) == 1.0


def test_ppo_pays_the_kl_per_token():
    lm, head, params, rollout = one_rollout()
    other = lm.init(jax.random.key(9))
    batch, seen = ppo.experience(lm, head, params, other, rollout, jnp.zeros(3), kl_coef=0.5, lam=1.0)
    kl = jnp.where(rollout.mask, rollout.logprobs - batch.ref_logprobs, 0.0)
    to_go = -0.5 * jnp.flip(jnp.cumsum(jnp.flip(kl, 1), 1), 1)
    np.testing.assert_allclose(batch.returns, jnp.where(rollout.mask, to_go, 0.0), atol=1e-5)
    np.testing.assert_allclose(seen["kl_to_reference"], kl.sum(-1).mean(), rtol=1e-5)
    assert np.abs(kl).max() > 0.1


def test_grpo_compares_within_a_group_and_leaves_out_what_has_no_score():
    lm, _, params, rollout = one_rollout()
    batch, _ = grpo.experience(lm, params["lm"], rollout, jnp.array([1.0, 0.0, jnp.nan]), num_samples=3)
    per_row = batch.advantages[:, 1]
    np.testing.assert_allclose(per_row, [0.707, -0.707, 0.0], atol=1e-3)
    np.testing.assert_array_equal(batch.advantages, jnp.where(rollout.mask, per_row[:, None], 0.0))

"""What recipes make of a rollout, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rlhf
from rlhf import rollouts
from rlhf.losses import presets
from rlhf.recipes import grpo, ppo
from rlhf.training import policy_gradient
from rlhf.training.policy import Policy

import steps as tiny  # isort: skip


def one_rollout():
    """Three rows of one prompt token and three sampled ones; only the first row met an end token."""
    lm, head = tiny.models()
    params = {
        "lm": lm.init(jax.random.key(0)),
        "head": {"weight": jnp.zeros(tiny.HIDDEN), "bias": jnp.ones(())},
    }  # V = 1
    prompts = rollouts.Prompts(jnp.full((3, 1), 5), jnp.ones((3, 1), bool))
    rollout = rollouts.generate(lm, params["lm"], prompts, jax.random.key(1), max_new_tokens=3)
    return lm, head, params, rollout._replace(finished=jnp.array([True, False, False]))


def state_of(params, reference):
    return rlhf.init_state(
        params, optax.sgd(0.1), jax.random.key(0), {"reference": rlhf.reference(reference)}
    )


def test_ppo_counts_a_score_once_and_bootstraps_what_has_none():
    lm, head, params, rollout = one_rollout()
    scores = jnp.array([1.0, 1.0, jnp.nan])
    batch, seen = ppo.estimate(
        Policy(lm, head), state_of(params, params["lm"]), rollout, scores, kl_coef=0.0, lam=1.0
    )
    np.testing.assert_allclose(
        batch.returns[:, 1:], 1.0, atol=1e-6
    )  # the value is right already, whoever vouches for it
    np.testing.assert_allclose(batch.advantages, 0.0, atol=1e-6)
    assert float(seen["reward"]) == 1.0


def test_ppo_pays_the_kl_per_token():
    lm, head, params, rollout = one_rollout()
    other = lm.init(jax.random.key(9))
    batch, seen = ppo.estimate(
        Policy(lm, head), state_of(params, other), rollout, jnp.zeros(3), kl_coef=0.5, lam=1.0
    )
    kl = jnp.where(rollout.mask, rollout.logprobs - batch.ref_logprobs, 0.0)
    to_go = -0.5 * jnp.flip(jnp.cumsum(jnp.flip(kl, 1), 1), 1)
    np.testing.assert_allclose(batch.returns, jnp.where(rollout.mask, to_go, 0.0), atol=1e-5)
    np.testing.assert_allclose(seen["objective/kl"], kl.sum(-1).mean(), rtol=1e-5)
    assert np.abs(kl).max() > 0.1


def test_grpo_compares_within_a_group_and_leaves_out_what_has_no_score():
    """The step on a group is that on the rows that have a score, with advantages ±1 / √2 by hand."""
    lm, _, params, rollout = one_rollout()
    policy, optimizer = Policy(lm), optax.sgd(1.0)
    algorithm = presets.grpo()
    update = grpo.make_update(policy, optimizer, num_samples=3, algorithm=algorithm)
    state = rlhf.init_state(rlhf.reference(params["lm"]), optimizer, jax.random.key(0))
    after, metrics = update(state, rollout, jnp.array([1.0, 0.0, jnp.nan]), jax.random.key(1))

    by_hand = jnp.where(rollout.mask, jnp.array([0.5**0.5, -(0.5**0.5), 0.0])[:, None], 0.0)
    batch = rollouts.batch_of(rollout, advantages=by_hand, weights=algorithm.weights(rollout.mask))
    loss_fn = policy_gradient.make_loss(policy, algorithm)
    gradient = jax.grad(lambda params: loss_fn(params, {}, batch, None)[0])(params["lm"])
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient))
    assert largest > 1e-3
    for moved, start, g in zip(
        *map(jax.tree.leaves, (after.params, params["lm"], gradient)), strict=True
    ):
        np.testing.assert_allclose(start - moved, g, atol=1e-3 * largest)
    assert metrics["reward"] == 0.5

"""Filters of a sampler, and the policy gradient, by exact enumeration of a small categorical policy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import exhaustive

import rlhf
from rlhf import losses, rollouts
from rlhf.recipes import grpo
from rlhf.rollouts import Prompts, Rollout, samplers
from rlhf.train import init_state
from rlhf.training.importance import ImportanceOptions
from rlhf.training.policy import Policy

import steps as tiny  # isort: skip

V = 5
TOP = samplers.top_p(0.7)


def enumerated(logits, length):
    """Every completion of `length` tokens, with log-probs of policy and filtered sampler; logits by the token before."""
    tokens = np.array(list(itertools.product(range(V), repeat=length)))
    before = np.concatenate([np.zeros((len(tokens), 1), int), tokens[:, :-1]], 1)
    sampler = samplers.sampler(TOP)
    policy = jax.nn.log_softmax(logits)
    filtered = jax.nn.log_softmax(jnp.stack([samplers.apply(sampler, row)[1] for row in logits]))
    return tokens, before, np.asarray(policy)[before, tokens], np.asarray(filtered)[before, tokens]


def gradients(length, importance):
    """The expected gradient of the loss over the sampler's completions, and the policy gradient over those it can write."""
    logits = 1.5 * jax.random.normal(jax.random.key(1), (V, V))
    tokens, before, policy, filtered = enumerated(logits, length)
    possible = np.isfinite(filtered).all(1)
    assert 0 < possible.sum() < len(tokens)
    tokens, before, policy, filtered = (x[possible] for x in (tokens, before, policy, filtered))
    rewards = np.random.default_rng(0).normal(size=len(tokens)).astype(np.float32)
    mask = jnp.ones(tokens.shape, bool)
    rollout = Rollout(
        tokens, mask, before, mask.astype(int), policy, filtered, mask[:, 0], jnp.float32(1.0)
    )
    weigh = ImportanceOptions(importance, importance_max=1e3).weigh(samplers.sampler(TOP))
    weights = 1.0 if weigh is None else weigh(rollout)[0]
    chances = np.exp(filtered.sum(1))
    np.testing.assert_allclose(chances.sum(), 1.0, rtol=1e-5)

    def expected_loss(logits):
        logprobs = jax.nn.log_softmax(logits)[before, tokens]
        per_token = (
            losses.clipped_surrogate(logprobs, policy, rewards[:, None] * mask, mask) * weights
        )
        return jnp.sum(chances[:, None] * per_token)

    def objective(logits):
        return -jnp.sum(jnp.exp(jax.nn.log_softmax(logits)[before, tokens].sum(1)) * rewards)

    return np.asarray(jax.grad(expected_loss)(logits)), np.asarray(jax.grad(objective)(logits))


@pytest.mark.parametrize(
    ("length", "importance"),
    exhaustive(
        [(1, "token_truncate"), (1, "sequence_mask"), (3, "sequence_truncate")],
        quick=[],
    ),
)
def test_weighted_samples_give_the_policy_gradient(length, importance):
    ours, truth = gradients(length, importance)
    np.testing.assert_allclose(ours, truth, atol=1e-6 * np.abs(truth).max() + 1e-6)


def test_without_weights_it_is_another():
    for length in (1, 3):
        ours, truth = gradients(length, "none")
        assert np.abs(ours - truth).max() > 0.1 * np.abs(truth).max()


def test_weights_of_tokens_are_nearer_than_none():
    """They leave out only that the tokens before came from the sampler too; for long completions, see `ImportanceOptions`."""
    cosine = lambda a, b: np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
    distance = lambda pair: np.linalg.norm(pair[0] - pair[1])
    assert distance(gradients(3, "token_truncate")) < distance(gradients(3, "none"))
    assert cosine(*gradients(3, "token_truncate")) > 0.95


def test_a_step_weighs_its_tokens_where_the_sampler_filters():
    lm, _ = tiny.models()
    params = lm.init(jax.random.key(0))
    prompts = Prompts(jnp.full((2, 1), 5), jnp.ones((2, 1), bool))
    reward_fn = lambda context, rollout, key: (rollout.tokens[:, -1] % 2).astype(jnp.float32)
    state = init_state(
        params, optax.sgd(0.1), jax.random.key(1), {"reference": rlhf.reference(params)}
    )
    key = jax.random.key(2)

    def iteration(importance, *filters):
        policy, sampler = Policy(lm), rollouts.sampler(*filters)
        weigh = ImportanceOptions(importance).weigh(sampler)
        update = grpo.make_update(policy, optax.sgd(0.1), num_samples=4, importance=weigh)
        return tiny.iteration(
            policy, update, reward_fn, max_new_tokens=3, num_samples=4, sampler=sampler
        )

    _, metrics = jax.jit(iteration("token_truncate", samplers.top_k(2)))(state, prompts, key)
    assert 0 < metrics["mismatch/mean_weight"] < 1
    assert metrics["mismatch/kl"] > 0
    for unweighted in (iteration("token_truncate"), iteration("none", samplers.top_k(2))):
        _, metrics = jax.eval_shape(unweighted, state, prompts, key)
        assert "loss" in metrics
        assert not [name for name in metrics if name.startswith("mismatch")]


def test_bounds():
    arrays = jnp.log(jnp.array([[0.5, 0.5, 0.1]])), jnp.log(jnp.array([[0.1, 0.5, 0.5]]))
    mask = jnp.array([[True, True, False]])
    rollout = Rollout(None, mask, None, None, *arrays, None, None)
    of = lambda name, **bounds: (
        ImportanceOptions(name, **bounds).weigh(samplers.sampler(TOP))(rollout)[0][0].tolist()
    )
    assert of("token_truncate") == [3.0, 1.0, 0.0]
    assert of("token_mask") == [0.0, 1.0, 0.0]
    assert of("sequence_truncate", importance_max=9.0) == pytest.approx([5.0, 5.0, 0.0])
    assert of("token_truncate", importance_min=2.0) == [3.0, 2.0, 0.0]
    with pytest.raises(ValueError, match="importance_min must be below importance_max"):
        ImportanceOptions(importance_min=4.0)
    with pytest.raises(ValueError, match="num_samples 1: advantages compare"):
        grpo.make_update(None, None, num_samples=1)

"""The same gradient whatever the micro-batches, the padding and the packing; scanned and vmapped runs equal the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import exhaustive

import rlhf
from rlhf import losses, rollouts
from rlhf.recipes import grpo
from rlhf.training import preference as pair_losses
from rlhf.training import supervised
from rlhf.training.policy import Policy

import steps as tiny  # isort: skip

STEPS = ("sft", "reward", "grpo", "ppo", "dpo")


@pytest.fixture(scope="module")
def float64_steps():
    with jax.enable_x64(True):
        return tiny.all_steps(jnp.float64)


def gradient(loss_fn, params, batch, micro_batches=1, step=rlhf.train_step):
    """The gradient that a train step takes, through SGD at rate 1."""
    optimizer = optax.sgd(1.0)
    state = rlhf.init_state(rlhf.reference(params), optimizer, jax.random.key(0))
    after, _ = jax.jit(step(loss_fn, optimizer, micro_batches=micro_batches))(state, batch)
    return jax.tree.map(jnp.subtract, params, after.params)


def assert_equal(a, b, tolerance=1e-10):
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(a))
    assert largest > 1e-6, "a gradient that is zero proves nothing"
    for path, x in jax.tree_util.tree_leaves_with_path(a):
        y = dict(jax.tree_util.tree_leaves_with_path(b))[path]
        np.testing.assert_allclose(
            x, y, rtol=0, atol=tolerance * largest, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize("name", exhaustive(STEPS, quick=["grpo"]))
def test_gradient_is_the_same_for_any_micro_batches_padding_and_packing(name, float64_steps):
    with jax.enable_x64(True):
        step = float64_steps[name]
        batch = step.prepare(step.data, 1)
        whole = gradient(step.loss_fn(1), step.params, batch)
        for micro_batches in (2, 4, 8) if name in ("grpo", "ppo", "dpo") else (4,):
            assert_equal(whole, gradient(step.loss_fn(1), step.params, batch, micro_batches))
        assert_equal(
            whole, gradient(step.loss_fn(1), step.params, step.prepare(tiny.padded(step.data), 1))
        )
        packed, sequences = tiny.packed(step.data)
        assert_equal(
            whole,
            gradient(step.loss_fn(sequences), step.params, step.prepare(packed, sequences), 2),
        )


def coupled(lm, max_segments):
    """AOT: the sort runs over all pairs of the mini-batch."""
    scores_fn = lambda params, context, pairs, key: pair_losses.sequence_logprobs(
        lm, params, pairs, max_segments=max_segments
    )

    def objective(scores, context, pairs):
        (chosen, rejected), (ref_chosen, ref_rejected) = (
            jnp.moveaxis(x.reshape(-1, 2), -1, 0) for x in (scores, pairs.ref_logprobs)
        )
        return losses.preference.aot(chosen, rejected, ref_chosen, ref_rejected).mean(), {}

    return scores_fn, objective


@pytest.mark.exhaustive
def test_coupled_gradient_is_the_same_for_any_micro_batches_padding_and_packing(float64_steps):
    with jax.enable_x64(True):
        step = float64_steps["dpo"]
        lm, _ = tiny.models(jnp.float64)

        def run(pairs, max_segments, micro_batches):
            scores_fn, objective = coupled(lm, max_segments)
            make = lambda fn, optimizer, **kw: rlhf.coupled_train_step(
                fn, objective, optimizer, **kw
            )
            return gradient(
                scores_fn, step.params, step.prepare(pairs, max_segments), micro_batches, make
            )

        whole = run(step.data, 1, 1)
        for micro_batches in (2, 4, 8):
            assert_equal(whole, run(step.data, 1, micro_batches))
        assert_equal(whole, run(tiny.padded(step.data), 1, 2))
        assert_equal(whole, run(*tiny.packed(step.data), 2))

        scores_fn, objective = coupled(lm, 1)
        direct = jax.jit(jax.grad(lambda p, b: objective(scores_fn(p, (), b, None), (), b)[0]))
        pairs = step.prepare(step.data, 1)
        assert_equal(whole, direct(step.params, pairs))
        halves = (
            direct(step.params, jax.tree.map(lambda x, i=i: x[i::2], pairs)) for i in (0, 1)
        )  # each sorts by itself
        naive = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
        with pytest.raises(AssertionError):
            assert_equal(whole, naive, tolerance=1e-3)


def iteration(early_end=False):
    """A whole GRPO iteration as a function of (state, key), on one fixed set of prompts."""
    lm, _ = tiny.models()
    optimizer = optax.sgd(0.1)
    reward_fn = lambda context, rollout, key: (rollout.tokens == 5).sum(-1).astype(jnp.float32)
    policy = Policy(lm)
    update = grpo.make_update(
        policy, optimizer, num_samples=4, kl_coef=0.04, num_minibatches=2, max_new_tokens=4
    )
    iterate = tiny.iteration(
        policy,
        update,
        reward_fn,
        max_new_tokens=4,
        num_samples=4,
        eos_ids=(2,),
        early_end=early_end,
    )
    prompts = rollouts.Prompts(jnp.full((2, 3), 7), jnp.array([[True] * 3, [False, True, True]]))

    def init(key):
        params = lm.init(key)
        return rlhf.init_state(
            params, optimizer, jax.random.fold_in(key, 1), {"reference": rlhf.reference(params)}
        )

    return init, lambda state, key: iterate(state, prompts, key)


@pytest.mark.exhaustive
def test_scan_over_whole_train_steps_and_vmap_over_seeds_equal_the_loop():
    init, step = iteration()
    seeds = jax.random.split(jax.random.key(0), 4)
    step_keys = lambda key: jax.random.split(jax.random.fold_in(key, 2), 3)

    def train(key):
        return jax.lax.scan(step, init(key), step_keys(key))

    states, metrics = jax.jit(jax.vmap(train))(seeds)
    jitted = jax.jit(step)
    for i in (1, 3):
        state, seen = init(seeds[i]), []
        for key in step_keys(seeds[i]):
            state, m = jitted(state, key)
            seen.append(m["reward"])
        assert_equal(state.params, jax.tree.map(lambda x, i=i: x[i], states.params), 1e-5)
        np.testing.assert_allclose(metrics["reward"][i], seen, rtol=1e-5)
    assert np.std(metrics["reward"]) > 0, "all seeds alike: vmap saw one"


def test_sft_does_not_train_a_first_token():
    batch = supervised.with_weights(
        tiny.rows(np.random.default_rng(0))._replace(mask=jnp.ones((8, 10), bool))
    )
    assert not batch.mask[:, 0].any()
    np.testing.assert_allclose(batch.weights.sum(), 1.0, rtol=1e-6)

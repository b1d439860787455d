"""Continuous batching, shared prefixes, keys of prompts: what a row samples depends on nothing but its prompt and its key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf import rollouts

import steps as tiny  # isort: skip

KEY = jax.random.key(0)
NEW, EOS = 8, (2, 9)
RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(1, 5, 13)
PROMPTS = rollouts.Prompts(
    RNG.integers(3, 16, (13, 4)).astype(np.int32), np.arange(4)[None, :] >= 4 - LENGTHS[:, None]
)
SAMPLER = rollouts.sampler(temperature=0.7)


@pytest.fixture(scope="module")
def model():
    lm = tiny.models(num_layers=2)[0]
    return lm, jax.tree.map(lambda x: 1.3 * x, lm.init(KEY))


def sample(model, prompts=PROMPTS, key=KEY, slots=None, **kw):
    settings = dict(max_new_tokens=NEW, eos_ids=EOS, sampler=SAMPLER) | kw
    generate = rollouts.generate if slots is None else rollouts.generate_many
    return jax.device_get(
        generate(*model, prompts, key, **settings, **({} if slots is None else {"slots": slots}))
    )


@pytest.fixture(scope="module")
def alone(model):
    return sample(model)


def assert_same(a, b):
    for field in ("tokens", "mask", "positions", "segment_ids", "finished"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)
    np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(a.sampling_logprobs, b.sampling_logprobs, rtol=0, atol=1e-5)


def test_completions_differ_in_length(alone):
    lengths = alone.mask.sum(1)
    assert len(set(lengths)) > 3
    assert 0 < alone.finished.sum() < 13


@pytest.mark.parametrize("slots", [1, 4, 64])
def test_any_number_of_slots_gives_the_same(slots, model, alone):
    assert_same(sample(model, slots=slots), alone)


@pytest.mark.parametrize("early_end", [True, False])
def test_stages_of_a_long_completion_give_the_same(early_end, model):
    long = dict(
        max_new_tokens=35, prefix=jnp.array([5, 3, 7], jnp.int32), eos_ids=(9,)
    )  # 17 tokens, then 18; slots have one
    staged = sample(model, early_end=early_end, **long)
    assert {17, 18} < set(range(staged.mask.sum(1).min(), staged.mask.sum(1).max()))
    assert_same(staged, sample(model, slots=13, **long))


def test_slots_are_refilled_by_whole_prompts_with_their_samples(model):
    assert_same(sample(model, slots=7, num_samples=3, refill=2), sample(model, num_samples=3))


def test_any_order_of_prompts_gives_the_same_with_a_key_each(model):
    keys, order = jax.random.split(KEY, 13), RNG.permutation(13)
    straight = sample(model, key=keys, slots=4)
    shuffled = sample(model, jax.tree.map(lambda x: x[order], PROMPTS), keys[order], slots=4)
    assert_same(shuffled, jax.tree.map(lambda x: x[order] if np.ndim(x) else x, straight))


def test_a_prefix_is_the_same_as_writing_it_before_each_prompt(model):
    prefix = jnp.array([5, 3, 7], jnp.int32)
    whole = rollouts.Prompts(
        np.concatenate([np.broadcast_to(prefix, (13, 3)), PROMPTS.tokens], axis=1),
        np.concatenate([np.ones((13, 3), bool), PROMPTS.mask], axis=1),
    )
    expected = sample(model, whole)
    assert_same(sample(model, prefix=prefix), expected)
    assert_same(sample(model, prefix=prefix, slots=4), expected)


def test_refusals_name_both_sides(model):
    with pytest.raises(
        ValueError,
        match=r"3 slots but 1 prompts of 4 samples are read together; give at least 4 slots",
    ):
        sample(model, slots=3, num_samples=4)
    with pytest.raises(ValueError, match=r"prefix \[1, 3\] but it must be \[S\]"):
        sample(model, prefix=jnp.ones((1, 3), jnp.int32))

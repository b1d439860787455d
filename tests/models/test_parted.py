"""A frozen trunk with a trained top: the same model, gradients of the top alone, one trunk for policy and reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rlhf
from rlhf import rollouts
from rlhf.models import Experts, LayerKind, Rope, TransformerConfig, parted, transformer

KINDS = (LayerKind(window=2), LayerKind(rope=Rope(100.0), sparse=True))
CONFIG = TransformerConfig(
    vocab_size=11,
    hidden_size=8,
    num_layers=5,
    num_heads=2,
    mlp_size=8,
    kinds=KINDS,
    experts=Experts(3, 2, 4),
)
LM = transformer(CONFIG)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 6)), jnp.int32)
WHERE = dict(positions=jnp.broadcast_to(jnp.arange(6), (2, 6)), segment_ids=jnp.ones_like(TOKENS))
PARAMS = LM.init(jax.random.key(0))


def loss(params):
    return jnp.sum(rollouts.token_logprobs(LM, params, TOKENS, **WHERE))


def test_values_and_gradients_are_the_whole_model_s():
    """The kinds alternate, and the top begins with the second; dense and sparse leaves are cut at their own layers."""
    trained, frozen = parted.part(LM, PARAMS, top=2)
    value, gradient = jax.jit(jax.value_and_grad(lambda t: loss(parted.join(t, frozen))))(trained)
    expected, whole = jax.jit(jax.value_and_grad(loss))(PARAMS)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    of_top, _ = parted.part(LM, whole, top=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), gradient, of_top)
    jax.tree.map(np.testing.assert_array_equal, parted.merged(parted.join(trained, frozen)), PARAMS)


def test_the_same_tokens_are_sampled():
    trained, frozen = parted.part(LM, PARAMS, top=1)
    prompts = rollouts.Prompts(TOKENS, jnp.ones_like(TOKENS, bool))
    sample = lambda params: rollouts.generate(
        LM, params, prompts, jax.random.key(1), max_new_tokens=4
    )
    a, b = sample(parted.join(trained, frozen)), sample(PARAMS)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-6)


def test_a_step_trains_the_top_and_the_reference_shares_the_trunk():
    trained, frozen = parted.part(LM, PARAMS, top=2)
    reference = rlhf.reference(trained)
    assert parted.join(reference, frozen)["layers"]["q"].bottom is frozen["layers"]["q"]
    loss_fn = lambda trained, context, batch, key: (
        loss(parted.join(trained, context["frozen"])),
        {},
    )
    optimizer = optax.adam(0.1)
    state = rlhf.init_state(
        trained, optimizer, jax.random.key(0), {"frozen": frozen, "reference": reference}
    )
    after, _ = jax.jit(rlhf.train_step(loss_fn, optimizer))(state, TOKENS)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.params, trained)
    assert all(jax.tree.leaves(moved))
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert size(after.opt_state) < 2 * size(trained) + 10


@pytest.mark.parametrize("top", [0, 5])
def test_a_top_of_nothing_or_of_everything_is_refused(top):
    with pytest.raises(ValueError, match=f"top must be from 1 to 4, of 5 layers, but is {top}"):
        parted.part(LM, PARAMS, top=top)


def test_one_layer_kind_is_one_scan():
    """A dense model of one kind, split anywhere, is the same."""
    lm = transformer(dataclasses.replace(CONFIG, kinds=(LayerKind(),), experts=None, num_layers=3))
    params = lm.init(jax.random.key(0))
    hidden = lambda params: lm.hidden(params, TOKENS, **WHERE)[0]
    split = parted.join(*parted.part(lm, params, top=2))
    np.testing.assert_allclose(jax.jit(hidden)(split), jax.jit(hidden)(params), rtol=0, atol=1e-6)

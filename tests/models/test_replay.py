"""Experts that a policy sampled with, taken again where its tokens are scored."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_goldens import load, names

from rlhf import rollouts, sharding
from rlhf.models import Experts, LayerKind, TransformerConfig, transformer
from rlhf.recipes import grpo
from rlhf.rollouts import Prompts
from rlhf.shared_prefix import SharedPrefix
from rlhf.train import init_state
from rlhf.training import meshes
from rlhf.training.policy import Policy

SPARSE = LayerKind(sparse=True)
SIZES: dict[str, Any] = dict(
    vocab_size=11,
    hidden_size=16,
    num_layers=5,
    num_heads=2,
    mlp_size=8,
    kinds=(LayerKind(), SPARSE, SPARSE, SPARSE, SPARSE),
)
LM = transformer(TransformerConfig(**SIZES, experts=Experts(6, 2, 8)))
PROMPTS = Prompts(
    jnp.array([[3, 4, 5, 6], [0, 0, 7, 8]]), jnp.array([[True] * 4, [False, False, True, True]])
)


@functools.cache
def sampled():
    params = LM.init(jax.random.key(0))
    options = dict(max_new_tokens=6, num_samples=2, record_experts=True)
    return params, rollouts.generate(LM, params, PROMPTS, jax.random.key(1), **options)


def moved(params):
    """As a step of training or another device's rounding moves them: routers choose otherwise."""
    rng = np.random.default_rng(0)
    layers = {**params["layers"]}
    layers["router"] = layers["router"] + jnp.asarray(
        0.2 * rng.normal(size=layers["router"].shape), jnp.float32
    )
    return {**params, "layers": layers}


def choices(params, rollout, inputs=None):
    where = dict(positions=rollout.positions, segment_ids=rollout.segment_ids, inputs=inputs)
    return np.sort(LM.hidden(params, rollout.tokens, **where)[2]["experts"], axis=-1)


def read(rollout):
    """The tokens that were read: all but padding and the last."""
    real = np.asarray(rollout.segment_ids) != 0
    last = real & (np.cumsum(real[:, ::-1], axis=1)[:, ::-1] == 1)
    return real & ~last


def test_what_is_recorded_is_what_the_routers_chose():
    params, rollout = sampled()
    recorded = rollout.inputs["experts"]
    assert recorded.shape == (*rollout.tokens.shape, 4, 2)
    at = read(rollout)
    assert at.sum() == 2 * (9 + 7)
    np.testing.assert_array_equal(np.sort(recorded, axis=-1)[at], choices(params, rollout)[at])


def test_replay_takes_the_recorded_experts_whatever_the_router_says():
    params, rollout = sampled()
    other = moved(params)
    at = read(rollout)
    recorded = np.sort(rollout.inputs["experts"], axis=-1)
    assert (choices(other, rollout)[at] != recorded[at]).mean() > 0.05
    np.testing.assert_array_equal(choices(other, rollout, rollout.inputs)[at], recorded[at])


def test_scores_with_replay_are_those_of_sampling():
    params, rollout = sampled()
    scored = rollouts.score_batch(LM, params, rollout)
    np.testing.assert_allclose(scored.logprobs, rollout.logprobs, rtol=0, atol=1e-5)
    # A group's prompt is read once, with the experts that it has in each row.
    shared = SharedPrefix(2, 6)
    again = rollouts.score_batch(LM, params, rollout, shared=shared)
    np.testing.assert_allclose(again.logprobs, scored.logprobs, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(
        again.aux["experts"][read(rollout)], scored.aux["experts"][read(rollout)]
    )


def tied(params):
    """Twice the same, but for which of two experts of nearly the same score is ahead by a last bit."""
    layers = {**params["layers"]}
    router = np.array(layers["router"])
    router[:, :, 1] = np.nextafter(router[:, :, 0], np.inf)
    flipped = np.array(router)
    flipped[:, :, 0], flipped[:, :, 1] = router[:, :, 1], router[:, :, 0]
    return [{**params, "layers": {**layers, "router": jnp.asarray(r)}} for r in (router, flipped)]


def test_without_replay_a_tie_that_rounds_otherwise_moves_the_log_probs():
    """Two experts of the same score, until something in the last bit decides: with replay it counts for nothing."""
    one, other = tied(sampled()[0])
    options = dict(max_new_tokens=6, num_samples=2, record_experts=True)
    rollout = rollouts.generate(LM, one, PROMPTS, jax.random.key(1), **options)
    replayed = rollouts.score_batch(LM, other, rollout).logprobs
    free = rollouts.score_batch(LM, other, rollout._replace(inputs=None)).logprobs
    np.testing.assert_allclose(replayed, rollout.logprobs, rtol=0, atol=1e-5)
    assert np.abs(free - rollout.logprobs).max() > 1e-3


# XLA may leave out roundings to bfloat16 between operations that it fuses, and fuses otherwise for
# one token than for many: then the two differ in bfloat16's last bits, and routers choose otherwise.
rounded = functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})


@pytest.mark.parametrize("per_token", [1, 2])
def test_with_replay_sampled_and_scored_are_the_same_bit_for_bit(per_token):
    """In bfloat16, where another order of a sum is rounded away."""
    experts = Experts(6, per_token, 8)
    lm = transformer(TransformerConfig(**SIZES, experts=experts, dtype=jnp.bfloat16))
    params = lm.init(jax.random.key(0))
    prompts = Prompts(jnp.array([[3, 4, 5, 6], [7, 8, 9, 10]]), jnp.ones((2, 4), bool))
    options = dict(max_new_tokens=6, num_samples=2, record_experts=True)
    sample = lambda params: rollouts.generate(lm, params, prompts, jax.random.key(1), **options)
    rollout = rounded(sample)(params)
    score = rounded(lambda params, rollout: rollouts.score_batch(lm, params, rollout).logprobs)
    assert rollout.mask.sum() == 24
    np.testing.assert_array_equal(score(params, rollout), rollout.logprobs)
    if per_token == 1:
        # The weight of a single expert is 1, so that of the routers nothing but the choice counts.
        other = moved(params)
        np.testing.assert_array_equal(score(other, rollout), rollout.logprobs)
        free = score(other, rollout._replace(inputs=None))
        assert np.abs(free - rollout.logprobs).max() > 1e-2


def test_gradients_flow_to_the_router_through_the_weights():
    params, rollout = sampled()
    loss = lambda params: rollouts.score_batch(LM, params, rollout).logprobs.sum()
    gradient = jax.grad(loss)(params)["layers"]["router"]
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize(
    "name", [name for name in ("phimoe", "llama4_text") if name in names("causal")]
)
@pytest.mark.exhaustive
def test_replay_in_families_with_routers_of_their_own(name):
    lm, _, params, _ = load(name)
    prompts = Prompts(PROMPTS.tokens, PROMPTS.mask)
    options = dict(max_new_tokens=6, record_experts=True)
    rollout = rollouts.generate(lm, params, prompts, jax.random.key(1), **options)
    scored = rollouts.score_batch(lm, params, rollout)
    np.testing.assert_allclose(scored.logprobs, rollout.logprobs, rtol=0, atol=1e-5)


def test_bad_requests_name_both_sides():
    params, rollout = sampled()
    dense = transformer(
        TransformerConfig(vocab_size=11, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8)
    )
    options = dict(max_new_tokens=2, record_experts=True)
    with pytest.raises(ValueError, match="this model has no experts"):
        rollouts.generate(
            dense, dense.init(jax.random.key(0)), PROMPTS, jax.random.key(1), **options
        )
    with pytest.raises(ValueError, match="with a prefix, which is read once for all"):
        rollouts.generate(
            LM, params, PROMPTS, jax.random.key(1), prefix=jnp.array([1, 2]), **options
        )
    short = {"experts": rollout.inputs["experts"][:, 1:]}
    message = r"inputs\['experts'\] \[4, 9, 4, 2\] but tokens \[4, 10\] and 4 layers of experts"
    with pytest.raises(ValueError, match=message):
        rollouts.score_batch(LM, params, rollout._replace(inputs=short))


def test_many_prompts_through_few_rows_record_the_same_experts():
    params, rollout = sampled()
    options = dict(max_new_tokens=6, num_samples=2, record_experts=True)
    many = rollouts.generate_many(LM, params, PROMPTS, jax.random.key(1), slots=2, **options)
    np.testing.assert_array_equal(many.tokens, rollout.tokens)
    at = read(rollout)
    np.testing.assert_array_equal(
        np.asarray(many.inputs["experts"])[at], np.asarray(rollout.inputs["experts"])[at]
    )


def test_a_reference_takes_experts_of_its_own():
    params, rollout = sampled()
    other = moved(params)
    free = rollouts.score_batch(LM, other, rollout._replace(inputs=None)).logprobs
    found = Policy(LM).reference_logprobs({"reference": other}, rollout)
    np.testing.assert_array_equal(found, free)
    assert np.abs(free - rollouts.score_batch(LM, other, rollout).logprobs).max() > 1e-3


def grpo_step(lm, rollout, rewards, mesh):
    """Parameters and metrics after one step, with the state and the rows in their places on a mesh."""
    update = grpo.make_update(Policy(lm), optax.sgd(0.5), num_samples=2, micro_batches=2)
    params = sharding.create(lm.init, lm.axes(), mesh, jax.random.key(0))
    state = init_state(params, optax.sgd(0.5), jax.random.key(2))
    with jax.set_mesh(mesh):
        rollout, rewards = meshes.place((rollout, rewards), mesh)
        state, metrics = jax.jit(update)(state, rollout, rewards, jax.random.key(3))
    return jax.device_get((state.params, metrics))


def test_a_grpo_step_on_experts_in_parts_is_one_device_s():
    """Experts over 4 devices, rows over 8, with the experts that sampled the completions."""
    lm = transformer(TransformerConfig(**{**SIZES, "experts": Experts(8, 2, 8)}))
    rows = Prompts(jnp.tile(PROMPTS.tokens, (4, 1)), jnp.tile(PROMPTS.mask, (4, 1)))
    options = dict(max_new_tokens=6, num_samples=2, record_experts=True)
    rollout = rollouts.generate(lm, lm.init(jax.random.key(0)), rows, jax.random.key(1), **options)
    rewards = jnp.arange(16) % 3 / 2
    one = grpo_step(lm, rollout, rewards, sharding.make_mesh(devices=jax.devices()[:1]))
    found = grpo_step(lm, rollout, rewards, sharding.make_mesh(expert=4, data=2))
    for x, y in zip(jax.tree.leaves(one[0]), jax.tree.leaves(found[0]), strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-5 * np.abs(x).max())
    # The loss is a sum of advantages that cancel.
    for name, x in one[1].items():
        np.testing.assert_allclose(found[1][name], x, rtol=1e-5, atol=1e-7, err_msg=name)
    before = lm.init(jax.random.key(0))
    moved_by = jax.tree.map(lambda x, y: np.abs(x - y).max(), one[0], before)
    assert moved_by["layers"]["router"] > 1e-4
    assert moved_by["layers"]["expert_down"] > 1e-4

"""Models that are not ours, as `LM`s: a recurrent network in Linen, a bag of the past in NNX."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rlhf
from rlhf import rollouts
from rlhf.from_flax import from_linen, from_nnx
from rlhf.recipes import grpo
from rlhf.training.policy import Policy

import steps as tiny  # isort: skip

VOCAB, SIZE, LUCKY, NEW = 6, 8, 3, 4
PROMPTS = rollouts.Prompts(
    jnp.array([[1, 2], [0, 4]], jnp.int32), jnp.array([[True, True], [False, True]])
)


def recur(step, x, positions, segment_ids, state):
    """`state = step(state, x_t)` along T: begun anew at position 0, and left as it is by padding."""

    def body(state, inputs):
        x, position, segment = inputs
        column = lambda condition: condition[:, None]
        new = step(jnp.where(column(position == 0), 0.0, state), x)
        state = jnp.where(column(segment != 0), new, state)
        return state, state

    state, states = jax.lax.scan(body, state, (x.swapaxes(0, 1), positions.T, segment_ids.T))
    return states.swapaxes(0, 1), state


class Recurrent(nn.Module):
    """A gated recurrent network."""

    def setup(self):
        init = nn.initializers.normal(0.3)
        self.table = self.param(
            "table", nn.with_partitioning(init, ("vocab", "embed")), (VOCAB, SIZE)
        )
        self.gate = self.param("gate", init, (2 * SIZE, SIZE))
        self.new = self.param("new", init, (2 * SIZE, SIZE))
        self.out = self.param("out", init, (SIZE, VOCAB))

    def hidden(self, tokens, *, positions, segment_ids, cache=None, inputs=None):
        def step(state, x):
            both = jnp.concatenate([x, state], axis=-1)
            keep = jax.nn.sigmoid(both @ self.gate)
            return keep * state + (1 - keep) * jnp.tanh(both @ self.new)

        state = self.init_cache(tokens.shape[0], 0)["state"] if cache is None else cache["state"]
        hidden, state = recur(step, self.table[tokens], positions, segment_ids, state)
        return hidden, {"state": state}, {}

    def unembed(self, hidden):
        return hidden @ self.out

    def init_cache(self, batch, length):
        return {"state": jnp.zeros((batch, SIZE))}


class Bag(nnx.Module):
    """Logits from the sum of what was read, older tokens weighing less."""

    def __init__(self, rngs):
        self.table = nnx.Param(
            jax.random.normal(rngs.params(), (VOCAB, SIZE)), out_sharding=("vocab", "embed")
        )
        self.out = nnx.Linear(SIZE, VOCAB, rngs=rngs)

    def hidden(self, tokens, *, positions, segment_ids, cache=None, inputs=None):
        state = self.init_cache(tokens.shape[0], 0) if cache is None else cache
        return (
            *recur(
                lambda state, x: 0.7 * state + x,
                self.table[...][tokens],
                positions,
                segment_ids,
                state,
            ),
            {},
        )

    def unembed(self, hidden):
        return self.out(hidden)

    def init_cache(self, batch, length):
        return jnp.zeros((batch, SIZE))


MAKERS = {"linen": lambda: from_linen(Recurrent()), "nnx": lambda: from_nnx(Bag)}


def reward(context, rollout, key):
    """The share of lucky tokens in a completion."""
    return (rollout.mask & (rollout.tokens == LUCKY)).sum(-1) / NEW


@functools.cache
def trained(name, steps=40):
    lm, optimizer = MAKERS[name](), optax.adam(0.03)
    params = lm.init(jax.random.key(0))
    policy = Policy(lm)
    update = grpo.make_update(policy, optimizer, num_samples=16, kl_coef=0.01, max_new_tokens=NEW)
    iterate = tiny.iteration(policy, update, reward, max_new_tokens=NEW, num_samples=16)
    state = rlhf.init_state(
        params, optimizer, jax.random.key(1), {"reference": rlhf.reference(params)}
    )
    run = jax.jit(
        lambda state, keys: jax.lax.scan(
            lambda state, key: iterate(state, PROMPTS, key), state, keys
        )
    )
    return run(state, jax.random.split(jax.random.key(2), steps))


@pytest.mark.parametrize("name", MAKERS)
def test_grpo_learns(name):
    """From about one lucky token in six to more than half: chance is 1/6."""
    state, metrics = trained(name)
    assert metrics["reward"][0] < 0.35
    assert metrics["reward"][-5:].mean() > 0.6
    assert np.isfinite(metrics["loss"]).all()
    assert int(state.step) == 40
    assert not metrics["skipped"].any()


@pytest.mark.parametrize("name", MAKERS)
def test_sampled_logprobs_are_the_scored_ones(name):
    """With a cache and without, prompts padded on the left and completions cut by an end token."""
    lm, params = MAKERS[name](), trained(name)[0].params
    r = rollouts.generate(
        lm, params, PROMPTS, jax.random.key(3), max_new_tokens=NEW, num_samples=8, eos_ids=(LUCKY,)
    )
    assert r.finished.any()
    scored = rollouts.token_logprobs(
        lm, params, r.tokens, positions=r.positions, segment_ids=r.segment_ids
    )
    np.testing.assert_allclose(np.where(r.mask, scored, 0.0), r.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_two_models_made_alike_are_equal(name):
    a, b = MAKERS[name](), MAKERS[name]()
    assert a == b
    assert hash(a) == hash(b)
    assert MAKERS["linen"]() != MAKERS["nnx"]()


def test_axes_are_those_of_the_module():
    assert from_linen(Recurrent()).axes() == {
        "table": ("vocab", "embed"),
        "gate": None,
        "new": None,
        "out": None,
    }
    assert from_nnx(Bag).axes() == {
        "table": ("vocab", "embed"),
        "out": {"kernel": None, "bias": None},
    }


class Dropped(Bag):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


class Normed(Bag):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.norm = nnx.BatchNorm(SIZE, rngs=rngs)


class NormedRecurrent(Recurrent):
    def setup(self):
        super().setup()
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, (SIZE,))


def test_state_beside_parameters_is_refused():
    with pytest.raises(
        TypeError, match=r"Dropped holds state beside nnx\.Param: \['dropout'\]; an LM has none"
    ):
        from_nnx(Dropped)
    with pytest.raises(TypeError, match=r"Normed holds state beside nnx\.Param: \['norm'\]"):
        from_nnx(Normed)
    with pytest.raises(
        TypeError,
        match=r"NormedRecurrent keeps state in \['batch_stats', 'params'\]; an LM has 'params' alone",
    ):
        from_linen(NormedRecurrent()).init(jax.random.key(0))


def test_missing_methods_are_named():
    with pytest.raises(
        TypeError,
        match="Dense has no hidden, unembed, init_cache; a module that becomes an LM has hidden",
    ):
        from_linen(nn.Dense(3))
    with pytest.raises(TypeError, match="Linear has no hidden, unembed, init_cache"):
        from_nnx(lambda rngs: nnx.Linear(2, 2, rngs=rngs))

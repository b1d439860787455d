"""Numbers that look something up, too large or negative: an error, or NaN in the rows concerned, and never another's row."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf import losses, rollouts
from rlhf.models import (
    LayerKind,
    Rope,
    TransformerConfig,
    classifier_head,
    encoder_decoder,
    transformer,
)
from rlhf.models.config import EncoderDecoderConfig
from rlhf.models.rotary import Dynamic
from rlhf.rollouts import Prompts, filtering, replay, samplers

TINY: dict[str, Any] = dict(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, mlp_size=8)
PLAIN: dict[str, Any] = dict(TINY, kinds=(LayerKind(rope=None),))
LEARNED = transformer(TransformerConfig(**PLAIN, max_positions=6, position_offset=2))
ROTARY = transformer(TransformerConfig(**TINY))
STRETCHED = transformer(
    TransformerConfig(**TINY, kinds=(LayerKind(rope=Rope(scaling=Dynamic(2.0, 3))),))
)
ENCODER = transformer(TransformerConfig(**PLAIN, max_positions=6, causal=False, token_types=2))
BOTH = encoder_decoder(
    EncoderDecoderConfig(
        TransformerConfig(**PLAIN, causal=False, max_positions=6),
        TransformerConfig(**PLAIN, cross=True, max_positions=6),
    )
)
KEY = jax.random.key(0)
FINE = dict(
    tokens=jnp.array([[5, 6, 7], [1, 2, 3], [4, 4, 4]]),
    positions=jnp.tile(jnp.arange(3), (3, 1)),
    segment_ids=jnp.ones((3, 3), jnp.int32),
)
BAD = [-1, -3, 8, 1000]  # of 8; or of fewer


def with_one(x, value, at=(1, 1)):
    return jnp.asarray(x).at[at].set(value)


@jax.jit
def finite_rows(*trees):
    leaves = [x for x in jax.tree.leaves(trees) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).reshape(len(x), -1).all(1) for x in leaves]).all(0)


@partial(jax.jit, static_argnames="lm")
def hidden(lm, params, values, **more):
    return lm.hidden(
        params,
        values["tokens"],
        positions=values["positions"],
        segment_ids=values["segment_ids"],
        **more,
    )[:2]


def hidden_rows(lm, values, inputs=None, cache=False):
    return finite_rows(
        hidden(
            lm, params_of(lm), values, cache=lm.init_cache(3, 4) if cache else None, inputs=inputs
        )[0]
    )


PARAMS: dict = {}


def params_of(lm):
    if lm not in PARAMS:
        with (
            jax.ensure_compile_time_eval()
        ):  # the first to ask may be a function that is being compiled
            PARAMS[lm] = jax.jit(lm.init)(KEY)
    return PARAMS[lm]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("lm", "name", "cache"),
    [
        (ROTARY, "tokens", False),
        (LEARNED, "positions", False),
        (LEARNED, "positions", True),
        (ROTARY, "positions", True),  # of a table as wide as the cache
        (STRETCHED, "segment_ids", False),
    ],
    ids=["token", "learned", "learned, cached", "rotary, cached", "segment"],
)
def test_hidden_states_are_nan_in_the_row_concerned(lm, name, cache, bad):
    got = hidden_rows(lm, {**FINE, name: with_one(FINE[name], bad)}, cache=cache)
    assert got.tolist() == [True, False, True]
    assert hidden_rows(lm, FINE, cache=cache).all()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["tokens", "positions"])
def test_padding_may_hold_anything(name, bad):
    padded = {**FINE, "segment_ids": FINE["segment_ids"].at[1, 1:].set(0)}
    other = {**padded, name: with_one(FINE[name], bad)}
    get = lambda values: hidden(LEARNED, params_of(LEARNED), values)[0]
    np.testing.assert_array_equal(
        get(other)[padded["segment_ids"] == 1], get(padded)[padded["segment_ids"] == 1]
    )
    assert finite_rows(get(other)).all()


@pytest.mark.parametrize("bad", BAD)
def test_inputs_of_encoders(bad):
    types = {"token_types": with_one(jnp.zeros((3, 3), jnp.int32), bad)}
    assert hidden_rows(ENCODER, FINE, types).tolist() == [True, False, True]
    for name in ("tokens", "positions"):
        inputs = {**FINE, name: with_one(FINE[name], bad)}
        assert hidden_rows(BOTH, FINE, inputs).tolist() == [True, False, True]
    assert hidden_rows(BOTH, {**FINE, "tokens": with_one(FINE["tokens"], bad)}, FINE).tolist() == [
        True,
        False,
        True,
    ]
    assert hidden_rows(BOTH, FINE, FINE).all()


def test_a_decode_longer_than_its_cache():
    lm = ROTARY
    columns_of = lambda columns: {name: x[:, columns] for name, x in FINE.items()}
    run = lambda cache, columns: hidden(lm, params_of(lm), columns_of(columns), cache=cache)
    _, cache = run(lm.init_cache(3, 2), slice(0, 2))
    uneven = cache._replace(written=jnp.array([1, 2, 1]))
    assert finite_rows(run(uneven, slice(1, 2))[0]).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="3 columns but a cache of 2"):
        run(lm.init_cache(3, 2), slice(0, 3))


MASK = jnp.ones((3, 3), bool)
LOGITS = jax.random.normal(KEY, (3, 3, 8))
PACKED = jnp.array([[1, 1, 2], [1, 2, 2], [1, 1, 1]])
LOOKUPS = {  # what takes ids: (ids) -> floats by row
    "token_logprob": (lambda ids: losses.logits.token_logprob(LOGITS, ids), FINE["tokens"]),
    "smoothed_cross_entropy": (
        lambda ids: losses.logits.smoothed_cross_entropy(LOGITS, ids),
        FINE["tokens"],
    ),
    "process_reward": (
        lambda ids: losses.reward_model.process_reward(LOGITS[..., :2], ids, MASK),
        jnp.zeros((3, 3), jnp.int32),
    ),
    "per_token": (lambda ids: losses.segments.per_token(jnp.arange(6.0), ids), PACKED),
    "spread": (lambda ids: losses.segments.spread(jnp.arange(6.0), MASK, ids), PACKED),
    "total": (lambda ids: losses.segments.total(jnp.ones((3, 3)), MASK, ids), PACKED),
    "mean": (lambda ids: losses.segments.mean(jnp.ones((3, 3)), MASK, ids), PACKED),
    "largest": (lambda ids: losses.segments.largest(jnp.ones((3, 3)), MASK, ids), PACKED),
    "token_share": (lambda ids: losses.weights.token_share(MASK, ids), PACKED),
    "sequence_mean": (lambda ids: losses.weights.sequence_mean(MASK, ids), PACKED),
    "token_logprobs": (
        lambda ids: rollouts.token_logprobs(
            ROTARY,
            params_of(ROTARY),
            ids,
            positions=FINE["positions"],
            segment_ids=FINE["segment_ids"],
        ),
        FINE["tokens"],
    ),
    "positions of score": (
        lambda ids: rollouts.token_logprobs(
            LEARNED,
            params_of(LEARNED),
            FINE["tokens"],
            positions=ids,
            segment_ids=FINE["segment_ids"],
        ),
        FINE["positions"],
    ),
    "take_samples": (
        lambda ids: filtering.take_samples(jnp.ones(9), ids, 3).reshape(3, 3),
        jnp.zeros((3, 3), jnp.int32),
    ),
}
COMPILED = {name: jax.jit(fn) for name, (fn, _) in LOOKUPS.items()}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", LOOKUPS)
def test_what_takes_ids(name, bad):
    fn, (_, ids) = COMPILED[name], LOOKUPS[name]
    assert np.isfinite(fn(ids)).all()
    assert np.isfinite(fn(with_one(ids, bad))).reshape(3, -1).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("bad", [-1, 3, 8])
def test_prompts_of_sequences(bad):
    got = losses.weights.prompt_mean(MASK, prompt_ids=jnp.array([0, bad, 0]))
    assert np.isfinite(got).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("bad", BAD)
def test_classes_have_no_gradient_from_elsewhere(bad):
    gradient = jax.grad(
        lambda x: losses.logits.token_logprob(x, with_one(FINE["tokens"], bad))[
            jnp.array([0, 2])
        ].sum()
    )(LOGITS)
    assert finite_rows(gradient).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda ids: samplers.banned([ids]),
        samplers.allowed,
        lambda ids: samplers.min_new_tokens(2, ids),
    ],
)
def test_samplers(make):
    step = samplers.Step(
        FINE["tokens"],
        MASK,
        ~MASK,
        jnp.full(3, 2),
        jnp.zeros(3, jnp.int32),
        jnp.zeros((3, 4)),
        jnp.ones(()),
    )
    assert np.isnan(make([3, 8])(LOGITS[:, 0], step)).any(1).all()
    assert not np.isnan(make([3, 7])(LOGITS[:, 0], step)).any()
    with pytest.raises(ValueError, match="have token -1, but tokens count from 0"):
        make([3, -1])


PROMPTS = Prompts(np.array([[5, 6], [1, 2]]), np.ones((2, 2), bool))


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("bad", [-1, 8])
def test_prompts_are_refused_on_the_host(bad, array):
    tokens = PROMPTS.tokens.copy()
    tokens[1, 0] = bad
    with pytest.raises(
        ValueError, match=f"row 1 has token {bad}, but the model's vocabulary has 8 tokens"
    ):
        rollouts.generate(
            ROTARY, None, Prompts(array(tokens), array(PROMPTS.mask)), KEY, max_new_tokens=2
        )
    with pytest.raises(ValueError, match=f"row 0 has token {bad}"):
        rollouts.generate(ROTARY, None, PROMPTS, KEY, max_new_tokens=2, prefix=array([bad]))
    where = dict(positions=np.array([[0, 1]] * 2), segment_ids=np.ones((2, 2), int))
    for ask in (
        rollouts.token_logprobs,
        lambda *a, **w: rollouts.classify(a[0], classifier_head(4, 1), *a[1:], **w),
    ):
        with pytest.raises(ValueError, match=f"row 1 has token {bad}"):
            ask(ROTARY, None, tokens, **where)


def test_more_tokens_than_learned_positions_are_refused():
    with pytest.raises(
        ValueError,
        match="row 0 goes to position 1 and 5 after it, but the model has 6 learned positions",
    ):
        rollouts.generate(LEARNED, None, PROMPTS, KEY, max_new_tokens=5)
    where = dict(positions=np.array([[0, 6]] * 2), segment_ids=np.ones((2, 2), int))
    with pytest.raises(ValueError, match="row 0 goes to position 6, but the model has 6"):
        rollouts.token_logprobs(LEARNED, None, PROMPTS.tokens, **where)


@pytest.mark.parametrize("bad", [-1, 3])
def test_indices_of_rows(bad):
    with pytest.raises(ValueError, match="which has indices (0 … 3|-1 … 0)"):
        filtering.take_groups(np.arange(6), jnp.array([0, bad]), 2)
    got = jax.jit(lambda which: filtering.take_groups(jnp.arange(6.0), which, 2))(
        jnp.array([0, bad])
    )
    assert np.isnan(got).tolist() == [False, False, True, True]
    prompts = replay.curriculum(3, weight=lambda state: state.pass_rate)
    with pytest.raises(ValueError, match="there are 3 prompts, 0 to 2"):
        prompts.update(prompts.init(), jnp.array([bad]), jnp.ones((1, 2)))
    state = jax.jit(prompts.update)(prompts.init(), jnp.array([bad]), jnp.ones((1, 2)))
    assert state.pass_rate.tolist() == [0.5] * 3
